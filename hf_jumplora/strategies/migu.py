"""MIGU (arXiv 2406.17245): update only the rows whose outputs are large on the current batch."""

from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate.utils import reduce
from torch.utils.hooks import RemovableHandle

from ..tuner import JumpLoraLayer, named_layers
from .base import Strategy


@dataclass
class Migu(Strategy):
    """From the second task on: gradient of row i *= 1[n_i > quantile(n, threshold)], n_i = mean over tokens of |h_i|.

    h is the output of the matrix: A x [r] for A, and for B [out] that of the whole layer (an option of the released
    code; B's own output is zero at the start, and nothing would ever be updated). The paper divides n by its sum, which
    changes no mask. Sums over micro-batches, means over processes; padding counts, as in the released code. Adam goes
    on moving a masked row by its momentum.

    threshold: fraction of the rows that stay as they are. Published value: not known to us (a command line option of
    the released scripts without a default).
    """

    tuning = ("threshold", (0.7, 0.5, 0.9, 0.3, 0.95))

    threshold: float = 0.7
    tasks: int = field(default=0, init=False, repr=False)
    handles: list[RemovableHandle] = field(default_factory=list, init=False, repr=False)
    magnitude: dict[str, list[torch.Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.threshold < 1:
            raise ValueError(f"MIGU's threshold is a fraction of the rows in [0, 1), got {self.threshold}")

    def on_task_start(self, model, adapter, examples):
        self.magnitude = {}
        if self.tasks:  # the first task has nothing to protect
            self.handles = [
                layer.register_forward_hook(partial(self._observe, adapter))
                for _, layer in named_layers(model, adapter)
            ]

    @torch.no_grad()
    def _observe(self, adapter: str, layer: JumpLoraLayer, args: tuple, output: torch.Tensor) -> None:
        if not layer.training:
            return
        A = layer.jumplora_A[adapter]
        hidden = torch.nn.functional.linear(args[0].to(A.dtype), A)
        seen = [h.detach().abs().float().flatten(0, -2).mean(0) for h in (hidden, output)]
        before = self.magnitude.get(layer.layer_name, [torch.zeros_like(n) for n in seen])
        self.magnitude[layer.layer_name] = [a + b for a, b in zip(before, seen, strict=True)]

    def on_gradients(self, model, adapter):
        if not self.tasks:
            return
        for name, layer in named_layers(model, adapter):
            for weight, seen in zip((layer.jumplora_A, layer.jumplora_B), self.magnitude.get(name, ()), strict=False):
                n = reduce(seen, "mean")
                if weight[adapter].grad is not None:
                    weight[adapter].grad *= (n > n.quantile(self.threshold))[:, None]
        self.magnitude = {}

    def on_task_end(self, model, adapter, examples):
        for handle in self.handles:
            handle.remove()
        self.handles, self.tasks = [], self.tasks + 1

    def reset(self):
        for handle in self.handles:  # of a task that was interrupted
            handle.remove()
        super().reset()

    def state_dict(self):
        return {"tasks": torch.tensor(self.tasks)}

    def load_state_dict(self, state):
        self.tasks = int(state["tasks"])
