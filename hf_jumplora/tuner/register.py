"""Makes PEFT know the method. Runs when `hf_jumplora.tuner` is imported; a second run changes nothing."""

from peft import mapping

from .config import JumpLoraConfig, JumpLoraPeftType
from .model import JumpLoraModel


def register() -> None:
    """Write the three mappings by which PEFT finds config, tuner and parameter prefix of a method.

    `peft.register_peft_method` only accepts members of the closed enum `PeftType`; a str-Enum member of our own hashes
    like its string and is found everywhere PEFT looks (docs/decisions.md).

    Raises:
        RuntimeError: PEFT already has a method of this name that is not ours.
    """
    key = JumpLoraPeftType.JUMPLORA
    current = mapping.PEFT_TYPE_TO_CONFIG_MAPPING.get(key)  # type: ignore[call-overload]
    if current not in (None, JumpLoraConfig):
        raise RuntimeError(f"peft already has a method JUMPLORA ({current}); uninstall the other package")
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[key] = JumpLoraConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[key] = JumpLoraModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[key] = "jumplora_"  # type: ignore[index]
