"""The ramp, the start of the threshold, and the density."""

import copy
import itertools
import math

import pytest
import torch
from transformers import TrainerState

from hf_jumplora.trainer.callbacks import GateCallback
from hf_jumplora.tuner import (
    JumpLoraConfig,
    density,
    gate_groups,
    named_layers,
    ramp,
    ramp_steps,
    set_mix,
    set_threshold,
)
from hf_jumplora.tuner.schedule import density_at


@pytest.mark.parametrize(("total", "expected"), [(40, (8, 32)), (5, (1, 4)), (9, (1, 7)), (1000, (200, 800))])
def test_ramp_steps(total, expected):
    assert ramp_steps(total, JumpLoraConfig()) == expected


def test_ramp_is_zero_then_linear_then_one():
    config = JumpLoraConfig()
    f = [ramp(step, 40, config) for step in range(41)]
    assert f[:9] == [0.0] * 9
    assert f[32:] == [1.0] * 9
    assert f[20] == 0.5
    assert all(b - a == pytest.approx(1 / 24) for a, b in itertools.pairwise(f[8:33]))


def test_ramp_over_the_whole_task():
    assert ramp_steps(10, JumpLoraConfig(gate_start=0.1, gate_end=1.0)) == (1, 10)
    assert ramp(10, 10, JumpLoraConfig(gate_start=0.1, gate_end=1.0)) == 1.0


@pytest.mark.parametrize(
    ("total", "options"), [(4, {}), (0, {}), (3, {"gate_start": 0.4, "gate_end": 0.6}), (9, {"gate_start": 0.1})]
)
def test_too_few_steps(total, options):
    with pytest.raises(ValueError, match=rf"{total} optimizer steps are too few"):
        ramp_steps(total, JumpLoraConfig(**options))
    with pytest.raises(ValueError, match="too few"):
        ramp(0, total, JumpLoraConfig(**options))


def kept(layers):
    """Entries above the threshold, and parameters of A and B, of layers that share a gate."""
    gate = layers[0].jumplora_gate["default"]
    count = sum(int((layer.product("default").abs() > gate.log_tau.exp()).sum()) for layer in layers)
    return count, sum(p["default"].numel() for layer in layers for p in (layer.jumplora_A, layer.jumplora_B))


@pytest.mark.parametrize(("scope", "gates"), [("global", 1), ("block", 2), ("layer", 4)])
@pytest.mark.parametrize("r", [1, 4])
def test_published_start(gated, scope, gates, r):
    model = gated(threshold_scope=scope, density=None, r=r)
    groups = gate_groups(model, "default")
    assert len(groups) == gates
    for _, layers in groups:
        count, parameters = kept(layers)
        assert count == parameters - int(scope == "global")


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_start_at_a_density(gated, share, scope):
    model = gated(threshold_scope=scope, density=share)
    for _, layers in gate_groups(model, "default"):
        total = sum(layer.in_features * layer.out_features for layer in layers)
        assert kept(layers)[0] == round(share * total)
    assert density(model, "default") == pytest.approx(share, abs=1e-3)


def test_untrained_adapter_has_no_threshold(tiny_llama, gated):
    with pytest.raises(ValueError, match=r"'default' cannot start.*exactly zero"):
        gated(init_weights=True)


def test_density_does_not_depend_on_the_mix(gated):
    model = gated(density=0.25)
    found = []
    for f in (0.0, 0.5, 1.0):
        set_mix(model, "default", f)
        assert all(gate.mix.item() == gate.f == f for gate, _ in gate_groups(model, "default"))
        found.append(density(model, "default"))
    assert found[0] == found[1] == found[2] == pytest.approx(0.25, abs=1e-3)


def test_density_without_gate(gated):
    model = gated(gate=False)
    assert density(model, "default") == 1.0
    assert gate_groups(model, "default") == []


def test_threshold_is_the_quantile_under_autocast(gated):
    model = gated()
    expected = gate_groups(model, "default")[0][0].log_tau.item()
    with torch.autocast("cpu", torch.bfloat16):
        set_threshold(model, "default", 0.1)
        assert density(model, "default") == pytest.approx(0.1, abs=1e-3)
    assert gate_groups(model, "default")[0][0].log_tau.item() == expected


def test_threshold_keeps_its_place_in_the_optimizer(gated):
    model = gated()
    gate, _ = gate_groups(model, "default")[0]
    parameter = gate.log_tau
    set_threshold(model, "default", 0.3)
    assert gate.log_tau is parameter
    assert parameter.requires_grad
    assert parameter.grad_fn is None


