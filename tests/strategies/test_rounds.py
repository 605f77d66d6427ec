"""Rounds of a task: falling ranks, boosting, ends at a plateau; a round starts afresh, frozen ranks stay, refusals."""

import pytest
import torch
import toy

from hf_jumplora import load_stack
from hf_jumplora.methods import METHODS
from hf_jumplora.stack.operations import open_tasks
from hf_jumplora.strategies import L2, Boost, Dps, Replay, Squeeze
from hf_jumplora.strategies.rounds import quota
from hf_jumplora.tuner import named_layers


def factors(model, adapter="default"):
    return [(layer.jumplora_A[adapter], layer.jumplora_B[adapter]) for _, layer in named_layers(model)]


def started(strategy, model, steps):
    """The strategy at the first step of a task, and the optimizer that it knows."""
    strategy.steps = steps
    strategy.on_task_start(model, "default", lambda *given: iter([{}]))
    torch.manual_seed(2)
    for _, B in factors(model):
        B.data.normal_()
    optimizer = torch.optim.AdamW([p for pair in factors(model) for p in pair], lr=1e-2, weight_decay=0.0)
    strategy.on_optimizer(optimizer)
    return optimizer


def a_step(model, strategy, optimizer, ids):
    optimizer.zero_grad()
    model(ids).logits.square().sum().backward()
    strategy.on_gradients(model, "default")
    optimizer.step()
    strategy.on_step_end(model, "default")


def test_ranks_fall(gated, ids):
    """B A is cut to the best of half the rank after each round, whose singular values say so, and trained on there."""
    model, strategy = gated(gate=False, init_weights=True, r=2), Squeeze(rounds=3)
    optimizer = started(strategy, model, steps=6)
    assert [len(A) for A, _ in factors(model)] == [8] * 4
    scalings = [layer.scaling["default"] for _, layer in named_layers(model)]
    for strategy.step, rank in enumerate([8, 4, 4, 2, 2, 2]):
        optimizer.zero_grad()
        model(ids).logits.square().sum().backward()
        optimizer.step()
        products = [(B @ A).detach() for A, B in factors(model)]
        strategy.on_step_end(model, "default")
        for (A, B), before in zip(factors(model), products, strict=True):
            S = torch.linalg.svdvals(before)
            assert int(((B != 0).any(0) | (A != 0).any(1)).sum()) <= rank
            error = torch.linalg.matrix_norm(before - B @ A, 2)
            torch.testing.assert_close(error, S[rank], rtol=1e-3, atol=1e-4)
        assert (len(optimizer.state) == 0) == (strategy.step in (1, 3))
    updates = [layer.update("default") for _, layer in named_layers(model)]
    strategy.on_task_end(model, "default", None)
    assert [len(A) for A, _ in factors(model)] == [2] * 4
    assert [layer.scaling["default"] for _, layer in named_layers(model)] == scalings
    for (_, layer), update in zip(named_layers(model), updates, strict=True):
        torch.testing.assert_close(layer.update("default"), update, rtol=1e-4, atol=1e-5)


def test_a_layer_that_has_learned_nothing_yet_goes_on(gated):
    """With both factors at 0 it would get no gradient any more."""
    model, strategy = gated(gate=False, init_weights=True, r=2), Squeeze(rounds=2)
    optimizer = started(strategy, model, steps=4)
    for _, B in factors(model):
        B.data.zero_()
    strategy.on_optimizer(optimizer)
    for strategy.step in range(2):
        strategy.on_step_end(model, "default")
    for A, B in factors(model):
        assert [bool(row.any()) for row in A] == [True, True, False, False]
        assert not B.any()


@pytest.mark.parametrize(("after", "kept"), [(0.5, 4), (2.0, 2)])
def test_a_round_that_early_stopping_cuts_short_is_measured(after, kept, gated, monkeypatch):
    model, strategy = gated(gate=False, init_weights=True, r=2), Boost(rounds=2)
    strategy.rows = [None] * 2
    started(strategy, model, steps=4)
    strategy.losses, strategy.step = [1.0], 2
    monkeypatch.setattr(Boost, "held_out_loss", lambda self, model: after)
    strategy.on_task_end(model, "default", None)
    assert [len(A) for A, _ in factors(model)] == [kept] * 4


