"""Kronecker-factored Laplace (arXiv 1805.07810): stay where the earlier tasks' answers do not depend on the weights."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..ops.quadratic import stacked_penalty
from ..tuner import named_layers
from ..tuner.sharded_parameters import full_shape
from .base import Strategy
from .moments import by_shape, check_examples, joined_roots, kronecker_factors, layer_penalty


@dataclass(frozen=True)
class RootGroup:
    """The roots of layers of one shape, rank, scaling and device: G [layers, out, k] and C [layers, in, k]."""

    names: list[str]
    G: torch.Tensor
    C: torch.Tensor

    def penalty(self, layers: dict[str, Any], adapter: str) -> torch.Tensor:
        """Sum over the layers of ||G^T dW C||^2, dW the update of `adapter` as it acts now."""
        own = [layers[name] for name in self.names]
        A, B = (
            torch.stack([part[adapter] for part in parts])
            for parts in zip(*((layer.jumplora_A, layer.jumplora_B) for layer in own), strict=True)
        )
        options = {}
        if adapter in own[0].jumplora_gate:
            gates = [layer.gate(adapter) for layer in own]
            options = {"log_tau": torch.cat([g.log_tau for g in gates]), "mix": torch.cat([g.mix for g in gates])}
        return stacked_penalty(A, B, self.G, self.C, scaling=own[0].scaling[adapter], **options)


def _root_groups(layers: dict[str, Any], adapter: str, G: dict[str, torch.Tensor], C: dict[str, torch.Tensor]):
    """[`RootGroup`]s of all layers that have roots, [1, out, k] and [1, in, k] each; k padded to the widest."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        if name in G:
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            sizes = G[name].shape[-1], C[name].shape[-1]
            groups[(full_shape(A), full_shape(B), layer.scaling[adapter], A.device, sizes)].append(name)
    for (*_, sizes), names in groups.items():
        k = max(sizes)
        yield RootGroup(
            names, *(F.pad(torch.cat([t[n] for n in names]), (0, k - t[names[0]].shape[-1])) for t in (G, C))
        )


