"""What is used of PEFT beside its public interface: each of these fails first when a new PEFT moves it."""

import inspect
from pathlib import Path

import peft
import pytest
import torch
from accelerate import init_empty_weights
from peft import OSFConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_jumplora import JumpLoraConfig, JumpLoraModel
from hf_jumplora.tuner import JumpLoraLayer
from hf_jumplora.tuner import peft_compat as compat


FOLDER = Path(peft.__file__).parent
SOURCES = [FOLDER / "peft_model.py", FOLDER / "tuners/tuners_utils.py", FOLDER / "utils/save_and_load.py"]


def layer():
    made = JumpLoraLayer(nn.Linear(4, 6), "layer")
    made.update_layer("one", JumpLoraConfig(r=2, gate=False), 2, 2.0, None)
    return made


@pytest.mark.parametrize("name", compat.OVERRIDDEN)
def test_overridden_methods_are_called(name):
    """PEFT has the method, with arguments that ours takes, and calls it somewhere."""
    theirs, ours = (BaseTuner, JumpLoraModel) if hasattr(BaseTuner, name) else (BaseTunerLayer, JumpLoraLayer)
    if name != "_enable_peft_forward_hooks":  # a name that PeftModel looks for on the tuner
        assert list(inspect.signature(getattr(theirs, name)).parameters) == list(
            inspect.signature(getattr(ours, name)).parameters
        )
    assert name in vars(JumpLoraModel) or name in vars(JumpLoraLayer)
    assert any(f".{name}(" in path.read_text() for path in SOURCES)


def test_no_other_private_method_is_overridden():
    """`OVERRIDDEN` names all of them."""
    for ours, theirs in ((JumpLoraModel, BaseTuner), (JumpLoraLayer, BaseTunerLayer)):
        private = {name for name, value in vars(ours).items() if name.startswith("_") and callable(value)}
        inherited = {name for name in private if not name.startswith("__") and hasattr(theirs, name)}
        assert inherited <= {*compat.OVERRIDDEN}


def test_buffer_dict():
    """By key, moved and saved like parameters; not saved when it is not persistent."""
    module = nn.Module()
    module.kept, module.left = compat.BufferDict(persistent=True), compat.BufferDict(persistent=False)
    module.kept["one"] = module.left["one"] = torch.ones(2, dtype=torch.uint8)
    assert list(module.state_dict()) == ["kept.one"]
    module.to("meta")
    assert module.kept["one"].device.type == module.left["one"].device.type == "meta"
    assert "two" not in module.kept


def test_in_out_features():
    assert tuple(compat.in_out_features(nn.Linear(4, 6))) == (4, 6)
    assert tuple(compat.in_out_features(Conv1D(6, 4))) == (4, 6)
    assert tuple(compat.in_out_features(nn.LayerNorm(4))) == (None, None)


def test_active_adapters():
    """A new layer is enabled without an active adapter; activating one leaves gradients as they are."""
    made = layer()
    assert not made.disable_adapters
    assert made.active_adapters == []
    made.jumplora_A["one"].requires_grad_(False)
    compat.set_active(made, ["one"])
    assert made.active_adapters == ["one"]
    assert not made.jumplora_A["one"].requires_grad


def test_base_device():
    assert compat.base_device(layer()) == torch.device("cpu")
    assert compat.base_device(layer().to("meta")) == torch.device("meta")


def test_frozen_parts_stay_frozen():
    made = layer()
    compat.freeze(made, "one", ("jumplora_A",))
    made.set_adapter(["one"])
    assert not made.jumplora_A["one"].requires_grad
    assert made.jumplora_B["one"].requires_grad


def test_rename(tiny_llama):
    """In our layers, in the wrappers of `modules_to_save` and `trainable_token_indices`, and in the model."""
    config = JumpLoraConfig(
        target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 2]}
    )
    model = get_peft_model(tiny_llama(), config)
    modules = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, compat.AuxiliaryTrainingWrapper))]
    assert len({type(m) for m in modules}) == 4  # ours, ModulesToSave, the tokens' wrapper and the layer inside of it
    for module in modules:
        compat.rename_adapter(module, "default", "new")
    compat.rename_active(model, "default", "new")
    assert model.active_adapter == "new"
    assert all(module.active_adapters == ["new"] for module in modules)
    (head,) = [m for m in modules if isinstance(m, ModulesToSaveWrapper)]
    assert list(head.modules_to_save) == ["new"]
    keys = [key for key in model.state_dict() if "base_layer" not in key]
    assert not [key for key in keys if ".default" in key]
    assert any("lm_head.modules_to_save.new" in key for key in keys)
    assert any("trainable_tokens_delta.new" in key for key in keys)


def test_real_parameters():
    """Under `init_empty_weights` parameters are made on the meta device, and inside of ours where they belong."""
    with init_empty_weights(include_buffers=False):
        assert nn.Linear(2, 2).weight.device.type == "meta"
        with compat.real_parameters():
            assert nn.Linear(2, 2).weight.device.type == "cpu"
        assert nn.Linear(2, 2).weight.device.type == "meta"


def test_osf_factors():
    """Of a weight [6, 4] whose first direction is preserved: the other three now and as they were."""
    base = nn.Linear(4, 6)
    osf = compat.OSFLinear(base, "one", OSFConfig(effective_rank=1), effective_rank=1)
    now, start = compat.osf_factors(osf, "one")
    for factors in (now, start):
        assert [tuple(factors[name].shape) for name in ("U_low", "S_low", "V_low")] == [(6, 3), (3,), (3, 4)]
    assert torch.equal(now["S_low"], start["S_low"])
    with torch.no_grad():
        now["S_low"].add_(1.0)
    assert torch.equal(compat.osf_factors(osf, "one")[0]["S_low"], start["S_low"] + 1.0)
    assert osf.base_layer is base


def test_check_adapters_to_merge():
    made = layer()
    with torch.no_grad():
        made.jumplora_B["one"].fill_(1.0)
        made.merge(adapter_names=["one"])
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        assert compat.check_adapters_to_merge(made, ["one"]) == []


def test_private_names_stay_in_one_file():
    """No other file takes a private name of PEFT."""
    folder = Path(compat.__file__).parents[1]
    for path in folder.rglob("*.py"):
        if path.name != "peft_compat.py":
            for line in path.read_text().splitlines():
                if "import" in line and "peft" in line:
                    assert " _" not in line, f"{path}: {line}"
                    assert "._" not in line, f"{path}: {line}"
                assert "._active_adapter" not in line, f"{path}: {line}"
                assert "._disable_adapters" not in line, f"{path}: {line}"
