"""General ability and domains: what is measured and never trained on, plain text as a task, what the report says."""

import dataclasses
import json

import pytest
import toy
from datasets import Dataset

from hf_jumplora import ContinualRun, LanguageModelTask, Task, TextTask
from hf_jumplora.data.tasks import PROMPT
from hf_jumplora.strategies import Drift, KFac
from hf_jumplora.trainer.scoring import evaluate_task, evaluate_text


def texts(kind, count):
    return [{"text": f"the {kind} {toy.SUBJECTS[i % 8]} : {toy.SUBJECTS[(i + 3) % 8]}"} for i in range(count)]


def general(train=8, **options):
    return LanguageModelTask("wiki", texts("very", train), texts("new", 8), held_out=True, **options)


def held_out():
    return dataclasses.replace(toy.tasks(3)[2], held_out=True)


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("eval_tasks", ["all", "seen"])
def test_before_and_after_each_task(eval_tasks, toy_base, tmp_path):
    """Held-out tasks are no part of the matrix, nor trained on; the numbers are those of the model at that moment."""
    run = toy.make_run(toy_base, tmp_path, "inclora", [*toy.tasks(2), held_out(), general()], eval_tasks=eval_tasks)
    base = (
        evaluate_task(run.model.eval(), run.plan.encoder, held_out(), "score"),
        *evaluate_text(run.model, run.plan.encoder, general()),
    )
    result = run.train().metrics
    assert result["tasks"] == ["size", "light"]
    assert [len(row) for row in result["matrix"]] == [2, 2, 2]
    assert len(list(tmp_path.glob("task_*"))) == 2
    rows = result["general"]
    keys = ["mood accuracy", "wiki token_accuracy", "wiki cross_entropy"]
    assert [list(row) for row in rows] == [keys] * 3
    assert list(rows[0].values()) == pytest.approx(list(base))
    after = (
        evaluate_task(run.model, run.plan.encoder, held_out(), "score"),
        *evaluate_text(run.model, run.plan.encoder, general()),
    )
    assert list(rows[2].values()) == pytest.approx(list(after))
    assert rows[2] != rows[0]
    report, card = ((tmp_path / name).read_text() for name in ("report.md", "README.md"))
    change = rows[2]["wiki cross_entropy"] - rows[0]["wiki cross_entropy"]
    for text in (report, card):
        assert f"| {change:+.4f} |" in text
        assert "| mood | - | 32 | 8 | accuracy | own | no, held out |" in text
    assert "outside the tasks was not measured" not in card


def test_a_run_without_says_so(toy_run):
    report, card = ((toy_run.output_dir / name).read_text() for name in ("report.md", "README.md"))
    assert "General ability was not measured: give `general_text`" in report
    assert "It was not measured: give `general_text`" in card


def test_restart_measures_what_is_missing(toy_base, tmp_path):
    """Only what can be: the base and the model as it is now. What was measured stays; another text is measured anew."""
    whole = toy.make_run(toy_base, tmp_path / "whole", "inclora", [*toy.tasks(2), general()]).train().metrics["general"]
    folder = tmp_path / "run"
    toy.make_run(toy_base, folder, "inclora", toy.tasks(1)).train()
    rows = toy.make_run(toy_base, folder, "inclora", [*toy.tasks(2), general()]).train().metrics["general"]
    assert rows == whole
    options = {"base_model": toy.load_base(toy_base), "processing_class": toy.tokenizer(), "use_cpu": True}
    again = ContinualRun.from_stack(folder, [*toy.tasks(3)[2:], general()], tmp_path / "more", **options)
    assert again.train().metrics["general"][:3] == whole
    changed = LanguageModelTask("wiki", None, texts("big", 4), held_out=True)
    rows = toy.make_run(toy_base, tmp_path / "whole", "inclora", [*toy.tasks(2), changed]).train().metrics["general"]
    assert rows[1] == {}
    assert rows[0]["wiki cross_entropy"] != whole[0]["wiki cross_entropy"]


def test_perlora_leaves_the_base_alone(toy_base, tmp_path):
    """Without a task id there is nothing but the base model."""
    rows = toy.make_run(toy_base, tmp_path, "perlora", [*toy.tasks(2), general()]).train().metrics["general"]
    assert rows[0] == rows[1] == rows[2]


def test_domains(toy_base, tmp_path):
    """Plain text as tasks: token accuracy in the matrix, cross-entropy beside it, and both get better."""
    domains = [LanguageModelTask(kind, texts(kind, 32), texts(kind, 8)) for kind in ("slow", "dark")]
    result = toy.make_run(toy_base, tmp_path, "inclora", domains).train().metrics
    before, _, after = result["general"]
    for column, kind in enumerate(("slow", "dark")):
        assert after[f"{kind} cross_entropy"] < before[f"{kind} cross_entropy"] - 0.3
        assert result["matrix"][2][column] > result["matrix"][0][column]
    report, card = ((tmp_path / name).read_text() for name in ("report.md", "README.md"))
    assert "Score in % (slow: token_accuracy, dark: token_accuracy). Row:" in report
    assert "| slow | - | 32 | 8 | token_accuracy | none | yes |" in report
    assert "type: token_accuracy" in card
    assert "type: accuracy" not in card


