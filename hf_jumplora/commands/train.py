"""Train a causal or seq2seq model on a stream of text tasks, one after the other, configured by a YAML file.

    hf-jumplora train my_run.yaml --learning_rate 1e-3

    # my_run.yaml
    model_name_or_path: meta-llama/Llama-3.2-1B
    stream: my_stream.yaml
    learning_rate: 1.0e-3
    output_dir: runs/mine

Its keys are the options of the recipes, and options on the command line take precedence; `hf-jumplora train CONFIG
--help` lists all of them. After an interruption the same command continues where it stopped. For several processes:
`accelerate launch -m hf_jumplora train CONFIG.yaml`. Exit code 0, or 2 after a mistake, which is one line.
"""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `hf-jumplora train`."""
    parser.add_argument("config", help="a YAML file of options")
    parser.add_argument(
        "options", nargs=argparse.REMAINDER, metavar="...", help="options that take precedence over the file's"
    )


def option_classes() -> tuple[type, ...]:
    """What the keys of the file and the options are declared by."""
    from ..options import MethodArguments, ModelArguments, StreamArguments
    from ..trainer import ContinualTrainingArguments

    return ModelArguments, StreamArguments, MethodArguments, ContinualTrainingArguments


def run(args: argparse.Namespace) -> None:
    """Train what is not finished yet."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from ..options import parse_recipe
    from ..trainer import ContinualRun, ContinualSeq2SeqTrainer, ContinualTrainer

    argv = ["--config", args.config, *args.options]
    model, stream, method, training = parse_recipe(
        option_classes(), argv, prog="hf-jumplora train", description=__doc__.split("\n\n")[0]
    )
    name = model.model_name_or_path
    output_dir = None if training.output_dir == "trainer_output" else training.output_dir  # the Trainer's, ungiven
    for option, value in {"model_name_or_path": name, "stream": stream.stream, "output_dir": output_dir}.items():
        if value is None:
            raise ValueError(f"{args.config} has no {option}: give it there or as --{option}")
    config, strategies, tasks = method.adapter_config(), method.strategies(), stream.load()
    seq2seq = AutoConfig.from_pretrained(name).is_encoder_decoder
    auto: Any = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    ContinualRun(
        auto.from_pretrained(name, dtype=model.dtype), tasks, method.method, training,
        AutoTokenizer.from_pretrained(name), trainer_cls=ContinualSeq2SeqTrainer if seq2seq else ContinualTrainer,
        adapter_config=config, strategies=strategies,
    ).train()  # fmt: skip
