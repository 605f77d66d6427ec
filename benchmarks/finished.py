"""What squeezing, forgetting and a router do to a finished stack, in the bench's setting `encoder` with budget small.

    python benchmarks/finished.py --data_dir CL_BENCHMARK --output_dir runs/finished --method inclora

Trains order 1 (or goes on with what is there) and prints a Markdown table: bytes of the tasks' weights, accuracy on
every task and their average, for the stack, for lower ranks of it, and with a task that forgets a class; with
`--router` for the stack, and with the tasks that its router, trained on 100 rows of each, chooses.
"""

import argparse
from pathlib import Path

from datasets import concatenate_datasets
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from hf_jumplora import ContinualRun, ContinualTrainingArguments, Task, load_stack, train_router
from hf_jumplora.bench.data import bench_tasks
from hf_jumplora.bench.encoder import default_encoder, encoder_setting
from hf_jumplora.bench.protocol import BUDGETS
from hf_jumplora.methods import get_method
from hf_jumplora.stack.squeeze import squeeze
from hf_jumplora.strategies import Unlearn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="Folder in the layout of the CL benchmark (SC/, TC/, ...).")
    parser.add_argument("--output_dir", required=True, type=Path)
    parser.add_argument("--method", default="inclora")
    parser.add_argument("--strategy", nargs="+", help="Options of the method's strategy, such as sora.weight=10.")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 2])
    parser.add_argument(
        "--forget", type=int, default=1, help="Which label of the last task is forgotten, by its number."
    )
    parser.add_argument("--no_forgetting", action="store_true", help="The stack and its lower ranks alone.")
    parser.add_argument("--router", action="store_true", help="The router alone; for perlora too.")
    args = parser.parse_args()
    budget, tokenizer = BUDGETS["small"], AutoTokenizer.from_pretrained(default_encoder())
    texts = bench_tasks("order1", args.data_dir, None, budget, tune=False)

    def setting():
        encoder = AutoModel.from_pretrained(default_encoder())
        return encoder_setting(encoder, tokenizer, texts, max_length=budget.max_length)

    tasks = setting()[1]
    number = sorted({label for text in texts for label in text.labels}).index(texts[-1].labels[args.forget])
    arguments = {
        "max_steps": budget.steps, "per_device_train_batch_size": budget.batch, "per_device_eval_batch_size": 64,
        "learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "eval_tasks": "seen", "seed": 0,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip

    def is_forgotten(row: dict) -> bool:
        return row["labels"] == number

    def run(folder: Path, stream: list[Task], method: str = args.method) -> ContinualRun:
        config = get_method(method).adapter_config({"target_modules": ["query", "value"]})
        return ContinualRun(
            setting()[0], stream, method, ContinualTrainingArguments(str(folder), **arguments), tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer), adapter_config=config,
            strategies=args.strategy if method == args.method else None,
        )  # fmt: skip

    whole = args.output_dir / "whole"
    trained = run(whole, tasks)
    trained.train()
    rest, gone = (
        Task(name, tasks[-1].train_dataset, tasks[-1].eval_dataset.filter(keep), tasks[-1].compute_metrics)
        for name, keep in (("rest", lambda row: not is_forgotten(row)), ("gone", is_forgotten))
    )
    names = [*(task.name for task in tasks), "last without it", "the forgotten class"]
    print("| stack | bytes | " + " | ".join(names) + " | AA |")
    print("| --- " * (len(names) + 3) + "|")

    def show(label: str, folder: Path, route: str | None = None) -> None:
        task_id = args.method == "perlora" and route is None  # given: each task is scored with its own adapter
        model = trained.model if task_id else load_stack(folder, setting()[0], route=route)
        scorer = run(args.output_dir / "none", [*tasks, rest, gone], args.method if task_id else "inclora")
        scores = [100 * score for score in scorer.evaluator.row(model)[0]]
        size = sum(file.stat().st_size for file in folder.glob("task_*/adapter_model.safetensors"))
        average = sum(scores[: len(tasks)]) / len(tasks)
        print(
            f"| {label} | {size} | " + " | ".join(f"{score:.1f}" for score in scores) + f" | {average:.1f} |",
            flush=True,
        )

    show("whole", whole)
    if args.router:
        merge = DataCollatorWithPadding(tokenizer)
        for name, row in train_router(whole, tasks, setting()[0], tokenizer, merge, examples=100).items():
            print(f"<!-- {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()) + " -->")
        show("routed", whole, "learned")
        return
    for rank in args.ranks:
        smaller = args.output_dir / f"rank-{rank}"
        if not smaller.exists():
            squeeze(whole, smaller, rank=rank, force=True)
        show(f"rank {rank}", smaller)
    if args.no_forgetting:
        return
    kept = concatenate_datasets([task.train_dataset.filter(lambda row: not is_forgotten(row)) for task in tasks])
    forget = Unlearn(tasks[-1].train_dataset.filter(is_forgotten))
    more = args.output_dir / "forgetful"
    ContinualRun.from_stack(
        whole, [Task("forget", kept, strategies=[forget])], more, base_model=setting()[0], processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    ).train()  # fmt: skip
    show("with a task that forgets", more)


if __name__ == "__main__":
    main()
