"""EWC (arXiv 1612.00796), online (arXiv 1805.06370), on the parameters of one adapter."""

from dataclasses import dataclass, field

import torch

from .l2 import L2
from .moments import evaluation, sampled_log_likelihood


@dataclass
class Ewc(L2):
    """weight / 2 * sum over parameters of F (theta - theta_before)^2, theta as in [`L2`].

    F is the diagonal of the Fisher matrix, summed online over the tasks: F = decay * F_before + the mean over
    `examples` training examples of (d log p(label) / d theta)^2, with the label drawn from the model. theta_before
    are the latest parameters. State: F, one float per parameter, whatever the number of tasks.
    """

    requires = frozenset({"whole_model", "softmax"})

    weight: float = 1000.0
    decay: float = 1.0
    examples: int = 512
    F: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is between 0 and 1, got {self.decay}")
        if self.examples < 1:
            raise ValueError(f"examples must be positive, got {self.examples}")

    def importance(self, name):
        return self.F[name]

    def on_task_start(self, model, adapter, examples):
        super().on_task_start(model, adapter, examples)
        self.F = {name: self.F[name].to(p.device) for name, p in self.parameters(model, adapter) if name in self.F}

    def on_task_end(self, model, adapter, examples):
        parameters = dict(self.parameters(model, adapter))
        fisher = {name: torch.zeros_like(p) for name, p in parameters.items()}
        generator, count = torch.Generator().manual_seed(self.tasks), 0
        draw = lambda counts: torch.rand(sum(counts), generator=generator, dtype=torch.float32)  # noqa: E731
        with evaluation(model):
            for inputs in examples(self.examples):  # one at a time: the square is of each example's gradient
                likelihood = sampled_log_likelihood(model, inputs, model(**inputs)["logits"], draw)
                grads = torch.autograd.grad(likelihood, list(parameters.values()), allow_unused=True)
                for name, grad in zip(parameters, grads, strict=True):
                    if grad is not None:  # else its layer was not called
                        fisher[name] += grad.square()
                count += 1
        for name, total in fisher.items():
            self.F[name] = total / count + (self.decay * self.F[name] if name in self.F else 0)
        super().on_task_end(model, adapter, examples)

    def state_dict(self):
        return {**super().state_dict(), **self.F}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.F = {name: value for name, value in state.items() if name != "tasks"}
