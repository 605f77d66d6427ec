"""The one public entry to the arithmetic: picks a backend and brings the arguments into its form."""

import functools
import importlib.util
import logging
import os

import torch

from .blocked import gated_linear_blocked
from .fused import gated_linear_fused, low_rank_linear
from .naive import gated_linear_naive
from .sparse import pack_bits, unpack_bits


logger = logging.getLogger(__name__)

BACKENDS = ("naive", "blocked", "triton", "triton-fold")
BACKEND_VARIABLE = "HF_JUMPLORA_BACKEND"
_logged: set[tuple[str, str]] = set()


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
        mix: f in [0, 1], a number or a one-element tensor (no recompilation under torch.compile when it changes). The
            number 0 is plain LoRA, and costs what LoRA costs on a GPU too.
        bandwidth: width of the rectangle around +-tau that gives the threshold a gradient.
        threshold_grad: "mean" divides that gradient by out * in (published code), "sum" does not.
        free: [out, in] of {0, 1}, or packed by [`ops.sparse.pack_bits`]; entries with 0 stay out of the update.
        backend: "naive", "blocked", "triton" (needs the extra and a GPU) or "triton-fold"
            (folds the update into half-precision base weights too; `ops/fused.py` says what that loses). None: what
            the environment variable HF_JUMPLORA_BACKEND says, else triton where it can run, else blocked.

    Returns:
        [..., out] in the dtype of x.

    Raises:
        ValueError: unknown backend or threshold_grad, shapes that do not fit, or triton asked for where it cannot run.
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
    dtypes = tuple(t.dtype for t in (x, A, B, weight) if t is not None)
    backend = choose_backend(backend, x.device, dtypes)
    if backend == "naive":
        if free is not None and free.dim() == 1:
            free = unpack_bits(free, 0, B.shape[0] * A.shape[1]).view(B.shape[0], A.shape[1])
        with torch.autocast(x.device.type, enabled=False):  # D and its support stay in the dtype of A and B
            weight = weight if weight is None else weight.to(x.dtype)
            return gated_linear_naive(x, weight, bias, A, B, log_tau, mix=mix, free=free, **options)
    if free is not None and free.dim() == 2:
        free = pack_bits(free)
    if backend == "blocked":
        if not isinstance(mix, torch.Tensor):
            mix = torch.tensor([mix], dtype=torch.float32)
        return gated_linear_blocked(x, weight, bias, A, B, log_tau, mix=mix, free=free, **options)
    if not isinstance(mix, torch.Tensor):
        if mix == 0 and free is None:
            return low_rank_linear(x, weight, bias, A, B, log_tau, scaling)
        # filled there: nothing is copied, nothing waits
        mix = torch.full((1,), mix, dtype=torch.float32, device=x.device)
    if mix.device != x.device or mix.dtype != torch.float32 or mix.dim() != 1:
        mix = mix.to(x.device, torch.float32, non_blocking=True).reshape(1)
    fold = backend == "triton-fold"
    return gated_linear_fused(x, weight, bias, A, B, log_tau, mix=mix, free=free, fold=fold, **options)


# Once a graph under torch.compile: neither the environment nor the device changes under it.
@torch.compiler.assume_constant_result
def choose_backend(backend: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    """The argument, else the environment, else the fastest backend that can run; said in the log once."""
    return _choose(backend, os.environ.get(BACKEND_VARIABLE) or None, device, dtypes)


@functools.lru_cache(maxsize=64)  # asked by every layer in every pass
def _choose(backend: str | None, environment: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
    asked, source = (backend, "backend") if backend is not None else (environment, BACKEND_VARIABLE)
    if asked is not None and asked not in BACKENDS:
        raise ValueError(f"{source} is one of {', '.join(map(repr, BACKENDS))}; got {asked!r}")
    if asked is None and device.type == "cpu":
        asked, source = "blocked", "automatic"
    elif asked in (None, "triton", "triton-fold"):
        missing = _missing_for_triton(device, [str(dtype).removeprefix("torch.") for dtype in dtypes])
        if asked is None:
            asked, source = ("blocked" if missing else "triton"), "automatic"
        elif missing:
            raise ValueError(f"{source}={asked!r} {missing}, or use {source}='blocked'")
    if (asked, str(device)) not in _logged:
        _logged.add((asked, str(device)))
        logger.info("gated_linear on %s: %s (%s)", device, asked, source)
    return asked


def _missing_for_triton(device: torch.device, dtypes: list[str]) -> str:
    """What keeps the kernels from running, as an end of a sentence; empty when they can."""
    if set(dtypes) - {"float32", "bfloat16", "float16"}:
        return (
            f"computes in float32, bfloat16 and float16, and these are {', '.join(sorted(set(dtypes)))}: convert them"
        )
    if importlib.util.find_spec("triton") is None:
        return "needs Triton: pip install triton"
    from jumplora_kernels import is_available

    if not is_available(device):
        return (
            f"runs on an AMD GPU or an NVIDIA GPU of compute capability 8.0 or more, and x is on {device}: move the "
            "model there (or set TRITON_INTERPRET=1 before triton is imported, which is for tests)"
        )
    return ""
