"""What files from outside may hold: a stack or a Hub repository is data, and is checked before it is used.

Every JSON file is read by [`read_json`] and compared with a schema of this module: types are exact (no number for a
string), lengths, sizes and ranges are bounded, names are names. Any departure is a ValueError that names the file and
the place. Keys that a schema does not know are left alone: a later version may add some.
"""

import re
import reprlib
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model, model_validator
from pydantic_core import from_json


MAX_FILE = 1 << 26  # bytes of a JSON file; stack.json of a thousand tasks over a 70B model has a third of it
MAX_YAML = 1 << 22  # bytes of a stream file
MAX_NAME = 200  # characters of a task's name
MAX_PATTERN = 1000  # characters of a regular expression
UNDER = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "ddp_4bit")  # what `estimate` knows

_ANY_TEXT = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"  # one line, no control characters
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=MAX_NAME)]
Line = Annotated[str, Field(pattern=_ANY_TEXT, max_length=4096)]
BaseName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\"<>|`]*$", max_length=4096)]
Revision = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_./-]*$", max_length=MAX_NAME)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=MAX_NAME)]
LayerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$", max_length=500)]
Folder = Annotated[str, Field(pattern=r"^task_\d{3,6}$")]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$", max_length=MAX_NAME)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Rank = Annotated[int, Field(ge=1, le=2**20)]
Fraction = Annotated[float, Field(ge=0, le=1)]


_Sums = Annotated[list[float], Field(min_length=2, max_length=2)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


class _Weight(_Part):
    xxh3: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None  # quantised ones have none
    sha256: Sha256 | None = None  # in place of it, of earlier versions
    dtype: Identifier
    shape: list[Annotated[int, Field(ge=0, le=2**53)]] = Field(max_length=16)
    probe: list[float] = Field(max_length=4)
    sampled: list[_Sums] = Field([], max_length=8)
    sums: list[_Sums] = Field([], max_length=8)


class _Base(_Part):
    name_or_path: BaseName
    revision: Revision | None
    architecture: Identifier
    dtype: Line = ""
    layers: dict[LayerName, Annotated[list[Size], Field(min_length=2, max_length=2)]] = Field(max_length=100_000)
    probe: list[float] = Field([], max_length=16)  # of earlier versions
    weights: dict[LayerName, _Weight | None] = Field({}, max_length=200_000)
    config: dict[Line, Any] = Field({}, max_length=10_000)


class _Entry(_Part):
    name: Name
    folder: Folder
    files: dict[FileName, Sha256] = Field(max_length=100)
    support_sha256: Sha256
    state: Sha256 | None = None

    @model_validator(mode="after")
    def _complete(self):
        needed = {"adapter_config.json", "adapter_model.safetensors", "task.json"}
        if missing := sorted(needed - set(self.files)):
            raise ValueError(f"the entry of {self.folder} is not complete: it lacks {missing[0]}")
        return self


class StackFile(_Part):
    """stack.json."""

    base_model: _Base
    method: Name
    additive: bool
    separate: bool = False
    competing: bool = False
    tasks: list[_Entry] = Field(max_length=100_000)
    versions: dict[Line, Line] = Field({}, max_length=100)
    files: dict[FileName, Sha256] = Field({}, max_length=100)
    format_version: int

    @model_validator(mode="after")
    def _in_order(self):
        names = [task.name for task in self.tasks]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two tasks have the name {sorted(twice)[0]!r}")
        for number, task in enumerate(self.tasks):
            if task.folder != f"task_{number:03d}":
                raise ValueError(f"task number {number} has the folder {task.folder}, not task_{number:03d}")
        return self


class _Trained(_Part):
    name: Name
    density: Fraction
    seconds: Annotated[float, Field(ge=0)]
    steps: Count
    train_examples: Count
    effective_batch: Count
    truncated: Count | None = None
    source: str | None = Field(None, max_length=4096)
    labels: list[str] | None = Field(None, max_length=100_000)
    reused: Name | None = None
    collision: list[Fraction] = Field([], max_length=100_000)
    overlap: list[Fraction] = Field([], max_length=100_000)


class TaskFile(_Trained):
    """task.json of a task's folder."""

    folder: Folder
    support_sha256: Sha256


class _Data(_Part):
    name: Name
    source: str = Field(max_length=4096)
    train_examples: Count | None
    eval_examples: Count | None
    metric: Line | None
    prompt_style: Line
    prompt: str | None = Field(max_length=1 << 20)
    names_in_prompt: list[Line] = Field(max_length=1000)
    held_out: bool


class MetricsFile(_Part):
    """metrics.json of a run."""

    tasks: list[Name] = Field(max_length=100_000)
    matrix: list[list[float | None]] = Field(max_length=100_000)
    method: Name
    trained: list[_Trained] = Field(max_length=100_000)
    data: list[_Data] = Field([], max_length=100_000)
    general: list[dict[Line, float]] = Field([], max_length=100_000)
    held_out: dict[Name, Line] = {}

    @model_validator(mode="after")
    def _whole(self):
        if len(self.matrix) != len(self.trained) + 1:
            raise ValueError(f"{len(self.matrix)} rows of scores for {len(self.trained)} trained tasks and the start")
        if any(len(row) > len(self.tasks) for row in self.matrix):
            raise ValueError(f"a row has more scores than there are tasks ({len(self.tasks)})")
        return self


class RunFile(_Part):
    """run.json: the settings of a run. Which training arguments it may name is checked where they are used."""

    method: Name
    strategies: list[Annotated[str, Field(max_length=1 << 20)]] = Field(max_length=100)
    base_model: BaseName
    base_dtype: Annotated[str, Field(pattern=r"^(torch\.(float64|float32|bfloat16|float16))?$")]
    quantization: dict[str, Any] = {}

    @model_validator(mode="after")
    def _tasks(self):
        tasks = {key: value for key, value in (self.model_extra or {}).items() if key.startswith("task ")}
        for number in range(len(tasks)):
            value = tasks.get(f"task {number}")
            if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199} [!-~]{1,200}", value):
                raise ValueError(f"'task {number}' is no name and fingerprint, but {short(value)}")
        return self


