"""What these tests need: root, for daemons and namespaces, and Debian, for their packages."""

import os
import shutil
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """Mark the tests of this folder, and skip them where they can't run."""
    able = os.geteuid() == 0 and shutil.which("apt-get")
    for item in items:
        if item.path.parent == HERE:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.skipif(not able, reason="needs root and Debian"))
