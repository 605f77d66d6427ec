"""The exact k-th magnitude over the updates of many layers, in bounded memory."""

from collections.abc import Callable, Iterable

import torch

from .sparse import unpack_bits


_INFINITY = 0x7F800000  # its bits; those of NaN are larger


def kth_magnitude(blocks: Callable[[], Iterable[torch.Tensor]], k: int) -> float:
    """The k-th smallest absolute value (k counts from 1) over all entries of all blocks; exact, ties included.

    Args:
        blocks: called twice; each call iterates over the same float32 tensors of any shape, one at a time.
        k: 1 <= k <= number of entries.

    The bits of non-negative floats, read as integers, are ordered like the floats: one pass counts the upper 16 bits,
    a second the lower 15 bits of the entries that share the k-th entry's upper bits. Memory: one block and 2^16 counts.

    Raises:
        ValueError: k is out of range, or an entry is not finite.
    """
    if k < 1:
        raise ValueError(f"k counts from 1, got {k}")
    prefix, shift = 0, 31
    for bits in (16, 15):
        shift -= bits
        counts = torch.zeros(1 << bits, dtype=torch.int64)
        for block in blocks():
            keys = block.detach().to(torch.float32).abs().contiguous().view(torch.int32).view(-1)
            if shift + bits < 31:
                keys = keys[(keys >> (shift + bits)) == prefix]
            counts += torch.bincount((keys >> shift) & ((1 << bits) - 1), minlength=1 << bits).cpu()
        if bits == 16 and counts[_INFINITY >> shift :].any():
            raise ValueError("the updates hold entries that are not finite; the training has diverged")
        total = counts.cumsum(0)
        if k > int(total[-1]):
            raise ValueError(f"k = {k} of {int(total[-1])} entries")
        bin_ = int(torch.searchsorted(total, k))
        k -= int(total[bin_ - 1]) if bin_ else 0
        prefix = (prefix << bits) | bin_
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32).item()


def update_blocks(factors: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], rows: int = 1024):
    """Row blocks of D = B A, one after the other, for layers given as (A [r, in], B [out, r], free).

    free: packed bits of the entries the layer may use, or None for all; the others are zero in the blocks.
    """
    for A, B, free in factors:
        for start in range(0, B.shape[0], rows):
            with torch.autocast(A.device.type, enabled=False):
                block = B[start : start + rows].detach() @ A.detach()
            if free is not None:
                width = A.shape[1]
                block *= unpack_bits(free, start * width, (start + block.shape[0]) * width).view_as(block)
            yield block
