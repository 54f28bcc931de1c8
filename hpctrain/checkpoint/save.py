"""Write a checkpoint: every rank its share of the pieces, the manifest last, then one rename.

      checkpoints/step-00000120.tmp/ rank-0.safetensors rank-1.safetensors … manifest.json
      checkpoints/step-00000120/     ◄── rename: from here on it exists

A kill at any moment leaves the folder's earlier checkpoints as they were, and at most a folder
whose name ends in .tmp, which the next save removes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from safetensors import SafetensorError
from safetensors.torch import save_file

from hpctrain.checkpoint import plan
from hpctrain.checkpoint.files import (
    FORMAT,
    MANIFEST,
    complete_steps,
    digest,
    digest_of,
    folder_name,
    sync_file,
    sync_folder,
    write_whole,
)
from hpctrain.errors import CheckpointError
from hpctrain.piece import Piece
from hpctrain.wire import together


def save(folder: Path, step: int, pieces: list[Piece], state: dict[str, Any], comm: MPI.Intracomm) -> Path:
    """Write the checkpoint of a step into `checkpoints/`. Collective; `state` is JSON, rank 0's.

    Every rank offers its pieces; one that several have is written once. Returns its folder.
    """
    final = folder / folder_name(step)
    temporary = final.with_name(final.name + ".tmp")
    with together(comm):
        if comm.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("*.tmp"):
                shutil.rmtree(stale)
            temporary.mkdir()
    entries: list[dict[str, Any]] = []
    offers = [plan.Offer(p.name, p.start, p.stop, p.tensor.nbytes) for p in pieces]
    mine = [pieces[at] for at in plan.assign(comm.allgather(offers))[comm.rank]]
    with together(comm):
        entries = write_share(temporary / f"rank-{comm.rank}.safetensors", mine)
    gathered = comm.gather(entries, root=0)
    with together(comm):
        if comm.rank == 0 and gathered is not None:
            files = {entry["file"]: entry.pop("sha256") for share in gathered for entry in share}
            manifest = {
                "format": FORMAT,
                "step": step,
                "world_size": comm.size,
                "files": files,
                "pieces": [entry for share in gathered for entry in share],
                "state": state,
            }
            manifest["sha256"] = digest_of(manifest)
            write_whole(temporary / MANIFEST, json.dumps(manifest, indent=1))
            earlier = final.with_name(final.name + ".earlier.tmp")
            if final.exists():
                final.rename(earlier)  # never deleted before the new one is in its place
            temporary.rename(final)
            sync_folder(folder)
            shutil.rmtree(earlier, ignore_errors=True)
    return final


def write_share(path: Path, pieces: list[Piece]) -> list[dict[str, Any]]:
    """Write this rank's pieces to one file; give the manifest's entries. Local."""
    if not pieces:
        return []
    tensors, entries = {}, []
    for piece in pieces:
        key = f"{piece.name}[{piece.start}:{piece.stop}]"
        flat = piece.tensor.detach().reshape(-1).contiguous().cpu().resolve_conj().resolve_neg()
        tensors[key] = torch.view_as_real(flat) if flat.is_complex() else flat
        entries.append(
            {
                "name": piece.name,
                "shape": list(piece.shape),
                "start": piece.start,
                "stop": piece.stop,
                "dtype": str(piece.tensor.dtype).removeprefix("torch."),
                "file": path.name,
                "key": key,
            }
        )
    try:
        try:
            save_file(tensors, path)  # from where they lie: a copy of all would not fit beside a large model
        except RuntimeError:  # some lie over one another, which the format has no word for
            save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
        sync_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {error}: free space or set train.run_folder") from None
    checksum = digest(path)
    return [{**entry, "sha256": checksum} for entry in entries]


def prune(folder: Path, keep: int, best: int | None, newest: int) -> None:
    """Remove all complete checkpoints but the newest `keep` and the best. Local: one rank.

    `newest` is the step just saved; later ones were passed over as damaged when the run resumed.
    """
    steps = complete_steps(folder)
    kept = plan.newest_and_best([step for step in steps if step <= newest], keep, best)
    for step in set(steps) - set(kept):
        target = folder / folder_name(step)
        doomed = target.with_name(target.name + ".tmp")
        target.rename(doomed)  # never half a checkpoint under a good name
        shutil.rmtree(doomed)
