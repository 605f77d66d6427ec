"""The adapter of the next task: on top of the finished ones, in place of the last one, or beside them."""

from typing import Any

import torch
from peft import get_peft_model

from ..stack.load import merge_finished
from ..tuner import JumpLoraConfig, fold_finished, named_layers


def new_adapter(model: Any, config: JumpLoraConfig, index: int, mode: str, fold: bool) -> Any:
    """Put the adapter `default` of task number `index` into a model that holds the tasks before; returns a PeftModel.

    mode: of the method. fold: keep the finished tasks as their sum alone (see [`fold_finished`]).
    """
    finished = [f"task_{k:03d}" for k in range(index)]
    if index == 0:
        return get_peft_model(model, config)
    model.unmerge_adapter()
    if mode not in ("sequential", "separate"):
        config.parent_adapters = finished
    model.add_adapter("default", config)
    model.set_adapter("default")
    if mode == "sequential":
        with torch.no_grad():
            for _, layer in named_layers(model):
                layer.jumplora_A["default"].copy_(layer.jumplora_A[finished[-1]])
                layer.jumplora_B["default"].copy_(layer.jumplora_B[finished[-1]])
        model.delete_adapter(finished[-1])
    elif mode != "separate":
        if fold:
            fold_finished(model, finished[-1:])
        merge_finished(model, finished)
    return model
