"""Hot swap: which tasks of a loaded stack act, changed in place by writing only the entries that tasks touch."""

from typing import Any

import torch
from peft import PeftModel

from ..tuner import named_layers
from ..tuner.rank_routing import refuse_competing


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
        raise ValueError("switch_tasks needs a model from load_stack(...), without merge=True and without weights")
    if isinstance(tasks, (str, dict)) or (tasks is not None and not tasks):
        raise ValueError(
            f"tasks is a list of names, got {tasks!r}; for the base model alone: `with model.disable_adapter():`, for "
            "a blend: load_stack(..., tasks={name: weight})"
        )
    unknown = [name for name in tasks or () if name not in folders]
    if unknown:
        raise ValueError(f"this model has no task {unknown[0]!r}; it was loaded with {', '.join(folders)}")
    chosen = [folder for name, folder in folders.items() if tasks is None or name in tasks]
    configs: Any = model.peft_config
    for folder in folders.values():
        refuse_competing(configs[folder].rank_routing, "switching tasks")
    layers = [layer for _, layer in named_layers(model) if layer.quantization_backend is None]
    for layer in layers:
        layer.finished.prepare_switch(list(folders.values()))
    for number, folder in enumerate(chosen):
        configs[folder].parent_adapters = chosen[:number]
    for layer in layers:
        layer.finished.begin_switch()
    model.set_adapter(chosen[-1], inference_mode=True)
    for layer in layers:
        layer.finished.switch(chosen)
