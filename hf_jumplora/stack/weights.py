"""What the weights of a base are known by: a digest of all their bytes, and a few values for other dtypes."""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils.modeling import align_module_device
from torch import nn

from ..tuner.sharded_parameters import full_shape, whole


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_BYTES = 1 << 23  # of a weight that a thread hashes at once
_WORDS = 1 << 14  # 64-bit words that share a sum


def named_tensors(base: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name, value) of every weight and saved buffer of a base without adapters; a tied one once, by its first name.

    Values are whole (see `sharded_parameters`: every process must go through all), and of offloaded weights in memory
    until the next one. None: the weight, or one beside it in its module, is quantised.

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
            for key in own:
                name, tensor = f"{prefix}.{key}".lstrip("."), getattr(module, key)
                if tensor.is_meta:
                    raise ValueError(f"{name} is on the meta device: load the base's weights first")
                yield name, None if quantised else whole(tensor)


def _quantised(tensor: torch.Tensor) -> bool:
    return type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.dtype not in (*_FLOATS, torch.int64, torch.bool)


@functools.cache
def _multipliers(device: torch.device) -> torch.Tensor:
    """Fixed odd numbers, int64 [_WORDS]."""
    words = torch.arange(1, _WORDS + 1, device=device) * -7046029254386353131
    words = (words ^ (words >> 30)) * -4658895280553007687
    return (words ^ (words >> 27)) | 1


def digest(tensor: torch.Tensor) -> str:
    """Hex sha256 over dtype, shape and, of each 128 KiB of the tensor's bytes, a 64-bit sum, computed where it is.

    Each word is mixed and multiplied by a number of its place, modulo 2^64: no single word can change unseen, several
    by an accident of 2^-64. It tells models apart; a file's sha256 is what tells tampering.
    """
    result = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    parts = data.split(_BYTES)
    with ThreadPoolExecutor(os.cpu_count() if data.device.type == "cpu" and len(parts) > 1 else 1) as threads:
        for sums in threads.map(_sums, parts):
            result.update(sums.cpu().numpy().tobytes())
    return result.hexdigest()


def _sums(part: torch.Tensor) -> torch.Tensor:
    """One sum for each 128 KiB, int64. On a CPU one after the other: torch's own threads, which larger operations
    start, took ten times as long on busy cores."""
    part = F.pad(part, (0, -part.numel() % (8 * _WORDS)))
    words = (part if part.storage_offset() % 8 == 0 else part.clone()).view(torch.int64).view(-1, _WORDS)
    multipliers = _multipliers(words.device)
    blocks = words.split(1 if words.device.type == "cpu" else len(words)) if len(words) else [words]
    return torch.cat([(block >> 32).bitwise_xor_(block).mul_(multipliers).sum(1) for block in blocks])


def identity(tensor: torch.Tensor) -> dict[str, Any]:
    """What a weight is known by: its digest, and for the same weight in another dtype its shape and four values."""
    flat = tensor.detach().reshape(-1)
    at = [int(place * flat.numel()) for place in (0.119, 0.381, 0.618, 0.937)] if flat.numel() else []
    probe = [float(value) for value in flat[at].double().nan_to_num()]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"sha256": digest(tensor), "dtype": dtype, "shape": list(tensor.shape), "probe": probe}


def same_weight(expected: dict[str, Any], found: dict[str, Any]) -> bool:
    """Whether two weights are the same: all their bytes; in another dtype, their shape and four values within 1 %."""
    if expected["dtype"] == found["dtype"]:
        return expected["sha256"] == found["sha256"]
    return expected["shape"] == found["shape"] and not probe_differs(expected["probe"], found["probe"])


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
