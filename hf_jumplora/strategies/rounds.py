"""Several rounds in a task: falling ranks (LoRA-Squeeze, arXiv 2602.10993), residual boosting (Brainstacks, arXiv
2604.01152), and rounds that end where the loss does not fall any more (ScaleZero, arXiv 2509.07945)."""

import logging
import math
import zlib
from bisect import bisect
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import broadcast

from ..stack.export import cut_factors
from ..tuner import JumpLoraLayer, named_layers
from ..tuner.lookup import adapter_config
from .base import Strategy, check_alone, refuse_options
from .moments import evaluation
from .replay import some_rows


logger = logging.getLogger(__name__)


@dataclass
class Rounds(Strategy):
    """A task's steps are cut into `rounds` of one length, and each begins with a new state of the optimizer; the data
    and the schedule of the learning rate go on. The factors are wider than r while the task is trained.
    """

    requires = frozenset({"whole_model"})

    rounds: int = 2
    ranks: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # layer -> r
    optimizer: Any = field(default=None, init=False, repr=False)

    def __post_init__(self):
        if self.rounds < 1:
            raise ValueError(f"{type(self).__name__} needs rounds >= 1, got {self.rounds}")

    def width(self, r: int) -> int:
        """Of the factors in training."""
        raise NotImplementedError

    def round_ended(self, model: Any, adapter: str, number: int) -> None:
        """After the last step of round `number`, before the optimizer forgets."""
        raise NotImplementedError

    def round_of(self, step: int) -> int:
        """The round, from 0, of a step of the task, from 0."""
        return step * self.rounds // self.steps

    def check(self, mode, config):
        if config.gate or mode == "sequential":
            raise ValueError(
                f"{type(self).__name__} replaces a task's factors between its rounds, which neither a gate nor the "
                "adapter of the task before would survive: use an incremental method without a gate, such as inclora"
            )

    def check_run(self, others, args, sharding):
        name = type(self).__name__
        because = "they read or change factors that it replaces"
        check_alone(name, others, sharding, "replaces whole factors", because)
        refuse_options(args, ("factor_optimizer",), f"remembers factors that {name} replaces")

    @torch.no_grad()
    def on_task_start(self, model, adapter, examples):
        self.ranks, config = {}, adapter_config(model, adapter)
        for name, layer in named_layers(model, adapter):
            self.ranks[name] = r = len(layer.jumplora_A[adapter])
            width = min(self.width(r), layer.out_features, layer.in_features)
            generator = torch.Generator().manual_seed((self.seed << 32) + zlib.crc32(name.encode()))
            A = torch.empty(width, layer.in_features, dtype=torch.float32)
            A.uniform_(-1 / math.sqrt(layer.in_features), 1 / math.sqrt(layer.in_features), generator=generator)
            _replace(layer, adapter, config, A, torch.zeros(layer.out_features, width))

    def check_steps(self, steps: int) -> None:
        if steps < self.rounds:
            raise ValueError(f"a task of {steps} steps has no {self.rounds} rounds: train longer, or set rounds")

    def on_optimizer(self, optimizer):
        self.check_steps(self.steps)
        self.optimizer = optimizer

    @torch.no_grad()
    def on_step_end(self, model, adapter):
        done, number = self.step + 1, self.round_of(self.step)
        if self.round_of(done) == number:
            return
        self.round_ended(model, adapter, number)
        if done < self.steps:
            for _, layer in named_layers(model, adapter):
                for factor in (layer.jumplora_A[adapter], layer.jumplora_B[adapter]):
                    self.optimizer.state.pop(factor, None)

    def on_task_end(self, model, adapter, examples):
        self.optimizer = None

    def memory_bytes(self, layers, tasks):
        """What is wider than r, with gradients and two moments."""
        extra = [(min(self.width(s.r), s.out_features, s.in_features) - s.r, s) for s in layers]
        return sum(16 * ranks * (s.out_features + s.in_features) for ranks, s in extra)


def _replace(layer: JumpLoraLayer, adapter: str, config: Any, A: torch.Tensor, B: torch.Tensor) -> None:
    device = layer.jumplora_A[adapter].device
    with torch.random.fork_rng(devices=[]):  # what is drawn for new factors is not kept
        layer.replace_factors(adapter, config, A.to(device), B.to(device))


