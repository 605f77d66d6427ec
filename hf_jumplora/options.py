"""The options that all recipes share: which stream, which method, and a YAML file in place of a long command line."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from datasets import disable_progress_bars
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from ._compat import CHECKPOINTING
from .data import load_tasks
from .escape import one_line
from .methods import GATE_OPTIONS, METHODS, get_method, strategy_name
from .schema import read_yaml
from .strategies import Strategy
from .tuner import JumpLoraConfig


@dataclass
class ModelArguments:
    """The model to train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"aliases": ["--model"], "help": "Folder or Hub id; None: a tiny model, made on the spot."},
    )
    dtype: str = field(default="auto", metadata={"help": "'auto', 'float32', 'bfloat16', ..."})


@dataclass
class StreamArguments:
    """Which tasks, in which order."""

    stream: str | None = field(
        default=None, metadata={"help": "A stream file, or the name of a shipped one (order1 to order6, ...)."}
    )
    data_dir: str | None = field(default=None, metadata={"help": "Folder with the data; None: as the stream says."})
    max_train: int | None = field(default=None, metadata={"help": "At most this many training rows per task."})
    max_eval: int | None = field(default=None, metadata={"help": "At most this many eval rows per task."})
    prompt_style: str | None = field(
        default=None, metadata={"help": "'jumplora' (no data-set name) or 'olora' (task and data set named)."}
    )
    held_out: list[str] | None = field(
        default=None, metadata={"help": "Tasks of the stream or its catalogue that are evaluated but never trained on."}
    )
    general_text: str | None = field(
        default=None,
        metadata={
            "help": "Text that belongs to no task, whose cross-entropy is measured before and after: a file "
            "(.txt, .jsonl, ...) or a Hub data set, ID or ID:CONFIG, with a column 'text'."
        },
    )

    def load(self) -> list:
        """The tasks of the stream. Raises what [`load_tasks`] raises."""
        return load_tasks(self.stream or "", **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]})


ADAPTER_OPTIONS = (
    "r", "lora_alpha", "lora_dropout", "threshold_scope", "threshold_update", "initial_density", "target_density",
    "density_schedule", "gate_start", "gate_end", "isolation",
)  # fmt: skip


