"""Chat data, one task after another: TRL's SFTTrainer under ContinualRun.

Without options it runs in a minute or two: a tiny Llama and four synthetic tasks as chats, with the loss on the
assistant's words alone. With a real model, and a file for each task (JSON lines of {"messages"}, whose last one is the
assistant's, or of {"prompt", "completion"}); a task is called as its file, and its last rows are for evaluation:

    accelerate launch recipes/sft_cl.py --model Qwen/Qwen3-0.6B --files tickets.jsonl invoices.jsonl \\
        --assistant_only_loss True --packing True --learning_rate 2e-4 --output_dir runs/sft

`{"prompt", "completion"}` rows are trained on the completion alone (`--completion_only_loss`). All options of
`SFTConfig` are options here. The matrix holds the accuracy of the tokens that the loss is on.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from demo_stream import TASKS, WORLD, demo_corpus, demo_examples, prompt  # the file beside this one
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from hf_jumplora import ContinualRun, ContinualSFTTrainer, Task
from hf_jumplora.bench.tiny_llama import build_tiny_llama
from hf_jumplora.data.readers import read_rows
from hf_jumplora.options import MethodArguments, ModelArguments, parse_recipe, run_recipe


DEFAULTS = {
    "learning_rate": 2e-3, "per_device_train_batch_size": 16, "max_length": 128, "logging_steps": 10,
    "save_strategy": "no", "report_to": "none", "output_dir": "runs/sft", "num_train_epochs": 1, "bf16": False,
    "gradient_checkpointing": False,
}  # fmt: skip
# A prompt, and the answer behind it; what the assistant says is marked, so that the loss can be on it alone.
CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{% if message.role == 'assistant' %}"
    " {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)


@dataclass
class ChatArguments:
    """The tasks."""

    files: list[str] | None = field(
        default=None, metadata={"help": "A file for each task, in order; None: synthetic chats."}
    )
    eval_share: float = field(
        default=0.1, metadata={"help": "This share of a file's rows, its last ones, is for evaluation."}
    )
    tiny_steps: int = field(default=600, metadata={"help": "Pre-training steps of the tiny Llama."})
    demo_rows: int = field(default=640, metadata={"help": "Training rows of each synthetic task."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Where the tiny Llama is kept."})


def demo_chats(rows: int) -> dict[str, tuple[list[dict], list[dict]]]:
    """{task: (rows to train on, rows to evaluate)} of the synthetic tasks as chats."""

    def chat(task: str, row: dict[str, str]) -> dict[str, Any]:
        kind, instruction = TASKS[task]
        question = prompt(instruction, list(WORLD[kind]), row["sentence"])
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": row["label"]}]}

    return {
        task: tuple(
            [chat(task, row) for row in demo_examples(task, split, size)]
            for split, size in (("train", rows), ("test", max(8, rows // 10)))
        )
        for task in TASKS
    }


def file_chats(files: list[str], share: float) -> dict[str, tuple[list[dict], list[dict]]]:
    """{name of the file: (rows to train on, rows to evaluate)}."""
    chats = {}
    for file in map(Path, files):
        rows = read_rows(file)
        count = max(1, round(share * len(rows)))
        if len(rows) < 2 or (not {"messages"} <= rows[0].keys() and not {"prompt", "completion"} <= rows[0].keys()):
            raise ValueError(f"{file}: expected two rows or more with 'messages', or with 'prompt' and 'completion'")
        chats[file.stem] = (rows[:-count], rows[-count:])
    return chats


def main() -> None:
    classes = (ModelArguments, ChatArguments, MethodArguments, SFTConfig)
    model, chat, method, args = parse_recipe(classes, defaults=DEFAULTS)
    name = model.model_name_or_path
    if chat.files and name is None:
        raise ValueError("--files needs --model: the tiny Llama knows the synthetic tasks alone")
    if name is None:
        name = str(build_tiny_llama(demo_corpus(), chat.cache_dir, steps=chat.tiny_steps))
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    if not chat.files:
        args.assistant_only_loss = True
    chats = file_chats(chat.files, chat.eval_share) if chat.files else demo_chats(chat.demo_rows)
    tasks = [
        Task(task, Dataset.from_list(train), Dataset.from_list(evaluated), metric="mean_token_accuracy")
        for task, (train, evaluated) in chats.items()
    ]
    run = ContinualRun(
        AutoModelForCausalLM.from_pretrained(name, dtype=model.dtype), tasks, method.method, args, tokenizer,
        trainer_cls=ContinualSFTTrainer, adapter_config=method.adapter_config(), strategies=method.strategies(),
    )  # fmt: skip
    run.train()


if __name__ == "__main__":
    run_recipe(main)
