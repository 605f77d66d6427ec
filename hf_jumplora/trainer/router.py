"""Training the router of a finished stack: which tasks help on which prompt (Brainstacks, arXiv 2604.01152)."""

import dataclasses
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from ..data import Encoder, LanguageModelTask, Task, TextTask, collate, row_count
from ..stack.load import attach, load_base, open_stack
from ..stack.router import Router, check_routed, prompt_features, prompt_reader, write_router
from ..strategies.replay import some_rows
from ..tuner import is_causal
from ..tuner.task_weights import weight_tasks


def train_router(
    path: str | os.PathLike,
    tasks: list[Task],
    base_model: Any = None,
    processing_class: Any = None,
    data_collator: Any = None,
    *,
    examples: int = 200,
    batch_size: int = 8,
    max_length: int = 512,
    **model_kwargs: Any,
) -> dict[str, dict[str, float]]:
    """Train a router on training rows of a stack's tasks and put it into the stack, for `load_stack(route="learned")`.

    For each row the tasks that lower its loss are found ([`helpful_tasks`]); a linear layer learns to tell them from
    the prompt. Cost: about 2 * tasks passes over tasks * examples rows, no backward pass.

    Args:
        path: a folder with a stack of an incremental method, or of `perlora`. tasks: all of the stack, by name, with
            their training rows. base_model, model_kwargs: as `load_stack`.
        processing_class: the tokenizer; None takes the base's. data_collator: of rows that are no text tasks'.
        examples: rows of each task, drawn at random (the same ones every time). max_length: of a text task's rows.

    Returns:
        {task: {"base", "stack", "routed": mean loss of its rows without any task, with all, and by the router;
        "tasks": how many act on a row on average}}.

    Raises:
        FileNotFoundError: no stack there. ValueError: tasks are missing or others, or the stack cannot be routed.
    """
    folder, manifest, chosen = open_stack(path)
    check_routed(manifest, str(folder))
    by_name = {task.name: task for task in tasks if not task.held_out or task.name in manifest.task_names}
    if by_name.keys() != set(manifest.task_names):
        raise ValueError(
            f"the router of {folder} is trained on all its tasks, {', '.join(manifest.task_names)}; got rows of "
            f"{', '.join(by_name) or 'none'}"
        )
    base = load_base(manifest, base_model, str(folder), **model_kwargs)
    if processing_class is None:
        processing_class = AutoTokenizer.from_pretrained(base.name_or_path)
    seq2seq = bool(getattr(base.config, "is_encoder_decoder", False))
    max_length = min(max_length, getattr(base.config, "max_position_embeddings", None) or max_length)
    encoder = Encoder(processing_class, max_length, seq2seq)
    batches: list[dict[str, Any]] = []
    owners: list[int] = []
    for number, name in enumerate(manifest.task_names):
        rows = _rows(by_name[name], encoder, examples)
        text = isinstance(by_name[name], (TextTask, LanguageModelTask))
        merge = data_collator if data_collator and not text else collate(processing_class)
        for start in range(0, len(rows), batch_size):
            batch = dict(merge(rows[start : start + batch_size]))
            if {"input_ids", "labels"} - batch.keys():
                raise ValueError(f"task {name!r}: a router needs rows with input_ids and labels, not {sorted(batch)}")
            batches.append(batch)
            owners += [number] * len(batch["input_ids"])
    model: Any = attach(base, folder, chosen, separate=True)
    owner = torch.tensor(owners)
    try:
        router, measured = _learn(model, batches, owner, chosen)
    finally:
        model.unload()  # the base may be the caller's
    write_router(folder, router)
    return {
        name: {kind: float(value[owner == k].mean()) for kind, value in measured.items()}
        for k, name in enumerate(manifest.task_names)
    }


