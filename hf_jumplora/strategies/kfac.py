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
from .moments import check_examples, kronecker_factors, layer_penalty


@dataclass(frozen=True)
class Stack:
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


def _stacks(layers: dict[str, Any], adapter: str, G: dict[str, torch.Tensor], C: dict[str, torch.Tensor]):
    """[`Stack`]s of the roots of all layers that have some, [1, out, k] and [1, in, k] each; k padded to the widest."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        if name in G:
            A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
            sizes = G[name].shape[-1], C[name].shape[-1]
            groups[(full_shape(A), full_shape(B), layer.scaling[adapter], A.device, sizes)].append(name)
    for (*_, sizes), names in groups.items():
        k = max(sizes)
        yield Stack(names, *(F.pad(torch.cat([t[n] for n in names]), (0, k - t[names[0]].shape[-1])) for t in (G, C)))


@dataclass
class KFac(Strategy):
    """weight * sum over layers and earlier tasks of tr(G dW C dW^T) (Ritter et al., arXiv 1805.07810, eq. 9 and 10).

    dW [out, in] is the new adapter's scaled update as it acts now (with a gate: the interpolated one, whose threshold
    gets no gradient). C [in, in] and G [out, out] are the factors of the layer's Fisher matrix over `examples` training
    examples at the end of each task: C = mean over tokens of x x^T, x the layer's input; G = mean over examples of the
    sum over their tokens of g g^T, g the gradient of log p(label) at the layer's output, with a label drawn from the
    model.

    memory: "per_task" keeps both for every task (exact; grows by in^2 + out^2 floats a layer and task). "sum" keeps the
    sum of G and the mean of C (the same where the tasks' C are alike; does not grow). A number k keeps the k largest
    eigenvectors of that sum and mean, nearly: k * (in + out) floats a layer, and nothing larger than 4 k + 8 columns is
    ever built.
    general: texts (causal models), or rows as the trainer takes them, of no task: the zeroth task, which keeps what the
    base model knows. True: the run's own general text. Give the same ones when a run is restarted.
    """

    runs_model = True

    weight: float = 10.0
    memory: str | int = "per_task"
    examples: int = 512
    general: Any = field(default=None, repr=False)
    tasks: int = field(default=0, init=False, repr=False)
    G: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    C: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)
    stacks: list["Stack"] = field(default_factory=list, init=False, repr=False)  # made of G and C for one task

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
        for name in self.G.keys() & layers.keys():
            device = layers[name].jumplora_A[adapter].device
            self.G[name], self.C[name] = self.G[name].to(device), self.C[name].to(device)
        closed = any(adapter in layer.jumplora_free for layer in layers.values())  # hard isolation
        self.stacks = [] if self._rank is None or closed else list(_stacks(layers, adapter, self.G, self.C))

    def on_task_end(self, model, adapter, examples):
        self._remember(model, adapter, examples(self.examples))

    def penalty(self, model, inputs, adapter, output):
        if not self.tasks:
            return None
        layers = dict(named_layers(model, adapter))
        if self.stacks:
            return self.weight * sum(stack.penalty(layers, adapter) for stack in self.stacks)
        terms = {name: list(zip(self.G[name], self.C[name], strict=True)) for name in self.G.keys() & layers.keys()}
        roots = self._rank is not None
        return self.weight * sum(layer_penalty(layers[name], adapter, terms[name], roots) for name in sorted(terms))

    def _remember(self, model, adapter, examples) -> None:
        generator = torch.Generator().manual_seed(self.tasks)
        G, C = kronecker_factors(model, adapter, examples, generator, rank=self._rank)
        keep = self.tasks / (self.tasks + 1)
        for name in G:
            self.G[name] = self._join(self.G.get(name), G[name], 1.0, 1.0)
            self.C[name] = self._join(self.C.get(name), C[name], keep, 1 - keep)
        self.tasks += 1

    def _join(self, old: torch.Tensor | None, new: torch.Tensor, keep: float, add: float) -> torch.Tensor:
        """[tasks, d, d]; for "sum" [1, d, d]; for k eigenvectors roots: [d, k] of the new task joined to [1, d, k]."""
        if old is None:
            return new[None]
        if self.memory == "per_task":
            return torch.cat([old, new[None]])
        if self.memory == "sum":
            return keep * old + add * new[None]
        U, sigma, _ = torch.linalg.svd(torch.cat([keep**0.5 * old[0], add**0.5 * new], 1), full_matrices=False)
        return (U * sigma)[None, :, : self._rank].contiguous()

    def state_dict(self):
        state = {f"G.{name}": value for name, value in self.G.items()} | {
            f"C.{name}": value for name, value in self.C.items()
        }
        return {**state, "tasks": torch.tensor(self.tasks)}

    def load_state_dict(self, state):
        self.tasks = int(state["tasks"])
        self.G, self.C = ({k[2:]: v for k, v in state.items() if k.startswith(part)} for part in ("G.", "C."))
