"""I-LoRA: the distance against dense float64 autograd, the moving average, what the slow adapter is for, restarts."""

import re
from types import SimpleNamespace

import pytest
import torch
import toy
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence

from hf_jumplora import ContinualTrainer, JumpLoraConfig, load_stack
from hf_jumplora.strategies import L2, ILora
from hf_jumplora.tuner import named_layers


def examples(count, rows=None, batch=1):
    """`rows` (lists of token ids, the last two the answer) padded to batches, as a trainer would."""
    for first in range(0, min(count, len(rows)), batch):
        ids = [torch.tensor(rows[i]) for i in range(first, min(first + batch, len(rows)))]
        labels = [torch.cat([torch.full_like(row[:-2], -100), row[-2:]]) for row in ids]
        yield {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


@pytest.mark.parametrize(("base", "targets"), [("toy_base", ["q_proj", "o_proj"]), ("toy_t5", ["q", "o"])])
def test_distance(base, targets, request, relative_error):
    """Value and gradients, from plain matrices W + s B A in float64 and one example at a time, without padding."""
    folder = request.getfixturevalue(base)
    ilora = ILora(weight=0.7, reservoir=2)
    torch.manual_seed(5)
    config = JumpLoraConfig(r=2, lora_alpha=8, target_modules=targets, gate=False, init_weights=False)
    config.lora_dropout = 0.5  # not in the distance
    model = get_peft_model(toy.load_base(folder), config).train()
    ilora.on_task_start(model, "default", examples)
    ilora.training_data([[9, 9]], 1, [[[5, 6, 7, 8, 9], [10, 11, 12]]])
    factors = {n: (la.jumplora_A["default"], la.jumplora_B["default"]) for n, la in named_layers(model)}
    slow = {n: [p.detach().double().clone() for p in pair] for n, pair in factors.items()}
    for pair in factors.values():
        for p in pair:
            p.data += 0.3 * torch.randn_like(p)
    batch = next(examples(2, [[3, 4, 5], [6, 7, 8]], 2))
    penalty = ilora.penalty(model, batch, "default", {})
    assert model.training
    penalty.backward()

    dense = toy.load_base(folder).double()
    fast = {n: [p.detach().double().requires_grad_() for p in pair] for n, pair in factors.items()}

    def states(pairs, row):
        changed = {
            f"{re.sub('^base_model.model.', '', n)}.weight": dense.get_submodule(
                re.sub("^base_model.model.", "", n)
            ).weight.detach()
            + 4 * B @ A
            for n, (A, B) in pairs.items()
        }
        inputs = {**next(examples(1, [row])), "output_hidden_states": True}
        output = functional_call(dense, changed, (), inputs)
        found = output.get("hidden_states") or (*output.encoder_hidden_states, *output.decoder_hidden_states)
        answer = len(output.get("encoder_hidden_states") or ())
        return [s[0] if not answer or i < answer else s[0, -2:] for i, s in enumerate(found)]

    total, count = 0.0, 0
    for row in ([5, 6, 7, 8, 9], [10, 11, 12]):
        for f, s in zip(states(fast, row), states(slow, row), strict=True):
            total, count = total + (f - s).square().sum(), count + f.numel()
    expected = 0.7 * total / count
    assert relative_error(penalty, expected) < 1e-5
    leaves = [p for pair in fast.values() for p in pair]
    ours = [p.grad for pair in factors.values() for p in pair]
    for mine, theirs in zip(ours, torch.autograd.grad(expected, leaves), strict=True):
        assert theirs.abs().sum() > 0
        assert relative_error(mine, theirs) < 1e-4


def test_first_task_and_weight_zero(toy_base):
    """Without a memory, or without a weight, no second forward pass."""
    batch = next(examples(1, [[3, 4, 5]]))
    first = ILora()
    assert first.training_data(["a"], 0, []) == ["a"]
    assert first.penalty(None, batch, "default", {}) is None
    free = ILora(weight=0.0)
    assert len(free.training_data(["a"], 1, [["b", "c"]])) == 3
    assert free.penalty(None, batch, "default", {}) is None


def record(run):
    """Trains; returns the fast parameters after each step, task by task, by the name of layer and factor."""
    strategy, steps = run.plan.strategies[0], []
    start, end = strategy.on_task_start, strategy.on_step_end

    def now(model):
        return {n: p.detach().clone() for n, p in L2.parameters(model, "default")}

    strategy.on_task_start = lambda model, *rest: (start(model, *rest), steps.append([now(model)]))
    strategy.on_step_end = lambda model, adapter: (end(model, adapter), steps[-1].append(now(model)))
    run.train()
    return steps


def test_moving_average(toy_base, tmp_path):
    """slow_k = decay slow_{k-1} + (1 - decay) fast_k through both tasks; slow is stored, fast goes on."""
    run = toy.make_run(toy_base, tmp_path, "ilora", stream=toy.tasks(2))
    run.plan.strategies[:] = [ILora(decay=0.8, weight=0.0)]
    steps = record(run)
    assert [len(task) - 1 for task in steps] == [8, 16]  # task 1 has the 32 rows of task 0 behind its own
    slow = {name: p.double() for name, p in steps[0][0].items()}
    for task in range(2):
        for name in slow:
            for fast in steps[task][1:]:
                slow[name] = 0.8 * slow[name] + 0.2 * fast[name].double()
        files = load_file(tmp_path / f"task_{task:03d}" / "adapter_model.safetensors")
        for name, expected in slow.items():
            layer, factor = name.rsplit(".", 1)
            value = next(v for key, v in files.items() if f"{layer}.jumplora_{factor}" in key)
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
            assert not torch.allclose(value, steps[task][-1][name], rtol=1e-3)
    for name, p in steps[1][0].items():  # the fast adapter of task 1 starts where that of task 0 ended
        assert torch.equal(p, steps[0][-1][name])
    ids = torch.arange(3, 15)[None]
    assert torch.equal(run.model(ids).logits, load_stack(tmp_path)(ids).logits)


def encoded(run):
    return [run.plan.encoder.train_rows(run.plan.tasks[0])[i] for i in range(8)]


@torch.no_grad()
def representations(model, run):
    """Last hidden states of the first task's training texts."""
    rows = [torch.tensor([row["input_ids"]]) for row in encoded(run)]
    return torch.cat([model.eval()(row, output_hidden_states=True).hidden_states[-1][0] for row in rows])


def test_what_the_paper_says(toy_base, tmp_path):
    """The slow adapter forgets less than the fast one, and the distance holds representations of replayed texts."""
    moved = {}
    for weight in (0.0, 30.0):
        folder = tmp_path / str(weight)
        run = toy.make_run(toy_base, folder, "ilora", stream=toy.tasks(2), learning_rate=2e-2)
        run.plan.strategies[:] = [ILora(reservoir=4, decay=0.9, weight=weight)]
        run.train()
        first = PeftModel.from_pretrained(toy.load_base(toy_base), folder, subfolder="task_000")
        moved[weight] = (representations(run.model, run) - representations(first, run)).square().mean()
        if weight == 0:
            fast = PeftModel.from_pretrained(toy.load_base(toy_base), folder, subfolder="task_001")
            for name, p in L2.parameters(fast, "default"):
                p.data = run.plan.strategies[0].fast[name]
            assert first_task_loss(run.model, run) < first_task_loss(fast, run)
    assert moved[30.0] < 0.7 * moved[0.0]


@torch.no_grad()
def first_task_loss(model, run):
    rows = [{key: torch.tensor([row[key]]) for key in ("input_ids", "labels")} for row in encoded(run)]
    return sum(model(**row).loss for row in rows)


def test_sharded_parameters_are_refused(toy_base, tmp_path):
    class Sharded(ContinualTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(r=2, target_modules=["q_proj"], gate=False))
    with pytest.raises(ValueError, match=r"ILora\(.*follows every step of the parameters, which are not whole under"):
        Sharded(model=model, args=toy.arguments(tmp_path), strategies=[ILora()])


def test_a_checkpoint_without_the_slow_adapter(toy_base, tmp_path):
    """Is an error: the run would not be the one that was interrupted."""
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(r=2, target_modules=["q_proj"], gate=False))
    trainer = ContinualTrainer(model=model, args=toy.arguments(tmp_path), strategies=[ILora()])
    with pytest.raises(FileNotFoundError, match=r"strategies\.safetensors"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay": 1.5}, "decay is between 0 and 1"),
        ({"weight": -1.0}, "ILora's penalty must not be negative"),
        ({"reservoir": 0}, "reservoir is a number"),
        ({"reservoir": None, "fraction": 0.0}, "fraction must be"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        ILora(**options)


@pytest.mark.parametrize(("mode", "gate"), [("incremental", False), ("joint", False), ("sequential", True)])
def test_adapters_it_cannot_work_with(mode, gate):
    with pytest.raises(ValueError, match="use it through method='ilora'"):
        ILora().check(mode, SimpleNamespace(gate=gate))


def test_a_model_without_hidden_states(toy_base):
    ilora = ILora()
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(r=2, target_modules=["q_proj"], gate=False))
    ilora.on_task_start(model, "default", examples)
    ilora.training_data([[1]], 1, [[[3, 4, 5]]])
    model.forward = lambda **inputs: {"logits": None}
    with pytest.raises(ValueError, match="returns none with output_hidden_states"):
        ilora.penalty(model, next(examples(1, [[3, 4]])), "default", {})
