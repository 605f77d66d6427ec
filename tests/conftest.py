"""Shared by all tests: one thread, the numbers of the published code, and models of a few thousand parameters."""

import functools
import gc
import json
import os
import platform
import sys
from pathlib import Path


# Before torch is imported. The published numbers are those of a processor with AVX2: with AVX512 other sums round to
# the other side of a threshold, and in three of 40 steps ELLA's penalty has one entry more or less (up to 1.7 % of it).
if platform.machine() in ("x86_64", "AMD64"):
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")

import jinja2
import pytest
import torch
from safetensors.torch import load_file


# A toy run writes 40 files and seven cards: a fifth of its time went into waiting for the disk (only a power cut needs
# that) and into compiling the same two templates again.
os.fsync = lambda handle: None
jinja2.Template = functools.cache(jinja2.Template)

GOLDEN = Path(__file__).parent / "golden"
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # counting, launches
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: longer than a few seconds")


@pytest.fixture(scope="module", autouse=True)
def _collect_little():
    """The Trainer collects garbage at its end: 0.1 s each time over whatever was imported until then."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def golden():
    """golden.json, and `golden["load"](name)` for a file beside it."""
    return {**json.loads((GOLDEN / "golden.json").read_text()), "load": lambda name: load_file(GOLDEN / name)}


@pytest.fixture(scope="session")
def relative_error():
    """|| a - b ||_F / || b ||_F in float64."""

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        assert a.shape == b.shape
        return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()

    return error


@pytest.fixture
def tiny_llama():
    """Makes a Llama of two layers and width 32; the same weights every time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype=torch.float32, seed=0, **options):
        sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **options})).to(dtype)

    return make


@pytest.fixture
def ids():
    """Token ids [2, 10]."""
    return torch.randint(0, 96, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gated(tiny_llama):
    """Makes a PeftModel on the tiny Llama, in evaluation mode; f = 1 and a tenth of the entries kept unless told."""
    from peft import get_peft_model

    from hf_jumplora.tuner import JumpLoraConfig, set_mix, set_threshold

    def make(base=None, density=0.1, mix=1.0, **options):
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False, **options}
        base = tiny_llama() if base is None else base
        torch.manual_seed(1)
        model = get_peft_model(base, JumpLoraConfig(**options)).eval()
        if options.get("gate", True):
            set_threshold(model, "default", density)
            set_mix(model, "default", mix)
        return model

    return make


@pytest.fixture
def add_task():
    """Adds an adapter `default` on top of parents, ready to be finished."""
    from hf_jumplora.tuner import JumpLoraConfig, set_mix, set_threshold

    def add(model, parents=(), density=0.1, seed=2, **options):
        options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_weights": False, **options}
        torch.manual_seed(seed)
        model.add_adapter("default", JumpLoraConfig(parent_adapters=list(parents), **options))
        model.set_adapter("default")
        if options.get("gate", True):
            set_threshold(model, "default", density)
            set_mix(model, "default", 1.0)
        return model.eval()

    return add


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    """The folder of a random two-layer Llama with a word-level tokenizer (see toy.py)."""
    import toy

    return toy.save_base(tmp_path_factory.mktemp("toy_base"))


@pytest.fixture(scope="session")
def toy_t5(tmp_path_factory):
    """The folder of a random two-layer T5 with the same tokenizer."""
    import toy

    return toy.save_base(tmp_path_factory.mktemp("toy_t5"), seq2seq=True)


@pytest.fixture(scope="session")
def toy_run(toy_base, tmp_path_factory):
    """A finished JumpLoRA run over three toy tasks. Read only: copy `toy_run.output_dir` to change it."""
    import toy

    run = toy.make_run(toy_base, tmp_path_factory.mktemp("toy_run"))
    with toy.pictures():
        run.train()
    return run


@pytest.fixture
def hub():
    """A stand-in for the Hub with no repository in it (see hub/stand_in.py)."""
    from hub.stand_in import StandInHub

    with StandInHub() as hub:
        yield hub
