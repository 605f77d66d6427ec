"""Muon, LoRA+, Riemannian preconditioning and the thresholds' own learning rate: formulas, schedules, restarts."""

from dataclasses import dataclass

import pytest
import torch
import toy
from peft import get_peft_model
from torch import nn
from transformers import TrainerCallback

from hf_jumplora import ContinualTrainer, JumpLoraConfig
from hf_jumplora.stack import read_manifest
from hf_jumplora.strategies import Strategy
from hf_jumplora.trainer.altlora import AltLora
from hf_jumplora.tuner import gate_groups, named_layers
from hf_jumplora.tuner.allora import RowScaledUpdate


def one_step(base, folder, gate=False, **options):
    """(before, gradient, after) of every A, B and gate for one optimizer step on random gradients; the optimizer."""
    torch.manual_seed(0)
    config = JumpLoraConfig(r=3, target_modules=["q_proj", "v_proj"], gate=gate, init_weights=False)
    model = get_peft_model(toy.load_base(base), config)
    trainer = ContinualTrainer(model=model, args=toy.arguments(folder, learning_rate=0.02, **options))
    optimizer = trainer.create_optimizer()
    layers = [layer for _, layer in named_layers(model)]
    A, B = ([getattr(layer, name)["default"] for layer in layers] for name in ("jumplora_A", "jumplora_B"))
    gates = [gate.log_tau for gate, _ in gate_groups(model, "default")]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in (*A, *B, *gates)}
    result = {}
    for name, params in (("A", A), ("B", B), ("gate", gates)):
        for p in params:
            p.grad = torch.randn_like(p)
        result[name] = [(p.detach().double(), p.grad.double()) for p in params]
    optimizer.step()
    for name, params in (("A", A), ("B", B), ("gate", gates)):
        result[name] = [(*old, p.detach().double()) for old, p in zip(result[name], params, strict=True)]
    return result, optimizer


def muon_step(weight, gradient, lr, decay):
    """Quintic Newton-Schulz on the Nesterov momentum of a first step (Muon's published coefficients), in float64."""
    M = 0.05 * gradient  # momentum 0.95 from zero, and then Nesterov's look ahead
    M = 0.05 * gradient + 0.95 * M
    X = M.T if M.shape[0] > M.shape[1] else M
    X = X / X.norm()
    for _ in range(5):
        S = X @ X.T
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
    X = X.T if M.shape[0] > M.shape[1] else X
    return weight * (1 - lr * decay) - lr * 0.2 * max(M.shape) ** 0.5 * X


@pytest.mark.parametrize("gate", [False, True], ids=["dense", "gated"])
def test_muon(gate, toy_base, tmp_path, relative_error):
    """A and B by Muon (torch steps in bfloat16), thresholds by AdamW at their own rate and without decay."""
    options = {"factor_optimizer": "muon", "weight_decay": 0.1, "loraplus_lr_ratio": 2.0}
    options |= {"gate_learning_rate": 0.5} if gate else {}
    result, optimizer = one_step(toy_base, tmp_path, gate, **options)
    for name, lr in (("A", 0.02), ("B", 0.04)):
        for before, gradient, after in result[name]:
            expected = muon_step(before, gradient, lr, 0.1)
            assert relative_error(after - before, expected - before) < 0.06
    for before, gradient, after in result["gate"]:
        torch.testing.assert_close(after, before - 0.5 * gradient.sign(), rtol=1e-5, atol=1e-6)
    assert len(result["gate"]) == int(gate)
    assert type(optimizer).__name__ == ("Chain" if gate else "Muon")


def test_loraplus(toy_base, tmp_path, relative_error):
    """B steps `ratio` times as far as A, by plain gradient descent."""
    result, _ = one_step(toy_base, tmp_path, optim="sgd", loraplus_lr_ratio=16.0)
    for name, lr in (("A", 0.02), ("B", 0.32)):
        for before, gradient, after in result[name]:
            assert relative_error(after, before - lr * gradient) < 1e-6


