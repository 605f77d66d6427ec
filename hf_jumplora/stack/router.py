"""The router of a stack: which of its tasks act on a prompt, told from what the base model makes of the prompt.

After Brainstacks (arXiv 2604.01152), with one linear layer in place of its attention: p = sigmoid(W h + b), h = the
means over the prompt's tokens of the middle and of the last hidden states of the base without any task, each of norm 1.
Tasks with p below `FLOOR` do not act; the others act with weight p.
"""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..disk import next_path, sealed_path, sync_folder
from ..schema import short
from ..tuner import named_layers
from ..tuner.rank_routing import refuse_competing
from ..tuner.task_weights import TaskWeights, weight_tasks
from .manifest import ROUTER, Manifest, read_manifest, write_manifest


FLOOR = 0.12
_PROMPT = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass
class Router:
    """tasks: name -> sha256 of its adapter_model.safetensors, in order. weight [tasks, 2 hidden], bias [tasks]."""

    tasks: dict[str, str]
    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """Weights [rows, tasks], 0 or `FLOOR` to 1, from features [rows, 2 hidden]. ValueError: of another base."""
        if features.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"this router reads {self.weight.shape[1]} numbers of a prompt, and this base gives {features.shape[1]}"
            )
        p = (features @ self.weight.to(features.device).T + self.bias.to(features.device)).sigmoid()
        return p * (p >= FLOOR)

    def only(self, tasks: list[dict[str, Any]], where: str) -> "Router":
        """For these tasks of a stack (entries of stack.json) alone, in their order.

        Raises:
            ValueError: it was trained without one of them, or with another task of this name.
        """
        names = list(self.tasks)
        for task in tasks:
            if self.tasks.get(task["name"]) != task["files"]["adapter_model.safetensors"]:
                other = "another" if task["name"] in self.tasks else "no"
                raise ValueError(
                    f"{where}: its router was trained for {', '.join(names)} and knows {other} task {task['name']!r}: "
                    "train it again (`hf-jumplora router`)"
                )
        index = [names.index(task["name"]) for task in tasks]
        return Router({names[i]: self.tasks[names[i]] for i in index}, self.weight[index], self.bias[index])


def write_router(folder: str | os.PathLike, router: Router) -> None:
    """Put a router into a stack, or in place of the one there: it and stack.json change together.

    Raises:
        ValueError: it is for other tasks than the stack's.
    """
    folder, manifest = Path(folder), read_manifest(folder)
    router = router.only(manifest.tasks, str(folder))
    waiting = next_path(folder, ROUTER)
    tensors = {"weight": router.weight.contiguous(), "bias": router.bias.contiguous()}
    save_file(tensors, waiting, metadata={"format": "pt", "tasks": json.dumps(router.tasks)})
    sync_folder(folder)
    write_manifest(folder, manifest)


def read_router(folder: Path, manifest: Manifest) -> Router:
    """The router of a stack, as stack.json lists it.

    Raises:
        ValueError: there is none, it is damaged, or no router.
    """
    if ROUTER not in manifest.files:
        raise ValueError(
            f"{folder} has no router: train one with `hf-jumplora router`, or load the stack without route= (--route)"
        )
    path = sealed_path(folder, ROUTER)
    try:
        with safe_open(path, "pt") as file:
            tasks = json.loads((file.metadata() or {}).get("tasks", "null"))
            router = Router(tasks, file.get_tensor("weight"), file.get_tensor("bias"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{folder / ROUTER} is no router: {short(str(error))}") from error
    texts = isinstance(tasks, dict) and all(isinstance(value, str) for value in tasks.values())
    parts = [router.weight, router.bias]
    if not texts or [*map(len, parts)] != [len(tasks)] * 2 or [part.ndim for part in parts] != [2, 1]:
        raise ValueError(f"{folder / ROUTER} is no router: it needs tasks, weight [tasks, features] and bias [tasks]")
    if not all(part.dtype == torch.float32 and part.isfinite().all() for part in parts):
        raise ValueError(f"{folder / ROUTER} is no router: its numbers are not all finite float32")
    return router


def prompt_reader(base: Any) -> nn.Module:
    """The part of a base model that reads a whole prompt at once and returns its hidden states."""
    if getattr(base.config, "is_encoder_decoder", False):
        return base.get_encoder()
    return getattr(base, "base_model", base)


@torch.no_grad()
def prompt_features(reader: nn.Module, weights: TaskWeights | None, inputs: dict[str, Any]) -> torch.Tensor:
    """What the router looks at: float32 [rows, 2 hidden] of a batch with `input_ids`, on the base without any task.

    weights: of the tasks of this model; None where they are switched off. Where a causal batch has `labels`, the tokens
    with one are no part of the prompt.
    """
    ids, mask, labels = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("labels")
    if ids is None or (mask is not None and mask.ndim != 2):
        raise ValueError("a prompt is told from its tokens: call the model with input_ids and a mask [rows, tokens]")
    mask = torch.ones_like(ids) if mask is None else mask
    if weights is not None:
        weights.set(torch.zeros(len(ids), len(weights.adapters)))
    given = {key: inputs[key] for key in _PROMPT if inputs.get(key) is not None}
    states = reader.forward(**given, output_hidden_states=True)["hidden_states"]  # not a call: past the hook
    if labels is not None and labels.shape == ids.shape:
        prompt = mask * (labels == -100)
        mask = torch.where(prompt.any(1, keepdim=True), prompt, mask)  # plain text has no prompt
    share = (mask / mask.sum(1, keepdim=True))[..., None].float()
    return torch.cat(
        [F.normalize((part.float() * share).sum(1), dim=-1) for part in (states[len(states) // 2], states[-1])], 1
    )


def route_prompts(model: PeftModel, adapters: list[str], choose: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make the unmerged tasks of a model act on each prompt with the weights [rows, tasks] that `choose` gives its
    features. What goes on from a cache keeps the weights of the prompt.

    Raises:
        ValueError: a task has weights trained in full, which act on all prompts or none.
    """
    for name in adapters:
        config = model.peft_config[name]
        if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
            raise ValueError(f"{name} has weights trained in full, which cannot be routed: load it without route=")
        refuse_competing(getattr(config, "rank_routing", None), "a router of tasks")
    weights, reader = weight_tasks(model, adapters), prompt_reader(model.get_base_model())
    signature = inspect.signature(reader.forward)

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if all(layer.task_weights is not weights for _, layer in named_layers(model)):  # unloaded, or routed anew
            handle.remove()
            return
        inputs = signature.bind(*args, **kwargs).arguments
        inputs |= inputs.pop("kwargs", {})
        past = inputs.get("past_key_values", inputs.get("cache"))  # as it is called from transformers 5.24 on
        if past is None or past.get_seq_length() == 0:
            features = prompt_features(reader, weights, inputs)
            chosen = choose(features)
            if chosen.shape != (len(features), len(adapters)) or not chosen.isfinite().all():
                raise ValueError(
                    f"route gives weights of shape {[*chosen.shape]}: it must give finite ones for {len(features)} "
                    f"prompts and {len(adapters)} tasks"
                )
            weights.set(chosen)

    handle = reader.register_forward_pre_hook(before, with_kwargs=True)


def check_routed(manifest: Manifest, where: str) -> None:
    """Raise ValueError unless the tasks of a stack are updates that can act one by one."""
    if not (manifest.additive or manifest.separate):
        raise ValueError(
            f"{where} was trained by {manifest.method!r}: each of its folders holds the whole model after a task, so "
            "there are no tasks to route to; use an incremental method, or perlora"
        )
    refuse_competing(manifest.competing, "a router of tasks")
