"""Launches the kernels: plain functions on tensors, no autograd."""

from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.runtime.interpreter import InterpretedFunction

from . import kernels


# Launch options by kernel. All pass the offline compile check (tests/kernels/compile_check.py prints registers, spills
# and shared memory for sm_80, sm_89, sm_90, sm_100 and gfx942): none spills. Fixed, not tuned at run time: they wait
# for memory, not for a shape, and the same tiles give the same sums everywhere.
TILES: dict[str, dict[str, int]] = {
    "update_rows": {"BO": 32, "BI": 128, "num_warps": 4, "num_stages": 2},
    "gate_grad": {"BO": 64, "BI": 64, "num_warps": 8, "num_stages": 2},
    "sum_parts": {"BLOCK": 256, "num_warps": 4, "num_stages": 3},
    "penalty": {"BO": 64, "BI": 64, "num_warps": 8, "num_stages": 2},
}

OF_A_LAYER = {"num_warps": 4}  # of `gate_grad` that reduces a layer's rows: half the time of 8 on an H200
RANK_CHUNK = 16  # ranks of one product in the gate; up to here gradients are reduced in registers
BLOCK_ENTRIES = 1 << 26  # of a layer's rows that are in memory at a time: 128 MiB in half precision, 256 in float32
PARTS_BYTES = 64 << 20  # of partial sums of a penalty that are in memory at a time

_FLOAT32_RESULT = "dtype" in torch.ops.aten.mm.overloads() and torch.version.hip is None

# Triton decides at decoration, so this and not the environment says how the kernels of this module run.
INTERPRETED = isinstance(kernels.gate_grad_kernel, InterpretedFunction)