def _learn(
    model: Any, batches: list[dict[str, Any]], owner: torch.Tensor, chosen: list[dict[str, Any]]
) -> tuple[Router, dict[str, torch.Tensor]]:
    """The router of these rows, and what [`train_router`] measures of each [rows]; owner: the task's number."""
    device, base = next(model.parameters()).device, model.get_base_model()
    batches = [{key: value.to(device) for key, value in batch.items()} for batch in batches]
    folders = [task["folder"] for task in chosen]
    weights, reader, causal = weight_tasks(model, folders), prompt_reader(base), is_causal(base)
    read = [{**batch, "labels": batch["labels"] if causal else None} for batch in batches]
    features = torch.cat([prompt_features(reader, weights, batch) for batch in read]).cpu()

    @torch.no_grad()
    def losses(weight: torch.Tensor) -> torch.Tensor:
        found, first = [], 0
        for batch in batches:
            weights.set(weight[first : first + len(batch["input_ids"])].to(device))
            first += len(batch["input_ids"])
            found.append(row_losses(model(**batch), batch["labels"], causal).cpu())
        return torch.cat(found)

    weight, bias = fit(features, targets(helpful_tasks(losses, len(owner), len(folders)), owner))
    hashes = {task["name"]: task["files"]["adapter_model.safetensors"] for task in chosen}
    router = Router(hashes, weight, bias)
    acting = router(features)
    kinds = {"base": torch.zeros_like(acting), "stack": torch.ones_like(acting), "routed": acting}
    measured = {kind: losses(value) for kind, value in kinds.items()} | {"tasks": (acting > 0).sum(1).float()}
    return router, measured


def _rows(task: Any, encoder: Encoder, examples: int) -> list[Any]:
    """Training rows of a task, as its collator takes them."""
    data = task.train_dataset
    if data is None:
        raise ValueError(f"task {task.name!r} has no training rows, from which a router could learn")
    if row_count(data) is None:
        data = list(itertools.islice(data, examples))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:examples].tolist()
    data = some_rows(data, order)
    if isinstance(task, (TextTask, LanguageModelTask)):
        data = encoder.train_rows(dataclasses.replace(task, train_dataset=data))
    return [data[i] for i in range(len(data))]


def row_losses(output: Any, labels: torch.Tensor, causal: bool) -> torch.Tensor:
    """Cross-entropy of each row's answer [rows], the mean over its tokens.

    Raises:
        ValueError: the labels are not those of a softmax.
    """
    logits = output["logits"].float()
    if logits.ndim - labels.ndim != 1 or labels.is_floating_point():
        raise ValueError("a router compares the cross-entropy of answers, and these labels are no classes or tokens")
    if logits.ndim == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return loss.sum(1) / (labels != -100).sum(1).clamp_min(1)


def helpful_tasks(
    losses: Callable[[torch.Tensor], torch.Tensor], rows: int, tasks: int, gain: float = 0.01
) -> torch.Tensor:
    """Which tasks help on each row: bool [rows, tasks].

    The best single task if its loss is below the base's; then each other one, in the order of its own loss, that lowers
    the loss by more than `gain`. losses: of all rows [rows], with weights [rows, tasks].
    """
    now, none = losses(torch.zeros(rows, tasks)), torch.zeros(rows, tasks, dtype=torch.bool)
    single = torch.stack([losses(one.expand(rows, -1)) for one in torch.eye(tasks)], 1)
    found = none
    for place in range(tasks):
        tried = found.clone()
        tried[torch.arange(rows), single.argsort(1)[:, place]] = True
        loss = single.min(1).values if place == 0 else losses(tried.float())
        better = loss < now if place == 0 else (now - loss > gain) & found.any(1)
        found, now = torch.where(better[:, None], tried, found), torch.where(better, loss, now)
    return found


def targets(helpful: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """[rows, tasks]: 0.8 for a task that helps on a row, and 0.2 for the one whose row it is."""
    return 0.8 * helpful.float() + 0.2 * F.one_hot(owner, helpful.shape[1])


def router_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy + 0.05 * mean max(0, 0.3 - |p - 0.5|), which keeps p off 0.5."""
    undecided = (0.3 - (logits.sigmoid() - 0.5).abs()).clamp_min(0).mean()
    return F.binary_cross_entropy_with_logits(logits, target) + 0.05 * undecided


def fit(features: torch.Tensor, target: torch.Tensor, steps: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [tasks, features] and bias [tasks] of the linear router: AdamW on all rows at once, from 0."""
    mean, spread = features.mean(0), features.std(0).clamp_min(1e-6)
    inputs = (features - mean) / spread
    weight = torch.zeros(target.shape[1], features.shape[1], requires_grad=True)
    bias = torch.zeros(target.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=0.01, weight_decay=0.01)
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            router_loss(inputs @ weight.T + bias, target).backward()
            optimizer.step()
    weight = (weight / spread).detach()
    return weight, (bias - weight @ mean).detach()
