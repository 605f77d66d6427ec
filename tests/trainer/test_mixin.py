"""One task: the penalty however gradients add up, the gate's optimizer group, modes, checkpoints, other trainers."""

import pytest
import torch
import toy
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import load_file
from test_run import RESTART, files
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_jumplora import (
    ContinualTrainer,
    ContinualTrainingArguments,
    GateCallback,
    JumpLoraConfig,
    Task,
    finish_adapter,
    load_stack,
    make_continual,
)
from hf_jumplora._compat import SMOOTHS_BY_TOKENS
from hf_jumplora.strategies import Ella, Lwf, Strategy
from hf_jumplora.tuner import density, gate_groups, named_layers, ramp, set_mix, set_threshold


def stacked(base, **options):
    """A finished task_000 and an adapter `default` on top of it, B still zero."""
    options = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
    model = toy.load_base(base)
    torch.manual_seed(1)
    model = get_peft_model(model, JumpLoraConfig(**{**options, "init_weights": False}))
    if options.get("gate", True):
        set_threshold(model, "default", 0.1)
        set_mix(model, "default", 1.0)
    finish_adapter(model, "default", "task_000")
    torch.manual_seed(2)
    model.add_adapter("default", JumpLoraConfig(parent_adapters=["task_000"], **options))
    model.set_adapter("default")
    return model


def rows(count=32, equal=True):
    """Token ids; with `equal=False` rows differ in the number of tokens that have a loss."""
    ids = torch.randint(3, 30, (count, 6), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        {"input_ids": row, "labels": row if equal else [-100] * (1 + i % 4) + row[1 + i % 4 :]}
        for i, row in enumerate(ids)
    ]


class Pull(Strategy):
    """weight * sum of A^2. As long as B is zero the task's loss has no gradient in A: it is 2 * weight * A exactly."""

    def __init__(self, weight=0.1):
        self.weight, self.calls = weight, 0

    def penalty(self, model, inputs, adapter, output):
        self.calls += 1
        return self.weight * sum(layer.jumplora_A[adapter].square().sum() for _, layer in named_layers(model, adapter))


class Note(TrainerCallback):
    """Gradients before the first optimizer step, everything that is logged."""

    def __init__(self):
        self.grads, self.logs = None, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.grads is None:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def train(
    model,
    folder,
    strategies=(),
    cls=ContinualTrainer,
    dataset=None,
    callbacks=(),
    prepare=None,
    eval_dataset=None,
    **options,
):
    defaults = {"max_steps": 6, "train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "logging_steps": 1}
    args = toy.arguments(folder, **{**defaults, **options})
    note = Note()
    trainer = cls(
        model, args, train_dataset=rows() if dataset is None else dataset, callbacks=[note, *callbacks],
        strategies=list(strategies), eval_dataset=eval_dataset,
    )  # fmt: skip
    if prepare:
        prepare(trainer)
    trainer.train()
    return trainer, note


def test_the_backward_pass_stays_on_this_thread(toy_base, tmp_path):
    """A GPU's would run on another one, where a gated layer's takes twice as long. After a task all is as it was."""
    threads = []

    class Look(Pull):
        def penalty(self, *args):
            threads.append(torch._C._is_multithreading_enabled())
            return super().penalty(*args)

    train(stacked(toy_base), tmp_path, [Look()])
    assert threads == [False] * 6
    assert torch._C._is_multithreading_enabled()


# ---- the penalty -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counted", "smoothing"), [(True, 0.0), (False, 0.0), (True, 0.1)], ids=["by-tokens", "by-batch", "smoothed"]
)
def test_penalty_under_gradient_accumulation(counted, smoothing, toy_base, tmp_path):
    """8 x 1, 2 x 4 and 1 x 8: the same loss and the same gradients, penalties of weights and of rows included."""

    def prepare(trainer):
        if not counted:  # as for a model whose forward takes no num_items_in_batch: a mean of means
            trainer.model_accepts_loss_kwargs = False

    found = {}
    for size, steps in ((8, 1), (2, 4), (1, 8)):
        model = stacked(toy_base)
        ella = Ella(100.0)
        ella.on_task_start(model, "default", None)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options["label_smoothing_factor"] = smoothing  # it takes the labels out of the model's inputs
        dataset = rows(48, equal=not counted or (smoothing > 0 and not SMOOTHS_BY_TOKENS))
        _, note = train(model, tmp_path, [Pull(), ella, Lwf()], dataset=dataset, prepare=prepare, **options)
        found[size] = note
    reference = found[8]
    for note in found.values():
        for name, grad in reference.grads.items():
            torch.testing.assert_close(note.grads[name], grad, rtol=1e-4, atol=1e-7)
        for key in ("loss", "penalty"):
            assert [log[key] for log in note.logs if "loss" in log] == pytest.approx(
                [log[key] for log in reference.logs if "loss" in log], rel=1e-4
            )
    for name, grad in reference.grads.items():
        if "jumplora_A" in name:  # 1 x, not 4 x or 8 x
            start = dict(stacked(toy_base).named_parameters())[name]
            torch.testing.assert_close(grad, 0.2 * start.detach(), rtol=1e-5, atol=1e-8)


