"""Steps of a small model on a GPU, where the host's time decides: by the trainer, and compiled. A part of `gpu.py`."""

import contextlib
import io
import statistics
import tempfile
import time
from functools import partial

import torch
from common import DEVICE, interleave, report
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from hf_jumplora import ContinualTrainer, ContinualTrainingArguments, JumpLoraConfig
from hf_jumplora.tuner import set_mix, set_threshold


def smollm2_shape(layers: int = 30) -> LlamaForCausalLM:
    """Random weights of SmolLM2-135M's shapes in bfloat16."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(LlamaConfig(
                hidden_size=576, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=9,
                num_key_value_heads=3, vocab_size=49152,
            ))  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)


class Seconds(TrainerCallback):
    """Of each step, with the device's work."""

    def __init__(self):
        self.seconds: list[float] = []

    def _now(self) -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self._now() - self.start)


def trainer_steps(layers: int = 30, batch: int = 32, length: int = 316, steps: int = 30) -> dict[str, list[float]]:
    """Seconds of the steps of a second task after a few of warming up, by method; PEFT's LoRA under the Trainer."""
    import launches

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 40000, (length,), generator=generator).tolist() for _ in range(batch * 4)]
    data = [{"input_ids": ids, "labels": [-100] * (length - 3) + ids[-3:]} for ids in rows]
    seconds = {}
    for name in ("lora", "inclora", "jumplora", "jumplora-best"):
        model, strategies = launches.setup(name, layers, 64, smollm2_shape(layers))
        clock = Seconds()
        make = Trainer if name == "lora" else partial(ContinualTrainer, strategies=strategies)
        with tempfile.TemporaryDirectory() as folder:
            args = ContinualTrainingArguments(
                folder, per_device_train_batch_size=batch, max_steps=steps, num_train_epochs=1, save_strategy="no",
                report_to="none", logging_steps=12, disable_tqdm=True, lr_scheduler_type="constant",
                use_cpu=DEVICE == "cpu",
            )  # fmt: skip
            make(model=model, args=args, train_dataset=data, data_collator=launches.collate, callbacks=[clock]).train()
        seconds[name] = clock.seconds[steps // 5 :]
    return seconds


def compiled_steps(rounds: int, layers: int = 6, tokens: int = 64) -> None:
    """A step with AdamW, eager, by torch.compile and with its CUDA graphs: PEFT's LoRA and gated layers at f = 0.7."""
    ids = torch.randint(0, 40000, (8, tokens), device=DEVICE)
    for mode in ("eager", "default", "reduce-overhead"):
        torch._dynamo.reset()
        steps = {}
        for name in ("lora", "gated"):
            base = smollm2_shape(layers).requires_grad_(False)
            if name == "lora":
                model = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"]))
            else:
                model = get_peft_model(base, JumpLoraConfig(
                    r=8, target_modules=["q_proj", "v_proj"], init_weights=False, threshold_update="density",
                    target_density=0.3,
                ))  # fmt: skip
                set_threshold(model, "default", 0.3)
                set_mix(model, "default", 0.7)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-8)
            model = model if mode == "eager" else torch.compile(model, mode=mode)
            steps[name] = partial(_step, model, ids, optimizer)
            for _ in range(3):
                steps[name]()
        report(f"small model, {mode}", {"layers": layers, "tokens": 8 * tokens}, interleave(steps, rounds), "lora")


def _step(model, ids, optimizer) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def small(rounds: int) -> str:
    """Both; returns a line for the summary."""
    with contextlib.redirect_stdout(io.StringIO()):  # the trainers' own lines
        seconds = trainer_steps()
    report("small model, trainer", {"layers": 30, "tokens": 32 * 316}, seconds, "inclora")
    compiled_steps(rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    cells = (f"{name} {1e3 * t:.0f} ms ({t / medians['inclora']:.2f})" for name, t in medians.items())
    return f"a trainer's step on SmolLM2's shapes: {', '.join(cells)}"
