"""The implicit stack: a task on top of frozen parents, finished, saved, loaded, merged."""

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from hf_jumplora.tuner import JumpLoraConfig, density, finish_adapter, fold_finished, named_layers, set_mix


@pytest.fixture
def stack(gated, add_task):
    """task_000, task_001 (on top of it) and task_002 (on top of both), all finished. Active: task_002."""

    def make(base=None, **options):
        model = gated(base, **options)
        finish_adapter(model, "default", "task_000")
        for k in (1, 2):
            add_task(model, [f"task_{i:03d}" for i in range(k)], seed=1 + k, **options)
            finish_adapter(model, "default", f"task_{k:03d}")
        return model

    return make


def layers(model):
    return [layer for _, layer in named_layers(model)]


def weights(model):
    return [layer.get_base_layer().weight.detach().clone() for layer in layers(model)]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_order_of_the_closure(stack):
    layer = layers(stack())[0]
    everything = ["task_000", "task_001", "task_002"]
    assert layer.closure(["task_002"]) == everything
    assert layer.closure(["task_002", "task_001"]) == everything
    assert layer.closure(["task_001"]) == everything[:2]
    assert layer.closure(["unknown"]) == []


def test_output_is_the_sum_of_the_updates(stack, tiny_llama, ids):
    model = stack()
    dense = tiny_llama()
    for name, layer in named_layers(model):
        total = sum(layer.update(task) for task in ("task_000", "task_001", "task_002"))
        dense.get_submodule(name).weight.data += total
        assert (layer.update("task_001") != 0).sum() == layer.support("task_001").sum()
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=1e-6)


def test_only_the_child_is_trained(stack, add_task, ids):
    model = add_task(stack(), ["task_002"])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default" in n for n in trained)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained  # all of it, the threshold included


@pytest.mark.parametrize("again", ["set_adapter", "disable_adapter", "set_requires_grad"])
def test_finished_adapters_stay_frozen(stack, again):
    model = stack()
    if again == "set_adapter":
        model.set_adapter("task_001")
    elif again == "disable_adapter":
        with model.disable_adapter():
            pass
    else:
        model.set_requires_grad("task_001", True)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]


def test_finished_adapter_cannot_be_loaded_for_training(stack, tiny_llama, tmp_path):
    stack().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"finished.*parent_adapters"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="task_000", is_trainable=True)


@pytest.mark.parametrize("training_mode", [False, True])
def test_parents_without_gate_have_no_dropout(gated, add_task, ids, training_mode):
    model = gated(gate=False, lora_dropout=0.5)
    finish_adapter(model, "default", "task_000")
    add_task(model, ["task_000"], init_weights=True, gate=False)
    model.train(training_mode)
    torch.manual_seed(0)
    first = model(ids).logits
    torch.manual_seed(5)
    assert torch.equal(first, model(ids).logits)


# ---- saving and loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu", [False, True])
@pytest.mark.parametrize("by", ["folder", "subfolder"])
def test_child_brings_its_parents(stack, tiny_llama, ids, tmp_path, low_cpu, by):
    model = stack()
    model.save_pretrained(tmp_path)
    where = {"subfolder": "task_002"} if by == "subfolder" else {}
    path = tmp_path if where else tmp_path / "task_002"
    loaded = PeftModel.from_pretrained(tiny_llama(), path, low_cpu_mem_usage=low_cpu, **where)
    assert set(loaded.peft_config) == {"default", "task_000", "task_001"}
    assert loaded.active_adapter == "default"
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not [n for n, p in loaded.named_parameters() if p.requires_grad or p.is_meta]


def test_child_added_to_a_model_without_its_parents(stack, tiny_llama, ids, tmp_path):
    model = stack()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="task_000", adapter_name="task_000")
    loaded.load_adapter(tmp_path, "task_002", subfolder="task_002")
    loaded.set_adapter("task_002")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_training_goes_on_above_a_loaded_stack(stack, add_task, tiny_llama, ids, tmp_path):
    model = stack()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="task_002", adapter_name="task_002")
    for m in (model, loaded):
        add_task(m, ["task_002"])
        m(ids, labels=ids).loss.backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, loaded)]
    assert grads[0].keys() == grads[1].keys()
    assert grads[0]
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


