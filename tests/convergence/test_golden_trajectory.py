"""Two tasks trained by the published implementation, step by step, against the public classes.

tests/golden holds what the published code computed on a tiny Llama: 40 steps a task, with and without ELLA's penalty
(whose gradient does not reach the threshold there).
"""

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_jumplora import ContinualTrainer, ContinualTrainingArguments, JumpLoraConfig, finish_adapter
from hf_jumplora.strategies import Ella
from hf_jumplora.tuner import gate_groups, named_layers


RUNS = ["inclora_jump", "ella_jump"]


class Watch(TrainerCallback):
    """Notes losses (without the penalty) by a hook, threshold, density and penalty after each step."""

    def __init__(self, model):
        self.losses, self.logs = [], []
        self.handle = model.register_forward_hook(lambda module, args, output: self.losses.append(output.loss.item()))

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)


class Golden:
    """One run of the published trajectory through ContinualTrainer."""

    def __init__(self, golden, name, backend=None):
        self.golden, self.settings, self.backend = golden, golden["trajectory"], backend
        self.run = next(run for run in self.settings["runs"] if run["name"] == name)
        self.model = LlamaForCausalLM(LlamaConfig(**golden["llama_config"]))
        self.model.load_state_dict(golden["load"]("llama_init.safetensors"), strict=False)
        self.batches = golden["load"]("batches.safetensors")["input_ids"]  # [tasks, steps, batch, length]
        self.finished = []

    def expected(self, task):
        return self.golden["load"](f"{self.run['name']}_task{task}.safetensors")

    def add_adapter(self, task):
        """A new adapter with the published initial A, on top of the merged earlier ones."""
        settings = self.settings
        steps = settings["steps"]
        config = JumpLoraConfig(
            r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules=settings["target_modules"],
            bandwidth=settings["bandwidth"], gate_start=settings["gate_start_step"] / steps,
            gate_end=settings["gate_end_step"] / steps, parent_adapters=list(self.finished), backend=self.backend,
        )  # fmt: skip
        if self.finished:
            self.model.add_adapter("default", config)
            self.model.set_adapter("default")
            self.model.merge_adapter(self.finished)
        else:
            self.model = get_peft_model(self.model, config)
        initial = self.expected(task)
        for name, layer in named_layers(self.model):
            layer.jumplora_A["default"].data.copy_(initial[f"init.{name}.lora_A"])

    def trainer(self, task, folder, **options):
        settings, rows = self.settings, self.batches[task].flatten(0, 1)
        strategies = [Ella(self.run["ella_lambda"])] if self.run["ella_lambda"] else []
        for strategy in strategies:
            strategy.on_task_start(self.model, "default", None)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, settings["lr"], tuple(settings["betas"]), settings["eps"], settings["weight_decay"]
        )
        args = ContinualTrainingArguments(
            str(folder), max_steps=settings["steps"], per_device_train_batch_size=self.batches.shape[2],
            train_sampling_strategy="sequential", max_grad_norm=0, logging_steps=1, report_to=[], use_cpu=True,
            disable_tqdm=True, **{"save_strategy": "no", **options},
        )  # fmt: skip
        watch = Watch(self.model)
        trainer = ContinualTrainer(
            self.model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows], callbacks=[watch],
            strategies=strategies, optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
        )  # fmt: skip
        return trainer, watch

    def train(self, task, folder):
        self.add_adapter(task)
        trainer, watch = self.trainer(task, folder)
        trainer.train()
        watch.handle.remove()
        finish_adapter(self.model, "default", f"task_{task:03d}")
        self.finished.append(f"task_{task:03d}")
        self.model.unmerge_adapter()
        return watch


@pytest.mark.parametrize("name", RUNS)
def test_published_trajectory(name, golden, relative_error, tmp_path):
    """Every loss, threshold, density and penalty; the final support and merged weights of both tasks."""
    run = Golden(golden, name)
    for task, published in enumerate(run.run["tasks"]):
        watch = run.train(task, tmp_path)
        assert len(watch.losses) == len(watch.logs) == run.settings["steps"]
        assert watch.losses == pytest.approx(published["ce_loss"], rel=1e-4)
        assert [log["threshold"] for log in watch.logs] == pytest.approx(published["threshold"], rel=1e-4)
        assert [log["density"] for log in watch.logs] == pytest.approx(published["density"], abs=2e-3)
        if task and run.run["ella_lambda"]:
            penalties = [run.run["ella_lambda"] * value for value in published["ella_penalty"]]
            assert [log["penalty"] for log in watch.logs] == pytest.approx(penalties, rel=2e-3, abs=1e-7)

        expected = run.expected(task)
        tau, agree, entries = expected["final.log_threshold"].exp(), 0, 0
        run.model.merge_adapter(run.finished)
        for layer_name, layer in named_layers(run.model):
            D = expected[f"final.{layer_name}.lora_B"] @ expected[f"final.{layer_name}.lora_A"]
            agree += int(((D.abs() > tau) == layer.support(run.finished[-1])).sum())
            entries += D.numel()
            merged = expected[f"merged.{layer_name}.weight"]
            assert relative_error(layer.get_base_layer().weight, merged) <= 1e-4
        assert agree / entries >= 0.999


@pytest.mark.parametrize("name", RUNS)
def test_naive_backend_trains_the_same(name, golden, tmp_path):
    """The specification in place of the blocked operator: the same curve over both tasks."""
    losses = {}
    for backend in ("blocked", "naive"):
        run = Golden(golden, name, backend)
        losses[backend] = [loss for task in range(2) for loss in run.train(task, tmp_path).losses]
    assert losses["naive"] == pytest.approx(losses["blocked"], rel=1e-5)


def test_resumed_in_the_ramp_is_bit_equal(golden, tmp_path):
    """Second task, stopped at step 20 of 40 and continued by a new trainer on a new model: the same bits."""

    def second_task(folder, resume=None):
        run = Golden(golden, "ella_jump")
        run.train(0, folder / "first")
        run.add_adapter(1)
        trainer, watch = run.trainer(1, folder, save_strategy="steps", save_steps=20)
        trainer.train(resume_from_checkpoint=resume)
        gate, _ = gate_groups(run.model, "default")[0]
        values = {name: p.detach().clone() for name, p in run.model.named_parameters() if ".default" in name}
        return watch.losses, {**values, "mix": gate.mix}

    losses, straight = second_task(tmp_path / "a")
    resumed_losses, resumed = second_task(tmp_path / "b", str(tmp_path / "a" / "checkpoint-20"))
    assert resumed_losses == losses[20:]
    assert len(straight) == 10  # A and B of four layers, one gate, its mix
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
