"""What a user can get wrong, and that the message names it."""

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from hf_jumplora.tuner import JumpLoraConfig, finish_adapter


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"threshold_scope": "blok"}, "threshold_scope.*'blok'"),
        ({"threshold_update": "learnt"}, "threshold_update.*'learnt'"),
        ({"threshold_grad": "median"}, "threshold_grad.*'median'"),
        ({"isolation": "soft"}, "isolation.*'soft'"),
        ({"r": 0}, "r must be.*0"),
        ({"r": -2}, "r must be.*-2"),
        ({"bandwidth": 0.0}, "bandwidth.*0"),
        ({"lora_alpha": 0}, "lora_alpha=0 scales every update to nothing"),
        ({"gate_start": 0.8, "gate_end": 0.2}, "gate_start.*0.8 and 0.2"),
        ({"gate_start": 0.5, "gate_end": 0.5}, "gate_start < gate_end"),
        ({"gate_start": -0.1}, "gate_start"),
        ({"gate_end": 1.1}, "gate_end"),
        ({"initial_density": 0.0}, "initial_density"),
        ({"initial_density": 1.5}, "initial_density.*1.5"),
        ({"target_density": 2.0, "threshold_update": "density"}, "target_density.*2"),
        ({"target_density": 0.1}, "target_density needs threshold_update='density'"),
        ({"isolation": "hard", "gate": False}, "isolation='hard'.*gate=True"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_option(options, named):
    with pytest.raises(ValueError, match=named):
        JumpLoraConfig(**options)


def test_rank_larger_than_the_layer(tiny_llama):
    with pytest.raises(ValueError, match=r"r = 17 is larger than layer model.layers.0.self_attn.v_proj \(16 x 32\)"):
        get_peft_model(tiny_llama(), JumpLoraConfig(r=17, target_modules=["v_proj"]))


def test_rank_zero_in_the_pattern(tiny_llama):
    with pytest.raises(ValueError, match=r"r = 0 of layer .*q_proj"):
        get_peft_model(tiny_llama(), JumpLoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 0}))


def test_target_that_matches_nothing_lists_near_names(tiny_llama):
    with pytest.raises(ValueError, match=r"q_pro.*Near names: .*q_proj"):
        get_peft_model(tiny_llama(), JumpLoraConfig(r=4, target_modules=["q_pro"]))


def test_target_far_from_everything_lists_all_linear_layers(tiny_llama):
    with pytest.raises(ValueError, match="down_proj, gate_proj"):
        get_peft_model(tiny_llama(), JumpLoraConfig(r=4, target_modules=["xxxx"]))


def test_target_that_is_not_linear(tiny_llama):
    with pytest.raises((TypeError, ValueError), match="embed_tokens is a Embedding; only linear"):
        get_peft_model(tiny_llama(), JumpLoraConfig(r=4, target_modules=["embed_tokens"]))


BAD_NAMES = [
    "0",
    "task 1",
    "task.0",
    "_task",
    "",
    "layers",
    "q_proj",
    "model",
    "mix",
    "log_tau",
    "jumplora_A",
    "weight",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_adapter_name(tiny_llama, gated, name):
    with pytest.raises(ValueError, match="adapter name"):
        get_peft_model(tiny_llama(), JumpLoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name)
    model = gated()
    with pytest.raises(ValueError, match="adapter name"):
        model.add_adapter(name, JumpLoraConfig(r=4, target_modules=["q_proj"]))
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="adapter name"):
        finish_adapter(model, "default", name)
    assert model.peft_config["default"].support is None  # refused before anything was changed


@pytest.mark.parametrize("name", ["default", "task_000", "agnews", "task-1", "a"])
def test_good_adapter_name(tiny_llama, ids, name):
    model = get_peft_model(tiny_llama(), JumpLoraConfig(r=4, target_modules=["q_proj"]), adapter_name=name)
    assert model.active_adapter == name
    assert torch.isfinite(model(ids).logits).all()


def test_mixed_batches(gated, ids):
    with pytest.raises(NotImplementedError, match="adapter_names="):
        gated()(ids, adapter_names=["default", "__base__"])


def test_mixed_model(tiny_llama):
    with pytest.raises(ValueError, match=r"(?i)jumplora"):
        get_peft_model(tiny_llama(), JumpLoraConfig(r=4, target_modules=["q_proj"]), mixed=True)


def test_name_taken_by_another_package(monkeypatch):
    from peft import LoraConfig, mapping

    from hf_jumplora.tuner import register

    register()  # a second time changes nothing
    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "JUMPLORA", LoraConfig)
    with pytest.raises(RuntimeError, match="JUMPLORA"):
        register()


def test_experts_that_are_no_linear_layers():
    """transformers 5 keeps experts as 3D parameters: "all-linear" says what share of the weights it leaves out."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    make = lambda: MixtralForCausalLM(MixtralConfig(**sizes))  # noqa: E731
    with pytest.warns(UserWarning, match=r"adapts linear layers alone: 79% of the weights are experts .*gate_up_proj"):
        get_peft_model(make(), JumpLoraConfig(r=2, target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(make(), JumpLoraConfig(r=2, target_modules=["q_proj"]))
