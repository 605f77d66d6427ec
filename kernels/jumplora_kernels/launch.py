"""Launches the kernels: plain functions on tensors, no autograd."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends import backends
from triton.runtime.interpreter import InterpretedFunction

from . import kernels


# Launch options by kernel: the first where nothing is tuned, the fastest of all where a driver is active. BO and BI of
# `grad_params` and `grad_rows` are the same in all, because the launcher has to know how many partial sums there are.
# All pass the offline compile check (tests/kernels/compile_check.py prints registers, spills and shared memory for
# sm_80, sm_89, sm_90, sm_100 and gfx942): none spills. Which one is fast nobody has measured.
TILES: dict[str, list[dict[str, int]]] = {
    "forward": [
        {"BT": 128, "BO": 128, "BI": 32, "num_warps": 8, "num_stages": 3},
        {"BT": 64, "BO": 64, "BI": 32, "num_warps": 4, "num_stages": 3},
        {"BT": 16, "BO": 32, "BI": 64, "num_warps": 4, "num_stages": 3},
    ],
    "grad_x": [
        {"BT": 128, "BO": 32, "BI": 64, "num_warps": 8, "num_stages": 2},
        {"BT": 64, "BO": 32, "BI": 64, "num_warps": 4, "num_stages": 3},
        {"BT": 16, "BO": 64, "BI": 64, "num_warps": 4, "num_stages": 3},
    ],
    "grad_params": [
        {"BT": 32, "BO": 64, "BI": 64, "num_warps": 8, "num_stages": 3},
        {"BT": 64, "BO": 64, "BI": 64, "num_warps": 8, "num_stages": 3},
    ],
    "weight_rows": [
        {"BO": 64, "BI": 64, "num_warps": 4, "num_stages": 2},
        {"BO": 64, "BI": 64, "num_warps": 8, "num_stages": 2},
    ],
    "grad_rows": [
        {"BT": 32, "BO": 64, "BI": 64, "num_warps": 8, "num_stages": 3},
        {"BT": 64, "BO": 64, "BI": 64, "num_warps": 8, "num_stages": 3},
    ],
}

# Where the tiles' recomputation of D, 3 * 2 * out * in * rank operations of tensor cores every BT tokens, costs about
# as much as writing and reading the weight once (derived from an A100's figures, not measured). A product of float32
# tiles would not use tensor cores: there, the library's is better.
TILE_RANK = 16
TILE_TOKENS = 1024
RANK_CHUNK = 16  # ranks of one product in the gate
# Rows of the weight, of dL/dD or of partial sums that are in memory at a time.
WORKSPACE_BYTES = 16 << 20

# Triton decides at decoration, so this and not the environment says how the kernels of this module run.
INTERPRETED = isinstance(kernels.forward_kernel, InterpretedFunction)


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
    log_tau: Tensor,
    mix: float | Tensor,
    *,
    scaling: float,
    free: Tensor | None = None,
    add_to: Tensor | None = None,
    tiles: bool | None = None,
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
        add_to: [tokens, out], row-major, in the dtype of x: the result is added to it, in place. The additive form, for
            bases that cannot be read or would lose small updates: `add_to=base(x), weight=None`.
        tiles: True makes the weight inside the product, False rows of it before; None: by rank, tokens and dtype.

    Returns:
        y: [tokens, out] in the dtype of x.
    """
    out_features, in_features = B.shape[0], A.shape[1]
    _check_shapes(x, weight, A, B, free)
    if add_to is not None and (add_to.shape != (x.shape[0], out_features) or not add_to.is_contiguous()):
        raise ValueError(f"add_to is not contiguous and {(x.shape[0], out_features)}: got {tuple(add_to.shape)}")
    y = x.new_empty(x.shape[0], out_features) if add_to is None else add_to
    x, gate = x.contiguous(), _gate(A, B, log_tau, mix)
    if not _by_tiles(x, A, tiles):
        for start, stop, rows in _weight_rows(x, weight, gate, free, scaling):
            target = y[:, start:stop]
            torch.mm(x, rows.T, out=target) if add_to is None else target.addmm_(x, rows.T)
        return y if bias is None else y.add_(bias)
    _launch(
        "forward", lambda tile: (triton.cdiv(x.shape[0], tile["BT"]), triton.cdiv(out_features, tile["BO"])), x, A,
        x, weight, bias, *gate, free, y,
        x.shape[0], _token_class(x), out_features, in_features, *_strides(weight), scaling,
        ADD=add_to is not None, UPCAST=INTERPRETED,
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
    add_to: Tensor | None = None,
    tiles: bool | None = None,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of `forward`, the same bits for the same inputs (two-pass sums, no atomics).

    Args:
        grad_y: [tokens, out].
        bandwidth: width of the window around tau in which an entry has a say in the gradient of tau.
        threshold_grad: "mean" divides the gradient of tau by out * in, "sum" does not.
        needs_x: False skips grad_x.
        add_to: [tokens, in]: grad_x is added to it, in place (the additive form: `add_to=grad_y @ W, weight=None`).
        others: as in `forward`.

    Returns:
        grad_x [tokens, in] (None without `needs_x`), grad_A [rank, in], grad_B [out, rank] in the dtypes of what they
        belong to, and grad_log_tau [1] in float32.
    """
    if threshold_grad not in ("mean", "sum"):
        raise ValueError(f"threshold_grad is {threshold_grad!r}, not 'mean' or 'sum'")
    _check_shapes(x, weight, A, B, free)
    out_features, in_features = B.shape[0], A.shape[1]
    # Autograd hands over expanded gradients (of y.sum()); the kernels read rows.
    grad_y, x, gate = grad_y.contiguous(), x.contiguous(), _gate(A, B, log_tau, mix)
    if add_to is not None and (add_to.shape != x.shape or not add_to.is_contiguous()):
        raise ValueError(f"add_to is not contiguous and {tuple(x.shape)}: got {tuple(add_to.shape)}")
    by_tiles = _by_tiles(x, A, tiles)
    grad_x = None
    if needs_x and by_tiles:
        grad_x = torch.empty_like(x) if add_to is None else add_to
        _launch(
            "grad_x", lambda tile: (triton.cdiv(x.shape[0], tile["BT"]), triton.cdiv(in_features, tile["BI"])), x, A,
            grad_y, weight, *gate, free, grad_x,
            x.shape[0], _token_class(x), out_features, in_features, *_strides(weight), scaling,
            ADD=add_to is not None, UPCAST=INTERPRETED,
        )  # fmt: skip
    elif needs_x:
        grad_x = torch.zeros_like(x) if add_to is None else add_to
        for start, stop, rows in _weight_rows(x, weight, gate, free, scaling):
            grad_x.addmm_(grad_y[:, start:stop], rows)
    gradients = _grad_params_by_tiles if by_tiles else _grad_params_by_rows
    grad_A, grad_B, tau_sum = gradients(grad_y, x, gate, free, scaling, 0.5 * bandwidth)
    tau = gate[2]
    # One tau for the chain rule of tau = exp(log_tau), one from the derivative of the gate.
    grad_log_tau = -tau * tau / bandwidth * tau_sum
    if threshold_grad == "mean":
        grad_log_tau = grad_log_tau / (out_features * in_features)
    return grad_x, grad_A.to(A.dtype), grad_B.to(B.dtype), grad_log_tau


def _weight_rows(x, weight, gate, free, scaling) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, rows start..stop of W + s E in the dtype of x); the rows are in one buffer, used again."""
    A, B = gate[:2]
    width = A.shape[1]
    blocks = _row_blocks(B.shape[0], width * x.element_size())
    buffer = x.new_empty(blocks[0][1], width)
    for start, stop in blocks:
        rows = buffer[: stop - start]
        _launch(
            "weight_rows", _tile_grid(stop - start, width), x, A,
            weight, *gate, free, rows, start, stop, width, *_strides(weight), scaling,
        )  # fmt: skip
        yield start, stop, rows


def _grad_params_by_tiles(grad_y, x, gate, free, scaling, half_bandwidth) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_A, grad_B, the sum in tau's gradient): partial sums of tiles, then one sum over each block's."""
    A, B = gate[:2]
    (rank, width), out_features = A.shape, B.shape[0]
    tile_o, tile_i = (TILES["grad_params"][0][side] for side in ("BO", "BI"))
    tiles_i = triton.cdiv(width, tile_i)
    grad_A, grad_B = (torch.zeros_like(t, dtype=torch.float32) for t in (A, B))
    tau_sum = x.new_zeros((), dtype=torch.float32)
    bytes_per_row = 4 * rank * (triton.cdiv(width, tile_o) + tiles_i)
    for start, stop in _row_blocks(out_features, bytes_per_row):
        tiles_o = triton.cdiv(stop - start, tile_o)
        partial_A = grad_A.new_empty(tiles_o, rank, width)
        partial_B = grad_A.new_empty(tiles_i, stop - start, rank)
        partial_tau = grad_A.new_empty(tiles_o, tiles_i)
        _launch(
            "grad_params", (tiles_o, tiles_i), x, A,
            x, grad_y, *gate, free, partial_A, partial_B, partial_tau,
            x.shape[0], _token_class(x), start, stop, out_features, width, scaling, half_bandwidth,
            UPCAST=INTERPRETED,
        )  # fmt: skip
        grad_A += partial_A.sum(0)
        torch.sum(partial_B, 0, out=grad_B[start:stop])
        tau_sum += partial_tau.sum()
    return grad_A, grad_B, tau_sum


def _grad_params_by_rows(grad_y, x, gate, free, scaling, half_bandwidth) -> tuple[Tensor, Tensor, Tensor]:
    """As by tiles, from rows of dL/dD: grad_A sums B^T dL/dD over the blocks of rows, grad_B is dL/dD A^T."""
    A, B = (factor.float() for factor in gate[:2])
    width, out_features = A.shape[1], B.shape[0]
    grad_A, grad_B, tau_sum = torch.zeros_like(A), torch.empty_like(B), A.new_zeros(())
    blocks = _row_blocks(out_features, 4 * width)
    buffer = A.new_empty(blocks[0][1], width)
    wide = x.dtype == torch.float32  # the library's product; of narrower types it would round the gradient
    tile_o, tile_i = (TILES["grad_rows"][0][side] for side in ("BO", "BI"))
    for start, stop in blocks:
        rows = buffer[: stop - start]
        if wide:
            torch.mm(grad_y[:, start:stop].T, x, out=rows)
        grid = (triton.cdiv(stop - start, tile_o), triton.cdiv(width, tile_i))
        partial_tau = A.new_empty(grid)
        _launch(
            "grad_rows", grid, x, A,
            None if wide else x, None if wide else grad_y, *gate, free, rows, partial_tau,
            x.shape[0], _token_class(x), start, stop, out_features, width, scaling, half_bandwidth,
            UPCAST=INTERPRETED,
        )  # fmt: skip
        grad_A.addmm_(B[start:stop].T, rows)
        torch.mm(rows, A.T, out=grad_B[start:stop])
        tau_sum += partial_tau.sum()
    return grad_A, grad_B, tau_sum


# ---- how a kernel is launched --------------------------------------------------------------------------------------


def _launch(name: str, grid, x: Tensor, A: Tensor, *arguments, **constants) -> None:
    """Run a kernel on the device of x, with the tile that is fastest there, or the first."""
    rank = A.shape[0]
    # AMD's compiler has no tf32x3, and its float32 products use matrix units anyway.
    precision = "ieee" if INTERPRETED or torch.version.hip else "tf32x3"
    constants |= {"R": rank, "RC": RANK_CHUNK, "GATE_PRECISION": precision}
    # The fastest tile is another one from machine to machine, and with it the order of sums.
    tuned = not INTERPRETED and not torch.are_deterministic_algorithms_enabled()
    kernel = _tuned(name) if tuned else getattr(kernels, f"{name}_kernel")
    tile = {} if tuned else TILES[name][0]
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be that of x
        kernel[grid](*arguments, **constants, **tile)


@functools.cache
def _tuned(name: str) -> Any:
    """The kernel with Triton's autotuner around it, which needs a driver; it keeps its timings in Triton's cache."""
    kernel = getattr(kernels, f"{name}_kernel")
    options = ("num_warps", "num_stages")
    configs = [
        triton.Config(
            {side: size for side, size in tile.items() if side not in options},
            **{option: tile[option] for option in options},
        )
        for tile in TILES[name]
    ]
    key = [argument for argument in ("T_CLASS", "OUT", "IN", "R") if argument in kernel.arg_names]
    # These are read and written: each trial must start from the same values.
    restored = [argument for argument in ("y_ptr", "dx_ptr", "dd_ptr") if argument in kernel.arg_names]
    return triton.autotune(configs, key=key, restore_value=restored, cache_results=True)(kernel)


def _by_tiles(x: Tensor, A: Tensor, tiles: bool | None) -> bool:
    if tiles is not None:
        return tiles
    return A.shape[0] <= TILE_RANK and x.shape[0] <= TILE_TOKENS and x.element_size() == 2


def _token_class(x: Tensor) -> int:
    """Batches that share a tuned tile: the tokens, rounded up to a power of 2."""
    return min(triton.next_power_of_2(max(x.shape[0], 16)), 4096)


def _tile_grid(rows: int, columns: int):
    return lambda tile: (triton.cdiv(rows, tile["BO"]), triton.cdiv(columns, tile["BI"]))


def _row_blocks(rows: int, bytes_per_row: int) -> list[tuple[int, int]]:
    """(start, stop) of blocks of rows whose bytes fit the workspace; starts are multiples of 128, the largest tile."""
    size = max(128, WORKSPACE_BYTES // bytes_per_row // 128 * 128)
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _gate(A: Tensor, B: Tensor, log_tau: Tensor, mix: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A and B row-major, tau [1] and f [1] in float32."""
    # torch.exp and not the kernel's: Triton's is approximate, and one ulp of tau can move an entry out of the support.
    tau = log_tau.detach().float().exp().reshape(1)
    if not isinstance(mix, Tensor):
        mix = torch.full((1,), mix, device=tau.device)
    return A.contiguous(), B.contiguous(), tau, mix.to(tau.device, torch.float32, non_blocking=True)


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
