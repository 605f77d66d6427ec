"""Where PEFT's own tests found a difference: unloading, ties, errors and warnings are PEFT's; overflows are noticed."""

import warnings

import pytest
import torch
import toy
from peft import get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import TrainerCallback

from hf_jumplora import JumpLoraConfig, finish_adapter
from hf_jumplora.tuner import gate_groups, named_layers, set_threshold


def test_no_method_hides_one_of_torch(gated):
    """`_version` of a module goes into its checkpoint, and a method there took what it hung on along."""
    metadata = gated().state_dict()._metadata
    assert {type(entry["version"]) for entry in metadata.values()} == {int}


# ---- unloading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge", [False, True])
def test_unload_with_trained_tokens(merge, tiny_llama, ids):
    """The base comes back with plain modules; merged, it has the new rows and the update."""
    config = JumpLoraConfig(
        target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]}, init_weights=False, gate=False
    )
    before = tiny_llama()(ids).logits
    model = get_peft_model(tiny_llama(), config)
    wrapper = model.base_model.model.model.embed_tokens
    with torch.no_grad():
        wrapper.token_adapter.trainable_tokens_delta["default"].fill_(0.5)
    expected = model.eval()(ids).logits
    base = model.merge_and_unload() if merge else model.unload()
    assert type(base.model.embed_tokens) is nn.Embedding
    assert not list(named_layers(base))
    torch.testing.assert_close(base.eval()(ids).logits, expected if merge else before)
    assert torch.all(base.model.embed_tokens.weight[1:3] == 0.5) == merge


# ---- ties ---------------------------------------------------------------------------------------------------------


def test_a_tie_is_one_weight_in_two_modules(tiny_llama):
    """Also when both are adapted, or the other module is the very same object elsewhere."""
    both = tiny_llama()
    both.model.layers[1].self_attn.q_proj.weight = both.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ValueError, match=r"q_proj is that of .*layers\.0\.self_attn\.q_proj too \(tied\)"):
        get_peft_model(both, JumpLoraConfig(target_modules=["q_proj"]))
    elsewhere = tiny_llama()
    elsewhere.extra = nn.Sequential(elsewhere.model.layers[0].self_attn.q_proj)
    with pytest.raises(ValueError, match=r"q_proj is that of extra\.0 too \(tied\)"):
        get_peft_model(elsewhere, JumpLoraConfig(target_modules=["q_proj"]))


def test_one_module_under_two_names_is_no_tie(tiny_llama, ids):
    """Nor is a wrapper around the base, or a second adapter under another root."""
    base = tiny_llama()
    base.alias = base.model.layers[0]
    model = get_peft_model(base, JumpLoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", JumpLoraConfig(target_modules=["q_proj"]))
    model(ids)

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.config = inner.config

    outer = Outer(tiny_llama())
    get_peft_model(outer.inner, JumpLoraConfig(target_modules=["q_proj"]))
    get_peft_model(outer, JumpLoraConfig(target_modules=["q_proj"]), "second")


# ---- errors and warnings ------------------------------------------------------------------------------------------


def test_no_matching_module_keeps_its_type(gated):
    """For the first adapter and for a second one, whose near names are those of the base model."""
    with pytest.raises(NoMatchingPeftModuleError, match=r"Near names: .*q_proj"):
        gated(target_modules=["q_pro"], gate=False)
    with pytest.raises(NoMatchingPeftModuleError, match="Near names") as caught:
        gated().add_adapter("second", JumpLoraConfig(target_modules=["q_pro"]))
    assert "q_proj" in str(caught.value)
    assert "base_layer" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "`layers_to_transform` cannot be used"),
        ({"target_modules": "all-linear", "layers_pattern": "layers"}, "`layers_pattern` cannot be used"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_layers_to_transform_as_in_lora_config(options, message):
    with pytest.raises(ValueError, match=message):
        JumpLoraConfig(**options)
    JumpLoraConfig(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="layers")


def test_merging_twice_warns(gated, add_task):
    """As PEFT does, and only when it is asked for through PEFT: the stack merges task by task."""
    model = gated()
    finish_adapter(model, "default", "task_000")
    add_task(model, ["task_000"])
    finish_adapter(model, "default", "task_001")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter(["task_000"])
    with pytest.warns(UserWarning, match="additionally merging task_001"):
        model.merge_adapter(["task_001"])
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter(["task_000"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, layer in named_layers(model):
            layer.finished.merge(["task_000", "task_001"])
            assert layer.merged_adapters == ["task_000", "task_001"]


def test_ignored_autocast_is_said(tiny_llama):
    with pytest.warns(UserWarning, match="autocast_adapter_dtype=False is ignored: JumpLoRA adapters are float32"):
        model = get_peft_model(
            tiny_llama(torch.bfloat16), JumpLoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False
        )
    assert all(layer.jumplora_A["default"].dtype == torch.float32 for _, layer in named_layers(model))


# ---- overflows ----------------------------------------------------------------------------------------------------


def test_safe_merge_looks_at_the_rounded_weight(gated, tiny_llama):
    """An update that float32 can hold and float16 cannot. Nothing is changed."""
    model = gated(tiny_llama(torch.float16), gate=False)
    layer = next(layer for _, layer in named_layers(model))
    with torch.no_grad():
        layer.jumplora_A["default"].fill_(1e3)
        layer.jumplora_B["default"].fill_(1e3)
    assert torch.isfinite(layer.get_delta_weight("default")).all()
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert layer.merged_adapters == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100.0])
def test_a_threshold_that_overshoots_is_no_task(value, gated):
    """exp(100) is no float32. A and B are finite, and the support would be empty."""
    model = gated()
    ((gate, _),) = gate_groups(model, "default")
    gate.log_tau.data.fill_(value)
    with pytest.raises(FloatingPointError, match=r"the threshold of adapter 'default' .*has diverged: log_tau is"):
        finish_adapter(model, "default", "task_000")
    set_threshold(model, "default", 0.1)
    finish_adapter(model, "default", "task_000")


def test_training_stops_at_such_a_threshold(toy_base, tmp_path):
    """At the next log, in the task in which it happened."""

    class Overshoot(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                for gate, _ in gate_groups(model, "default"):
                    gate.log_tau.data.fill_(float("nan"))

    run = toy.make_run(toy_base, tmp_path, stream=toy.tasks(1), callbacks=[Overshoot()], logging_steps=1)
    with pytest.raises(FloatingPointError, match=r"has diverged: log_tau is nan.*Lower gate_learning_rate"):
        run.train()
    assert not (tmp_path / "stack.json").exists()