def test_unknown_adapter(gated):
    with pytest.raises(ValueError, match=r"no JumpLoRA adapter 'task_007'.*\['default'\]"):
        set_threshold(gated(), "task_007", None)


@pytest.mark.parametrize(("run", "task"), [(0, 0), (0, 1), (1, 1)])
def test_published_trajectory(golden, gated, tiny_llama, run, task, relative_error):
    """40 steps of AdamW as the published code took them; its penalty (run 1) does not reach the threshold."""
    from peft import get_peft_model

    from hf_jumplora.ops.penalty import overlap_penalty

    T, ids = golden["trajectory"], golden["load"]("batches.safetensors")["input_ids"]
    published = T["runs"][run]
    base = tiny_llama()
    base.load_state_dict(golden["load"]("llama_init.safetensors"), strict=False)
    past = {}
    if task:  # the first task's result is the start of the second
        first = golden["load"](f"{published['name']}_task0.safetensors")
        for name in (n.removeprefix("merged.").removesuffix(".weight") for n in first if n.startswith("merged.")):
            base.get_submodule(name).weight.data.copy_(first[f"merged.{name}.weight"])
            D = first[f"final.{name}.lora_B"] @ first[f"final.{name}.lora_A"]
            past[name] = T["lora_alpha"] / T["r"] * D * (D.abs() > first["final.log_threshold"].exp())
    expected = golden["load"](f"{published['name']}_task{task}.safetensors")
    options = {"r": T["r"], "lora_alpha": T["lora_alpha"], "bandwidth": T["bandwidth"]}
    config = JumpLoraConfig(target_modules=T["target_modules"], **options)
    model = get_peft_model(base, config).train()
    layers = dict(named_layers(model))
    for name, layer in layers.items():
        layer.jumplora_A["default"].data.copy_(expected[f"init.{name}.lora_A"])
    gate = gate_groups(model, "default")[0][0]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=T["lr"], betas=T["betas"], eps=T["eps"], weight_decay=0.0)
    numbers = published["tasks"][task]
    for step in range(T["steps"]):
        loss = model(input_ids=ids[task, step], labels=ids[task, step]).loss
        assert loss.item() == pytest.approx(numbers["ce_loss"][step], rel=1e-5), step
        if published["ella_lambda"] and past:
            terms = [
                overlap_penalty(
                    layer.jumplora_A["default"], layer.jumplora_B["default"], gate.log_tau.detach(), past[name],
                    scaling=layer.scaling["default"], mix=gate.mix,
                )
                for name, layer in layers.items()
            ]  # fmt: skip
            loss = loss + published["ella_lambda"] * sum(terms) / len(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 == ramp_steps(T["steps"], config)[0]:
            set_threshold(model, "default", None)
        set_mix(model, "default", ramp(step + 1, T["steps"], config))
        assert gate.log_tau.exp().item() == pytest.approx(numbers["threshold"][step], rel=1e-4), step
        assert density(model, "default") == pytest.approx(numbers["density"][step], abs=1e-3), step
    assert math.isclose(gate.mix.item(), 1.0)
    for name, layer in layers.items():
        merged = layer.base_layer.weight + layer.update("default")
        assert relative_error(merged, expected[f"merged.{name}.weight"]) <= 1e-4


def test_hard_isolation_counts_what_it_keeps(gated):
    """Closed entries are not kept, so the density asked for is the one of the finished support."""
    from hf_jumplora.tuner import finish_adapter

    model = gated()
    set_threshold(model, "default", 0.3)
    set_mix(model, "default", 1.0)
    finish_adapter(model, "default", "task_000")
    config = JumpLoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_weights=False, isolation="hard", parent_adapters=["task_000"]
    )
    model.add_adapter("default", config)
    model.set_adapter("default")
    set_threshold(model, "default", 0.1)
    entries = sum(layer.in_features * layer.out_features for _, layer in named_layers(model))
    assert abs(density(model, "default") - 0.1) <= 1 / entries
    set_mix(model, "default", 1.0)
    before = density(model, "default")
    finish_adapter(model, "default", "task_001")
    assert density(model, "task_001") == before


# ---- density over the steps, and budgets --------------------------------------------------------------------------


HELD = {"threshold_update": "density", "target_density": 0.05}


