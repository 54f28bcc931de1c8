"""Which samples are for training, validation and test: they never share one.

fractions   ├─────────── train ───────────┤ validation ├─ test ─┤     in file order, or permuted
ranges      coordinate in [first, last], both included; training takes what is left
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpctrain.config import Data
from hpctrain.data import coordinate as axis
from hpctrain.data import order
from hpctrain.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """The samples of one split: blocks of the long dataset, or a random choice by a key."""

    blocks: tuple[tuple[int, int], ...]
    permuted: int = 0
    """Length of the keyed permutation that the blocks are places of; 0: they are samples."""

    def __len__(self) -> int:
        """Count the samples."""
        return sum(stop - start for start, stop in self.blocks)

    def samples(self, places: order.Ids) -> order.Ids:
        """Give the sample of each place 0 … len-1; int64 to int64 of the same shape.

        >>> Split(((2, 4), (7, 9))).samples(np.arange(4)).tolist()
        [2, 3, 7, 8]
        """
        starts = np.array([start for start, _ in self.blocks], dtype=np.int64)
        lengths = np.array([stop - start for start, stop in self.blocks], dtype=np.int64)
        before = np.concatenate([[0], np.cumsum(lengths)])
        which = np.searchsorted(before, places, side="right") - 1
        found: order.Ids = starts[which] + places - before[which]
        return order.permute(found, self.permuted, SPLIT_KEY) if self.permuted else found


# A random split must not change with train.seed: a test sample would become a training one.
SPLIT_KEY = 20260101


def cut_splits(
    config: Data, length: int, values: NDArray[np.float64] | None, attributes: dict[str, str]
) -> dict[str, Split]:
    """Cut the long dataset into train, validation and test, which never share a sample."""
    taken = np.zeros(length, dtype=bool)
    splits: dict[str, Split] = {}
    randomly = config.split_order == "random"
    end = length
    for name in ("test", "validation"):
        asked = getattr(config, name)
        if isinstance(asked, list):
            splits[name] = by_range(name, asked, config, values, attributes, taken)
        elif asked:
            if not 0 < asked < 1:
                raise ConfigError(
                    f"data.{name} = {asked}: a fraction between 0 and 1, or [first, last] of "
                    f"data.coordinate, was expected"
                )
            count = round(asked * length)
            splits[name] = Split(((end - count, end),), length if randomly else 0)
            mark(name, splits[name], taken)
            end -= count
    if config.train:
        splits["train"] = by_range("train", config.train, config, values, attributes, taken)
    elif randomly and not any(isinstance(s, list) for s in (config.test, config.validation)):
        splits["train"] = Split(((0, end),), length)
    else:
        splits["train"] = Split(to_blocks(~taken))
    for name, split in splits.items():
        if not len(split):
            raise ConfigError(
                f"data.{name} holds no sample of the {length}: "
                f"change {'data.validation or data.test' if name == 'train' else f'data.{name}'}"
            )
    return splits


def by_range(
    name: str,
    asked: list[str | float],
    config: Data,
    values: NDArray[np.float64] | None,
    attributes: dict[str, str],
    taken: NDArray[np.bool_],
) -> Split:
    """Samples whose coordinate lies in [first, last], both included."""
    if not asked:
        return Split(())
    if values is None:
        raise ConfigError(
            f"data.{name} = {asked} is a range, but data.coordinate is not set: "
            f'name the dataset it speaks of, such as --data.coordinate "time"'
        )
    if len(asked) != 2:
        raise ConfigError(f"data.{name} = {asked}: [first, last] was expected, both included")
    inside = axis.within(values, attributes, asked[0], asked[1], f"data.{name}", config.coordinate)
    split = Split(to_blocks(inside))
    mark(name, split, taken)
    return split


def mark(name: str, split: Split, taken: NDArray[np.bool_]) -> None:
    """Note the samples of a split as taken; refuse one that another split has already."""
    mine = split.samples(np.arange(len(split), dtype=np.int64))
    if taken[mine].any():
        raise ConfigError(
            f"data.{name} shares {int(taken[mine].sum())} samples with another split (it would have "
            f"{len(mine)} of all {len(taken)}): a sample may be in one of data.train, data.validation, "
            f"data.test"
        )
    taken[mine] = True


def to_blocks(chosen: NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """Runs of True as (start, stop).

    >>> to_blocks(np.array([True, True, False, True]))
    ((0, 2), (3, 4))
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))
