"""What the weights of a base are known by: a digest of all their bytes; for other dtypes and quantised weights, sums
of their values."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from accelerate.utils.modeling import align_module_device
from torch import nn

from ..tuner.sharded_parameters import full_shape, whole
from .quantised import Dequantised, dequantised


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_EPS = {str(dtype).removeprefix("torch."): torch.finfo(dtype).eps for dtype in _FLOATS}
_QUANTISED = 0.5  # in place of eps: 4 bits change a weight by a tenth of its norm
_ALIKE = {"int8": 0.1}  # of weights quantised alike, 8 bits perhaps from another dtype; others: 0.01
_BYTES = 1 << 23  # that leave a GPU at once
_SIGNS = 1 << 14
_PIECE = 1 << 18  # values that are added up at once
_SAMPLE = 32  # pieces of a weight
_PARTS = 8  # of a weight, with sums of their own


def named_tensors(base: nn.Module) -> Iterator[tuple[str, torch.Tensor | Dequantised | None]]:
    """(name, value) of every weight and saved buffer of a base without adapters; a tied one once, by its first name.

    Values are whole (see `sharded_parameters`: every process must go through all), and of offloaded weights in memory
    until the next one. None: the weight, or one beside it in its module, is quantised by another library than
    bitsandbytes.

    Raises:
        ValueError: a weight is on the meta device, and nothing knows its values.
    """
    seen: set[int] = set()
    for prefix, module in base.named_modules():
        buffers = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        own = {k: t for k, t in {**module._parameters, **buffers}.items() if t is not None and id(t) not in seen}
        seen |= {id(tensor) for tensor in own.values()}
        quantised = getattr(base, "is_quantized", False) and any(map(_quantised, own.values()))
        with align_module_device(module):
            weight = dequantised(module) if quantised else None
            for key in own:
                name, tensor = f"{prefix}.{key}".lstrip("."), getattr(module, key)
                if tensor.is_meta:
                    raise ValueError(f"{name} is on the meta device: load the base's weights first")
                yield name, weight if quantised and (key == "weight" or weight is None) else whole(tensor)


def _quantised(tensor: torch.Tensor) -> bool:
    return type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.dtype not in (*_FLOATS, torch.int64, torch.bool)


@functools.cache
def _signs(device: torch.device) -> torch.Tensor:
    """Fixed, 1 and -1, float32 [_SIGNS]."""
    words = torch.arange(1, _SIGNS + 1, device=device) * -7046029254386353131
    words = (words ^ (words >> 30)) * -4658895280553007687
    return ((words ^ (words >> 27)) >> 33 & 1).float() * 2 - 1


def digest(tensor: torch.Tensor) -> str:
    """Hex XXH3 (128 bits) of dtype, shape and bytes. It tells models apart; a file's sha256 is what tells tampering."""
    result = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    for part in as_bytes(tensor).split(_BYTES):
        result.update(part.cpu().numpy())
    return result.hexdigest()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [bytes]."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def block_sums(tensor: torch.Tensor, most: int | None = None) -> list[list[float]]:
    """[sum with fixed random signs, norm] of each of up to 8 parts of a weight, whatever its dtype. `most`: of so many
    pieces of the weight at most, evenly spread.

    The signs make the error of a cast grow as the norm does, and permuted values show.
    """
    pieces = tensor.detach().reshape(-1).split(_PIECE)
    if not tensor.numel():
        return []
    if most:
        pieces = pieces[:: -(-len(pieces) // most)]
    signs, found = _signs(tensor.device), []
    # Used again and again: fresh memory costs more than the sums.
    memory = torch.empty(_PIECE, dtype=torch.float32, device=tensor.device)
    for number, piece in enumerate(pieces):
        values = _padded(memory[: len(piece)].copy_(piece) if piece.dtype != memory.dtype else piece)
        rows = values.view(-1, _SIGNS)
        first = number * len(rows) % (_SIGNS - len(rows))
        found += [rows.mv(signs).dot(signs[first : first + len(rows)]), values.dot(values)]
    sums = torch.stack(found).view(-1, 2).double().cpu()
    parts = [[part[:, 0].sum(), part[:, 1].sum().sqrt()] for part in sums.tensor_split(min(_PARTS, len(pieces)))]
    return [[float(f"{value.nan_to_num():.6g}") for value in part] for part in parts]


def _padded(values: torch.Tensor) -> torch.Tensor:
    """With zeros behind them, up to a multiple of _SIGNS."""
    return F.pad(values, (0, -len(values) % _SIGNS)) if len(values) % _SIGNS else values


def identity(tensor: torch.Tensor | Dequantised, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a weight is known by: dtype, shape, four values, its digest, and for another dtype sums of a sample. Of
    these two only what tells it from `known`, if that is given. A quantised one, whose bits depend on the device, is
    known by sums of all its values, as every weight was by earlier versions."""
    values, kind = (tensor.values, tensor.kind) if isinstance(tensor, Dequantised) else (tensor, None)
    dtype = kind or str(values.dtype).removeprefix("torch.")
    flat = values.detach().reshape(-1)
    at = [int(place * flat.numel()) for place in (0.119, 0.381, 0.618, 0.937)] if flat.numel() else []
    probe = [float(value) for value in flat[at].double().nan_to_num()]
    entry = {"dtype": dtype, "shape": list(values.shape), "probe": probe}
    digests = not kind and (known is None or (known["dtype"] == dtype and "xxh3" in known))
    if digests:
        entry["xxh3"] = digest(values)
    if not digests or known is None:
        entry["sampled"] = block_sums(values, _SAMPLE)
    if kind or "sums" in (known or {}):
        entry["sums"] = block_sums(values)
    return entry


def same_weight(expected: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether two weights are the same: all their bytes; in another dtype their shape and the sums of a sample, up to
    six standard deviations of a cast's error (stacks of earlier versions: four values within 1 %). Weights that are
    quantised alike differ by less than 1 % of a part's norm (8 bits: 10 %)."""
    same = expected["dtype"] == found["dtype"]
    if same and "xxh3" in expected and "xxh3" in found:
        return expected["xxh3"] == found["xxh3"]
    if expected["shape"] != found["shape"]:
        return False
    both = [key for key in ("sums", "sampled") if expected.get(key) and found.get(key)]
    there, here = (expected[both[0]], found[both[0]]) if both else ((), ())
    if not both:  # four values say nothing of quantised ones
        return not hasattr(torch, found["dtype"]) or not probe_differs(expected["probe"], found["probe"])
    near = 1e-5 + 1.28 * max(_EPS.get(entry["dtype"], _QUANTISED) for entry in (expected, found))
    if same:
        near = _ALIKE.get(found["dtype"], 1e-2)
    return len(there) == len(here) and all(
        abs(a - b) <= near * max(one[1], other[1])
        for one, other in zip(there, here, strict=True)
        for a, b in zip(one, other, strict=True)
    )


# Earlier versions know a base by sixteen values of one weight.


def untouched_weight(base: nn.Module, adapted: Iterable[str]) -> str | None:
    """Name of the first weight that no adapter touches."""
    for name, weight in base.named_parameters():
        if (
            len(full_shape(weight)) > 1
            and weight.is_floating_point()
            and not any(name.startswith(f"{a}.") for a in adapted)
        ):
            return name
    return None


def probe_values(weight: torch.Tensor) -> list[float]:
    """Sixteen values of a weight."""
    values = whole(weight).flatten()
    return values[:: max(1, values.numel() // 16)][:16].tolist()


def weight_probe(base: nn.Module, adapted: Iterable[str]) -> list[float]:
    """Sixteen values of the first weight that no adapter touches: they tell two bases of the same shape apart."""
    name = untouched_weight(base, adapted)
    if name is None:
        return []
    prefix, _, key = name.rpartition(".")
    with align_module_device(base.get_submodule(prefix)):
        return probe_values(getattr(base.get_submodule(prefix), key))


def probe_differs(expected: list[float], found: list[float]) -> bool:
    """Whether two probes are of different models; the same base in bf16 is the same base."""
    near = 1e-2 * max(map(abs, expected), default=0)
    return any(abs(a - b) > near for a, b in zip(expected, found, strict=False))
