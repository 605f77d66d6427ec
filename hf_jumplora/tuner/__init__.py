"""The PEFT tuner: config, gate, layer, model, and what a training loop does with an adapter."""

from .adapters import (
    can_continue,
    density,
    finish_adapter,
    fold_finished,
    gate_groups,
    ramp,
    ramp_steps,
    set_mix,
    set_threshold,
    without_adapter,
)
from .config import JumpLoraConfig
from .gate import JumpGate
from .layer import JumpLoraLayer
from .model import JumpLoraModel, named_layers
from .register import register


__all__ = [
    "JumpGate",
    "JumpLoraConfig",
    "JumpLoraLayer",
    "JumpLoraModel",
    "can_continue",
    "density",
    "finish_adapter",
    "fold_finished",
    "gate_groups",
    "named_layers",
    "ramp",
    "ramp_steps",
    "register",
    "set_mix",
    "set_threshold",
    "without_adapter",
]
