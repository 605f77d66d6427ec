"""What the number of finished tasks costs: a training step, memory, loading a stack, merged inference.

    python benchmarks/tasks.py [--hidden 512] [--layers 4] [--tasks 100] [--rounds 7] [--only load]

Finished tasks are made, not trained: random factors (r = 8, q and v of a Llama), finished at a density of 5 %.

step: one training step (forward, backward, AdamW) of a new task above 0, 1 and all finished tasks, in one process, in
turns; resident memory of a process of its own for each. load: `load_stack` of 1, 10 and all tasks, as adapters and
merged into a plain model, against what it cannot avoid: hashing the files, parsing their JSON, reading their tensors,
one forward pass; processor time of the process, which other processes disturb little.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import torch
from common import interleave, report
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_jumplora.disk import file_sha256
from hf_jumplora.stack import Manifest, load_stack, read_manifest, save_task, write_manifest
from hf_jumplora.stack.base import describe_base
from hf_jumplora.stack.load import merge_finished
from hf_jumplora.stack.manifest import layer_shapes
from hf_jumplora.tuner import JumpLoraConfig, finish_adapter, fold_finished, set_mix, set_threshold


DENSITY = 0.05


def base_model(args) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=args.hidden, intermediate_size=2 * args.hidden,
            num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
        )
    )  # fmt: skip


def add_task(model, index: int, init_weights: bool):
    """A new adapter `default` above tasks 0 .. index - 1, which are folded as a run does it."""
    torch.manual_seed(index)
    earlier = [f"task_{k:03d}" for k in range(index)]
    config = JumpLoraConfig(r=8, parent_adapters=earlier, init_weights=init_weights)
    if index == 0:
        return get_peft_model(model, config)
    model.unmerge_adapter()
    model.add_adapter("default", config)
    model.set_adapter("default")
    fold_finished(model, earlier[-1:])
    merge_finished(model, earlier)
    return model


def with_finished(args, count: int):
    """A model in the middle of task number `count`: f = 0.5, `count` tasks below it."""
    model = base_model(args)
    for index in range(count):
        model = add_task(model, index, init_weights=False)
        set_threshold(model, "default", DENSITY)
        set_mix(model, "default", 1.0)
        finish_adapter(model, "default", f"task_{index:03d}")
    model = add_task(model, count, init_weights=False).train()
    set_threshold(model, "default", DENSITY)
    set_mix(model, "default", 0.5)
    return model


def training_step(model, args):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, 1024, (4, args.tokens // 4), generator=torch.Generator().manual_seed(1))

    def step():
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # as the Trainer: over all parameters there are
        optimizer.step()
        model.zero_grad()

    return step


def _memory(args, count: int, out) -> None:
    torch.set_num_threads(args.threads)
    step = training_step(with_finished(args, count), args)
    for _ in range(3):
        step()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    out.put((resident / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))


def memory(args, count: int) -> tuple[float, float]:
    """MiB resident after three steps above `count` tasks, and at most, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=_memory, args=(args, count, out))
    process.start()
    result = out.get()
    process.join()
    return result


def write_stack(args, folder: Path) -> None:
    """A stack of `args.tasks` finished tasks on disk."""
    base_model(args).save_pretrained(folder / "base")
    model, manifest = LlamaForCausalLM.from_pretrained(folder / "base"), None
    described = describe_base(model)
    for index in range(args.tasks):
        name = f"task_{index:03d}"
        model = add_task(model, index, init_weights=False)
        set_threshold(model, "default", DENSITY)
        set_mix(model, "default", 1.0)
        finish_adapter(model, "default", name)
        manifest = manifest or Manifest({**described, "layers": layer_shapes(model)}, "jumplora", True)
        manifest.tasks.append(save_task(model, name, name, folder, {"index": index}, "", {}))
    write_manifest(folder, manifest)


def read(folder: Path, count: int) -> None:
    """Hash, parse and read the files of the first tasks: what no loader can leave out."""
    for task in read_manifest(folder).tasks[:count]:
        for name in task["files"]:
            file_sha256(folder / task["folder"] / name)
        json.loads((folder / task["folder"] / "adapter_config.json").read_text())
        load_file(folder / task["folder"] / "adapter_model.safetensors")


def load_rows(args, folder: Path) -> None:
    write_stack(args, folder)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    ids = torch.randint(0, 1024, (1, args.tokens))
    plain, merged = (LlamaForCausalLM.from_pretrained(folder / "base") for _ in range(2))
    merged = load_stack(folder, merged)
    setting = {"hidden": args.hidden, "layers": args.layers, "density": DENSITY}
    with torch.no_grad():
        inference = {"base": lambda: plain(ids), "stack": lambda: merged(ids)}
        report("inference", {**setting, "tasks": args.tasks}, interleave(inference, args.rounds), "base")
    counts = sorted({1, 10, args.tasks})
    weights = {name: weight.clone() for name, weight in base.state_dict().items()}

    def floor(count):
        read(folder, count)
        with torch.no_grad():
            plain(ids)

    def load(count):
        return load_stack(folder, base, tasks=slice(0, count))

    def merge(count):
        load_stack(folder, base, tasks=slice(0, count), merge=True)

    for count in counts:
        rows: dict[str, list[float]] = {"read": [], "load": [], "merge": []}
        for number in range(args.rounds + 1):
            for name, step in (("read", floor), ("load", load), ("merge", merge)):
                start = time.process_time()
                model = step(count)
                elapsed = time.process_time() - start
                if number:
                    rows[name].append(elapsed)
                if model is not None:
                    model.unmerge_adapter()
                    model.unload()
                base.load_state_dict(weights)
        report("load", {**setting, "tasks": count}, rows, "read")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": 512, "layers": 4, "tokens": 256, "tasks": 100, "rounds": 7, "threads": 2}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("step", "load"), default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = {"hidden": args.hidden, "layers": args.layers, "tokens": args.tokens}
    if args.only != "load":
        counts = sorted({0, 1, args.tasks})
        steps = {f"after{count}": training_step(with_finished(args, count), args) for count in counts}
        seconds = interleave(steps, args.rounds)
        report("step", setting, seconds, "after1")
        sizes = {count: memory(args, count) for count in counts}
        for count, (now, peak) in sizes.items():
            print(f"  resident above {count:>3} tasks: {now:.0f} MiB ({now / sizes[1][0]:.3f}), at most {peak:.0f} MiB")
    if args.only != "step":
        with tempfile.TemporaryDirectory() as folder:
            load_rows(args, Path(folder))


if __name__ == "__main__":
    main()
