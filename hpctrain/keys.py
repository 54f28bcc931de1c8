"""Keys: one 64-bit number of several integers, of which every bit counts. Pure.

What is drawn at random is drawn by a key of what it is for (seed, epoch; seed, step, micro-batch,
draw), never by who draws it or when: so it is the same on every layout.
"""

import numpy as np
from numpy.typing import NDArray

_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_STEP = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """Scatter a 64-bit integer (splitmix64's finaliser, Steele et al. 2014).

    >>> hex(mix(1))
    '0x5692161d100b05e5'
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    """One 64-bit key of several integers; the order of the parts matters.

    >>> key(1, 2) == key(1, 2), key(1, 2) == key(2, 1)
    (True, False)
    """
    state = 0
    for part in parts:
        state = mix((state + _STEP + (part & _MASK)) & _MASK)
    return state


def scatter(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scatter 64-bit integers, element by element, as `mix` does one.

    >>> int(scatter(np.array([1], np.uint64))[0]) == mix(1)
    True
    """
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_FIRST)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_SECOND)
    return value ^ (value >> np.uint64(31))
