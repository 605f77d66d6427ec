"""The default tiles compile, without a spill, for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_check.py")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_no_kernel_spills(target, dtype, tmp_path):
    """In a process of its own: under the interpreter, kernels are not compilable functions."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    check = subprocess.run(
        [sys.executable, str(SCRIPT), "--target", target, "--dtype", dtype],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    print(check.stdout)
    assert check.returncode == 0, check.stdout + check.stderr
