"""Every verb of PEFT and of transformers' own adapter interface, on models of a few thousand parameters."""

import copy
import pickle

import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_jumplora._compat import PEFT
from hf_jumplora.tuner import (
    JumpLoraConfig,
    JumpLoraLayer,
    density,
    finish_adapter,
    gate_groups,
    named_layers,
    set_mix,
    set_threshold,
)


def layers(model, adapter=None):
    return [layer for _, layer in named_layers(model, adapter)]


def equal(a, b):
    return torch.equal(a.logits, b.logits)


@pytest.fixture
def base_folder(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4))


@pytest.fixture
def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


# ---- making ------------------------------------------------------------------------------------------------------


def test_new_adapter_changes_nothing(tiny_llama, ids):
    model = get_peft_model(tiny_llama(), JumpLoraConfig(r=4))
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(layers(model)) == 4  # query and value of two layers
    assert len(names) == 4 * 2 + 1
    assert all("jumplora_" in n and ".lora_" not in n for n in names)
    assert model.get_nb_trainable_parameters()[0] == 4 * 4 * 32 + 2 * 4 * (32 + 16) + 1


def test_inject_adapter_in_model(tiny_llama, gated, ids):
    model = gated()
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    config = JumpLoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    for low_cpu in (False, True):
        plain = inject_adapter_in_model(config, tiny_llama(), low_cpu_mem_usage=low_cpu)
        result = set_peft_model_state_dict(plain, state, low_cpu_mem_usage=low_cpu)
        assert not result.unexpected_keys
        assert not [k for k in result.missing_keys if "jumplora" in k]
        assert equal(plain(ids), model(ids))


def test_config_round_trip(gated, tmp_path):
    options = {"threshold_scope": "layer", "bandwidth": 0.01, "isolation": "hard", "rank_pattern": {"q_proj": 2}}
    model = gated(**options, exclude_modules=["layers.0.self_attn.v_proj"])
    model.save_pretrained(tmp_path)
    for cls in (PeftConfig, JumpLoraConfig):
        config = cls.from_pretrained(tmp_path)
        assert type(config) is JumpLoraConfig
        assert config.peft_type == "JUMPLORA"
        assert config.peft_type.value == "JUMPLORA"
        assert all(getattr(config, k) == v for k, v in options.items())
        assert config.target_modules == {"q_proj", "v_proj"}
        assert config.gate_end == 0.8
    config = model.peft_config["default"]
    for clone in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert clone.to_dict() == config.to_dict()


# ---- saving and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [False, True], ids=["training", "finished"])
@pytest.mark.parametrize("low_cpu", [False, True], ids=["", "low_cpu_mem_usage"])
def test_save_and_load(gated, tiny_llama, ids, tmp_path, finished, low_cpu):
    model = gated(mix=1.0 if finished else 0.4)
    if finished:
        finish_adapter(model, "default")
    expected = model(ids)
    model.save_pretrained(tmp_path)
    assert [p for p in tmp_path.glob("**/*") if p.suffix in (".bin", ".pt", ".pkl")] == []
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu)
    assert equal(loaded(ids), expected)
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad or p.is_meta]
    assert get_peft_model_state_dict(loaded).keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert gate_groups(loaded, "default")[0][0].mix.item() == pytest.approx(1.0 if finished else 0.4)


