"""What differs between the versions of transformers and PEFT that this package runs with, in one place.

Each entry says when it can go. Nothing here imports the Trainer: `import hf_jumplora` stays light.
"""

import functools
import warnings
from importlib.metadata import version

from packaging.version import Version
from transformers.integrations import peft as native


TRANSFORMERS = Version(version("transformers"))
PEFT = Version(version("peft"))
PEFT_FOR_NATIVE = Version(native.MIN_PEFT_VERSION)  # what transformers' own add_adapter asks for

# Since 5.15 label smoothing weighs tokens alike over accumulation steps. Before, it takes the mean of each micro-batch,
# and the Trainer adds these up undivided. Goes when 5.15 is the lowest version.
SMOOTHS_BY_TOKENS = Version("5.15") <= TRANSFORMERS

# Since 5.19 a trainer class can declare how its loss is scaled. Goes when 5.19 is the lowest version.
DECLARES_SCALED_LOSS = Version("5.19") <= TRANSFORMERS

# 5.23 renamed an argument of the Trainer; v6 drops the old name. Goes when 5.23 is the lowest version.
CHECKPOINTING = "activation_checkpointing" if Version("5.23") <= TRANSFORMERS else "gradient_checkpointing"

# (library, its version, the first version that works, what fails below it); pip keeps to pyproject.toml, other ways of
# installing do not.
LOWEST = (
    ("transformers", TRANSFORMERS, Version("5.10"), "the penalty of a strategy is lost or counted twice"),
    ("peft", PEFT, Version("0.21"), "the tuner's hooks are not there"),
)


def warn_of_bad_versions() -> None:
    """One warning for a library that is older than what works."""
    bad = [f"{name} {found} ({why}; install {name}>={low})" for name, found, low, why in LOWEST if found < low]
    if bad:
        warnings.warn(f"hf_jumplora does not work with {' and '.join(bad)}", stacklevel=3)


def refuse_native_adapters(config_class: type) -> None:
    """Say what to do where `model.add_adapter(config)` of transformers wants a PEFT that is not installed.

    transformers 5.24 asks for PEFT 0.22, and its own message for a release that may not exist. Only configs of
    `config_class` are refused here. Goes when PEFT 0.22 is the lowest version.
    """
    if PEFT_FOR_NATIVE <= PEFT:
        return
    add_adapter = native.PeftAdapterMixin.add_adapter

    @functools.wraps(add_adapter)
    def refuse(self, adapter_config, *args, **kwargs):
        if isinstance(adapter_config, config_class):
            raise ImportError(
                f"model.add_adapter of transformers {TRANSFORMERS} needs PEFT {PEFT_FOR_NATIVE} (installed: {PEFT}). "
                "Use peft.get_peft_model(model, config), which works, or transformers before 5.24"
            )
        return add_adapter(self, adapter_config, *args, **kwargs)

    native.PeftAdapterMixin.add_adapter = refuse  # type: ignore[method-assign]
