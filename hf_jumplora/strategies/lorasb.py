"""LoRA-SB (arXiv 2411.19557): r x r numbers are trained, between the directions of full fine-tuning's first step."""

from dataclasses import dataclass

import torch

from ..tuner import named_layers
from .base import Strategy, check_alone, refuse_options
from .loraga import top_directions, weight_gradients


@dataclass
class LoraSB(Strategy):
    """The update is s B R A with a trained R [r, r]; A [r, in] and B [out, r] stay as they start: A = V^T, B = U,
    R = diag(S) / s, with U S V^T the first r directions of -eta * sign(G), the first step of full fine-tuning. G is the
    sum of the loss's gradients in a layer's weight over `examples` examples. Training starts with this step taken.

    eta: None takes the run's learning rate; the paper divides it by the number of warm-up steps. The finished adapter
    has B R in place of B: an ordinary one of rank r. No state: a restart computes the same start.
    """

    requires = frozenset({"whole_model", "forward"})

    eta: float | None = None
    examples: int = 50
    rate = 0.0  # the learning rate, from `check_run` on

    def __post_init__(self):
        if self.examples < 1 or (self.eta is not None and not self.eta > 0):
            raise ValueError(f"LoRA-SB needs eta > 0 and examples >= 1, got {self.eta} and {self.examples}")

    def check(self, mode, config):
        if config.gate or mode == "sequential":
            raise ValueError(
                "LoRA-SB starts each task in directions of its own, away from 0, without a gate and without the "
                "factors of the task before: use it through method='lora-sb'"
            )

    def check_run(self, others, args, sharding):
        because = "they act on A and B, which stay"
        check_alone("LoRA-SB", others, sharding, "takes gradients of whole weights", because)
        names = ("factor_optimizer", "loraplus_lr_ratio", "allora_eta")
        refuse_options(args, names, "is for A and B, and LoRA-SB trains neither")
        self.rate = args.learning_rate

    def on_task_start(self, model, adapter, examples):
        gradients = weight_gradients(model, adapter, examples(self.examples))
        eta = self.rate if self.eta is None else self.eta
        with torch.no_grad():
            for name, layer in named_layers(model, adapter):
                A, B = layer.jumplora_A[adapter], layer.jumplora_B[adapter]
                start = start_factors(gradients.pop(name), len(A), eta, layer.scaling[adapter])
                A.requires_grad_(False).copy_(start[0])
                B.requires_grad_(False).copy_(start[1])
                layer.gate_ranks(adapter, start[2])

    def memory_bytes(self, layers, tasks):
        """The gradients of the weights, before the first step."""
        return sum(4 * layer.out_features * layer.in_features for layer in layers)


def start_factors(
    G: torch.Tensor, r: int, eta: float, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(A [r, in], B [out, r], R [r, r]) with scaling * B R A the best of rank r for -eta * sign(G), G [out, in]."""
    U, S, Vh = top_directions(-eta * G.sign(), r)
    return Vh[:r], U[:, :r], (S[:r] / scaling).diag()
