"""`JumpLoraConfig`: PEFT's field names where PEFT has one."""

import enum
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig
from peft.utils.other import get_pattern_key

from ..ops.dispatch import BACKENDS
from ..schema import check_adapter_config, read_json


class JumpLoraPeftType(str, enum.Enum):
    """Our member of PEFT's type names. `PeftType` itself is closed; PEFT only looks the string up in its mappings."""

    JUMPLORA = "JUMPLORA"


_CHOICES = {
    "threshold_scope": ("global", "block", "layer"),
    "threshold_update": ("learned", "density", "frozen"),
    "threshold_grad": ("mean", "sum"),
    "isolation": ("none", "hard"),
    "density_schedule": ("constant", "linear", "cubic"),
    "backend": (None, *BACKENDS),
}


def of_layer(pattern: dict[str, Any], name: str, default: Any) -> Any:
    """What a pattern (`rank_pattern`, ...) has for a layer: under the layer's full name, else under the first key that
    matches it, as PEFT does; `default` if none does."""
    return pattern.get(name if name in pattern else get_pattern_key(list(pattern), name), default)


@dataclass
class JumpLoraConfig(PeftConfig):
    """Configuration of one task's gated low-rank update (JumpLoRA, arXiv 2604.16171).

    Defaults are the published ones. The update of a layer is `scaling * E`, E = ((1 - f) D + f D 1[|D| > tau]),
    D = B A [out, in], with f ramping from 0 at `gate_start` to 1 at `gate_end` of the task's optimizer steps.

    Raises:
        ValueError: an option has a value it cannot have; the message names the option.
    """

    r: int = field(default=8, metadata={"help": "Rank of the update."})
    lora_alpha: float = field(default=32, metadata={"help": "scaling = lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of the update (published: none)."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or a regex of linear layers, or 'all-linear'. None: query and value, as PEFT's LoRA."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Names or a regex to leave out."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layer indices."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list, if it is not a common one."}
    )
    rank_pattern: dict = field(default_factory=dict, metadata={"help": "Layer name or regex -> its own rank."})
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "Layer name or regex -> its own lora_alpha."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained and saved in full."})
    trainable_token_indices: list[int] | dict | None = field(
        default=None, metadata={"help": "Token embeddings to train (set by TRL when a chat template adds tokens)."}
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "The base weight is stored [in, out]; found out by itself (Conv1D)."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "scaling = lora_alpha / sqrt(r)."})
    init_weights: bool = field(
        default=True, metadata={"help": "True: A Kaiming uniform, B zero. False: B random too (for tests)."}
    )
    gate: bool = field(default=True, metadata={"help": "False: no gate at all, a plain LoRA update (IncLoRA, ELLA)."})
    threshold_scope: Literal["global", "block", "layer"] = field(
        default="global", metadata={"help": "One threshold for the model, each transformer block or each layer."}
    )
    threshold_update: Literal["learned", "density", "frozen"] = field(
        default="learned",
        metadata={
            "help": "'learned': by gradient (published). 'density': re-set after every step to the quantile that keeps "
            "`target_density`, exact at the start and the end, from a sample in between. 'frozen': stays at its start "
            "value."
        },
    )
    threshold_grad: Literal["mean", "sum"] = field(
        default="mean", metadata={"help": "'mean' divides the threshold's gradient by out * in (published code)."}
    )
    initial_density: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of entries kept at the threshold's start. None: as many as A and B have parameters."
        },
    )
    target_density: float | None = field(
        default=None, metadata={"help": "Fraction kept by threshold_update='density'. None: that of the start."}
    )
    density_schedule: Literal["constant", "linear", "cubic"] = field(
        default="constant",
        metadata={
            "help": "Way of the density from `initial_density` to `target_density`: at once, or with the ramp of f; "
            "'cubic' (arXiv 1710.01878) closes most entries early."
        },
    )
    density_pattern: dict = field(
        default_factory=dict, metadata={"help": "Layer name or regex -> its own density (threshold_scope='layer')."}
    )
    bandwidth: float = field(default=1e-3, metadata={"help": "Width of the rectangle in the threshold's gradient."})
    gate_start: float = field(default=0.2, metadata={"help": "The ramp of f starts at this fraction of the steps."})
    gate_end: float = field(default=0.8, metadata={"help": "... and ends at this one."})
    isolation: Literal["none", "hard"] = field(
        default="none", metadata={"help": "'hard': entries kept by a parent are closed to this task."}
    )
    parent_adapters: list[str] = field(
        default_factory=list, metadata={"help": "Adapters whose (frozen) updates this one is trained on top of."}
    )
    backend: Literal["naive", "blocked", "triton", "triton-fold"] | None = field(
        default=None,
        metadata={
            "help": "How the layers compute (see `ops.gated_linear`). None: HF_JUMPLORA_BACKEND, else the best here. "
            "It belongs to the machine: never saved."
        },
    )
    support: dict[str, list] | None = field(
        default=None,
        metadata={"help": "Set when the task is finished: layer name -> [bytes, sha256] of its saved support."},
    )

    rank_routing: dict[str, float] | None = field(
        default=None, metadata={"help": "Set by methods mora (k, tau, delta) and smora (k): all tasks' ranks compete."}
    )

    def __new__(cls, *args, **options):
        """Remembers which options were named, `given`: a method that prescribes one must not beat its user in silence.
        Of a copy (`dataclasses.replace`), which names all, those that are not at their defaults."""
        config = super().__new__(cls)
        known = {f.name: f.default for f in fields(cls) if f.init}
        copied = known.keys() <= options.keys()
        named = {k: v for k, v in options.items() if v is not None and not (copied and v == known[k])}
        vars(config)["given"] = frozenset(named)  # not a field: never saved
        return config

    def __post_init__(self):
        self.given: frozenset[str] = vars(self)["given"]
        super().__post_init__()
        self.peft_type = JumpLoraPeftType.JUMPLORA  # type: ignore[assignment]
        for name in ("target_modules", "exclude_modules"):  # PEFT's habit: saved as lists, kept as sets
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str):  # the three checks of PEFT's LoraConfig
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}; got {getattr(self, name)!r}")
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be a positive integer, got {self.r!r}")
        if self.lora_alpha == 0:
            raise ValueError("lora_alpha=0 scales every update to nothing")
        if not 0 <= self.gate_start < self.gate_end <= 1:
            raise ValueError(f"need 0 <= gate_start < gate_end <= 1, got {self.gate_start} and {self.gate_end}")
        if self.bandwidth <= 0:
            raise ValueError(f"bandwidth must be positive, got {self.bandwidth}")
        for name in ("initial_density", "target_density"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is a fraction between 0 and 1, got {value}")
        if self.target_density is not None and self.threshold_update != "density":
            raise ValueError("target_density needs threshold_update='density'; initial_density sets the start alone")
        if self.density_schedule != "constant" and None in (self.initial_density, self.target_density):
            raise ValueError(f"density_schedule={self.density_schedule!r} needs initial_density and target_density")
        for name, value in self.density_pattern.items():
            if not 0 < value < 1:
                raise ValueError(f"density_pattern: {name!r} has {value}; a density is a fraction between 0 and 1")
        if self.density_pattern and (self.threshold_update, self.threshold_scope, self.density_schedule) != (
            "density", "layer", "constant",
        ):  # fmt: skip
            raise ValueError(
                "density_pattern gives layers their own thresholds and holds them: it needs threshold_scope='layer', "
                "threshold_update='density' and no density_schedule"
            )
        if self.rank_routing is not None and (
            self.gate or self.rank_routing.keys() not in ({"k", "tau", "delta"}, {"k"})
        ):
            raise ValueError(f"rank_routing is k, tau and delta, or k, with gate=False; got {self.rank_routing}")
        if not self.gate and self.isolation == "hard":
            raise ValueError(
                "isolation='hard' keeps a task off the entries that earlier gates kept; it needs gate=True"
            )
        # Where the config was loaded from, so that parents standing beside it can be found. Not a field: never saved.
        self.origin: dict[str, Any] | None = None

    @classmethod
    def from_json_file(cls, path_json_file, **kwargs):
        values = check_adapter_config(path_json_file, read_json(path_json_file), cls)
        values.pop("runtime_config", None)  # of other types of adapters, as PEFT does
        return values

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub = {
            k: kwargs[k] for k in ("revision", "cache_dir", "token", "local_files_only") if kwargs.get(k) is not None
        }
        config.origin = {"path": str(pretrained_model_name_or_path), "subfolder": subfolder, "kwargs": hub}
        return config

    def to_dict(self) -> dict:
        # Sets in order: a saved config, and with it its sha256, must not depend on the process's hash seed.
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in asdict(self).items()}
        del values["backend"]  # the next machine may not have it
        if self.rank_routing is None:  # as it was written before there was this option
            del values["rank_routing"]
        return values
