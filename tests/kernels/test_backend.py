"""`gated_linear` chooses a backend, and "triton" computes the specification."""

import importlib.util
import logging

import pytest
import torch
from interpreted import DEVICE

from hf_jumplora.ops import dispatch, gated_linear
from hf_jumplora.tuner import JumpLoraConfig


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def setup(dtype=torch.float32):
    """x, W, bias, A, B, log_tau; all require gradients."""
    torch.manual_seed(0)
    W, bias, x = torch.randn(33, 45, dtype=dtype), torch.randn(33, dtype=dtype), torch.randn(2, 5, 45, dtype=dtype)
    A, B, log_tau = torch.randn(4, 45) * 0.1, torch.randn(33, 4) * 0.1, torch.tensor([-4.0])
    return [t.to(DEVICE).requires_grad_() for t in (x, W, bias, A, B, log_tau)]


def step(leaves, backend, mix=0.6, function=gated_linear):
    """y and the gradients of all leaves."""
    rng = torch.Generator().manual_seed(1)
    free = (torch.rand(33, 45, generator=rng) < 0.7).to(DEVICE)
    y = function(*leaves, scaling=4.0, mix=mix, bandwidth=0.01, free=free, backend=backend)
    grad_y = torch.randn(2, 5, 33, generator=rng).to(y)
    return y, *torch.autograd.grad(y, leaves, grad_y)


def assert_close(found, expected, bound):
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error <= bound, (number, error)


@pytest.mark.parametrize("backend", ["triton", "triton-fold"])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_the_specification(package, backend, dtype, bound):
    """Outputs and all gradients, those of an unfrozen weight and bias too; half precision to its own resolution."""
    leaves = setup(dtype)
    assert_close(step(leaves, backend), step(leaves, "naive"), bound)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str
)
def test_plain_lora_while_the_gate_is_open(package, monkeypatch, dtype, bound, has_weight):
    """mix = 0.0 as a number: the specification, no kernel, and a gradient for every leaf (DDP waits for each)."""
    x, W, bias, *factors = setup(dtype)
    monkeypatch.setattr(package.launch, "_launch", None)
    found, expected = [], []
    for results, backend in ((found, "triton"), (expected, "naive")):
        y = gated_linear(
            x, W if has_weight else None, bias if has_weight else None, *factors, scaling=4.0, mix=0.0, backend=backend
        )
        leaves = [x, W, bias, *factors] if has_weight else [x, *factors]
        results += y, *torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert not found.pop().any()
    assert not expected.pop().any()
    assert_close(found, expected, bound)


def test_compiled(package):
    """No graph break, and no second compilation when the mix changes."""
    compiled, leaves = torch.compile(gated_linear, fullgraph=True, backend="aot_eager"), setup()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for f in (0.3, 0.6):
            mix = torch.tensor([f], device=DEVICE)
            assert_close(step(leaves, "triton", mix, compiled), step(leaves, "triton", mix), 1e-6)


