"""Supports: which entries of an update are kept. Packed bits in memory, a Rice code on disk, sums over non-zeros."""

import hashlib
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary


# First byte of a code: this value means "plain bitmap", any other is the Rice parameter, plus _UNSET where the code
# lists the entries that are not set (more than half are).
_RAW, _UNSET = 255, 128
_HEADER = 9  # one byte kind + int64 number of listed entries (of a bitmap: set ones)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean tensor of n entries into uint8 [ceil(n / 8)], least significant bit first."""
    bits = mask.reshape(-1).to(torch.uint8)
    bits = torch.cat([bits, bits.new_zeros(-bits.numel() % 8)]).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Entries start..stop (flat indices) of a packed mask: bool [stop - start]."""
    first = start // 8
    part = packed[first : (stop + 7) // 8]
    bits = (part[:, None] >> torch.arange(8, dtype=torch.uint8, device=part.device)) & 1
    return bits.view(-1)[start - 8 * first : stop - 8 * first].bool()


def _pack_fields(values: torch.Tensor, width: int) -> torch.Tensor:
    """The lowest `width` bits of each int64 value, one after the other."""
    return pack_bits((values[:, None] >> torch.arange(width, device=values.device)) & 1)


def encode_support(mask: torch.Tensor) -> torch.Tensor:
    """Code a support, bool [out, in], as uint8 [bytes] on the CPU.

    As the gaps between set entries in a Rice code, or as the bitmap: the smaller of the two is taken; where more than
    half are set, the gaps are those between the others. Computed on the device of the mask. A Rice code of
    parameter k writes gap >> k in unary and the low k bits as they are; the two streams stand one after the other so
    that both directions are a few vector operations. For independent entries it is within a few percent of the entropy.
    """
    flat = mask.reshape(-1)
    unset = 2 * int(flat.sum()) > flat.numel()
    index = (~flat if unset else flat).nonzero().view(-1)
    count = index.numel()
    density = count / mask.numel()
    k = max(0, round(math.log2(math.log(2) / density))) if 0 < density < 1 else 0
    gaps = torch.diff(index, prepend=index.new_tensor([-1])) - 1
    unary_ends = (gaps >> k).cumsum(0) + torch.arange(count, device=index.device)
    unary_length = int(unary_ends[-1]) + 1 if count else 0
    if (unary_length + 7) // 8 + (count * k + 7) // 8 < (mask.numel() + 7) // 8:
        unary = torch.zeros(unary_length, dtype=torch.bool, device=index.device)
        unary[unary_ends] = True
        kind, body = k + _UNSET * unset, torch.cat([pack_bits(unary), _pack_fields(gaps, k)])
    else:
        kind, body, count = _RAW, pack_bits(mask), int(flat.sum())
    header = torch.tensor([kind, *count.to_bytes(8, "little")], dtype=torch.uint8)
    return torch.cat([header, body.cpu()])


def decode_support(code: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """The inverse of [`encode_support`]: bool [out, in] on the CPU.

    Raises:
        ValueError: the bytes are not a support of this shape.
    """
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[decode_index(code, shape)] = True
    return mask.view(shape)


def decode_index(code: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Where a coded support is set: ascending flat indices, int64 [kept] on the CPU.

    Raises:
        ValueError: the bytes are not a support of this shape.
    """
    numel, content = math.prod(shape), code.cpu().numpy()  # NumPy unpacks bits at several times torch's speed
    broken = ValueError(f"the {content.size} bytes of this support are not a support of shape {tuple(shape)}")
    if content.size < _HEADER:
        raise broken
    kind, count, body = int(content[0]), int.from_bytes(content[1:_HEADER].tobytes(), "little"), content[_HEADER:]
    if count > numel:
        raise broken
    if kind == _RAW:
        if body.size != (numel + 7) // 8:
            raise broken
        return torch.from_numpy(_set_bits(body, numel))
    unset, kind = kind >= _UNSET, kind % _UNSET
    split = body.size - (count * kind + 7) // 8
    if kind > 52 or split < 0:
        raise broken
    ends, order = _set_bits(body[:split]), np.arange(count)
    if ends.size != count:
        raise broken
    fields = np.unpackbits(body[split:], count=count * kind, bitorder="little").reshape(count, kind)
    wide = np.float32 if kind <= 24 else np.float64  # exact up to 2^24 and 2^53; NumPy multiplies integers slowly
    powers: np.ndarray = 2 ** np.arange(kind, dtype=wide)
    with np.errstate(invalid="ignore"):  # OpenBLAS raises the flag now and then over lanes that it does not use
        index = (fields.astype(wide) @ powers).astype(np.int64).cumsum()
    ends -= order
    ends <<= kind
    index += ends
    index += order  # sums of (low part, unary part, 1) of the gaps
    if count and (int(index.min()) < 0 or int(index.max()) >= numel):  # negative: the sum has overflowed
        raise broken
    if not unset:
        return torch.from_numpy(index)
    kept = np.ones(numel, dtype=bool)
    kept[index] = False
    return torch.from_numpy(np.flatnonzero(kept))


