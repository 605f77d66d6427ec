"""tr(G E C E^T) against the dense formula in float64, value and gradients."""

import pytest
import torch

from hf_jumplora.ops import quadratic
from hf_jumplora.ops.quadratic import quadratic_penalty, stacked_penalty


def psd(size, seed):
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / size


def dense(A, B, terms, scaling, log_tau, mix, free):
    """The formula as it is written; the mask is a constant."""
    D = B @ A
    if log_tau is not None:
        D = D * (1 - mix) + D * (D.abs() > log_tau.double().exp()) * mix
        D = D if free is None else D * free
    identity = torch.eye(len(B), dtype=torch.float64)
    return sum(torch.trace((identity if G is None else G) @ D @ C @ D.T) for G, C in terms) * scaling**2


@pytest.mark.parametrize(("out", "inside", "r"), [(7, 5, 2), (33, 70, 3), (1, 4, 1)])
@pytest.mark.parametrize("gate", [None, 0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["both", "input only", "roots", "roots of input only"])
@pytest.mark.parametrize("closed", [False, True])
def test_against_dense(out, inside, r, gate, kind, closed, relative_error):
    torch.manual_seed(0)
    A, B = torch.randn(r, inside, requires_grad=True), torch.randn(out, r, requires_grad=True)
    terms = [(None if "input only" in kind else psd(out, k), psd(inside, k + 9)) for k in range(2)]
    given = [tuple(None if t is None else t.float() for t in pair) for pair in terms]
    roots = kind.startswith("roots")
    if roots:
        root = [
            [None if t is None else torch.linalg.cholesky(t + 1e-9 * t.trace() * torch.eye(len(t))).float() for t in p]
            for p in terms
        ]
        given = [(G, C) for G, C in root]
    log_tau = None if gate is None else torch.tensor([-0.5], requires_grad=True)
    free = torch.rand(out, inside) > 0.3 if closed and gate is not None else None
    value = quadratic_penalty(A, B, given, scaling=1.5, log_tau=log_tau, mix=gate or 0.0, free=free, roots=roots)
    (3 * value).backward()
    A64, B64 = A.detach().double().requires_grad_(), B.detach().double().requires_grad_()
    expected = dense(A64, B64, terms, 1.5, log_tau, gate, free)
    (3 * expected).backward()
    assert relative_error(value, expected) < 1e-5
    assert relative_error(A.grad, A64.grad) < 1e-5
    assert relative_error(B.grad, B64.grad) < 1e-5
    assert log_tau is None or log_tau.grad is None


@pytest.mark.parametrize("gate", [None, 0.0, 0.6, 1.0])
def test_many_layers_at_once(gate, relative_error):
    """The sum of what each layer has by itself; a threshold of its own in each."""
    torch.manual_seed(0)
    A, B = torch.randn(3, 2, 7, requires_grad=True), torch.randn(3, 5, 2, requires_grad=True)
    G, C = torch.randn(3, 5, 4), torch.randn(3, 7, 4)
    log_tau = None if gate is None else torch.tensor([-0.5, 0.0, 3.0], requires_grad=True)
    mix = None if gate is None else torch.full((3,), gate)
    value = stacked_penalty(A, B, G, C, scaling=1.5, log_tau=log_tau, mix=mix)
    found = value, *torch.autograd.grad(3 * value, (A, B))
    single = [
        quadratic_penalty(
            A[i], B[i], [(G[i], C[i])], scaling=1.5, log_tau=None if gate is None else log_tau[i], mix=gate or 0.0,
            roots=True,
        )
        for i in range(3)
    ]  # fmt: skip
    expected = sum(single), *torch.autograd.grad(3 * sum(single), (A, B))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("gate", [None, 0.6])
def test_many_layers_under_autocast(gate):
    """In float32, and nothing of the weights' size is kept for the backward pass."""
    torch.manual_seed(0)
    A, B = torch.randn(3, 2, 30, requires_grad=True), torch.randn(3, 40, 2, requires_grad=True)
    G, C = torch.randn(3, 40, 4), torch.randn(3, 30, 4)
    gated = {} if gate is None else {"log_tau": torch.zeros(3), "mix": torch.full((3,), gate)}
    found, saved = [], []
    for enabled in (False, True):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            value = stacked_penalty(A, B, G, C, scaling=1.5, **gated)
        found.append((value, *torch.autograd.grad(value, (A, B))))
    assert all(map(torch.equal, *found))
    assert saved
    assert all(t.numel() < 3 * 40 * 30 for t in saved)


def test_where_the_kernels_can_run(monkeypatch):
    """With the Triton backend, and as many columns as registers hold."""
    A, asked = torch.zeros(1, 2, 3, dtype=torch.bfloat16), []
    for backend in ("triton", "triton-fold", "blocked"):
        monkeypatch.setattr(quadratic, "choose_backend", lambda *given, b=backend: asked.append(given) or b)
        can = [quadratic._kernels_can_run(A, torch.zeros(1, 5, columns)) for columns in (128, 129)]
        assert can == [backend != "blocked", False]
    assert set(asked) == {(None, A.device, (torch.bfloat16, torch.float32))}
