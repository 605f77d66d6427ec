"""OSF: gradients against dense float64 autograd, the stored update, the space it keeps off, refusals."""

from types import SimpleNamespace

import pytest
import torch
import toy
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from hf_jumplora import ContinualRun, JumpLoraConfig
from hf_jumplora.strategies import Ella, Osf, Replay
from hf_jumplora.trainer.checks import check
from hf_jumplora.tuner import named_layers


IDS = torch.arange(3, 15).view(2, 6)


def model_of(base, targets=("q_proj", "k_proj", "up_proj"), **options):
    """Square, wide and tall layers; what the options of the adapter say must not matter."""
    torch.manual_seed(5)
    config = JumpLoraConfig(r=2, target_modules=list(targets), gate=False, init_weights=False, use_rslora=True)
    config.lora_dropout = 0.5
    return get_peft_model(toy.load_base(base), config)


def moved(osf):
    """Its factors changed, as training would."""
    for layer in osf.layers.values():
        for p in layer.osf_svd_params["default"].values():
            p.data += 0.1 * torch.randn_like(p)


def test_gradients(toy_base, relative_error):
    """(I - U_high U_high^T) G V^T S, diag(U^T G V^T) and S U^T G (I - V_high^T V_high), G = dL/dW in float64."""
    osf = Osf(preserved=0.6)
    model = model_of(toy_base).train()
    before = toy.load_base(toy_base)(IDS).logits
    osf.on_task_start(model, "default", None)
    torch.testing.assert_close(model(IDS).logits, before)  # an identity at the start
    moved(osf)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "osf" not in n)

    dense = toy.load_base(toy_base).double()
    weights, factors = {}, {}
    for name, layer in osf.layers.items():
        W = dense.get_submodule(name).weight.detach()
        U, S, V = torch.linalg.svd(W.float(), full_matrices=False)
        t = max(1, int(0.4 * min(W.shape)))
        start = (U[:, -t:] * S[-t:]).double() @ V[-t:].double()
        now = [layer.osf_svd_params["default"][k].detach().double() for k in ("U_low", "S_low", "V_low")]
        assert now[0].shape == (len(W), t)
        weights[f"{name}.weight"] = (W - start + (now[0] * now[1]) @ now[2]).requires_grad_()
        factors[name] = (*now, U[:, :-t].double(), V[:-t].double())
    loss = functional_call(dense, weights, (), {"input_ids": IDS, "labels": IDS}).loss
    for (name, (U, S, V, U_high, V_high)), G in zip(
        factors.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
    ):
        ours = {key: p.grad for key, p in osf.layers[name].osf_svd_params["default"].items()}
        grad_u, grad_v = G @ V.T * S, S[:, None] * (U.T @ G)
        assert relative_error(ours["U_low"], grad_u - U_high @ (U_high.T @ grad_u)) < 1e-4
        assert relative_error(ours["S_low"], (U.T @ G @ V.T).diagonal()) < 1e-4
        assert relative_error(ours["V_low"], grad_v - grad_v @ V_high.T @ V_high) < 1e-4