def test_logged_loss_is_task_plus_penalty(toy_base, tmp_path):
    _, plain = train(stacked(toy_base), tmp_path, learning_rate=0.0, max_steps=1, **SHORT)
    _, pulled = train(stacked(toy_base), tmp_path, [Pull()], learning_rate=0.0, max_steps=1, **SHORT)
    assert "penalty" not in plain.logs[0]
    assert pulled.logs[0]["penalty"] > 0
    assert pulled.logs[0]["loss"] == pytest.approx(plain.logs[0]["loss"] + pulled.logs[0]["penalty"], rel=1e-5)


SHORT = {"prepare": lambda trainer: trainer.remove_callback(GateCallback)}  # one step is too short for a ramp


def test_no_penalty_in_evaluation(toy_base, tmp_path):
    """Neither in evaluations between the steps nor afterwards; eval_loss is the task's alone."""
    pull = Pull(1e3)
    model = stacked(toy_base)
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": rows(8)}
    trainer, note = train(model, tmp_path, [pull], **options)
    assert pull.calls == 6  # one a training step
    evaluations = [log["eval_loss"] for log in note.logs if "eval_loss" in log]
    assert len(evaluations) == 3
    ids = torch.tensor([row["input_ids"] for row in rows(8)])
    with torch.no_grad():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert evaluations[-1] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)
    model.train()
    assert "penalty" not in model(input_ids=ids, labels=ids)  # the hook is gone after training


def test_ella_keeps_the_new_update_off_the_old(toy_base, tmp_path):
    """What the penalty is for: less overlap with the earlier task than without it."""
    overlaps = {}
    for weight in (0.0, 3e4):
        model = stacked(toy_base, gate=False)
        ella = Ella(weight)
        ella.on_task_start(model, "default", None)
        train(model, tmp_path, [ella], max_steps=20)
        layers = [layer for _, layer in named_layers(model)]
        overlaps[weight] = sum(float((layer.update("default") * layer.update("task_000")).norm()) for layer in layers)
        assert min(float(layer.update("default").norm()) for layer in layers) > 1e-3  # and still it learns
    assert overlaps[3e4] < 0.5 * overlaps[0.0]


def test_ella_is_silent_under_hard_isolation(toy_base, tmp_path):
    """Entries of earlier tasks are closed: there is nothing that could overlap."""
    model = stacked(toy_base, isolation="hard")
    ella = Ella(1e4)
    ella.on_task_start(model, "default", None)
    for _, layer in named_layers(model):
        torch.nn.init.normal_(layer.jumplora_B["default"])
    assert ella.penalty(model, {}, "default", {}).item() == 0


def test_ella_of_the_first_task_is_none(toy_base):
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(target_modules=["q_proj"], r=2))
    ella = Ella()
    ella.on_task_start(model, "default", None)
    assert ella.penalty(model, {}, "default", {}) is None


def test_negative_ella_weight():
    with pytest.raises(ValueError, match="must not be negative"):
        Ella(-1.0)


def test_torch_compile_with_penalty(toy_base, tmp_path):
    """The penalty is found behind the compiled wrapper too; same losses and weights as eager."""
    found = {}
    for compiled in (False, True):
        model = stacked(toy_base)
        model.merge_adapter(["task_000"])  # as ContinualRun does
        ella = Ella(100.0)
        ella.on_task_start(model, "default", None)
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        _, note = train(model, tmp_path, [Pull(), ella], **options)
        found[compiled] = note, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for key in ("loss", "penalty"):
        values = [[log[key] for log in found[c][0].logs if "loss" in log] for c in (True, False)]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
    for name, value in found[False][1].items():
        torch.testing.assert_close(found[True][1][name], value, rtol=1e-4, atol=1e-6)


