"""The kernels' arithmetic against a dense float64 reference: on a GPU where there is one, else interpreted."""

from typing import Any

import numpy as np
import pytest
import torch
from interpreted import DEVICE
from torch import Tensor


pytest.importorskip("triton")

SIZES = [(37, 45, 70), (5, 130, 33), (1, 8, 8)]  # tokens, out, in
RESULTS = ("y", "grad_x", "grad_A", "grad_B", "grad_log_tau")
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
    # Entries that rounding may put on either side of an edge of the windows: what they may change.
    half, grad_E = bandwidth / 2, torch.autograd.grad(y, effective, case["grad_y"].double(), retain_graph=True)[0]
    near = ((delta.abs() - tau).abs() - half).abs() < 3e-6
    doubt = (tau / bandwidth * mix * grad_E * near * tau).abs().sum() / (delta.numel() if mean else 1)
    grad_x, grad_A, grad_B, grad_tau = torch.autograd.grad(y, (x, A, B, tau), case["grad_y"].double())
    return {
        "doubt": doubt.detach(),
        "y": y.detach(),
        "grad_x": grad_x,
        "grad_A": grad_A,
        "grad_B": grad_B,
        "grad_log_tau": grad_tau * tau.detach(),
    }


def gate_of(case: dict[str, Any]) -> list[Tensor]:
    """A, B, tau and f as the kernels take them."""
    return [case["A"], case["B"], case["log_tau"].exp(), torch.tensor([case["mix"]], device=DEVICE)]


def run(package, case: dict[str, Any], bandwidth: float = BANDWIDTH, threshold_grad: str = "mean") -> dict[str, Tensor]:
    shared, gate = {"scaling": SCALING, "free": case["free"]}, gate_of(case)
    y = package.forward(case["x"], case["weight"], case["bias"], *gate, **shared)
    grads = package.backward(
        case["grad_y"], case["x"], case["weight"], *gate,
        bandwidth=bandwidth, threshold_grad=threshold_grad, **shared,
    )  # fmt: skip
    return dict(zip(RESULTS, (y, *grads), strict=True))


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], *, activations: float = 1e-6) -> None:
    """Relative Frobenius errors; `activations` is the tolerance of what is stored in the dtype of x.

    On a GPU D is a tf32x3 product, a few times less exact, and an entry within its error of tau may change sides.
    """
    errors, doubt = {}, float(expected.get("doubt", 0.0)) if DEVICE != "cpu" else 0.0
    expected = {name: value for name, value in expected.items() if name != "doubt"}
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        norm = value.norm()
        errors[name] = float((actual[name].double() - value).norm() / (norm if norm > 0 else 1.0))
    limits = {"y": activations, "grad_x": activations, "grad_A": 1e-6, "grad_B": 1e-6, "grad_log_tau": 1e-5}
    slack = 1 if DEVICE == "cpu" else 10
    allowed = {name: slack * limits[name] for name in errors}
    if doubt:
        allowed["grad_log_tau"] += doubt / float(expected["grad_log_tau"].abs().sum())
    assert all(error <= allowed[name] for name, error in errors.items()), (errors, doubt)


@pytest.mark.parametrize("rank", [1, 4, 8, 16, 70])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_ranks(package, size, rank):
    case = make_case(size, rank)
    assert_close(run(package, case), reference(case))


@pytest.mark.parametrize("rank", [200, 512])
def test_large_ranks(package, rank):
    """Many chunks of ranks; the last one is not full."""
    case = make_case((7, 33, 20), rank)
    assert_close(run(package, case), reference(case))