@dataclass
class Squeeze(Rounds):
    """Training starts at rank 2^(rounds - 1) r, and after each round B A becomes its best approximation of half the
    rank, balanced; the finished adapter has rank r. At the scaling of r throughout.

    The paper has stages of at least 200 steps. It does not say what becomes of the optimizer's state, nor of alpha.
    """

    rounds: int = 4

    def width(self, r):
        return r << (self.rounds - 1)

    def round_ended(self, model, adapter, number):
        for name, layer in named_layers(model, adapter):
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            left = max(self.ranks[name], min(self.width(self.ranks[name]) >> (number + 1), len(A)))
            if not B.any():  # nothing learned yet: with A at 0 too there would be no gradient any more
                A[left:] = 0
                continue
            small_A, small_B, _ = cut_factors(A, B, left)
            for factor, small in ((A, small_A), (B, small_B)):
                factor.zero_()  # both factors of a rank at 0: it gets no gradient
                factor[tuple(slice(size) for size in small.shape)].copy_(small)

    @torch.no_grad()
    def on_task_end(self, model, adapter, examples):
        super().on_task_end(model, adapter, examples)
        config = adapter_config(model, adapter)
        for name, layer in named_layers(model, adapter):  # early stopping may have come before the last round
            A, B, _ = cut_factors(layer.jumplora_A[adapter], layer.jumplora_B[adapter], self.ranks[name])
            _replace(layer, adapter, config, A, B)


@dataclass
class Boost(Rounds):
    """Each round trains r ranks more on what the ranks before, which are frozen, leave over. A fraction `held_out` of
    the task's rows is not trained on: a round after the first that does not lower the loss on them by `gain` is taken
    back, and nothing is trained any more. The finished adapter has the ranks of the rounds that are left.

    gain: of Brainstacks, which has patience and the best of several snapshots as well.
    """

    gain: float = 0.002
    held_out: float = 0.1
    rows: Any = field(default=None, init=False, repr=False)
    examples: Any = field(default=None, init=False, repr=False)
    losses: list[float] = field(default_factory=list, init=False, repr=False)  # on the held-out rows, after each round
    stopped: bool = field(default=False, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(
                f"{type(self).__name__} needs held_out, a fraction of the rows, between 0 and 1, got {self.held_out}"
            )

    def width(self, r):
        return self.rounds * r

    def check_run(self, others, args, sharding):
        super().check_run(others, args, sharding)
        if args.weight_decay:
            raise ValueError(
                f"{type(self).__name__} freezes the ranks of earlier rounds, and weight_decay would shrink them: set "
                "it to 0"
            )

    def training_data(self, dataset, index, earlier):
        if not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{type(self).__name__} holds rows out, and this task is a stream: give it as a data set with a length"
            )
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed + index)).tolist()
        size = math.ceil(self.held_out * len(order))
        if size == len(order):
            raise ValueError(
                f"{type(self).__name__} holds {size} of a task's {size} rows out: none is left to train on"
            )
        self.rows = some_rows(dataset, order[:size])
        return some_rows(dataset, sorted(order[size:]))

    def on_task_start(self, model, adapter, examples):
        if self.rows is None:
            raise ValueError(f"{type(self).__name__} holds rows out of a run's tasks: train it by a ContinualRun")
        try:
            next(examples(1, self.rows))
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{type(self).__name__} measures held-out rows with the model, and this trainer's rows are not what it "
                f"takes (TRL's trainers encode theirs later): use it with a plain Trainer ({error})"
            ) from error
        super().on_task_start(model, adapter, examples)
        self.examples, self.losses, self.stopped = examples, [], False

    def on_gradients(self, model, adapter):
        for name, layer in named_layers(model, adapter):
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            trained = torch.zeros(len(A), 1, device=A.device)
            if not self.stopped:
                trained[self._ranks(name, self.round_of(self.step))] = 1
            for grad, mask in ((A.grad, trained), (B.grad, trained.T)):
                if grad is not None:
                    grad.mul_(mask)

    def _ranks(self, layer: str, number: int) -> slice:
        return slice(number * self.ranks[layer], (number + 1) * self.ranks[layer])

    def held_out_loss(self, model: Any) -> float:
        """Of the model as it is, the same in all processes."""
        with evaluation(model):
            batches = list(self.examples(len(self.rows), self.rows, 8))
            found = torch.stack([len(next(iter(batch.values()))) * model(**batch)["loss"].float() for batch in batches])
        return float(broadcast(found.sum() / len(self.rows)))

    def round_ended(self, model, adapter, number):
        if not self.stopped:
            self._keep_or_stop(model, adapter, number, self.held_out_loss(model))

    def _keep_or_stop(self, model: Any, adapter: str, number: int, loss: float) -> None:
        self.losses.append(loss)
        logger.info("round %d: loss %.4f on the held-out rows", number + 1, self.losses[-1])
        if number and not self.losses[-2] - self.losses[-1] >= self.gain:
            self.stopped = True
            for name, layer in named_layers(model, adapter):
                layer.jumplora_B[adapter][:, self._ranks(name, number)] = 0

    @torch.no_grad()
    def on_task_end(self, model, adapter, examples):
        super().on_task_end(model, adapter, examples)
        number = self.round_of(self.step)
        if not self.stopped and len(self.losses) <= number < self.rounds:  # early stopping came in mid-round
            self._keep_or_stop(model, adapter, number, self.held_out_loss(model))
        config, kept = adapter_config(model, adapter), max(1, len(self.losses) - self.stopped)
        for name, layer in named_layers(model, adapter):
            ranks = slice(kept * self.ranks[name])
            A, B = layer.jumplora_A[adapter][ranks].clone(), layer.jumplora_B[adapter][:, ranks].clone()
            _replace(layer, adapter, config, A, B)
        self.examples = None

    def checkpoint_state(self):
        return {"losses": torch.tensor(self.losses, dtype=torch.float64), "stopped": torch.tensor([self.stopped])}

    def load_checkpoint_state(self, state):
        self.losses, self.stopped = state["losses"].tolist(), bool(state["stopped"])


