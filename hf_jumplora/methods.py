"""The methods people compare, by name: how adapters follow one another, with which config and strategies.

Another package adds a method under the entry-point group `hf_jumplora.methods` (docs/new-method.md).
"""

import contextlib
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from typing import Any, Literal

import yaml

from .strategies import (
    L2,
    Boost,
    CoDyRA,
    Dps,
    Drift,
    DyLora,
    Ella,
    Ewc,
    Gorp,
    ILora,
    KFac,
    LoraGA,
    LoraSB,
    Lwf,
    Migu,
    Mora,
    NLora,
    NullSpace,
    OLora,
    Osf,
    Replay,
    Sema,
    Slao,
    SMoRA,
    SoRA,
    Squeeze,
    Strategy,
)
from .tuner import JumpLoraConfig


# Fields of JumpLoraConfig that mean nothing without a gate.
GATE_OPTIONS = frozenset((
    "threshold_scope", "threshold_update", "threshold_grad", "initial_density", "target_density", "density_schedule",
    "density_pattern", "bandwidth", "gate_start", "gate_end", "isolation",
))  # fmt: skip


@dataclass(frozen=True)
class Method:
    """One continual-learning method.

    Args:
        mode: "incremental" trains a new adapter on top of the frozen earlier ones; "sequential" trains one adapter
            through all tasks; "separate" trains each task's adapter on the base model alone and evaluates each task
            with its own (the task id is given: the oracle); "joint" trains one adapter on all tasks at once (the upper
            bound, not a continual method).
        adapter: fields of [`JumpLoraConfig`] that the method prescribes: another value of the user's is refused.
        strategies: classes, or other callables without required arguments, that make the method's strategies.
        paper: where the method was published.
        defaults: fields of [`JumpLoraConfig`] that it sets where the user did not.
        name: what the method is called in a stack and on the command line. Those of `METHODS` and of entry points get
            the name under which they are registered.
    """

    mode: Literal["incremental", "sequential", "separate", "joint"]
    adapter: dict = field(default_factory=dict)
    strategies: tuple[Callable[[], Strategy], ...] = ()
    paper: str = ""
    defaults: dict = field(default_factory=dict)
    name: str = ""

    def adapter_config(self, given: JumpLoraConfig | dict[str, Any] | None) -> JumpLoraConfig:
        """The config of the method's adapters, from the user's config or options.

        Raises:
            ValueError: the user gives an option another value than the method prescribes, or one of the gate to a
                method that has none; the message names both.
        """
        if given is not None and not isinstance(given, (JumpLoraConfig, dict)):
            raise ValueError(f"adapter_config is a JumpLoraConfig (gate=False: plain LoRA), got {type(given).__name__}")
        start = given if isinstance(given, JumpLoraConfig) else JumpLoraConfig()
        if isinstance(given, dict):
            named = {name: value for name, value in given.items() if value is not None}
        else:
            named = {name: getattr(start, name) for name in start.given}
        for name, value in self.adapter.items():
            if named.get(name, value) != value:
                raise ValueError(
                    f"method {self.name!r} prescribes {name}={value!r}, and {name}={named[name]!r} is given: leave it "
                    "out, or choose another method"
                )
        options = {name: value for name, value in self.defaults.items() if name not in named} | self.adapter
        if {"threshold_update": "learned", **named, **options}["threshold_update"] != "density":
            options.pop("target_density", None)  # of a threshold that is held
        if not self.adapter.get("gate", named.get("gate", True)):
            for name in GATE_OPTIONS & named.keys():
                if named[name] != getattr(JumpLoraConfig(), name):
                    raise ValueError(
                        f"method {self.name!r} has no gate, and {name}={named[name]!r} is one's: leave it out"
                    )
        config = dataclasses.replace(start, **{**named, **options})
        config.given = frozenset(named)
        return config

    def make_strategies(self, given: "Sequence[Strategy | str] | None" = None) -> list[Strategy]:
        """The strategies of a run.

        Args:
            given: None for the method's own with their defaults; "name.option=value", ... for its own with these
                options (values are read as YAML: 50, 0.5, per_task, true); [`Strategy`] objects replace its own.

        Raises:
            ValueError: an option is not of this form, or no strategy of the method has it, or not with this value.
        """
        if isinstance(given, str):
            given = [given]
        if given is not None and not (given and all(isinstance(option, str) for option in given)):
            return list(given)  # type: ignore[arg-type]  # none, or objects: a run checks them
        makes = {strategy_name(make): make for make in self.strategies}
        options: dict[str, dict[str, Any]] = {name: {} for name in makes}
        for option in given or ():
            name, key, value = self._parse(str(option), makes)
            options[name][key] = value
        made = []
        for name, make in makes.items():
            try:
                made.append(make(**options[name]))
            except TypeError as error:  # compared with a number
                raise ValueError(
                    f"strategy options {options[name]} of {name}: a value has the wrong type ({error})"
                ) from error
        return made

    def _parse(self, option: str, makes: dict[str, Any]) -> tuple[str, str, Any]:
        name, dot, rest = option.partition(".")
        key, equals, text = rest.partition("=")
        if not (dot and equals):
            raise ValueError(f"strategy option {option!r}: write NAME.OPTION=VALUE, for example kfac.weight=50")
        if name not in makes:
            known = ", ".join(makes) or "no strategies"
            raise ValueError(f"strategy option {option!r}: method {self.name!r} has {known}")
        strategy = makes[name]()
        fields = [f.name for f in dataclasses.fields(strategy) if f.init] if dataclasses.is_dataclass(strategy) else []
        if key not in fields:
            raise ValueError(f"strategy option {option!r}: {name} has the options {', '.join(fields) or 'none'}")
        value = yaml.safe_load(text)
        if isinstance(value, str):  # YAML takes 3e4 for a string
            with contextlib.suppress(ValueError):
                value = float(value)
        return name, key, value


