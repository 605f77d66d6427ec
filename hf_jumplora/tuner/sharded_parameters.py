"""Parameters that are spread over processes.

DeepSpeed ZeRO-3 leaves a parameter empty outside of the forward pass and keeps `ds_tensor`, a flat piece padded to
equal size; FSDP2 keeps a DTensor. DeepSpeed of any stage trains float32 master copies of what the model holds.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, distribute_tensor


def _zero3(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> torch.Size:
    """The shape that a parameter has when it is whole."""
    return parameter.ds_shape if _zero3(parameter) else parameter.shape


def gathered(parameters: Iterable[torch.Tensor]) -> AbstractContextManager:
    """Inside, parameters that ZeRO-3 has sharded are whole, to be read. Every process must enter it."""
    sharded = [p for p in parameters if _zero3(p)]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


def keep_whole_in_forward(model: torch.nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """Have ZeRO-3's engine of `model`, which exists, keep parameters whole until the end of its forward pass, hooks
    included, and again in the backward pass: for what reads them after their own layer has run."""
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(model, parameter)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's value, whole and without gradient. Every process must call it."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor().detach()
    with gathered([parameter]):
        return parameter.detach().clone() if _zero3(parameter) else parameter.detach()


def piece(parameter: Any) -> torch.Tensor:
    """What this process holds of a parameter, to be changed in place."""
    if _zero3(parameter):
        parameter.partition()  # else a gathered copy would stay as it was
        return parameter.ds_tensor.data
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.data


def piece_of(full: torch.Tensor, parameter: Any) -> torch.Tensor:
    """The part of `full`, a value for the whole parameter, that belongs to `piece(parameter)`."""
    if _zero3(parameter):
        size = parameter.ds_tensor.numel()
        start = size * torch.distributed.get_rank(parameter.ds_process_group)
        part = full.reshape(-1)[start : start + size]
        return F.pad(part, (0, size - part.numel()))
    if isinstance(parameter, DTensor):
        return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return full


@torch.no_grad()
def assign(parameter: Any, value: float | torch.Tensor) -> None:
    """Set all entries of a parameter, and of the master copy that DeepSpeed trains in its place, to a number or to a
    scalar on its device (nothing waits then)."""
    piece(parameter).fill_(value)
    if _zero3(parameter):
        if parameter.requires_grad and hasattr(parameter, "_z3_optimizer"):
            from deepspeed.utils import safe_set_local_fp32_param

            safe_set_local_fp32_param(
                parameter, torch.empty_like(parameter.ds_tensor, dtype=torch.float32).fill_(value)
            )
    elif hasattr(parameter, "_hp_mapping"):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, torch.empty_like(parameter, dtype=torch.float32).fill_(value))


def master(parameter: Any) -> torch.Tensor:
    """The float32 value that is trained, whole: DeepSpeed's master copy, if any. Every process must call it."""
    if parameter.requires_grad and (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter).detach().view(full_shape(parameter)).clone()
    return whole(parameter).float()
