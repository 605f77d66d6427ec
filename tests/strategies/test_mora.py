"""MoRA, SMoRA: weights by hand, gradients against the formula, ranks on disk, and what needs a sum says so."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import toy
from datasets import Dataset

from hf_jumplora import Task, load_stack, switch_tasks
from hf_jumplora.cli import main
from hf_jumplora.commands.eval import merged_and_encoder
from hf_jumplora.methods import METHODS
from hf_jumplora.strategies import L2, KFac, Mora, Replay, SMoRA
from hf_jumplora.trainer.router import train_router
from hf_jumplora.tuner import named_layers
from hf_jumplora.tuner.rank_routing import has_router, rank_weights, router_weights


IDS = torch.tensor([[3, 12, 13, 8, 14, 9]])


def test_golden():
    """z = (3, 4, 0), k 2, tau 0.1: by hand; a threshold takes ranks out and leaves the others as they are."""
    z = torch.tensor([[3.0, 4.0, 0.0]])
    torch.testing.assert_close(rank_weights(z, 2, 0.1) * z, torch.tensor([[0.357609, 3.523188, 0.0]]))
    torch.testing.assert_close(rank_weights(z, 1, 0.1, delta=0.7) * z, torch.tensor([[0.0, 3.523188, 0.0]]))
    torch.testing.assert_close(rank_weights(z, 3, 1e9), torch.full((1, 3), 1 / 3))
    assert torch.equal(rank_weights(0 * z, 2, 0.1) * 0 * z, 0 * z)
    wider = torch.tensor([[3.0, 4.0, 5.0, 0.0, 0.0]])  # what ranks of another task do to these
    s = wider / wider.norm()
    torch.testing.assert_close(s[0, :2], torch.tensor([0.424264, 0.565685]))


def test_golden_router(gated, monkeypatch):
    """p = (.5, .75, .25, .731), b = (0, 0, .5, 0), k 2: by hand, k g is the paper's; and how counts, summed over two
    processes, move b."""
    logits, b = torch.tensor([[0.0, math.log(3), -math.log(3), 1.0]], dtype=torch.float64), torch.zeros(4)
    b[2] = 0.5
    torch.testing.assert_close(2 * router_weights(logits, b, 2), torch.tensor([[0, 1.5, 0.5, 0]], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: router_weights(x, b, 2), logits.requires_grad_())
    assert router_weights(torch.full((1, 4), -200.0), b, 2).isfinite().all()
    model, strategy = gated(gate=False), SMoRA()
    monkeypatch.setattr("hf_jumplora.strategies.mora.reduce", lambda n, how: n + torch.tensor([0, 3, 0, 6] * 4))
    strategy.on_task_start(model, "default", None)
    for n in strategy.counts.values():
        n += torch.tensor([5, 0, 0, 2])
    strategy.on_step_end(model, "default")
    for name, layer in named_layers(model):
        assert layer.jumplora_router_b["default"].tolist() == pytest.approx([-1e-5, 1e-5, 1e-5, -1e-5])
        assert not strategy.counts[name].any()


@pytest.mark.parametrize("strategy", [kind(k=k) for kind in (partial(Mora, tau=0.2, delta=0.4), SMoRA) for k in (2, 8)])
def test_layer(strategy, gated, ids, relative_error):
    """A layer with two tasks is the formula, and so are the gradients of the task in training; ranks that nobody has
    chosen get none. With all ranks at tau = infinity, or p = 1/2, it is the mean of what LoRA adds."""
    model = gated(gate=False)
    config = model.peft_config["default"]
    layer = next(layer for _, layer in named_layers(model))
    k, routed = strategy.k, isinstance(strategy, SMoRA)
    strategy.on_task_start(model, "default", None)
    config.inference_mode = True
    more = type(config)(r=4, target_modules=["q_proj", "v_proj"], gate=False, init_weights=False)
    more.parent_adapters = ["default"]
    model.add_adapter("more", more)
    strategy.on_task_start(model, "more", None)
    model.set_adapter("more")
    W = [layer.jumplora_router[name] for name in ("default", "more") if routed]
    A = [layer.jumplora_A[name] for name in ("default", "more")]
    B = [layer.jumplora_B[name] for name in ("default", "more")]
    balance = torch.linspace(-0.2, 0.2, 8)
    if routed:
        layer.jumplora_router_b["default"].copy_(balance[:4])
        layer.jumplora_router_b["more"].copy_(balance[4:])
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def formula(A, B, W, delta):
        z, bank = x.to(A[0].dtype) @ torch.cat(A).T, layer.scaling["more"] * torch.cat(B, 1)
        if routed:
            p = (x.to(A[0].dtype) @ torch.cat(W).T).sigmoid()
            top = p + balance >= (p + balance).topk(k).values[:, -1:]
            g = k * p * top / (p * top).sum(-1, keepdim=True)
            return layer.base_layer(x) + 32 / k * (g * z) @ torch.cat(B, 1).T
        s = F.normalize(z, dim=-1)
        top = s >= s.topk(k).values[:, -1:]
        weights = (s / 0.2).masked_fill(~top, -torch.inf).softmax(-1) * (s >= delta)
        return layer.base_layer(x) + (weights * z) @ bank.T

    torch.testing.assert_close(layer(x), formula(A, B, W, 0.4))
    assert layer.rank_counts is None  # evaluation does not count
    model.train()
    torch.testing.assert_close(layer(x), formula(A, B, W, -1.0))
    layer(x).square().sum().backward()
    copies = [[p.detach().double().requires_grad_() for p in parts] for parts in (A, B, W)]
    formula(*copies, -1.0).square().sum().backward()
    for old, new, expected in ((*own, copy[1].grad) for own, copy in zip((A, B, W), copies, strict=True) if own):
        assert old.grad is None
        assert relative_error(new.grad, expected) < 1e-4
    if routed:
        assert (len(layer.rank_counts), int(layer.rank_counts.sum())) == (8, 3 * k)
        balance.zero_()
        for name in ("default", "more"):
            layer.jumplora_router[name].data.zero_()
            layer.jumplora_router_b[name].zero_()
    for name in ("default", "more"):
        layer.configs[name].rank_routing = {"k": 8} if routed else {"k": 8, "tau": 1e9, "delta": 0.0}
    share = layer.scaling["more"] * (4 if routed else 1) / 8
    plain = sum(share * x @ a.T @ b.T for a, b in zip(A, B, strict=True))
    torch.testing.assert_close(layer(x), layer.base_layer(x) + plain, rtol=1e-4, atol=1e-5)
    layer.configs["default"].rank_routing = {"k": 4} if routed else None
    with pytest.raises(ValueError, match="the ranks of some tasks compete"):
        layer(x)
    with pytest.raises(ValueError, match="all tasks of a stack need the same"):
        strategy.on_task_start(model, "more", None)


@pytest.mark.parametrize(
    ("options", "routing"),
    [(["mora.k=2", "mora.delta=0.1"], {"k": 2, "tau": 0.03, "delta": 0.1}), (["smora.k=1"], {"k": 1})],
    ids=["mora", "smora"],
)
def test_what_needs_a_sum(options, routing, toy_base, tmp_path, capsys):
    """A stack of two tasks: it has their ranks and no others, those of the first as they were when it was finished, and
    is read as a whole or not at all."""
    stack = tmp_path / "stack"
    run = toy.make_run(toy_base, stack, options[0].partition(".")[0], toy.tasks(2, 8, 2), strategies=options)
    run.train()
    model = load_stack(stack)
    trained, moved = dict(named_layers(run.model)), False
    for name, layer in named_layers(model):
        assert {len(A) for A in layer.jumplora_A.values()} == {2}
        assert layer.configs["task_001"].rank_routing == routing
        for part in ("jumplora_A", "jumplora_B", "jumplora_router", "jumplora_router_b"):
            mine, one = getattr(layer, part), getattr(trained[name], part)
            assert list(mine) == list(one) == ["task_000", "task_001"] * ("router" not in part or has_router(routing))
            assert all(torch.equal(mine[task], one[task]) for task in one)
            assert not any(p.requires_grad for p in one.values())
            if part == "jumplora_router_b":
                moved |= any(b.any() for b in mine.values())
    assert moved == has_router(routing)
    for refused in (
        lambda: load_stack(stack, merge=True),
        lambda: load_stack(stack, tasks=["size"]),
        lambda: load_stack(stack, tasks={"size": 0.5}),
        lambda: load_stack(stack, route=lambda features: torch.ones(len(features), 2)),
        lambda: switch_tasks(model, ["size"]),
        lambda: train_router(stack, toy.tasks(2)),
        model.merge_adapter,
    ):
        with pytest.raises(ValueError, match="compete for each token"):
            refused()
    assert "tasks=[" not in (stack / "README.md").read_text() + (stack / "task_000" / "README.md").read_text()
    assert "merge=True" not in (stack / "README.md").read_text()
    assert main(["inspect", str(stack)]) == 0
    assert "compete for each token" in capsys.readouterr().out
    assert merged_and_encoder(str(stack), None, None, None)[0](IDS).logits.equal(model(IDS).logits)
    out = ["--out", str(tmp_path / "out")]
    for command in (
        ["squeeze", "--rank", "1"], ["subset", "--tasks", "size"], ["remove", "--tasks", "size"], ["merge"],
        ["export", "--format", "lora", "--rank", "2"], ["export", "--format", "sparse"],
    ):  # fmt: skip
        assert main([command[0], str(stack), *command[1:], *out]) == 2
        assert "compete for each token" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("reentrant", [False, True])
def test_tokens_are_counted_once(reentrant, toy_base, tmp_path):
    """Whatever checkpointing computes again, and without the evaluations between the steps: n of a step sums to
    k x the tokens of its two micro-batches, in every layer."""
    tokens, totals = [], []

    class Seen(SMoRA):
        def penalty(self, model, inputs, adapter, output):
            tokens.append(inputs["input_ids"].numel())
            return super().penalty(model, inputs, adapter, output)

        def on_step_end(self, model, adapter):
            totals.append({int(n.sum()) for n in self.counts.values()})
            super().on_step_end(model, adapter)

    toy.make_run(
        toy_base, tmp_path, "smora", toy.tasks(1, 16, 4), strategies=[Seen(k=1)], gradient_accumulation_steps=2,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}, eval_strategy="steps",
        eval_steps=1,
    ).train()  # fmt: skip
    assert len(tokens) == 4
    assert totals == [{sum(tokens[:2])}, {sum(tokens[2:])}]


@pytest.mark.parametrize("kind", [Mora, SMoRA])
def test_refused(kind, toy_base, tmp_path):
    for other in (L2(), KFac()):
        with pytest.raises(ValueError, match=f"only Replay goes with {kind.__name__}"):
            kind().check_run([other], None, "none")
    kind().check_run([Replay()], toy.arguments(tmp_path), "ddp")
    with pytest.raises(ValueError, match="which DeepSpeed and FSDP shard"):
        kind().check_run([], None, "zero1")
    for option in ({"factor_optimizer": "muon"}, {"allora_eta": 1.0}):
        with pytest.raises(ValueError, match=f"which {kind.__name__} has not"):
            kind().check_run([], toy.arguments(tmp_path, **option), "none")
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}])
    task = Task("own", rows, args=toy.arguments(tmp_path, factor_optimizer="altlora"))
    name = kind.__name__.lower()
    with pytest.raises(ValueError, match=f"which {kind.__name__} has not"):
        toy.make_run(toy_base, tmp_path, name, [task])
    for method in ("jumplora", "seqlora"):
        with pytest.raises(ValueError, match=f"method='{name}'"):
            toy.make_run(toy_base, tmp_path, method, strategies=[kind()])
    for options in ({"k": 0}, {"tau": 0.0}, {"delta": 1.0}) if kind is Mora else ({"k": 0}, {"rate": math.inf}):
        with pytest.raises(ValueError, match=f"{kind.__name__} needs"):
            kind(**options)
    assert METHODS[name].make_strategies([f"{name}.k=4"])[0].k == 4
