"""Tasks of different kinds in one run: examples (SFT), then preferences (DPO), then a reward (GRPO).

Each task is trained by a trainer of its own (`Task(trainer_cls=..., args=...)`) and adds one update to the same stack.
All three are evaluated after each task by how often the right answer is likelier than a wrong one.

Without options it runs in a minute or two: a tiny Llama and three synthetic tasks. With a real model and your own rows
(JSON lines; `--sft_file`: prompt, completion; `--dpo_file`: prompt, chosen, rejected; `--grpo_file`: prompt, answer,
which a completion must begin with to be rewarded; those that are not given are left out):

    accelerate launch recipes/sft_dpo_cl.py --model Qwen/Qwen3-0.6B --sft_file answers.jsonl --dpo_file pairs.jsonl \\
        --learning_rate 2e-4 --dpo_learning_rate 1e-5 --output_dir runs/kinds
"""

import functools
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from demo_stream import TASKS, WORLD, demo_corpus, demo_examples, prompt  # the file beside this one
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig

from hf_jumplora import ContinualRun, ContinualSFTTrainer, Task, make_continual
from hf_jumplora.bench.tiny_llama import build_tiny_llama
from hf_jumplora.data.readers import read_rows
from hf_jumplora.options import MethodArguments, ModelArguments, parse_recipe, run_recipe


DEFAULTS = {
    "method": "jumplora", "learning_rate": 2e-3, "per_device_train_batch_size": 16, "max_length": 128,
    "logging_steps": 5, "save_strategy": "no", "report_to": "none", "output_dir": "runs/kinds", "num_train_epochs": 1,
    "bf16": False, "gradient_checkpointing": False,
}  # fmt: skip
SHARED = (
    "output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps",
    "logging_steps", "save_strategy", "report_to", "seed", "bf16", "gradient_checkpointing", "use_cpu", "disable_tqdm",
)  # fmt: skip


@dataclass
class KindArguments:
    """The tasks of each kind."""

    sft_file: str | None = field(default=None, metadata={"help": "Rows of prompt and completion."})
    dpo_file: str | None = field(default=None, metadata={"help": "Rows of prompt, chosen and rejected."})
    grpo_file: str | None = field(default=None, metadata={"help": "Rows of prompt and answer."})
    dpo_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the preferences."})
    grpo_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the reward."})
    num_generations: int = field(default=4, metadata={"help": "GRPO: answers to each prompt."})
    max_completion_length: int = field(default=4, metadata={"help": "GRPO: tokens of an answer."})
    tiny_steps: int = field(default=600, metadata={"help": "Pre-training steps of the tiny Llama."})
    demo_rows: int = field(default=640, metadata={"help": "Training rows of each synthetic task."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Where the tiny Llama is kept."})


def demo_rows(task: str, split: str, size: int) -> list[dict[str, str]]:
    """Rows of a synthetic task with everything that any kind of training takes."""
    rng, (kind, instruction) = random.Random(0), TASKS[task]
    labels, rows = list(WORLD[kind]), []
    for row in demo_examples(task, split, size):
        right, wrong = f" {row['label']}", f" {rng.choice([label for label in labels if label != row['label']])}"
        text = prompt(instruction, labels, row["sentence"])
        rows.append({"prompt": text, "completion": right, "chosen": right, "rejected": wrong, "answer": row["label"]})
    return rows


def begins_with_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """GRPO's reward: 1 for a completion that begins with the row's answer."""
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    return [float(text.strip().startswith(right)) for text, right in zip(texts, answer, strict=True)]


def make_tasks(kinds: KindArguments, args: SFTConfig) -> list[Task]:
    """The tasks, each with its trainer and arguments; SFT takes the run's own."""
    shared = {name: getattr(args, name) for name in SHARED}
    dpo = DPOConfig(**shared, learning_rate=kinds.dpo_learning_rate, max_length=args.max_length)
    grpo = GRPOConfig(
        **shared, learning_rate=kinds.grpo_learning_rate, num_generations=kinds.num_generations,
        max_completion_length=kinds.max_completion_length,
    )  # fmt: skip
    reward = functools.partial(make_continual(GRPOTrainer), reward_funcs=begins_with_answer)
    recipes: dict[str, tuple[str | None, str, list[str], dict[str, Any]]] = {
        "examples": (kinds.sft_file, "animals", ["prompt", "completion"], {}),
        "preferences": (
            kinds.dpo_file, "moods", ["prompt", "chosen", "rejected"],
            {"trainer_cls": make_continual(DPOTrainer), "args": dpo},
        ),
        "reward": (kinds.grpo_file, "foods", ["prompt", "answer"], {"trainer_cls": reward, "args": grpo}),
    }  # fmt: skip
    own = any(file for file, *_ in recipes.values())
    tasks = []
    for name, (file, demo, columns, trainer) in recipes.items():
        if own and file is None:
            continue
        rows = (
            read_rows(Path(file))
            if file
            else demo_rows(demo, "train", kinds.demo_rows // (2 if name == "reward" else 1))
        )
        if missing := [column for column in columns if column not in rows[0]]:
            raise ValueError(f"{file}: no column {missing[0]!r}, only {', '.join(rows[0])}")
        evaluated = None if own else Dataset.from_list(demo_rows(demo, "test", 64))
        data = Dataset.from_list([{column: row[column] for column in columns} for row in rows])
        tasks.append(Task(name, data, evaluated, metric="preference_accuracy", **trainer))
    return tasks


def main() -> None:
    classes = (ModelArguments, KindArguments, MethodArguments, SFTConfig)
    model, kinds, method, args = parse_recipe(classes, defaults=DEFAULTS)
    name = model.model_name_or_path
    if name is None and (kinds.sft_file or kinds.dpo_file or kinds.grpo_file):
        raise ValueError("files need --model: the tiny Llama knows the synthetic tasks alone")
    tasks = make_tasks(kinds, args)
    if name is None:
        name = str(build_tiny_llama(demo_corpus(), kinds.cache_dir, steps=kinds.tiny_steps))
    run = ContinualRun(
        AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype), tasks, method.method, args,
        AutoTokenizer.from_pretrained(name), trainer_cls=ContinualSFTTrainer, adapter_config=method.adapter_config(),
        strategies=method.strategies(),
    )  # fmt: skip
    run.train()


if __name__ == "__main__":
    run_recipe(main)
