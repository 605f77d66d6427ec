"""GORP's full-rank part: it trains the weight itself, keeps off what the earlier tasks used, and lands in the stack."""

import pytest
import torch
import toy
from peft import get_peft_model
from transformers import TrainerCallback

from hf_jumplora import ContinualRun, JumpLoraConfig, load_stack
from hf_jumplora.stack import read_manifest
from hf_jumplora.strategies import Gorp
from hf_jumplora.tuner import named_layers


IDS = torch.arange(3, 23).view(2, 10)
FULL = ["o_proj", "up_proj", "down_proj"]  # square, tall, wide


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_weight_itself_is_trained(use_rslora, toy_base, relative_error):
    """Three steps of AdamW on dW are three steps on a copy of the base model's own weights."""
    base, gorp = toy.load_base(toy_base), Gorp(full=FULL)
    weights = {n: p for n, p in base.named_parameters() if any(f".{name}." in n for name in FULL)}
    options = {"target_modules": FULL, "gate": False, "use_rslora": use_rslora, "rank_pattern": {"up_proj": 4}}
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(r=2, **options))
    gorp.on_task_start(model, "default", None)
    ours = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in ours) == sum(w.numel() for w in weights.values())
    for net, parameters in ((base, list(weights.values())), (model, ours)):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            net(IDS, labels=IDS).loss.backward()
            if net is model:
                gorp.on_gradients(model, "default")
            optimizer.step()
    for name, layer in named_layers(model):
        start = toy.load_base(toy_base).get_submodule(name).weight
        assert relative_error(layer.update("default"), weights[f"{name}.weight"] - start) < 1e-3
    assert relative_error(model(IDS).logits, base(IDS).logits) < 1e-4


class _Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.output_dir.endswith("task_001") and state.global_step == 5:
            raise KeyboardInterrupt


def full_run(base, folder, callbacks=(), **options):
    names = ["q_proj", *FULL]
    return ContinualRun(
        toy.load_base(base), toy.tasks(2), "gorp", toy.arguments(folder, **options), toy.tokenizer(),
        adapter_config=JumpLoraConfig(r=2, target_modules=names), strategies=[Gorp(full=FULL)],
        callbacks=list(callbacks),
    )  # fmt: skip


def test_a_whole_run(toy_base, tmp_path, relative_error):
    """The second task's gradients keep off the first one's space, beside LoRA's; the stack gives the run's model."""
    run = full_run(toy_base, tmp_path)
    gorp, seen = run.plan.strategies[0], []
    change = gorp.on_gradients

    def watched(model, adapter):
        change(model, adapter)
        for key, factor, columns in gorp._factors(model, adapter):
            if key in gorp.spaces and factor.grad is not None:
                seen.append((key, factor.grad.norm(), (gorp.spaces[key].T @ columns(factor.grad)).norm()))

    gorp.on_gradients = watched
    run.train()
    kinds = {key.split(".")[-2] + "." + key.split(".")[-1] for key, *_ in seen}
    assert kinds == {"q_proj.A", "q_proj.B", "o_proj.W", "up_proj.W", "down_proj.W"}
    assert all(part <= 1e-4 * norm for _, norm, part in seen)
    assert sum(norm for _, norm, _ in seen) > 0
    for name, layer in named_layers(run.model):
        if not name.endswith("q_proj"):
            for task in ("task_000", "task_001"):
                assert torch.linalg.matrix_rank(layer.update(task)) > 2
    stack = load_stack(tmp_path, base_model=toy.load_base(toy_base))
    assert relative_error(stack(IDS).logits, run.model(IDS).logits) < 1e-5


def test_a_restart_gives_the_same_bits(toy_base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    full_run(toy_base, tmp_path / "straight", **options).train()
    with pytest.raises(KeyboardInterrupt):
        full_run(toy_base, tmp_path / "broken", [_Interrupt()], **options).train()
    full_run(toy_base, tmp_path / "broken", **options).train()
    straight, again = (read_manifest(tmp_path / name).tasks for name in ("straight", "broken"))
    for one, two in zip(straight, again, strict=True):
        assert one["files"]["adapter_model.safetensors"] == two["files"]["adapter_model.safetensors"]


def test_refusals(toy_base, tmp_path):
    run = full_run(toy_base, tmp_path)
    run.plan.strategies[:] = [Gorp(full="gate_proj")]
    with pytest.raises(ValueError, match=r"gorp.full names \['gate_proj'\].*add to target_modules"):
        run.train()
    for method in ("jumplora", "seqlora"):
        with pytest.raises(ValueError, match="use method='gorp'"):
            ContinualRun(
                toy.load_base(toy_base), toy.tasks(2), method, toy.arguments(tmp_path), toy.tokenizer(),
                strategies=[Gorp(full="q_proj")],
            )  # fmt: skip
