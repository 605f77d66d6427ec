"""The hooks of a strategy in a run: called when they should be, remembered on disk, composed by addition."""

from dataclasses import dataclass, field

import pytest
import torch
import toy
from peft import get_peft_model
from transformers import TrainerCallback

from hf_jumplora import JumpLoraConfig, finish_adapter
from hf_jumplora.methods import METHODS, get_method
from hf_jumplora.options import MethodArguments
from hf_jumplora.stack import read_manifest
from hf_jumplora.strategies import Ella, KFac, Strategy
from hf_jumplora.tuner import named_layers, set_mix, set_threshold


@dataclass
class Diary(Strategy):
    """Writes down its calls; counts tasks in something that must survive a restart."""

    weight: float = 0.0
    calls: list = field(default_factory=list, repr=False)
    finished: torch.Tensor = field(default_factory=lambda: torch.zeros(1), repr=False)

    def on_task_start(self, model, adapter, examples):
        self.calls.append(("start", adapter, int(self.finished)))

    def penalty(self, model, inputs, adapter, output):
        assert "input_ids" in inputs
        assert output.logits.requires_grad
        self.calls.append("penalty")
        return self.weight * torch.ones(())

    def on_step_end(self, model, adapter):
        self.calls.append("step")

    def on_task_end(self, model, adapter, examples):
        self.finished += 1
        self.calls.append("end")

    def state_dict(self):
        return {"finished": self.finished}

    def load_state_dict(self, state):
        self.finished = state["finished"]


def run(base, folder, tasks, strategies):
    made = toy.make_run(base, folder, stream=toy.tasks(2)[:tasks])
    made.plan.strategies[:] = strategies
    return made


def test_hooks_of_a_run(toy_base, tmp_path):
    """start, then a penalty and a step end for each of 8 steps, then end; for each task."""
    diary = Diary()
    run(toy_base, tmp_path, 2, [diary]).train()
    one = ["penalty", "step"] * 8
    assert diary.calls == [("start", "default", 0), *one, "end", ("start", "default", 1), *one, "end"]


def test_memory_survives_a_restart(toy_base, tmp_path, monkeypatch):
    """Saved beside the task as safetensors, each strategy of a list under its own number."""
    first = run(toy_base, tmp_path, 2, [Diary(), Diary()])
    train_task = first._train_task

    def interrupted(index, rows):
        if index == 1:
            raise KeyboardInterrupt
        train_task(index, rows)

    monkeypatch.setattr(first, "_train_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert "state" in read_manifest(tmp_path).tasks[0]
    again = [Diary(), Diary()]
    run(toy_base, tmp_path, 2, again).train()
    assert [diary.calls[0] for diary in again] == [("start", "default", 1)] * 2
    assert [int(diary.finished) for diary in again] == [2, 2]


def test_penalties_add_up(toy_base, tmp_path):
    found = []

    class Note(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            found.extend([logs["penalty"]] if "loss" in logs else [])

    strategies = [Diary(1.5), Strategy(), Diary(0.25)]
    toy.make_run(toy_base, tmp_path, stream=toy.tasks(1), strategies=strategies, callbacks=[Note()]).train()
    assert found == [1.75] * 4


def test_other_strategy_options_are_other_settings(toy_base, tmp_path):
    """They are compared by repr, whose default says the class's name and never an address."""
    assert repr(Strategy()) == "Strategy"
    run(toy_base, tmp_path, 1, [Ella(10.0)]).train()
    with pytest.raises(
        ValueError, match=r"strategies: \['Ella\(weight=10\.0\)'\] there, \['Ella\(weight=20\.0\)'\] now"
    ):
        run(toy_base, tmp_path, 1, [Ella(20.0)]).train()


@pytest.mark.parametrize("gated", [False, True], ids=["ella", "jumplora-ella"])
def test_ella_by_hand(gated, toy_base):
    """weight * mean over layers of || dW * W_past ||^2, with the update as it acts; the threshold gets no gradient."""
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "gate": gated, "init_weights": False}
    torch.manual_seed(0)
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(**options))
    for k in range(2):
        if gated:
            set_threshold(model, "default", 0.2)
            set_mix(model, "default", 1.0)
        finish_adapter(model, "default", f"task_00{k}")
        parents = [f"task_00{i}" for i in range(k + 1)]
        model.add_adapter("default", JumpLoraConfig(parent_adapters=parents, **options))
        model.set_adapter("default")
    if gated:
        set_threshold(model, "default", 0.3)
        set_mix(model, "default", 0.6)
    ella = Ella(7.0)
    ella.on_task_start(model, "default", None)
    penalty = ella.penalty(model, {}, "default", {})
    expected = []
    for _, layer in named_layers(model):
        past = layer.update("task_000") + layer.update("task_001")
        expected.append((layer.update("default") * past).square().sum())
    assert len(expected) == 4
    torch.testing.assert_close(penalty, 7.0 * sum(expected) / 4)
    penalty.backward()
    for _, layer in named_layers(model):
        assert layer.jumplora_A["default"].grad.abs().sum() > 0
        if gated:
            assert layer.jumplora_gate["default"].log_tau.grad is None


def test_methods_table():
    """Every row can be made, and says where it is from."""
    for name, method in METHODS.items():
        assert method.mode in ("incremental", "sequential", "separate", "joint")
        assert method.paper
        assert method.adapter["gate"] == ("jumplora" in name)
        assert any(isinstance(make(), KFac) for make in method.strategies) == (
            "kfac" in name or "jumplora-best" in name
        )
        assert any(isinstance(make(), Ella) for make in method.strategies) == ("ella" in name)
        assert get_method(name) is method


def test_what_a_method_prescribes_and_what_it_suggests():
    """jumplora-best holds the density, at a value that is the user's to set."""
    method = get_method("jumplora-best")
    config = method.adapter_config(JumpLoraConfig(r=4))
    assert (config.r, config.threshold_update, config.target_density) == (4, "density", 0.3)
    given = JumpLoraConfig(threshold_update="density", target_density=0.1)
    assert method.adapter_config(given).target_density == 0.1
    assert MethodArguments("jumplora-best", target_density=0.1).adapter_config().target_density == 0.1
    assert get_method("inclora").adapter_config(None).gate is False