@pytest.mark.parametrize("gain", [-1e9, 1e9])
def test_boosting(gain, gated, ids):
    """A round trains its own ranks alone, and their gradients are those of all; without gain it is taken back."""
    model, strategy = gated(gate=False, init_weights=True, r=2), Boost(rounds=2, gain=gain)
    strategy.rows = [None] * 2
    optimizer = started(strategy, model, steps=4)
    strategy.examples = lambda count, rows, batch: [{"input_ids": ids, "labels": ids}]
    for strategy.step in range(2):
        a_step(model, strategy, optimizer, ids)
    first = [(A.clone(), B.clone()) for A, B in factors(model)]
    strategy.step = 2
    model(ids).logits.square().sum().backward()
    A, B = factors(model)[0]
    whole = A.grad.clone(), B.grad.clone()
    strategy.on_gradients(model, "default")
    assert torch.equal(A.grad[2:], whole[0][2:])
    assert torch.equal(B.grad[:, 2:], whole[1][:, 2:])
    assert not A.grad[:2].any()
    assert not B.grad[:, :2].any()
    for strategy.step in (2, 3):
        a_step(model, strategy, optimizer, ids)
    for (A, B), (A_0, B_0) in zip(factors(model), first, strict=True):
        assert torch.equal(A[:2], A_0[:2])
        assert torch.equal(B[:, :2], B_0[:, :2])
        assert B[:, 2:].any() == (gain < 0)
    assert len(strategy.losses) == 2
    other = Boost(rounds=2, gain=gain)
    other.load_checkpoint_state(strategy.checkpoint_state())
    assert (other.losses, other.stopped) == (strategy.losses, gain > 0)
    strategy.on_task_end(model, "default", None)
    assert [len(A) for A, _ in factors(model)] == [4 if gain < 0 else 2] * 4


@pytest.mark.parametrize(
    ("losses", "ends", "ranks"),
    [
        ([9, 8, 7, 6, 5, 4, 3, 2, 1], [4, 8, 12], 6),  # it falls at every look: a round has its share of the steps left
        ([9, 8.9, 8, 7, 6.9, 5], [2, 5, 12], 6),  # it does not at steps 2 and 5, and the last round has all the rest
        ([9, 8.9, 8.8], [2, 3], 2),  # a round that brings nothing is taken back, and nothing is trained any more
    ],
)
def test_a_round_ends_at_a_plateau(losses, ends, ranks, gated, ids, monkeypatch):
    assert [quota(*pair) for pair in ((26, 5), (20, 4), (7, 3), (1, 1))] == [6, 5, 3, 1]  # of the paper
    found = iter(losses)
    monkeypatch.setattr(Dps, "held_out_loss", lambda self, model: next(found))
    model, strategy = gated(gate=False, init_weights=True, r=2), Dps(rounds=3, looks=4, gain=0.5)
    strategy.rows = [None]
    optimizer = started(strategy, model, steps=12)
    for step in range(12):
        if step == 4:  # a restart in mid-task
            state, strategy.ends, strategy.last, strategy.losses = strategy.checkpoint_state(), [], 0.0, []
            strategy.load_checkpoint_state(state)
        before, strategy.step = factors(model)[0][0].detach().clone(), step
        a_step(model, strategy, optimizer, ids)
        moved = (factors(model)[0][0] != before).any(1).nonzero().flatten().tolist()
        number = sum(step >= end for end in ends)
        assert moved == ([2 * number, 2 * number + 1] if step < ends[-1] else [])
    assert strategy.ends == ends
    assert next(found, None) is None
    strategy.on_task_end(model, "default", None)
    assert [len(A) for A, _ in factors(model)] == [ranks] * 4