def test_riemannian(toy_base, tmp_path, relative_error):
    """Gradients times the inverse Gram matrix of the other factor, damped."""
    result, _ = one_step(toy_base, tmp_path, optim="sgd", factor_optimizer="riemannian", riemannian_reg=0.1)
    for (A, gA, newA), (B, gB, newB) in zip(result["A"], result["B"], strict=True):
        eye = 0.1 * torch.eye(3, dtype=torch.double)
        assert relative_error(newA, A - 0.02 * torch.linalg.inv(B.T @ B + eye) @ gA) < 1e-5
        assert relative_error(newB, B - 0.02 * gB @ torch.linalg.inv(A @ A.T + eye)) < 1e-5


def altlora(A, B, G, scaling=1.0, damping=0.0, **options):
    """(A, B) after a step of each gradient in G [out, in] with respect to s B A, by `AltLora` in its dtype."""
    A, B = (nn.Parameter(factor.clone()) for factor in (A, B))
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "adaptive": False, **options}
    groups = [{"params": [A, B], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = AltLora(groups, [(A, B, scaling)], damping=damping, **options)
    for gradient in G:
        A.grad, B.grad = scaling * B.detach().T @ gradient, scaling * gradient @ A.detach().T
        optimizer.step()
    return A.detach(), B.detach()


def test_altlora_golden():
    """One step of B and one of A, without momentum: numbers by hand; the matrix step does not depend on the scaling."""
    A, B, G = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    _, after = altlora(A, B, [G], betas=(0.0, 0.999))
    torch.testing.assert_close(after, B - 0.1 * torch.tensor([[1.5], [3.5]]))
    for scaling, g in ((1.0, [[0.5, 1.0]]), (2.0, [[0.25, 0.5]])):
        zero = torch.zeros(2, 2)  # B's turn, which changes nothing
        after, same = altlora(A, B, [zero, G], scaling, betas=(0.0, 0.999))
        assert torch.equal(same, B)
        torch.testing.assert_close(after, A - 0.1 * torch.tensor(g))


@pytest.mark.parametrize("adaptive", [False, True])
def test_altlora_against_the_algorithm(adaptive):
    """Six steps in float64 against Algorithm 1 written out; and, without V, any other factors of the same update
    (B Q, Q^-1 A) take the same way."""
    torch.manual_seed(0)
    A, B = torch.randn(3, 5, dtype=torch.double), torch.randn(4, 3, dtype=torch.double)
    gradients, s, damping = torch.randn(6, 4, 5, dtype=torch.double), 2.0, 1e-3
    newA, newB = altlora(A, B, gradients, s, damping, adaptive=adaptive)
    a, b, state = A, B, {}
    for t, G in enumerate(gradients):
        M, V, old = state.get(t % 2, (0, 0, None))
        if t % 2 == 0:
            inverse = torch.linalg.inv(a @ a.T + damping * torch.eye(3))
            g = s * G @ a.T @ inverse / s**2
            M = 0.9 * (M @ old @ a.T @ inverse if old is not None else 0) + 0.1 * g
            old = a
        else:
            inverse = torch.linalg.inv(b.T @ b + damping * torch.eye(3))
            g = inverse @ (s * b.T @ G) / s**2
            M = 0.9 * (inverse @ b.T @ old @ M if old is not None else 0) + 0.1 * g
            old = b
        V = 0.999 * V + 0.001 * g.square()
        move = 0.1 * (M / (V.sqrt() + 1e-8) if adaptive else M)
        state[t % 2] = M, V, old
        a, b = (a, b - move) if t % 2 == 0 else (a - move, b)
    torch.testing.assert_close(newA, a)
    torch.testing.assert_close(newB, b)
    Q = torch.randn(3, 3, dtype=torch.double)
    one = torch.matmul(*reversed(altlora(A, B, gradients, s, 0.0, adaptive=adaptive)))
    other = torch.matmul(*reversed(altlora(torch.linalg.inv(Q) @ A, B @ Q, gradients, s, 0.0, adaptive=adaptive)))
    assert torch.allclose(one, other) != adaptive


def test_allora(gated, ids, relative_error):
    """B = (3, 0), A = (1, 0), eta 1: by hand; in a model: plain LoRA's, with c_i in the output's."""
    x = torch.eye(2, requires_grad=True)
    A, B = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[3.0], [0.0]], requires_grad=True)
    G = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (RowScaledUpdate.apply(x, A, B, 1.0, 1.0) * G.T).sum().backward()
    assert (B.grad.tolist(), A.grad.tolist()) == ([[0.5], [3.0]], [[1.5, 3.0]])
    assert torch.equal(x.grad, G.T @ (B @ A).detach())
    model, eta = gated(gate=False), 2.0
    layer = next(layer for _, layer in named_layers(model))
    gradients = {}
    for layer.allora_eta in (None, eta):
        model.zero_grad()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        logits.square().sum().backward()
        factors = layer.jumplora_A["default"], layer.jumplora_B["default"]
        gradients[layer.allora_eta] = (logits.detach(), embedded.grad, *(p.grad.clone() for p in factors))
    plain, scaled = gradients[None], gradients[eta]
    assert torch.equal(plain[0], scaled[0])
    assert relative_error(scaled[1], plain[1]) < 1e-5
    c = (layer.update("default").norm(dim=1) + eta**-2).rsqrt()[:, None]
    assert relative_error(scaled[3], c * plain[3]) < 1e-5
    assert relative_error(scaled[2], plain[2]) > 0.01


