"""What happens between the steps of a task: the gate's schedule, and the strategies' hooks."""

import contextlib
import copy
import json
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from ..strategies import Strategy
from ..tuner import ramp, ramp_steps, set_mix, set_threshold
from ..tuner.density_sample import DensitySample
from ..tuner.lookup import adapter_config, adapter_parameters
from ..tuner.schedule import check_thresholds, density_at
from ..tuner.sharded_parameters import keep_whole_in_forward
from .backend import sharding


_SHOWN = ("loss", "penalty", "density", "threshold", "mix", "grad_norm", "learning_rate", "reward")


class GateCallback(TrainerCallback):
    """Ramps the gate and starts (or holds) the threshold of one adapter. Enough by itself for any Trainer.

    f is a pure function of the finished optimizer steps, so a resumed run needs nothing of this callback's own. The
    threshold is set after step s0. With `threshold_update="density"` it is set after every later step too, from a
    sample (see [`DensitySample`]), and after the last step exactly. What is measured before the gate is closed is of
    another model: it never is the best, which early stopping and `load_best_model_at_end` look for.
    """

    def __init__(self, adapter: str = "default"):
        self.adapter = adapter
        self._sample: DensitySample | None = None

    def sample(self, model: nn.Module) -> DensitySample:
        """The sample of the adapter's entries, made when it is first asked for."""
        if self._sample is None:
            self._sample = DensitySample(model, self.adapter)
        return self._sample

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        config = adapter_config(model, self.adapter)
        if config.gate:
            ramp_steps(state.max_steps, config)  # raises if the task is too short
            set_mix(model, self.adapter, ramp(state.global_step, state.max_steps, config))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        config = adapter_config(model, self.adapter)
        if config.gate and ramp(state.global_step, state.max_steps, config) < 1:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        config = adapter_config(model, self.adapter)
        if not config.gate:
            return
        start, _ = ramp_steps(state.max_steps, config)
        held = state.global_step > start and config.threshold_update == "density"
        share = density_at(state.global_step, state.max_steps, config) if state.global_step >= start else None
        if state.global_step == start or (held and state.global_step == state.max_steps):
            set_threshold(model, self.adapter, share, together=True)
        elif held:
            self.sample(model).hold(config, share)
        set_mix(model, self.adapter, ramp(state.global_step, state.max_steps, config))

    @torch.no_grad()
    def on_train_end(self, args, state, control, model=None, **kwargs):
        config = adapter_config(model, self.adapter)
        closed = config.gate and ramp(state.global_step, state.max_steps, config) == 1
        if closed and config.threshold_update == "density" and state.global_step < state.max_steps:  # ended early
            set_threshold(model, self.adapter, density_at(state.global_step, state.max_steps, config), together=True)

    def on_log(self, args, state, control, model=None, **kwargs):
        check_thresholds(model, self.adapter)


class StrategyCallback(TrainerCallback):
    """Calls `on_optimizer`, `on_step_begin` and `on_step_end` of the strategies, and counts their steps."""

    def __init__(self, strategies: list[Strategy], adapter: str):
        self.strategies, self.adapter = strategies, adapter

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if sharding(args) == "zero3" and any("penalty" in s.hooks for s in self.strategies):
            keep_whole_in_forward(model, adapter_parameters(model, self.adapter))
        for strategy in self.strategies:
            strategy.step, strategy.steps = state.global_step, state.max_steps
            strategy.on_optimizer(getattr(optimizer, "optimizer", optimizer))  # without accelerate's wrapper

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        for strategy in self.strategies:
            strategy.step = state.global_step
            strategy.on_step_begin(model, self.adapter)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for strategy in self.strategies:
            strategy.on_step_end(model, self.adapter)


