"""Next-byte prediction on text files: bits per byte beside those of compressors.

A sample is a window of one file. The windows of a file overlap, so that a byte has bytes before it;
each byte is counted once, in the first window that has it:

      file      ├──────────────────────────────────────┤
      window 0  ├──── counted ─────┤
      window 1             ├ seen ┤├──── counted ─────┤         the model gets `start` and all but the last

Training takes every byte of a window but one without anything before it. Nothing of another file is
ever seen in prediction; what the model knows of other files it has learnt from the training files.
"""

import bz2
import gzip
import lzma
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from hpctrain.batch import Batch
from hpctrain.errors import ConfigError
from hpctrain.piece import Piece, whole
from hpctrain.task import Array, Prediction, Source, Task

START = 256
"""The token before a window."""
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda text: gzip.compress(text, 9, mtime=0),
    "bz2": bz2.compress,
    "xz": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}
TOGETHER = tuple(f"{name}_joint" for name in COMPRESSORS)
"""All test files as one."""
BASELINES = (*COMPRESSORS, *TOGETHER)
BLOCKS = 16
"""Of test files compressed by one rank."""
TEMPERATURE = 0.8
"""Of the sample's draws; below 1 the likelier bytes are drawn more often than the model says."""


class Language(Task):
    """Windows of bytes: `text` (n, length) uint8, `place` (n, 3): file, first, stop of the counted bytes."""

    metrics = ("bits_per_byte",)

    def __init__(self, prompt: str = "def ", sample_bytes: int = 400) -> None:
        """Take what the sample at the end of a run begins with, and how many bytes it draws."""
        self.prompt, self.sample_bytes = prompt.encode(), sample_bytes

    def prepare(self, source: Source, learn: bool) -> None:
        """Note which samples are for training; compress the test files. Collective."""
        self.source = source
        index = source.index
        found = {name: (v.dtype, v.shape) for name, v in index.variables.items()}
        (self.name, (dtype, shape)), *others = found.items()
        if (
            dtype != "|u1"
            or len(shape) != 1
            or [(name, shape) for name, (_, shape) in others] != [("place", (3,))]
        ):
            raise ConfigError(
                f"data.inputs of hpctrain.recipes.language.Language must be windows of bytes, uint8 of shape "
                f'(length,), and "place" of shape (3,): file, first and stop of the counted bytes, as '
                f"`hpctrain data make language` writes them; found {found}"
            )
        (self.length,) = shape
        self.input_shapes = {self.name: (self.length,)}
        self.target_shapes = {"next": (self.length,)}
        self.trains = np.zeros(index.length, dtype=bool)
        train = index.splits["train"]
        self.trains[train.samples(np.arange(len(train)))] = True
        self.compressed = np.zeros((len(BASELINES), 2))
        if learn and "test" in index.splits:
            self._compress(index.splits["test"])

    def _compress(self, split: Any) -> None:
        """Bytes of the test files after and before each compressor; files are dealt out to the ranks."""
        samples = split.samples(np.arange(len(split)))
        file = self.source.read("place", samples)[:, 0]
        starts = np.flatnonzero(np.concatenate([[True], file[1:] != file[:-1]]))
        stops = np.append(starts[1:], len(samples))

        def text(start: int, stop: int) -> bytes:
            some = samples[start:stop]
            windows, places = (self.source.read(name, some) for name in (self.name, "place"))
            return b"".join(bytes(row[a:b]) for row, (_, a, b) in zip(windows, places))

        def each(places: NDArray[np.int64]) -> Array:
            total = np.zeros((len(COMPRESSORS), 2))
            for at in places:
                plain = text(starts[at], stops[at])
                total += [(len(compress(plain)), len(plain)) for compress in COMPRESSORS.values()]
            return total

        def together(places: NDArray[np.int64]) -> Array:
            plain, (compress,) = text(0, len(samples)), [list(COMPRESSORS.values())[at] for at in places]
            return np.array([len(compress(plain)), len(plain)])

        count = len(COMPRESSORS)
        self.compressed[:count] = self.source.blockwise(len(starts), BLOCKS, (count, 2), each).sum(axis=0)
        self.compressed[count:] = self.source.blockwise(count, count, (2,), together)

    def batch(self, samples: NDArray[np.int64]) -> Batch:
        """The windows behind their start; weight 1 for the bytes that are asked for."""
        text = torch.from_numpy(self.source.read(self.name, samples).astype(np.int64))
        counted = torch.from_numpy(self.source.read("place", samples).astype(np.int64))
        first, stop = counted[:, 1:2], counted[:, 2:]
        # in training all that has a byte before it, and a file's first
        first = torch.where(torch.from_numpy(self.trains[samples])[:, None], first.clamp(max=1), first)
        place = torch.arange(self.length)
        weights = ((place >= first) & (place < stop)).float()
        given = torch.cat([torch.full_like(text[:, :1], START), text[:, :-1]], dim=1)
        return Batch(samples, {self.name: given}, {"next": text}, {"next": weights})

    def measure(self, outputs: Any, batch: Batch) -> dict[str, tuple[float, float]]:
        """Bits of the counted bytes, and their number."""
        weights = batch.weights["next"].double()
        return {"bits_per_byte": (float((self._bits(outputs, batch) * weights).sum()), float(weights.sum()))}

    def _bits(self, outputs: Any, batch: Batch) -> torch.Tensor:
        nats = functional.cross_entropy(outputs, batch.targets["next"], reduction="none")
        return nats.double() / math.log(2.0)

    def baselines(self, samples: Callable[[], Iterable[Batch]]) -> dict[str, dict[str, tuple[float, float]]]:
        """Give each compressor's bits of all test files; every rank has the whole sums."""
        return {
            name: {"bits_per_byte": (8.0 * small, plain)}
            for name, (small, plain) in zip(BASELINES, self.compressed.tolist())
            if plain
        }

    def predictions(self) -> tuple[Prediction, ...]:
        """Write the bits that each byte of a window takes, 0 after the end of the file."""
        return (Prediction("bits", (self.length,), "bit"),)

    def predict(self, outputs: Any, batch: Batch) -> dict[str, Array]:
        """Bits of every byte of the windows, those before the counted ones too."""
        stop = torch.from_numpy(self.source.read("place", batch.samples).astype(np.int64))[:, 2:]
        bits = torch.where(torch.arange(self.length) < stop, self._bits(outputs, batch), 0.0)
        return {"bits": bits.numpy().astype(np.float32)}

    def sample(self, run_model: Callable[[Batch], Any]) -> str:
        """Let the model go on from the prompt, byte by byte."""
        draws = np.random.default_rng(0)
        written = bytearray(self.prompt)
        for _ in range(self.sample_bytes):
            seen = bytes(written[-self.length + 1 :])
            given = torch.full((1, self.length), START)
            given[0, 1 : len(seen) + 1] = torch.tensor(list(seen))
            logits = run_model(Batch(np.zeros(1, dtype=np.int64), {self.name: given}, {}))[
                0, :START, len(seen)
            ]
            chances = torch.softmax(logits.double() / TEMPERATURE, dim=0).cumsum(0)
            written.append(min(START - 1, int((chances < draws.random()).sum())))
        return written.decode(errors="replace")

    def pieces(self) -> list[Piece]:
        """What the compressors made of the test files: a resumed run shows it again."""
        return [whole("task.compressed", torch.from_numpy(self.compressed))]