def test_load_to_train_on(gated, tiny_llama, ids, tmp_path):
    model = gated(mix=0.4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    grads = []
    for m in (model, loaded):
        m(ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in m.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 9
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_auto_peft_model(gated, base_folder, ids, tmp_path):
    model = gated(AutoModelForCausalLM.from_pretrained(base_folder), task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    assert equal(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")(ids), model(ids))


def test_auto_peft_model_seq2seq(gated, t5, ids, tmp_path):
    t5.save_pretrained(tmp_path / "base")
    base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    model = gated(base, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    assert equal(loaded(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids))


@pytest.mark.parametrize("finished", [False, True], ids=["training", "finished"])
def test_auto_model_with_adapter_folder(gated, base_folder, ids, tmp_path, finished):
    model = gated(AutoModelForCausalLM.from_pretrained(base_folder))
    if finished:
        finish_adapter(model, "default")
    model.save_pretrained(tmp_path / "adapter")
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()(ids), model(ids))


# ---- transformers' own interface ---------------------------------------------------------------------------------

native = pytest.mark.skipif(
    Version(MIN_PEFT_VERSION) > PEFT, reason=f"this transformers wants PEFT {MIN_PEFT_VERSION} for its own interface"
)


@native
def test_native_verbs(gated, base_folder, ids, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    expected = plain(ids).logits
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False}
    plain.add_adapter(JumpLoraConfig(**config), adapter_name="default")
    assert [n for n, p in plain.named_parameters() if p.requires_grad]
    set_threshold(plain, "default", 0.1)
    set_mix(plain, "default", 1.0)
    adapted = plain(ids).logits
    assert (adapted - expected).abs().max() > 1e-3
    plain.save_pretrained(tmp_path / "native")
    plain.disable_adapters()
    assert torch.equal(plain(ids).logits, expected)
    plain.enable_adapters()
    assert torch.equal(plain(ids).logits, adapted)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()(ids).logits, adapted)
    other = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    other.load_adapter(str(tmp_path / "native"), adapter_name="first")
    assert torch.equal(other(ids).logits, adapted)
    other.delete_adapter("first")
    assert torch.equal(other(ids).logits, expected)
    # And the same files through PEFT.
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "native")
    assert torch.equal(peft_model.eval()(ids).logits, adapted)


@native
def test_native_finish(base_folder, ids, tmp_path):
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    plain.add_adapter(JumpLoraConfig(r=4, target_modules=["q_proj"], init_weights=False), adapter_name="default")
    set_threshold(plain, "default", 0.1)
    set_mix(plain, "default", 1.0)
    live = plain(ids).logits
    finish_adapter(plain, "default", "task_000")
    torch.testing.assert_close(plain(ids).logits, live, rtol=0, atol=1e-6)
    assert plain.active_adapters() == ["task_000"]
    plain.save_pretrained(tmp_path / "native")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    assert torch.equal(loaded(ids).logits, plain(ids).logits)


def test_native_load_of_a_child_names_its_parent(gated, add_task, base_folder, tmp_path):
    """transformers does not tell where a config came from, so parents cannot be found: no child without its parents."""
    model = gated(AutoModelForCausalLM.from_pretrained(base_folder))
    finish_adapter(model, "default", "task_000")
    add_task(model, ["task_000"])
    finish_adapter(model, "default", "task_001")
    model.save_pretrained(tmp_path / "stack")
    with pytest.raises(ValueError, match="parent adapter 'task_000' is not in the model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "stack" / "task_001")
    with pytest.raises(ValueError, match="parent adapter 'task_000' is not in the model"):
        AutoModelForCausalLM.from_pretrained(base_folder).load_adapter(str(tmp_path / "stack" / "task_001"))


# ---- several adapters --------------------------------------------------------------------------------------------


def test_set_adapter_switches(gated, add_task, ids):
    model = gated()
    first = model(ids).logits
    finish_adapter(model, "default", "task_000")
    finished = model(ids).logits
    add_task(model)
    second = model(ids).logits
    model.set_adapter("task_000")
    assert torch.equal(model(ids).logits, finished)
    assert (first - finished).abs().max() < 1e-6
    model.set_adapter("default")
    assert torch.equal(model(ids).logits, second)
    assert (second - first).abs().max() > 1e-3


def test_load_adapter_under_a_name(gated, tiny_llama, ids, tmp_path):
    a, b = gated(), gated(density=0.3)
    a.save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    assert equal(model(ids), a(ids))
    model.set_adapter("b")
    assert equal(model(ids), b(ids))


def test_delete_leaves_nothing(gated, add_task, tiny_llama, ids):
    model = gated()
    finish_adapter(model, "default", "task_000")
    add_task(model, ["task_000"], isolation="hard", lora_dropout=0.1)
    model.set_adapter("task_000")
    expected = model(ids).logits
    model.delete_adapter("default")
    assert torch.equal(model(ids).logits, expected)
    assert list(model.peft_config) == ["task_000"]
    assert not [n for n in (*model.state_dict(), *dict(model.named_modules())) if "default" in n.split(".")]
    for layer in layers(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names, "frozen_peft_weight_names"):
            assert "default" not in getattr(layer, attribute), attribute


# ---- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_merge_and_unmerge(gated, tiny_llama, gpt2, ids, dtype, architecture):
    base, targets = (tiny_llama(), ["q_proj", "v_proj"]) if architecture == "llama" else (gpt2, ["c_attn"])
    model = gated(base.to(dtype), target_modules=targets)
    live = model(ids).logits
    original = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, original[n])}
    assert len(changed) == len(layers(model))
    assert all(n.endswith("base_layer.weight") for n in changed)
    torch.testing.assert_close(model(ids).logits, live, rtol=0, atol=1e-6 if dtype == torch.float32 else 3e-2)
    merged = model(ids).logits
    model.merge_adapter()  # a second time changes nothing
    assert torch.equal(model(ids).logits, merged)
    model.unmerge_adapter()
    assert all(torch.equal(p, original[n]) for n, p in model.named_parameters())
    assert torch.equal(model(ids).logits, live)
    unloaded = model.merge_and_unload()
    assert torch.equal(unloaded(ids).logits, merged)
    assert not [m for m in unloaded.modules() if isinstance(m, JumpLoraLayer)]
    assert not [n for n in unloaded.state_dict() if "jumplora" in n or "base_layer" in n]


def test_unload(gated, tiny_llama, ids):
    assert torch.equal(gated().unload()(ids).logits, tiny_llama()(ids).logits)


def test_disable_adapter(gated, tiny_llama, ids):
    model = gated()
    expected = model(ids).logits
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
        assert not [n for n, p in model.named_parameters() if p.requires_grad]
    assert torch.equal(model(ids).logits, expected)
    assert len([n for n, p in model.named_parameters() if p.requires_grad]) == 9


# ---- training ----------------------------------------------------------------------------------------------------


def gradients(model, ids):
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(gated, ids, reentrant):
    model = gated(mix=0.5)
    expected = gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients(model, ids)
    assert len(found) == 9
    assert all(torch.equal(found[n], expected[n]) for n in expected)


@pytest.mark.skipif(torch.__version__ < (2, 8), reason="torch 2.7 cannot trace transformers' own Llama in one graph")
@pytest.mark.parametrize(
    "parents", [pytest.param(False, id="alone", marks=pytest.mark.slow), pytest.param(True, id="above-a-live-parent")]
)
def test_compile_whole_model(gated, add_task, ids, parents):
    from torch._dynamo.testing import CompileCounterWithBackend

    model = gated(mix=0.5 if not parents else 1.0)
    if parents:
        finish_adapter(model, "default", "task_000")
        add_task(model, ["task_000"])
        model(ids)  # sums the parents
    expected_loss, expected = model.train()(ids, labels=ids).loss, gradients(model, ids)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    model.zero_grad()
    loss = compiled(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    for n, p in model.named_parameters():
        if n in expected:
            torch.testing.assert_close(p.grad, expected[n], rtol=1e-5, atol=1e-7)
    set_mix(model, "default", 0.7)
    compiled(ids, labels=ids)
    assert counter.frame_count == 1


def test_forward_hook_of_the_base_layer_is_called(gated, ids):
    model = gated()
    expected, calls = model(ids).logits, []
    layers(model)[0].base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)
    assert calls == [1]


def test_base_layer_that_does_more_than_multiply(tiny_llama, ids):
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    base = tiny_llama()
    attention = base.model.layers[0].self_attn
    doubled = Doubled(32, 32, bias=False)
    doubled.weight = attention.q_proj.weight
    attention.q_proj = doubled
    expected = base(ids).logits
    model = get_peft_model(base, JumpLoraConfig(r=4, target_modules=["q_proj"]))
    assert torch.equal(model(ids).logits, expected)


# ---- dtypes ------------------------------------------------------------------------------------------------------


def test_bf16_base(gated, tiny_llama, ids, tmp_path):
    model = gated(tiny_llama(torch.bfloat16))
    assert model(ids).logits.dtype == torch.bfloat16
    expected = gated()(ids).logits
    torch.testing.assert_close(model(ids).logits.float(), expected, rtol=0, atol=3e-2)
    found = gradients(model, ids)
    assert len(found) == 9
    assert all(g.dtype == torch.float32 for g in found.values())
    finish_adapter(model.eval(), "default")
    model.save_pretrained(tmp_path)
    for low_cpu in (False, True):
        loaded = PeftModel.from_pretrained(tiny_llama(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu)
        assert equal(loaded(ids), model(ids))
        assert {p.dtype for n, p in loaded.named_parameters() if "jumplora" in n} == {torch.float32}


@pytest.mark.parametrize("move", ["to", "bfloat16", "half", "double"])
def test_change_of_dtype_leaves_the_adapter(gated, add_task, move):
    model = gated()
    finish_adapter(model, "default", "task_000")
    add_task(model, ["task_000"], isolation="hard")
    before = {n: t.clone() for n, t in model.state_dict().items() if "jumplora" in n}
    supports = [layer.support(name) for layer in layers(model) for name in ("task_000", "default")]
    model = model.to(torch.bfloat16) if move == "to" else getattr(model, move)()
    assert model.base_model.model.lm_head.weight.dtype != torch.float32
    after = {n: t for n, t in model.state_dict().items() if "jumplora" in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) and after[n].dtype == before[n].dtype for n in before)
    again = [layer.support(name) for layer in layers(model) for name in ("task_000", "default")]
    assert all(torch.equal(a, b) for a, b in zip(supports, again, strict=True))


def test_autocast(gated, ids):
    model = gated(mix=0.5)
    expected = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# ---- scopes and ties ---------------------------------------------------------------------------------------------


def groups(model, adapter="default"):
    """Names of the layers that share a gate, and that all of them really hold the same tensors."""
    found = []
    for gate, members in gate_groups(model, adapter):
        assert all(m.jumplora_gate[adapter].log_tau is gate.log_tau for m in members)
        assert all(m.jumplora_gate[adapter].mix is gate.mix for m in members)
        found.append(sorted(m.layer_name for m in members))
    return sorted(found)


@pytest.mark.parametrize(("scope", "sizes"), [("global", [4]), ("block", [2, 2]), ("layer", [1, 1, 1, 1])])
def test_scopes_keep_their_ties(gated, tiny_llama, ids, tmp_path, scope, sizes):
    model = gated(threshold_scope=scope)
    expected = groups(model)
    assert [len(g) for g in expected] == sizes
    assert len([n for n, _ in model.named_parameters() if "log_tau" in n]) == len(sizes)
    taus = [gate.log_tau.item() for gate, _ in gate_groups(model, "default")]
    assert len(set(taus)) == len(sizes)
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len([k for k in saved if k.endswith("log_tau")]) == 4  # each layer's entry stands for itself
    same = [copy.deepcopy(model), copy.deepcopy(model).to(torch.float32).to("cpu")]
    same += [PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low) for low in (False, True)]
    for other in same:
        assert groups(other) == expected
        assert torch.equal(other(ids).logits, logits)
    assert groups(copy.deepcopy(model).to(torch.bfloat16)) == expected
    clone = same[0]
    gate_groups(clone, "default")[0][0].log_tau.data.fill_(5.0)
    assert [gate.log_tau.item() for gate, _ in gate_groups(model, "default")] == taus  # nothing shared with the copy


