"""Make a tokenizer and a small Llama from any list of texts, pre-trained on the spot in about a minute on a CPU.

For demonstrations and tests that need a *pre-trained* causal language model but no download. The result is an ordinary
Hugging Face folder:

    path = build_tiny_llama(texts, "~/.cache/tiny_llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)

The model knows nothing beyond `texts`: use it to try out a training method, not to judge one. On a machine whose
cores are busy with something else, `torch.set_num_threads(1)` beforehand is much faster than two waiting threads.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .folder import whole_folder


BOS, EOS, PAD = "<s>", "</s>", "<pad>"
REPORT = "tiny_llama.json"


def build_tiny_llama(
    texts: list[str],
    cache_dir: str | os.PathLike[str],
    *,
    vocab_size: int = 1500,
    hidden_size: int = 96,
    layers: int = 3,
    heads: int = 4,
    steps: int = 600,
    batch_size: int = 8,
    seq_len: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> Path:
    """Return the folder of a small Llama trained on `texts`, below `cache_dir`; build it if it is not there.

    The folder's name is a hash of the texts and of all settings. It is written under a temporary name and then moved,
    so it is there whole or not at all. The same arguments give the same weights on the same machine and number of
    threads. `tiny_llama.json` beside the weights has the final loss and the seconds.
    """
    settings = dict(locals())
    del settings["texts"], settings["cache_dir"]
    cache_dir = Path(cache_dir).expanduser()
    told = json.dumps([texts, {**settings, "max_seconds": None}], sort_keys=True)  # an option that there once was
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    path = cache_dir / f"tiny-llama-{key}"
    if path.is_dir():
        report = json.loads((path / REPORT).read_text())
        print(f"tiny_llama: cached, {report['steps']} steps, loss {report['loss']}: {path}")
        return path

    tokenizer = train_tokenizer(texts, vocab_size, 4 * seq_len)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * math.ceil(hidden_size / 3),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max(512, 4 * seq_len),
        tie_word_embeddings=True,
        initializer_range=hidden_size**-0.5 / 2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    batches = packed_batches(tokenizer, texts, batch_size, seq_len, seed)
    report = pretrain(model, batches, steps, learning_rate)
    report |= {"parameters": model.num_parameters(), "texts": len(texts), "settings": settings}

    with whole_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return path


def train_tokenizer(texts: list[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `texts` that puts the BOS token in front, as Llama's does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # any text can be encoded
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )


def packed_batches(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], batch_size: int, seq_len: int, seed: int
) -> Iterator[torch.Tensor]:
    """Endless batches [batch_size, seq_len]: the texts end to end, in a new random order each epoch, cut in blocks."""
    documents = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(texts)["input_ids"]]
    generator = torch.Generator().manual_seed(seed)
    size = batch_size * seq_len
    pending: list[torch.Tensor] = []
    count = 0
    while True:
        for index in torch.randperm(len(documents), generator=generator).tolist():
            pending.append(documents[index])
            count += len(documents[index])
            if count >= size:
                tokens = torch.cat(pending)
                while len(tokens) >= size:
                    yield tokens[:size].view(batch_size, seq_len)
                    tokens = tokens[size:]
                pending, count = [tokens], len(tokens)


def pretrain(
    model: LlamaForCausalLM, batches: Iterator[torch.Tensor], steps: int, learning_rate: float
) -> dict[str, object]:
    """Train with AdamW, a linear warm-up over 5 % of the steps and a cosine down to zero; return what was done."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    start = time.perf_counter()
    smooth = math.nan
    print(f"tiny_llama: pre-training, {steps} steps", flush=True)  # a log file shows no progress bar
    with tqdm(total=steps, desc="pre-training", unit="step", disable=None) as bar:
        for step in range(steps):
            ids = next(batches)
            output = model(input_ids=ids, labels=ids, use_cache=False)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
            loss = output.loss.item()
            smooth = loss if step == 0 else 0.95 * smooth + 0.05 * loss
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            bar.update()
    model.eval()
    return {"steps": steps, "loss": round(smooth, 4), "seconds": round(time.perf_counter() - start, 1)}
