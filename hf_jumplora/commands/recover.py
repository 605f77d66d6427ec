"""Write a stack that was trained on a pruned base for the whole one (LoRAM, arXiv 2502.13533).

    hf-jumplora recover runs/pruned --base_model meta-llama/Llama-3.1-8B --keep keep.safetensors --out runs/whole

keep.safetensors says which rows and columns of each layer the pruned base has kept: int64 tensors LAYER.rows and
LAYER.columns with their places in the whole layer. The updates of these entries stay what they are, all others are 0.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora recover`."""
    parser.add_argument("stack", help="folder of a stack, or a repository on the Hub")
    parser.add_argument("--revision", help="of the repository; tag task-002 is the stack after that task")
    parser.add_argument("--base_model", required=True, help="folder or Hub id of the whole base")
    parser.add_argument("--keep", required=True, metavar="FILE", help="safetensors file of the places that were kept")
    parser.add_argument("--out", required=True, help="an empty folder, or one to be made")


def run(args: argparse.Namespace) -> None:
    """Write the stack, and say what it stands on."""
    from ..stack.recover import recover

    manifest = recover(args.stack, args.base_model, args.keep, args.out, args.revision)
    print(f"{args.out}: {', '.join(manifest.task_names)} on {manifest.base_model['name_or_path']}")
