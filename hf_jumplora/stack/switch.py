"""Hot swap: which tasks of a loaded stack act, changed in place by writing only the entries that tasks touch."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from ..tuner import JumpLoraLayer, named_layers


@dataclass
class _Touched:
    """Of one layer: the entries that any task changes (flat indices [n] into the base weight as it is stored), their
    values in the base [n], and for each adapter where its entries stand in that list [k] and what it adds [k]."""

    index: torch.Tensor
    original: torch.Tensor
    updates: dict[str, tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def switch_tasks(model: PeftModel, tasks: list[str] | None = None) -> None:
    """Make a stack from `load_stack` act with these of its tasks, from now on; None: with all of them.

    The weights become those of `load_stack(..., tasks=tasks)`, bit for bit, and switching back restores them bit for
    bit. The first call computes every task's sparse update once and keeps it beside the weights (16 bytes for an entry
    of a task); every call then writes the touched entries alone. Over a quantised base the updates stay live.

    Raises:
        ValueError: the model does not come from `load_stack`, or has no task of this name.
    """
    folders: dict[str, str] | None = getattr(model, "stack_tasks", None)
    if folders is None:
        raise ValueError("switch_tasks needs a model from load_stack(...), without merge=True")
    if isinstance(tasks, str) or (tasks is not None and not tasks):
        raise ValueError(
            f"tasks is a list of names, got {tasks!r}; for the base model alone: `with model.disable_adapter():`"
        )
    unknown = [name for name in tasks or () if name not in folders]
    if unknown:
        raise ValueError(f"this model has no task {unknown[0]!r}; it was loaded with {', '.join(folders)}")
    chosen = [folder for name, folder in folders.items() if tasks is None or name in tasks]
    cache: dict[str, _Touched] = vars(model).setdefault("_switch_cache", {})
    layers = [(name, layer) for name, layer in named_layers(model) if layer.quantization_backend is None]
    for name, layer in layers:
        if name not in cache:
            cache[name] = _touched(layer, list(folders.values()))
        _check_place(layer, cache[name])
    configs: Any = model.peft_config
    for number, folder in enumerate(chosen):
        configs[folder].parent_adapters = chosen[:number]
    for _, layer in layers:
        layer.merged_adapters = []  # else PEFT would unmerge; every entry that is merged is written below
    model.set_adapter(chosen[-1], inference_mode=True)
    for name, layer in layers:
        _write(layer, cache[name], [folder for folder in chosen if folder in layer.configs])


def _touched(layer: JumpLoraLayer, adapters: list[str]) -> _Touched:
    layer.unmerge()
    weight = layer._base_weight()
    sparse = {}
    union = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    for adapter in adapters:
        if adapter in layer.configs:
            update = layer.get_delta_weight(adapter).reshape(-1)
            index = update.nonzero().view(-1)
            union[index] = True
            sparse[adapter] = (index, update[index])
    index = union.nonzero().view(-1)
    place = torch.empty(weight.numel(), dtype=torch.int32, device=weight.device)
    place[index] = torch.arange(index.numel(), dtype=torch.int32, device=weight.device)
    updates = {adapter: (place[where].long(), values) for adapter, (where, values) in sparse.items()}
    return _Touched(index, weight.take(index), updates)


def _check_place(layer: JumpLoraLayer, touched: _Touched) -> None:
    weight = layer._base_weight()
    if touched.index.device != weight.device or touched.original.dtype != weight.dtype:
        raise ValueError(
            f"layer {layer.layer_name} is now {weight.dtype} on {weight.device}, and was {touched.original.dtype} on "
            f"{touched.index.device} when its tasks were first switched: move or cast a model before that"
        )


def _write(layer: JumpLoraLayer, touched: _Touched, adapters: list[str]) -> None:
    weight = layer._base_weight()
    if layer._original is None:  # unmerged: before, or when the updates were computed
        layer._original = weight.to("cpu", copy=True)
    total = torch.zeros(touched.index.numel(), device=weight.device)
    for adapter in adapters:
        place, values = touched.updates[adapter]
        total[place] += values
    wide = torch.promote_types(weight.dtype, torch.float32)
    new = (touched.original.to(wide) + total).to(weight.dtype)
    weight.put_(touched.index, torch.where(total != 0, new, touched.original))
    layer.merged_adapters = adapters
