"""What a step, a logging step and the end of a task ask of a GPU: operations, kernel launches and waits, counted.

    python benchmarks/launches.py [--layers 30] [--methods lora inclora ...]

A Llama of many small layers, adapters on q and v, the second task of a run, in the phase in which the density is held.
A Triton kernel counts as one launch and is not run: what is counted depends neither on speed nor on values.
PEFT's LoRA under the plain Trainer is the measure.
"""

import argparse
import logging
import os
import tempfile
from contextlib import ExitStack, nullcontext
from functools import partial

import torch


os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton is imported

from common import DEVICE
from counting import Count, counted_kernels
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_jumplora import ContinualTrainer, ContinualTrainingArguments, JumpLoraConfig
from hf_jumplora.methods import get_method
from hf_jumplora.stack.load import merge_finished
from hf_jumplora.tuner import finish_adapter, fold_finished, set_mix, set_threshold


METHODS = ["lora", "inclora", "jumplora", "jumplora-best", "lwf", "ella"]
STEPS, LOGGED = 10, 5  # of a task; the step that logs
AVERAGED = range(6, 10)  # steps that do not log, one of them with what `jumplora-best` does in every fourth
ROWS = [{"input_ids": [1, 2, 3, 4 + n % 50, 5], "labels": [-100, -100, -100, 4 + n % 50, 5]} for n in range(64)]


class _Window(TrainerCallback):
    """Counts from the beginning of a step to the beginning of the next."""

    def __init__(self, package):
        self.package, self.counts, self._open = package, {}, ExitStack()

    def on_step_begin(self, args, state, control, **kwargs):
        self._open.close()
        self.counts[state.global_step + 1] = count = Count()
        if self.package is not None:
            self._open.enter_context(counted_kernels(count, self.package))
        self._open.enter_context(count)

    def on_train_end(self, args, state, control, **kwargs):
        self._open.close()


def llama(layers: int) -> nn.Module:
    """Random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=layers, **sizes))


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of one length."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def examples(count: int, rows=None, batch: int = 1):
    """As `trainer.examples`."""
    for start in range(0, min(count, len(ROWS)), batch):
        yield {key: value.to(DEVICE) for key, value in collate(ROWS[start : start + batch]).items()}


def setup(name: str, layers: int, rank: int, model: nn.Module | None = None):
    """(model whose first task is finished and whose second is to be trained, strategies with what they remember)."""
    model = llama(layers) if model is None else model
    if name == "lora":
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])), []
    method = get_method(name)
    config = JumpLoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False)
    strategies = [make() for make in method.strategies]
    if hasattr(strategies[0] if strategies else None, "memory"):
        strategies[0].memory = rank
    peft = get_peft_model(model, method.adapter_config(config))
    if method.adapter.get("gate"):
        set_threshold(peft, "default", 0.2)
        set_mix(peft, "default", 1.0)
    for strategy in strategies:
        strategy.on_task_start(peft, "default", examples)
        strategy.on_task_end(peft, "default", examples)
    finish_adapter(peft, "default", "task_000")
    second = method.adapter_config(config)
    second.parent_adapters = ["task_000"]
    peft.add_adapter("default", second)
    peft.set_adapter("default")
    fold_finished(peft, ["task_000"])
    merge_finished(peft, ["task_000"])
    for strategy in strategies:
        strategy.on_task_start(peft, "default", examples)
    return peft, strategies


def measure(name: str, layers: int = 30) -> dict[str, Count]:
    """{"step": of an ordinary step, "heaviest": of that of `AVERAGED` with the most operations, "logging": of one that
    logs, "end": of what follows the last}. `operations` of "average" is a mean over `AVERAGED`."""
    model, strategies = setup(name, layers, 8)
    import jumplora_kernels as package

    package = package if hasattr(package, "launch") and name != "lora" else None
    window = _Window(package)
    with tempfile.TemporaryDirectory() as folder:
        args = {"per_device_train_batch_size": 4, "max_steps": STEPS, "save_strategy": "no", "report_to": "none"}
        args |= {"logging_steps": LOGGED, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
        args |= {"logging_first_step": False, "logging_nan_inf_filter": True, "lr_scheduler_type": "constant"}
        make = Trainer if name == "lora" else partial(ContinualTrainer, strategies=strategies)
        trainer = make(
            model=model, args=ContinualTrainingArguments(folder, **args), train_dataset=ROWS, data_collator=collate,
            callbacks=[window],
        )  # fmt: skip
        trainer.train()
    with Count() as end, counted_kernels(end, package) if package else nullcontext():
        for strategy in strategies:
            strategy.on_task_end(model, "default", examples)
        if name != "lora":
            finish_adapter(model, "default", "task_001")
    ordinary = [window.counts[step] for step in AVERAGED]
    average = Count()
    average.operations = round(sum(count.operations for count in ordinary) / len(ordinary))
    return {
        "step": window.counts[LOGGED + 2],
        "heaviest": max(ordinary, key=lambda count: count.operations),
        "average": average,
        "logging": window.counts[LOGGED],
        "end": end,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--details", action="store_true", help="the most frequent operations of a step")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    os.environ.setdefault("HF_JUMPLORA_BACKEND", "triton")
    head = "step", "/ lora", "waits", "average", "/ lora", "heaviest", "waits", "logging", "waits", "end", "waits"
    print(f"{'method':<14} " + " ".join(f"{name:>8}" for name in head))
    lora = None
    for name in args.methods:
        counts = measure(name, args.layers)
        lora = lora or counts["step"].operations
        step, log, end, heaviest = counts["step"], counts["logging"], counts["end"], counts["heaviest"]
        average = counts["average"].operations
        print(
            f"{name:<14} {step.operations:8d} {step.operations / lora:8.2f} {step.waits.total():8d} "
            f"{average:8d} {average / lora:8.2f} {heaviest.operations:8d} {heaviest.waits.total():8d} "
            f"{log.operations:8d} {log.waits.total():8d} {end.operations:8d} {end.waits.total():8d}",
            flush=True,
        )
        if args.details:
            waits = (dict(count.waits) for count in (heaviest, log, end))
            print("  ", dict(step.by_name.most_common(25)), "\n  ", *waits)


if __name__ == "__main__":
    main()
