"""Names of checkpoints, and files that are whole or not there: temporary name, fsync, rename."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FORMAT = 2
MANIFEST = "manifest.json"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file's bytes durable."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that a reader sees all of it or the one before."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest, its own entry left out; the same before and after it was written."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    as_read = json.loads(json.dumps(rest))  # integer keys become text, and sort otherwise
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_name(step: int) -> str:
    """Name of the checkpoint of a step.

    >>> folder_name(120)
    'step-00000120'
    """
    return f"step-{step:08d}"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are complete, oldest first. Local."""
    if not folder.is_dir():
        return []
    return sorted(
        int(path.parent.name.removeprefix("step-"))
        for path in folder.glob(f"step-*/{MANIFEST}")
        if not path.parent.name.endswith(".tmp")
    )
