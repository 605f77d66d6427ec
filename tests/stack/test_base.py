"""The base in memory is the base that the stack names, or the run keeps a copy of it, or says no."""

import re
import warnings
from functools import partial, wraps
from pathlib import Path

import accelerate
import pytest
import torch
import toy
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5ForConditionalGeneration,
)

from hf_jumplora import load_stack
from hf_jumplora.stack import diff, merge_stack
from hf_jumplora.stack.base import check_base, describe_base
from hf_jumplora.stack.manifest import read_manifest
from hf_jumplora.stack.source import check_in_memory, differences
from hf_jumplora.stack.weights import block_sums, digest, identity, same_weight


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[3, 12, 13, 8, 14, 9]])).logits


# ---- a digest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_digest_is_of_all_bytes(dtype):
    weight = (torch.randn(37, 1021) * 100).clamp_min(0).to(dtype)
    found = digest(weight)
    assert digest(weight.clone()) == digest(weight.T.contiguous().T) == found
    for place in (0, 17_000, -1):  # of two blocks, and their end
        other = weight.clone()
        other.view(-1)[place] = (~other.view(-1)[place]) if dtype == torch.bool else other.view(-1)[place] + 1000
        assert digest(other) != found
    assert digest(weight.view(1021, 37)) != found
    assert digest(weight[torch.randperm(37)]) != found


def test_parts_of_a_larger_tensor():
    """Values that start at any byte of their storage."""
    weight = torch.randn(1001).bfloat16()
    assert digest(weight[1:]) == digest(weight[1:].clone())
    assert digest(torch.empty(0)) == digest(torch.empty(0)) != digest(torch.empty(0, 2))


def test_another_dtype_is_told_by_sums():
    """Noise of 2 % is seen, another order, another scale, and one entry that is far off; a cast is not. Stacks of
    much earlier versions have four values in place of sums."""
    torch.manual_seed(0)
    weight = torch.randn(700, 800)
    known, large, far = identity(weight), weight.clone(), weight.clone()
    large[3] *= 100  # a row of outliers hides nothing in the other parts
    far[650, 650] += 20
    assert len(known["sampled"]) == 3
    assert same_weight(identity(large), identity(large.bfloat16()))
    others = [weight + 0.02 * torch.randn(700, 800), weight.roll(1, 0), weight.flip(1), weight * 1.02, far]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert same_weight(known, identity(weight.to(dtype), known))
        assert not any(same_weight(known, identity(other.to(dtype), known)) for other in others)
    assert same_weight(identity(weight.bfloat16()), identity(weight.half()))
    assert not same_weight(known, identity(weight.view(800, 700).bfloat16()))
    assert known["sampled"] == identity(weight, {"dtype": "bfloat16"})["sampled"]
    former = {key: value for key, value in known.items() if key != "sampled"}
    assert same_weight(former, identity(far.bfloat16()))
    assert not same_weight(former, identity((weight * 1.1).bfloat16()))


def test_sums_of_a_sample():
    """Of a weight of more than 32 pieces: which ones, and that the others take no part."""
    weight = torch.randn(70, 1 << 18)
    assert len(block_sums(weight, 32)) == 8
    assert block_sums(weight, 32) == block_sums(weight[::3]) != block_sums(weight)
    weight[1] = 0
    assert block_sums(weight, 32) == block_sums(weight[::3])


def test_a_weight_known_by_an_earlier_version():
    """By a sha256 that is no longer computed, and sums of all values."""
    weight = torch.randn(1 << 19)
    former = {key: value for key, value in identity(weight).items() if key not in ("xxh3", "sampled")}
    former |= {"sha256": "0" * 64, "sums": block_sums(weight)}
    for found in (weight, weight.bfloat16()):
        assert same_weight(former, identity(found, former))
        assert not same_weight(former, identity(found.flip(0), former))


# ---- compared with the named source -------------------------------------------------------------------------------


def noise_one_entry(model):
    model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3


def noise_norm(model):
    model.model.norm.weight += 1e-3


def another_rope(model):
    model.config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def another_head_count(model):
    model.config.num_attention_heads = model.config.num_key_value_heads = 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (noise_one_entry, r"model\.layers\.1\.mlp\.down_proj\.weight has other values"),
        (noise_norm, r"model\.norm\.weight has other values"),
        (another_rope, r"config: rope_parameters is \{.*'default'.*\} there, \{.*'linear'"),
        (another_head_count, r"config: num_attention_heads is 4 there, 1 here"),
    ],
)
@torch.no_grad()
def test_what_differs(change, named, toy_base):
    model = toy.load_base(toy_base)
    assert differences(model, Path(toy_base)) == []
    assert differences(model.bfloat16(), Path(toy_base)) == []  # a cast, as `from_pretrained` casts
    model = toy.load_base(toy_base)
    change(model)
    assert re.search(named, "; ".join(differences(model, Path(toy_base))))