@dataclass
class Dps(Boost):
    """Boosting in which a round ends where the loss on the held-out rows falls no more, or where its share of the steps
    is over: those that are left, divided by the rounds that are left. The loss is measured `looks` times in a share; a
    round other than the last ends when it has fallen by less than `gain` since it was last measured.

    ScaleZero's dynamic parameter scaling ends a stage when enough of its games are solved (as many as are unsolved,
    divided by the stages left), or after so many iterations; its scales of earlier stages, which go on being trained,
    are left out. It has four stages with adapters.
    """

    rounds: int = 4
    looks: int = 4
    ends: list[int] = field(default_factory=list, init=False, repr=False)  # steps done at the end of each round
    last: float = field(default=math.inf, init=False, repr=False)  # the newest held-out loss

    def __post_init__(self):
        super().__post_init__()
        if self.looks < 1:
            raise ValueError(f"Dps needs looks >= 1, got {self.looks}")

    def round_of(self, step):
        return bisect(self.ends, step)

    def round_ended(self, model, adapter, number):
        self._keep_or_stop(model, adapter, number, self.last)

    def on_task_start(self, model, adapter, examples):
        super().on_task_start(model, adapter, examples)
        self.ends, self.last = [], math.inf

    @torch.no_grad()
    def on_step_end(self, model, adapter):
        start, left = (self.ends or [0])[-1], self.rounds - len(self.ends)
        share, done = quota(self.steps - start, left), self.step + 1 - start
        over, look = done == share, left > 1 and done % max(1, share // self.looks) == 0
        if not self.stopped and (over or look):
            before, self.last = self.last, self.held_out_loss(model)
            if over or before - self.last < self.gain:
                self.ends.append(self.step + 1)
        super().on_step_end(model, adapter)

    def checkpoint_state(self):
        now = {"ends": torch.tensor(self.ends), "last": torch.tensor([self.last], dtype=torch.float64)}
        return {**super().checkpoint_state(), **now}

    def load_checkpoint_state(self, state):
        super().load_checkpoint_state(state)
        self.ends, self.last = state["ends"].tolist(), float(state["last"])


def quota(left: int, rounds: int) -> int:
    """How many of what is left the next of so many rounds takes."""
    return math.ceil(left / rounds)