# Training arguments that do not shape a result: a run does not store them, and a run.json must not name them.
HARMLESS = frozenset((
    # where it writes, whom it tells
    "output_dir", "model_card_template", "run_name", "project", "trackio_space_id", "trackio_bucket_id",
    "trackio_static_space_id", "report_to", "logging_strategy", "logging_steps", "logging_first_step", "logging_dir",
    "logging_nan_inf_filter", "log_on_each_node", "log_level", "log_level_replica", "disable_tqdm", "debug",
    "include_num_input_tokens_seen", "skip_memory_metrics", "push_to_hub", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "trust_remote_code",
    # checkpoints
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model", "ignore_data_skip",
    "enable_jit_checkpoint", "resume_from_checkpoint", "restore_callback_states_from_checkpoint",
    # workers, processes (`world_size` and `sharding` are stored), memory and speed
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataset_num_proc", "use_cpu", "local_rank", "ddp_find_unused_parameters",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "fsdp",
    "fsdp_config", "deepspeed", "per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "use_cache",
    # what scripts, not the Trainer, look at
    "do_train", "do_eval", "do_predict", "eval_on_start",
))  # fmt: skip
# Of the others a stack may bring numbers, switches and choices, and these of other types.
_WORDS = frozenset((
    "optim", "optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "train_sampling_strategy", "eval_strategy",
    "metric_for_best_model", "packing_strategy", "loss_type", "loss_weights", "truncation_mode", "f_divergence_type",
))  # fmt: skip


def may_bring(name: str, hint: Any) -> bool:
    """Whether a run.json may set the training argument `name`, whose field has the type `hint`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    plain = all(kind in (bool, int, float, type(None)) or get_origin(kind) is Literal for kind in kinds)
    return name not in HARMLESS and (plain or name in _WORDS)


def stored_arguments(path: str | Path, settings: dict[str, Any], args_class: type) -> dict[str, Any]:
    """The training arguments among the settings of a run.json that a run takes from there: a stack is data, it does not
    say where to write, whom to tell or what to start. Arguments of other types are compared alone.

    Raises:
        ValueError: it names an argument that no run stores, or a value is not of its argument's type.
    """
    stored = {key[5:]: value for key, value in settings.items() if key.startswith("args.")}
    if unknown := sorted(stored.keys() & HARMLESS):
        raise ValueError(f"{path} names the training argument {short(unknown[0])}, which is not for a stack to set")
    hints, own = get_type_hints(args_class), {f.name for f in fields(args_class) if f.init}  # type: ignore[arg-type]
    for key in stored.keys() & own:
        if may_bring(key, hints[key]):
            check_type(hints[key], stored[key], f"{path}: args.{key}")
        else:
            del stored[key]
    return stored


class HubFile(_Part):
    """hub.json: where a stack was pushed to."""

    repo_id: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?$", max_length=200)
    ]
    revision: Revision
    pushed: dict[Line, Line] = Field(max_length=100_000)


_Pattern = Annotated[str, Field(max_length=MAX_PATTERN)]
_ADAPTER: dict[str, Any] = {  # narrower than the fields of JumpLoraConfig say
    "r": Rank,
    "lora_alpha": Annotated[float, Field(gt=0)],
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "target_modules": Annotated[list[_Pattern], Field(max_length=100_000)] | _Pattern | None,
    "exclude_modules": Annotated[list[_Pattern], Field(max_length=100_000)] | _Pattern | None,
    "rank_pattern": dict[_Pattern, Rank],
    "alpha_pattern": dict[_Pattern, Annotated[float, Field(gt=0)]],
    "density_pattern": dict[_Pattern, Fraction],
    "support": Annotated[
        dict[LayerName, Annotated[tuple[Size, Sha256], Field(strict=False)]], Field(max_length=100_000)
    ]
    | None,
    "parent_adapters": Annotated[list[Annotated[str, Field(max_length=MAX_NAME)]], Field(max_length=100_000)],
    "base_model_name_or_path": BaseName | None,
    "revision": Revision | None,
    "auto_mapping": dict[Line, Any] | None,
    "task_type": Line | None,
    "peft_type": Literal["JUMPLORA"],
    "peft_version": Line | None,
}


@cache
def _adapter_schema(config_class: type) -> type[_Part]:
    """The schema of an adapter config: its dataclass's own field types, narrowed by `_ADAPTER`."""
    hints = get_type_hints(config_class)
    kinds = {f.name: _ADAPTER.get(f.name, hints[f.name]) for f in fields(config_class)}  # type: ignore[arg-type]
    return create_model(
        "AdapterConfig",
        __base__=_Part,
        **{name: (kind, Field(None, validate_default=False)) for name, kind in kinds.items()},
    )  # type: ignore[call-overload]


