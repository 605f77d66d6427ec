"""`hf-jumplora estimate` against the memory of a whole run: the peak of a fresh process while it trains.

    python benchmarks/estimate.py [--only plain checkpointing]

A Llama of 27 million parameters or a T5 of 24, float32, on the CPU, where memory of the device and of the host are one:
the estimate is `total` + `host`. Measured is the growth of the process above what a run of a tiny model has left, with
every large tensor in pages of its own (MALLOC_MMAP_THRESHOLD_), so that what is freed is given back.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import append
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

import hf_jumplora.report.report as report
from hf_jumplora import ContinualRun, ContinualTrainingArguments, JumpLoraConfig, Task
from hf_jumplora.memory import Plan, estimate
from hf_jumplora.methods import get_method


FEW = {"threshold_update": "density", "target_density": 0.01}
CASES: dict[str, dict] = {
    "plain": {},
    "checkpointing": {"checkpointing": True},
    "all-linear": {"adapter": {"target_modules": "all-linear", "r": 16}},
    "ella-hard": {
        "method": "jumplora-ella",
        "tasks": 2,
        "adapter": {**FEW, "isolation": "hard", "target_density": 0.1},
    },
    "best": {"method": "jumplora-best", "tasks": 2},
    "4-bit": {"four_bit": True},
    "4-bit-two-tasks": {"four_bit": True, "tasks": 2, "checkpointing": True, "adapter": FEW},
    "t5": {"t5": True, "tasks": 1},
    **{under: {"under": under, "tasks": 1} for under in ("ddp", "zero1", "zero2", "zero3", "fsdp2")},
}
BATCH, LENGTH = 2, 256


def model_config(t5: bool, tiny: bool = False) -> PretrainedConfig:
    layers, hidden, words = (1, 64, 100) if tiny else (6, 512, 8000)
    if t5:
        return T5Config(
            vocab_size=words, d_model=hidden, d_kv=64, d_ff=2 * hidden, num_layers=layers // 2 + 1, num_heads=8,
            dropout_rate=0.0, decoder_start_token_id=0,
        )  # fmt: skip
    return LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=11 * hidden // 4, num_hidden_layers=layers,
        num_attention_heads=8,
    )  # fmt: skip


def make(config: PretrainedConfig):
    torch.manual_seed(0)
    return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


def load(folder: Path, four_bit: bool):
    """The model of a folder, in 4 bits, or cut into pieces if these processes run under ZeRO-3."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32) if four_bit else None
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization)
    for weight in model.parameters():
        if type(weight) is torch.nn.Parameter:  # else it stays a part of the file, and with it all of the file
            weight.data = weight.data.clone()
    return model


def prepare(folder: Path, tiny: bool, options: dict) -> ContinualRun:
    """A run of a case: its finished tasks and one more, five steps each."""
    config = model_config(options.get("t5", False), tiny)
    torch.manual_seed(0)
    rows = torch.randint(0, config.vocab_size, (5 * BATCH, LENGTH)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    args = ContinualTrainingArguments(
        str(folder / "out"), per_device_train_batch_size=BATCH, max_steps=5, learning_rate=1e-3, save_strategy="no",
        activation_checkpointing=options.get("checkpointing", False), report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    base = folder / "base"
    return ContinualRun(
        load(base, options.get("four_bit", False)) if base.is_dir() else make(config),
        [Task(f"t{k}", rows) for k in range(options.get("tasks", 0) + 1)], options.get("method", "jumplora"), args,
        adapter_config=JumpLoraConfig(**options.get("adapter", {})),
    )  # fmt: skip


def status(field: str) -> int:
    """KiB of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, folder: Path) -> dict:
    """Measured MiB of one case, in this process, and the density of its tasks."""
    torch.set_num_threads(1)
    report.draw_matrix = report.draw_overlap = lambda result, path: None
    prepare(folder / "tiny", True, CASES[name]).train()
    gc.collect()
    before = status("VmRSS")
    run = prepare(folder / "run", False, CASES[name])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: loading is not training
    run.train()
    measured = (status("VmHWM") - before) / 2**10
    return {
        "measured_mib": round(measured, 1),
        "density": sum(info["density"] for info in run.record.trained) / len(run.record.trained),
    }


def case(name: str) -> dict:
    """Measured MiB of a fresh process, or of the first of two, and estimated MiB."""
    options = CASES[name]
    under, method = options.get("under"), options.get("method", "jumplora")
    command = [__file__, "--here", name]
    if under:
        config = f"recipes/accelerate/{'cpu2' if under == 'ddp' else under}.yaml"
        command = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config, *command]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as folder:
        if options.get("four_bit") or under == "zero3":
            for part in ("tiny", "run"):
                make(model_config(False, part == "tiny")).save_pretrained(Path(folder) / part / "base")
        done = subprocess.run(
            [sys.executable, *command, folder], env=environment, stdout=subprocess.PIPE, text=True, check=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"measured_mib"')))
    plan = Plan(
        2 if under else 1, BATCH, LENGTH, torch.float32, options.get("checkpointing", False), options.get("tasks", 0),
        found["density"], method,
    )  # fmt: skip
    adapter = get_method(method).adapter_config(options.get("adapter", {}))
    rows = estimate(model_config(options.get("t5", False)), adapter, plan)
    row = rows[under or ("ddp_4bit" if options.get("four_bit") else "ddp")]
    if (under or "").startswith("zero"):
        row["total"] -= row.pop("buckets")  # allocated and never filled: no memory of a CPU, but of a GPU
    estimated = (row["total"] + row["host"]) / 2**20
    return {
        "measured_mib": found["measured_mib"], "estimated_mib": round(estimated, 1),
        "ratio": round(estimated / found["measured_mib"], 3),
        "parts_mib": {part: round(size / 2**20, 1) for part, size in row.items() if size},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--here", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        found = measure(args.here[0], Path(args.here[1]))
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found), flush=True)
        return
    for name in args.only:
        append("estimate", {"provider": name}, **case(name))


if __name__ == "__main__":
    main()