def test_held_out_rows_are_not_trained_on():
    rows = list(range(30))
    strategy = Boost(held_out=0.1)
    trained = strategy.training_data(rows, 0, [])
    held = [strategy.rows[i] for i in range(len(strategy.rows))]
    assert sorted(held + [trained[i] for i in range(len(trained))]) == rows
    assert len(held) == 3


def test_finished_adapters_are_ordinary(toy_base, tmp_path):
    """Two tasks of rank r and of 2 r on disk, loaded as they are in memory."""
    for method, ranks in (("lora-squeeze", {2}), ("boost", {2, 4})):
        run = toy.make_run(toy_base, tmp_path / method, method, toy.tasks(2, 20, 2))
        run.train()
        _, _, tasks = open_tasks(tmp_path / method)
        assert {len(task.factors(layer)[0]) for task in tasks for layer in task.shapes} <= ranks
        ids = torch.tensor([[3, 12, 13, 8]])
        with torch.no_grad():
            assert torch.equal(run.model.eval()(ids).logits, load_stack(tmp_path / method)(ids).logits)


def test_strategies_of_different_tasks_do_not_meet(toy_base, tmp_path):
    """Each is checked beside those it acts with, and against the arguments of its own task."""
    from hf_jumplora.trainer.checks import check

    first, second = toy.tasks(2)
    first.strategies, second.strategies = [Boost()], [Boost()]
    run = toy.make_run(toy_base, tmp_path, "inclora", stream=[first, second])
    second.strategies = [Boost(), Squeeze()]
    with pytest.raises(ValueError, match="only Replay goes with Boost"):
        check(run.plan)


def test_refused(toy_base, tmp_path):
    for strategy in (Boost(), Squeeze(), Dps()):
        with pytest.raises(ValueError, match=f"only Replay goes with {type(strategy).__name__}"):
            strategy.check_run([L2()], None, "none")
        strategy.check_run([Replay()], toy.arguments(tmp_path), "ddp")
        with pytest.raises(ValueError, match="which DeepSpeed and FSDP shard"):
            strategy.check_run([], None, "zero1")
        with pytest.raises(ValueError, match="factor_optimizer='muon' remembers factors"):
            strategy.check_run([], toy.arguments(tmp_path, factor_optimizer="muon"), "none")
        for method in ("jumplora", "seqlora"):
            with pytest.raises(ValueError, match="without a gate, such as inclora"):
                toy.make_run(toy_base, tmp_path, method, strategies=[strategy])
        with pytest.raises(ValueError, match=r"a task of 1 steps has no \d rounds"):  # before the first task
            toy.make_run(toy_base, tmp_path, "inclora", strategies=[strategy], max_steps=1)
        strategy.steps = 1
        with pytest.raises(ValueError, match=r"a task of 1 steps has no \d rounds"):
            strategy.on_optimizer(None)
    with pytest.raises(ValueError, match="weight_decay would shrink them"):
        Boost().check_run([], toy.arguments(tmp_path, weight_decay=0.1), "none")
    with pytest.raises(ValueError, match="train it by a ContinualRun"):
        Boost().on_task_start(None, "default", None)
    with pytest.raises(ValueError, match="holds 1 of a task's 1 rows out"):
        Boost().training_data([1], 0, [])
    with pytest.raises(ValueError, match=r"task 'light': a task of 1 steps has no 2 rounds"):  # before the first one
        toy.make_run(toy_base, tmp_path, "boost", stream=[toy.tasks(1)[0], toy.tasks(2, 4)[1]])
    with pytest.raises(ValueError, match="this task is a stream"):
        Boost().training_data(iter([]), 0, [])
    for options in ({"rounds": 0}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match="Boost needs"):
            Boost(**options)
    with pytest.raises(ValueError, match="Dps needs looks"):
        Dps(looks=0)
    assert METHODS["boost"].make_strategies(["boost.rounds=3"])[0].rounds == 3
