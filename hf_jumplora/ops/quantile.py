"""The exact k-th magnitude over the updates of many layers, in bounded memory."""

import math
from collections.abc import Callable, Iterable

import torch

from .sparse import unpack_bits


_INFINITY = 0x7F800000  # its bits; those of NaN are larger


_SAMPLE = 1 << 17  # entries of which a bracket is taken
_INSIDE = 1 << 22  # entries of a bracket that are kept: 16 MiB


def _sample(blocks) -> tuple[torch.Tensor, int]:
    """(sorted magnitudes of some entries, number of all entries)."""
    sample, count, stride = torch.empty(0, dtype=torch.float32), 0, 61
    for block in blocks():
        sample = torch.cat([sample, block.detach().to(torch.float32).reshape(-1)[::stride].abs().cpu()])
        count += block.numel()
        if len(sample) > 2 * _SAMPLE:
            sample, stride = sample[::2], 2 * stride
    return sample.sort().values, count


def _within(blocks, k: int, low: float, high: float) -> float | None:
    """The k-th magnitude in one pass if it lies in (low, high]; None where it does not, or this cannot be said."""
    count = kept = 0
    above, inside, total = torch.zeros((), dtype=torch.int64), [], torch.zeros((), dtype=torch.float32)
    for block in blocks():
        flat = block.detach().to(torch.float32).reshape(-1)
        total = total.to(flat.device) + flat.sum()
        magnitude = flat.abs()
        found = magnitude[(magnitude > low).nonzero().view(-1)]
        larger = found > high
        above = above.to(flat.device) + larger.sum()
        inside.append(found[~larger].cpu())
        count += flat.numel()
        kept += len(inside[-1])
        if kept > _INSIDE:
            return None
    rank = count - k + 1 - int(above)  # counted from the largest inside
    if not 1 <= rank <= kept or not torch.isfinite(total):
        return None
    return torch.cat(inside).kthvalue(kept - rank + 1).values.item()


def _guess(blocks, k: int, near: float | None) -> float | None:
    """The k-th magnitude by a bracket around `near` or from a sample; None where it is not among the largest 10 %."""
    if near and (value := _within(blocks, k, 0.97 * near, 1.03 * near)) is not None:
        return value
    sample, count = _sample(blocks)
    if count - k > count // 10 or k > count or len(sample) < 1000:
        return None
    share, size = k / count, len(sample)
    margin = 8 * math.sqrt(share * (1 - share) * size) + 2
    low, high = int(share * size - margin), int(share * size + margin)
    return _within(blocks, k, sample[max(low, 0)].item(), sample[high].item() if high < size else math.inf)


def kth_magnitude(
    blocks: Callable[[], Iterable[torch.Tensor]],
    k: int,
    reduce: Callable[[torch.Tensor], None] | None = None,
    near: float | None = None,
) -> float:
    """The k-th smallest absolute value (k counts from 1) over all entries of all blocks; exact, ties included.

    Args:
        blocks: called several times; each call iterates over the same float32 tensors of any shape, one at a time.
        k: 1 <= k <= number of entries.
        reduce: where every rank holds a part of the entries: sums an int64 tensor over the ranks in place, such as
            `torch.distributed.all_reduce`; k then counts the entries of all ranks, and all get the same value.
            None (replicated layers, or one process): this process holds all.
        near: a guess, such as the value of the last step: right to 3 %, it saves a pass.

    One of the largest 10 % is found by a bracket, from `near` or a sample of the entries: one pass counts the larger
    entries and collects those inside. Where it is not in the bracket, or not one of the largest, or the entries are
    spread over ranks, its bits are found: those of non-negative floats, read as integers, are ordered like the floats.
    One pass counts the upper 16 bits, a second the lower 15 bits of the entries that share the k-th entry's upper bits.
    Memory: a few blocks and 16 MiB.

    Raises:
        ValueError: k is out of range, or an entry is not finite.
    """
    if k < 1:
        raise ValueError(f"k counts from 1, got {k}")
    if reduce is None and (value := _guess(blocks, k, near)) is not None:
        return value
    prefix, shift = 0, 31
    for bits in (16, 15):
        shift -= bits
        counts = torch.zeros(1 << bits, dtype=torch.int64)
        for block in blocks():
            keys = block.detach().to(torch.float32).abs().contiguous().view(torch.int32).view(-1)
            if shift + bits < 31:
                low, high = prefix << bits, (prefix + 1) << bits  # a few entries in a thousand share the upper bits
                keys = keys[(keys >= low) & (keys < high)] - low
            counts += torch.bincount(keys >> shift, minlength=1 << bits).cpu()
        if reduce is not None:
            reduce(counts)
        if bits == 16 and counts[_INFINITY >> shift :].any():
            raise ValueError("the updates hold entries that are not finite; the training has diverged")
        total = counts.cumsum(0)
        if k > int(total[-1]):
            raise ValueError(f"k = {k} of {int(total[-1])} entries")
        bin_ = int(torch.searchsorted(total, k))
        k -= int(total[bin_ - 1]) if bin_ else 0
        prefix = (prefix << bits) | bin_
    return torch.tensor(prefix, dtype=torch.int32).view(torch.float32).item()


def update_blocks(factors: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], rows: int | None = None):
    """Row blocks of D = B A, one after the other, for layers given as (A [r, in], B [out, r], free).

    free: packed bits of the entries the layer may use, or None for all; the others are zero in the blocks.
    rows: of a block; None: 256 on a CPU, and 2^24 entries elsewhere, where each block waits for the device.
    """
    for A, B, free in factors:
        size = rows or (256 if A.device.type == "cpu" else max(1, (1 << 24) // A.shape[1]))
        for start in range(0, B.shape[0], size):
            with torch.autocast(A.device.type, enabled=False):
                block = B[start : start + size].detach() @ A.detach()
            if free is not None:
                width = A.shape[1]
                block *= unpack_bits(free, start * width, (start + block.shape[0]) * width).view_as(block)
            yield block