def test_missing_parent_is_named(stack, tiny_llama, tmp_path):
    import shutil

    stack().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "task_001")
    with pytest.raises(ValueError, match="on top of 'task_001', which cannot be loaded"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="task_002")
    with pytest.raises(ValueError, match="on top of 'task_001', which cannot be loaded"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "task_002")


def test_parent_that_is_not_in_the_model(gated):
    with pytest.raises(ValueError, match="parent adapter 'task_009' is not in the model"):
        gated().add_adapter("child", JumpLoraConfig(r=4, target_modules=["q_proj"], parent_adapters=["task_009"]))


def test_parent_cannot_be_deleted_before_its_children(stack, ids):
    model = stack()
    expected = model(ids).logits
    with pytest.raises(ValueError, match=r"'task_000' is a parent of \['task_001', 'task_002'\]"):
        model.delete_adapter("task_000")
    assert "task_000" in model.peft_config
    assert torch.equal(model(ids).logits, expected)
    model.delete_adapter("task_002")
    model.delete_adapter("task_001")
    model.delete_adapter("task_000")
    assert not model.peft_config
    assert not [n for n in model.state_dict() if "task_" in n]


def test_damaged_support_is_refused(stack, tiny_llama, ids, tmp_path):
    model = stack()
    model.save_pretrained(tmp_path)
    path = tmp_path / "task_001" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "layers.1" in k and "v_proj" in k and "jumplora_support" in k)
    tensors[key][-1] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="task_002")
    with pytest.raises(ValueError, match=r"'task_001', layer model.layers.1.self_attn.v_proj.*sha256"):
        loaded(ids)
    with pytest.raises(ValueError, match="sha256"):
        loaded.merge_and_unload()


def test_supports_are_read_and_not_recomputed(stack, tiny_llama, ids, tmp_path):
    model = stack()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="task_002")
    for layer in layers(loaded):
        for gate in layer.jumplora_gate.values():
            gate.log_tau.data.fill_(5.0)  # nothing would be kept
    assert torch.equal(loaded(ids).logits, expected)


# ---- hard isolation ----------------------------------------------------------------------------------------------


def test_hard_isolation_has_no_collision(gated, add_task, ids):
    model = gated(density=0.3)
    finish_adapter(model, "default", "task_000")
    for k in (1, 2):
        add_task(model, [f"task_{k - 1:03d}"], density=0.3, isolation="hard", seed=1 + k)
        before = [layer.support("default") for layer in layers(model)]
        expected = model(ids).logits
        finish_adapter(model, "default", f"task_{k:03d}")
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)
        assert same(before, [layer.support(f"task_{k:03d}") for layer in layers(model)])
    for layer in layers(model):
        assert not layer.jumplora_free
        supports = [layer.support(f"task_{k:03d}") for k in range(3)]
        assert all(s.any() for s in supports)
        assert sum(s.int() for s in supports).max() == 1
        # Without the limit they would collide: the test above is not empty.
        D = layer.product("task_001")
        assert ((D.abs() >= D[supports[1]].abs().min()) & supports[0]).any()


def test_hard_isolation_without_room(gated, add_task):
    model = gated(density=0.6)
    finish_adapter(model, "default", "task_000")
    with pytest.raises(ValueError, match="leaves fewer entries free"):
        add_task(model, ["task_000"], density=0.5, isolation="hard")


def test_hard_isolation_masks_the_gradient(gated, add_task):
    model = gated(density=0.3)
    finish_adapter(model, "default", "task_000")
    add_task(model, ["task_000"], isolation="hard")
    set_mix(model, "default", 0.5)
    layer = layers(model)[0]
    taken = layer.support("task_000")
    row = int(taken.sum(1).argmax())
    # An output row's gradient reaches A and B through free entries alone: close the whole row and nothing is left.
    from hf_jumplora.ops.sparse import pack_bits

    x = torch.zeros(1, 32)
    x[0, taken[row]] = torch.randn(int(taken[row].sum()), generator=torch.Generator().manual_seed(0))
    grad = torch.zeros(1, 32)
    grad[0, row] = 1.0
    layer(x).backward(grad)
    assert (layer.jumplora_A["default"].grad == 0).all()
    assert (layer.jumplora_B["default"].grad == 0).all()
    layer.jumplora_free["default"] = pack_bits(torch.ones_like(taken))
    layer(x).backward(grad)
    assert (layer.jumplora_A["default"].grad != 0).any()


