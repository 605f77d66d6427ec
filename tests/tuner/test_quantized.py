"""Bases quantised by bitsandbytes: the layer against the specification on the dequantised weight, runs, merging."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import toy
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from hf_jumplora import ContinualRun, JumpLoraConfig, load_stack
from hf_jumplora.cli import main
from hf_jumplora.ops.naive import gated_linear_naive
from hf_jumplora.stack import merge_stack, switch_tasks
from hf_jumplora.stack.base import describe_base, differing_weights
from hf_jumplora.stack.source import differences
from hf_jumplora.tuner import finish_adapter, fold_finished, named_layers, set_mix, set_threshold


bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
NESTED = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float32, bnb_4bit_use_double_quant=True
)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
IDS = torch.tensor([[3, 12, 13, 8, 14, 9], [4, 15, 16, 8, 17, 9]])


def quantised(folder, config=NF4):
    return toy.load_base(folder, quantization_config=config)


@pytest.fixture(scope="module")
def straight(toy_base, tmp_path_factory):
    """A finished run of two tasks over a 4-bit base. Read only."""
    run = toy.make_run(quantised(toy_base), tmp_path_factory.mktemp("straight"), stream=toy.tasks(2))
    run.train()
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def adapters(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("task_*/a*")}


def bits(model):
    """Every stored weight of the model's quantised layers, as it lies in memory."""
    return [p.data.clone() for p in model.parameters() if type(p).__name__ in ("Params4bit", "Int8Params")]


# ---- one layer ---------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.linear = layer

    def forward(self, x):
        return self.linear(x)


def layer_of(kind, out_features=40, in_features=192):
    """(quantised linear layer with a bias, its weight back in float64)."""
    torch.manual_seed(0)
    weight = 0.2 * torch.randn(out_features, in_features)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(in_features, out_features, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        kind, _, nested = kind.partition("-")
        layer = bnb.nn.Linear4bit(in_features, out_features, compute_dtype=torch.float32, quant_type=kind)
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type=kind, compress_statistics=bool(nested), module=layer
        )
    layer = layer.to("cpu")
    if kind == "int8":
        back = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    else:
        back = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double()
    assert 0 < (back - weight).abs().max() < 0.2  # it is quantised
    return layer, back


@pytest.mark.parametrize("past", ["none", "sparse", "dense"])
@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("fp4-nested", 1e-5), ("int8", 2e-3)])
def test_layer(kind, tolerance, past, relative_error):
    """Output and gradients for x, A, B and log_tau, on two finished tasks, masked by hard isolation: those of the
    specification over the dequantised weight in float64 (8 bits: bitsandbytes multiplies in half precision)."""
    layer, weight = layer_of(kind)
    options = {"r": 4, "target_modules": ["linear"], "init_weights": False, "lora_alpha": 8}
    before, parents = torch.zeros_like(weight), []
    model = None
    if past != "none":
        for number, density in enumerate((0.01, 0.01) if past == "sparse" else (0.2, 0.3)):
            config = JumpLoraConfig(parent_adapters=list(parents), isolation="hard", **options)
            if model is None:
                model = get_peft_model(OneLayer(layer), config)
            else:
                model.add_adapter("default", config)
                model.set_adapter("default")
            set_threshold(model, "default", density)
            set_mix(model, "default", 1.0)
            parents.append(f"task_{number:03d}")
            finish_adapter(model, "default", parents[-1])
            before += dict(named_layers(model))["linear"].update(parents[-1]).double()
    config = JumpLoraConfig(parent_adapters=parents, isolation="hard" if parents else "none", **options)
    if model is None:
        model = get_peft_model(OneLayer(layer), config)
    else:
        model.add_adapter("default", config)
        model.set_adapter("default")
    set_threshold(model, "default", 0.2)
    set_mix(model, "default", 0.4)
    tuned = dict(named_layers(model))["linear"]
    gate, scaling = tuned.gate("default"), tuned.scaling["default"]
    gate.log_tau.data += 1e-4  # away from the entry that is the quantile
    tuned.configs["default"].bandwidth = 0.05
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 7, 192, generator=generator)
    grad_y = torch.randn(3, 7, 40, generator=generator)

    leaves = [x.clone().requires_grad_(), tuned.jumplora_A["default"], tuned.jumplora_B["default"], gate.log_tau]
    y = model.train()(leaves[0])
    found = [y, *torch.autograd.grad(y, leaves, grad_y)]
    if parents:
        (total,) = tuned.finished.past.values()  # one sum, whatever the number of tasks
        assert len(total) == (3 if past == "sparse" else 1)

    free = tuned.free_mask("default")
    assert (free is not None and not free.all()) is bool(parents)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    bias = layer.bias.detach().double()
    y = gated_linear_naive(
        wide[0],
        weight,
        bias,
        *wide[1:],
        scaling=scaling,
        mix=0.4,
        bandwidth=0.05,
        free=None if free is None else free.double(),
    )
    y = y + wide[0] @ before.T
    expected = [y, *torch.autograd.grad(y, wide, grad_y.double())]
    for name, a, b in zip(("y", "x", "A", "B", "log_tau"), found, expected, strict=True):
        assert relative_error(a, b) < tolerance, name


