"""SoRA and CoDyRA: the papers' operator, gradients through gated ranks, closed ranks gone, what they do not go with."""

import pytest
import torch
import toy

from hf_jumplora import finish_adapter, load_stack
from hf_jumplora.cli import main
from hf_jumplora.stack.operations import open_tasks
from hf_jumplora.strategies import L2, CoDyRA, DyLora, Migu, Replay, SoRA
from hf_jumplora.strategies.ranks import soft_threshold
from hf_jumplora.tuner import named_layers


def test_operator():
    """The paper's soft threshold: 0.15 becomes 0.05, where both released codes close it."""
    g = torch.tensor([0.05, 0.15, 0.25, -0.35])
    torch.testing.assert_close(soft_threshold(g, 0.1), torch.tensor([0.0, 0.05, 0.15, -0.25]))


def test_sora_step(gated):
    """g = 1, gradient 2, learning rate 0.1, weight 0.5: T_0.05(0.8) = 0.75, by the optimizer's own hook."""
    model, strategy = gated(gate=False), SoRA(weight=0.5)
    strategy.on_task_start(model, "default", None)
    gates = [layer.jumplora_g["default"] for _, layer in named_layers(model)]
    optimizer = torch.optim.SGD(gates, lr=0.1)
    strategy.on_optimizer(optimizer)
    for g in gates:
        g.data.fill_(1.0)
        g.grad = torch.full_like(g, 2.0)
    optimizer.step()
    torch.testing.assert_close(torch.stack(gates), torch.full((len(gates), 4), 0.75))


def test_codyra_stairs():
    strategy = CoDyRA()
    strategy.steps = 200
    widths = []
    for strategy.step in range(200):
        widths.append(strategy.width(1.0))
    assert widths[:101] == [0.0] * 101
    assert widths[101] == pytest.approx(1.0204e-4, rel=1e-4)
    assert widths[-1] == 5e-3
    assert len(set(widths)) == 50