def is_available(device: torch.device) -> bool:
    """Whether the kernels run on tensors of this device: on an AMD GPU, on an NVIDIA GPU of compute capability 8.0 or
    more (the oldest they are compiled for in the tests), and in Triton's interpreter everywhere."""
    if INTERPRETED:
        return True
    if device.type != "cuda" or not any(backend.driver.is_active() for backend in backends.values()):
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    tau: Tensor,
    mix: Tensor,
    *,
    scaling: float,
    free: Tensor | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """y = x (W + s E)^T + bias with E = ((1 - f) D + f D 1[|D| > tau]) * free and D = B A.

    Args:
        x: [tokens, in], float32, bfloat16 or float16.
        weight: [out, in] with any strides, or None for the low-rank part alone (s x E^T). W + s E is rounded to the
            dtype of x before the product.
        bias: [out] or None.
        A: [rank, in].
        B: [out, rank].
        tau, mix: f in [0, 1]; float32 [1], on the device of x (the kernels read them, nothing waits).
        scaling: s.
        free: support limit, uint8 [ceil(out * in / 8)] or None. Entry e = o * in + i is bit e % 8 (lowest first) of
            byte e // 8; 1 = the entry may be used.
        add_to: [tokens, out], row-major, in the dtype of x: the result is added to it, in place. The additive form, for
            bases that cannot be read or would lose small updates: `add_to=base(x), weight=None`.

    Returns:
        y: [tokens, out] in the dtype of x.
    """
    _check_shapes(x, weight, A, B, free)
    y = x.new_empty(x.shape[0], B.shape[0]) if add_to is None else add_to
    _check_added(y, (x.shape[0], B.shape[0]))
    x = x.contiguous()
    for start, stop, rows in _update_rows(x, weight, A, B, tau, mix, free, scaling):
        target = y if len(rows) == y.shape[1] else y[:, start:stop]
        if add_to is not None:
            target.addmm_(x, rows.T)
        elif bias is not None:
            torch.addmm(bias[start:stop].to(x.dtype), x, rows.T, out=target)
        else:
            torch.mm(x, rows.T, out=target)
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    tau: Tensor,
    mix: Tensor,
    *,
    scaling: float,
    bandwidth: float,
    threshold_grad: str,
    free: Tensor | None = None,
    needs_x: bool = True,
    needs_tau: bool = True,
    add_to: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`, the same bits for the same inputs (parts and their sums, no atomics).

    Args:
        grad_y: [tokens, out].
        bandwidth: width of the window around tau in which an entry has a say in the gradient of tau.
        threshold_grad: "mean" divides the gradient of tau by out * in, "sum" does not.
        needs_x, needs_tau: False leaves that gradient out.
        add_to: [tokens, in]: grad_x is added to it, in place (the additive form: `add_to=grad_y @ W, weight=None`).
        others: as in `forward`.

    Returns:
        grad_x [tokens, in] or None, grad_A [rank, in], grad_B [out, rank] in the dtypes of what they belong to, and
        dL/dlog_tau [1] in float32 or None.
    """
    if threshold_grad not in ("mean", "sum"):
        raise ValueError(f"threshold_grad is {threshold_grad!r}, not 'mean' or 'sum'")
    _check_shapes(x, weight, A, B, free)
    # Autograd hands over expanded gradients (of y.sum()); the products read rows.
    grad_y, x = grad_y.contiguous(), x.contiguous()
    grad_x = add_to
    if needs_x:
        if add_to is not None:
            _check_added(add_to, tuple(x.shape))
        for start, stop, rows in _update_rows(x, weight, A, B, tau, mix, free, scaling):
            part = grad_y if len(rows) == grad_y.shape[1] else grad_y[:, start:stop]
            grad_x = part @ rows if grad_x is None else grad_x.addmm_(part, rows)
    numel = B.shape[0] * A.shape[1]
    tau_factor = -1 / bandwidth / (numel if threshold_grad == "mean" else 1) if needs_tau else 0.0
    grads = _gate_grads(grad_y, x, A, B, tau, mix, free, scaling, bandwidth / 2, tau_factor)
    return grad_x, *grads


def penalty(A: Tensor, B: Tensor, tau: Tensor, mix: Tensor, G: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sum over layers of ||G^T E C||^2, and its gradients in A and B; E as in `forward`, without a support limit.

    Many layers of one shape at once: A [layers, rank, in], B [layers, out, rank], tau and mix [layers], G [layers, out,
    k], C [layers, in, k], all float32. Products with G and C are tf32 on NVIDIA (relative error about 3e-4).

    Returns:
        (a scalar, grad_A [layers, rank, in], grad_B [layers, out, rank]).
    """
    A, B, G, C = (t.contiguous() for t in (A, B, G, C))
    (count, rank, width), out_features, k = A.shape, B.shape[1], G.shape[2]
    tile_o, tile_i = (TILES["gate_grad"][side] for side in ("BO", "BI"))
    tiles_o, tiles_i = _cdiv(out_features, tile_o), _cdiv(width, tile_i)
    a_layer = 4 * rank * (tiles_o * width + tiles_i * out_features)
    grad_A, grad_B, values = torch.empty_like(A), torch.empty_like(B), []
    at_once = max(1, PARTS_BYTES // a_layer)
    for start in range(0, count, at_once):
        at = slice(start, min(start + at_once, count))
        factors = G[at], C[at], A[at], B[at], tau[at], mix[at]
        layers = at.stop - start
        parts = A.new_empty(layers, _cdiv(out_features, TILES["penalty"]["BO"]), k, k)
        power = max(16, triton.next_power_of_2(k))
        _launch("penalty", (parts.shape[1], layers), A, *factors, parts, out_features, width, R=rank, K=k, KP=power)
        product = parts.sum(1)
        values.append(product.square().sum())
        parts_A = A.new_empty(layers, tiles_o, rank, width)
        parts_B = A.new_empty(layers, tiles_i, out_features, rank)
        _launch(
            "gate_grad", (tiles_o, tiles_i, layers), A,
            None, G[at] @ product, *factors[1:], None, parts_A, parts_B, None,
            0, out_features, out_features, width, 2.0, 0.0, R=rank, K=k,
        )  # fmt: skip
        torch.sum(parts_A, 1, out=grad_A[at])
        torch.sum(parts_B, 1, out=grad_B[at])
    return torch.stack(values).sum(), grad_A, grad_B


def _update_rows(x, weight, A, B, tau, mix, free, scaling) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows start..stop of W + s E in the dtype of x); the rows are in one buffer, used again."""
    rank, width = A.shape
    blocks = _row_blocks(B.shape[0], width)
    buffer = x.new_empty(blocks[0][1], width)
    tile_o, tile_i = TILES["update_rows"]["BO"], TILES["update_rows"]["BI"]
    strides = (0, 0) if weight is None else weight.stride()
    for start, stop in blocks:
        rows = buffer if len(blocks) == 1 else buffer[: stop - start]
        grid = _cdiv(stop - start, tile_o), _cdiv(width, tile_i)
        arguments = (weight, A.contiguous(), B.contiguous(), tau, mix, free, rows)
        _launch("update_rows", grid, x, *arguments, start, stop, width, *strides, scaling, R=rank)
        yield start, stop, rows


def _gate_grads(grad_y, x, A, B, tau, mix, free, scaling, half_bandwidth, tau_factor):
    """(dL/dA, dL/dB, dL/dlog_tau or None where tau_factor is 0), by blocks of rows of dL/dE = grad_y^T x."""
    a, b = A.contiguous(), B.contiguous()
    (rank, width), out_features = A.shape, B.shape[0]
    tile_o, tile_i = TILES["gate_grad"]["BO"], TILES["gate_grad"]["BI"]
    small, tiles_i = rank <= RANK_CHUNK, _cdiv(width, tile_i)
    grad_A, grad_B = (torch.empty_like(t, dtype=torch.float32) for t in (a, b))
    grad_log_tau = tau.new_empty(1) if tau_factor else None
    for start, stop in _row_blocks(out_features, width):
        tiles_o = _cdiv(stop - start, tile_o)
        whole = stop - start == out_features
        grad_E = product((grad_y if whole else grad_y[:, start:stop]).T, x)
        parts_A = grad_E.new_empty(tiles_o, rank, width) if small else None
        parts_B = grad_E.new_empty(tiles_i, stop - start, rank) if small else None
        parts_tau = grad_E.new_empty(tiles_o, tiles_i) if tau_factor else None
        _launch(
            "gate_grad", (tiles_o, tiles_i, 1), x,
            grad_E, None, None, a, b, tau, mix, free, parts_A, parts_B, parts_tau,
            start, stop, out_features, width, scaling, half_bandwidth, R=rank, K=1, **(OF_A_LAYER if small else {}),
        )  # fmt: skip
        sizes = a.numel(), (stop - start) * rank
        if not small:
            left, right = b[start:stop].float(), a.float()
            grad_A = torch.mm(left.T, grad_E, out=grad_A) if start == 0 else grad_A.addmm_(left.T, grad_E)
            torch.mm(grad_E, right.T, out=grad_B[start:stop])
            if tau_factor:
                part = parts_tau.sum() * tau * tau * tau_factor
                grad_log_tau = part if start == 0 else grad_log_tau + part
            continue
        block = TILES["sum_parts"]["BLOCK"]
        _launch(
            "sum_parts", (_cdiv(sizes[0], block) + _cdiv(sizes[1], block) + 1,), x,
            parts_A, parts_B, parts_tau, tau, grad_A, grad_B if whole else grad_B[start:stop], grad_log_tau,
            tiles_o, tiles_i, *sizes, tau_factor, ADD=start > 0,
        )  # fmt: skip
    return grad_A.to(A.dtype), grad_B.to(B.dtype), grad_log_tau


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and returned in float32."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda and _FLOAT32_RESULT:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # exact, and slow on a GPU: torch below 2.8, or ROCm


# ---- how a kernel is launched --------------------------------------------------------------------------------------


def _launch(name: str, grid: tuple[int, ...], x: Tensor, *arguments, **constants) -> None:
    """Run a kernel on the device of x."""
    # AMD's compiler has no tf32, and its float32 products use matrix units anyway.
    exact = INTERPRETED or torch.version.hip is not None
    if name != "sum_parts":
        constants |= {"RC": RANK_CHUNK, "GATE_PRECISION": "ieee" if exact else "tf32x3"}
    if name in ("gate_grad", "penalty"):
        # The gradient of the layer is as exact as float32; the penalty's products need not be.
        thin = name == "penalty" or arguments[0] is None
        constants["PRECISION"] = "ieee" if exact else "tf32" if thin else "tf32x3"
    kernel, constants = getattr(kernels, f"{name}_kernel"), TILES[name] | constants
    if INTERPRETED or x.device.index == torch.cuda.current_device():
        kernel[grid](*arguments, **constants)
        return
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[grid](*arguments, **constants)


def _cdiv(size: int, tile: int) -> int:
    """Tiles that cover a size. Triton's own function of this name costs as much as a launch."""
    return -(-size // tile)


def _row_blocks(rows: int, width: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks of rows of about BLOCK_ENTRIES entries; starts are multiples of 128, the largest tile."""
    size = max(128, BLOCK_ENTRIES // width // 128 * 128)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _check_shapes(x: Tensor, weight: Tensor | None, A: Tensor, B: Tensor, free: Tensor | None) -> None:
    """A kernel given wrong shapes reads out of bounds and says nothing."""
    shape = (B.shape[0], A.shape[1])
    if x.dim() != 2 or x.shape[1] != shape[1] or A.shape[0] != B.shape[1]:
        raise ValueError(f"x {tuple(x.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)} do not fit together")
    if weight is not None and weight.shape != shape:
        raise ValueError(f"weight is {tuple(weight.shape)}, B A is {shape}")
    size = (shape[0] * shape[1] + 7) // 8
    if free is not None and (free.dtype != torch.uint8 or free.numel() != size or not free.is_contiguous()):
        raise ValueError(f"free must be {size} contiguous bytes (uint8), got {tuple(free.shape)} {free.dtype}")


def _check_added(total: Tensor, shape: tuple[int, ...]) -> None:
    if total.shape != shape or not total.is_contiguous():
        raise ValueError(f"add_to is not contiguous and {shape}: got {tuple(total.shape)}")