def test_t5_blocks(gated, t5, ids):
    model = gated(t5, target_modules=["q", "v"], threshold_scope="block")
    found = groups(model)
    stems = [sorted({".".join(n.split(".")[:3]) for n in g}) for g in found]
    assert stems == [["decoder.block.0"], ["decoder.block.1"], ["encoder.block.0"], ["encoder.block.1"]]
    assert [len(g) for g in found] == [4, 4, 2, 2]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(gate.log_tau.grad is not None for gate, _ in gate_groups(model, "default"))


def test_conv1d(gated, gpt2, ids, tmp_path):
    expected = copy.deepcopy(gpt2)
    fresh = copy.deepcopy(gpt2)
    model = gated(gpt2, target_modules=["c_attn", "c_proj"])
    assert model.base_model.model.transformer.h[0].attn.c_attn.transposed
    for name, layer in named_layers(model):
        assert layer.update("default").shape == (layer.out_features, layer.in_features)
        expected.get_submodule(name).weight.data += layer.update("default").T
    torch.testing.assert_close(model(ids).logits, expected.eval()(ids).logits, rtol=0, atol=1e-5)
    finish_adapter(model, "default")
    model.save_pretrained(tmp_path)
    assert equal(PeftModel.from_pretrained(fresh, tmp_path)(ids), model(ids))


