"""Ranges on a coordinate: numbers, or dates where the dataset is a CF time axis."""

from typing import Any

import cftime
import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import ConfigError, DataError


def text_attributes(dataset: h5py.Dataset) -> dict[str, str]:
    """Give the text attributes of a dataset, as str whatever their storage."""
    found: dict[str, str] = {}
    for key, value in dataset.attrs.items():
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, str):
            found[key] = value
    return found


def in_units(
    values: NDArray[Any], attributes: dict[str, str], wanted: dict[str, str], where: str
) -> NDArray[np.float64]:
    """Give a file's coordinate in the first file's units: time axes may count from other days."""
    numbers = np.asarray(values, dtype=np.float64)
    units, calendar = (attributes.get(key, "") for key in ("units", "calendar"))
    if (units, calendar) == tuple(wanted.get(key, "") for key in ("units", "calendar")):
        return numbers
    if " since " not in units or calendar != wanted.get("calendar", ""):
        raise DataError(
            f"{where} has units {units!r} and calendar {calendar!r}, the first file has "
            f"{wanted.get('units', '')!r} and {wanted.get('calendar', '')!r}: all files must agree"
        )
    dates = cftime.num2date(numbers, units, calendar or "standard")
    return np.asarray(cftime.date2num(dates, wanted["units"], calendar or "standard"), dtype=np.float64)


def within(
    values: NDArray[np.float64],
    attributes: dict[str, str],
    first: Any,
    last: Any,
    key: str,
    name: str,
) -> NDArray[np.bool_]:
    """Tell which values lie in [first, last], both included. Local.

    Numbers compare as they are. Text is a date such as "1999", "1999-12" or "1999-12-31":
    each sample's date (by CF units and calendar) is cut to the same length and compared, so
    "1999" as last includes all of 1999.
    """
    low = compare(values, attributes, first, key, name)
    high = compare(values, attributes, last, key, name)
    return (low >= 0) & (high <= 0)


def compare(
    values: NDArray[np.float64], attributes: dict[str, str], bound: Any, key: str, name: str
) -> NDArray[np.int8]:
    """Sign of value minus bound for each value: -1, 0 or 1."""
    number = as_number(bound)
    units = attributes.get("units", "")
    if " since " not in units or not isinstance(bound, str):
        if number is None:
            raise ConfigError(
                f"{key}: {bound!r} is a date, but {name} has units {units!r}, "
                f"not '... since ...': give numbers in its own units"
            )
        return np.sign(values - number).astype(np.int8)
    try:
        asked = tuple(int(part) for part in bound.split("-"))
    except ValueError:
        raise ConfigError(f"{key}: {bound!r} is no date: write 1999, 1999-12 or 1999-12-31") from None
    dates = cftime.num2date(values, units, attributes.get("calendar", "standard"))
    cut = [(date.year, date.month, date.day)[: len(asked)] for date in np.atleast_1d(dates)]
    return np.array([(date > asked) - (date < asked) for date in cut], dtype=np.int8)


def as_number(bound: Any) -> float | None:
    """Give a bound as a number, None where it is none."""
    try:
        return float(bound)
    except (TypeError, ValueError):
        return None
