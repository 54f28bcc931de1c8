"""Marks of tests that need something of the machine."""

import pytest
import torch

from hpctrain import products


def lays() -> bool:
    """Whether oneDNN can compute here, and lays weights in the blocks that are known."""
    if not products.there():
        return False
    try:
        products.Laid(torch.zeros(128, 128), True)
    except NotImplementedError:
        return False
    return True


lays_weights = pytest.mark.skipif(
    not lays(), reason="no AVX-512, or another layout: weights are taken as they stand"
)