def test_hard_isolation_needs_finished_parents(gated):
    with pytest.raises(ValueError, match="'default' has none: finish it first"):
        gated().add_adapter(
            "child", JumpLoraConfig(r=4, target_modules=["q_proj"], isolation="hard", parent_adapters=["default"])
        )


# ---- finishing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.5, 0.99])
def test_not_finished_before_the_ramp_is(gated, mix):
    model = gated(mix=mix)
    with pytest.raises(ValueError, match=rf"'default' is at f = {mix:g}"):
        finish_adapter(model, "default", "task_000")
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].support is None


def test_finish_renames_everywhere(gated, ids):
    model = gated()
    expected, share = model(ids).logits, density(model, "default")
    finish_adapter(model, "default", "task_000")
    assert list(model.peft_config) == ["task_000"]
    assert model.active_adapter == "task_000"
    assert model.base_model.active_adapters == ["task_000"]
    assert model.peft_config["task_000"].inference_mode
    assert not [n for n, _ in model.named_modules() if n.endswith(".default")]
    assert not [n for n in model.state_dict() if "default" in n]
    assert density(model, "task_000") == share
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)


def test_finish_under_a_taken_name(stack, add_task):
    model = add_task(stack(), ["task_002"])
    with pytest.raises(ValueError, match="'task_001' exists already"):
        finish_adapter(model, "default", "task_001")
    assert model.peft_config["default"].support is None
    assert [n for n, p in model.named_parameters() if p.requires_grad]  # still in training


def test_finish_renames_what_is_saved_in_full(gated, tiny_llama, ids, tmp_path):
    model = gated(modules_to_save=["lm_head"])
    for p in model.base_model.model.lm_head.modules_to_save["default"].parameters():
        p.data += 1
    expected = model(ids).logits
    finish_adapter(model, "default", "task_000")
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
    assert not [n for n, p in model.named_parameters() if p.requires_grad]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, subfolder="task_000")
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_same_name_used_again(gated, add_task, ids):
    """The sum of finished updates is not that of an earlier adapter of the same name."""
    model = gated()
    finish_adapter(model)
    model(ids)
    finish_adapter(model, "default", "task_000")
    add_task(model, [])
    expected = model(ids).logits
    finish_adapter(model)
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-6)
    model.delete_adapter("default")
    add_task(model, [], seed=9)
    other = model(ids).logits
    finish_adapter(model)
    torch.testing.assert_close(model(ids).logits, other, rtol=0, atol=1e-6)
    assert (other - expected).abs().max() > 1e-3


def test_other_weights_for_a_finished_adapter(stack, ids):
    """The sum of finished updates follows when the weights of one are loaded again."""
    model = stack()
    before = model(ids).logits
    state = get_peft_model_state_dict(model, adapter_name="task_000")
    state = {k: v * 2 if k.endswith("jumplora_A") else v for k, v in state.items()}
    set_peft_model_state_dict(model, state, adapter_name="task_000")
    found = model(ids).logits
    model.merge_adapter()
    torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-6)
    assert (found - before).abs().max() > 1e-3


def test_first_forward_under_autocast(stack, ids):
    """The sum of finished updates is made in float32 even when the first forward pass runs under autocast."""
    expected, model = stack(), stack()
    expected(ids)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
        assert torch.equal(logits, expected(ids).logits)
    assert torch.equal(model(ids).logits, expected(ids).logits)


def test_first_forward_under_inference_mode(stack, add_task, ids):
    model = stack()
    add_task(model, ["task_002"])
    with torch.inference_mode():
        expected = model(ids).logits
    logits = model(ids).logits
    logits.sum().backward()
    assert torch.equal(logits, expected)


# ---- merging -----------------------------------------------------------------------------------------------------