def test_bf16_on_cpu(toy_base, tmp_path):
    """Autocast: the adapter and its threshold stay float32, parents too, and the loss is near that of float32."""
    model = stacked(toy_base)
    _, half = train(model, tmp_path, [Pull()], bf16=True)
    _, full = train(stacked(toy_base), tmp_path, [Pull()])
    assert {p.dtype for n, p in model.named_parameters() if "jumplora" in n} == {torch.float32}
    losses = [[log["loss"] for log in note.logs if "loss" in log] for note in (half, full)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]


def test_tuple_output_is_refused(toy_base, tmp_path):
    """A penalty has no place in a tuple; it must not be lost without a word."""
    model = stacked(toy_base)
    model.register_forward_hook(lambda module, args, output: output.to_tuple())
    with pytest.raises(ValueError, match="return_dict=True"):
        train(model, tmp_path, [Pull()])


def test_nan_loss_stops(toy_base, tmp_path):
    """Soon after the step where it happens, before anything is saved, and with what to do."""

    class Diverges(Pull):
        def penalty(self, model, inputs, adapter, output):
            return super().penalty(model, inputs, adapter, output) * (float("inf") if self.calls == 4 else 1)

    with pytest.raises(
        FloatingPointError, match=r"not finite at or shortly before step [3-6] of 6.*Lower the learning"
    ):
        train(stacked(toy_base), tmp_path, [Diverges()])


# ---- the gate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [None, 0.5])
def test_gate_has_its_own_group(rate, toy_base, tmp_path):
    """Own learning rate if asked for, never a weight decay; every trainable parameter is in exactly one group."""
    model = stacked(toy_base)
    args = toy.arguments(tmp_path, weight_decay=0.1, gate_learning_rate=rate, learning_rate=1e-3)
    trainer = ContinualTrainer(model, args, train_dataset=rows())
    groups = trainer.create_optimizer().param_groups
    (gate, _), *_ = gate_groups(model, "default")
    where = [group for group in groups if any(p is gate.log_tau for p in group["params"])]
    assert len(where) == 1
    assert where[0]["weight_decay"] == 0
    assert where[0]["lr"] == (rate or 1e-3)
    inside = [id(p) for group in groups for p in group["params"]]
    assert sorted(inside) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    factors = [
        g
        for g in groups
        if any(p is layer.jumplora_A["default"] for p in g["params"] for _, layer in named_layers(model))
    ]
    assert all(g["weight_decay"] == 0.1 and g["lr"] == 1e-3 for g in factors)


