"""What strategies are given: examples ready for the model, the data of a task, the model without its new adapter."""

from dataclasses import dataclass, field

import pytest
import torch
import toy
from peft import get_peft_model
from torch.utils.data import Dataset as TorchDataset

from hf_jumplora import ContinualRun, JumpLoraConfig, Task, finish_adapter
from hf_jumplora.strategies import Strategy
from hf_jumplora.tuner import without_adapter


@dataclass
class Reader(Strategy):
    """Keeps the examples it is given, and mixes earlier tasks in."""

    count: int = 5
    texts: list | None = None
    seen: list = field(default_factory=list, repr=False)
    data: list = field(default_factory=list, repr=False)

    def training_data(self, dataset, index, earlier):
        self.data.append((index, len(dataset), [len(rows) for rows in earlier]))
        return dataset

    def on_task_start(self, model, adapter, examples):
        if self.texts:
            self.seen.append(list(examples(self.count, self.texts)))

    def on_task_end(self, model, adapter, examples):
        self.seen.append([list(examples(self.count)), list(examples(self.count))])


@pytest.mark.parametrize("base", ["toy_base", "toy_t5"])
def test_examples_of_text_tasks(base, request, tmp_path):
    """Batches of one, complete, the same every time, of the task's own training set."""
    reader = Reader()
    run = toy.make_run(request.getfixturevalue(base), tmp_path, stream=toy.tasks(2))
    run.plan.strategies[:] = [reader]
    run.train()
    assert reader.data == [(0, 32, []), (1, 32, [32])]
    for task, (first, again) in zip(toy.tasks(2), reader.seen, strict=True):
        rows = run.plan.encoder.train_rows(task)
        known = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows}
        assert len(first) == 5
        for a, b in zip(first, again, strict=True):
            assert set(a) == {"input_ids", "attention_mask", "labels"}
            assert len(a["input_ids"]) == 1
            assert all(torch.equal(a[key], b[key]) for key in a)
            assert (tuple(a["input_ids"][0].tolist()), tuple(a["labels"][0].tolist())) in known
        assert len({tuple(a["input_ids"][0].tolist()) for a in first}) > 1


def test_examples_of_texts(toy_base, toy_t5, tmp_path):
    """Texts of no task for a causal model; another model needs rows."""
    reader = Reader(texts=["the very new cat", "ant bee"])
    run = toy.make_run(toy_base, tmp_path / "causal", stream=toy.tasks(1))
    run.plan.strategies[:] = [reader]
    run.train()
    texts = [run.plan.tokenizer.decode(example["input_ids"][0]) for example in reader.seen[0]]
    assert sorted(texts) == ["ant bee", "the very new cat"]
    assert all(torch.equal(example["input_ids"], example["labels"]) for example in reader.seen[0])
    run = toy.make_run(toy_t5, tmp_path / "seq2seq", stream=toy.tasks(1))
    run.plan.strategies[:] = [Reader(texts=["ant bee"])]
    with pytest.raises(ValueError, match="texts serve causal models only"):
        run.train()


class Rows(TorchDataset):
    """A data set that is no `datasets.Dataset`, with a column the model does not know."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"input_ids": [3 + i, 4, 5], "labels": [3 + i, 4, 5], "comment": "no tensor"}


def test_examples_of_any_data_set(toy_base, tmp_path):
    reader = Reader(count=100)
    run = ContinualRun(
        toy.load_base(toy_base), [Task("any", Rows(8))], "inclora", toy.arguments(tmp_path), toy.tokenizer(),
        adapter_config=JumpLoraConfig(r=2, target_modules=["q_proj"]), strategies=[reader],
        data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]},
    )  # fmt: skip
    run.train()
    first = sorted(int(example["input_ids"][0, 0]) for example in reader.seen[0][0])
    assert first == list(range(3, 11))


def test_refused_before_training(toy_base, tmp_path):
    class Refuses(Strategy):
        def check(self, mode, config):
            raise ValueError(f"not with mode={mode!r} and r={config.r}")

    with pytest.raises(ValueError, match="not with mode='incremental' and r=2"):
        ContinualRun(
            toy.load_base(toy_base), toy.tasks(1), "inclora", toy.arguments(tmp_path), toy.tokenizer(),
            adapter_config=JumpLoraConfig(r=2, target_modules=["q_proj"]), strategies=[Refuses()],
        )  # fmt: skip


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_without_adapter(gated, add_task, ids, merged, gate):
    """The model before the new adapter, parents live or merged; itself again afterwards, after an error too."""
    model = gated(gate=gate)
    finish_adapter(model, "default", "task_000")
    before = model(ids).logits
    add_task(model, ["task_000"], gate=gate, lora_dropout=0.5)
    if merged:
        for layer in model.modules():
            if hasattr(layer, "jumplora_A"):
                layer.merge(adapter_names=["task_000"])
    after = model(ids).logits
    assert not torch.allclose(before, after)
    model.train()
    with without_adapter(model, "default"):
        logits = model(ids).logits
    assert not logits.requires_grad
    torch.testing.assert_close(logits, before)
    with pytest.raises(KeyError), without_adapter(model, "default"):
        raise KeyError
    assert model.training
    torch.testing.assert_close(model.eval()(ids).logits, after)


def test_without_the_first_adapter(tiny_llama, ids):
    base = tiny_llama()
    expected = base(ids).logits
    model = get_peft_model(base, JumpLoraConfig(r=2, target_modules=["q_proj"], init_weights=False, gate=False))
    with without_adapter(model, "default"):
        assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(model(ids).logits, expected)