@pytest.mark.parametrize("preserved", [0.7, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_is_the_update(preserved, dtype, toy_base):
    """What was trained and what is stored give the same outputs, below and above half of the directions."""
    osf = Osf(preserved)
    model = model_of(toy_base)
    model.to(dtype)
    weights = {n: la.get_base_layer().weight.clone() for n, la in named_layers(model)}
    osf.on_task_start(model, "default", None)
    assert all(p.dtype == torch.float32 for la in osf.layers.values() for p in la.osf_svd_params.parameters())
    moved(osf)
    trained = model.eval()(IDS).logits
    deltas = {name: layer.get_delta_weight("default") for name, layer in osf.layers.items()}
    osf.on_task_end(model, "default", None)
    close = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model.eval()(IDS).logits, trained, rtol=1e-4, atol=close)
    for name, layer in named_layers(model):
        A, B = layer.jumplora_A["default"], layer.jumplora_B["default"]
        assert type(layer.base_layer) is nn.Linear
        assert torch.equal(layer.base_layer.weight, weights[name])
        assert layer.scaling["default"] == 1
        torch.testing.assert_close(B @ A, deltas[name], rtol=1e-4, atol=1e-5)
        assert len(A) == min(2 * max(1, int((1 - preserved) * min(weights[name].shape))), *weights[name].shape)


def test_what_the_paper_says(toy_base, tmp_path):
    """With plain gradient steps a task's update has no part in the preserved directions of the weights as the tasks
    before left them; their number rises. It learns."""
    run = toy.make_run(toy_base, tmp_path, "osf", optim="sgd", learning_rate=0.5, max_grad_norm=1.0)
    run.plan.strategies[:] = [Osf(0.5, 0.5)]
    run.train()
    base = toy.load_base(toy_base)
    for task in range(3):
        stack = PeftModel.from_pretrained(toy.load_base(toy_base), tmp_path, subfolder=f"task_{task:03d}")
        for name, layer in named_layers(stack, "default"):
            W = base.get_submodule(name).weight.data
            t = int(0.5 ** (task + 1) * min(W.shape))
            U, _, V = torch.linalg.svd(W, full_matrices=False)
            dW = layer.jumplora_B["default"].detach() @ layer.jumplora_A["default"].detach()
            assert len(layer.jumplora_A["default"]) == 2 * t
            assert dW.norm() > 1e-3
            assert (U[:, :-t].T @ dW).norm() < 1e-3 * dW.norm()
            assert (dW @ V[:-t].T).norm() < 1e-3 * dW.norm()
            W += dW
    run = toy.make_run(toy_base, tmp_path / "adam", "osf", stream=toy.tasks(1), num_train_epochs=4)
    run.train()
    rows = [
        {k: torch.tensor([row[k]]) for k in ("input_ids", "labels")}
        for row in run.plan.encoder.train_rows(run.plan.tasks[0])
    ]
    loss, before = (sum(model(**row).loss for row in rows) for model in (run.model, toy.load_base(toy_base)))
    assert loss < 0.8 * before


@pytest.mark.parametrize(
    ("options", "words"),
    [({"preserved": 1.0}, "0 <= preserved < 1"), ({"shrink": 0.0}, "0 < shrink <= 1"), ({"shrink": 1.1}, "shrink=1.1")],
)
def test_bad_values(options, words):
    with pytest.raises(ValueError, match=words):
        Osf(**options)


@pytest.mark.parametrize(("mode", "gate"), [("sequential", False), ("joint", False), ("incremental", True)])
def test_adapters_it_cannot_work_with(mode, gate):
    with pytest.raises(ValueError, match="use it through method='osf'"):
        Osf().check(mode, SimpleNamespace(gate=gate))


@pytest.mark.parametrize(
    ("strategies", "options", "words"),
    [
        ([Osf(), Ella()], {}, r"only Replay goes with OSF, not \[Ella"),
        ([Osf(), Replay()], {"factor_optimizer": "muon"}, "factor_optimizer='muon' is for A and B"),
        ([Osf()], {"loraplus_lr_ratio": 4.0}, "loraplus_lr_ratio=4.0 is for A and B"),
    ],
)
def test_what_acts_on_the_adapter_is_refused(strategies, options, words, toy_base, tmp_path):
    with pytest.raises(ValueError, match=words):
        ContinualRun(
            toy.load_base(toy_base), toy.tasks(2), "osf", toy.arguments(tmp_path, **options), toy.tokenizer(),
            adapter_config=JumpLoraConfig(r=2, target_modules=["q_proj"]), strategies=strategies,
        )  # fmt: skip


@pytest.mark.parametrize("sharding", [{"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, {"shards_base": True}])
def test_sharded_weights_are_refused(sharding, toy_base, tmp_path):
    run = toy.make_run(toy_base, tmp_path, "osf", stream=toy.tasks(1))
    vars(run.args).update(sharding)
    with pytest.raises(ValueError, match="OSF reads whole weights and factors, which DeepSpeed and FSDP shard"):
        check(run.plan)


def test_layers_it_cannot_decompose(toy_base):
    class Own(nn.Linear):
        pass

    model = model_of(toy_base, ["q_proj"])
    _, layer = next(named_layers(model))
    layer.base_layer = Own(32, 32)
    with pytest.raises(ValueError, match=r"q_proj is Own: leave it out of target_modules"):
        Osf().on_task_start(model, "default", None)
    with pytest.raises(ValueError, match="preserves no direction"):
        Osf(preserved=0.0).on_task_start(model_of(toy_base), "default", None)
