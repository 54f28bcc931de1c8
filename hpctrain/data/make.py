"""Make the HDF5 data of recipes from what packages ship."""

import os
from pathlib import Path

import h5py
import numpy as np

from hpctrain.errors import ConfigError


def digits(output: Path) -> str:
    """Write the 1,797 scanned digits of scikit-learn's wheel: image (n, 8, 8) uint8, label uint8.

    (E. Alpaydin and C. Kaynak 1998, UCI Machine Learning Repository, CC BY 4.0.) Local. Gives a
    line for the user; raises ConfigError where scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "the digits come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    found = load_digits()
    temporary = output.with_name(output.name + ".tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(temporary, "w") as file:
        image = file.create_dataset(
            "image", data=found.images.astype(np.uint8), chunks=(64, 8, 8), compression="gzip", shuffle=True
        )
        image.attrs["long_name"] = "grey value of a handwritten digit, 0 to 16"
        file.create_dataset("label", data=found.target.astype(np.uint8))
        file.attrs["title"] = "Optical Recognition of Handwritten Digits (test part)"
        file.attrs["references"] = "E. Alpaydin, C. Kaynak (1998), doi:10.24432/C50P49"
        file.attrs["license"] = "CC BY 4.0"
    os.replace(temporary, output)
    return f"wrote {output}: {len(found.images)} images"