def test_plain_text_needs_a_causal_model(toy_t5, tmp_path):
    with pytest.raises(ValueError, match=r"LanguageModelTask needs a causal LM, got T5.*; remove task 'wiki'"):
        toy.make_run(toy_t5, tmp_path, "inclora", [*toy.tasks(1), general()])


def with_strategy(base, folder, stream, strategy):
    run = toy.make_run(base, folder, "inclora", stream)
    return ContinualRun(
        run.model,
        stream,
        "inclora",
        run.args,
        run.plan.tokenizer,
        adapter_config=run.plan.config,
        strategies=[strategy],
    )


@pytest.mark.parametrize("strategy", [KFac, Drift])
def test_general_text_is_the_zeroth_task(strategy, toy_base, tmp_path):
    """`general=True`: its training texts, never those that are measured. The model moves less there than without."""
    change = {}
    for wanted in (None, True):
        made = strategy(weight=300.0, general=wanted)
        run = with_strategy(toy_base, tmp_path / str(wanted), [*toy.tasks(1), general()], made)
        assert run.plan.strategies[0].general == (wanted and [row["text"] for row in texts("very", 8)])
        before, after = run.train().metrics["general"]
        change[wanted] = abs(after["wiki cross_entropy"] - before["wiki cross_entropy"])
        assert run.plan.strategies[0].tasks == (2 if wanted else 1)
    assert change[True] < change[None] / 2
    other = [*toy.tasks(1), general(train=6)]
    run = with_strategy(toy_base, tmp_path / "True", other, strategy(weight=300.0, general=True))
    with pytest.raises(ValueError, match=r"other settings \(general: "):
        run.train()


def test_general_text_that_is_not_there(toy_base, tmp_path):
    with pytest.raises(ValueError, match="general=True keeps what the base model knows of general text, and no task"):
        with_strategy(toy_base, tmp_path, toy.tasks(1), KFac(general=True))
    for strategy in (KFac, Drift):
        with pytest.raises(ValueError, match="general is a list of texts, or True"):
            strategy(general="wiki.txt")


def test_names_in_prompts_are_told(toy_base, tmp_path, caplog):
    """In the log, at the top of the report and on the card: the toy prompt holds the task's name."""
    toy.make_run(toy_base, tmp_path, "inclora", toy.tasks(1)).train()
    assert "task size: every prompt names the data set (size)" in caplog.text
    for name in ("report.md", "README.md"):
        assert "**Warning: the prompt names the data set** (size)" in (tmp_path / name).read_text()


def test_prompts_that_name_nothing(toy_base, tmp_path, caplog):
    """The style has a name where it is a published one; sizes and effective batch are there."""
    rows = toy.rows(0, 32)
    task = TextTask("abc", rows, rows[:4], labels=toy.KINDS[0], instruction="light", prompt=PROMPT)
    toy.make_run(toy_base, tmp_path, "inclora", [task], max_length=64, gradient_accumulation_steps=2).train()
    report = (tmp_path / "report.md").read_text()
    assert "Warning" not in report + caplog.text
    assert "| abc | - | 32 | 4 | accuracy | jumplora | yes |" in report
    assert "| abc | 4 | 32 | 8 | 0 |" in report  # steps, examples, effective batch, texts cut
    assert 'Prompt: `"Task Instruction: {instruction}' in report


def test_the_tasks_own_data_has_its_own_collator(toy_base, tmp_path):
    """Text that is held out is encoded apart: ready rows go through the Trainer's collator as without it, but for a row
    without a label, which would be a batch whose loss is 0 / 0."""
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "weight": 1.0}] * 8
    ready = Task("ready", Dataset.from_list([{**rows[0], "labels": [-100] * 3}, *rows]))
    alone = toy.make_run(toy_base, tmp_path / "a", "inclora", [ready])
    beside = toy.make_run(toy_base, tmp_path / "b", "inclora", [ready, general()], per_device_train_batch_size=1)
    assert alone.plan.batches is beside.plan.batches is None
    metrics = beside.train().metrics
    assert metrics["general"][1]["wiki cross_entropy"] > 0
    assert (metrics["trained"][0]["train_examples"], metrics["trained"][0]["steps"]) == (8, 8)


def test_two_tasks_of_one_name(toy_base, tmp_path):
    with pytest.raises(ValueError, match="two tasks are called 'size'"):
        toy.make_run(
            toy_base, tmp_path, "inclora", [*toy.tasks(1), dataclasses.replace(toy.tasks(1)[0], held_out=True)]
        )
