"""The drift sentinel: replicas must hold the same weights, bit for bit; now and then that is checked.

      digest of every tensor on every rank that keeps a copy  ->  Allreduce of (max, max of the negative)
      equal everywhere  <=>  max = -(max of the negative)

What it finds: a flipped bit in memory or on the wire, a model that behaves differently on one
rank, a buffer that each rank changes in its own way.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI

from hpctrain.errors import DriftError
from hpctrain.piece import Piece

EVERY_STEPS = 100
"""Steps between two looks; a checkpoint is looked at before it is written."""
UNKNOWN = np.iinfo(np.int64).min


def digest(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's bytes in logical order. Local."""
    tensor = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).cpu()
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def check(comm: MPI.Intracomm, pieces: Sequence[Piece], mine: Sequence[bool], step: int) -> None:
    """Compare tensors over the ranks. Collective; raises DriftError on all ranks alike.

    `mine[i]`: whether this rank looks at tensor i; ranks of a node that share it take turns.
    """
    digests = [digest(piece.tensor) if look else UNKNOWN for piece, look in zip(pieces, mine, strict=True)]
    seen = np.array([digests, [-d if d != UNKNOWN else UNKNOWN for d in digests]], dtype=np.int64)
    most = np.empty_like(seen)
    comm.Allreduce(seen, most, op=MPI.MAX)
    bad = np.flatnonzero(most[0] != -most[1])
    if not len(bad):
        return
    first = int(bad[0])
    by_digest: dict[int, list[int]] = {}
    for rank, found in enumerate(comm.allgather(digests[first])):
        if found != UNKNOWN:
            by_digest.setdefault(found, []).append(rank)
    groups = sorted(by_digest.values(), key=lambda ranks: (len(ranks), ranks))
    more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    error = DriftError(
        f"after step {step} the ranks hold different bits of {pieces[first].name}{more}: "
        f"{' against '.join('ranks ' + ', '.join(map(str, ranks)) for ranks in groups)} (of the ranks that "
        f"looked). A model that does the same on every rank never does this; if yours does, suspect the "
        f"memory or the network of the fewer; run the same command again to go on from the last checkpoint"
    )
    error.agreed = True
    raise error
