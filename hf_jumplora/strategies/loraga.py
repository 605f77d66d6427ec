"""LoRA-GA (arXiv 2407.05000): start where the first step is the largest part of the whole weight's gradient."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ..tuner import named_layers
from ..tuner.lookup import adapter_config
from .base import Strategy, check_alone
from .moments import evaluation


class Offset(nn.Module):
    """A base layer less a constant update: base(x) - B A x, A [r, in], B [out, r]; neither is in a checkpoint."""

    A: torch.Tensor
    B: torch.Tensor

    def __init__(self, base_layer: nn.Module, A: torch.Tensor, B: torch.Tensor):
        super().__init__()
        self.base_layer = base_layer
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., out] for x [..., in]."""
        y = self.base_layer(x, *args, **kwargs)
        return y - F.linear(F.linear(x.to(self.A.dtype), self.A), self.B).to(y.dtype)


@dataclass
class LoraGA(Strategy):
    """A task starts at A_0 = f V[:, :r]^T and B_0 = f U[:, r:2r], with U S V^T = G [out, in] the mean gradient of the
    loss in a layer's weight over `examples` training examples, and f = out^(1/4) / gamma^(1/2). So the first step of
    gradient descent changes the weight along the best approximation of G of rank 2 r.

    The paper takes s B_0 A_0 out of the weight. Here the base stays as it is: it is taken from the layer's output while
    the task is trained, and the finished adapter is [B, -B_0] [A; A_0], an ordinary one of rank 2 r.

    No state: a restart computes the same start. gamma, examples: of the paper's runs (the released default is 16).
    """

    requires = frozenset({"whole_model", "forward"})
    tuning = ("gamma", (64.0, 16.0, 256.0))

    gamma: float = 64.0
    examples: int = 128
    offsets: dict[str, Offset] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if not self.gamma > 0 or self.examples < 1:
            raise ValueError(f"LoRA-GA needs gamma > 0 and examples >= 1, got {self.gamma} and {self.examples}")

    def check(self, mode, config):
        if config.gate or mode == "sequential":
            raise ValueError(
                "LoRA-GA starts each task's factors away from 0, without a gate and without those of the task before: "
                "use it through method='lora-ga'"
            )

    def check_run(self, others, args, sharding):
        because = "they take s B A for the update, which is less here"
        check_alone("LoRA-GA", others, sharding, "takes gradients of whole weights", because)

    def on_task_start(self, model, adapter, examples):
        gradients = weight_gradients(model, adapter, examples(self.examples))
        self.offsets = {}
        with torch.no_grad():
            for name, layer in named_layers(model, adapter):
                A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
                if 2 * len(A) > min(layer.out_features, layer.in_features):
                    raise ValueError(
                        f"LoRA-GA takes 2 r = {2 * len(A)} directions of the gradient of {name}, which is "
                        f"{layer.out_features} x {layer.in_features}: lower r"
                    )
                start_A, start_B = gradient_factors(gradients.pop(name), len(A), self.gamma)
                A.copy_(start_A)
                B.copy_(start_B)
                self.offsets[name] = Offset(layer.base_layer, start_A, layer.scaling[adapter] * start_B)
                layer.base_layer = self.offsets[name]

    @torch.no_grad()
    def on_task_end(self, model, adapter, examples):
        config = adapter_config(model, adapter)
        for name, layer in named_layers(model, adapter):
            offset = self.offsets.pop(name)
            layer.base_layer = offset.base_layer
            A = torch.cat([layer.jumplora_A[adapter], offset.A])
            B = torch.cat([layer.jumplora_B[adapter], -offset.B / layer.scaling[adapter]], 1)
            layer.replace_factors(adapter, config, A, B)

    def memory_bytes(self, layers, tasks):
        """The gradients of the weights, before the first step."""
        return sum(4 * layer.out_features * layer.in_features for layer in layers)


def weight_gradients(model: nn.Module, adapter: str, batches: Iterable[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """{layer: float32 [out, in]}: the mean over batches of dL/dW, L the model's own loss, with W frozen as it is."""
    sums: dict[str, torch.Tensor] = {}
    seen: list[tuple[str, torch.Tensor, Any]] = []  # of the batch at work: layer, its input, its output in the graph

    def hook(name, layer, args, output):
        seen.append((name, args[0].detach(), get_gradient_edge(output)))

    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in named_layers(model, adapter)]
    count = 0
    try:
        with evaluation(model), torch.enable_grad():
            for batch in batches:
                loss, count = model(**batch).get("loss"), count + 1
                if loss is None:
                    raise ValueError(
                        "the start takes the gradient of the model's own loss, and it has none: give labels"
                    )
                grads = torch.autograd.grad(loss, [edge for _, _, edge in seen], allow_unused=True)
                for (name, x, _), g in zip(seen, grads, strict=True):
                    if g is not None:
                        product = g.flatten(0, -2).float().T @ x.flatten(0, -2).float()
                        sums[name] = sums[name].add_(product) if name in sums else product
                seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name, _ in named_layers(model, adapter) if name not in sums]:
        raise ValueError(f"the loss of no example depends on layer {missing[0]}: leave it out of target_modules")
    return {name: total / count for name, total in sums.items()}


def gradient_factors(G: torch.Tensor, r: int, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(A_0 [r, in], B_0 [out, r]) of a gradient [out, in]."""
    U, _, Vh = top_directions(G, 2 * r)
    scale = len(G) ** 0.25 / gamma**0.5
    return scale * Vh[:r], scale * U[:, r : 2 * r]


def top_directions(G: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(U [out, k], S [k], V^T [k, in]) of a matrix, k >= count; of a large one by a randomised SVD of fixed seed."""
    if min(G.shape) <= 512:
        return torch.linalg.svd(G, full_matrices=False)
    with torch.random.fork_rng([G.device] if G.is_cuda else []):
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(G, q=min(2 * count, *G.shape), niter=4)
    return U, S, V.T
