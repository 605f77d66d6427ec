"""The end of a task: its adapter is finished and renamed, and finished adapters are folded into their sum."""

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from .config import JumpLoraConfig
from .layer import JumpLoraLayer
from .lookup import adapter_config, gate_groups, named_layers
from .model import check_adapter_name, rank_and_alpha
from .peft_compat import rename_active, rename_adapter
from .schedule import check_thresholds


@torch.no_grad()
def finish_adapter(model: Any, adapter: str = "default", name: str | None = None) -> None:
    """End of a task: record the support, freeze the adapter and give it its final name.

    From here on its update is D on the recorded support, on every device; the threshold is not evaluated again.
    An adapter without a gate has no support to record. Ranks that a strategy has gated lose the closed ones.

    Raises:
        FloatingPointError: a weight or a threshold is not finite.
        ValueError: the ramp of the gate has not reached 1, or the name is taken or invalid.
    """
    config = adapter_config(model, adapter)
    if name is not None and name != adapter:
        if name in model.peft_config:
            raise ValueError(f"an adapter {name!r} exists already")
        check_adapter_name(model, name)
    for gate, _ in gate_groups(model, adapter):
        if gate.f != 1:
            raise ValueError(
                f"the gate of adapter {adapter!r} is at f = {gate.f:g}; a task is finished when its ramp has "
                "reached 1 (keep training up to gate_end)"
            )
    layers = dict(named_layers(model, adapter))
    for layer in layers.values():
        if adapter in layer.jumplora_g:
            layer.absorb_rank_gate(adapter, config)
    parts = [(layer.jumplora_A, layer.jumplora_B, layer.jumplora_router) for layer in layers.values()]
    sums = [torch.stack([part[adapter].sum() for part in some if adapter in part]).sum() for some in parts]
    for layer_name, total in zip(layers, torch.stack([s.to(sums[0].device) for s in sums]).tolist(), strict=True):
        if not math.isfinite(total):
            raise FloatingPointError(
                f"adapter {adapter!r}, layer {layer_name} holds weights that are not finite: training has diverged in "
                "its last step. Lower the learning rate; finished tasks are safe"
            )
    check_thresholds(model, adapter)
    if config.gate:
        config.support = {layer_name: layer.finish(adapter) for layer_name, layer in layers.items()}
    if config.rank_pattern or config.alpha_pattern:  # files sort their keys, and the first that matches counts
        own = {layer_name: rank_and_alpha(config, layer_name) for layer_name in layers}
        config.rank_pattern = {layer_name: r for layer_name, (r, _) in own.items()}
        config.alpha_pattern = {layer_name: alpha for layer_name, (_, alpha) in own.items()}
    config.inference_mode = True
    if name is not None and name != adapter:
        _rename(model, adapter, name)


@torch.no_grad()
def fold_finished(model: Any, adapters: list[str]) -> None:
    """Keep of finished adapters only the sum of their updates and one bit per entry, and delete them from the model.

    The model computes what it did before, at a cost that does not grow with the number of tasks. Every other adapter,
    now and later, has to stand on all folded ones (`parent_adapters`). Unmerges the model, if it is merged.

    Raises:
        ValueError: one of them is not finished, or a remaining adapter does not stand on all of them.
    """
    model.unmerge_adapter()
    for _, layer in named_layers(model):
        layer.finished.fold(adapters)
    for adapter in adapters:
        model.delete_adapter(adapter)


def _rename(model: Any, old: str, new: str) -> None:
    configs = model.peft_config
    configs[new] = configs.pop(old)
    for config in configs.values():
        if isinstance(config, JumpLoraConfig):
            config.parent_adapters = [new if n == old else n for n in config.parent_adapters]
    for module in model.modules():
        if isinstance(module, JumpLoraLayer):
            module.finished.rename(old, new)
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            rename_adapter(module, old, new)
    rename_active(model, old, new)
