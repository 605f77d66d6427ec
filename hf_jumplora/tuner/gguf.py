"""Bases that transformers loaded from a GGUF file."""

from typing import Any


def as_plain_floats(model: Any) -> Any:
    """The same model, without the marks of a quantised one if it was unpacked from a GGUF file.

    transformers unpacks the blocks into ordinary float weights and still calls the model quantised, so that it can be
    neither trained nor saved. Any other model is returned as it is.

    Raises:
        ValueError: the weights are still packed in GGUF blocks, which no gradient passes.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or quantizer.quantization_config.quant_method != "gguf":
        return model
    for name, module in model.named_modules():
        if type(module).__name__.startswith("Gguf"):
            raise ValueError(
                f"{name} of the base is packed in GGUF blocks, which cannot be trained on: load it with "
                "quantization_config=GgufConfig(dequantize=True)"
            )
    quantizer.remove_quantization_config(model)
    return model
