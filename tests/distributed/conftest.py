"""Makes the modules beside the tests, and those of the trainer's tests, importable; what DeepSpeed's tests need."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "trainer")]


def pytest_runtest_setup(item):
    """On a CPU DeepSpeed compiles an extension: without a compiler its tests cannot run, and say so."""
    if any(word in item.name for word in ("zero", "deepspeed")):
        missing = [name for name in ("c++", "ninja") if shutil.which(name) is None and find_spec(name) is None]
        missing += [] if find_spec("deepspeed") else ["deepspeed"]
        if missing:
            pytest.skip(f"DeepSpeed on a CPU needs {', '.join(missing)}")
