"""Who writes which piece: each piece once, the bytes spread over the ranks that have it. Pure.

offers   rank 0: a b c     rank 1: a b c     rank 2: a b d
writes   rank 0: a         rank 1: b c       rank 2: d
"""

from collections.abc import Sequence
from typing import NamedTuple


class Offer(NamedTuple):
    """A piece that a rank could write."""

    name: str
    start: int
    stop: int
    bytes: int


def assign(offers: Sequence[Sequence[Offer]]) -> list[list[int]]:
    """Give, for each rank, which of its offers it writes: each (name, start, stop) once.

    Largest pieces first, each to the rank with the fewest bytes among those that have it; the
    same on every rank that calls it with the same offers.

    >>> a, b, c = Offer("a", 0, 8, 8), Offer("b", 0, 4, 4), Offer("c", 0, 4, 4)
    >>> assign([[a, b, c], [a, b, c]])
    [[0], [1, 2]]
    """
    holders: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    size: dict[tuple[str, int, int], int] = {}
    for rank, pieces in enumerate(offers):
        for at, piece in enumerate(pieces):
            key = (piece.name, piece.start, piece.stop)
            holders.setdefault(key, []).append((rank, at))
            size[key] = piece.bytes
    load = [0] * len(offers)
    chosen: list[list[int]] = [[] for _ in offers]
    for key in sorted(holders, key=lambda k: (-size[k], k)):
        rank, at = min(holders[key], key=lambda holder: (load[holder[0]], holder[0]))
        load[rank] += size[key]
        chosen[rank].append(at)
    return [sorted(pieces) for pieces in chosen]


def newest_and_best(steps: Sequence[int], keep: int, best: int | None) -> list[int]:
    """Give the steps whose checkpoints stay: the newest `keep` and the best.

    >>> newest_and_best([10, 20, 30, 40], 2, best=10)
    [10, 30, 40]
    """
    newest = sorted(steps)[-max(1, keep) :]
    return sorted(set(newest) | ({best} & set(steps) if best is not None else set()))