def test_compiled_where_little_needs_a_gradient(package):
    """The first layer of a model whose threshold is held: neither x nor the threshold has one."""
    x, W, bias, *factors, log_tau = setup()
    leaves = [t.detach() for t in (x, W, bias)] + factors + [log_tau.detach()]

    def gradients(function):
        y = function(*leaves, scaling=4.0, mix=torch.tensor([0.6], device=DEVICE), bandwidth=0.01, backend="triton")
        return y, *torch.autograd.grad(y, factors, torch.ones_like(y))

    compiled = torch.compile(gated_linear, fullgraph=True, backend="aot_eager")
    assert_close(gradients(compiled), gradients(gated_linear), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(package, dtype):
    """x in bf16 over the weight as it is; gradients in the dtypes of their leaves; D in float32."""
    leaves = setup()
    leaves[0] = leaves[0].detach().to(dtype).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        found, expected = step(leaves, "triton"), step(leaves, "blocked")
    assert found[0].dtype == torch.bfloat16
    assert [grad.dtype for grad in found[1:]] == [leaf.dtype for leaf in leaves]
    assert_close(found, expected, 2e-2)


def test_folding_loses_small_updates_in_bf16(package):
    """Why "triton" does not fold there: of an update a thousandth as large as the weight, what reaches x's gradient."""
    torch.manual_seed(0)
    W, A, B = torch.randn(64, 64).bfloat16(), torch.randn(8, 64), torch.randn(64, 8) * 1e-3 / 8**0.5
    W, A, B, eye, log_tau = (t.to(DEVICE) for t in (W, A, B, torch.eye(64), torch.zeros(1)))
    # A product with the unit matrix is exact, so x W^T + s x E^T in float32 shows what a weight tile holds.
    folded = gated_linear(eye.bfloat16(), W, None, A, B, log_tau, scaling=1.0, mix=0.0, backend="triton-fold")
    alone = gated_linear(eye.bfloat16(), None, None, A, B, log_tau, scaling=1.0, mix=0.0, backend="triton")
    E = (B @ A).T.double()
    assert (folded.double() - W.T.double() - E).norm() > 0.5 * E.norm()
    assert (alone.double() - E).norm() < 0.01 * E.norm()


def test_unknown_backends_are_named(monkeypatch):
    x, A, B, log_tau = torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(4, 1), torch.zeros(1)
    with pytest.raises(ValueError, match="backend is one of 'naive', 'blocked', 'triton', 'triton-fold'; got 'tritn'"):
        gated_linear(x, None, None, A, B, log_tau, scaling=1.0, mix=0.5, backend="tritn")
    monkeypatch.setenv("HF_JUMPLORA_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"HF_JUMPLORA_BACKEND is one of .* got 'cuda'"):
        gated_linear(x, None, None, A, B, log_tau, scaling=1.0, mix=0.5)
    with pytest.raises(ValueError, match=r"backend is one of .* got 'cuda'"):
        JumpLoraConfig(backend="cuda")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize(
    ("asked", "dtype", "message"),
    [
        ({"backend": "triton"}, torch.float32, "backend='triton' runs on .* x is on cpu: .* or use backend='blocked'"),
        ({}, torch.float32, "HF_JUMPLORA_BACKEND='triton-fold' runs on .* or use HF_JUMPLORA_BACKEND='blocked'"),
        ({"backend": "triton"}, torch.float64, "backend='triton' computes in float32.* these are float64"),
    ],
)
def test_triton_asked_for_where_it_cannot_run(monkeypatch, asked, dtype, message):
    monkeypatch.setenv("HF_JUMPLORA_BACKEND", "triton-fold")
    x, A, B, log_tau = (torch.zeros(size, dtype=dtype) for size in ((2, 3), (1, 3), (4, 1), 1))
    with pytest.raises(ValueError, match=message):
        gated_linear(x, None, None, A, B, log_tau, scaling=1.0, mix=0.5, **asked)


def test_argument_over_environment_over_automatic(monkeypatch, caplog):
    """What was chosen, and why, is said once a device."""
    called = []
    for name in ("naive", "blocked"):
        function = getattr(dispatch, f"gated_linear_{name}")
        spy = lambda *args, name=name, function=function, **options: called.append(name) or function(*args, **options)  # noqa: E731
        monkeypatch.setattr(dispatch, f"gated_linear_{name}", spy)
    monkeypatch.setattr(dispatch, "_logged", set())
    x, A, B, log_tau = torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(4, 1), torch.zeros(1)
    dispatch._choose.cache_clear()
    caplog.set_level(logging.INFO, "hf_jumplora")
    monkeypatch.delenv("HF_JUMPLORA_BACKEND", raising=False)
    for value, argument in ((None, None), (None, None), ("naive", None), ("naive", "blocked")):
        if value:
            monkeypatch.setenv("HF_JUMPLORA_BACKEND", value)
        gated_linear(x, None, None, A, B, log_tau, scaling=1.0, mix=0.5, backend=argument)
    assert called == ["blocked", "blocked", "naive", "blocked"]
    assert [record.getMessage() for record in caplog.records] == [
        "gated_linear on cpu: blocked (automatic)",
        "gated_linear on cpu: naive (HF_JUMPLORA_BACKEND)",
    ]


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [("present", "bfloat16", "triton"), ("present", "float64", "blocked"), ("absent", "bfloat16", "blocked")],
)
def test_automatic_choice_on_a_gpu(monkeypatch, capability, dtype, expected):
    """Triton where it can run, else blocked without an error. The GPU is pretended."""
    jumplora_kernels = pytest.importorskip("jumplora_kernels")
    monkeypatch.delenv("HF_JUMPLORA_BACKEND", raising=False)
    monkeypatch.setattr(jumplora_kernels, "is_available", lambda device: capability == "present")
    dispatch._choose.cache_clear()
    dtypes = getattr(torch, dtype), torch.float32
    assert dispatch.choose_backend(None, torch.device("cuda:0"), dtypes) == expected
    dispatch._choose.cache_clear()


def test_the_config_says_so_to_its_layers(gated, ids, monkeypatch, tmp_path):
    """The field reaches the operator, is not saved, and configs without it load."""
    asked = []
    monkeypatch.setattr(
        "hf_jumplora.tuner.layer.gated_linear",
        lambda *args, backend, **options: asked.append(backend) or gated_linear(*args, backend=backend, **options),
    )
    model = gated(backend="naive", mix=0.5)
    model(ids)
    assert set(asked) == {"naive"}
    model.save_pretrained(tmp_path)
    assert "backend" not in (tmp_path / "adapter_config.json").read_text()
    assert JumpLoraConfig.from_pretrained(tmp_path).backend is None
