"""What a training loop does with an adapter: ramp the gate, set the threshold, measure the density, finish the task."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import nn

from ..ops.quantile import kth_magnitude, update_blocks
from .config import JumpLoraConfig
from .gate import JumpGate
from .layer import JumpLoraLayer
from .model import check_adapter_name, named_layers
from .shards import assign, gathered


def adapter_config(model: nn.Module, adapter: str) -> JumpLoraConfig:
    """The config of an adapter of this model."""
    for _, layer in named_layers(model, adapter):
        return layer.configs[adapter]
    known = sorted({name for _, layer in named_layers(model) for name in layer.configs})
    raise ValueError(f"no JumpLoRA adapter {adapter!r} in this model; it holds {known or 'none'}")


@contextmanager
def without_adapter(model: nn.Module, adapter: str) -> Iterator[None]:
    """Inside, the model is the one before `adapter` was added: its parents alone, in evaluation mode, no gradient.

    Merged parents stay merged, so this costs nothing but the forward pass it is for.
    """
    layers = [layer for _, layer in named_layers(model, adapter)]
    active, training = [layer._active_adapter for layer in layers], model.training
    for layer in layers:
        layer._active_adapter = list(layer.configs[adapter].parent_adapters)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names


def can_continue(model: Any) -> bool:
    """Whether the model is causal: the logits of a position are those of the next token."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    generates = hasattr(base, "can_generate") and base.can_generate()
    return generates and not base.config.is_encoder_decoder


def gate_groups(model: nn.Module, adapter: str) -> list[tuple[JumpGate, list[JumpLoraLayer]]]:
    """The gates of an adapter, each with the layers that share it."""
    groups: dict[JumpGate, list[JumpLoraLayer]] = defaultdict(list)
    for _, layer in named_layers(model, adapter):
        if adapter in layer.jumplora_gate:
            groups[layer.gate(adapter)].append(layer)
    return list(groups.items())


def ramp(step: int, total_steps: int, config: JumpLoraConfig) -> float:
    """f = clip((step - s0) / (s1 - s0), 0, 1) after `step` finished optimizer steps; s0, s1 as in [`ramp_steps`]."""
    start, end = ramp_steps(total_steps, config)
    return min(1.0, max(0.0, (step - start) / (end - start)))


def ramp_steps(total_steps: int, config: JumpLoraConfig) -> tuple[int, int]:
    """(s0, s1) = (int(gate_start * T), int(gate_end * T)): the ramp starts after step s0 and is closed after s1.

    Raises:
        ValueError: the task is too short for its schedule.
    """
    start, end = int(config.gate_start * total_steps), int(config.gate_end * total_steps)
    if not 1 <= start < end:
        raise ValueError(
            f"{total_steps} optimizer steps are too few for gate_start={config.gate_start}, gate_end={config.gate_end} "
            f"(the ramp would run from step {start} to {end}; it needs 1 <= start < end): give the task more data or "
            "epochs, a smaller batch, or a wider ramp"
        )
    return start, end


def density_at(step: int, total_steps: int, config: JumpLoraConfig) -> float | None:
    """Fraction of entries to keep after `step` finished steps, s0 <= step; None: as many as A and B have parameters.

    A pure function of the steps. With a `density_schedule`, f = [`ramp`]: target + (initial - target) * (1 - f), or
    (1 - f)^3 for "cubic". Without: `initial_density` at s0 and `target_density` after it, either standing for both.
    """
    initial, target = config.initial_density or config.target_density, config.target_density or config.initial_density
    if initial is None or target is None or step == ramp_steps(total_steps, config)[0]:
        return initial
    power = {"constant": 0, "linear": 1, "cubic": 3}[config.density_schedule]
    left = (1 - ramp(step, total_steps, config)) ** power if power else 0.0
    return target + (initial - target) * left


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """A [r, in] and B [out, r] of every layer, log_tau [1] of every gate; each once."""
    factors = [factor for _, layer in named_layers(model, adapter) for factor in layer.factors(adapter)[:2]]
    return [*factors, *(gate.log_tau for gate, _ in gate_groups(model, adapter))]


def set_mix(model: nn.Module, adapter: str, mix: float) -> None:
    """Set f of all gates of an adapter."""
    for gate, _ in gate_groups(model, adapter):
        gate.mix.fill_(mix)


def _entries(layers: list[JumpLoraLayer]) -> int:
    return sum(layer.out_features * layer.in_features for layer in layers)


def _add_over_processes(counts: torch.Tensor) -> None:
    moved = counts.to(PartialState().device)  # NCCL adds up on GPUs alone
    torch.distributed.all_reduce(moved)
    counts.copy_(moved)


