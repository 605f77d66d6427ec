"""The training of one task: a mixin for any Trainer class."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput

from .._compat import DECLARES_SCALED_LOSS, SMOOTHS_BY_TOKENS
from ..data import row_count
from ..stack.save import STRATEGIES
from ..strategies import Strategy
from ..strategies.base import join_states, state_of
from ..tuner import finish_adapter, gate_groups, named_layers
from ..tuner.lookup import adapter_parameters, is_causal
from ..tuner.sharded_parameters import assign, gathered, whole
from .arguments import argument
from .backend import end_autocast, ignore_sharded_weights, release, runnable, sharding
from .callbacks import GateCallback, StrategyCallback
from .optimizers import arrange_optimizer


FINITE_EVERY = 16  # steps: each look at a loss waits for the device

_NEED_WHOLE = {"on_gradients": "changes gradients", "checkpoint_state": "follows every step of the parameters"}


class ContinualMixin(Trainer if TYPE_CHECKING else object):  # type: ignore[misc]
    """Put first among the bases of a Trainer class (see [`make_continual`]); trains the adapter `adapter`.

    Adds the strategies' penalties to the loss, gives the thresholds their own learning rate and no weight decay, logs
    density, threshold and penalty, and stops at a loss that is not a number. Strategies learn of a task's start in
    `train`, and of its end in `finish`.

    Attributes:
        own_rows: of the training set, the first so many rows are the task's own (replayed ones stand behind them); set
            by [`ContinualRun`], None without one.
    """

    own_rows: int | None = None

    def __init__(self, *args, strategies: list[Strategy] | None = None, adapter: str = "default", **kwargs):
        super().__init__(*args, **kwargs)
        self.strategies, self.adapter = list(strategies or ()), adapter
        if self.label_smoother is not None and not SMOOTHS_BY_TOKENS:
            self.model_accepts_loss_kwargs = False  # a mean, which the Trainer divides by the accumulation steps
        if self.is_fsdp_enabled:
            raise ValueError(
                "FSDP needs ContinualRun and ContinualTrainingArguments; a trainer by itself takes DDP or DeepSpeed"
            )
        if self.is_deepspeed_enabled:
            for s, (hook, does) in itertools.product(self.strategies, _NEED_WHOLE.items()):
                if hook in s.hooks:
                    raise ValueError(
                        f"strategy {s!r} {does}, which are not whole under DeepSpeed: train it with the whole "
                        "model in each process (plain or DDP)"
                    )
        for s in self.strategies:
            s.check_run([other for other in self.strategies if other is not s], self.args, sharding(self.args))
        self._penalty: torch.Tensor | None = None
        self._labels: dict[str, Any] = {}  # of the micro-batch: what label smoothing takes out of the inputs
        self._items: Any = None
        self._penalty_sum, self._penalty_count = 0.0, 0
        # TRL casts every trainable parameter of a quantised model to bf16, in which a threshold cannot be trained.
        for gate, layers in gate_groups(self.model, adapter):
            gate.log_tau.data = gate.log_tau.data.float()
            for layer in layers:
                for factor in (layer.jumplora_A[adapter], layer.jumplora_B[adapter]):
                    factor.data = factor.data.float()
        self._finite: torch.Tensor | None = None  # whether all losses were, since this was last looked at
        self._gate = GateCallback(adapter)
        self.add_callback(self._gate)
        self.add_callback(StrategyCallback(self.strategies, adapter))
        for callback in self.callback_handler.callbacks:
            if type(callback).__name__ == "JITCheckpointCallback":  # in mid-step the random numbers are later ones
                callback.on_pre_optimizer_step = TrainerCallback().on_pre_optimizer_step

    # The penalty is computed inside the wrapped model's forward: under ZeRO-3 parameters are empty anywhere else.
    @torch.compiler.disable  # it reads numbers of tensors: one break after the model's graph instead of many in it
    def _add_penalty(self, model, args, kwargs, output):
        # Without gradient TRL's trainers compute the outputs a second time, for `return_outputs=True`.
        if not (model.training and torch.is_grad_enabled()):
            return
        inputs = {**self._labels, **kwargs, "num_items_in_batch": self._items}
        terms = [s.penalty(model, inputs, self.adapter, output) for s in self.strategies]
        terms = [t for t in terms if t is not None]
        if terms:
            if not isinstance(output, dict):
                raise ValueError("the model returned a tuple; penalties need return_dict=True")
            self._penalty = torch.stack([t.reshape(()) for t in terms]).sum()

    def train(self, *args, **kwargs):
        """As the Trainer's.

        Raises:
            ValueError: a strategy needs the data of earlier tasks, which only [`ContinualRun`] has.
        """
        mixes = [strategy for strategy in self.strategies if "training_data" in strategy.hooks]
        if mixes and self.own_rows is None:
            raise ValueError(
                f"strategy {mixes[0]!r} mixes rows of earlier tasks into the training set, which only ContinualRun "
                "does: use it, or mix them yourself and leave the strategy out"
            )
        if sharding(self.args) == "fsdp2":
            ignore_sharded_weights(self.model)
        self._tell("on_task_start")
        begun = args[0] if args else kwargs.get("resume_from_checkpoint")
        if not begun and any(strategy.reused is not None for strategy in self.strategies):
            return TrainOutput(0, 0.0, {})
        handle = self.model.register_forward_hook(self._add_penalty, with_kwargs=True)
        try:
            output = super().train(*args, **kwargs)
            self._check_finite()
            if callable(leave := getattr(self.optimizer, "eval", None)):  # schedule-free: other weights are evaluated
                leave()
            return output
        finally:
            handle.remove()

    def _tell(self, hook: str) -> None:
        """`on_task_start` or `on_task_end` of all strategies; those that run the model can."""
        for strategy in self.strategies:
            with runnable(self.model, self.args) if "forward" in strategy.requires else nullcontext():
                getattr(strategy, hook)(self.model, self.adapter, self.examples)

    def finish(self, name: str) -> None:
        """End of a task, after `train()`: the adapter's support is recorded, and it gets its final name `name`.

        Also ends DeepSpeed's engine, if there is one. From here on the trainer trains no more.

        Raises:
            FloatingPointError, ValueError: as [`finish_adapter`].
        """
        release(self)
        for _, layer in named_layers(self.model):
            layer.allora_eta = None  # gradients of what the task has learned are plain ones
        self._tell("on_task_end")
        end_autocast(self.accelerator, self.model)
        finish_adapter(self.model, self.adapter, name)

    def examples(self, count: int, rows: Any = None, batch: int = 1) -> Iterator[dict[str, Any]]:
        """Up to `count` training examples, in batches on the model's device (see [`Examples`]); of a streamed data set
        the first ones.

        Raises:
            ValueError: texts for a model that is not causal.
        """
        data = self.train_dataset if rows is None else rows
        if row_count(data) is None:
            data = list(itertools.islice(data, count))
        total = len(data) if not self.own_rows or rows is not None else min(self.own_rows, len(data))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.args.seed))[:count]
        if len(data) and isinstance(data[0], str):
            if not is_causal(self.model):
                raise ValueError("texts serve causal models only: give rows as the trainer takes them, with labels")
            length = argument(self.args, "max_length") or 512
            encoded = self.processing_class([data[i] for i in order.tolist()], truncation=True, max_length=length)
            data = [{"input_ids": ids, "labels": list(ids)} for ids in encoded.input_ids]
            order = torch.arange(len(data))
        collate = self.data_collator
        if isinstance(data, Dataset):
            data = self._remove_unused_columns(data, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        for some in order.split(batch):
            yield self._prepare_inputs(collate([data[i] for i in some.tolist()]))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        self._penalty = None  # not in the model's output: DDP rebuilds that from its class's fields
        self._labels = {"labels": inputs["labels"]} if "labels" in inputs else {}
        self._items = self._tokens_each(num_items_in_batch)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if self._penalty is None:
            return result
        # That of any replica under nn.DataParallel: they are equal.
        penalty = self._penalty.to((result[0] if return_outputs else result).device)
        self._penalty_sum += penalty.detach()
        self._penalty_count += 1
        if self._is_scaled(num_items_in_batch):
            penalty = penalty / self.current_gradient_accumulation_steps
        return (result[0] + penalty, result[1]) if return_outputs else result + penalty

    def _tokens_each(self, num_items_in_batch):
        """Answer tokens of a micro-batch, on average over the step's; None where each one's loss is a mean, and outside
        of training."""
        if (
            num_items_in_batch is None
            or not self.model.training
            or not self._is_scaled(num_items_in_batch)
            or self.args.n_gpu > 1
        ):
            return None
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return num_items_in_batch / (processes * self.current_gradient_accumulation_steps)

    def _is_scaled(self, num_items_in_batch) -> bool:
        """Whether the loss arrives already divided by the accumulation steps (else the Trainer divides it later)."""
        if DECLARES_SCALED_LOSS and self.loss_is_scaled_for_ga is not None:
            return self.loss_is_scaled_for_ga
        return self.compute_loss_func is not None or (self.model_accepts_loss_kwargs and num_items_in_batch is not None)

    def training_step(self, *args, **kwargs):
        # The backward pass on this thread: a GPU's would run on another one, where that of a gated layer takes twice as
        # long (docs/performance.md).
        with torch.autograd.set_multithreading_enabled(False):
            loss = super().training_step(*args, **kwargs)
        finite = torch.isfinite(loss.detach())
        self._finite = finite if self._finite is None else self._finite & finite
        if self.state.global_step % FINITE_EVERY == 0:
            self._check_finite()
        if self.accelerator.sync_gradients:
            with torch.no_grad():
                for strategy in self.strategies:
                    strategy.on_gradients(self.model, self.adapter)
        return loss

    def _check_finite(self) -> None:
        """Raise FloatingPointError if a loss was not finite since this was last called. Waits for the device."""
        finite, self._finite = self._finite, None
        if finite is not None and not finite:
            raise FloatingPointError(
                f"a loss was not finite at or shortly before step {self.state.global_step} of {self.state.max_steps}: "
                "training has diverged and was stopped (or a batch had no label to learn from: all of them -100, as "
                "where max_length cuts an answer off). Lower the learning rate or the strategies' weights. Finished "
                "tasks are safe"
            )

    def get_decay_parameter_names(self, model):
        gates = ("jumplora_gate.", "jumplora_g.")  # of entries, of ranks
        return [name for name in super().get_decay_parameter_names(model) if not any(gate in name for gate in gates)]

    def create_optimizer(self, *args, **kwargs):
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if fresh:
            if gate_groups(self.model, self.adapter) and callable(getattr(optimizer, "eval", None)):
                raise ValueError(
                    f"{type(optimizer).__name__} evaluates other weights than it trains, and a gate's threshold is set "
                    "on those that are trained: use another optimizer, or a method without a gate"
                )
            sharded = self.is_deepspeed_enabled
            optimizer = arrange_optimizer(optimizer, self.model, self.adapter, self.args, sharded)
            self.optimizer: torch.optim.Optimizer | None = optimizer
        return optimizer

    def save_model(self, output_dir=None, _internal_call=False):
        self._check_finite()
        if not (self.is_deepspeed_enabled and isinstance(self.model, PeftModel)):
            return super().save_model(output_dir, _internal_call)
        parameters = adapter_parameters(self.model, self.adapter)
        with gathered(parameters):
            values = {p: p.detach().cpu().clone() for p in parameters}
        state = {name: values[p] for name, p in self.model.named_parameters(remove_duplicate=False) if p in values}
        buffers = self.model.named_buffers(remove_duplicate=False)
        state |= {name: b.detach().cpu().clone() for name, b in buffers if f".{self.adapter}." in name}
        self._save(output_dir, state)

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint holds the adapter in training alone: finished ones are in the stack and do not change. And no
        training_args.bin: it is a pickle that holds the Hub token in clear."""
        output_dir = output_dir or self.args.output_dir
        if not isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
            Path(output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        elif self.args.should_save:
            self.model.save_pretrained(
                output_dir, state_dict=state_dict, selected_adapters=[self.adapter], save_embedding_layers=False
            )
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
            states = join_states(s.checkpoint_state() for s in self.strategies)
            if states:
                save_file(states, Path(output_dir, STRATEGIES))

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # trainer_state.json, by which a checkpoint counts as complete, comes after the files of all processes.
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:  # its checkpoint has what an optimizer trains alone
            saved = load_file(Path(checkpoint, SAFETENSORS_WEIGHTS_NAME))
            for name, layer in named_layers(self.model, self.adapter):
                if self.adapter in layer.jumplora_gate and not layer.gate(self.adapter).log_tau.requires_grad:
                    key = f"base_model.model.{name}.jumplora_gate.log_tau"
                    assign(layer.gate(self.adapter).log_tau, saved[key].item())
        if checkpoint is not None and any(s.checkpoint_state() for s in self.strategies):
            states = load_file(Path(checkpoint, STRATEGIES))
            for number, strategy in enumerate(self.strategies):
                strategy.load_checkpoint_state(state_of(number, states))

    def log(self, logs, *args, **kwargs):
        self._check_finite()
        if "loss" in logs and gate_groups(self.model, self.adapter):
            sample = self._gate.sample(self.model)
            gates = [gate for gate, _ in sample.gates]
            logs["density"] = sample.density().item()
            logs["threshold"] = torch.stack([whole(gate.log_tau).exp().cpu() for gate in gates]).mean().item()
            logs["mix"] = gates[0].f
        if "loss" in logs and self._penalty_count:
            logs["penalty"] = float(self._penalty_sum) / self._penalty_count
            self._penalty_sum, self._penalty_count = 0.0, 0
        super().log(logs, *args, **kwargs)


@functools.cache
def make_continual(trainer_cls: type) -> type:
    """A trainer class with [`ContinualMixin`] in front: `make_continual(SFTTrainer)`, `make_continual(MyTrainer)`."""
    return type(f"Continual{trainer_cls.__name__}", (ContinualMixin, trainer_cls), {"__doc__": ContinualMixin.__doc__})


ContinualTrainer = make_continual(Trainer)
ContinualSeq2SeqTrainer = make_continual(Seq2SeqTrainer)