def strategy_name(make: Callable[..., Strategy]) -> str:
    """What a strategy is called in its options: its class's name in lower case."""
    return (make.func if isinstance(make, partial) else make).__name__.lower()


_TABLE: dict[str, Method] = {
    "seqlora": Method("sequential", {"gate": False}, paper="baseline (arXiv 2310.14152, table 1)"),
    "inclora": Method("incremental", {"gate": False}, paper="baseline (arXiv 2310.14152, table 1)"),
    "perlora": Method("separate", {"gate": False}, paper="one LoRA per task, task id given: the oracle"),
    "jumplora": Method("incremental", {"gate": True}, paper="JumpLoRA (arXiv 2604.16171)"),
    "ella": Method("incremental", {"gate": False}, (Ella,), paper="ELLA (arXiv 2601.02232)"),
    "jumplora-ella": Method("incremental", {"gate": True}, (Ella,), paper="ELLA + JumpLoRA (arXiv 2604.16171)"),
    "jumplora-hard": Method(
        "incremental",
        {"gate": True, "isolation": "hard"},
        paper="JumpLoRA, off the earlier tasks' entries (ours)",
        defaults={"threshold_update": "density"},
    ),
    "migu": Method("incremental", {"gate": False}, (Migu,), paper="MIGU (arXiv 2406.17245)"),
    "gorp": Method("incremental", {"gate": False}, (Gorp,), paper="GORP (arXiv 2507.02503)"),
    "nullspace": Method("incremental", {"gate": False}, (NullSpace,), paper="Brainstacks (arXiv 2604.01152)"),
    "slao": Method("sequential", {"gate": False}, (Slao,), paper="SLAO (arXiv 2512.23017)"),
    "osf": Method("incremental", {"gate": False}, (Osf,), paper="OSF, Sculpting Subspaces (arXiv 2504.07097)"),
    "olora": Method("incremental", {"gate": False}, (OLora,), paper="O-LoRA (arXiv 2310.14152)"),
    "nlora": Method("incremental", {"gate": False}, (NLora,), paper="N-LoRA (arXiv 2410.10179)"),
    "l2": Method("sequential", {"gate": False}, (L2,), paper="baseline: distance to the adapter before"),
    "sora": Method("incremental", {"gate": False}, (SoRA,), paper="SoRA (arXiv 2311.11696)"),
    "codyra": Method("incremental", {"gate": False}, (CoDyRA,), paper="CoDyRA (arXiv 2412.01004)"),
    "dylora": Method("incremental", {"gate": False}, (DyLora,), paper="DyLoRA (arXiv 2210.07558)"),
    "lora-sb": Method("incremental", {"gate": False}, (LoraSB,), paper="LoRA-SB (arXiv 2411.19557)"),
    "lora-ga": Method("incremental", {"gate": False}, (LoraGA,), paper="LoRA-GA (arXiv 2407.05000)"),
    "lora-squeeze": Method("incremental", {"gate": False}, (Squeeze,), paper="LoRA-Squeeze (arXiv 2602.10993)"),
    "boost": Method("incremental", {"gate": False}, (Boost,), paper="Brainstacks (arXiv 2604.01152)"),
    "dps": Method("incremental", {"gate": False}, (Dps,), paper="ScaleZero (arXiv 2509.07945)"),
    "sema": Method("incremental", {"gate": False}, (Sema,), paper="SEMA (arXiv 2403.18886)"),
    "mora": Method("incremental", {"gate": False}, (Mora,), paper="MoRA, now MoRAM (arXiv 2506.21035)"),
    "smora": Method("incremental", {"gate": False}, (SMoRA,), paper="SMoRA (arXiv 2501.15103)"),
    "ewc": Method("sequential", {"gate": False}, (Ewc,), paper="EWC (arXiv 1612.00796), online (arXiv 1805.06370)"),
    "lwf": Method("incremental", {"gate": False}, (Lwf,), paper="LwF (arXiv 1606.09282)"),
    "replay": Method("sequential", {"gate": False}, (Replay,), paper="baseline (arXiv 2310.14152, table 1)"),
    "ilora": Method("sequential", {"gate": False}, (ILora,), paper="I-LoRA (arXiv 2402.18865)"),
    "drift": Method("incremental", {"gate": False}, (Drift,), paper="kfac without its output factor (ours)"),
    "kfac": Method("incremental", {"gate": False}, (KFac,), paper="Kronecker-factored Laplace (arXiv 1805.07810)"),
    "jumplora-kfac": Method("incremental", {"gate": True}, (KFac,), paper="arXiv 1805.07810 + JumpLoRA"),
    "jumplora-best": Method(
        "incremental",
        {"gate": True},
        (partial(KFac, memory=64),),
        paper="held density and low-rank curvature (ours, docs/study.md)",
        defaults={"threshold_update": "density", "target_density": 0.3},
    ),
    "jumplora-best-lwf": Method(
        "incremental",
        {"gate": True},
        (partial(KFac, memory=64), partial(Lwf, mask_target=True)),
        paper='jumplora-best + "Mask the Target" (arXiv 2605.29498)',
        defaults={"threshold_update": "density", "target_density": 0.3},
    ),
    "mtl": Method("joint", {"gate": False}, paper="multi-task learning, the upper bound"),
}