def test_bf16_activations(relative_error):
    """Factors, threshold and the sum of the past stay float32 under bf16 activations and products."""
    layer, weight = layer_of("nf4")
    layer.compute_dtype = torch.bfloat16
    config = JumpLoraConfig(r=4, target_modules=["linear"], init_weights=False)
    model = get_peft_model(OneLayer(layer), config)
    set_threshold(model, "default", 0.2)
    set_mix(model, "default", 1.0)
    x = torch.randn(5, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    y = model(x)
    assert y.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if "jumplora" in n} == {torch.float32}
    tuned = dict(named_layers(model))["linear"]
    expected = x.double() @ (weight + tuned.update("default").double()).T + layer.bias.double()
    assert relative_error(y, expected) < 1e-2


def test_weights_are_not_repacked_for_inference_on_a_cpu(relative_error):
    """On CPUs with AVX512-BF16 bitsandbytes would do so in the first pass in evaluation mode; after it there are no
    gradients for what is before the layer. The switch is a flag of the layer, set here as such a CPU sets it."""
    layer, weight = layer_of("nf4", out_features=64)
    layer.support_avx512bf16_for_cpu = True
    stored = layer.weight.data.clone()
    model = get_peft_model(OneLayer(layer), JumpLoraConfig(r=4, target_modules=["linear"]))
    with torch.no_grad():
        y = model.eval()(torch.ones(2, 192))
    assert relative_error(y, torch.ones(2, 192).double() @ weight.T + layer.bias.double()) < 1e-5
    assert torch.equal(layer.weight.data, stored)

    layer, _ = layer_of("nf4", out_features=64)
    layer.weight.data, _ = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    with pytest.raises(ValueError, match=r"repacked the 4-bit weights of linear .* load the base model again"):
        get_peft_model(OneLayer(layer), JumpLoraConfig(r=4, target_modules=["linear"]))


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "method", "adapter"),
    [
        (NF4, "jumplora", {"isolation": "hard"}),
        (NESTED, "jumplora-ella", {}),
        (NF4, "jumplora-best", {}),  # runs the model by itself
        (NF4, "olora", {}),  # reads the factors of the past: they are kept as adapters
        (INT8, "jumplora-ella", {"isolation": "hard"}),
    ],
    ids=["nf4-hard", "fp4-nested-ella", "nf4-best", "nf4-olora", "int8-ella-hard"],
)
def test_two_tasks(config, method, adapter, toy_base, tmp_path):
    """The base's bits stay as they are, the second task stands on the first, the stack loads as what was evaluated."""
    base = quantised(toy_base, config)
    stored = bits(base)
    assert len(stored) == 14
    run = toy.make_run(base, tmp_path, method, stream=toy.tasks(2), adapter=adapter)
    run.train()
    assert all(layer.quantization_backend is not None for _, layer in named_layers(run.model))
    assert all(torch.equal(a, b) for a, b in zip(bits(run.model), stored, strict=True))
    assert not any(layer.merged_adapters for _, layer in named_layers(run.model))
    loaded = load_stack(tmp_path, quantization_config=config)
    assert torch.equal(logits(loaded), logits(run.model))
    by_peft = PeftModel.from_pretrained(quantised(toy_base, config), tmp_path, subfolder="task_001")
    assert torch.equal(logits(by_peft), logits(run.model))
    first = load_stack(tmp_path, tasks=["size"], quantization_config=config)
    assert not torch.allclose(logits(first), logits(run.model), atol=1e-3)
    switch_tasks(loaded, ["size"])
    assert torch.equal(logits(loaded), logits(first))
    merge_stack(tmp_path, tmp_path / "merged", toy_base)
    if adapter:
        for _, layer in named_layers(run.model):
            assert not (layer.support("task_000") & layer.support("task_001")).any()