class EachStep(TrainerCallback):
    """Density, threshold and mix after every optimizer step (it runs after the gate's callback)."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        gate, _ = gate_groups(model, "default")[0]
        self.seen.append((density(model, "default"), gate.log_tau.exp().item(), gate.mix.item()))


def watched(base, folder, **config):
    model, each = stacked(base, **config), EachStep()
    entries = sum(layer.in_features * layer.out_features for _, layer in named_layers(model))
    train(model, folder, max_steps=20, prepare=lambda trainer: trainer.add_callback(each), save_strategy="no")
    return entries, each.seen  # the threshold starts after step 4, f is 1 after step 16


@pytest.mark.parametrize("scope", ["global", "block", "layer"])
def test_density_mode_holds_the_density(scope, toy_base, tmp_path):
    """Within one entry a gate, after every step from the start of the threshold on."""
    config = {"threshold_update": "density", "target_density": 0.2, "threshold_scope": scope}
    entries, seen = watched(toy_base, tmp_path, **config)
    gates = {"global": 1, "block": 2, "layer": 4}[scope]
    for kept, _, _ in seen[3:]:
        assert abs(kept * entries - 0.2 * entries) <= gates
    assert len({tau for _, tau, _ in seen[3:]}) > 10  # which takes another threshold after each step


def test_frozen_mode_holds_the_threshold(toy_base, tmp_path):
    entries, seen = watched(toy_base, tmp_path, threshold_update="frozen", initial_density=0.2)
    assert abs(seen[3][0] * entries - 0.2 * entries) <= 1
    assert len({tau for _, tau, _ in seen[3:]}) == 1


def test_learned_mode_moves_the_threshold(toy_base, tmp_path):
    """With a learning rate of its own, which the others do not have."""
    moved = {}
    for rate in (None, 0.3):
        model, each = stacked(toy_base), EachStep()
        train(
            model, tmp_path, max_steps=20, gate_learning_rate=rate, learning_rate=1e-3,
            prepare=lambda trainer, each=each: trainer.add_callback(each),
        )  # fmt: skip
        taus = [tau for _, tau, _ in each.seen]
        moved[rate] = abs(taus[-1] / taus[4] - 1)
    assert 0 < moved[None] < 0.05 < moved[0.3]


def test_ramp_in_training(toy_base, tmp_path):
    _, seen = watched(toy_base, tmp_path)
    config = JumpLoraConfig()
    assert [mix for *_, mix in seen] == pytest.approx([ramp(step, 20, config) for step in range(1, 21)])


def test_logged_density_threshold_and_mix(toy_base, tmp_path):
    model = stacked(toy_base)
    _, note = train(model, tmp_path)
    last = [log for log in note.logs if "loss" in log][-1]
    gate, _ = gate_groups(model, "default")[0]
    assert last["density"] == pytest.approx(density(model, "default"))
    assert last["threshold"] == pytest.approx(gate.log_tau.exp().item())
    assert last["mix"] == 1.0


def test_too_few_steps(toy_base, tmp_path):
    with pytest.raises(ValueError, match=r"4 optimizer steps are too few for gate_start=0\.2"):
        train(stacked(toy_base), tmp_path, max_steps=4)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_checkpoint_holds_one_adapter_and_no_secret(toy_base, tmp_path):
    """Finished tasks are not written again, nothing is pickled that holds the arguments, and no token is there."""
    secret = "hf_" + "SECRET" * 5
    trainer, _ = train(stacked(toy_base), tmp_path, save_strategy="steps", save_steps=3, hub_token=secret)
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-3", tmp_path / "final"):
        names = {path.name for path in folder.iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names
        assert "training_args.bin" not in names
        assert not [path for path in folder.rglob("*") if path.is_dir()]
        weights = load_file(folder / "adapter_model.safetensors")
        assert len(weights) == 4 * 4  # A, B, log_tau and mix of four layers: of one adapter
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def test_checkpoint_of_a_plain_model_has_no_training_args(toy_base, tmp_path):
    """The mixin over a model without adapters saves what the Trainer saves, less the pickle."""
    trainer = ContinualTrainer(toy.load_base(toy_base), toy.arguments(tmp_path), train_dataset=rows())
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "training_args.bin").exists()


# ---- other trainers ----------------------------------------------------------------------------------------------


def parents(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".task_000" in n}


def test_stock_trainer_with_the_callback_alone(toy_base, tmp_path):
    """No mixin: the gate ramps, the threshold starts, the parents stay, and the task can be finished."""
    model = stacked(toy_base)
    before = parents(model)
    args = TrainingArguments(
        str(tmp_path), max_steps=6, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    Trainer(model, args, train_dataset=rows(), callbacks=[GateCallback()]).train()
    finish_adapter(model, "default", "task_001")
    assert 0 < density(model, "task_001") < 1
    assert parents(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in parents(model).items() if name in before)


def test_sft_trainer(toy_base, tmp_path):
    """Stacks train; the penalty's gradient arrives (TRL builds its loss and its outputs apart from each other)."""
    trl = pytest.importorskip("trl")
    model = stacked(toy_base)
    before = parents(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[],
        use_cpu=True, save_strategy="no", bf16=False, disable_tqdm=True, max_length=16, max_grad_norm=0.0,
        logging_steps=1,
    )  # fmt: skip
    dataset = Dataset.from_dict({"text": [row["sentence"] for row in toy.rows(0, 32)]})
    note = Note()
    trainer = make_continual(trl.SFTTrainer)(
        model, args, train_dataset=dataset, processing_class=toy.tokenizer(), strategies=[Pull()], callbacks=[note]
    )
    trainer.train()
    checked = [name for name in note.grads if "jumplora_A" in name]
    assert len(checked) == 4
    for name in checked:
        torch.testing.assert_close(note.grads[name], 0.2 * start[name], rtol=1e-5, atol=1e-8)
    assert all(log["penalty"] > 0 for log in note.logs if "loss" in log)
    assert all(torch.equal(value, before[name]) for name, value in parents(model).items())
    trainer.finish("task_001")
    assert sorted(model.peft_config) == ["task_000", "task_001"]
    assert model.peft_config["task_001"].support


