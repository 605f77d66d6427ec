"""The moments at which a method can act."""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Protocol

import torch
from torch import nn


class Examples(Protocol):
    """`examples(count)`: training examples of the task, ready for the model."""

    def __call__(self, count: int, rows: Any = None, batch: int = 1) -> Iterator[dict[str, Any]]:
        """Up to `count` examples, in batches of `batch` on the model's device; the same ones in every call.

        rows: another data set (as the trainer takes it), or texts (str) for a causal model: then labels = input_ids.
        """


@dataclasses.dataclass(frozen=True)
class LayerSize:
    """What the memory of a strategy depends on, of one adapted layer.

    r: rank of the adapter. gate: whether it has one. changed: fraction of the layer's entries that the finished tasks
    together have changed.
    """

    out_features: int
    in_features: int
    r: int
    gate: bool = True
    changed: float = 1.0


_HOOKS = ("training_data", "on_task_start", "on_optimizer", "on_step_begin", "penalty", "on_gradients", "on_step_end",
          "on_task_end", "checkpoint_state")  # fmt: skip
REQUIREMENTS = frozenset({"past_factors", "forward", "whole_model", "softmax", "all_steps"})
_FLAGS = {"needs_past_factors": "past_factors", "runs_model": "forward", "needs_whole_model": "whole_model"}


class Strategy:
    """Base of all strategies; every hook does nothing. Strategies compose: a run takes a list of them.

    Parameters must be read from the model by attribute inside `penalty` and never be kept: under DeepSpeed ZeRO-3 they
    are whole only inside the forward pass, which is where `penalty` is called.

    Hooks must not draw from the global random numbers: a restarted task would see other ones.
    A restarted run compares the `repr` of its strategies: make a strategy with options a dataclass. Its fields with
    `init=False` are what it has learned of the tasks; [`reset`] sets them back.

    Class attributes:
        requires: what a run must provide beyond the hooks' arguments, a subset of
            "past_factors": it reads the factors or supports of single earlier tasks (`layer.factors("task_000")`). A
            run otherwise keeps earlier tasks as the sum of their updates (`layer.total_update(parents)`), so that
            nothing grows with their number; with this it keeps all finished adapters in the model.
            "forward": it runs the model when a task starts or ends. DeepSpeed ZeRO-3 then partitions all parameters,
            the adapter's too: they are whole in the forward pass alone, and gradients are available for layer outputs,
            not for parameters.
            "whole_model": it reads whole parameters outside of `penalty`. Refused under DeepSpeed ZeRO-3 and FSDP.
            "softmax": it takes the model's `logits` as those of a softmax over answers. Refused for models whose
            answers are others: numbers (regression), several labels at once, places in a text.
            "all_steps": it plans for `steps` up to the last one. Refused with early stopping.
        hooks: the hooks that a class overrides; filled in when the class is made.
        tuning: (option, values in the order of trying) for the bench; None: its `weight`, if it has one, around the
            default.

    Attributes:
        seed: of what the strategy draws by itself. The bench sets it to the seed of the run.
        step: optimizer steps of the task that are done, also after a restart; the trainer sets it before each step.
        steps: of the whole task; the trainer sets it before `on_optimizer`.
        reused: set in `on_task_start`, the number of an earlier task whose adapter serves the one that begins: that one
            is not trained. None: it is.
        general: rows of no task that the strategy preserves, None without any; True stands for the run's own general
            text, which the run puts in its place.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    hooks: ClassVar[frozenset[str]] = frozenset()
    tuning: ClassVar[tuple[str, tuple[float, ...]] | None] = None
    seed: int = 0
    step: int = 0
    steps: int = 0
    reused: int | None = None
    general: Any = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for flag, requirement in _FLAGS.items():
            if vars(cls).get(flag):
                warnings.warn(
                    f"{cls.__name__}.{flag} = True is deprecated: write requires = frozenset({{{requirement!r}}})",
                    FutureWarning,
                    stacklevel=2,
                )
                cls.requires |= {requirement}
        if unknown := cls.requires - REQUIREMENTS:
            raise TypeError(f"{cls.__name__}.requires is a subset of {sorted(REQUIREMENTS)}, got {sorted(unknown)}")
        cls.hooks = frozenset(name for name in _HOOKS if getattr(cls, name) is not getattr(Strategy, name))

    def __repr__(self) -> str:
        return type(self).__name__

    def check(self, mode: str, config: Any) -> None:
        """Before anything is trained. Raises ValueError if this strategy cannot work with adapters that follow one
        another in this `mode` ("incremental", "sequential", "separate" or "joint") or have this config."""

    def check_run(self, others: "list[Strategy]", args: Any, sharding: str) -> None:
        """Before anything is trained. Raises ValueError if this strategy cannot work with these.

        Args:
            others: the run's other strategies.
            args: the training arguments.
            sharding: "none", "ddp", "fsdp2", or "zero0" to "zero3" under DeepSpeed.
        """

    def check_steps(self, steps: int) -> None:
        """Before anything is trained, for each task. Raises ValueError if so many steps are too few."""

    def memory_bytes(self, layers: list[LayerSize], tasks: int) -> int | None:
        """Bytes that this strategy keeps on the device while a task is trained after `tasks` finished ones, for
        `hf-jumplora estimate`; None: not known, and the estimate is refused."""
        return None

    def workspace_bytes(self, layers: list[LayerSize], tasks: int) -> int:
        """Bytes that its penalty needs at once, at its peak, beyond a step without it."""
        return 0

    def logit_bytes(self, logits: int, width: int, tasks: int) -> int:
        """Bytes that the loss and its penalty need of a step's logits at once, `logits` numbers of `width` bytes each;
        0: no more than the loss alone."""
        return 0

    def reset(self) -> None:
        """Forget what was learned: a run calls this before its first task, so that strategies can be used again."""
        fields: tuple[Any, ...] = dataclasses.fields(self) if dataclasses.is_dataclass(self) else ()
        for f in fields:
            if not f.init:
                setattr(self, f.name, f.default if f.default_factory is dataclasses.MISSING else f.default_factory())

    def training_data(self, dataset: Any, index: int, earlier: list[Any]) -> Any:
        """The data set task number `index` is trained on: `dataset` itself, or with more rows behind it.

        earlier: the training sets of the tasks before, None where a task's data is not at hand.
        """
        return dataset

    def on_task_start(self, model: nn.Module, adapter: str, examples: Examples) -> None:
        """Before the first step of a task; `adapter` is the one about to be trained, its parents are in the model."""

    def penalty(
        self, model: nn.Module, inputs: dict[str, Any], adapter: str, output: dict[str, Any]
    ) -> torch.Tensor | None:
        """A scalar added to the loss of each training step, or None. Never called in evaluation.

        inputs: what the model was called with, the micro-batch's labels, and `num_items_in_batch`: the answer tokens of
        a micro-batch on average over the step's (a sum over tokens that is divided by it has the loss's weights); None
        where the loss of each micro-batch is a mean by itself.
        output: what the model returned for `inputs`, with its graph.
        """
        return None

    def on_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step of a task, or of its rest after a restart: the optimizer, its state already loaded."""

    def on_step_begin(self, model: nn.Module, adapter: str) -> None:
        """Before the forward passes of each optimizer step."""

    def on_gradients(self, model: nn.Module, adapter: str) -> None:
        """Once a step: gradients are summed over micro-batches and processes, not yet clipped; change them in place.

        Under fp16 they carry the loss scale, so only linear changes are right. Not available under DeepSpeed, which
        partitions gradients: a trainer refuses a strategy that overrides this hook there.
        """

    def on_step_end(self, model: nn.Module, adapter: str) -> None:
        """After each optimizer step."""

    def on_task_end(self, model: nn.Module, adapter: str, examples: Examples) -> None:
        """After the last step of a task, before the adapter is finished."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What must survive a restart and cannot be rebuilt from the adapter stack; saved as safetensors with the task
        that has just ended."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of [`state_dict`]."""

    def checkpoint_state(self) -> dict[str, torch.Tensor]:
        """What changes from step to step within a task, beside the adapter: saved as safetensors in each checkpoint.

        Not available under DeepSpeed, which partitions parameters: a trainer refuses a strategy that overrides this
        hook there.
        """
        return {}

    def load_checkpoint_state(self, state: dict[str, torch.Tensor]) -> None:
        """The inverse of [`checkpoint_state`]: after `on_task_start` and the checkpoint's adapter, before the first
        step."""


