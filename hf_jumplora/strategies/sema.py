"""SEMA's growth (arXiv 2403.18886): a task whose prompts are like those of an earlier one gets no adapter."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file

from ..stack.manifest import read_manifest
from ..stack.router import prompt_features, prompt_reader
from ..stack.verify import state_file
from ..tuner import is_causal, named_layers
from ..tuner.lookup import adapter_config
from .base import Strategy, check_alone, state_of
from .moments import evaluation


logger = logging.getLogger(__name__)


@dataclass
class Sema(Strategy):
    """Each task that is trained leaves a descriptor of its prompts: the PCA of their features on the base without any
    task (see `prompt_features`), with mean and standard deviation of the errors of `examples` training rows. For a new
    task, z = (mean error of its rows - mean) / standard deviation of each descriptor. If every z is above `threshold`
    the task is new and trained as usual; otherwise it is not trained, its adapter is empty, and the adapter of the
    task with the smallest z serves it.

    threshold: 1 or 2 in the released configs. That code trains autoencoders, decides in each layer, and also grows
    where the errors are unusually small.
    """

    requires = frozenset({"forward"})

    threshold: float = 1.0
    directions: int = 16
    examples: int = 512
    reused: int | None = field(default=None, init=False, repr=False)
    descriptors: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, init=False, repr=False)
    found: dict[str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)  # of the task in training

    def __post_init__(self):
        if not math.isfinite(self.threshold) or self.directions < 1 or self.examples < 1:
            raise ValueError(
                f"Sema needs a finite threshold, directions >= 1 and examples >= 1, got threshold={self.threshold}, "
                f"directions={self.directions}, examples={self.examples}"
            )

    def check(self, mode, config):
        if config.gate or mode != "incremental":
            raise ValueError(
                "Sema leaves the adapter of a task empty that an earlier one serves, so it needs one adapter per task, "
                "without a gate, whose threshold is set in training: use an incremental method such as inclora"
            )

    def check_run(self, others, args, sharding):
        check_alone("Sema", others, sharding, "leaves whole adapters empty", "they plan for a task that is trained")

    @torch.no_grad()
    def on_task_start(self, model, adapter, examples):
        features = self._features(model, examples)
        self.found, self.reused = describe(features, self.directions), None
        if not self.descriptors:
            return
        z = torch.stack([z_scores(features, known).mean() for known in self.descriptors.values()])
        z = broadcast(z.to(next(model.parameters()).device)).tolist()  # all processes decide alike
        scores = dict(zip(self.descriptors, z, strict=True))
        nearest = min(scores, key=scores.__getitem__)
        says = ", ".join(f"{number}: {score:.2f}" for number, score in scores.items())
        if scores[nearest] > self.threshold:
            logger.info("a new kind of prompts: z of task number %s, above %g", says, self.threshold)
        else:
            self.reused = nearest
            logger.warning(
                "this task is not trained: task number %d, whose prompts are alike, serves it (z of task number %s; "
                "threshold %g)", nearest, says, self.threshold,
            )  # fmt: skip

    def _features(self, model: Any, examples: Any) -> torch.Tensor:
        """[rows, 2 hidden] of training rows, on the CPU."""
        reader, causal = prompt_reader(model.get_base_model()), is_causal(model)
        found = []
        with model.disable_adapter(), evaluation(model):
            for batch in examples(self.examples, batch=8):
                prompts = {**batch, "labels": batch.get("labels") if causal else None}
                found.append(prompt_features(reader, None, prompts).cpu())
        return torch.cat(found)

    def on_optimizer(self, optimizer):
        self.reused = None  # it is trained: a checkpoint says so, whatever another machine's rounding says

    def on_task_end(self, model, adapter, examples):
        config = adapter_config(model, adapter)
        if self.reused is None:
            self.descriptors[len(config.parent_adapters)] = self.found
            return
        for _, layer in named_layers(model, adapter):
            empty = torch.zeros(1, layer.in_features), torch.zeros(layer.out_features, 1)
            layer.replace_factors(adapter, config, *empty)

    def memory_bytes(self, layers, tasks):
        return 0  # descriptors are kept on the CPU

    def state_dict(self):
        return {f"{n}.{key}": value for n, known in self.descriptors.items() for key, value in known.items()}

    def load_state_dict(self, state):
        self.descriptors = {n: state_of(n, state) for n in sorted({int(key.split(".")[0]) for key in state})}


def describe(features: torch.Tensor, directions: int) -> dict[str, torch.Tensor]:
    """The descriptor of features [rows, d]: mean [d], basis [d, k], errors [2] with their mean and standard deviation.

    The errors are those of every second row; mean and basis are made of the others, whose errors would be smaller than
    those of new rows of the same task. k: at most half of these, so that an error is left.
    """
    fitted, rest = features[::2], features[1::2] if len(features) > 1 else features
    mean = fitted.mean(0)
    V = torch.linalg.svd(fitted - mean, full_matrices=False).Vh
    known = {"mean": mean, "basis": V[: min(directions, len(fitted) // 2)].T.contiguous()}
    found = errors(rest, known)
    spread = found.std(correction=min(1, len(found) - 1)).clamp_min(1e-9)  # of equal rows, rounding alone
    return {**known, "errors": torch.stack([found.mean(), spread])}


def errors(features: torch.Tensor, known: dict[str, torch.Tensor]) -> torch.Tensor:
    """||x - reconstruction of x||^2 of each row of features [rows, d]."""
    rest = features - known["mean"]
    return (rest - rest @ known["basis"] @ known["basis"].T).square().sum(1)


def z_scores(features: torch.Tensor, known: dict[str, torch.Tensor]) -> torch.Tensor:
    """(error - mean) / standard deviation of each row of features [rows, d]: how far it is off what is described."""
    mean, spread = known["errors"]
    return (errors(features, known) - mean) / spread


def mixture(stack: str | os.PathLike) -> Callable[[torch.Tensor], torch.Tensor]:
    """For `load_stack(stack, route=mixture(stack))`, stack a folder: on each prompt the tasks with a descriptor act
    with the weights softmax(-z), in place of all with weight 1.

    Raises:
        FileNotFoundError: no stack there. ValueError: it has no descriptors, or a file is damaged.
    """
    tasks, known = read_manifest(stack).tasks, Sema()
    path = state_file(Path(stack), tasks) if tasks else None
    state = load_file(path) if path else {}
    if {key.split(".")[-1] for key in state} != {"mean", "basis", "errors"}:
        raise ValueError(f"{stack} has no descriptors of its tasks: it was not trained with Sema")
    known.load_state_dict(state_of(int(next(iter(state)).split(".")[0]), state))

    def weights(features: torch.Tensor) -> torch.Tensor:
        z = torch.stack([z_scores(features.cpu(), one) for one in known.descriptors.values()], 1)
        chosen = torch.zeros(len(features), len(tasks))
        chosen[:, list(known.descriptors)] = (-z).softmax(1)
        return chosen.to(features.device)

    return weights
