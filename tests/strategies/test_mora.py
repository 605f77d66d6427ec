"""MoRA: weights by hand, gradients against the formula, ranks on disk, and what needs a sum says so."""

import pytest
import torch
import torch.nn.functional as F
import toy
from datasets import Dataset

from hf_jumplora import Task, load_stack, switch_tasks
from hf_jumplora.cli import main
from hf_jumplora.commands.eval import merged_and_encoder
from hf_jumplora.methods import METHODS
from hf_jumplora.strategies import L2, KFac, Mora, Replay
from hf_jumplora.trainer.router import train_router
from hf_jumplora.tuner import named_layers
from hf_jumplora.tuner.rank_routing import rank_weights


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


@pytest.mark.parametrize("k", [2, 8])
def test_layer(k, gated, ids, relative_error):
    """A layer with two tasks is the formula, and so are the gradients of the task in training; ranks that nobody has
    chosen get none. With all ranks at tau = infinity it is the mean of what LoRA adds."""
    model = gated(gate=False)
    config = model.peft_config["default"]
    layer = next(layer for _, layer in named_layers(model))
    strategy = Mora(k=k, tau=0.2, delta=0.4)
    strategy.on_task_start(model, "default", None)
    config.inference_mode = True
    more = type(config)(r=4, target_modules=["q_proj", "v_proj"], gate=False, init_weights=False)
    more.parent_adapters = ["default"]
    model.add_adapter("more", more)
    strategy.on_task_start(model, "more", None)
    model.set_adapter("more")
    A = [layer.jumplora_A[name] for name in ("default", "more")]
    B = [layer.jumplora_B[name] for name in ("default", "more")]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def formula(A, B, delta):
        z, bank = x @ torch.cat(A).T, layer.scaling["more"] * torch.cat(B, 1)
        s = F.normalize(z, dim=-1)
        top = s >= s.topk(k).values[:, -1:]
        weights = (s / 0.2).masked_fill(~top, -torch.inf).softmax(-1) * (s >= delta)
        return layer.base_layer(x) + (weights * z) @ bank.T

    torch.testing.assert_close(layer(x), formula(A, B, 0.4))
    model.train()
    torch.testing.assert_close(layer(x), formula(A, B, -1.0))
    layer(x).square().sum().backward()
    copies = [[p.detach().clone().requires_grad_() for p in factors] for factors in (A, B)]
    formula(*copies, -1.0).square().sum().backward()
    assert A[0].grad is None
    assert relative_error(A[1].grad, copies[0][1].grad) < 1e-4
    assert relative_error(B[1].grad, copies[1][1].grad) < 1e-4
    for name in ("default", "more"):
        layer.configs[name].rank_routing = {"k": 8, "tau": 1e9, "delta": 0.0}
    plain = sum(layer.scaling["more"] * x @ a.T @ b.T for a, b in zip(A, B, strict=True)) / 8
    torch.testing.assert_close(layer(x), layer.base_layer(x) + plain, rtol=1e-4, atol=1e-5)
    layer.configs["default"].rank_routing = None
    with pytest.raises(ValueError, match="the ranks of some tasks compete"):
        layer(x)
    with pytest.raises(ValueError, match="all tasks of a stack need the same"):
        strategy.on_task_start(model, "more", None)


def test_what_needs_a_sum(toy_base, tmp_path, capsys):
    """A stack of two tasks: it has their ranks and no others, and is read as a whole or not at all."""
    stack = tmp_path / "stack"
    toy.make_run(toy_base, stack, "mora", toy.tasks(2, 8, 2), strategies=["mora.k=2", "mora.delta=0.1"]).train()
    model = load_stack(stack)
    for _, layer in named_layers(model):
        assert {len(A) for A in layer.jumplora_A.values()} == {2}
        assert layer.configs["task_001"].rank_routing == {"k": 2, "tau": 0.03, "delta": 0.1}
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


def test_refused(toy_base, tmp_path):
    for other in (L2(), KFac()):
        with pytest.raises(ValueError, match="only Replay goes with MoRA"):
            Mora().check_run([other], None, "none")
    Mora().check_run([Replay()], toy.arguments(tmp_path), "ddp")
    with pytest.raises(ValueError, match="which DeepSpeed and FSDP cut"):
        Mora().check_run([], None, "zero1")
    for option in ({"factor_optimizer": "muon"}, {"allora_eta": 1.0}):
        with pytest.raises(ValueError, match="which MoRA has not"):
            Mora().check_run([], toy.arguments(tmp_path, **option), "none")
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}])
    task = Task("own", rows, args=toy.arguments(tmp_path, factor_optimizer="altlora"))
    with pytest.raises(ValueError, match="which MoRA has not"):
        toy.make_run(toy_base, tmp_path, "mora", [task])
    for method in ("jumplora", "seqlora"):
        with pytest.raises(ValueError, match="method='mora'"):
            toy.make_run(toy_base, tmp_path, method, strategies=[Mora()])
    for options in ({"k": 0}, {"tau": 0.0}, {"delta": 1.0}):
        with pytest.raises(ValueError, match="MoRA needs"):
            Mora(**options)
    assert METHODS["mora"].make_strategies(["mora.k=4"])[0].k == 4