# Code on a GPU -> (its version, the packed bits). A task that has just ended is decoded several times, for its density,
# to be merged and to be folded, and on the host a layer of 4096 x 4096 takes a tenth of a second.
_known_bits = WeakTensorKeyDictionary()


def remember_support(code: torch.Tensor, mask: torch.Tensor) -> None:
    """Keep the bits of `mask` beside the code that was just made of it, as long as there is the code, on a GPU."""
    if code.device.type != "cpu":
        _known_bits[code] = code._version, pack_bits(mask)


def support_index(code: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """As [`decode_index`]; of a code that [`remember_support`] knows, on its device."""
    version, bits = _known_bits.get(code, (None, None))
    if bits is None or version != code._version:
        return decode_index(code, shape)
    return unpack_bits(bits, 0, math.prod(shape)).nonzero().view(-1)


def _set_bits(packed: np.ndarray, count: int | None = None) -> np.ndarray:
    """Positions, int64 [ones], of the ones among the first `count` bits of uint8 [bytes]."""
    return np.flatnonzero(np.unpackbits(packed, count=count, bitorder="little").view(bool))


def add_at(total: torch.Tensor, product: torch.Tensor, index: torch.Tensor, scaling: float) -> None:
    """total += scaling * product at flat indices [n] alone; `total`, contiguous, may be on another device."""
    values = product.view(-1).index_select(0, index.to(product.device)).mul_(scaling)
    total.view(-1).index_add_(0, index.to(total.device), values.to(total.device))


def support_sha256(code: torch.Tensor) -> str:
    """Hex sha256 of the bytes of a coded support."""
    return hashlib.sha256(code.detach().cpu().numpy().tobytes()).hexdigest()


def to_csr(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(crow, col, values) of the non-zero entries of a matrix [out, in]."""
    rows, columns = dense.nonzero(as_tuple=True)
    crow = torch.bincount(rows, minlength=dense.shape[0]).cumsum(0)
    return torch.cat([crow.new_zeros(1), crow]), columns, dense[rows, columns]


def compressed(make, rows, columns, values, shape):
    """A sparse matrix by `make` (`torch.sparse_csr_tensor`, `..._csc_tensor`), unchecked, without the beta warning."""
    with warnings.catch_warnings():  # "CSR support is in beta": two products with a dense matrix are all that is used
        warnings.filterwarnings("ignore", message="Sparse CS[RC] tensor support")
        return make(rows, columns, values, shape, check_invariants=False)


def sampled_product(left: torch.Tensor, right: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(left @ right.T) at ascending flat indices [n], for left [rows, k] and right [columns, k] contiguous: [n]."""
    rows = index // right.shape[0]
    crow = F.pad(torch.bincount(rows, minlength=left.shape[0]).cumsum(0), (1, 0))
    shape = (left.shape[0], right.shape[0])
    pattern = compressed(
        torch.sparse_csr_tensor, crow, index - rows * right.shape[0], left.new_zeros(len(index)), shape
    )
    return torch.sparse.sampled_addmm(pattern, left.contiguous(), right.T).values()


@torch.library.custom_op("hf_jumplora::sparse_linear", mutates_args=())
def sparse_linear(
    x: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, values: torch.Tensor, out_features: int
) -> torch.Tensor:
    """x [tokens, in] times the transpose of a CSR matrix S [out, in]: [tokens, out] in the dtype of `values`."""
    S = compressed(torch.sparse_csr_tensor, crow, col, values, (out_features, x.shape[1]))
    with torch.autocast(x.device.type, enabled=False):  # it would multiply in bf16, or fail where that is not there
        return (S @ x.to(values.dtype).T).T.contiguous()


@sparse_linear.register_fake
def _(x, crow, col, values, out_features):
    return x.new_empty(x.shape[0], out_features, dtype=values.dtype)


@torch.library.custom_op("hf_jumplora::sparse_linear_grad", mutates_args=())
def _sparse_linear_grad(
    grad: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, values: torch.Tensor, in_features: int
) -> torch.Tensor:
    # The CSR arrays of S are the CSC arrays of its transpose: nothing is copied.
    S_T = compressed(torch.sparse_csc_tensor, crow, col, values, (in_features, grad.shape[1]))
    return (S_T @ grad.T).T.contiguous()


@_sparse_linear_grad.register_fake
def _(grad, crow, col, values, in_features):
    return grad.new_empty(grad.shape[0], in_features)


def _setup(ctx, inputs, output):
    x, *ctx.csr, _ = inputs
    ctx.in_features, ctx.dtype = x.shape[1], x.dtype


def _backward(ctx, grad):
    grad_x = _sparse_linear_grad(grad.contiguous(), *ctx.csr, ctx.in_features).to(ctx.dtype)
    return grad_x, None, None, None, None


sparse_linear.register_autograd(_backward, setup_context=_setup)
