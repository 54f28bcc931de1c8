"""The launcher of tests/launch serves here too."""

import importlib.util
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

_spec = importlib.util.spec_from_file_location("launching", TESTS / "launch" / "conftest.py")
_found = importlib.util.module_from_spec(_spec)
sys.modules["launching"] = _found
_spec.loader.exec_module(_found)
launcher, small = _found.launcher, _found.small