# ---- options of the config ---------------------------------------------------------------------------------------


def test_rank_and_alpha_patterns(gated, tiny_llama, ids, tmp_path):
    options = {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 8}, "alpha_pattern": {"v_proj": 6}}
    model = gated(**options, lora_alpha=12)
    ranks = {n: layer.jumplora_A["default"].shape[0] for n, layer in named_layers(model)}
    scalings = {n: layer.scaling["default"] for n, layer in named_layers(model)}
    assert list(ranks.values()) == [2, 4, 2, 8]
    assert list(scalings.values()) == [6.0, 1.5, 6.0, 0.75]
    model.save_pretrained(tmp_path)
    assert equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(ids), model(ids))


def test_rslora(gated):
    assert {layer.scaling["default"] for layer in layers(gated(use_rslora=True, lora_alpha=12))} == {6.0}


def test_dropout_acts_in_training_alone(gated, ids):
    model = gated(lora_dropout=0.5)
    assert torch.equal(model(ids).logits, model(ids).logits)
    torch.testing.assert_close(model(ids).logits, gated()(ids).logits, rtol=0, atol=1e-6)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(0)
    first = model(ids).logits
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, first)


def test_modules_to_save(gated, tiny_llama, ids, tmp_path):
    model = gated(modules_to_save=["lm_head"])
    for p in model.base_model.model.lm_head.modules_to_save["default"].parameters():
        p.data *= 2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert equal(loaded(ids), model(ids))
    assert not equal(loaded(ids), gated()(ids))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers_to_transform": [1]}, ["1.q_proj", "1.v_proj"]),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, ["0.q_proj", "0.v_proj"]),
        ({"exclude_modules": ["v_proj"]}, ["0.q_proj", "1.q_proj"]),
        ({"exclude_modules": r".*layers\.0.*"}, ["1.q_proj", "1.v_proj"]),
        ({"target_modules": r".*1\.self_attn\.(k|o)_proj"}, ["1.k_proj", "1.o_proj"]),
    ],
    ids=str,
)
def test_choice_of_layers(gated, tiny_llama, ids, tmp_path, options, expected):
    model = gated(**options)
    assert [f"{n.split('.')[2]}.{n.split('.')[-1]}" for n, _ in named_layers(model)] == expected
    model.save_pretrained(tmp_path)
    assert equal(PeftModel.from_pretrained(tiny_llama(), tmp_path)(ids), model(ids))


def test_all_linear(gated):
    model = gated(target_modules="all-linear")
    assert len(layers(model)) == 14
    assert "lm_head" not in [n for n, _ in named_layers(model)]


def test_named_layers_of_an_adapter(gated):
    model = gated()
    model.add_adapter("other", JumpLoraConfig(r=4, target_modules=["o_proj"]))
    assert len(layers(model)) == 6
    assert len(layers(model, "other")) == 2
    assert len(layers(model, "nobody")) == 0
    assert density(model, "default") == pytest.approx(0.1, abs=1e-3)