def test_names_and_forms_of_files(tmp_path):
    """Tied weights, a model without its head's prefix, experts that transformers joins when it loads."""
    t5 = T5ForConditionalGeneration(toy.config(True))
    LlamaModel(toy.config()).save_pretrained(tmp_path / "body")
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    experts = MixtralForCausalLM(
        MixtralConfig(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, **sizes)
    )
    for model, folder in ((t5, tmp_path / "t5"), (experts, tmp_path / "experts")):
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
        assert differences(again, folder) == []
        with torch.no_grad():
            last = [p for p in again.parameters() if p.dim() > 1][-3]
            last.view(-1)[-1] += 1
        assert len(differences(again, folder)) == 1
    assert any("experts" in key for key in load_file(tmp_path / "experts" / "model.safetensors"))
    head = LlamaForSequenceClassification.from_pretrained(tmp_path / "body")
    assert differences(head, tmp_path / "body") == ["score.weight is not in its files"]


# ---- a run --------------------------------------------------------------------------------------------------------


def test_a_copy_is_kept(toy_base, tmp_path):
    """Of a base whose first stage was merged: the stack loads, merges and goes on with the copy, here and elsewhere."""

    def merged():
        torch.manual_seed(0)
        stage = get_peft_model(toy.load_base(toy_base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        return stage.merge_and_unload()

    run = toy.make_run(merged(), tmp_path / "run", stream=toy.tasks(1))
    with pytest.warns(UserWarning, match=r"not .*q_proj\.weight has other values.*A copy in .*base is the base"):
        run.train()
    expected = logits(run.model)
    assert torch.equal(logits(load_stack(tmp_path / "run")), expected)
    assert torch.equal(logits(load_stack(tmp_path / "run", merged())), expected)
    with pytest.raises(ValueError, match=r"other weights: .*q_proj\.weight has other values; .*base_model="):
        load_stack(tmp_path / "run", toy_base)
    with pytest.raises(ValueError, match=r"other weights: .*q_proj\.weight has other values"):
        merge_stack(tmp_path / "run", tmp_path / "plain", toy_base)
    with pytest.raises(ValueError, match="other weights"):
        toy.make_run(toy.load_base(toy_base), tmp_path / "run", stream=toy.tasks(2)).train()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert torch.equal(logits(load_stack(tmp_path / "moved")), expected)
    assert merge_stack(tmp_path / "moved", tmp_path / "plain") == 4
    assert torch.equal(logits(toy.load_base(tmp_path / "plain")), expected)
    with warnings.catch_warnings():  # the same base again: nothing is said, nothing is written
        warnings.simplefilter("error", UserWarning)
        run = toy.make_run(merged(), tmp_path / "moved", stream=toy.tasks(2))
        run.record.read(run.model)


def test_the_pad_token_of_a_classifier(tmp_path):
    """A decoder's classifier reads the last other token."""
    config = toy.config()
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert differences(model, tmp_path) == []
    model.config.pad_token_id = 5
    assert differences(model, tmp_path) == ["config: pad_token_id is 0 there, 5 here"]


@pytest.mark.parametrize("kind", ["vocabulary", "compiled", "part", "offloaded", "layers", "tied", "buffer"])
def test_what_no_copy_brings_back(kind, toy_base, tmp_path):
    model = toy.load_base(toy_base)
    if kind == "vocabulary":
        model.resize_token_embeddings(100)
        said = "another vocabulary.*96 there, 100 here.*save it, and its tokenizer, with save_pretrained"
    elif kind == "compiled":
        model, said = torch.compile(model, backend="eager"), "compiled.*torch_compile=True"
    elif kind == "part":
        model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
        said = "a part of it is"
    elif kind == "offloaded":
        model.model.norm.to("meta")
        said = "model.norm.weight is not in memory: device_map"
    elif kind == "layers":
        del model.model.layers[1:]
        said = r"the base has no model\.layers\.1\..*, which its config gives it: change the config too"
    elif kind == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
        said = "are one weight, and its config says tie_word_embeddings=False"
    else:
        model.model.rotary_emb.inv_freq[1] *= 2
        said = "buffer model.rotary_emb.inv_freq of the base is not what its config gives"
    with pytest.raises(ValueError, match=said):
        toy.make_run(model, tmp_path)


def test_a_cast_buffer_is_told(toy_base):
    with pytest.warns(UserWarning, match=r"inv_freq.* was cast to torch\.bfloat16"):
        check_in_memory(toy.load_base(toy_base).bfloat16())


def doubled(self, *args, **kwargs):
    return 2 * type(self).forward(self, *args, **kwargs)


CHANGED = {  # of the first layer's feed-forward part, each without another weight, config or buffer
    "class": (lambda mlp, patch: setattr(mlp, "act_fn", torch.nn.ReLU()), r"act_fn of the base is a ReLU, .* a SiLU"),
    "hook": (lambda mlp, patch: mlp.register_forward_hook(lambda *args: args[2] * 2), "has the hook .*lambda"),
    "pre-hook": (lambda mlp, patch: mlp.register_forward_pre_hook(partial(doubled, mlp)), "the hook .*doubled"),
    "forward": (lambda mlp, patch: patch.setattr(mlp, "forward", partial(doubled, mlp)), "another forward, .*doubled"),
    "wrapped": (lambda mlp, patch: setattr(mlp, "forward", wraps(mlp.forward)(partial(doubled, mlp))), "forward"),
    "all": (lambda mlp, patch: patch.setattr(type(mlp), "forward", doubled), "has another forward, .*doubled"),
    "number": (lambda mlp, patch: setattr(mlp.down_proj, "in_features", 63), "has in_features=63, a new one 64"),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_another_module_is_told(kind, toy_base, monkeypatch):
    """Weights, config and buffers are those of the files; accelerate has put its own hooks around."""
    change, message = CHANGED[kind]
    model = toy.load_base(toy_base)
    change(model.model.layers[0].mlp, monkeypatch)
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.warns(UserWarning, match=rf"layers\.0\.mlp.*{message}"):
        check_in_memory(model)


def test_what_libraries_install_is_not_told(toy_base):
    model = toy.load_base(toy_base)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    model.train()(torch.tensor([[3, 4]]), output_hidden_states=True)  # transformers' own hooks
    prepare_model_for_kbit_training(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check_in_memory(model)


def test_a_base_without_a_name(toy_base, toy_run):
    """It is known by its weights alone; a given base is compared with them, whatever it calls itself."""
    manifest = read_manifest(toy_run.output_dir)
    assert set(manifest.base_model["weights"]) == {name for name, _ in toy.load_base(toy_base).named_parameters()}
    check_in_memory(type(toy.load_base(toy_base))(toy.config()))
    other = toy.load_base(toy_base)
    check_base(manifest, other, "here")
    check_base(manifest, other.bfloat16(), "here")
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(ValueError, match=r"here was trained on .*other weights: lm_head\.weight has other values"):
        check_base(manifest, other, "here")
    other = toy.load_base(toy_base)
    other.config.rms_norm_eps = 1e-3
    with pytest.raises(ValueError, match=r"here: the config of its base was another one: rms_norm_eps is 1e-06 there"):
        check_base(manifest, other, "here")
    assert diff(toy_run.output_dir, toy_run.output_dir)["base"] is False


def test_a_quantised_weight_is_left_out(toy_base):
    model = toy.load_base(toy_base)
    model.is_quantized = True
    q_proj = model.model.layers[0].self_attn.q_proj
    q_proj.weight = torch.nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    assert describe_base(model)["weights"]["model.layers.0.self_attn.q_proj.weight"] is None
    assert differences(model, Path(toy_base)) == []
    with torch.no_grad():
        model.lm_head.weight += 1
    assert differences(model, Path(toy_base)) == ["lm_head.weight has other values"]


def test_offloaded_weights(toy_base, toy_run, tmp_path):
    """Updates of layers on the disk stay live; nothing can be merged there."""
    places = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"lm_head": "cpu", "model.rotary_emb": "cpu"}
    model = load_stack(toy_run.output_dir, device_map=places, offload_folder=str(tmp_path))
    torch.testing.assert_close(logits(model), logits(load_stack(toy_run.output_dir)))
    with pytest.raises(ValueError, match=r"layers\.1.* is not in memory \(device_map has offloaded it\)"):
        model.merge_adapter()
    broken = load_file(toy_base + "/model.safetensors")
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    (tmp_path / "other").mkdir()
    toy.load_base(toy_base).save_pretrained(tmp_path / "other")
    save_file(broken, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight has other values"):
        load_stack(toy_run.output_dir, tmp_path / "other", device_map=places, offload_folder=str(tmp_path))
