"""The one public entry to the arithmetic: picks a backend and brings the arguments into its form."""

import torch

from .blocked import gated_linear_blocked
from .fused import gated_linear_fused
from .naive import gated_linear_naive
from .sparse import pack_bits, unpack_bits


def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    A: torch.Tensor,
    B: torch.Tensor,
    log_tau: torch.Tensor,
    *,
    scaling: float,
    mix: float | torch.Tensor,
    bandwidth: float = 1e-3,
    threshold_grad: str = "mean",
    free: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """y = x W^T + bias + scaling * x E^T with E = ((1 - mix) D + mix * D 1[|D| > tau]) * free, D = B A.

    Differentiable in x, A, B and log_tau (and in weight and bias, should they not be frozen). See `ops/naive.py`, which
    is the specification, and JumpLoRA (arXiv 2604.16171).

    Args:
        x: [..., in], any float dtype.
        weight: [out, in] or None for the update alone. bias: [out] or None (only with a weight).
        A, B: [r, in] and [out, r], float32 (or float64).
        log_tau: [1], same dtype; tau = exp(log_tau) is compared with the unscaled product.
        scaling: alpha / r.
        mix: f in [0, 1], a number or a one-element tensor (no recompilation under torch.compile when it changes).
        bandwidth: width of the rectangle around +-tau that gives the threshold a gradient.
        threshold_grad: "mean" divides that gradient by out * in (published code), "sum" does not.
        free: [out, in] of {0, 1}, or packed by [`ops.sparse.pack_bits`]; entries with 0 stay out of the update.
        backend: None (blocked), "naive", "blocked" or "triton" (needs the extra; not measured on a GPU yet).

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: unknown backend or threshold_grad, or shapes that do not fit.
    """
    if threshold_grad not in ("mean", "sum"):
        raise ValueError(f"threshold_grad is 'mean' or 'sum', got {threshold_grad!r}")
    if x.shape[-1] != A.shape[1] or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"x {tuple(x.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)} are not [..., in], [r, in], [out, r]"
        )
    if weight is not None and weight.shape != (B.shape[0], A.shape[1]):
        raise ValueError(f"weight {tuple(weight.shape)} is not [out, in] = {(B.shape[0], A.shape[1])}")
    if weight is None and bias is not None:
        raise ValueError("a bias needs a weight")
    if bias is not None and bias.shape != B.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} is not [out] = {(B.shape[0],)}")
    if log_tau.numel() != 1:
        raise ValueError(f"log_tau {tuple(log_tau.shape)} is not one number")
    dense, packed = (B.shape[0], A.shape[1]), ((B.shape[0] * A.shape[1] + 7) // 8,)
    if free is not None and free.shape not in (dense, packed):
        raise ValueError(f"free {tuple(free.shape)} is neither [out, in] = {dense} nor packed to {packed}")
    if not isinstance(mix, torch.Tensor) and not 0 <= mix <= 1:
        raise ValueError(f"mix is between 0 and 1, got {mix}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
    options = {"scaling": scaling, "bandwidth": bandwidth, "threshold_grad": threshold_grad}
    if backend == "naive":
        if free is not None and free.dim() == 1:
            free = unpack_bits(free, 0, B.shape[0] * A.shape[1]).view(B.shape[0], A.shape[1])
        with torch.autocast(x.device.type, enabled=False):  # D and its support stay in the dtype of A and B
            weight = weight if weight is None else weight.to(x.dtype)
            return gated_linear_naive(x, weight, bias, A, B, log_tau, mix=mix, free=free, **options)
    if backend not in (None, "blocked", "triton"):
        raise ValueError(f"backend is None, 'naive', 'blocked' or 'triton', got {backend!r}")
    if not isinstance(mix, torch.Tensor):
        mix = torch.tensor([mix], dtype=torch.float32)
    if free is not None and free.dim() == 2:
        free = pack_bits(free)
    run = gated_linear_fused if backend == "triton" else gated_linear_blocked
    return run(x, weight, bias, A, B, log_tau, mix=mix, free=free, **options)