def preferences():
    pairs = [("size", "tiny", "huge"), ("mood", "calm", "wild"), ("pace", "slow", "fast"), ("light", "dark", "pale")]
    return Dataset.from_list([{"prompt": p, "chosen": f" {a}", "rejected": f" {b}"} for p, a, b in pairs * 4])


@pytest.mark.parametrize("mixin", [False, True], ids=["callback", "mixin"])
def test_dpo_trainer(mixin, toy_base, tmp_path):
    """DPO on a stack: the reference is the stack before this task, the parents stay, the margin grows."""
    trl = pytest.importorskip("trl")
    model = stacked(toy_base)
    before = parents(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = trl.DPOConfig(
        str(tmp_path), max_steps=12, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        bf16=False, learning_rate=3e-2, logging_steps=1, disable_tqdm=True, max_grad_norm=0.0, max_length=16,
    )  # fmt: skip
    note = Note()
    cls = make_continual(trl.DPOTrainer) if mixin else trl.DPOTrainer
    options = {"strategies": [Pull()]} if mixin else {}
    callbacks = [note] if mixin else [note, GateCallback()]
    cls(
        model, args=args, train_dataset=preferences(), processing_class=toy.tokenizer(), callbacks=callbacks, **options
    ).train()
    margins = [log["rewards/margins"] for log in note.logs if "rewards/margins" in log]
    assert margins[0] == pytest.approx(0, abs=1e-6)  # policy and reference agree before the first step
    assert margins[-1] > 0.03
    if mixin:
        for name in (name for name in note.grads if "jumplora_A" in name and "default" in name):
            torch.testing.assert_close(note.grads[name], 0.2 * start[name], rtol=1e-5, atol=1e-7)
    assert all(torch.equal(value, before[name]) for name, value in parents(model).items())
    finish_adapter(model, "default", "task_001")


def test_named_classes():
    """`make_continual` gives one class for one class; arguments are checked."""
    assert make_continual(Trainer) is ContinualTrainer
    assert issubclass(ContinualTrainer, Trainer)
    with pytest.raises(ValueError, match="eval_mode"):
        ContinualTrainingArguments("out", eval_mode="x", use_cpu=True)


@pytest.mark.parametrize("kind", ["text", "plain"])
def test_autocast_is_of_training_alone(kind, toy_base, tmp_path):
    """bf16=True over a float32 base: every task is trained in bf16, and the model that is left is what loads."""
    seen, stream = [], toy.tasks(2, 8, 2)
    if kind == "plain":
        rows = Dataset.from_list([{"input_ids": [3, 12, 13, 8], "labels": [3, 12, 13, 8]}] * 8)
        stream = [Task(task.name, rows, rows, metric="loss") for task in stream]
    model = toy.load_base(toy_base)
    layer = model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, args, output: seen.append((module.training, output.dtype)))
    run = toy.make_run(model, tmp_path, "inclora", stream, bf16=True, max_steps=2)
    run.train()
    steps = [dtype for training, dtype in seen if training]
    assert len(steps) == 4
    assert set(steps) == {torch.bfloat16}
    ids = torch.tensor([[3, 12, 13, 8]])
    with torch.no_grad():
        loaded = load_stack(tmp_path, toy.load_base(toy_base)).eval()(ids).logits
        torch.testing.assert_close(run.model.eval()(ids).logits, loaded, rtol=1e-5, atol=1e-5)
    if kind == "text":
        assert {dtype for training, dtype in seen if not training} == {torch.float32}


def test_autocast_after_a_restart(toy_base, tmp_path):
    """Interrupted in the second task, a run of bf16=True over a float32 base goes on with the same bits and scores."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.output_dir.endswith("task_001") and state.global_step == 5:
                raise KeyboardInterrupt

    def run(name, *callbacks):
        options = {**RESTART, "bf16": True}
        return toy.make_run(toy_base, tmp_path / name, stream=toy.tasks(2), callbacks=callbacks, **options)

    run("straight").train()
    with pytest.raises(KeyboardInterrupt):
        run("again", Interrupt()).train()
    assert (tmp_path / "again" / "checkpoints").is_dir()
    run("again").train()
    assert files(tmp_path / "again") == files(tmp_path / "straight")
