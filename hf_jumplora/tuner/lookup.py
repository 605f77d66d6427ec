"""What a model holds: its adapted layers, their gates, and one adapter's config and parameters."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .config import JumpLoraConfig
from .gate import JumpGate
from .layer import JumpLoraLayer
from .peft_compat import set_active


def named_layers(model: nn.Module, adapter: str | None = None):
    """(name, layer) of every JumpLoraLayer of a model, or of those that hold an adapter; names without wrappers."""
    seen: set[nn.Module] = set()

    def walk(module):  # as modules(), but not into the layers: what is in there grows with the number of adapters
        if module in seen:
            return
        seen.add(module)
        if not isinstance(module, JumpLoraLayer):
            for child in module.children():
                yield from walk(child)
        elif adapter is None or adapter in module.configs:
            yield module.layer_name, module

    yield from walk(model)


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
    active, training = [layer.active_adapters for layer in layers], model.training
    for layer in layers:
        set_active(layer, layer.configs[adapter].parent_adapters)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
        for layer, names in zip(layers, active, strict=True):
            set_active(layer, names)


def is_causal(model: Any) -> bool:
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


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """A [r, in] and B [out, r] of every layer, g [r] where ranks are gated, W_r [r, in] where a router chooses them,
    log_tau [1] of every gate; each once."""
    names = ("jumplora_A", "jumplora_B", "jumplora_g", "jumplora_router")
    parts = [getattr(layer, name) for _, layer in named_layers(model, adapter) for name in names]
    factors = [part[adapter] for part in parts if adapter in part]
    return [*factors, *(gate.log_tau for gate, _ in gate_groups(model, adapter))]
