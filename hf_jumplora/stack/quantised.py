"""Weights that bitsandbytes has quantised: their values, and whether a file's weight gives these."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn
from transformers.pytorch_utils import Conv1D


class Dequantised(NamedTuple):
    """A quantised weight of a model in memory."""

    values: torch.Tensor  # floats, laid out as in the files of the model before it was quantised
    kind: str  # how it was quantised
    module: Any  # whose `weight` it is


def dequantised(module: nn.Module) -> Dequantised | None:
    """The values of a module's weight; None if it is quantised by another library, whose layouts are not known here."""
    weight: Any = getattr(module, "weight", None)
    if not get_bnb_param_type(weight):
        return None
    state = getattr(weight, "quant_state", None)
    kind = "int8" if state is None else f"{state.quant_type}_{state.blocksize}_{state.dtype}".replace("torch.", "")
    values = dequantize_bnb_weight(weight, getattr(module, "state", None))
    return Dequantised(_laid_out(module, values), kind + "_nested" * getattr(state, "nested", False), module)


def _laid_out(module: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """As in the layer that was replaced, or back: GPT-2's weights are transposed when they are quantised."""
    return values.T if issubclass(getattr(module, "source_cls", nn.Linear), Conv1D) else values


def comes_from(stored: Callable[[str], torch.Tensor | None], name: str, found: Dequantised) -> bool:
    """Whether the files (`stored` reads one of their tensors) hold what the weight `name` was quantised to or from.

    Floats are quantised again as they were when the model was loaded, in up to four blocks of 64 rows, since a CPU
    takes minutes for a 7B base: a change of a thousandth of these shows.
    """
    there, module = stored(name), found.module
    if there is None:
        return False
    saved = module.state_dict(prefix=name.removesuffix("weight"))
    saved.pop(name.removesuffix("weight") + "bias", None)
    if all(stored(key) is not None for key in saved):  # quantised in the files too; with FSDP in mind, as floats
        return all(same_bytes(stored(key).cpu(), value.cpu()) for key, value in saved.items())
    if there.shape != found.values.shape:
        return False
    there, state = _laid_out(module, there), getattr(module.weight, "quant_state", None)
    step = 64 if state is None else state.blocksize  # rows; whole blocks, whatever the rows' length
    last = (len(there) - 1) // step * step
    starts = {last * third // 3 // step * step for third in range(4)}
    loaded = (torch.float32, torch.bfloat16, torch.float16) if state is None else (state.dtype,)
    return any(all(_near(found, there.to(dtype), at, at + step) for at in starts) for dtype in loaded)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one dtype have the same bytes. Words are compared: torch takes five times as long for
    bfloat16."""
    parts = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    if all(len(part) % 8 == part.storage_offset() % 8 == 0 for part in parts):
        parts = [part.view(torch.int64) for part in parts]
    return torch.equal(*parts)


def _near(found: Dequantised, there: torch.Tensor, first: int, end: int) -> bool:
    """Whether some rows of a file's weight, quantised as the one in memory is, have its numbers and values.

    A last bit may differ between devices, and scales that are quantised too are those of the whole weight.
    """
    weight = found.module.weight
    settings = ("blocksize", "quant_type", "quant_storage", "has_fp16_weights")
    like = {key: getattr(weight, key) for key in settings if hasattr(weight, key)}
    rows = there[first:end].contiguous()
    again = type(weight)(rows, requires_grad=False, compress_statistics=False, **like).to(weight.device)
    values = dequantize_bnb_weight(again, SimpleNamespace(SCB=getattr(again, "SCB", None))).float()
    stored, numbers = (w.data.view(torch.uint8).flatten() for w in (weight, again))
    at = first * len(stored) // len(there)
    other = (stored[at : at + len(numbers)] != numbers).float().mean()
    ours = _laid_out(found.module, found.values)[first:end].float()
    near = 0.02 if found.kind.endswith("nested") else 0.002
    return bool(other <= 1e-3 and torch.dist(values, ours) <= near * ours.norm())