@dataclass
class KFac(Strategy):
    """weight * sum over layers and earlier tasks of tr(G dW C dW^T) (Ritter et al., arXiv 1805.07810, eq. 9 and 10).

    dW [out, in] is the new adapter's scaled update as it acts now (with a gate: the interpolated one, whose threshold
    gets no gradient). C [in, in] and G [out, out] are the factors of the layer's Fisher matrix over `examples` training
    examples at the end of each task: C = mean over tokens of x x^T, x the layer's input; G = mean over examples of the
    sum over their tokens of g g^T, g the gradient of log p(label) at the layer's output, with a label drawn from the
    model.

    memory: "per_task" keeps both for every task (exact; grows by in^2 + out^2 floats per layer and task). "sum" keeps
    the sum of G and the mean of C (the same where the tasks' C are alike; does not grow). A number k keeps the k
    largest eigenvectors of that sum and mean, nearly: k * (in + out) floats per layer, and nothing larger than 4 k + 8
    columns is ever built.
    general: texts (causal models), or rows as the trainer takes them, of no task: the zeroth task, which keeps what the
    base model knows. True: the run's own general text. Give the same ones when a run is restarted.
    """

    requires = frozenset({"forward", "softmax"})
    tuning = ("weight", (10.0, 50.0, 250.0, 2.0, 0.5))

    weight: float = 10.0
    memory: str | int = "per_task"
    examples: int = 512
    general: Any = field(default=None, repr=False)
    tasks: int = field(default=0, init=False, repr=False)
    G: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    C: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    groups: list["RootGroup"] = field(default_factory=list, init=False, repr=False)  # made of G and C for one task

    def __post_init__(self):
        if self.weight < 0:
            raise ValueError(f"the weight of the kfac penalty must not be negative, got {self.weight}")
        if self.memory not in ("per_task", "sum") and not (isinstance(self.memory, int) and self.memory > 0):
            raise ValueError(f"memory is 'per_task', 'sum' or a positive number of eigenvectors, got {self.memory!r}")
        check_examples(self.examples, self.general)

    @property
    def _rank(self) -> int | None:
        return None if isinstance(self.memory, str) else self.memory

    def check(self, mode, config):
        if mode != "incremental":
            raise ValueError(
                "kfac penalises the update of the new task's own adapter; with one adapter trained on "
                "(mode 'sequential') that is the whole of all tasks: use an incremental method, such as kfac"
            )

    def on_task_start(self, model, adapter, examples):
        if self.general is not None and not self.tasks:
            self._remember(model, adapter, examples(self.examples, self.general))
        layers = dict(named_layers(model, adapter))
        moved: dict[tuple, torch.Tensor] = {}  # layers that share an input share C
        for name in sorted(self.G.keys() & layers.keys()):
            device = layers[name].jumplora_A[adapter].device
            for part in (self.G, self.C):
                part[name] = moved.setdefault((id(part[name]), device), part[name].to(device))
        closed = any(adapter in layer.jumplora_free for layer in layers.values())  # hard isolation
        self.groups = [] if self._rank is None or closed else list(_root_groups(layers, adapter, self.G, self.C))

    def on_task_end(self, model, adapter, examples):
        self._remember(model, adapter, examples(self.examples))

    def penalty(self, model, inputs, adapter, output):
        if not self.tasks:
            return None
        layers = dict(named_layers(model, adapter))
        if self.groups:
            return self.weight * sum(group.penalty(layers, adapter) for group in self.groups)
        terms = {name: list(zip(self.G[name], self.C[name], strict=True)) for name in self.G.keys() & layers.keys()}
        roots = self._rank is not None
        return self.weight * sum(layer_penalty(layers[name], adapter, terms[name], roots) for name in sorted(terms))

    def _remember(self, model, adapter, examples) -> None:
        G, C = kronecker_factors(model, adapter, examples, self.tasks, rank=self._rank)
        keep = self.tasks / (self.tasks + 1)
        self.G, self.C = self._join(self.G, G, 1.0, 1.0), self._join(self.C, C, keep, 1 - keep)
        self.tasks += 1

    def _join(self, old: dict, new: dict, keep: float, add: float) -> dict[str, torch.Tensor]:
        """[tasks, d, d]; for "sum" [1, d, d]; for k eigenvectors roots: [d, k] of the new task joined to [1, d, k]."""
        both = {name: old[name] for name in new if name in old}
        fresh = {name: value for name, value in new.items() if name not in old}

        def join(before: torch.Tensor, now: torch.Tensor, rank: int) -> torch.Tensor:  # [layers, tasks, d, n]
            if self.memory == "per_task":
                return torch.cat([before, now[:, None]], 1)
            if self.memory == "sum":
                return keep * before + add * now[:, None]
            return joined_roots(keep**0.5 * before[:, 0], add**0.5 * now, rank)[:, None]

        joined = by_shape(join, self._rank or 0, both, {name: new[name] for name in both}) if both else {}
        joined |= by_shape(lambda now, rank: now[:, None], 0, fresh) if fresh else {}
        return old | joined

    def memory_bytes(self, layers, tasks):
        """Both factors of each layer, for each finished task, for their sum, or as roots (and a stacked copy of
        these, padded to the wider one)."""
        shapes = [(layer.out_features, layer.in_features) for layer in layers] if tasks else []
        if self._rank is None:
            return sum(4 * (m * m + n * n) for m, n in shapes) * (tasks if self.memory == "per_task" else 1)
        columns = [(m, n, min(self._rank, m), min(self._rank, n)) for m, n in shapes]
        return sum(4 * (m * k + n * j + (m + n) * max(k, j)) for m, n, k, j in columns)

    def workspace_bytes(self, layers, tasks):
        """With a gate D, the slope, E C and the sum are there at once, whole, in the largest layer."""
        gated = [layer.out_features * layer.in_features for layer in layers if layer.gate]
        return 16 * max(gated, default=0) if tasks else 0

    def state_dict(self):
        """C of layers that share an input stands under the first one's name; of the others, that name's number."""
        names, first = sorted(self.C), dict[int, int]()
        state = {f"G.{name}": value for name, value in self.G.items()} | {"tasks": torch.tensor(self.tasks)}
        for number, name in enumerate(names):
            owner = first.setdefault(id(self.C[name]), number)
            state[f"C.{name}" if owner == number else f"C_of.{name}"] = (
                self.C[name] if owner == number else torch.tensor(owner)
            )
        return state

    def load_state_dict(self, state):
        self.tasks = int(state["tasks"])
        self.G, self.C = ({k[2:]: v for k, v in state.items() if k.startswith(part)} for part in ("G.", "C."))
        shared = {key.removeprefix("C_of."): int(value) for key, value in state.items() if key.startswith("C_of.")}
        names = sorted([*self.C, *shared])
        self.C |= {name: self.C[names[owner]] for name, owner in shared.items()}
