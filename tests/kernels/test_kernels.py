"""The kernels' arithmetic against a dense float64 reference: on a GPU where there is one, else interpreted."""

from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE
from torch import Tensor


pytest.importorskip("triton")

SIZES = [(37, 45, 70), (5, 130, 33), (1, 8, 8)]  # tokens, out, in
PATHS = pytest.mark.parametrize("tiles", [True, False], ids=["tiles", "rows"])
SCALING = 2.0
LOG_TAU = -0.4
BANDWIDTH = 0.2


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
    case = {
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
    return {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in case.items()}


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


def run(
    package, case: dict[str, Any], bandwidth: float = BANDWIDTH, threshold_grad: str = "mean", tiles: bool = True
) -> dict[str, Tensor]:
    shared = {"scaling": SCALING, "free": case["free"], "tiles": tiles}
    gate = [case[name] for name in ("A", "B", "log_tau", "mix")]
    y = package.forward(case["x"], case["weight"], case["bias"], *gate, **shared)
    grads = package.backward(
        case["grad_y"], case["x"], case["weight"], *gate,
        bandwidth=bandwidth, threshold_grad=threshold_grad, **shared,
    )  # fmt: skip
    return dict(zip(("y", "grad_x", "grad_A", "grad_B", "grad_log_tau"), (y, *grads), strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, activations: float = 1e-6) -> None:
    """Relative Frobenius errors; `activations` is the tolerance of what is stored in the dtype of x.

    On a GPU D is a tf32x3 product, a few times less exact, and an entry within its error of tau may change sides.
    """
    errors = {}
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        norm = value.norm()
        errors[name] = float((actual[name].double() - value).norm() / (norm if norm > 0 else 1.0))
    limits = {"y": activations, "grad_x": activations, "grad_A": 1e-6, "grad_B": 1e-6, "grad_log_tau": 1e-5}
    slack = 1 if DEVICE == "cpu" else 10
    assert all(error <= slack * limits[name] for name, error in errors.items()), errors


@PATHS
@pytest.mark.parametrize("rank", [1, 4, 8, 16, 70])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_ranks(package, size, rank, tiles):
    case = make_case(size, rank)
    assert_close(run(package, case, tiles=tiles), reference(case))


@PATHS
@pytest.mark.parametrize("rank", [200, 512])
def test_large_ranks(package, rank, tiles):
    """Many chunks of ranks; the last one is not full."""
    case = make_case((7, 33, 20), rank)
    assert_close(run(package, case, tiles=tiles), reference(case))


@PATHS
@pytest.mark.parametrize("free", [False, True], ids=["", "free"])
@pytest.mark.parametrize("weight", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_forms(package, mix, weight, free, tiles):
    case = make_case(mix=mix, weight=weight, bias=weight, free=free)
    assert_close(run(package, case, tiles=tiles), reference(case))


@PATHS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_many_tiles_and_blocks(package, monkeypatch, size, tiles):
    """With the default tiles these matrices are one or a few programs, and one block of rows."""
    for name, (tile, *_) in package.launch.TILES.items():
        small = {side: min(tile[side], 32) for side in ("BT", "BO", "BI") if side in tile}
        monkeypatch.setitem(package.launch.TILES, name, [{**tile, **small}])
    package.launch._tuned.cache_clear()
    monkeypatch.setattr(package.launch, "WORKSPACE_BYTES", 0)  # blocks of 128 rows, the least
    case = make_case(size)
    assert_close(run(package, case, tiles=tiles), reference(case))
    package.launch._tuned.cache_clear()


@PATHS
def test_the_additive_form(package, tiles):
    """On top of what is there, in place: y and grad_x."""
    case = make_case(weight=False, bias=False)
    expected = reference(case)
    gate, options = [case[name] for name in ("A", "B", "log_tau", "mix")], {"scaling": SCALING, "free": case["free"]}
    y, grad_x = torch.randn(37, 45, device=DEVICE), torch.randn(37, 70, device=DEVICE)
    expected |= {"y": expected["y"] + y, "grad_x": expected["grad_x"] + grad_x}
    actual = package.forward(case["x"], None, None, *gate, **options, add_to=y, tiles=tiles)
    grads = package.backward(
        case["grad_y"], case["x"], None, *gate, bandwidth=BANDWIDTH, threshold_grad="mean", **options,
        add_to=grad_x, tiles=tiles,
    )  # fmt: skip
    assert actual is y
    assert grads[0] is grad_x
    assert_close(dict(zip(expected, (y, *grads), strict=True)), expected)
    with pytest.raises(ValueError, match="add_to is not contiguous"):
        package.forward(case["x"], None, None, *gate, **options, add_to=y[:, 1:])


@pytest.mark.parametrize(
    ("tokens", "rank", "dtype", "name"),
    [
        (1024, 16, torch.bfloat16, "forward"), (1024, 17, torch.bfloat16, "weight_rows"),
        (1025, 16, torch.float16, "weight_rows"), (1, 1, torch.float32, "weight_rows"),
    ],
)  # fmt: skip
def test_which_kernels_run(package, monkeypatch, tokens, rank, dtype, name):
    """Small ranks, few tokens and half precision: inside the product."""
    launched = []
    monkeypatch.setattr(package.launch, "_launch", lambda name, *args, **options: launched.append(name))
    x, A, B = torch.zeros(tokens, 8, dtype=dtype), torch.zeros(rank, 8), torch.zeros(8, rank)
    package.forward(x, None, None, A, B, torch.zeros(1), 0.5, scaling=1.0)
    assert launched == [name]


@PATHS
@pytest.mark.parametrize("log_tau", [10.0, -20.0], ids=["empty", "full"])
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_empty_and_full_support(package, log_tau, mix, tiles):
    case = make_case(mix=mix, log_tau=log_tau)
    expected = reference(case)
    actual = run(package, case, tiles=tiles)
    assert_close(actual, expected)
    assert actual["grad_log_tau"] == 0 or log_tau < 0
    if mix == 1 and log_tau > 0:
        assert not actual["grad_A"].any()
        assert not actual["grad_B"].any()


@PATHS
def test_boundaries_are_open(package, tiles):
    """|D| = tau is not kept, ||D| - tau| = bandwidth / 2 has no say in the gradient of tau. D and tau are exact."""
    case = make_case((5, 4, 4), rank=4, mix=1.0, free=False, log_tau=0.0)
    case["A"] = torch.eye(4, device=DEVICE)
    case["B"] = torch.tensor(
        [[1.0, -1.0, 1.25, 0.75], [-1.25, -0.75, 2.0, 0.5], [0.0, 1.125, -1.125, 0.875], [3.0, -3.0, 0.1, -0.1]],
        device=DEVICE,
    )
    actual = run(package, case, bandwidth=0.5, tiles=tiles)
    assert_close(actual, reference(case, bandwidth=0.5))
    assert actual["grad_B"][0, 0] == 0
    assert actual["grad_B"][0, 1] == 0
    assert actual["grad_B"][0, 2] != 0


@PATHS
def test_threshold_below_half_the_bandwidth(package, tiles):
    """The windows around tau and -tau overlap; an entry in both has no say."""
    case = make_case(mix=1.0, log_tau=-3.0)
    assert_close(run(package, case, tiles=tiles), reference(case))


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight", [False, True], ids=["", "weight"])
def test_half_precision(package, dtype, weight, tiles):
    """Only what is stored in half precision loses accuracy (the interpreter truncates to bfloat16)."""
    case = make_case(weight=weight, dtype=dtype)
    actual = run(package, case, tiles=tiles)
    assert actual["y"].dtype == actual["grad_x"].dtype == dtype
    assert actual["grad_A"].dtype == actual["grad_B"].dtype == actual["grad_log_tau"].dtype == torch.float32
    assert_close(actual, reference(case), activations=2**-7 if dtype is torch.bfloat16 else 2**-10)


@PATHS
def test_half_precision_over_a_float32_weight(package, tiles):
    case = make_case(dtype=torch.float16)
    case["weight"] = case["weight"].float() + 1e-4
    assert_close(run(package, case, tiles=tiles), reference(case), activations=2**-10)


@PATHS
def test_the_same_inputs_give_the_same_bits(package, tiles):
    case = make_case()
    first, second = run(package, case, tiles=tiles), run(package, case, tiles=tiles)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sum_of_threshold_gradients(package):
    case = make_case()
    assert_close(run(package, case, threshold_grad="sum"), reference(case, threshold_grad="sum"))


@PATHS
def test_views(package, tiles):
    """A transposed weight (Conv1D), a strided x and an expanded gradient (of y.sum())."""
    case = make_case()
    case["weight"] = case["weight"].T.contiguous().T
    case["x"] = case["x"].repeat(1, 2)[:, ::2]
    case["grad_y"] = torch.ones(1, 1, device=DEVICE).expand(37, 45)
    assert not any(case[name].is_contiguous() for name in ("weight", "x", "grad_y"))
    assert_close(run(package, case, tiles=tiles), reference(case))


def test_mix_in_a_tensor(package):
    case = make_case()
    expected = run(package, case)
    actual = run(package, {**case, "mix": torch.tensor(0.3, dtype=torch.float64, device=DEVICE)})
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@PATHS
def test_no_tokens(package, tiles):
    case = make_case((0, 45, 70))
    actual = run(package, case, tiles=tiles)
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


def test_available_here(package):
    assert package.is_available(torch.device(DEVICE))
