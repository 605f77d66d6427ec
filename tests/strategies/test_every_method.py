"""What every method of the table has to do; a new one is tested here without a line of its own."""

import dataclasses

import pytest
import torch
import toy
from peft import PeftModel
from safetensors.torch import load, save
from transformers import TrainerCallback

from hf_jumplora import load_stack
from hf_jumplora.methods import METHODS
from hf_jumplora.stack import read_manifest
from hf_jumplora.strategies.base import join_states, state_of
from hf_jumplora.tuner import named_layers


IDS = torch.tensor([[3, 12, 13, 8, 14, 9], [4, 15, 16, 8, 17, 9]])
RESTART = {"save_strategy": "steps", "save_steps": 2}


class Interrupt(TrainerCallback):
    """Ctrl-C in a task, after a checkpoint and a step that is in none."""

    def __init__(self, folder):
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith(self.folder) and state.global_step == 3:
            raise KeyboardInterrupt


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def stream():
    """Three tasks of five steps: the threshold starts after 1, the ramp is closed after 4."""
    return toy.tasks(3, train=20, evaluate=4)


@pytest.fixture(scope="module", params=METHODS)
def trained(request, toy_base, tmp_path_factory):
    """(method, run over three tasks, files of each task) of every method."""
    run = toy.make_run(toy_base, tmp_path_factory.mktemp("trained"), request.param, stream=stream(), **RESTART)
    run.train()
    return request.param, run, [task["files"] for task in read_manifest(run.output_dir).tasks]


def test_learns_in_every_task(trained):
    """The update of each task is there, and finite."""
    _, run, tasks = trained
    assert len(run.record.trained) == len(tasks)
    for adapter in run.model.peft_config:
        updates = [layer.product(adapter) for _, layer in named_layers(run.model, adapter)]
        assert all(torch.isfinite(update).all() for update in updates)
        assert any(update.any() for update in updates)


def test_one_model_however_it_is_loaded(trained, toy_base):
    """Memory, load_stack, its merged form and PeftModel.from_pretrained."""
    method, run, _ = trained
    folder, stages = run.output_dir, 1 if method == "mtl" else 3
    assert len(run.record.matrix) == stages + 1
    assert all(0 <= score <= 1 for row in run.record.matrix for score in row)
    manifest = read_manifest(folder)
    assert manifest.method == method
    assert manifest.task_names == (["joint"] if method == "mtl" else ["size", "light", "mood"])
    folders = {p.name for p in folder.iterdir() if p.is_dir()}
    assert folders - {"checkpoints", "predictions"} == {f"task_{k:03d}" for k in range(stages)}

    base = toy.load_base(toy_base)
    assert not torch.allclose(logits(run.model), logits(base), atol=1e-3)  # it has learnt something
    only = manifest.task_names[-1:] if method == "perlora" else None  # each task is a model of its own
    assert torch.equal(logits(run.model), logits(load_stack(folder, tasks=only)))
    if not manifest.competing:  # the others have no merged form
        merged = load_stack(folder, toy.load_base(toy_base), tasks=only, merge=True)
        assert type(merged) is type(base)
        assert torch.equal(logits(run.model), logits(merged))
    loaded = PeftModel.from_pretrained(base, folder, subfolder=manifest.tasks[-1]["folder"])
    torch.testing.assert_close(logits(run.model), logits(loaded), rtol=1e-5, atol=1e-5)


def test_a_restart_in_mid_task_gives_the_same_bits(trained, toy_base, tmp_path):
    """Stopped in the second of three tasks: the third one needs what both have left."""
    method, _, expected = trained
    interrupt = Interrupt("task_001" if len(expected) > 1 else "task_000")
    broken = toy.make_run(toy_base, tmp_path, method, stream=stream(), callbacks=[interrupt], **RESTART)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert list(tmp_path.glob("checkpoints/*/checkpoint-*"))
    toy.make_run(toy_base, tmp_path, method, stream=stream(), **RESTART).train()
    found = [task["files"] for task in read_manifest(tmp_path).tasks]
    for name in ("adapter_model.safetensors", "strategies.safetensors"):
        assert [files.get(name) for files in found] == [files.get(name) for files in expected]


def test_state_survives_a_file_and_is_forgotten(trained):
    """state_dict -> safetensors -> load_state_dict is the same state; after `reset` nothing is left of it."""
    method, run, _ = trained
    saved = load(save(join_states(strategy.state_dict() for strategy in run.plan.strategies)))
    fresh = METHODS[method].make_strategies()
    for number, (old, new) in enumerate(zip(run.plan.strategies, fresh, strict=True)):
        new.load_state_dict(state_of(number, saved))
        before, after = old.state_dict(), new.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key].to(before[key].device)) for key in before)
        new.reset()
        fields = dataclasses.fields(new)
        untouched = type(new)(**{f.name: getattr(new, f.name) for f in fields if f.init})
        assert all(getattr(new, f.name) == getattr(untouched, f.name) for f in fields)
