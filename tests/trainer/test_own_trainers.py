"""Tasks that bring a trainer and arguments of their own, and the score of preferences."""

import pytest
import torch
import toy
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import Trainer

from hf_jumplora import ContinualSeq2SeqTrainer, Task, make_continual
from hf_jumplora.strategies import Replay
from hf_jumplora.trainer.preferences import preference_accuracy


ROWS = [
    {"prompt": f"the {subject} =", "chosen": chosen, "rejected": rejected}
    for subject, chosen, rejected in (
        ("ant", " tiny", " huge"),
        ("bee", " very dark", " pale"),
        ("cat", " wild", " calm"),
    )
] * 2


def log_likelihood(model, prompt, answer):
    """One row by itself, token by token: log p(answer, end of sequence | prompt)."""
    tokenizer = toy.tokenizer()
    before, said = tokenizer(prompt).input_ids, [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([before + said])).logits[0].log_softmax(-1)
    return sum(log_p[len(before) - 1 + k, token].item() for k, token in enumerate(said))


@pytest.mark.parametrize("batch", [1, 4])
def test_preference_accuracy(batch, toy_base):
    """The share of rows whose chosen answer is likelier, whatever is padded; a tie is wrong."""
    model = toy.load_base(toy_base).eval()
    right = [
        log_likelihood(model, row["prompt"], row["chosen"]) > log_likelihood(model, row["prompt"], row["rejected"])
        for row in ROWS
    ]
    found = preference_accuracy(model, toy.tokenizer(), ROWS, 32, batch)
    assert found == sum(right) / len(ROWS)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in ROWS]
    assert preference_accuracy(model, toy.tokenizer(), swapped, 32, batch) == pytest.approx(1 - found)
    same = [{**row, "rejected": row["chosen"]} for row in ROWS]
    assert preference_accuracy(model, toy.tokenizer(), same, 32, batch) == 0


def test_preferences_of_a_tokenizer_that_appends_an_end(toy_base):
    """The end of the prompt's own tokens is no part of it."""
    model, tokenizer = toy.load_base(toy_base), toy.tokenizer()
    rows = [{"prompt": "the ant =", "chosen": f" {a}", "rejected": f" {b}"} for a in toy.SUBJECTS for b in toy.SUBJECTS]
    expected = preference_accuracy(model, tokenizer, rows, 32)
    last = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer._tokenizer.post_processor = last
    assert preference_accuracy(model, tokenizer, rows, 32) == expected == 28 / 64


def test_messages_are_preferences_too(toy_base):
    """Lists of messages give what the same texts give."""
    tokenizer, model = toy.tokenizer(), toy.load_base(toy_base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    assert preference_accuracy(model, tokenizer, rows, 32) == preference_accuracy(model, tokenizer, ROWS, 32)


def encoded():
    """Rows as the Trainer takes them."""
    return [{"input_ids": [8 + k % 4, 9], "labels": [8 + k % 4, 9]} for k in range(32)]


def test_a_task_with_arguments_of_its_own(toy_base, tmp_path):
    """They are what the task is trained with, and another value is another task to a restart."""
    tasks = [Task("a", encoded()), Task("b", encoded(), args=toy.arguments(tmp_path / "x", max_steps=6))]
    run = toy.make_run(toy_base, tmp_path / "out", "inclora", stream=tasks)
    metrics = run.train().metrics
    assert [info["steps"] for info in metrics["trained"]] == [8, 6]
    tasks = [Task("a", encoded()), Task("b", encoded(), args=toy.arguments(tmp_path / "x", max_steps=7))]
    with pytest.raises(ValueError, match="task 1: 'b "):
        toy.make_run(toy_base, tmp_path / "out", "inclora", stream=tasks).train()


class Encodes(Trainer):
    """As TRL's trainers: the first answer of each task is cut off, and a task without others' rows is packed."""

    def __init__(self, *args, train_dataset, **options):
        rows = [{**row, "labels": [-100, -100] if i == 0 else row["labels"]} for i, row in enumerate(train_dataset)]
        rows = rows if len(rows) > 32 else rows[:5]
        super().__init__(*args, train_dataset=Dataset.from_list(rows), **options)

    def train(self, *args, **options):
        OWN.append((self.own_rows, len(self.train_dataset)))
        return super().train(*args, **options)


OWN = []


def test_the_rows_of_a_task_among_what_its_trainer_makes_of_them(toy_base, tmp_path):
    stream = [Task(name, Dataset.from_list(encoded())) for name in ("a", "b")]
    options = {"trainer_cls": make_continual(Encodes), "max_steps": 1}
    toy.make_run(toy_base, tmp_path, "replay", stream, strategies=[Replay(fraction=0.25)], **options).train()
    assert OWN == [(4, 4), (31, 39)]


def test_eval_rows_without_a_label(toy_base, tmp_path):
    """Would make a loss NaN, and are left out where one is looked at."""
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [label, label]} for label in (-100, 4, 4)])

    def kept(compute=None, metric="loss", **options):
        stream = [Task("a", encoded(), rows, compute, metric)]
        return len(toy.make_run(toy_base, tmp_path, "inclora", stream, **options).plan.tasks[0].eval_dataset)

    assert (kept(), kept(dict), kept(dict, "accuracy")) == (2, 2, 3)
    assert kept(dict, "accuracy", metric_for_best_model="eval_loss") == 2
    with pytest.raises(ValueError, match=r"task 'a': 1 of 1 eval rows have no label"):
        toy.make_run(toy_base, tmp_path, "inclora", [Task("a", encoded(), rows.select([0]), metric="loss")])


def test_mistakes(toy_base, tmp_path):
    own, preference = {"trainer_cls": ContinualSeq2SeqTrainer}, {"metric": "preference_accuracy"}
    text = toy.tasks(1)[0]
    text.trainer_cls = ContinualSeq2SeqTrainer
    cases = [
        ("a run encodes text tasks itself", "jumplora", [text]),
        ("all tasks are trained at once", "mtl", [Task("a", encoded(), **own)]),
        ("there is no 'prompt'", "jumplora", [Task("a", encoded(), [{"text": "x"}], **preference)]),
    ]
    for words, method, tasks in cases:
        with pytest.raises(ValueError, match=words):
            toy.make_run(toy_base, tmp_path, method, stream=tasks)
