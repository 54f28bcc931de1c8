"""Weight gradients as autograd computes them, for peers and bounds of the benchmarks."""

from collections.abc import Container, Iterator
from contextlib import contextmanager


class Autograd:
    """Stands for what computes weight gradients straight into their places: leaves all to autograd."""

    compiled = False
    """No part of the models is."""

    @contextmanager
    def forward(self, micro_batch: int = -1) -> Iterator[None]:
        """Nothing is watched."""
        yield

    @contextmanager
    def accumulating(self, micro_batch: int = -1, whole: bool = False) -> Iterator[None]:
        """Autograd adds to the gradients itself."""
        yield

    def begin(self, micro_batches: int, waits: bool = False, behind: Container[int] = ()) -> None:
        """Nothing waits."""

    def weights_of(self, micro_batch: int, last: bool) -> None:
        """Nothing has waited."""