@pytest.mark.parametrize("free", [False, True], ids=["", "free"])
@pytest.mark.parametrize("weight", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
def test_forms(package, mix, weight, free):
    case = make_case(mix=mix, weight=weight, bias=weight, free=free)
    assert_close(run(package, case), reference(case))


@pytest.mark.parametrize("rank", [4, 20])
@pytest.mark.parametrize("size", [*SIZES, (3, 300, 40)], ids=str)
def test_many_tiles_and_blocks(package, monkeypatch, size, rank):
    """With the default tiles these matrices are one or a few programs, and one block of rows."""
    for name in ("update_rows", "gate_grad"):
        monkeypatch.setitem(package.launch.TILES, name, {**package.launch.TILES[name], "BO": 32, "BI": 32})
    monkeypatch.setitem(package.launch.TILES, "sum_parts", {**package.launch.TILES["sum_parts"], "BLOCK": 32})
    monkeypatch.setattr(package.launch, "BLOCK_ENTRIES", 0)  # blocks of 128 rows, the least
    case = make_case(size, rank)
    assert_close(run(package, case), reference(case))


def test_the_additive_form(package):
    """On top of what is there, in place: y and grad_x."""
    case = make_case(weight=False, bias=False)
    expected = reference(case)
    gate, options = gate_of(case), {"scaling": SCALING, "free": case["free"]}
    y, grad_x = torch.randn(37, 45, device=DEVICE), torch.randn(37, 70, device=DEVICE)
    expected |= {"y": expected["y"] + y, "grad_x": expected["grad_x"] + grad_x}
    actual = package.forward(case["x"], None, None, *gate, **options, add_to=y)
    grads = package.backward(
        case["grad_y"], case["x"], None, *gate, bandwidth=BANDWIDTH, threshold_grad="mean", **options,
        add_to=grad_x,
    )  # fmt: skip
    assert actual is y
    assert grads[0] is grad_x
    assert_close(dict(zip(RESULTS, (y, *grads), strict=True)), expected)
    with pytest.raises(ValueError, match="add_to is not contiguous"):
        package.forward(case["x"], None, None, *gate, **options, add_to=y[:, 1:])


@pytest.mark.parametrize(("rank", "launches"), [(8, 3), (16, 3), (17, 2)])
def test_launches(package, monkeypatch, rank, launches):
    """One before the product over the tokens of the forward pass; three, or two of a large rank, in the backward."""
    launched, launch = [], package.launch._launch
    monkeypatch.setattr(package.launch, "_launch", lambda *args, **options: launched.append(launch(*args, **options)))
    case = make_case(rank=rank)
    package.forward(case["x"], None, None, *gate_of(case), scaling=1.0)
    assert len(launched) == 1
    run(package, case)
    assert len(launched) == 2 + launches


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
    case["A"] = torch.eye(4, device=DEVICE)
    case["B"] = torch.tensor(
        [[1.0, -1.0, 1.25, 0.75], [-1.25, -0.75, 2.0, 0.5], [0.0, 1.125, -1.125, 0.875], [3.0, -3.0, 0.1, -0.1]],
        device=DEVICE,
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


def test_half_precision_over_a_float32_weight(package):
    case = make_case(dtype=torch.float16)
    case["weight"] = case["weight"].float() + 1e-4
    assert_close(run(package, case), reference(case), activations=2**-10)


def test_the_same_inputs_give_the_same_bits(package):
    case = make_case()
    first, second = run(package, case), run(package, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sum_of_threshold_gradients(package):
    case = make_case()
    assert_close(run(package, case, threshold_grad="sum"), reference(case, threshold_grad="sum"))


def test_views(package):
    """A transposed weight (Conv1D), a strided x and an expanded gradient (of y.sum())."""
    case = make_case()
    case["weight"] = case["weight"].T.contiguous().T
    case["x"] = case["x"].repeat(1, 2)[:, ::2]
    case["grad_y"] = torch.ones(1, 1, device=DEVICE).expand(37, 45)
    assert not any(case[name].is_contiguous() for name in ("weight", "x", "grad_y"))
    assert_close(run(package, case), reference(case))


def test_no_tokens(package):
    case = make_case((0, 45, 70))
    actual = run(package, case)
    assert actual["y"].shape == (0, 45)
    assert actual["grad_x"].shape == (0, 70)
    assert not any(actual[name].any() for name in ("grad_A", "grad_B", "grad_log_tau"))


def test_frozen_input_gets_no_gradient(package):
    case = make_case()
    grad_x, *_, grad_log_tau = package.backward(
        case["grad_y"], case["x"], case["weight"], *gate_of(case), scaling=SCALING, bandwidth=BANDWIDTH,
        threshold_grad="mean", needs_x=False, needs_tau=False,
    )  # fmt: skip
    assert grad_x is None
    assert grad_log_tau is None


@pytest.mark.parametrize("mix", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("rank", "k"), [(4, 5), (20, 16), (3, 70)])
def test_penalty(package, monkeypatch, rank, k, mix):
    """Value and gradients of many layers at once, in one chunk of layers or in several, against float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, rank, 70), (3, 45, rank), (3, 45, k), (3, 70, k)
    A, B, G, C = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    B /= rank**0.5
    tau, f = torch.tensor([0.5, 0.8, 100.0], device=DEVICE), torch.full((3,), mix, device=DEVICE)
    a, b = A.double().requires_grad_(), B.double().requires_grad_()
    D = b @ a
    E = D * (1 - f[:, None, None].double() * (D.abs() <= tau[:, None, None]))
    value = (G.double().mT @ E @ C.double()).square().sum()
    expected = value.detach(), *torch.autograd.grad(value, (a, b))
    for size in (64 << 20, 1):
        monkeypatch.setattr(package.launch, "PARTS_BYTES", size)
        for name, found, right in zip(("value", "A", "B"), package.penalty(A, B, tau, f, G, C), expected, strict=True):
            error = (found.double() - right).norm() / right.norm().clamp_min(1e-30)
            assert error <= (1e-6 if DEVICE == "cpu" else 5e-3), (name, size, error)  # tf32 on a GPU: 3e-3


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
