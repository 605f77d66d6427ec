"""ELLA's penalty: value and closed-form gradient against autograd through the dense specification."""

import pytest
import torch

from hf_jumplora.ops import blocked
from hf_jumplora.ops.naive import effective_update
from hf_jumplora.ops.penalty import l1_penalty, overlap_penalty, sparse_past
from hf_jumplora.ops.sparse import pack_bits


def factors(shape=(17, 33), rank=3, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    out_features, in_features = shape
    A = torch.randn(rank, in_features, generator=g) * 0.3
    B = torch.randn(out_features, rank, generator=g) * 0.3
    past = torch.randn(shape, generator=g) * (torch.rand(shape, generator=g) < 0.4)
    past[:, -1] *= in_features == 1  # of several columns one without an entry
    log_tau = (B @ A).abs().flatten().quantile(0.7).log().reshape(1) + 1e-4
    return [t.to(dtype) for t in (A, B, log_tau, past)]


def both(tensors, mix, gated=True, upstream=3.0, sparse=False):
    """(value, gradients) of the operator, and of dense autograd in float64."""
    results = []
    for dense in (False, True):
        A, B, log_tau, past = (t.double() if dense else t.clone() for t in tensors)
        leaves = [A.requires_grad_(), B.requires_grad_()]
        if not dense:
            past = sparse_past(past) if sparse else past
            value = overlap_penalty(A, B, log_tau if gated else None, past, scaling=4.0, mix=mix)
        else:
            E = effective_update(A, B, log_tau, mix=mix) if gated else B @ A
            value = (4.0 * E * past).square().sum()
        (upstream * value).backward()
        results.append([value, *(leaf.grad for leaf in leaves)])
    return results


@pytest.mark.parametrize("shape", [(17, 33), (1, 40), (40, 1), (64, 129)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("mix", [0.0, 0.04, 0.5, 1.0])
@pytest.mark.parametrize("sparse", [False, True], ids=["blocks", "non-zeros"])
def test_is_dense_autograd(monkeypatch, relative_error, shape, mix, sparse):
    monkeypatch.setattr(blocked, "BLOCK_ENTRIES", 100)
    tensors = factors(shape, rank=1 if 1 in shape else 3)
    found, expected = both(tensors, mix, sparse=sparse)
    assert all(relative_error(f, e) <= 1e-6 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("sparse", [False, True], ids=["blocks", "non-zeros"])
def test_without_gate(relative_error, sparse):
    found, expected = both(factors(), mix=0.0, gated=False, sparse=sparse)
    assert all(relative_error(f, e) <= 1e-6 for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("sparse", [False, True], ids=["blocks", "non-zeros"])
def test_float64(relative_error, sparse):
    found, expected = both(factors(dtype=torch.float64), mix=0.375, sparse=sparse)
    assert all(relative_error(f, e) <= 1e-13 for f, e in zip(found, expected, strict=True))


def test_finite_differences():
    A, B, log_tau, past = factors(dtype=torch.float64)
    assert ((B @ A).abs() - log_tau.exp()).abs().min() > 1e-5

    def f(A, B):
        return overlap_penalty(A, B, log_tau, past, scaling=4.0, mix=0.5)

    assert torch.autograd.gradcheck(f, (A.requires_grad_(), B.requires_grad_()), eps=1e-7, atol=1e-5)


def test_mix_as_tensor_and_as_number():
    A, B, log_tau, past = factors()
    number = overlap_penalty(A, B, log_tau, past, scaling=4.0, mix=0.5)
    assert torch.equal(number, overlap_penalty(A, B, log_tau, past, scaling=4.0, mix=torch.tensor([0.5])))


def test_float32_under_autocast():
    A, B, log_tau, past = factors()
    expected = overlap_penalty(A, B, log_tau, past, scaling=4.0, mix=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = overlap_penalty(A, B, log_tau, past, scaling=4.0, mix=1.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("form", [torch.clone, sparse_past], ids=["blocks", "non-zeros"])
def test_no_past_no_penalty(form):
    A, B, log_tau, past = factors()
    value = overlap_penalty(A.requires_grad_(), B, log_tau, form(torch.zeros_like(past)), scaling=4.0, mix=0.5)
    value.backward()
    assert value == 0
    assert (A.grad == 0).all()


def test_a_small_past_has_small_numbers():
    """16 bytes an entry."""
    found = sparse_past(factors()[3])
    assert {t.dtype for t in found} == {torch.int32, torch.float32}


def test_keeps_nothing_of_the_weights_size():
    A, B, log_tau, past = (t.requires_grad_(t.shape != (60, 50)) for t in factors((60, 50), rank=2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        overlap_penalty(A, B, log_tau, past, scaling=4.0, mix=0.5)
    assert saved
    assert all(t.numel() < 60 * 50 for t in saved)


def test_under_compile(relative_error):
    A, B, log_tau, past = factors()
    leaf = A.clone().requires_grad_()
    penalty = torch.compile(lambda a: overlap_penalty(a, B, log_tau, past, scaling=4.0, mix=0.5), backend="aot_eager")
    penalty(leaf).backward()
    overlap_penalty(A.requires_grad_(), B, log_tau, past, scaling=4.0, mix=0.5).backward()
    assert relative_error(leaf.grad, A.grad) <= 1e-6


# ---- sum |E| -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_free", [True, False], ids=["free", "all-free"])
def test_l1_is_dense_autograd(monkeypatch, relative_error, gated, mix, with_free):
    monkeypatch.setattr(blocked, "BLOCK_ENTRIES", 100)
    tensors = factors((23, 41))
    free = torch.rand(23, 41, generator=torch.Generator().manual_seed(1)) < 0.7 if with_free else torch.ones(23, 41) > 0
    results = []
    for dense in (False, True):
        A, B, log_tau = (t.double() if dense else t.clone() for t in tensors[:3])
        leaves = [A.requires_grad_(), B.requires_grad_()]
        if not dense:
            value = l1_penalty(A, B, log_tau if gated else None, mix=mix, free=pack_bits(free) if with_free else None)
        else:
            value = (effective_update(A, B, log_tau, mix=mix, free=free) if gated else (B @ A) * free).abs().sum()
        (3.0 * value).backward()
        results.append([value, *(leaf.grad for leaf in leaves)])
    assert all(relative_error(found, expected) <= 1e-6 for found, expected in zip(*results, strict=True))
