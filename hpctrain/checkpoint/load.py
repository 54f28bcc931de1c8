"""Read a checkpoint back, at any number of ranks: pieces by name and flat range, never pickled."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hpctrain.checkpoint.files import (
    FORMAT,
    MANIFEST,
    complete_steps,
    digest,
    digest_of,
    folder_name,
)
from hpctrain.errors import CheckpointError
from hpctrain.piece import Piece


@dataclass(frozen=True)
class Stored:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    state: dict[str, Any]
    pieces: tuple[dict[str, Any], ...]
    files: dict[str, str]
    """SHA-256 by file name."""

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype name of every stored tensor."""
        return {entry["name"]: (tuple(entry["shape"]), entry["dtype"]) for entry in self.pieces}

    def damage(self) -> list[str]:
        """Say what is wrong with the files, a line each. Local; reads them whole."""
        found = []
        for name, checksum in self.files.items():
            path = self.path / name
            if not path.is_file():
                found.append(f"{path} is missing")
            elif digest(path) != checksum:
                found.append(f"{path} is damaged: its SHA-256 is not the manifest's")
        return found

    def read(self, name: str) -> torch.Tensor:
        """Give a whole stored tensor. Local."""
        shape, dtype = self.tensors[name]
        found = torch.empty(shape, dtype=getattr(torch, dtype))
        self.fill(Piece(name, shape, 0, found.numel(), found))
        return found

    def fill(self, piece: Piece) -> None:
        """Copy stored values into a piece, from as many stored pieces as it overlaps. Local."""
        entries = [entry for entry in self.pieces if entry["name"] == piece.name]
        if not entries:
            raise CheckpointError(f"{self.path} has no {piece.name}: it is of another model")
        if tuple(entries[0]["shape"]) != piece.shape:
            raise CheckpointError(
                f"{self.path}: {piece.name} has shape {tuple(entries[0]['shape'])}, the model "
                f"needs {piece.shape}: it is of another model"
            )
        flat = torch.empty(piece.stop - piece.start, dtype=piece.tensor.dtype)
        filled = 0
        for entry in entries:
            start, stop = max(piece.start, entry["start"]), min(piece.stop, entry["stop"])
            if start >= stop:
                continue
            with safe_open(self.path / entry["file"], framework="pt") as file:
                part = file.get_slice(entry["key"])[start - entry["start"] : stop - entry["start"]]
            if part.ndim == 2:  # complex numbers are stored as pairs
                part = torch.view_as_complex(part.contiguous())
            flat[start - piece.start : stop - piece.start] = part
            filled += stop - start
        if filled != piece.stop - piece.start:
            raise CheckpointError(f"{self.path}: {piece.name} is not whole")
        with torch.no_grad():
            piece.tensor.copy_(flat.view(piece.tensor.shape))


def open_checkpoint(path: Path) -> Stored:
    """Read the manifest of a complete checkpoint. Local."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its manifest can't be read: {error}") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: its manifest can't be read: it is no table")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest.get('format')}, this hpctrain reads {FORMAT}: "
            f"use the version that wrote it"
        )
    if manifest.get("sha256") != digest_of(manifest):
        raise CheckpointError(f"{path}: its manifest is damaged: its SHA-256 is another")
    return Stored(path, manifest["step"], manifest["state"], tuple(manifest["pieces"]), manifest["files"])


def newest(folder: Path) -> tuple[Stored | None, list[str]]:
    """Give the newest good checkpoint, and why newer ones were passed over. Local: one rank."""
    passed_over: list[str] = []
    for step in reversed(complete_steps(folder)):
        try:
            stored = open_checkpoint(folder / folder_name(step))
            damage = stored.damage()
        except CheckpointError as error:
            damage = [str(error)]
        if not damage:
            return stored, passed_over
        passed_over += damage
    return None, passed_over