def test_allora_ends_before_a_task_is_remembered(toy_base, tmp_path):
    """EWC's Fisher matrix is of plain gradients."""
    seen = []

    @dataclass
    class Look(Strategy):
        def on_step_end(self, model, adapter):
            seen.append({layer.allora_eta for _, layer in named_layers(model)})

        def on_task_end(self, model, adapter, examples):
            self.on_step_end(model, adapter)

    options = {"strategies": [Look()], "max_steps": 1, "allora_eta": 2.0, "stream": toy.tasks(1)}
    toy.make_run(toy_base, tmp_path, "inclora", **options).train()
    assert seen == [{2.0}, {None}]


def test_allora_is_refused(toy_base, tmp_path):
    for options in ({"factor_optimizer": "riemannian"}, {"gate": True}):
        with pytest.raises(ValueError, match=r"allora_eta=2\.0 changes the gradients of the factors"):
            one_step(toy_base, tmp_path, allora_eta=2.0, **options)


class _Watch(TrainerCallback):
    """Learning rates of all groups after each step; may interrupt the second task."""

    def __init__(self, stop=None):
        self.rates, self.stop = [], stop

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        if args.output_dir.endswith("task_001") and state.global_step == self.stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["allora", "muon", "riemannian", "altlora+"])
def test_schedule_and_restart(kind, toy_base, tmp_path):
    """The schedule moves every group in proportion; a run stopped inside a task ends with the same bits."""
    options = {"factor_optimizer": kind, "loraplus_lr_ratio": 4.0, "gate_learning_rate": 0.5, "save_steps": 2}
    options |= {"save_strategy": "steps", "lr_scheduler_type": "linear", "stream": toy.tasks(2)}
    if kind == "allora":
        options |= {"factor_optimizer": "default", "allora_eta": 2.0, "gate_learning_rate": None, "method": "inclora"}
    watch = _Watch()
    toy.make_run(toy_base, tmp_path / "straight", callbacks=[watch], **options).train()
    for step, rates in enumerate(watch.rates[:8], start=1):
        left = 1 - step / 8
        gate = set() if kind == "allora" else {0.5 * left}
        assert sorted(set(rates)) == pytest.approx(sorted({0.01 * left, 0.04 * left, *gate}))
    with pytest.raises(KeyboardInterrupt):
        toy.make_run(toy_base, tmp_path / "broken", callbacks=[_Watch(5)], **options).train()
    toy.make_run(toy_base, tmp_path / "broken", **options).train()
    straight, again = (read_manifest(tmp_path / name).tasks for name in ("straight", "broken"))
    for one, two in zip(straight, again, strict=True):
        assert one["files"]["adapter_model.safetensors"] == two["files"]["adapter_model.safetensors"]


def test_values_that_cannot_be(tmp_path):
    for name in ("loraplus_lr_ratio", "riemannian_reg", "gate_learning_rate", "allora_eta"):
        for value in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"{name} must be positive"):
                toy.arguments(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="factor_optimizer is one of"):
        toy.arguments(tmp_path, factor_optimizer="Muon")


@pytest.mark.parametrize("kind", ["muon", "riemannian", "altlora"])
def test_sharded_matrices_are_refused(kind, toy_base, tmp_path):
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(r=2, target_modules=["q_proj"]))
    trainer = ContinualTrainer(model=model, args=toy.arguments(tmp_path, factor_optimizer=kind))
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=f"factor_optimizer='{kind}' works on whole matrices"):
        trainer.create_optimizer()