def test_run_is_that_of_the_dequantised_base(straight, toy_base, tmp_path, relative_error):
    """The same run over a float32 base of the same weights, where finished tasks are merged, learns the same."""
    model, base = toy.load_base(toy_base), quantised(toy_base)
    for name, module in base.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            model.get_submodule(name).weight.data.copy_(weight)
    run = toy.make_run(model, tmp_path, stream=toy.tasks(2))
    result = run.train().metrics
    theirs = dict(named_layers(straight.model))
    for name, layer in named_layers(run.model):
        for task in ("task_000", "task_001"):
            assert relative_error(layer.jumplora_A[task], theirs[name].jumplora_A[task]) < 1e-4
            assert relative_error(layer.jumplora_B[task], theirs[name].jumplora_B[task]) < 1e-4
    assert result["matrix"] == json.loads((straight.output_dir / "metrics.json").read_text())["matrix"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, straight, toy_base, tmp_path, relative_error):
    """After k-bit preparation: nothing but memory changes, in the second task too."""
    base = prepare_model_for_kbit_training(quantised(toy_base), use_gradient_checkpointing=False)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run = toy.make_run(base, tmp_path, stream=toy.tasks(2), **options)
    run.train()
    assert relative_error(logits(run.model), logits(straight.model)) < 1e-5
    theirs = dict(named_layers(straight.model))
    for name, layer in named_layers(run.model):
        assert relative_error(layer.jumplora_B["task_001"], theirs[name].jumplora_B["task_001"]) < 1e-4


