"""I-LoRA (arXiv 2402.18865): a fast adapter learns, a slow one follows, and replay holds the two together."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .l2 import L2
from .moments import evaluation
from .replay import Replay, joined, some_rows


@dataclass
class ILora(Replay):
    """The fast adapter theta = (A, B) is trained on the task's and the replayed examples (see [`Replay`]) with

        loss + weight * mean over entries of (h(x; theta) - h(x; theta_slow))^2,

    x a batch of replayed examples as large as the step's own, h all hidden states [tokens, width] of tokens that are no
    padding (of a decoder: those that have a label), both without dropout. After each step

        theta_slow = decay * theta_slow + (1 - decay) * theta.

    The slow adapter is the model: it is what is evaluated and stored after a task; the fast one continues where it was.
    In the first task there is nothing to replay. For a run that trains one adapter sequentially (method `ilora`).

    decay, weight, reservoir: of the released code. At decay 0.25 the slow adapter is hardly a step behind the fast one.
    State: theta, the same size whatever the number of tasks; in a checkpoint theta_slow.
    """

    requires = frozenset({"whole_model"})
    tuning = ("weight", (1.0, 10.0, 0.1, 100.0, 0.01))

    reservoir: int | None = 500
    decay: float = 0.25
    weight: float = 1.0
    tasks: int = field(default=0, init=False, repr=False)
    draws: int = field(default=0, init=False, repr=False)
    rows: Any = field(default=None, init=False, repr=False)
    examples: Any = field(default=None, init=False, repr=False)
    fast: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    slow: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is between 0 and 1, got {self.decay}")
        if self.weight < 0:
            raise ValueError(f"the weight of ILora's penalty must not be negative, got {self.weight}")

    def check(self, mode, config):
        if config.gate or mode != "sequential":
            raise ValueError(
                "I-LoRA averages the factors of one LoRA that is trained sequentially, without a gate: use it through "
                "method='ilora', or seqlora with this strategy"
            )

    def training_data(self, dataset, index, earlier):
        replayed = self.replayed(earlier)
        self.rows = joined(replayed) if replayed else None
        return joined([dataset, *replayed])

    @torch.no_grad()
    def on_task_start(self, model, adapter, examples):
        self.examples, self.draws = examples, 0
        for name, p in L2.parameters(model, adapter):
            self.slow[name] = p.detach().clone()
            if self.tasks:
                p.copy_(self.fast[name])

    def penalty(self, model, inputs, adapter, output):
        if not self.weight or self.rows is None:
            return None
        batch = self._draw(next(len(v) for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim))
        with evaluation(model):
            with torch.no_grad(), self._slow_adapter(model, adapter):
                slow = hidden_states(model, batch)
            fast = hidden_states(model, batch)
        squares = [(f - s).square().sum() for f, s in zip(fast, slow, strict=True)]
        return self.weight * torch.stack(squares).sum() / sum(f.numel() for f in fast)

    def _draw(self, size: int) -> dict[str, Any]:
        """A batch of replayed examples: a function of seed, task and the number of draws before."""
        count = min(size, len(self.rows))
        chosen = random.Random(f"{self.seed} {self.tasks} {self.draws}").sample(range(len(self.rows)), count)
        self.draws += 1
        return next(self.examples(count, some_rows(self.rows, chosen), count))

    @contextmanager
    def _slow_adapter(self, model: nn.Module, adapter: str) -> Iterator[None]:
        """Inside, the model is the one with the slow adapter."""
        parameters = dict(L2.parameters(model, adapter))
        fast = {name: p.data for name, p in parameters.items()}
        try:
            for name, p in parameters.items():
                p.data = self.slow[name]
            yield
        finally:
            for name, p in parameters.items():
                p.data = fast[name]

    @torch.no_grad()
    def on_step_end(self, model, adapter):
        for name, p in L2.parameters(model, adapter):
            self.slow[name].lerp_(p, 1 - self.decay)

    @torch.no_grad()
    def on_task_end(self, model, adapter, examples):
        self.tasks += 1
        for name, p in L2.parameters(model, adapter):
            self.fast[name] = p.detach().cpu().clone()
            p.copy_(self.slow[name])

    def state_dict(self):
        return {"tasks": torch.tensor(self.tasks), **self.fast}

    def load_state_dict(self, state):
        self.fast = dict(state)
        self.tasks = int(self.fast.pop("tasks"))

    def checkpoint_state(self):
        return {"draws": torch.tensor(self.draws), **self.slow}

    def load_checkpoint_state(self, state):
        self.draws = int(state["draws"])
        self.slow = {name: state[name].to(p.device) for name, p in self.slow.items()}


def hidden_states(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Every hidden state, [tokens, width] in float32, of the tokens that count: no padding; in a decoder with an
    encoder those that have a label. Raises ValueError for a model that returns none."""
    output = model(**inputs, output_hidden_states=True)
    mask = inputs.get("attention_mask")
    sides = [("hidden_states", mask), ("encoder_hidden_states", mask)]
    if "decoder_hidden_states" in output:
        sides.append(("decoder_hidden_states", inputs["labels"] != -100))
    states = [
        (state if keep is None else state[keep.bool()]).float()
        for side, keep in sides
        for state in output.get(side) or ()
    ]
    if not states:
        raise ValueError("I-LoRA compares hidden states, and this model returns none with output_hidden_states=True")
    return states