METHODS = {name: dataclasses.replace(method, name=name) for name, method in _TABLE.items()}
ENTRY_POINTS = "hf_jumplora.methods"


def method_names() -> list[str]:
    """The names that [`get_method`] knows: of this package and of the entry points of installed ones."""
    return list(dict.fromkeys([*METHODS, *(entry.name for entry in entry_points(group=ENTRY_POINTS))]))


def get_method(method: str | Method) -> Method:
    """A method by its name in `METHODS`, or that of an entry point `hf_jumplora.methods`; a [`Method`] as it is.

    Raises:
        ValueError: the name is unknown (the known ones are listed); a [`Method`] has no name, or that of another one.
    """
    if isinstance(method, Method):
        if not method.name:
            raise ValueError("a Method given as an object needs a name, under which its stacks are known: name='...'")
        if METHODS.get(method.name, method) != method:
            raise ValueError(f"{method.name!r} is the name of another method: give this one a name of its own")
        return method
    if method in METHODS:
        return METHODS[method]
    for entry in entry_points(group=ENTRY_POINTS, name=method):
        found = entry.load()
        if not isinstance(found, Method):
            raise ValueError(f"entry point {method!r} = {entry.value!r} of {ENTRY_POINTS} is not a Method: {found!r}")
        return dataclasses.replace(found, name=method)
    close = difflib.get_close_matches(method, method_names(), 1)
    raise ValueError(
        f"unknown method {method!r}{f' (did you mean {close[0]!r}?)' if close else ''}; known: "
        f"{', '.join(method_names())}. A method of another package is found when "
        f"that package is installed (entry points {ENTRY_POINTS})"
    )