@dataclass
class MethodArguments:
    """The method and the options of its adapters (see `JumpLoraConfig`; their defaults are the published ones)."""

    method: str = field(
        default="jumplora-best", metadata={"help": f"One of: {', '.join(METHODS)}; or of an installed package."}
    )
    r: int | None = field(default=None, metadata={"help": "Rank of each task's update. Default: 8."})
    lora_alpha: float | None = field(default=None, metadata={"help": "scaling = lora_alpha / r. Default: 32."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Dropout on the update's input. Default: 0."})
    target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the layers to adapt, or all-linear."}
    )
    threshold_scope: str | None = field(default=None, metadata={"help": "'global' (default), 'block' or 'layer'."})
    threshold_update: str | None = field(
        default=None, metadata={"help": "'learned', 'density' or 'frozen'. Default: the method's."}
    )
    initial_density: float | None = field(default=None, metadata={"help": "Entries kept at the threshold's start."})
    target_density: float | None = field(default=None, metadata={"help": "Entries kept by threshold_update=density."})
    density_schedule: str | None = field(
        default=None,
        metadata={"help": "From initial_density to target_density: 'constant' (default), 'linear', 'cubic'."},
    )
    gate_start: float | None = field(
        default=None, metadata={"help": "The gate's ramp starts at this fraction of the steps. Default: 0.2."}
    )
    gate_end: float | None = field(default=None, metadata={"help": "... and ends at this one. Default: 0.8."})
    isolation: str | None = field(
        default=None, metadata={"help": "'hard': stay off the entries of all earlier tasks. Default: the method's."}
    )
    strategy: list[str] | None = field(
        default=None,
        metadata={"help": "Options of the method's strategies: NAME.OPTION=VALUE ..., for example kfac.weight=50."},
    )
    ella_weight: float | None = field(default=None, metadata={"help": "Deprecated: --strategy ella.weight=VALUE."})

    def __post_init__(self):
        if self.ella_weight is not None:
            warnings.warn("--ella_weight is deprecated: use --strategy ella.weight=VALUE", FutureWarning, stacklevel=3)
            self.strategy = [*(self.strategy or ()), f"ella.weight={self.ella_weight}"]
            self.ella_weight = None

    def adapter_config(self, default_targets: list[str] | None = None) -> JumpLoraConfig:
        """The adapters' config. Raises what [`Method.adapter_config`] raises."""
        targets = self.target_modules or default_targets
        options = {name: value for name in ADAPTER_OPTIONS if (value := getattr(self, name)) is not None}
        options["target_modules"] = "all-linear" if targets == ["all-linear"] else targets
        return get_method(self.method).adapter_config(options)

    def strategies(self) -> list[Strategy] | None:
        """None for the method's own strategies with their own options.

        Raises:
            ValueError: an option is given that no strategy of the method has, or that cannot have this value.
        """
        return get_method(self.method).make_strategies(self.strategy) if self.strategy else None

    def plans(self, compare: list[str]) -> dict[str, tuple[JumpLoraConfig, list[Strategy] | None]]:
        """{method: (adapter config, strategies)} of this method and of others to compare it with.

        Options that only some of the methods have, or leave to the user, apply to those methods only.
        """
        plans = {self.method: (self.adapter_config(), self.strategies())}
        for name in compare:
            known = [strategy_name(make) for make in get_method(name).strategies]
            options = [option for option in self.strategy or () if option.split(".")[0] in known]
            method = get_method(name)
            unused = {*method.adapter, *(() if method.adapter.get("gate", True) else GATE_OPTIONS)} & {*ADAPTER_OPTIONS}
            other = dataclasses.replace(self, method=name, strategy=options, **dict.fromkeys(unused))
            plans[name] = (other.adapter_config(), other.strategies())
        return plans


def run_recipe(main: Callable[[], Any]) -> None:
    """Run a recipe's `main`: a user's mistake is one line on stderr and exit code 2, not a traceback; an interruption
    (Ctrl-C, SIGTERM) is one line and exit code 130.

    With HF_JUMPLORA_TRACEBACK=1 in the environment the traceback is shown.
    """
    if not sys.stderr.isatty():  # a log file: no progress bars of libraries in it
        disable_progress_bars()
        disable_progress_bar()
    try:
        main()
    except (ValueError, OSError, ImportError, KeyboardInterrupt) as error:
        if os.environ.get("HF_JUMPLORA_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: {one_line(error) or 'interrupted'}", file=sys.stderr)  # Ctrl-C says nothing
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Says the default of an option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(HfArgumentParser):
    """Reports an error in one line, where argparse would print two hundred options first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists all options)\n")


def recipe_parser(classes: tuple[type, ...], **parser_options) -> HfArgumentParser:
    """The parser of a recipe's options. parser_options: of `argparse.ArgumentParser`."""
    parser = _Parser(classes, allow_abbrev=False, formatter_class=_Help, **parser_options)  # type: ignore[arg-type]
    parser.add_argument("--config", metavar="FILE.yaml", help="Options; those on the command line take precedence.")
    return parser


def parse_recipe(
    classes: tuple[type, ...], argv: list[str] | None = None, defaults: dict[str, Any] | None = None, **parser_options
) -> tuple[Any, ...]:
    """Parse a recipe's command line. `--config FILE.yaml` gives defaults that options on the line override.

    defaults: the recipe's own, over which both win. parser_options: of `argparse.ArgumentParser`.

    Raises:
        SystemExit: an unknown option or key, or an invalid value (the one-line message names it).
    """
    # PEFT reads a property of every model that transformers 5 has renamed; a user can do nothing about it.
    warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
    argv = list(sys.argv[1:] if argv is None else argv)
    about = (sys.modules["__main__"].__doc__ or "").split("\n\n")[0]
    parser = recipe_parser(classes, **{"description": about, **parser_options})
    parser.set_defaults(**_renamed(defaults or {}))
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in argv:
        position = argv.index("--config")
        if position + 1 == len(argv):
            parser.error("--config needs a YAML file")
        path = Path(argv[position + 1])
        del argv[position : position + 2]
        if "--config" in argv:
            parser.error("--config is given twice")
        if not path.is_file():
            parser.error(f"{path} is a folder, not a YAML file" if path.is_dir() else f"{path}: no such file")
        try:
            values = read_yaml(path)[0] or {}
        except ValueError as error:
            parser.error(str(error))
        if not isinstance(values, dict):
            parser.error(f"{path}: expected keys and values, found {type(values).__name__}")
        known, values = {action.dest for action in parser._actions} - {"config", "help"}, _renamed(values)
        for key in values:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, 1, 0.7)
                parser.error(f"{path}: unknown key {key!r}" + "".join(f"; did you mean {name}?" for name in close))
        argv = [*_as_options(values), *argv]
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as error:
        parser.error(str(error))
    if unknown:
        close = difflib.get_close_matches(unknown[0], parser._option_string_actions, 1, 0.7)
        parser.error(f"not understood: {' '.join(unknown)}" + "".join(f"; did you mean {name}?" for name in close))
    return tuple(parsed)


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Options as this version of transformers calls them."""
    return {CHECKPOINTING if key == "activation_checkpointing" else key: value for key, value in values.items()}


def _as_options(values: dict[str, Any]) -> list[str]:
    options: list[str] = []
    for key, value in values.items():
        if value is None:
            continue
        values_of = value if isinstance(value, list) else [value]
        options += [f"--{key}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values_of)]
    return options