class ReportCallback(TrainerCallback):
    """What `report_to` names (tensorboard, wandb, trackio), over all tasks: one x-axis of steps, and the task's name
    where it begins. The trainer of a task would begin at step 0 again, in a folder that goes with its checkpoints."""

    def __init__(self, report_to: str | list[str] | None, output_dir: str):
        self.callbacks = [make() for make in get_reporting_integration_callbacks(report_to)]
        self.output_dir, self._task, self._before, self._begun = output_dir, "", 0, False
        self._announce = False

    def next_task(self, name: str, before: int) -> None:
        """What is logged from now on is of this task; before: the steps of those before it."""
        self._task, self._before, self._announce = name, before, True

    def on_train_begin(self, args, state, control, **kwargs):
        if not self._begun:
            self._call("on_train_begin", args, state, control, **kwargs)
        self._begun = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.max_steps <= 0:  # a trainer that evaluates alone
            return
        logs = dict(logs or {})
        if self._announce:
            logs["task"] = self._task
        self._announce = False
        self._call("on_log", args, state, control, logs=logs, **kwargs)

    def _call(self, hook: str, args, state, control, **kwargs) -> None:
        args, state = copy.copy(args), copy.copy(state)
        args.output_dir = self.output_dir
        state.global_step += self._before
        for callback in self.callbacks:
            getattr(callback, hook)(args, state, control, **kwargs)


class LogLines(TrainerCallback):
    """A line at each logging step, where no progress bar is shown: in a log file, for example."""

    def __init__(self, task: str, number: int, total: int):
        self.what = f"task {number} of {total}, {task}"

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            print(f"{self.what}: {state.max_steps} steps", flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in (logs or {}):
            shown = {key: value for key, value in logs.items() if key in _SHOWN}
            values = ", ".join(f"{key} {value:.4g}" for key, value in shown.items())
            print(f"{self.what}: step {state.global_step} of {state.max_steps}, {values}", flush=True)


class HistoryCallback(TrainerCallback):
    """Appends what a task's trainer logs of its steps to the run's history.jsonl (see `report/folder.py`)."""

    def __init__(self, path: Path, task: str):
        self.path, self.task = path, task

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and "loss" in (logs or {}):
            numbers = {key: value for key, value in logs.items() if isinstance(value, (int, float))}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": self.task, "step": state.global_step, **numbers}) + "\n")


class Sigterm(TrainerCallback):
    """SIGTERM in a run with `enable_jit_checkpoint` ends it as Ctrl-C does, and in the steps of a task after that step
    and a checkpoint; at any other time (curvature, evaluation, writing) it ends at once.

    In place of transformers' callback, which waits three seconds, and loses a signal of a task's last ones.
    """

    def __init__(self) -> None:
        self._process, self._training, self._received = 0, False, False

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Inside, SIGTERM comes to this callback. In the main thread only: Python allows no handler elsewhere."""
        self._process, before = os.getpid(), signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked worker, which its pool ends so
            os._exit(128 + number)
        self._received = True
        if not self._training:
            self._stop("")

    def _stop(self, when: str) -> None:
        """Not an Exception: nothing on the way takes it for an error of its own, and no push is waited for."""
        raise KeyboardInterrupt(
            f"the run was interrupted by SIGTERM{when}: finished tasks and checkpoints are safe, and the same command "
            "continues from there"
        )

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_step_end(self, args, state, control, **kwargs):
        if PartialState().num_processes > 1:  # it does not reach all in the same step
            self._received = any(gather_object([self._received]))
        if self._received:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False
        if self._received:
            self._stop(f" at step {state.global_step} of {state.max_steps} of a task")


class EndUnsaved(TrainerCallback):
    """Keeps early stopping exact across restarts: no checkpoint is saved once it has ended a task, from which a run
    that was killed would train on. From the checkpoint before, the task ends at the same step."""

    def __init__(self, stopping: list[EarlyStoppingCallback]):
        self.stopping = stopping

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_save &= not ended_early(self.stopping)

    on_epoch_end = on_evaluate


def early_stopping(callbacks: Iterable[Any]) -> list[EarlyStoppingCallback]:
    """Those of a list of callbacks that may end a task before its last step."""
    return [callback for callback in callbacks if isinstance(callback, EarlyStoppingCallback)]


def ended_early(stopping: list[EarlyStoppingCallback]) -> bool:
    """Whether one of them has lost its patience."""
    return any(callback.early_stopping_patience_counter >= callback.early_stopping_patience for callback in stopping)
