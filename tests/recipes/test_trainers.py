"""The recipes for every trainer, in process, on the toy model: they train, evaluate every task, and leave a stack."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import toy

from hf_jumplora import load_stack
from hf_jumplora.report.folder import read_run


RECIPES = Path(__file__).parents[2] / "recipes"
COMMON = [
    "--use_cpu", "True", "--max_steps", "6", "--per_device_train_batch_size", "4", "--max_length", "48",
    "--learning_rate", "1e-2", "--r", "2", "--target_modules", "q_proj", "--logging_steps", "3",
]  # fmt: skip


@pytest.fixture
def start(monkeypatch, toy_base, tmp_path):
    """`start(recipe, *options)`: its main with the toy model; returns the content of metrics.json."""
    monkeypatch.syspath_prepend(str(RECIPES))
    monkeypatch.setattr("hf_jumplora.report.report.draw_matrix", lambda result, path: None)

    def start(name, *options):
        out = tmp_path / "out"
        argv = [name, "--model", toy_base, "--output_dir", str(out), "--cache_dir", str(tmp_path / "cache"), *COMMON]
        monkeypatch.setattr(sys, "argv", [*argv, *options])
        importlib.import_module(name).main()
        metrics = read_run(out).metrics
        assert all(0 <= score <= 1 for row in metrics["matrix"] for score in row)
        return metrics

    return start


def test_cpt_cl(start, tmp_path, capsys):
    """As docs/recipes.md starts it for H2LooP Spark, with half of the toy model's width for its rank."""
    page = (RECIPES.parent / "docs" / "recipes.md").read_text()
    options = page.split("--stream domains \\\n")[1].split("--output_dir")[0].replace("512", "16").split()
    metrics = start("cpt_cl", *options, "--per_device_eval_batch_size", "40")
    assert metrics["tasks"] == ["diary", "glossary", "quiz"]
    config = json.loads((tmp_path / "out" / "task_002" / "adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"], len(config["target_modules"])) == (16, True, 14)  # 7 of each block
    table = capsys.readouterr().out.split("\nperplexity\n")[1].splitlines()
    assert table[0].split() == ["trained", "on", "diary", "glossary", "quiz", "notes"]
    last = [
        math.exp(metrics["general"][-1][f"{name} cross_entropy"]) for name in ("diary", "glossary", "quiz", "notes")
    ]
    assert list(map(float, table[-1].split()[1:])) == pytest.approx(last, abs=0.01)


def test_seq_cls_cl(start, tmp_path):
    metrics = start("seq_cls_cl", "--max_train", "32", "--max_eval", "16")
    assert len(metrics["tasks"]) == 4
    model = load_stack(tmp_path / "out", merge=True)
    assert model.score.weight.shape[0] == 16  # four labels of each task
    base = type(model).from_pretrained(tmp_path / "out" / "base")
    assert model.score.weight.equal(base.score.weight)  # the head is frozen


def test_sft_cl(start, tmp_path, monkeypatch):
    """Chats, packed, with the loss on what the assistant says; then files of one's own."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    packed, pack = [], sft.pack_dataset
    monkeypatch.setattr(sft, "pack_dataset", lambda *args, **options: packed.append(1) or pack(*args, **options))
    metrics = start("sft_cl", "--demo_rows", "32", "--method", "jumplora", "--packing", "True")
    assert metrics["tasks"] == ["animals", "places", "moods", "foods"]
    assert len(packed) >= 4  # each task's rows
    chats = importlib.import_module("sft_cl")
    tokenizer = toy.tokenizer()
    tokenizer.chat_template = chats.CHAT_TEMPLATE
    messages = [{"role": "user", "content": "the ant ="}, {"role": "assistant", "content": "tiny"}]
    found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    said = [t for t, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(said) == "tiny</s>" or tokenizer.decode(said) == "tiny </s>"
    file = tmp_path / "tickets.jsonl"
    file.write_text("".join(json.dumps({"prompt": "the ant =", "completion": " tiny"}) + "\n" for _ in range(10)))
    ((name, (train, evaluated)),) = chats.file_chats([str(file)], 0.2).items()
    assert (name, len(train), len(evaluated)) == ("tickets", 8, 2)
    file.write_text('{"text": "x"}\n{"text": "y"}\n')
    with pytest.raises(ValueError, match=r"tickets\.jsonl: expected two rows or more with 'messages'"):
        chats.file_chats([str(file)], 0.2)


def test_tasks_of_different_kinds(start, tmp_path, monkeypatch):
    """SFT, DPO and GRPO in one run; all are evaluated after each, and the stack is the model in memory."""
    pytest.importorskip("trl")
    kinds = importlib.import_module("sft_dpo_cl")
    assert kinds.begins_with_answer([" tiny", "huge"], answer=["tiny", "tiny"]) == [1.0, 0.0]
    # The toy model says nothing that deserves a reward, and without any difference nothing is learned.
    letters = lambda completions, **kwargs: [float(sum(map(ord, text)) % 5) for text in completions]  # noqa: E731
    monkeypatch.setattr(kinds, "begins_with_answer", letters)
    metrics = start("sft_dpo_cl", "--demo_rows", "32", "--max_completion_length", "2")
    assert metrics["tasks"] == ["examples", "preferences", "reward"]
    logged = {line["task"]: line for line in read_run(tmp_path / "out").history}
    assert "rewards/margins" in logged["preferences"]
    assert "reward" in logged["reward"]
    assert len(load_stack(tmp_path / "out").stack_tasks) == 3
