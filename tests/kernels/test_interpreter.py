"""The kernels' arithmetic, run by the Triton interpreter on the CPU, against a dense float64 reference."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


triton = pytest.importorskip("triton")

NAME = "jumplora_kernels"
SIZES = [(37, 45, 70), (5, 130, 33), (1, 8, 8)]  # tokens, out, in
SCALING = 2.0
LOG_TAU = -0.4
BANDWIDTH = 0.2


def _take_modules() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == NAME}


@pytest.fixture(scope="module")
def package():
    """A private copy of the package under the interpreter, whatever this process has imported before.

    Triton reads TRITON_INTERPRET when a kernel is decorated, so a copy that another test imported is of no use, and
    neither are the functions of Triton's own library that are kernels themselves.
    """
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in ("sum", "zeros"):
            function = getattr(triton.language, name)
            if isinstance(function, triton.JITFunction):
                patch.setattr(triton.language, name, InterpretedFunction(function.fn))
        patch.syspath_prepend(Path(__file__).parents[2] / "kernels")
        others = _take_modules()
        copy = importlib.import_module(NAME)
        _take_modules()
        sys.modules.update(others)
        yield copy


class JumpReLU(torch.autograd.Function):
    """z 1[z > tau]; tau gets its gradient from the entries within half a bandwidth of it."""

    @staticmethod
    def forward(ctx, z, tau, bandwidth, mean):
        ctx.save_for_backward(z, tau)
        ctx.bandwidth, ctx.mean = bandwidth, mean
        return z * (z > tau)

    @staticmethod
    def backward(ctx, grad):
        z, tau = ctx.saved_tensors
        window = (z - tau).abs() < ctx.bandwidth / 2
        total = (grad * window).mean() if ctx.mean else (grad * window).sum()
        return grad * (z > tau), -tau / ctx.bandwidth * total, None, None


def make_case(
    size: tuple[int, int, int] = (37, 45, 70),
    rank: int = 4,
    *,
    mix: float = 0.3,
    weight: bool = True,
    bias: bool = True,
    free: bool = True,
    dtype: torch.dtype = torch.float32,
    log_tau: float = LOG_TAU,
) -> dict[str, Any]:
    """Random inputs; |D| is about 1, so tau = 0.67 divides it. `allowed` is `free` before packing."""
    tokens, out_features, in_features = size
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    allowed = normal(out_features, in_features) > -0.5
    packed = torch.from_numpy(np.packbits(allowed.numpy().reshape(-1), bitorder="little"))
    return {
        "x": normal(tokens, in_features).to(dtype),
        "weight": normal(out_features, in_features).to(dtype) if weight else None,
        "bias": normal(out_features).to(dtype) if bias else None,
        "A": normal(rank, in_features),
        "B": normal(out_features, rank) / rank**0.5,
        "log_tau": torch.tensor([log_tau]),
        "mix": mix,
        "grad_y": normal(tokens, out_features).to(dtype),
        "free": packed if free else None,
        "allowed": allowed if free else None,
    }


def reference(case: dict[str, Any], bandwidth: float = BANDWIDTH, threshold_grad: str = "mean") -> dict[str, Tensor]:
    """The layer of `case` in float64, dense, differentiated by autograd."""
    x, A, B = (case[name].double().requires_grad_() for name in ("x", "A", "B"))
    # tau itself is a float32 number: at the boundary the comparison must be with that one.
    tau = case["log_tau"].exp().double().requires_grad_()
    mix = float(case["mix"])
    delta = B @ A
    mean = threshold_grad == "mean"
    gated = JumpReLU.apply(delta, tau, bandwidth, mean) - JumpReLU.apply(-delta, tau, bandwidth, mean)
    effective = (1 - mix) * delta + mix * gated
    if case["allowed"] is not None:
        effective = effective * case["allowed"]
    y = SCALING * x @ effective.T
    if case["weight"] is not None:
        y = y + x @ case["weight"].double().T
    if case["bias"] is not None:
        y = y + case["bias"].double()
    grad_x, grad_A, grad_B, grad_tau = torch.autograd.grad(y, (x, A, B, tau), case["grad_y"].double())
    return {
        "y": y.detach(),
        "grad_x": grad_x,
        "grad_A": grad_A,
        "grad_B": grad_B,
        "grad_log_tau": grad_tau * tau.detach(),
    }


def run(package, case: dict[str, Any], bandwidth: float = BANDWIDTH, threshold_grad: str = "mean") -> dict[str, Tensor]:
    shared = {"scaling": SCALING, "free": case["free"]}
    gate = [case[name] for name in ("A", "B", "log_tau", "mix")]
    y = package.forward(case["x"], case["weight"], case["bias"], *gate, **shared)
    grads = package.backward(
        case["grad_y"], case["x"], case["weight"], *gate,
        bandwidth=bandwidth, threshold_grad=threshold_grad, **shared,
    )  # fmt: skip
    return dict(zip(("y", "grad_x", "grad_A", "grad_B", "grad_log_tau"), (y, *grads), strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, activations: float = 1e-6) -> None:
    """Relative Frobenius errors; `activations` is the tolerance of what is stored in the dtype of x."""
    errors = {}
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        norm = value.norm()
        errors[name] = float((actual[name].double() - value).norm() / (norm if norm > 0 else 1.0))
    limits = {"y": activations, "grad_x": activations, "grad_log_tau": 1e-5}
    assert all(error <= limits.get(name, 1e-6) for name, error in errors.items()), errors


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 70])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_ranks(package, size, rank):
    case = make_case(size, rank)
    assert_close(run(package, case), reference(case))


@pytest.mark.parametrize("free", [False, True], ids=["", "free"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("weight", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_forms(package, mix, weight, bias, free):
    case = make_case(mix=mix, weight=weight, bias=bias, free=free)
    assert_close(run(package, case), reference(case))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_many_tiles(package, monkeypatch, size):
    """With the default tiles these matrices are one or a few programs."""
    for key, tile in package.launch.TILES.items():
        monkeypatch.setitem(package.launch.TILES, key, {**tile, "BT": 16, "BO": 16, "BI": 32})
    case = make_case(size)
    assert_close(run(package, case), reference(case))


@pytest.mark.parametrize("log_tau", [10.0, -20.0], ids=["empty", "full"])
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_empty_and_full_support(package, log_tau, mix):
    case = make_case(mix=mix, log_tau=log_tau)
    expected = reference(case)
    actual = run(package, case)
    assert_close(actual, expected)
    assert actual["grad_log_tau"] == 0 or log_tau < 0
    if mix == 1 and log_tau > 0:
        assert not actual["grad_A"].any()
        assert not actual["grad_B"].any()


def test_boundaries_are_open(package):
    """|D| = tau is not kept, ||D| - tau| = bandwidth / 2 has no say in the gradient of tau. D and tau are exact."""
    case = make_case((5, 4, 4), rank=4, mix=1.0, free=False, log_tau=0.0)
    case["A"] = torch.eye(4)
    case["B"] = torch.tensor(
        [[1.0, -1.0, 1.25, 0.75], [-1.25, -0.75, 2.0, 0.5], [0.0, 1.125, -1.125, 0.875], [3.0, -3.0, 0.1, -0.1]]
    )
    actual = run(package, case, bandwidth=0.5)
    assert_close(actual, reference(case, bandwidth=0.5))
    assert actual["grad_B"][0, 0] == 0
    assert actual["grad_B"][0, 1] == 0
    assert actual["grad_B"][0, 2] != 0


def test_threshold_below_half_the_bandwidth(package):
    """The windows around tau and -tau overlap; an entry in both has no say."""
    case = make_case(mix=1.0, log_tau=-3.0)
    assert_close(run(package, case), reference(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [False, True], ids=["", "weight"])
def test_half_precision(package, dtype, weight):
    """Only what is stored in half precision loses accuracy (the interpreter truncates to bfloat16)."""
    case = make_case(weight=weight, dtype=dtype)
    actual = run(package, case)
    assert actual["y"].dtype == actual["grad_x"].dtype == dtype
    assert actual["grad_A"].dtype == actual["grad_B"].dtype == actual["grad_log_tau"].dtype == torch.float32
    assert_close(actual, reference(case), activations=2**-7 if dtype is torch.bfloat16 else 2**-10)


def test_sum_of_threshold_gradients(package):
    case = make_case()
    assert_close(run(package, case, threshold_grad="sum"), reference(case, threshold_grad="sum"))


def test_views(package):
    """A transposed weight (Conv1D), a strided x and an expanded gradient (of y.sum())."""
    case = make_case()
    case["weight"] = case["weight"].T.contiguous().T
    case["x"] = case["x"].repeat(1, 2)[:, ::2]
    case["grad_y"] = torch.ones(1, 1).expand(37, 45)
    assert not any(case[name].is_contiguous() for name in ("weight", "x", "grad_y"))
    assert_close(run(package, case), reference(case))


def test_mix_in_a_tensor(package):
    case = make_case()
    expected = run(package, case)
    actual = run(package, {**case, "mix": torch.tensor(0.3, dtype=torch.float64)})
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_no_tokens(package):
    case = make_case((0, 45, 70))
    actual = run(package, case)
    assert actual["y"].shape == (0, 45)
    assert actual["grad_x"].shape == (0, 70)
    assert not any(actual[name].any() for name in ("grad_A", "grad_B", "grad_log_tau"))


def test_frozen_input_gets_no_gradient(package):
    case = make_case()
    gate = [case[name] for name in ("x", "weight", "A", "B", "log_tau", "mix")]
    grad_x, *_ = package.backward(
        case["grad_y"], *gate, scaling=SCALING, bandwidth=BANDWIDTH, threshold_grad="mean", needs_x=False
    )
    assert grad_x is None


@pytest.mark.parametrize(
    ("name", "message"), [("A", "do not fit together"), ("weight", "B A is"), ("free", "394 contiguous bytes")]
)
def test_wrong_shapes_raise(package, name, message):
    case = make_case()
    with pytest.raises(ValueError, match=message):
        run(package, {**case, name: case[name][..., :-1]})


def test_unknown_threshold_grad_raises(package):
    with pytest.raises(ValueError, match="median"):
        run(package, make_case(), threshold_grad="median")


def test_available_under_the_interpreter(package):
    assert package.is_available()
