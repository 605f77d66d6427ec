"""Changing the tasks that act: `switch_tasks` against loading again, and against unmerging and merging in memory.

    python benchmarks/stack.py [--hidden 1024] [--layers 4] [--rank 8] [--tasks 4] [--density 0.05] [--rounds 7]

A random Llama on disk with a stack of random tasks on its q, k, v and o projections. Also prints what a task costs
on disk, at several densities: the adapter's bytes against a LoRA adapter of the same rank in float32 plus the coded
support, the code against its entropy, and the bytes a value of the sparse export.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from common import interleave, report
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_jumplora import JumpLoraConfig, finish_adapter, load_stack
from hf_jumplora.stack import Manifest, export_sparse, save_task, switch_tasks, write_manifest
from hf_jumplora.stack.base import describe_base
from hf_jumplora.stack.manifest import layer_shapes, library_versions
from hf_jumplora.stack.operations import open_tasks
from hf_jumplora.tuner import set_mix, set_threshold


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def make_stack(folder: Path, base: Path, tasks: int, rank: int, density: float) -> Path:
    """A stack of random tasks that keep `density` of the entries."""
    model = LlamaForCausalLM.from_pretrained(base)
    described, manifest, parents = describe_base(model), None, []
    for number in range(tasks):
        torch.manual_seed(number)
        config = JumpLoraConfig(
            r=rank, target_modules=TARGETS, init_weights=False, parent_adapters=list(parents), initial_density=density
        )
        if parents:
            model.add_adapter("default", config)
            model.set_adapter("default")
        else:
            model = get_peft_model(model, config)
        set_threshold(model, "default", density)
        set_mix(model, "default", 1.0)
        name = f"task_{number:03d}"
        finish_adapter(model, "default", name)
        parents.append(name)
        if manifest is None:
            described["layers"] = layer_shapes(model)
            manifest = Manifest(described, "jumplora", True, versions=library_versions())
        manifest.tasks.append(save_task(model, name, name, folder, {}, f"# {name}\n", {}))
    write_manifest(folder, manifest)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = (("hidden", int, 1024), ("layers", int, 4), ("rank", int, 8), ("tasks", int, 4), ("rounds", int, 7))
    for name, kind, default in (*options, ("density", float, 0.05)):
        parser.add_argument(f"--{name}", type=kind, default=default)
    args = parser.parse_args()
    top = Path(tempfile.mkdtemp())
    try:
        torch.manual_seed(0)
        heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 2 * args.hidden}
        config = LlamaConfig(vocab_size=1000, hidden_size=args.hidden, num_hidden_layers=args.layers, **heads)
        LlamaForCausalLM(config).save_pretrained(top / "base")
        for density in (0.005, 0.05, 0.25):
            sizes_at(density, make_stack(top / f"sizes-{density}", top / "base", 1, args.rank, density), top)
        stack = make_stack(top / "stack", top / "base", args.tasks, args.rank, args.density)
        live, merged = load_stack(stack), load_stack(stack)
        names = [f"task_{k:03d}" for k in range(args.tasks)]
        choices = [names[:1], names]
        turn = {"switch": 0, "reload": 0, "remerge": 0}

        def choice(name):
            turn[name] += 1
            return choices[turn[name] % 2]

        def remerge():
            merged.unmerge_adapter()
            merged.base_model.merge_adapter(adapter_names=choice("remerge"))

        providers = {
            "switch": lambda: switch_tasks(live, choice("switch")),
            "reload": lambda: load_stack(stack, tasks=choice("reload")),
            "remerge": remerge,
        }
        setting = {key: getattr(args, key) for key in ("hidden", "layers", "rank", "tasks", "density")}
        report("switch_tasks", setting, interleave(providers, args.rounds), "reload")
    finally:
        shutil.rmtree(top)


def sizes_at(density: float, stack: Path, top: Path) -> None:
    """Print the sizes of a stack of one task."""
    sizes = open_tasks(stack)[2][0].sizes()
    sparse = export_sparse(stack, top / f"sparse-{density}")
    print(
        f"density {sizes['kept'] / sizes['entries']:.2%}: adapter {sizes['file']:,} bytes = "
        f"{sizes['file'] / (sizes['factors'] + sizes['support']):.4f} x (LoRA in float32 + coded support); support "
        f"{sizes['support'] / sizes['entropy']:.3f} x its entropy; sparse export "
        f"{sparse['bytes_per_nonzero']:.3f} bytes a value"
    )


if __name__ == "__main__":
    main()
