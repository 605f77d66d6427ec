"""Tasks that bring a trainer and arguments of their own, and the score of preferences."""

import pytest
import torch
import toy

from hf_jumplora import ContinualSeq2SeqTrainer, Task
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
