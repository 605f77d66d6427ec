"""All kernels compile, without a spill and within the shared memory, for GPUs that are not here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_check.py")
TARGETS = ["sm_80", "sm_89", "sm_90", "sm_100", "gfx942"]


def check(cache: Path, *arguments: str) -> list[str]:
    """Lines of a process of its own: under the interpreter, kernels are not compilable functions."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout)  # registers and shared memory of each: `pytest -s`, or the report of a failure
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("ok")]


def test_every_kernel_for_every_target(tmp_path):
    """bf16, a small rank, the form with most pointers; of the gate's gradient all three."""
    lines = check(tmp_path, "--fast")
    assert sorted({line.split()[2] for line in lines}) == sorted(TARGETS)
    assert len({line.split()[1] for line in lines}) == 4
    assert len(lines) == 6 * len(TARGETS)


def test_a_spill_is_found(tmp_path):
    """A tile that is too large: the check above can fail."""
    script = (
        f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import compile_check as c\n"
        "tile = dict(BO=64, BI=128, num_warps=4, num_stages=2)\n"
        "sys.exit(0 if c.check(('gate_grad', 'sm_80', 16, 1, 'fp32', 'layer', tile)) else 1)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("FAIL")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_everything_that_can_be_launched(target, tmp_path):
    """Ranks of both ends, bf16 and float32, with and without W, its transpose, and the support limit."""
    check(tmp_path, "--target", target)
