"""Method `perlora`: each task its own adapter on the base model, and evaluated with it."""

import pytest
import torch
import toy

from hf_jumplora import export_lora, load_stack, merge_stack
from hf_jumplora.commands.inspect import describe, text
from hf_jumplora.schema import read_json
from hf_jumplora.stack import read_manifest
from hf_jumplora.stack.export import export_sparse
from hf_jumplora.stack.operations import subset
from hf_jumplora.tuner import named_layers


IDS = torch.arange(3, 23).view(2, 10)


@pytest.fixture(scope="module")
def oracle(toy_base, tmp_path_factory):
    run = toy.make_run(toy_base, tmp_path_factory.mktemp("oracle"), "perlora")
    run.train()
    return run


def test_tasks_do_not_know_each_other(oracle, toy_base, tmp_path):
    """The third task's adapter has the bits of one trained alone with its seed."""
    alone = toy.make_run(toy_base, tmp_path, "perlora", stream=toy.tasks()[2:], seed=oracle.args.seed + 2000)
    alone.train()
    for (_, one), (_, two) in zip(named_layers(oracle.model), named_layers(alone.model), strict=True):
        assert torch.equal(one.jumplora_A["task_002"], two.jumplora_A["task_000"])
        assert torch.equal(one.jumplora_B["task_002"], two.jumplora_B["task_000"])


def test_each_task_is_evaluated_with_its_own(oracle):
    """Nothing is forgotten, and what was not trained yet scores as without training; so it is when asked again."""
    zero, *rows = oracle.record.matrix
    for i in range(3):
        assert [row[i] for row in rows[i:]] == [rows[i][i]] * (3 - i)
        assert [row[i] for row in rows[:i]] == [zero[i]] * i
    assert rows[-1] != zero
    assert oracle.evaluate() == dict(zip(("size", "light", "mood"), rows[-1], strict=True))


def test_one_task_is_loaded(oracle, toy_base):
    manifest = read_manifest(oracle.output_dir)
    assert manifest.separate
    assert not manifest.additive
    model = load_stack(oracle.output_dir, toy.load_base(toy_base), tasks=["light"])
    oracle.model.set_adapter("task_001", inference_mode=True)
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, oracle.model.eval()(IDS).logits, atol=1e-5)
    for tasks in (None, ["size", "light"], slice(0, 2)):
        with pytest.raises(ValueError, match=r"each task has a model of its own.*it has size, light, mood"):
            load_stack(oracle.output_dir, toy.load_base(toy_base), tasks=tasks)


def test_models_that_exclude_each_other_are_not_added_up(oracle, tmp_path):
    for write in (merge_stack, export_lora, export_sparse):
        with pytest.raises(ValueError, match=r"each task has a model of its own.*it has size, light, mood"):
            write(oracle.output_dir, out=tmp_path / "out", **({"rank": 1} if write is export_lora else {}))
    export_lora(oracle.output_dir, tmp_path / "one", rank=2, tasks=["light"])


def test_the_card_says_so(oracle):
    card = (oracle.output_dir / "README.md").read_text()
    assert "the task must be known at inference" in card
    assert 'tasks=["mood"]' in card
    assert "All tasks" not in card


def test_the_whole_stack_can_be_inspected_and_divided(oracle, toy_base, tmp_path):
    """Looking at all tasks is no loading; a part of the stack is such a stack again."""
    result = describe(oracle.output_dir)
    assert [task["name"] for task in result["tasks"]] == ["size", "light", "mood"]
    assert "each folder is a separate model for its task" in text(result)
    subset(oracle.output_dir, ["light", "mood"], tmp_path / "part")
    assert read_manifest(tmp_path / "part").separate
    load_stack(tmp_path / "part", toy.load_base(toy_base), tasks=["mood"])
    for name in ("task_000", "task_001"):
        assert read_json(tmp_path / "part" / name / "adapter_config.json")["parent_adapters"] == []
