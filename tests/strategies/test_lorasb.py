"""LoRA-SB: the start by hand, the gradient of R against autograd, frozen factors, what it refuses."""

import pytest
import torch
import toy

from hf_jumplora import ContinualTrainer, finish_adapter
from hf_jumplora.strategies import L2, LoraSB, Replay
from hf_jumplora.strategies.lorasb import start_factors
from hf_jumplora.tuner import named_layers


G = torch.tensor([[3.0, -1.0], [2.0, 0.5], [-4.0, 2.0]])


def test_start():
    """The best rank 1 of -0.1 sign(G), whatever the scaling; A and B are orthonormal."""
    for scaling in (1.0, 4.0):
        A, B, R = start_factors(G, 1, 0.1, scaling)
        torch.testing.assert_close(scaling * B @ R @ A, torch.tensor([[-0.1, 0.1], [0.0, 0.0], [0.1, -0.1]]))
    A, B, R = start_factors(G, 2, 0.1, 1.0)
    torch.testing.assert_close(R.diag(), torch.tensor([0.2, 0.141421]))
    torch.testing.assert_close(B @ R @ A, -0.1 * G.sign())
    torch.testing.assert_close(B.T @ B, torch.eye(2))
    torch.testing.assert_close(A @ A.T, torch.eye(2))


def test_trains_what_is_between(gated, ids, relative_error):
    """dL/dR = s B^T (dL/dW) A^T; A and B get no gradient, and the finished adapter is the same update of rank r."""
    model, strategy = gated(gate=False, init_weights=True), LoraSB(eta=1e-2)
    batch = {"input_ids": ids, "labels": ids}
    strategy.on_task_start(model, "default", lambda count: [batch])
    model(**batch).loss.backward()
    layers = [layer for _, layer in named_layers(model)]
    updates = [layer.update("default") for layer in layers]
    found = [layer.jumplora_g["default"].grad for layer in layers]
    dense = gated(gate=False, init_weights=True).unload()
    for (name, _), update in zip(named_layers(model), updates, strict=True):
        weight = dense.get_submodule(name).weight
        weight.data += update
        weight.requires_grad_(True)
    dense(**batch).loss.backward()
    for (name, layer), grad in zip(named_layers(model), found, strict=True):
        A, B, s = layer.jumplora_A["default"], layer.jumplora_B["default"], layer.scaling["default"]
        assert A.grad is None
        assert B.grad is None
        assert relative_error(grad, s * B.T @ dense.get_submodule(name).weight.grad @ A.T) < 1e-4
    finish_adapter(model, "default", "task_000")
    for layer, update in zip(layers, updates, strict=True):
        assert not layer.jumplora_g
        torch.testing.assert_close(layer.update("task_000"), update, rtol=1e-5, atol=1e-8)


def test_a_trainer_by_itself_is_checked_too(gated, tmp_path):
    """The start is a step of its learning rate, and what cannot go together is refused."""
    model, strategy = gated(gate=False, init_weights=True), LoraSB()
    ContinualTrainer(model=model, args=toy.arguments(tmp_path, learning_rate=0.25), strategies=[strategy])
    assert strategy.rate == 0.25
    with pytest.raises(ValueError, match="only Replay goes with LoRA-SB"):
        ContinualTrainer(model=model, args=toy.arguments(tmp_path), strategies=[strategy, L2()])


def test_refused(toy_base, tmp_path):
    with pytest.raises(ValueError, match="only Replay goes with LoRA-SB"):
        LoraSB().check_run([L2()], None, "none")
    strategy = LoraSB()
    strategy.check_run([Replay()], toy.arguments(tmp_path, learning_rate=0.5), "ddp")
    assert strategy.rate == 0.5
    with pytest.raises(ValueError, match="which DeepSpeed and FSDP shard"):
        strategy.check_run([], None, "fsdp2")
    for option in ({"factor_optimizer": "muon"}, {"loraplus_lr_ratio": 2.0}, {"allora_eta": 1.0}):
        with pytest.raises(ValueError, match="LoRA-SB trains neither"):
            strategy.check_run([], toy.arguments(tmp_path, **option), "none")
    for method in ("jumplora", "seqlora"):
        with pytest.raises(ValueError, match="method='lora-sb'"):
            toy.make_run(toy_base, tmp_path, method, strategies=[LoraSB()])
    for options in ({"eta": 0}, {"examples": 0}):
        with pytest.raises(ValueError, match="needs eta > 0"):
            LoraSB(**options)
