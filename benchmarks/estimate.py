"""`hf-jumplora estimate` against the memory of a whole run: the peak of a fresh process while it trains.

    python benchmarks/estimate.py [--only plain checkpointing]

A Llama of 27 million parameters or a T5 of 24, float32, on the CPU, where memory of the device and of the host are one:
the estimate is `total` + `host`. Measured is the growth of the process above what a run of a tiny model has left, with
every large tensor in pages of its own (MALLOC_MMAP_THRESHOLD_), so that what is freed is given back.
"""

import argparse
import copy
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
    "4-bit": {"four_bit": True},
    "4-bit-two-tasks": {"four_bit": True, "tasks": 2, "checkpointing": True, "adapter": FEW},
    "t5": {"t5": True, "tasks": 1},
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


def make(config: PretrainedConfig, four_bit: bool, folder: Path):
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    model = auto.from_config(config)
    if four_bit:
        model.save_pretrained(folder)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        model = auto.from_pretrained(folder, quantization_config=quantization)
        for weight in model.parameters():
            if type(weight) is torch.nn.Parameter:  # else it stays a part of the file, and with it all of the file
                weight.data = weight.data.clone()
    return model


def prepare(
    folder: Path, tiny=False, method="jumplora", tasks=0, checkpointing=False, four_bit=False, t5=False, adapter=None
) -> ContinualRun:
    """A run of tasks + 1 tasks of five steps."""
    config = model_config(t5, tiny)
    rows = torch.randint(0, config.vocab_size, (5 * BATCH, LENGTH)).tolist()
    rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    args = ContinualTrainingArguments(
        str(folder / "out"), per_device_train_batch_size=BATCH, max_steps=5, learning_rate=1e-3, save_strategy="no",
        activation_checkpointing=checkpointing, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    return ContinualRun(
        make(config, four_bit, folder / "base"), [Task(f"t{k}", rows) for k in range(tasks + 1)], method, args,
        adapter_config=JumpLoraConfig(**(adapter or {})),
    )  # fmt: skip


def status(field: str) -> int:
    """KiB of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def case(name: str) -> dict:
    """Measured and estimated MiB of one case, in this process."""
    options = CASES[name]
    torch.set_num_threads(1)
    report.draw_matrix = report.draw_overlap = lambda result, path: None
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder, "tiny"), tiny=True, **options).train()
        gc.collect()
        before = status("VmRSS")
        run = prepare(Path(folder, "run"), **options)
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again: loading is not training
        run.train()
        measured = (status("VmHWM") - before) / 2**10
    density = sum(info["density"] for info in run.info) / len(run.info)
    checkpointing, method = options.get("checkpointing", False), options.get("method", "jumplora")
    plan = Plan(1, BATCH, LENGTH, torch.float32, checkpointing, options.get("tasks", 0), density, method)
    row = estimate(model_config(options.get("t5", False)), copy.deepcopy(run.config), plan)
    row = row["ddp_4bit" if options.get("four_bit") else "ddp"]
    estimated = (row["total"] + row["host"]) / 2**20
    parts = {part: round(size / 2**20, 1) for part, size in row.items() if size}
    return {
        "measured_mib": round(measured, 1), "estimated_mib": round(estimated, 1),
        "ratio": round(estimated / measured, 3), "parts_mib": parts,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--here", choices=CASES, help="one case in this process, printed as JSON and not recorded")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(case(args.here)))
        return
    for name in args.only:
        command = [sys.executable, __file__, "--here", name]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        append("estimate", {"provider": name}, **json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