def test_merged_parents_are_live_parents(stack, add_task, ids):
    model = add_task(stack(), ["task_002"])
    live = model(ids, labels=ids)
    live.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.base_model.merge_adapter(["task_002"])
    assert all(layer.merged_adapters == ["task_000", "task_001", "task_002"] for layer in layers(model))
    merged = model(ids, labels=ids)
    merged.loss.backward()
    torch.testing.assert_close(merged.logits, live.logits, rtol=0, atol=1e-6)
    for n, p in model.named_parameters():
        if n in grads:
            torch.testing.assert_close(p.grad, grads[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_one_by_one_or_all_at_once(stack, tiny_llama, dtype):
    model = stack(tiny_llama(dtype))
    original = weights(model)
    model.base_model.merge_adapter(["task_002"])
    at_once = weights(model)
    assert not any(torch.equal(a, b) for a, b in zip(at_once, original, strict=True))
    model.unmerge_adapter()
    assert same(weights(model), original)
    for k in range(3):
        model.base_model.merge_adapter([f"task_{k:03d}"])
    assert same(weights(model), at_once)
    for layer, weight, merged in zip(layers(model), original, at_once, strict=True):
        total = sum(layer.update(f"task_{k:03d}") for k in range(3))
        wide = torch.promote_types(dtype, torch.float32)
        assert torch.equal(merged, (weight.to(wide) + total).to(dtype))
    model.unmerge_adapter()
    assert same(weights(model), original)


def test_subset(stack, tiny_llama, ids):
    """A task without parents in its config is added alone; leaving one out removes exactly its update."""
    model = stack()
    for config in model.peft_config.values():
        config.parent_adapters = []
    model.base_model.merge_adapter(["task_000", "task_002"])
    dense = tiny_llama()
    for name, layer in named_layers(model):
        dense.get_submodule(name).weight.data += layer.update("task_000") + layer.update("task_002")
        assert torch.equal(layer.base_layer.weight, dense.get_submodule(name).weight)
    merged = model.merge_and_unload(adapter_names=["task_000", "task_002"])
    assert torch.equal(merged(ids).logits, dense(ids).logits)


def test_disabled_adapter_with_merged_parents(stack, add_task, tiny_llama, ids):
    model = add_task(stack(), ["task_002"])
    model.base_model.merge_adapter(["task_002"])
    expected, merged = model(ids).logits, weights(model)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)
    assert same(weights(model), merged)
    assert torch.equal(model(ids).logits, expected)
    assert all(layer.merged_adapters == ["task_000", "task_001", "task_002"] for layer in layers(model))


def test_safe_merge(stack):
    model = stack()
    layers(model)[1].jumplora_A["task_001"].data[0, 0] = float("nan")
    original = weights(model)
    with pytest.raises(ValueError, match=r"NaNs detected.*task_001.*v_proj.*not finite"):
        model.merge_adapter(safe_merge=True)
    assert same(weights(model)[1:], original[1:])


def test_all_linear_finds_the_same_layers_for_every_task(gated):
    model = gated(target_modules="all-linear")
    finish_adapter(model, "default", "task_000")
    model.add_adapter("default", JumpLoraConfig(target_modules="all-linear", parent_adapters=["task_000"]))
    assert model.peft_config["default"].target_modules == model.peft_config["task_000"].target_modules
    assert all({"default", "task_000"} <= set(layer.configs) for _, layer in named_layers(model))


def test_weights_that_are_not_finite_are_not_a_task(gated):
    model = gated()
    layers(model)[0].jumplora_B["default"].data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"q_proj holds weights that are not finite"):
        finish_adapter(model, "default", "task_000")
    assert "task_000" not in model.peft_config


# ---- folding -----------------------------------------------------------------------------------------------------


def train_step(model, ids):
    """Logits and gradients of the adapter in training."""
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), **grads}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_folded_is_merged(stack, add_task, tiny_llama, ids, dtype):
    """The same merged weights, output and gradients, whether earlier tasks are adapters or one sum; exact unmerge."""
    base = tiny_llama(dtype)
    original = {n: base.get_submodule(n).weight.detach().clone() for n, _ in named_layers(stack(tiny_llama(dtype)))}
    models = [add_task(stack(tiny_llama(dtype)), ["task_000", "task_001", "task_002"]) for _ in range(2)]
    fold_finished(models[1], ["task_000", "task_001"])
    fold_finished(models[1], ["task_002"])
    assert list(models[1].peft_config) == ["default"]
    assert not [n for n in models[1].state_dict() if "task_" in n]
    for model in models:
        model.base_model.merge_adapter(["task_002"])
    assert same(weights(models[0]), weights(models[1]))
    steps = [train_step(model, ids) for model in models]
    assert steps[0].keys() == steps[1].keys()
    assert all(torch.equal(steps[0][k], steps[1][k]) for k in steps[0])
    with models[1].disable_adapter():
        assert torch.equal(models[1](ids).logits, tiny_llama(dtype)(ids).logits)
    assert same(weights(models[0]), weights(models[1]))
    models[1].unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, original[n]) for n, layer in named_layers(models[1]))
    plain = models[1].merge_and_unload()
    assert torch.equal(plain(ids).logits, models[0].merge_and_unload()(ids).logits)