def test_kbit_preparation_of_a_bf16_model(toy_base, tmp_path):
    """Norms and embeddings in float32: the run trains, and loads over a base prepared in the same way."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)

    def base():
        model = LlamaForCausalLM.from_pretrained(toy_base, dtype=torch.bfloat16, quantization_config=config)
        return prepare_model_for_kbit_training(model)

    run = toy.make_run(base(), tmp_path, stream=toy.tasks(2), gradient_checkpointing=True)
    run.train()
    assert {p.dtype for n, p in run.model.named_parameters() if "norm" in n} == {torch.float32}
    assert torch.equal(logits(load_stack(tmp_path, base())), logits(run.model))


def test_killed_and_started_again(toy_base, tmp_path):
    """In the ramp of the second task, over a base whose own files are quantised."""
    folder = tmp_path / "base"
    quantised(toy_base).save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    restart = {"save_strategy": "steps", "save_steps": 3}
    toy.killed(str(folder), str(tmp_path / "out"), "jumplora", "step task_001 4", restart)
    toy.make_run(str(folder), tmp_path / "out", stream=toy.tasks(3), **restart).train()
    toy.make_run(str(folder), tmp_path / "whole", stream=toy.tasks(3), **restart).train()
    assert adapters(tmp_path / "out").keys() == adapters(tmp_path / "whole").keys()
    weights = [name for name in adapters(tmp_path / "out") if name.endswith("safetensors")]
    assert len(weights) == 3
    for name in weights:
        assert adapters(tmp_path / "out")[name] == adapters(tmp_path / "whole")[name]


def test_quantisation_is_a_setting_of_the_run(straight, toy_base, tmp_path):
    """Another quantisation is another base: refused by name. A run that goes on from the stack loads it as it was."""
    folder = shutil.copytree(straight.output_dir, tmp_path / "run")
    with pytest.raises(ValueError, match=r"quantization: .*nf4.* there, None now"):
        toy.make_run(toy_base, folder, stream=toy.tasks(3)).train()
    with pytest.raises(ValueError, match=r"quantization: .*nf4.* there, .*fp4.* now"):
        toy.make_run(quantised(toy_base, NESTED), folder, stream=toy.tasks(3)).train()
    run = ContinualRun.from_stack(straight.output_dir, toy.tasks(3)[2:], tmp_path / "more", use_cpu=True, report_to=[])
    run.train()
    assert run.model.get_base_model().is_loaded_in_4bit
    toy.make_run(quantised(toy_base), folder, stream=toy.tasks(3)).train()
    name = "task_002/adapter_model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "more" / name).read_bytes()
    assert "quantised during training (`bitsandbytes`, 4 bit, nf4)" in (folder / "README.md").read_text()


def test_zero_shot_row_of_a_task_with_its_own_metric(toy_base, tmp_path):
    """The Trainer refuses to take a quantised model without an adapter, even for evaluation."""
    from datasets import Dataset

    from hf_jumplora import Task

    rows = torch.randint(3, 30, (32, 6), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": r, "labels": r} for r in rows]

    def compute_metrics(prediction):
        return {"mean": prediction.predictions.mean()}

    task = Task("a", rows, Dataset.from_list(rows[:8]), compute_metrics, metric="mean")
    run = toy.make_run(quantised(toy_base), tmp_path, stream=[task])
    # With gradients: without, bitsandbytes repacks for some processors, which fails for layers as small as these.
    expected = quantised(toy_base)(torch.tensor([r["input_ids"] for r in rows[:8]])).logits.mean().item()
    assert run.evaluate() == {"a": pytest.approx(expected, rel=1e-5)}
    assert type(run.model) is LlamaForCausalLM
    assert run.train().metrics["matrix"][0] == [pytest.approx(expected, rel=1e-5)]


def test_sfttrainer(toy_base, tmp_path):
    """TRL casts what it trains over a quantised base to bf16; ours stays float32."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from hf_jumplora import ContinualSFTTrainer, Task

    texts = Dataset.from_dict({"text": [row["sentence"] for row in toy.rows(0, 32)]})
    args = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        bf16=False, disable_tqdm=True, max_length=16,
    )  # fmt: skip
    run = ContinualRun(
        quantised(toy_base), [Task("a", texts), Task("b", texts)], "jumplora-ella", args, toy.tokenizer(),
        trainer_cls=ContinualSFTTrainer, adapter_config=JumpLoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    run.train()
    loaded = load_stack(tmp_path, quantization_config=NF4)
    assert torch.equal(logits(loaded), logits(run.model))
    assert all(layer.jumplora_A["task_001"].dtype == torch.float32 for _, layer in named_layers(loaded))


# ---- which base it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [NF4, NESTED, INT8], ids=["nf4", "fp4-nested", "int8"])
def test_quantised_weights_are_compared(config, toy_base, tmp_path):
    """With the files they were quantised from, with files of them, and with a stack's: quantised alike, differently
    and not at all."""
    base = quantised(toy_base, config)
    assert differences(base, Path(toy_base)) == []
    base.save_pretrained(tmp_path)
    assert differences(base, tmp_path) == differences(toy.load_base(str(tmp_path)), tmp_path) == []
    known = describe_base(base)["weights"]
    others = [toy.load_base(toy_base), quantised(toy_base, INT8), quantised(toy_base, NF4)]
    for other in others:
        found = describe_base(other)["weights"]
        assert differing_weights(known, found) == differing_weights(found, known) == []

    config = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False, layers_to_transform=[1])
    merged = get_peft_model(base, config).merge_and_unload()
    name = "model.layers.1.self_attn.k_proj.weight"
    for folder in (Path(toy_base), tmp_path):
        (told,) = differences(merged, folder)
        assert told.startswith(f"{name} has other values (as ")
    assert differing_weights(known, describe_base(merged)["weights"]) == [f"{name} has other values"]
    with torch.no_grad():
        others[0].get_submodule(name.removesuffix(".weight")).weight.neg_()
    assert differing_weights(known, describe_base(others[0])["weights"]) == [f"{name} has other values"]


