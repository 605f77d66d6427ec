"""Launches the kernels: plain functions on tensors, no autograd."""

from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.runtime.interpreter import InterpretedFunction

from . import kernels


# Tile and launch options by kernel and bytes per element of x. Chosen by the offline compile check
# (tests/kernels/compile_check.py prints registers, spills and shared memory for sm_80, sm_90, sm_100 and gfx942): none
# spills there. Not tuned for time. Float32 products hold their operands in registers, hence the shorter loop steps.
TILES: dict[tuple[str, int], dict[str, int]] = {
    ("forward", 2): {"BT": 128, "BO": 128, "BI": 32, "num_warps": 8, "num_stages": 3},
    ("forward", 4): {"BT": 64, "BO": 64, "BI": 16, "num_warps": 8, "num_stages": 2},
    ("grad_x", 2): {"BT": 128, "BO": 32, "BI": 64, "num_warps": 8, "num_stages": 3},
    ("grad_x", 4): {"BT": 64, "BO": 16, "BI": 128, "num_warps": 8, "num_stages": 2},
    ("grad_params", 2): {"BT": 32, "BO": 64, "BI": 64, "num_warps": 8, "num_stages": 2},
    ("grad_params", 4): {"BT": 32, "BO": 64, "BI": 64, "num_warps": 8, "num_stages": 2},
}

# Triton decides at decoration, so this and not the environment says how the kernels of this module run.
INTERPRETED = isinstance(kernels.forward_kernel, InterpretedFunction)


def is_available() -> bool:
    """True where the kernels can run: a GPU driver is active, or the Triton interpreter is on."""
    return INTERPRETED or any(backend.driver.is_active() for backend in backends.values())


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    log_tau: Tensor,
    mix: float | Tensor,
    *,
    scaling: float,
    free: Tensor | None = None,
) -> Tensor:
    """y = x (W + s E)^T + bias with E = ((1 - f) D + f D 1[|D| > tau]) * free, D = B A and tau = exp(log_tau).

    Args:
        x: [tokens, in], float32, bfloat16 or float16.
        weight: [out, in] with any strides, or None for the low-rank part alone (s x E^T). W + s E is rounded to the
            dtype of x before the product.
        bias: [out] or None.
        A: [rank, in].
        B: [out, rank].
        log_tau: one element.
        mix: f in [0, 1]; a number, or one element on the device of x (the kernel reads it, nothing synchronises).
        scaling: s.
        free: support limit, uint8 [ceil(out * in / 8)] or None. Entry e = o * in + i is bit e % 8 (lowest first) of
            byte e // 8; 1 = the entry may be used.

    Returns:
        y: [tokens, out] in the dtype of x.
    """
    out_features, in_features = B.shape[0], A.shape[1]
    _check_shapes(x, weight, A, B, free)
    y = x.new_empty(x.shape[0], out_features)
    options = _options("forward", x, rank=A.shape[0])
    grid = (triton.cdiv(x.shape[0], options["BT"]), triton.cdiv(out_features, options["BO"]))
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of x
        kernels.forward_kernel[grid](
            x.contiguous(), weight, bias, *_gate(A, B, log_tau, mix), free, y,
            x.shape[0], out_features, in_features, *_strides(weight), scaling, **options,
        )  # fmt: skip
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    A: Tensor,
    B: Tensor,
    log_tau: Tensor,
    mix: float | Tensor,
    *,
    scaling: float,
    bandwidth: float,
    threshold_grad: str,
    free: Tensor | None = None,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of `forward`, the same bits for the same inputs (two-pass sums, no atomics).

    Args:
        grad_y: [tokens, out].
        bandwidth: width of the window around tau in which an entry has a say in the gradient of tau.
        threshold_grad: "mean" divides the gradient of tau by out * in, "sum" does not.
        needs_x: False skips grad_x.
        others: as in `forward`.

    Returns:
        grad_x [tokens, in] (None without `needs_x`), grad_A [rank, in], grad_B [out, rank] in the dtypes of what they
        belong to, and grad_log_tau [1] in float32.
    """
    if threshold_grad not in ("mean", "sum"):
        raise ValueError(f"threshold_grad is {threshold_grad!r}, not 'mean' or 'sum'")
    _check_shapes(x, weight, A, B, free)
    tokens, in_features = x.shape
    out_features, rank = B.shape
    # Autograd hands over expanded gradients (of y.sum()); the kernels read rows.
    grad_y, x = grad_y.contiguous(), x.contiguous()
    gate = _gate(A, B, log_tau, mix)
    grad_x = torch.empty_like(x) if needs_x else None

    with torch.cuda.device_of(x):
        if grad_x is not None:
            options = _options("grad_x", x, rank)
            grid = (triton.cdiv(tokens, options["BT"]), triton.cdiv(in_features, options["BI"]))
            kernels.grad_x_kernel[grid](
                grad_y, weight, *gate, free, grad_x,
                tokens, out_features, in_features, *_strides(weight), scaling, **options,
            )  # fmt: skip

        options = _options("grad_params", x, rank)
        tiles_o, tiles_i = triton.cdiv(out_features, options["BO"]), triton.cdiv(in_features, options["BI"])
        partial_A = x.new_empty(tiles_o, rank, in_features, dtype=torch.float32)
        partial_B = x.new_empty(tiles_i, out_features, rank, dtype=torch.float32)
        partial_tau = x.new_empty(tiles_o, tiles_i, dtype=torch.float32)
        kernels.grad_params_kernel[(tiles_o, tiles_i)](
            x, grad_y, *gate, free, partial_A, partial_B, partial_tau,
            tokens, out_features, in_features, scaling, 0.5 * bandwidth, **options,
        )  # fmt: skip

    tau = gate[2]
    # One tau for the chain rule of tau = exp(log_tau), one from the derivative of the gate.
    grad_log_tau = -tau * tau / bandwidth * partial_tau.sum()
    if threshold_grad == "mean":
        grad_log_tau = grad_log_tau / (out_features * in_features)
    return grad_x, partial_A.sum(0).to(A.dtype), partial_B.sum(0).to(B.dtype), grad_log_tau


def _gate(A: Tensor, B: Tensor, log_tau: Tensor, mix: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A and B row-major, tau [1] and f [1] in float32."""
    # torch.exp and not the kernel's: Triton's is approximate, and one ulp of tau can move an entry out of the support.
    tau = log_tau.detach().float().exp().reshape(1)
    if not isinstance(mix, Tensor):
        mix = torch.full((1,), mix, device=tau.device)
    return A.contiguous(), B.contiguous(), tau, mix.to(tau.device, torch.float32, non_blocking=True)


def _options(kernel: str, x: Tensor, rank: int) -> dict[str, Any]:
    """Launch options and compile-time constants. Only products with x obey PyTorch's float32 matmul precision."""
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on the old switch raises where a program has used the new one.
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    # Asking AMD's compiler for tf32 is an error on most targets, even where no operand is float32.
    tf32 = tf32 and torch.version.hip is None
    tile = TILES[kernel, x.element_size()]
    return {**tile, "R": rank, "PRECISION": "tf32" if tf32 else "ieee", "UPCAST": INTERPRETED}


def _strides(weight: Tensor | None) -> tuple[int, int]:
    return (0, 0) if weight is None else (weight.stride(0), weight.stride(1))


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
