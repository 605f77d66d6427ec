"""Continued pre-training on one domain of plain text after another (rsLoRA, perplexity matrix).

Without options it runs in a minute or two: a tiny Llama, and three synthetic domains with a held-out one. With a real
model and the shipped domains (reviews, law, medicine, code; WikiText is held out), or a stream of your own:

    accelerate launch recipes/cpt_cl.py --model meta-llama/Llama-3.2-1B --dtype bfloat16 --bf16 True \\
        --stream domains --output_dir runs/cpt

The matrix of a run holds token accuracy; its perplexities are printed at the end, and the cross-entropies they come
from stand in report.html.
"""

import math
import random
from dataclasses import dataclass, field
from typing import Any

from demo_stream import OTHER_SENTENCES, SENTENCES, demo_corpus, draw  # the file beside this one
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_jumplora import ContinualRun, ContinualTrainingArguments, LanguageModelTask
from hf_jumplora.bench.tiny_llama import build_tiny_llama
from hf_jumplora.options import MethodArguments, ModelArguments, StreamArguments, parse_recipe, run_recipe


DEFAULTS = {
    "r": 16, "target_modules": ["all-linear"], "learning_rate": 1e-3, "per_device_train_batch_size": 8,
    "max_length": 128, "logging_steps": 10, "save_strategy": "no", "report_to": "none", "output_dir": "runs/cpt",
    "num_train_epochs": 1,
}  # fmt: skip


@dataclass
class TextArguments:
    """Continued pre-training."""

    use_rslora: bool = field(default=True, metadata={"help": "scaling = lora_alpha / sqrt(r)."})
    tiny_steps: int = field(default=150, metadata={"help": "Pre-training steps of the tiny Llama."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Where the tiny Llama is kept."})


def demo_domains(size: int = 600) -> tuple[list[str], list[LanguageModelTask]]:
    """(text to pre-train on, tasks): three kinds of synthetic text that share their words, and a held-out fourth."""
    rng, corpus = random.Random(0), demo_corpus(size=8 * size)
    domains = {
        "diary": [draw(rng, SENTENCES)[0] for _ in range(size)],
        "glossary": [text for text in corpus if text.startswith("The word")][:size],
        "quiz": [text for text in corpus if text.startswith("Task Instruction")][:size],
    }
    tasks = [
        LanguageModelTask(name, [{"text": t} for t in texts[40:]], [{"text": t} for t in texts[:40]])
        for name, texts in domains.items()
    ]
    other = [draw(rng, OTHER_SENTENCES)[0] for _ in range(size)]
    return other, [*tasks, LanguageModelTask("notes", None, [{"text": t} for t in other[:40]], held_out=True)]


def perplexities(metrics: dict[str, Any]) -> str:
    """The perplexity of every domain before training and after each task, as a table: exp of the cross-entropy."""
    names = [key for key in metrics["general"][-1] if key.endswith(" cross_entropy")]
    stages = ["before training", *(info["name"] for info in metrics["trained"])]
    head = f"{'trained on':<16}" + "".join(f"{name.split()[0]:>14}" for name in names)
    rows = [
        f"{stage:<16}" + "".join(f"{math.exp(row[name]):>14.2f}" if name in row else f"{'-':>14}" for name in names)
        for stage, row in zip(stages, metrics["general"], strict=True)
    ]
    return "\n".join(["", "perplexity", head, *rows])


def main() -> None:
    classes = (ModelArguments, StreamArguments, TextArguments, MethodArguments, ContinualTrainingArguments)
    model, stream, text, method, args = parse_recipe(classes, defaults=DEFAULTS)
    config = method.adapter_config()
    config.use_rslora = text.use_rslora
    if stream.stream is not None:
        tasks, name = stream.load(), model.model_name_or_path
        if name is None:
            raise ValueError("--stream needs --model: the tiny one knows the synthetic text alone")
    else:
        corpus, tasks = demo_domains()
        name = model.model_name_or_path or build_tiny_llama(corpus, text.cache_dir, layers=2, steps=text.tiny_steps)
    run = ContinualRun(
        AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype), tasks, method.method, args,
        AutoTokenizer.from_pretrained(name), adapter_config=config, strategies=method.strategies(),
    )  # fmt: skip
    print(perplexities(run.train().metrics))


if __name__ == "__main__":
    run_recipe(main)
