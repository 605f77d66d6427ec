"""The PEFT tuner: config, gate, layer, model, and what a training loop does with an adapter.

Importing it registers the method with PEFT.
"""

from .._compat import refuse_native_adapters, warn_of_bad_versions
from .config import JumpLoraConfig
from .finish import finish_adapter, fold_finished
from .gate import JumpGate
from .layer import JumpLoraLayer
from .lookup import gate_groups, is_causal, named_layers, without_adapter
from .model import JumpLoraModel
from .register import register
from .schedule import density, ramp, ramp_steps, set_mix, set_threshold


__all__ = [
    "JumpGate",
    "JumpLoraConfig",
    "JumpLoraLayer",
    "JumpLoraModel",
    "density",
    "finish_adapter",
    "fold_finished",
    "gate_groups",
    "is_causal",
    "named_layers",
    "ramp",
    "ramp_steps",
    "register",
    "set_mix",
    "set_threshold",
    "without_adapter",
]

warn_of_bad_versions()
register()
refuse_native_adapters(JumpLoraConfig)
