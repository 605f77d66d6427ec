"""What we use of PEFT that is not its public interface, each with a line why.

`tests/tuner/test_peft_compat.py` has a test for each, which fails first, and by name, when a new PEFT moves one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.osf.layer import Linear as OSFLinear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.tuners.tuners_utils import _get_in_out_features as in_out_features
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn


__all__ = [
    "OVERRIDDEN",
    "BufferDict",
    "OSFLinear",
    "base_device",
    "check_adapters_to_merge",
    "freeze",
    "in_out_features",
    "osf_factors",
    "real_parameters",
    "rename_active",
    "rename_adapter",
    "set_active",
    "start_inactive",
]

# Why what is imported above is needed:
# BufferDict: buffers by adapter name that follow `.to()` and are saved; torch has `ParameterDict` alone.
# OSFLinear: the layer that OSF trains, without OSF's tuner, which would replace ours.
# in_out_features: of every kind of linear layer; each library of quantised layers names them in another way.
# check_adapters_to_merge: PEFT's own warning that an adapter is merged already.
# AuxiliaryTrainingWrapper, ModulesToSaveWrapper: to rename what they hold.

# Methods that PEFT calls on a tuner or its layers, and that ours override: name -> why.
OVERRIDDEN = {
    "_create_and_replace": "the place where a tuner puts its layer in: BaseTuner has no other",
    "_cast_adapter_dtype": "PEFT casts adapters to float32 or back; ours are float32 and stay so",
    "_enable_peft_forward_hooks": "the only place where `adapter_names=` can be refused",
    "_get_adapter_state_dict": "a shared gate must be saved as one copy per layer",
    "_replace_module": "PEFT moves layers to the device of offloaded weights, and sets `weight` of what it unloads",
    "_check_merge_allowed": "a quantised layer is refused before the first weight is changed",
    "_move_adapter_to_device_of_base_layer": "PEFT also casts to the base's dtype: in bf16 the support would change",
}


def start_inactive(layer: BaseTunerLayer) -> None:
    """BaseTunerLayer has no `__init__` of its own: a new layer is enabled, and no adapter in it is active."""
    layer._disable_adapters = False
    layer._active_adapter = []


def set_active(layer: BaseTunerLayer, adapters: Sequence[str]) -> None:
    """Activate adapters without the change of `requires_grad` that `set_adapter` makes."""
    layer._active_adapter = list(adapters)


def base_device(layer: BaseTunerLayer) -> torch.device | None:
    """The device of the base weight: quantised layers keep it under other names. None if it cannot be told."""
    return layer._get_base_layer_device_and_dtype(layer.get_base_layer())[0]


def freeze(layer: BaseTunerLayer, adapter: str, names: tuple[str, ...]) -> None:
    """Freeze these parts of an adapter for good: every `set_adapter` and `requires_grad_` of PEFT respects the list."""
    layer.frozen_peft_weight_names[adapter] = names
    layer._freeze_non_trainable_peft_weights(adapter)


def rename_adapter(module: BaseTunerLayer | AuxiliaryTrainingWrapper, old: str, new: str) -> None:
    """Rename an adapter in one module of PEFT, for which PEFT has no verb.

    Wrappers of `modules_to_save` and `trainable_token_indices` keep the name in places of their own.
    """
    if isinstance(module, BaseTunerLayer):
        attributes = (*module.adapter_layer_names, *module.other_param_names, "frozen_peft_weight_names")
    else:
        attributes = ("modules_to_save",) if isinstance(module, ModulesToSaveWrapper) else ()
    for attribute in attributes:
        container = getattr(module, attribute)
        if old in container:
            container[new] = container[old]
            del container[old]
    if isinstance(module, AuxiliaryTrainingWrapper) and old in module._adapters:
        module._adapters = module._adapters - {old} | {new}
    active = [new if name == old else name for name in module.active_adapters]
    if new in active:
        module._active_adapter = active
        module.set_adapter(active, inference_mode=True)


def rename_active(model: nn.Module, old: str, new: str) -> None:
    """The PeftModel holds the active adapter's name, and the tuner inside it a name or a list."""
    for module in model.modules():
        active = getattr(module, "active_adapter", None)
        if active in (old, [old]) and not isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.active_adapter = new  # type: ignore[assignment]


_register_parameter = nn.Module.register_parameter


@contextmanager
def real_parameters() -> Iterator[None]:
    """Undo accelerate's `init_empty_weights`, under which PEFT builds the adapter it loads with `low_cpu_mem_usage`:
    every parameter goes to the meta device there, and so would the weights of the parents that are read meanwhile."""
    outer = nn.Module.register_parameter
    nn.Module.register_parameter = _register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = outer  # type: ignore[method-assign]


def osf_factors(layer: OSFLinear, adapter: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(as they are, as they were at the start): U_low [out, t], S_low [t] and V_low [t, in] of PEFT's OSF layer.

    OSF itself stores the change alone when it is saved, and has no method that gives both.
    """
    start = {"U_low": layer._osf_U_low_init, "S_low": layer._osf_S_low_init, "V_low": layer._osf_V_low_init}
    now: Any = layer.osf_svd_params[adapter]
    return now, {name: factors[adapter] for name, factors in start.items()}