@pytest.mark.parametrize("density", [0.1, 0.9])  # a sparse and a dense sum
@pytest.mark.parametrize("gate", [True, False])
def test_folded_but_not_merged(stack, gated, add_task, ids, gate, density):
    """Over a quantised base the sum stays beside the weight."""
    if gate:
        model = stack(density=density)
    else:
        model = gated(gate=False)
        finish_adapter(model, "default", "task_000")
        for k in (1, 2):
            add_task(model, [f"task_{i:03d}" for i in range(k)], seed=k, gate=False)
            finish_adapter(model, "default", f"task_{k:03d}")
    add_task(model, ["task_000", "task_001", "task_002"], gate=gate)
    expected = train_step(model, ids)
    fold_finished(model, ["task_000", "task_001", "task_002"])
    found = train_step(model, ids)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_what_a_strategy_needs_of_folded_tasks(stack, add_task):
    model = add_task(stack(), ["task_000", "task_001", "task_002"])
    names = ["task_000", "task_001", "task_002"]
    totals = [layer.total_update(layer.closure(["default"])[:-1]) for layer in layers(model)]
    taken = [layer.occupied(["task_002"]) for layer in layers(model)]
    fold_finished(model, names)
    for layer, total, mask in zip(layers(model), totals, taken, strict=True):
        assert layer.closure(["default"]) == [*names, "default"]
        assert torch.equal(layer.total_update(names), total)
        layer.total_update(names).zero_()  # a copy
        assert torch.equal(layer.total_update(layer.closure(["default"])[:-1]), total)
        assert torch.equal(layer.occupied(["task_002"]), mask)
        with pytest.raises(ValueError, match=r"folded into one sum"):
            layer.total_update(names[:1])
        with pytest.raises(ValueError, match=r"'task_001' is folded.*past_factors"):
            layer.factors("task_001")


def test_hard_isolation_above_folded_tasks(stack, add_task):
    """The mask of a new task is the same whether its parents are adapters or folded."""
    free = []
    for fold in (False, True):
        model = add_task(stack(isolation="hard"), ["task_000", "task_001", "task_002"], isolation="hard")
        finish_adapter(model, "default", "task_003")
        if fold:
            fold_finished(model, ["task_000", "task_001", "task_002"])
        add_task(model, [f"task_00{k}" for k in range(4)], isolation="hard")
        free.append([layer.jumplora_free["default"] for layer in layers(model)])
    assert same(*free)


def test_what_cannot_be_folded(stack, add_task):
    model = add_task(stack(), ["task_000", "task_001", "task_002"])
    with pytest.raises(ValueError, match="'default' is not finished"):
        fold_finished(model, ["default"])
    model.peft_config["task_001"].parent_adapters = []
    with pytest.raises(ValueError, match=r"\['task_001'\] cannot be folded: adapter 'task_000' does not stand on"):
        fold_finished(model, ["task_001"])
    model = add_task(stack(), ["task_000", "task_001", "task_002"])
    fold_finished(model, ["task_000"])
    with pytest.raises(ValueError, match=r"must name \['task_000'\] in parent_adapters"):
        model.add_adapter("alone", JumpLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_closure_of_a_hundred_tasks(gated):
    """Each task names all earlier ones: walking every path would take 2 to the 100 steps."""
    layer = layers(gated())[0]
    names = [f"task_{k:03d}" for k in range(100)]
    for k, name in enumerate(names):
        layer.configs[name] = JumpLoraConfig(parent_adapters=names[:k])
    assert layer.closure(names[-1:]) == names
    assert layer.closure(names[-1:], without=names[:98]) == names[98:]