def check_alone(name: str, others: list[Strategy], sharding: str, acts: str, because: str) -> None:
    """For `check_run` of a strategy that trains the factors in its own way: raise ValueError unless the others only
    change the training data, and each process has the whole factors and weights.

    acts: what it does with them ("replaces whole factors"). because: why others would be wrong ("they ...").
    """
    if acting := [strategy for strategy in others if strategy.hooks - {"training_data"}]:
        raise ValueError(f"only Replay goes with {name}, not {acting}: {because}")
    if sharding not in ("none", "ddp"):
        raise ValueError(f"{name} {acts}, which DeepSpeed and FSDP shard: train it with DDP")


def refuse_options(args: Any, names: tuple[str, ...], because: str) -> None:
    """For `check_run`: raise ValueError if one of these training arguments is not at its default (None, "default"; a
    trainer that is not our own may lack it). because: what it is or does, and why that is wrong."""
    for name in names:
        if (value := getattr(args, name, None)) not in (None, "default"):
            raise ValueError(f"{name}={value!r} {because}: leave it out")


def join_states(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The states of all strategies of a run in one dict, by their number in the list: "0.name"."""
    return {f"{n}.{key}": value.contiguous() for n, state in enumerate(states) for key, value in state.items()}


def state_of(number: int, states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of strategy `number` out of [`join_states`], copied: a file aligns tensors in another way than memory
    does, and products of them may round in another way."""
    prefix = f"{number}."
    return {key.removeprefix(prefix): value.clone() for key, value in states.items() if key.startswith(prefix)}
