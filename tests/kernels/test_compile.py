"""All kernels compile, without a spill and within the shared memory, for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_check.py")
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"]
QUICK = ["sm_89", "gfx942"]  # of NVIDIA's the one with least shared memory
# And a tile that is too large: the check can fail.
SPILLS = """
import sys
sys.path.insert(0, {folder!r})
import compile_check as c
tile = dict(BO=64, BI=128, num_warps=4, num_stages=2)
assert c.check(("gate_grad", "sm_80", 16, 1, "fp32", "layer", tile))
sys.exit(c.main())
"""


def check(cache: Path, *arguments: str) -> list[str]:
    """Lines of a process of its own: under the interpreter, kernels are not compilable functions."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)  # registers and shared memory of each: `pytest -s`, or the report of a failure
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_every_kernel(tmp_path):
    """bf16, a small rank, the form with most pointers; of the gate's gradient all three. A spill is found."""
    spills, *lines, _ = check(tmp_path, "-c", SPILLS.format(folder=str(SCRIPT.parent)), "--fast", "--target", *QUICK)
    assert spills.startswith("FAIL")
    assert all(line.startswith("ok") for line in lines)
    assert {line.split()[2] for line in lines} == set(QUICK)
    assert len({line.split()[1] for line in lines}) == 4
    assert len(lines) == 6 * len(QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_everything_that_can_be_launched(target, tmp_path):
    """Ranks of both ends, bf16 and float32, with and without W, its transpose, and the support limit."""
    check(tmp_path, str(SCRIPT), "--target", target)
