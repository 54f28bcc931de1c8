"""Make data/climate.h5 from the CMIP6 file that data/README.md names.

    python data/make_climate.py ORIGINAL.nc [data/climate.h5]

The field is averaged over 2 x 2 grid boxes (144 x 192 -> 72 x 96) and packed by
the CF convention into int16, `kelvin = packed * scale_factor + add_offset`.
Latitude, longitude and time are kept, with licence and attribution.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import h5py
import numpy as np

# Steps of 0.01 K: the rounding (0.003 K root mean square) is 250 times below
# the error of the best known method, and the file stays under 8 MB.
SCALE = 0.01
FILL = np.int16(-32768)
KEPT = (
    "Conventions",
    "title",
    "institution",
    "institution_id",
    "source",
    "source_id",
    "experiment_id",
    "variant_label",
    "frequency",
    "tracking_id",
    "further_info_url",
    "license",
    "history",
)
CITE = (
    "Tang, Y. et al. (2019): MOHC UKESM1.0-LL model output prepared for CMIP6 CMIP "
    "historical. Earth System Grid Federation. doi:10.22033/ESGF/CMIP6.6113"
)


def coarsen(field: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2 boxes of the last two axes: (..., 2h, 2w) -> (..., h, w), float64."""
    *lead, height, width = field.shape
    boxes = field.reshape(*lead, height // 2, 2, width // 2, 2)
    return boxes.mean(axis=(-3, -1), dtype=np.float64)


def pack(field: np.ndarray, offset: float) -> np.ndarray:
    """Kelvin to int16; refuses values that int16 cannot hold at this scale."""
    packed = np.rint((field - offset) / SCALE)
    if np.abs(packed).max() > 32767:
        raise SystemExit(f"values from {field.min()} to {field.max()} do not fit int16 at {SCALE}")
    return packed.astype(np.int16)


def copy_attributes(source: h5py.File, target: h5py.File) -> None:
    """Licence and provenance of the original, and what was done to it here."""
    for name in KEPT:
        value = source.attrs[name]
        target.attrs[name] = value.decode() if isinstance(value, bytes) else value
    target.attrs["references"] = CITE
    target.attrs["changes"] = (
        "tas averaged over 2 x 2 grid boxes and packed into int16 by data/make_climate.py of hpctrain"
    )


def write(source: h5py.File, target: h5py.File) -> None:
    """Write every dataset of the small file."""
    copy_attributes(source, target)
    tas = coarsen(source["tas"][:])
    offset = float(np.rint((tas.min() + tas.max()) / 2))
    axes = {
        "time": source["time"][:],
        "lat": source["lat"][:].reshape(-1, 2).mean(axis=1),
        "lon": source["lon"][:].reshape(-1, 2).mean(axis=1),
    }
    for name, values in axes.items():
        axis = target.create_dataset(name, data=values)
        for key in ("units", "calendar", "axis", "long_name", "standard_name"):
            if key in source[name].attrs:
                axis.attrs[key] = source[name].attrs[key].decode()
        axis.make_scale(name)
    data = target.create_dataset(
        "tas",
        data=pack(tas, offset),
        chunks=(1, *tas.shape[1:]),
        compression="gzip",
        compression_opts=9,
        shuffle=True,
        fillvalue=FILL,
    )
    for key in ("standard_name", "long_name", "units", "cell_methods"):
        data.attrs[key] = source["tas"].attrs[key].decode()
    data.attrs["scale_factor"] = SCALE
    data.attrs["add_offset"] = offset
    data.attrs["_FillValue"] = FILL
    for axis_number, name in enumerate(axes):
        data.dims[axis_number].attach_scale(target[name])


def main() -> None:
    """Read the original's path, write the small file beside this script by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path, help="the CMIP6 file of data/README.md")
    parser.add_argument("output", type=Path, nargs="?", default=Path(__file__).with_name("climate.h5"))
    arguments = parser.parse_args()
    if not arguments.original.is_file():
        raise SystemExit(f"no file {arguments.original}: see data/README.md for where it comes from")
    temporary = arguments.output.with_suffix(".tmp")
    with h5py.File(arguments.original) as source, h5py.File(temporary, "w") as target:
        write(source, target)
    os.replace(temporary, arguments.output)
    digest = hashlib.sha256(arguments.output.read_bytes()).hexdigest()
    sys.stdout.write(f"{arguments.output}: {arguments.output.stat().st_size} bytes, sha256 {digest}\n")


if __name__ == "__main__":
    main()