@pytest.mark.parametrize(
    ("schedule", "half"), [("constant", 0.05), ("linear", 0.05 + 0.45 / 2), ("cubic", 0.05 + 0.45 / 8)]
)
def test_density_schedule(schedule, half):
    """initial_density after s0 = 8, target_density from s1 = 32 on, and the named curve between them."""
    config = JumpLoraConfig(**HELD, initial_density=0.5, density_schedule=schedule)
    values = [density_at(step, 40, config) for step in range(8, 41)]
    assert values[0] == 0.5
    assert values[20 - 8] == pytest.approx(half)
    assert values[32 - 8 :] == [0.05] * 9
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_density_without_a_schedule():
    """Each of the two stands for the other; neither: as many as A and B have parameters."""
    assert [density_at(s, 40, JumpLoraConfig()) for s in (8, 9)] == [None, None]
    assert [density_at(s, 40, JumpLoraConfig(**HELD)) for s in (8, 9)] == [0.05, 0.05]
    config = JumpLoraConfig(threshold_update="density", initial_density=0.3)
    assert [density_at(s, 40, config) for s in (8, 40)] == [0.3, 0.3]


@pytest.mark.parametrize("scope", ["global", "block", "layer"])
def test_density_is_held_in_every_scope(gated, scope):
    """Each gate keeps the fraction of its own layers' entries, to the entry, after the weights have moved."""
    model = gated(threshold_scope=scope, **HELD)
    for _ in range(2):
        with torch.no_grad():
            for _, layer in named_layers(model):
                layer.jumplora_B["default"].add_(torch.randn_like(layer.jumplora_B["default"]))
        set_threshold(model, "default", 0.05)
        for _, layers in gate_groups(model, "default"):
            total = sum(layer.out_features * layer.in_features for layer in layers)
            assert kept(layers)[0] == round(0.05 * total)


@pytest.mark.parametrize(
    "options", [{}, {"threshold_scope": "layer"}, {"threshold_scope": "layer", "pattern": 0.4}], ids=str
)
def test_a_density_without_a_number_is_held_too(gated, options):
    """As many entries as A and B have parameters, at every step between the start and the end."""
    named = {"density_pattern": {"v_proj": options["pattern"]}} if "pattern" in options else {}
    scope = {key: value for key, value in options.items() if key != "pattern"}
    model = gated(threshold_update="density", density=None, **scope, **named)
    hold = GateCallback("default").on_step_end
    before = [kept(layers)[0] for _, layers in gate_groups(model, "default")]
    for step in range(9, 41):
        with torch.no_grad():
            for _, layer in named_layers(model):
                layer.jumplora_B["default"].mul_(1.1)
        hold(None, TrainerState(global_step=step, max_steps=40), None, model=model)
        now = [kept(layers)[0] for _, layers in gate_groups(model, "default")]
        assert now == pytest.approx(before, abs=1)  # the sample's products are rounded in another way


def test_layers_with_budgets_of_their_own(gated):
    """`density_pattern`, by the end of a name or a regex; the others keep the common density."""
    pattern = {"v_proj": 0.4, r"model\.layers\.0\.self_attn\.q_proj": 0.01}
    model = gated(threshold_scope="layer", density_pattern=pattern, **HELD)
    set_threshold(model, "default", 0.05)
    for name, layer in named_layers(model):
        share = 0.4 if "v_proj" in name else 0.01 if ".0." in name else 0.05
        assert kept([layer])[0] == round(share * layer.out_features * layer.in_features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density_schedule": "cubic", **HELD}, "density_schedule='cubic' needs initial_density and target_density"),
        ({"density_schedule": "square"}, "density_schedule is one of"),
        ({"density_pattern": {"v_proj": 0.1}, **HELD}, "needs threshold_scope='layer'"),
        ({"density_pattern": {"v_proj": 0.1}, "threshold_scope": "layer"}, "threshold_update='density'"),
        ({"density_pattern": {"v_proj": 1.5}, "threshold_scope": "layer", **HELD}, "'v_proj' has 1.5"),
    ],
)
def test_densities_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        JumpLoraConfig(**options)


def test_the_mix_as_a_number_follows_every_change(gated):
    """It is read from the device again when a checkpoint, or anybody, changes the buffer, or the module moves."""
    gate = gate_groups(gated(mix=0.25), "default")[0][0]
    assert gate.f == 0.25
    gate.load_state_dict({**gate.state_dict(), "mix": torch.tensor([0.5])})
    assert gate.f == 0.5
    gate.mix.fill_(0.75)
    assert gate.f == 0.75
    gate.mix = torch.ones(1)
    assert gate.f == 1
    assert copy.deepcopy(gate).f == 1
