"""Makes the modules beside the tests, and those of the trainer's tests, importable; skips DeepSpeed's without it."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "trainer")]


def pytest_runtest_setup(item):
    """Not there on every platform: what needs DeepSpeed is skipped, and says so."""
    if any(word in item.name for word in ("zero", "deepspeed")) and not find_spec("deepspeed"):
        pytest.skip("needs DeepSpeed")
