"""The methods people compare, by name: how adapters follow one another, with which config and strategies."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from .strategies import (
    L2,
    Drift,
    Ella,
    Ewc,
    Gorp,
    ILora,
    KFac,
    Lwf,
    Migu,
    NLora,
    NullSpace,
    OLora,
    Osf,
    Replay,
    Slao,
    Strategy,
)
from .tuner import JumpLoraConfig


@dataclass(frozen=True)
class Method:
    """One row of the table.

    mode: "incremental" trains a new adapter on top of the frozen earlier ones; "sequential" trains one adapter on and
    on; "separate" trains each task's adapter on the base model alone and evaluates each task with its own (the task id
    is given: the oracle); "joint" trains one adapter on all tasks at once (the upper bound, not a continual method).
    adapter: fields of [`JumpLoraConfig`] that the method prescribes; all others are the user's.
    defaults: fields that it sets where the user's are None.
    """

    mode: Literal["incremental", "sequential", "separate", "joint"]
    adapter: dict = field(default_factory=dict)
    strategies: tuple[Callable[[], Strategy], ...] = ()
    paper: str = ""
    defaults: dict = field(default_factory=dict)

    def adapter_config(self, given: JumpLoraConfig | None) -> JumpLoraConfig:
        """The config of the method's adapters, from the user's."""
        if given is not None and not isinstance(given, JumpLoraConfig):
            raise ValueError(f"adapter_config is a JumpLoraConfig (gate=False: plain LoRA), got {type(given).__name__}")
        config = dataclasses.replace(given or JumpLoraConfig(), **self.adapter)
        missing = {name: value for name, value in self.defaults.items() if getattr(config, name) is None}
        return dataclasses.replace(config, **missing)


METHODS: dict[str, Method] = {
    "seqlora": Method("sequential", {"gate": False}, paper="baseline (arXiv 2310.14152, table 1)"),
    "inclora": Method("incremental", {"gate": False}, paper="baseline (arXiv 2310.14152, table 1)"),
    "perlora": Method("separate", {"gate": False}, paper="one LoRA a task, task id given: the oracle"),
    "jumplora": Method("incremental", {"gate": True}, paper="JumpLoRA (arXiv 2604.16171)"),
    "ella": Method("incremental", {"gate": False}, (Ella,), paper="ELLA (arXiv 2601.02232)"),
    "jumplora-ella": Method("incremental", {"gate": True}, (Ella,), paper="ELLA + JumpLoRA (arXiv 2604.16171)"),
    "jumplora-hard": Method(
        "incremental",
        {"gate": True, "isolation": "hard", "threshold_update": "density"},
        paper="JumpLoRA, off the earlier tasks' entries (ours)",
    ),
    "migu": Method("incremental", {"gate": False}, (Migu,), paper="MIGU (arXiv 2406.17245)"),
    "gorp": Method("incremental", {"gate": False}, (Gorp,), paper="GORP (arXiv 2507.02503)"),
    "nullspace": Method("incremental", {"gate": False}, (NullSpace,), paper="Brainstacks (arXiv 2604.01152)"),
    "slao": Method("sequential", {"gate": False}, (Slao,), paper="SLAO (arXiv 2512.23017)"),
    "osf": Method("incremental", {"gate": False}, (Osf,), paper="OSF, Sculpting Subspaces (arXiv 2504.07097)"),
    "olora": Method("incremental", {"gate": False}, (OLora,), paper="O-LoRA (arXiv 2310.14152)"),
    "nlora": Method("incremental", {"gate": False}, (NLora,), paper="N-LoRA (arXiv 2410.10179)"),
    "l2": Method("sequential", {"gate": False}, (L2,), paper="baseline: distance to the adapter before"),
    "ewc": Method("sequential", {"gate": False}, (Ewc,), paper="EWC (arXiv 1612.00796), online (arXiv 1805.06370)"),
    "lwf": Method("incremental", {"gate": False}, (Lwf,), paper="LwF (arXiv 1606.09282)"),
    "replay": Method("sequential", {"gate": False}, (Replay,), paper="baseline (arXiv 2310.14152, table 1)"),
    "ilora": Method("sequential", {"gate": False}, (ILora,), paper="I-LoRA (arXiv 2402.18865)"),
    "drift": Method("incremental", {"gate": False}, (Drift,), paper="kfac without its output factor (ours)"),
    "kfac": Method("incremental", {"gate": False}, (KFac,), paper="Kronecker-factored Laplace (arXiv 1805.07810)"),
    "jumplora-kfac": Method("incremental", {"gate": True}, (KFac,), paper="arXiv 1805.07810 + JumpLoRA"),
    "jumplora-best": Method(
        "incremental",
        {"gate": True, "threshold_update": "density"},
        (partial(KFac, memory=64),),
        paper="held density and low-rank curvature (ours, docs/study.md)",
        defaults={"target_density": 0.3},
    ),
    "mtl": Method("joint", {"gate": False}, paper="multi-task learning, the upper bound"),
}


def get_method(name: str) -> Method:
    """The row of a method. Raises ValueError that lists the known names."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]
