"""Unlearn: its loss and step by hand, a forget task that can be taken away again, and what it refuses."""

import pytest
import torch
import toy
from test_every_method import RESTART, Interrupt
from transformers import AutoTokenizer

from hf_jumplora import ContinualRun, Task, load_stack
from hf_jumplora.data import Encoder
from hf_jumplora.stack import read_manifest
from hf_jumplora.stack.operations import remove
from hf_jumplora.strategies import KFac, Unlearn
from hf_jumplora.tuner import named_layers


ROWS = [{"input_ids": [8, 9], "labels": [8, 9]}]
IDS = torch.tensor([[3, 12, 13, 8, 14, 9]])


class Fixed:
    """A model whose loss is a parameter."""

    training = False

    def __init__(self, loss):
        self.loss = torch.tensor(loss, requires_grad=True)

    def eval(self): ...

    def train(self, mode): ...

    def base_model(self, **batch):
        return {"loss": self.loss, "logits": torch.zeros(1, 2, 16)}


@pytest.mark.parametrize(("loss", "bound", "expected"), [(3.0, 4, 1.0), (5.0, 4, 0.0), (1.0, None, 1.7726)])
def test_penalty(loss, bound, expected):
    """weight max(0, bound - loss), without a gradient above the bound; the default is that of a uniform guess."""
    strategy, model = Unlearn(ROWS, bound=bound), Fixed(loss)
    strategy.examples = lambda count, rows, batch: iter([{}])
    penalty = strategy.penalty(model, {"input_ids": IDS}, "default", {})
    penalty.backward()
    assert penalty.item() == pytest.approx(expected, abs=1e-4)
    assert model.loss.grad == (-1 if expected else 0)


def test_shrink(gated):
    """(3, 4) with t = 1 becomes (2.4, 3.2), and a layer that is smaller than t goes to 0."""
    model, strategy = gated(gate=False), Unlearn(ROWS, group_weight=10.0)
    strategy.on_task_start(model, "default", None)
    layers = [layer for _, layer in named_layers(model)]
    factors = [(layer.jumplora_A["default"], layer.jumplora_B["default"]) for layer in layers]
    for A, B in factors:
        A.data.zero_()[0, 0] = 3.0
        B.data.zero_()[0, 0] = 4.0
    for factor in factors[1]:
        factor.data.mul_(0.1)
    optimizer = torch.optim.SGD([p for pair in factors for p in pair], lr=0.1)
    strategy.on_optimizer(optimizer)
    optimizer.step()
    assert [(A[0, 0].item(), B[0, 0].item()) for A, B in factors[:2]] == [pytest.approx((2.4, 3.2)), (0.0, 0.0)]


def mean_loss(model, rows):
    with torch.no_grad():
        return sum(model(**{k: torch.tensor([v]) for k, v in row.items()}).loss.item() for row in rows) / len(rows)


def test_a_task_that_forgets(toy_run, toy_base, tmp_path):
    """Added to a finished stack. The loss on what is to be forgotten rises, that on the rest does not; a restart in
    mid-task gives the same bits, and without the task the model is the one before, bit for bit."""
    encoder = Encoder(AutoTokenizer.from_pretrained(toy_base), 32, seq2seq=False)
    kept, forgotten = (encoder.train_rows(task) for task in toy.tasks()[1:])

    def more(folder, callbacks=(), weight=3.0):
        task = toy.tasks()[1]  # what is kept
        task.name, task.strategies = "forget-mood", [Unlearn(forgotten, weight=weight)]
        ContinualRun.from_stack(
            toy_run.output_dir, [task], tmp_path / folder, processing_class=toy.tokenizer(), callbacks=list(callbacks),
            use_cpu=True, report_to=[], **RESTART,
        ).train()  # fmt: skip

    more("whole")
    before, after = load_stack(toy_run.output_dir), load_stack(tmp_path / "whole")
    assert mean_loss(after, forgotten) > mean_loss(before, forgotten) + 0.5
    assert mean_loss(after, kept) < mean_loss(before, kept) + 0.1
    remove(tmp_path / "whole", ["forget-mood"], tmp_path / "without")
    assert torch.equal(load_stack(tmp_path / "without")(IDS).logits, before(IDS).logits)

    with pytest.raises(KeyboardInterrupt):
        more("broken", [Interrupt("task_003")])
    with pytest.raises(ValueError, match="task 3: 'forget-mood "):  # other options make another task
        more("broken", weight=1.0)
    more("broken")
    files = [read_manifest(tmp_path / name).tasks[3]["files"] for name in ("whole", "broken")]
    assert files[0]["adapter_model.safetensors"] == files[1]["adapter_model.safetensors"]


def test_refused(toy_base, tmp_path):
    def run(strategies, method="inclora"):
        task = toy.tasks(1, train=8)[0]
        task.strategies = strategies
        return toy.make_run(toy_base, tmp_path, method, stream=[toy.tasks(2)[1], task])

    encoder = Encoder(AutoTokenizer.from_pretrained(toy_base), 32, seq2seq=False)
    same = encoder.train_rows(toy.tasks(1, train=8)[0])
    with pytest.raises(ValueError, match="rows to forget are training rows of the same task too"):
        run([Unlearn(same)]).train()
    assert not list(tmp_path.glob("task_*"))
    with pytest.raises(ValueError, match=r"rows as the trainer takes them"):
        Unlearn([{"text": "a"}]).training_data(same, 0, [])
    with pytest.raises(ValueError, match=r"task 'size': .* remembers a task for later ones"):
        run([KFac()])
    with pytest.raises(ValueError, match="mode 'sequential' has no such"):
        run([Unlearn(ROWS)], method="seqlora")
    with pytest.raises(ValueError, match="strategies is a list"):
        run(Unlearn(ROWS))
    with pytest.raises(ValueError, match="strategies is a list"):
        run([Unlearn(ROWS)], method="mtl")
    with pytest.raises(ValueError, match="which DeepSpeed replaces"):
        Unlearn(ROWS, group_weight=1.0).check_run([], None, "zero2")
    for options in ({"weight": 0}, {"bound": -1}, {"group_weight": -1}):
        with pytest.raises(ValueError, match="needs weight > 0"):
            Unlearn(ROWS, **options)
    with pytest.raises(ValueError, match="no rows to forget"):
        Unlearn([])
    assert isinstance(Task("a", ROWS).strategies, tuple)