def check_adapter_config(path: str | Path, data: Any, config_class: type) -> dict[str, Any]:
    """The content of an adapter_config.json (or the `adapter.` settings of a run.json), checked.

    Raises:
        ValueError: a value has another type or is out of its range, or a regular expression may never end.
    """
    check(_adapter_schema(config_class), path, data)
    for key in (
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "density_pattern",
        "layers_pattern",
    ):
        value = data.get(key)
        for pattern in [value] if isinstance(value, str) else value or ():
            if problem := _endless(pattern):
                raise ValueError(f"{path}: {key}: {short(pattern)} {problem}")
    return data


def _endless(pattern: str) -> str | None:
    """What makes a regular expression one that may take for ever on some names; None for those that end soon.

    Of the expressions that Python's `re` can be held up by, all repeat a group, or have many open repetitions.
    """
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"is no regular expression ({error})"
    plain = re.sub(r"\\.", "x", re.sub(r"\\d[*+]", "x", pattern))  # names hold short runs of digits alone
    plain = re.sub(r"\[\^?\]?[^]]*\]", "x", plain)
    if re.search(r"\)[*+{]", plain):
        return "repeats a group, which may never end: list the layers' names instead"
    if len(re.findall(r"[*+{]", plain)) > 3:
        return "has more than three repetitions, which may take for ever: list the layers' names instead"
    return None


def read_json(path: str | Path, content: bytes | None = None) -> Any:
    """The content of a JSON file of at most [`MAX_FILE`] bytes, UTF-8, nested at most some 200 deep.

    Raises:
        ValueError: it is damaged, or larger or deeper than any that this package writes; the message names it.
        OSError: it cannot be read.
    """
    path = Path(path)
    if (path.stat().st_size if content is None else len(content)) > MAX_FILE:
        raise ValueError(f"{path} is larger than {MAX_FILE >> 20} MiB, which no file of this kind is")
    try:
        return from_json(path.read_bytes() if content is None else content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def read_yaml(path: str | Path) -> tuple[Any, Any]:
    """(content, root node) of a YAML file of at most [`MAX_YAML`] bytes, and as many values with its aliases resolved.

    Raises:
        ValueError: it is no YAML, or larger, or not UTF-8, or has a key twice. OSError: it cannot be read.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_YAML:
            raise ValueError(f"it is larger than {MAX_YAML >> 20} MiB")
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if _values(root, {}) > MAX_YAML:
            raise ValueError("its aliases stand for too many values")
        return loader.construct_document(root) if root else None, root
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # dates and numbers that are none, too
        raise ValueError(f"{path} is not valid YAML: {error}") from error


def _values(node: Any, seen: dict[int, int]) -> int:
    """How many values a node is with every alias in it written out; more than any limit for one that holds itself. A
    key that stands there twice is a ValueError."""
    if not isinstance(getattr(node, "value", None), list):
        return 1
    if id(node) not in seen:
        seen[id(node)] = 2 * MAX_YAML  # until it is known: met again, it is in itself
        keys = [part[0] for part in node.value if isinstance(part, tuple)]
        for number, key in enumerate(keys):
            if (key.tag, key.value) in [(other.tag, other.value) for other in keys[:number]]:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {short(key.value)} stands there twice")
        parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
        seen[id(node)] = 1 + sum(_values(part, seen) for part in parts)
    return seen[id(node)]


def check(schema: type[_Part], path: str | Path, data: Any) -> Any:
    """`data`, unchanged, if it is what `schema` says. Raises ValueError that names `path` and the place."""
    try:
        schema.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(short(part).strip("'") for part in first["loc"])
        raise ValueError(
            f"{path} is damaged, or made by somebody else ({place or 'as a whole'}: {first['msg']})"
        ) from error
    return data


def check_type(hint: Any, value: Any, where: str) -> None:
    """Raise ValueError, which begins with `where`, unless a value from a file has the type of its field."""
    try:
        TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where} cannot be {short(value)}: {error.errors(include_url=False)[0]['msg']}") from error


def short(value: Any) -> str:
    """repr() of something from outside, in at most some hundred characters that any terminal can show."""
    limited = reprlib.Repr()
    limited.maxstring = limited.maxother = 100
    return limited.repr(value).encode("ascii", "backslashreplace").decode()