@pytest.mark.parametrize("gate", [False, True])
def test_gradients_and_absorbing(gate, gated, ids, relative_error):
    """Gradients of A, B and g are those of B diag(g) A; what is finished computes the same without the closed ranks,
    and a layer whose ranks are all closed keeps one of zeros."""
    model = gated(gate=gate)
    SoRA().on_task_start(model, "default", None)
    layers = [layer for _, layer in named_layers(model)]
    gates = [layer.jumplora_g["default"] for layer in layers]
    gates[0].data[1:3] = 0
    gates[1].data.zero_()
    model.train()
    output = model(ids).logits
    output.square().sum().backward()
    layer = layers[0]
    B, g = layer.jumplora_B["default"], gates[0]
    assert g.grad.abs().min() > 0
    inside = (B.grad * B.detach()).sum(0)  # homogeneity: sum_i B_ij dL/dB_ij = g_j dL/dg_j
    assert relative_error(g.grad * g.detach(), inside) < 1e-4
    assert not B.grad[:, 1:3].any()
    before = [layer.update("default") for layer in layers]
    model.eval()
    logits = model(ids).logits
    finish_adapter(model, "default", "task_000")
    assert [len(layer.jumplora_A["task_000"]) for layer in layers[:3]] == [2, 1, 4]
    assert not layers[1].jumplora_B["task_000"].any()
    assert not any(layer.jumplora_g for layer in layers)
    for layer, update in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.update("task_000"), update, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_closed_ranks_are_not_on_disk(toy_base, tmp_path):
    """A strong SoRA closes ranks of both tasks; the stack loads, and merged it is the same model."""
    run = toy.make_run(toy_base, tmp_path, "sora", toy.tasks(2), {"r": 4}, strategies=["sora.weight=30"])
    run.train()
    ranks = [len(task.factors(layer)[0]) for task in open_tasks(tmp_path)[2] for layer in task.shapes]
    assert min(ranks) < 4
    ids = torch.tensor([[3, 12, 13, 8, 14, 9]])
    with torch.no_grad():
        loaded, merged = (load_stack(tmp_path, merge=merge).eval()(ids).logits for merge in (False, True))
        torch.testing.assert_close(loaded, merged, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(run.model.eval()(ids).logits, merged, rtol=1e-4, atol=1e-5)


def test_what_it_does_not_go_with(toy_base, tmp_path):
    for other in (L2(), Migu()):
        with pytest.raises(ValueError, match="puts a gate between A and B"):
            SoRA().check_run([other], None, "none")
    with pytest.raises(ValueError, match="which DeepSpeed replaces"):
        SoRA().check_run([], None, "zero2")
    CoDyRA().check_run([Replay()], None, "none")
    with pytest.raises(ValueError, match="mode 'sequential'"):
        SoRA().check("sequential", None)
    for wrong in (lambda: SoRA(weight=-1), lambda: CoDyRA(largest=-1)):
        with pytest.raises(ValueError, match="needs"):
            wrong()


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora(frozen, gated, ids):
    """A = I, B = [[1, 2], [3, 4]], alpha 2: rank 1 gives (2, 6), both give (3, 7); ranks not drawn get no gradient."""
    model, strategy = gated(gate=False, r=2, lora_alpha=2), DyLora(frozen=frozen)
    strategy.on_task_start(model, "default", None)
    assert {strategy.drawn(step, 4) for step in range(50)} == {1, 2, 3, 4}
    layer = next(layer for _, layer in named_layers(model))
    A, B = layer.jumplora_A["default"], layer.jumplora_B["default"]
    with torch.no_grad():
        A.zero_()[:, :2] = torch.eye(2)
        B.zero_()[:2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.zeros(1, 32)
    x[0, :2] = 1
    seen = set()
    for strategy.step in range(12):
        strategy.on_step_begin(model, "default")
        b = strategy.drawn(strategy.step, 2)
        change = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(change[0, :2], torch.tensor([[2.0, 6.0], [3.0, 7.0]])[b - 1])
        A.grad = B.grad = None
        model(ids).logits.square().sum().backward()
        strategy.on_gradients(model, "default")
        moved = [bool(A.grad[rank].any()) and bool(B.grad[:, rank].any()) for rank in range(2)]
        assert moved == [[True, False], [not frozen, True]][b - 1]
        seen.add(b)
        strategy.on_step_end(model, "default")
        assert layer.jumplora_g["default"].tolist() == [1, 1]  # as an evaluation between the steps sees it
    assert seen == {1, 2}
    strategy.on_task_end(model, "default", None)
    finish_adapter(model, "default", "task_000")
    torch.testing.assert_close((layer(x) - layer.base_layer(x))[0, :2], torch.tensor([3.0, 7.0]))


def test_dylora_is_cut_by_its_first_ranks(toy_base, tmp_path):
    """`squeeze --prefix`: ranks 1 to b at alpha / b, loaded like any stack; what it does not go with."""
    toy.make_run(toy_base, tmp_path / "whole", "dylora", toy.tasks(1, 8, 2), {"r": 4}).train()
    assert (
        main(["squeeze", str(tmp_path / "whole"), "--rank", "2", "--prefix", "--force", "--out", str(tmp_path / "two")])
        == 0
    )
    (_, _, (whole,)), (_, _, (two,)) = open_tasks(tmp_path / "whole"), open_tasks(tmp_path / "two")
    for layer in whole.shapes:
        A, B = whole.factors(layer)
        torch.testing.assert_close(two.update(layer), 8 / 2 * B[:, :2] @ A[:2])
    assert main(["squeeze", str(tmp_path / "whole"), "--energy", "0.5", "--prefix", "--out", str(tmp_path / "no")]) == 2
    with pytest.raises(ValueError, match="only Replay goes with DyLora"):
        DyLora().check_run([L2()], None, "none")
    with pytest.raises(ValueError, match="which ranks of whole factors act, which DeepSpeed and FSDP shard"):
        DyLora().check_run([], None, "zero1")
    with pytest.raises(ValueError, match="takes all ranks of a factor at once"):
        DyLora().check_run([Replay()], toy.arguments(tmp_path, factor_optimizer="muon"), "none")
    for method in ("jumplora", "seqlora"):
        with pytest.raises(ValueError, match="method='dylora'"):
            toy.make_run(toy_base, tmp_path / "x", method, strategies=[DyLora()])
