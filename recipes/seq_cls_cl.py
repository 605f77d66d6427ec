"""Continual text classification with `AutoModelForSequenceClassification`: another set of labels in every task.

The head has a row for each label of all tasks: the embedding of the label's name in the base model (a random one where
their sizes differ). It is frozen and saved with the base, so that the updates of the tasks add up. A task is trained on
all labels and evaluated among its own.

Without options it runs in a minute or two: a tiny Llama and four synthetic tasks. With a real model and stream:

    accelerate launch recipes/seq_cls_cl.py --model FacebookAI/roberta-base --stream my_stream.yaml \\
        --target_modules query value --output_dir runs/seq_cls
"""

import dataclasses
import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from demo_stream import demo_corpus, write_demo_stream  # the file beside this one
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_jumplora import ContinualRun, ContinualTrainingArguments, Task
from hf_jumplora.bench.encoder import accuracy
from hf_jumplora.bench.folder import whole_folder
from hf_jumplora.bench.tiny_llama import build_tiny_llama
from hf_jumplora.options import MethodArguments, ModelArguments, StreamArguments, parse_recipe, run_recipe


DEFAULTS = {
    "learning_rate": 2e-3, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 100, "max_length": 64,
    "logging_steps": 10, "save_strategy": "no", "report_to": "none", "output_dir": "runs/seq_cls",
    "num_train_epochs": 1,
}  # fmt: skip
MADE_OF = "made_of.json"  # beside the base: what it was made of


@dataclass
class ClassifierArguments:
    """The classifier."""

    tiny_steps: int = field(default=600, metadata={"help": "Pre-training steps of the tiny Llama."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Where the tiny Llama and demo data are kept."})


def classification_tasks(texts: list[Any], tokenizer: Any, max_length: int) -> tuple[list[str], list[Task]]:
    """(the labels of all tasks, the tasks as token ids with the numbers of their labels)."""
    without = [task.name for task in texts if not getattr(task, "labels", None)]
    if without:
        raise ValueError(f"a classifier chooses among labels, and task {without[0]!r} has none")
    labels = list(dict.fromkeys(label for task in texts for label in task.labels))

    def rows(task: Any, examples: list[dict] | None) -> Dataset | None:
        if examples is None:
            return None
        encoded = tokenizer([row[task.text_column] for row in examples], truncation=True, max_length=max_length)
        return Dataset.from_dict({**encoded, "labels": [labels.index(row[task.label_column]) for row in examples]})

    return labels, [
        Task(
            task.name, rows(task, task.train_dataset), rows(task, task.eval_dataset),
            functools.partial(accuracy, [labels.index(label) for label in task.labels]),
            source=task.source, held_out=task.held_out,
        )
        for task in texts
    ]  # fmt: skip


def with_head(name: str, labels: list[str], folder: Path, seed: int, dtype: str) -> str:
    """The folder of the model with a head for these labels; made once, because a stack needs the same base again."""
    made_of = {"model": name, "labels": labels, "seed": seed, "dtype": dtype}
    if folder.is_dir():
        if (folder / MADE_OF).is_file() and json.loads((folder / MADE_OF).read_text()) != made_of:
            raise ValueError(f"{folder} was made of another model, seed, dtype or labels: use another --output_dir")
        return str(folder)
    with whole_folder(folder) as temporary:
        set_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == len(labels)]
        words = model.get_input_embeddings().weight
        if heads[-1].in_features == words.shape[1]:
            with torch.no_grad():
                for row, label in zip(heads[-1].weight, labels, strict=True):
                    row.copy_(words[tokenizer(" " + label, add_special_tokens=False).input_ids].mean(0))
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)
        (temporary / MADE_OF).write_text(json.dumps(made_of))
    return str(folder)


def main() -> None:
    classes = (ModelArguments, StreamArguments, ClassifierArguments, MethodArguments, ContinualTrainingArguments)
    model_args, stream, classifier, method, args = parse_recipe(classes, defaults=DEFAULTS)
    name = model_args.model_name_or_path
    # A head that nobody trained needs more than attention to turn towards it; other models: PEFT's names for them.
    targets = None if name else ["q_proj", "v_proj", "up_proj", "down_proj"]
    if stream.stream is None:
        path = write_demo_stream(Path(classifier.cache_dir) / "demo_stream")
        stream = dataclasses.replace(stream, stream=str(path))
        name = name or str(build_tiny_llama(demo_corpus(), classifier.cache_dir, steps=classifier.tiny_steps))
    if name is None:
        raise ValueError("--stream needs --model: a tiny Llama knows the synthetic text alone")
    tokenizer = AutoTokenizer.from_pretrained(name)
    labels, tasks = classification_tasks(stream.load(), tokenizer, args.max_length)
    base = with_head(name, labels, Path(args.output_dir) / "base", args.seed, model_args.dtype)
    run = ContinualRun(
        AutoModelForSequenceClassification.from_pretrained(base), tasks, method.method, args, tokenizer,
        adapter_config=method.adapter_config(targets), strategies=method.strategies(),
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    run.train()


if __name__ == "__main__":
    run_recipe(main)
