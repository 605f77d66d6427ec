"""`gated_linear(backend="triton")` against the specification; the interpreter is chosen in a process of its own."""

import os
import subprocess
import sys

import pytest


pytest.importorskip("triton")

SCRIPT = """
import torch
from hf_jumplora.ops import gated_linear

torch.manual_seed(0)
W, bias, x = torch.randn(33, 45), torch.randn(33), torch.randn(2, 5, 45)
A, B, free = torch.randn(4, 45) * 0.1, torch.randn(33, 4) * 0.1, torch.rand(33, 45) < 0.7
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    found = {}
    for backend in ("naive", "triton"):
        leaves = [t.clone().requires_grad_() for t in (x.to(dtype), A, B, torch.tensor([-4.0]))]
        y = gated_linear(
            leaves[0], W.to(dtype), bias.to(dtype), *leaves[1:], scaling=4.0, mix=0.6, bandwidth=0.01, free=free,
            backend=backend,
        )
        y.float().sin().sum().backward()
        found[backend] = [y, *(leaf.grad for leaf in leaves)]
    for expected, got in zip(*found.values()):
        error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
        assert error <= bound, (dtype, error)
"""


def run(script: str, interpret: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)


def test_the_backend_computes_the_specification():
    result = run(SCRIPT, "1")
    assert result.returncode == 0, result.stderr


def test_without_a_gpu_the_error_says_what_to_do():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    script = """
import torch
from hf_jumplora.ops import gated_linear
x, A, B, log_tau = torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(4, 1), torch.zeros(1)
gated_linear(x, None, None, A, B, log_tau, scaling=1.0, mix=0.5, backend="triton")
"""
    result = run(script, "0")
    assert result.returncode != 0
    assert "backend='blocked'" in result.stderr
