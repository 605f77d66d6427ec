"""LoRA-GA: gradients of the weights against autograd, the start by hand, an untouched base, what it refuses."""

import pytest
import torch
import toy

from hf_jumplora import finish_adapter
from hf_jumplora.strategies import L2, LoraGA, Replay
from hf_jumplora.strategies.loraga import gradient_factors, weight_gradients
from hf_jumplora.tuner import named_layers


def batches(ids, count=2):
    return [{"input_ids": ids[k : k + 1], "labels": ids[k : k + 1]} for k in range(count)]


def test_start():
    """|A| = f e1, |B| = f e2, and a step of gradient descent on both takes f^2 of the two largest parts of G."""
    G = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    A, B = gradient_factors(G, 1, 16.0)
    f = 0.353553
    torch.testing.assert_close(A.abs(), torch.tensor([[f, 0, 0, 0]]))
    torch.testing.assert_close(B.abs(), torch.tensor([[0, f, 0, 0]]).T)
    change = B @ (B.T @ G) + (G @ A.T) @ A
    torch.testing.assert_close(change, 0.125 * torch.diag(torch.tensor([4.0, 3.0, 0.0, 0.0])))
    assert (G - change / 0.125).norm() == pytest.approx(5**0.5)


def test_large_gradients_draw_nothing():
    """The randomised SVD finds the directions, and leaves the random numbers where they were."""
    U, V = (torch.linalg.qr(torch.randn(520, 4, generator=torch.Generator().manual_seed(k))).Q for k in (0, 1))
    state = torch.get_rng_state()
    A, B = gradient_factors(U * torch.tensor([8.0, 4.0, 2.0, 1.0]) @ V.T, 2, 64.0)
    assert torch.equal(torch.get_rng_state(), state)
    f = 520**0.25 / 8
    torch.testing.assert_close((A @ V[:, :2]).abs(), f * torch.eye(2), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((U[:, 2:].T @ B).abs(), f * torch.eye(2), rtol=1e-3, atol=1e-3)


def test_gradients(gated, tiny_llama, ids, relative_error):
    """The mean over examples of dL/dW is that of autograd on the base."""
    dense = tiny_llama()
    torch.stack([dense(**batch).loss for batch in batches(ids)]).mean().backward()
    model = gated(gate=False, init_weights=True)
    found = weight_gradients(model, "default", batches(ids))
    assert len(found) == 4
    for name, G in found.items():
        assert relative_error(G, dense.get_submodule(name).weight.grad) < 1e-5
    assert all(p.grad is None for p in model.parameters())


def test_base_is_left_alone(gated, ids):
    """At the start the model is the one before; the finished adapter of rank 2 r is what was trained."""
    model, strategy = gated(gate=False, init_weights=True), LoraGA(gamma=1.0)
    layers = [layer for _, layer in named_layers(model)]
    weights = [layer.get_base_layer().weight.clone() for layer in layers]
    before = model(ids).logits
    strategy.on_task_start(model, "default", lambda count: batches(ids))
    assert min(layer.jumplora_B["default"].norm() for layer in layers) > 1
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for layer in layers:
            layer.jumplora_A["default"].mul_(1.5)
    trained = model(ids).logits
    assert (trained - before).abs().max() > 1e-2
    strategy.on_task_end(model, "default", None)
    finish_adapter(model, "default", "task_000")
    assert {len(layer.jumplora_A["task_000"]) for layer in layers} == {8}
    torch.testing.assert_close(model(ids).logits, trained, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(layer.get_base_layer().weight, w) for layer, w in zip(layers, weights, strict=True))


def test_refused(gated, ids, toy_base, tmp_path):
    with pytest.raises(ValueError, match="only Replay goes with LoRA-GA"):
        LoraGA().check_run([L2()], None, "none")
    LoraGA().check_run([Replay()], None, "ddp")
    with pytest.raises(ValueError, match="which DeepSpeed and FSDP shard"):
        LoraGA().check_run([], None, "fsdp2")
    for method in ("jumplora", "seqlora"):
        with pytest.raises(ValueError, match="method='lora-ga'"):
            toy.make_run(toy_base, tmp_path, method, strategies=[LoraGA()])
    with pytest.raises(ValueError, match=r"2 r = 18 .* which is 16 x 32: lower r"):
        LoraGA().on_task_start(gated(gate=False, r=9), "default", lambda count: batches(ids))
    for options in ({"gamma": 0}, {"examples": 0}):
        with pytest.raises(ValueError, match="needs gamma > 0"):
            LoraGA(**options)