def set_threshold(model: nn.Module, adapter: str, density: float | None, together: bool = False) -> None:
    """Set tau of every gate to the exact quantile of |D| over its layers.

    `density` is the fraction of entries kept (a layer that `density_pattern` names has its own). None keeps as many as
    A and B have parameters, which is the published start (for the global scope the published code takes the next larger
    entry, keeping one less). Entries closed by hard isolation are not kept, and count as entries.

    together: every process of a run calls this with the same adapter. They share the work, each taking some of the
    layers, and all set the same tau.
    """
    config, state = adapter_config(model, adapter), PartialState() if together else None
    taus = []
    with gathered(adapter_parameters(model, adapter)):
        for gate, layers in gate_groups(model, adapter):
            total = _entries(layers)
            factors = [layer.factors(adapter) for layer in layers]
            pattern, name = config.density_pattern, layers[0].layer_name  # one layer a gate where there is a pattern
            share = pattern.get(get_pattern_key(list(pattern), name), density)
            if share is None:
                kept = sum(A.numel() + B.numel() for A, B, _ in factors) - (config.threshold_scope == "global")
            else:
                kept = round(share * total)
            k = min(max(1, total - kept), total)
            near = gate.log_tau.detach().exp().item()  # in the steps after the start, a good guess
            if state is not None and state.num_processes > 1:
                mine = factors[state.process_index :: state.num_processes]
                tau = kth_magnitude(functools.partial(update_blocks, mine), k, _add_over_processes)
            else:
                tau = kth_magnitude(functools.partial(update_blocks, factors), k, near=near)
            if tau == 0:
                raise ValueError(
                    f"the threshold of adapter {adapter!r} cannot start: at least {k} of {total} entries of its "
                    "updates are exactly zero or closed. Either it has not been trained (learning rate 0?), or "
                    "isolation='hard' leaves fewer entries free than it shall keep: lower initial_density or "
                    "target_density"
                )
            log_tau = torch.full_like(gate.log_tau, tau).log()
            while log_tau.exp() < tau:  # the logarithm was rounded down: the k-th entry would be kept after all
                log_tau = torch.nextafter(log_tau, torch.full_like(log_tau, torch.inf))
            taus.append((gate, log_tau.item()))
    for gate, value in taus:
        assign(gate.log_tau, value)


def density(model: nn.Module, adapter: str) -> float:
    """Fraction of the adapted entries with |D| > tau (of a finished adapter: in its support). 1.0 without a gate."""
    kept = total = 0
    with gathered(adapter_parameters(model, adapter)):
        for _, layer in named_layers(model, adapter):
            total += layer.out_features * layer.in_features
            if adapter not in layer.jumplora_gate:
                kept += layer.out_features * layer.in_features
            elif adapter in layer.jumplora_support:
                kept += int(layer.support(adapter).sum())
            else:
                tau = layer.gate(adapter).log_tau.detach().exp()
                kept += int(sum((block.abs() > tau).sum() for block in update_blocks([layer.factors(adapter)])))
    return kept / total


@torch.no_grad()
def finish_adapter(model: Any, adapter: str = "default", name: str | None = None) -> None:
    """End of a task: record the support, freeze the adapter and give it its final name.

    From here on its update is D on the recorded support, on every device; the threshold is not evaluated again.
    An adapter without a gate is only renamed.

    Raises:
        FloatingPointError: a weight is not finite.
        ValueError: the ramp of the gate has not arrived at 1, or the name is taken or not a possible one.
    """
    config = adapter_config(model, adapter)
    if name is not None and name != adapter:
        if name in model.peft_config:
            raise ValueError(f"an adapter {name!r} exists already")
        check_adapter_name(model, name)
    for gate, _ in gate_groups(model, adapter):
        if gate.mix.item() != 1:
            raise ValueError(
                f"the gate of adapter {adapter!r} stands at f = {gate.mix.item():g}; a task is finished when its ramp "
                "has arrived at 1 (train on to gate_end)"
            )
    for layer_name, layer in named_layers(model, adapter):
        if not all(torch.isfinite(t).all() for t in (layer.jumplora_A[adapter], layer.jumplora_B[adapter])):
            raise FloatingPointError(
                f"adapter {adapter!r}, layer {layer_name} holds weights that are not finite: training has diverged in "
                "its last step. Lower the learning rate; finished tasks are safe"
            )
    if config.gate:
        config.support = {layer_name: layer.finish(adapter) for layer_name, layer in named_layers(model, adapter)}
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
        layer.fold(adapters)
    for adapter in adapters:
        model.delete_adapter(adapter)


def _rename(model: Any, old: str, new: str) -> None:
    configs = model.peft_config
    configs[new] = configs.pop(old)
    for config in configs.values():
        if isinstance(config, JumpLoraConfig):
            config.parent_adapters = [new if n == old else n for n in config.parent_adapters]
    layers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    for layer in layers:  # ours, and those of `modules_to_save` and `trainable_token_indices`
        if isinstance(layer, BaseTunerLayer):
            attributes = (*layer.adapter_layer_names, *layer.other_param_names, "frozen_peft_weight_names")
        else:
            attributes = ("modules_to_save",) if isinstance(layer, ModulesToSaveWrapper) else ()
        for attribute in attributes:
            container = getattr(layer, attribute)
            if old in container:
                container[new] = container[old]
                del container[old]
        if isinstance(layer, JumpLoraLayer):
            layer.set_adapter([new if n == old else n for n in layer.active_adapters], inference_mode=True)
            layer.merged_adapters = [new if n == old else n for n in layer.merged_adapters]
            continue
        if isinstance(layer, AuxiliaryTrainingWrapper) and old in layer._adapters:
            layer._adapters = layer._adapters - {old} | {new}
        if old in layer.active_adapters:
            layer._active_adapter = [new]
            layer.set_adapter([new], inference_mode=True)
    for module in model.modules():  # the PeftModel and the tuner inside it; the latter holds a name or a list
        active = getattr(module, "active_adapter", None)
        if active in (old, [old]) and not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.active_adapter = new