def test_ways_to_store_and_to_name_weights(toy_base, tmp_path):
    """4 bits in a float's place, as FSDP wants them; names that transformers changes when it loads; no sums."""
    floats = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.bfloat16)
    quantised(toy_base, floats).save_pretrained(tmp_path / "floats")
    base = toy.load_base(str(tmp_path / "floats"))
    assert differences(base, tmp_path / "floats") == []
    next(m for m in base.modules() if isinstance(m, bnb.nn.Linear4bit)).weight.data.view(torch.uint8)[:9] ^= 1
    assert len(differences(base, tmp_path / "floats")) == 1
    known = {name: {**entry, "sums": []} for name, entry in describe_base(toy.load_base(toy_base))["weights"].items()}
    assert differing_weights(known, describe_base(quantised(toy_base))["weights"]) == []

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text, vision = {"vocab_size": 96, **sizes}, {"image_size": 32, "patch_size": 16, **sizes}
    parts = {"text_config": LlamaConfig(**text).to_dict(), "vision_config": CLIPVisionConfig(**vision).to_dict()}
    config = LlavaConfig(**parts, image_token_index=95)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    for kind in (NF4, INT8):
        base = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", quantization_config=kind)
        assert differences(base, tmp_path / "llava") == []


def test_gpt2_is_transposed(tmp_path):
    """When it is quantised; its files are not."""
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 64, "vocab_size": 96}
    GPT2LMHeadModel(GPT2Config(bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(tmp_path)
    whole = GPT2LMHeadModel.from_pretrained(tmp_path)
    for config in (NF4, INT8):
        base = GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config)
        assert differences(base, tmp_path) == []
        assert differing_weights(describe_base(whole)["weights"], describe_base(base)["weights"]) == []


def test_a_stage_merged_into_a_quantised_base_is_refused(toy_base, tmp_path):
    """Nothing would bring it back when the stack is loaded, and a quantised base is not copied."""
    stage = get_peft_model(quantised(toy_base), LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match=r"k_proj\.weight has other values \(as nf4.*quantised.*save_pretrained"):
        toy.make_run(stage.merge_and_unload(), tmp_path, stream=toy.tasks(1)).train()


# ---- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [NF4, INT8], ids=["nf4", "int8"])
def test_merging_is_refused(config, straight, toy_base):
    """Every way into the weights says what to do instead, and changes nothing."""
    model = load_stack(straight.output_dir, quantization_config=config)
    stored, before = bits(model), logits(model)
    advice = r"is quantised \(bnb . ?bit\).*load the base model in bf16 or float32 and merge there"
    for attempt in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=advice):
            attempt()
    with pytest.raises(ValueError, match=advice):
        load_stack(straight.output_dir, quantization_config=config, merge=True)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), stored, strict=True))
    fold_finished(model, ["task_000"])
    with pytest.raises(ValueError, match=advice):
        model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_model_with_some_layers_quantised(straight, toy_base):
    """Finished tasks are merged into the float layers alone, and a merge of all leaves every weight as it was."""
    skip = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "q_proj"])
    model = load_stack(straight.output_dir, quantization_config=skip)
    for name, layer in named_layers(model):
        assert layer.merged_adapters == (["task_000", "task_001"] if "q_proj" in name else [])
    before = logits(model)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-5)
    weights = [layer.base_layer.weight.data.clone() for _, layer in named_layers(model)]
    with pytest.raises(ValueError, match=r"v_proj is quantised"):
        model.merge_and_unload()
    after = [layer.base_layer.weight.data for _, layer in named_layers(model)]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))


def test_what_the_error_says_works(straight, toy_base, tmp_path, capsys):
    """`hf-jumplora merge` into a quantised folder is refused; into the float base it gives W + the updates."""
    folder = tmp_path / "base"
    quantised(toy_base).save_pretrained(folder)
    line = ["merge", str(straight.output_dir), "--out", str(tmp_path / "out"), "--base_model"]
    assert main([*line, str(folder)]) == 2
    assert "is quantised: merging would quantise the updates away. Pass the base in bf16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*line, toy_base]) == 0
    merged, base = LlamaForCausalLM.from_pretrained(tmp_path / "out"), toy.load_base(toy_base)
    for name, layer in named_layers(straight.model):
        expected = base.get_submodule(name).weight + layer.total_update(["task_000", "task_001"])
        assert torch.equal(merged.get_submodule(name).weight, expected)
