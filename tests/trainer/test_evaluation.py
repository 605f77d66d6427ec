"""Evaluation of text tasks against the slowest way to do it: one row, one label at a time, no padding, no cache."""

import copy
import itertools

import pytest
import torch
import toy
from peft import get_peft_model
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from hf_jumplora import JumpLoraConfig, LanguageModelTask, TextTask
from hf_jumplora.data import Encoder
from hf_jumplora.metrics.text import fold, rouge_l
from hf_jumplora.trainer import evaluate_task, scoring
from hf_jumplora.trainer.scoring import evaluate_text, generate_answers, score_labels


# One to three tokens, and one label that starts like another: the end of sequence decides.
LABELS = ["tiny", "very dark", "very dark new", "huge slow fast", "wild"]
ADAPTED = {"causal": ["q_proj"], "seq2seq": ["q"], "gpt2": ["c_attn"], "bf16": ["q_proj"]}
TEXTS = ["the cat", "very very new dog", "bee", "the elk = : | fox gnu hen ant", "hen", "new bee cat", "gnu the"]


@pytest.fixture(scope="module", params=["causal", "seq2seq", "gpt2", "bf16"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, toy_base, toy_t5):
    if kind == "gpt2":  # learned positions: wrong with left padding unless they are passed
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, eos_token_id=1, bos_token_id=1, **sizes)).eval()
    model = toy.load_base(toy_t5 if kind == "seq2seq" else toy_base).eval()
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():  # a random model prefers one label for every prompt; a wilder one does not
        p.data.add_(0.3 * torch.randn(p.shape, generator=generator) * (p.dim() > 1))
    return model.to(torch.bfloat16) if kind == "bf16" else model


@pytest.fixture(scope="module")
def encoder(kind):
    return Encoder(toy.tokenizer(), 64, seq2seq=kind == "seq2seq")


@pytest.fixture
def task():
    rows = [{"sentence": text, "label": LABELS[i % len(LABELS)]} for i, text in enumerate(TEXTS)]
    return TextTask("a", rows, rows, labels=LABELS, instruction="size", prompt=toy.PROMPT)


@torch.no_grad()
def log_likelihood(model, encoder, prompt, answer):
    prompt, answer = torch.tensor([prompt]), torch.tensor([answer])
    if encoder.seq2seq:
        logits = model(input_ids=prompt, labels=answer).logits
    else:
        logits = model(torch.cat([prompt, answer], 1)).logits[:, prompt.shape[1] - 1 : -1]
    return logits.float().log_softmax(-1).gather(-1, answer[..., None]).sum().item()


def test_score_is_the_label_of_highest_likelihood(model, encoder, task, kind):
    """Of any two labels, for prompts and labels of different lengths in one batch; end of sequence included."""
    prompts = [encoder.prompt_ids(task, text) for text in TEXTS]
    assert len({len(p) for p in prompts}) > 3
    scores = {x: [log_likelihood(model, encoder, p, encoder.answer_ids(task, x)) for p in prompts] for x in LABELS}
    compared = 0
    for a, b in itertools.permutations(LABELS, 2):
        task.labels = [a, b]
        for found, x, y in zip(score_labels(model, encoder, task, prompts), scores[a], scores[b], strict=True):
            if abs(x - y) > (0.3 if kind == "bf16" else 1e-3):  # else rounding decides
                assert found == (a if x > y else b)
                compared += 1
    assert compared > 100
    task.labels = LABELS
    for found, *row in zip(score_labels(model, encoder, task, prompts), *scores.values(), strict=True):
        assert row[LABELS.index(found)] > max(row) - (0.3 if kind == "bf16" else 1e-3)


def test_score_with_labels_of_one_token(model, encoder, task):
    """Nothing is left to feed after the first token but the end of sequence."""
    task.labels = ["tiny", "wild", "pale"]
    prompts = [encoder.prompt_ids(task, text) for text in TEXTS]
    best = [
        max(task.labels, key=lambda x, p=p: log_likelihood(model, encoder, p, encoder.answer_ids(task, x)))
        for p in prompts
    ]
    found = score_labels(model, encoder, task, prompts)
    assert sum(a == b for a, b in zip(found, best, strict=True)) >= (6 if model.dtype == torch.bfloat16 else 7)


def test_generate_is_greedy(model, encoder, task):
    """As far as the longest label, each prompt as if it were alone."""
    if model.dtype == torch.bfloat16:
        pytest.skip("ties between logits fall another way in another batch")
    prompts = [encoder.prompt_ids(task, text) for text in TEXTS]
    longest = max(len(encoder.answer_ids(task, label)) for label in LABELS)
    expected = []
    for prompt in prompts:
        ids, decoder, new = torch.tensor([prompt]), torch.tensor([[0]]), []
        while len(new) < longest and 1 not in new:
            with torch.no_grad():
                output = model(ids, decoder_input_ids=decoder) if encoder.seq2seq else model(ids)
            new.append(int(output.logits[0, -1].argmax()))
            ids = ids if encoder.seq2seq else torch.cat([ids, torch.tensor([new[-1:]])], 1)
            decoder = torch.cat([decoder, torch.tensor([new[-1:]])], 1)
        expected.append(encoder.tokenizer.decode(new, skip_special_tokens=True))
    assert len(set(expected)) > 1
    assert generate_answers(model, encoder, task, prompts) == expected


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"min_length": 60},
        {"min_new_tokens": 3},
        {"suppress_tokens": [*range(3, 90)]},
        {"forced_eos_token_id": 3},
        {"forced_bos_token_id": 5},
        {"bad_words_ids": [[word] for word in range(3, 90)]},
        {"num_beams": 3, "length_penalty": 9.0},
        {"do_sample": True, "temperature": 50.0},
        {"max_length": 3, "eos_token_id": [*range(96)]},
    ],
    ids=lambda option: next(iter(option)),
)
def test_greedy_whatever_the_base_says(option, model, encoder, task, kind):
    """Its generation_config decides the tokens that end an answer, and is as it was afterwards; with an adapter too."""
    if kind == "bf16":
        pytest.skip("as causal")
    prompts = [encoder.prompt_ids(task, text) for text in TEXTS]
    plain, kept = generate_answers(model, encoder, task, prompts), copy.deepcopy(model.generation_config)
    adapted = get_peft_model(model, JumpLoraConfig(r=2, target_modules=ADAPTED[kind]))
    try:
        for name, value in option.items():
            setattr(model.generation_config, name, value)
        for asked in (model, adapted):
            found = generate_answers(asked, encoder, task, prompts)
            if "eos_token_id" not in option:
                assert found == plain
            else:  # each answer ends at once
                assert all(len(answer.split()) <= 1 for answer in found)
        assert all(getattr(model.generation_config, name) == value for name, value in option.items())
    finally:
        adapted.unload()
        model.generation_config = kept


@pytest.mark.parametrize("window", [None, 4])
def test_labels_share_the_keys_of_the_prompt(window, monkeypatch, task):
    """The cache is not copied once a label, and no label sees another one's keys."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=96, num_key_value_heads=2, sliding_window=window, initializer_range=0.5, **sizes)
    model, encoder = MistralForCausalLM(config).eval(), Encoder(toy.tokenizer(), 64, seq2seq=False)
    prompts = [encoder.prompt_ids(task, text) for text in TEXTS]
    answers = [encoder.answer_ids(task, label) for label in LABELS]
    expected = scoring._score_whole(model, encoder, prompts, answers)
    copied, copy_of = [], torch.Tensor.__deepcopy__
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", lambda t, memo: copied.append(t.ndim) or copy_of(t, memo))
    torch.testing.assert_close(scoring._score_on_cache(model, encoder, prompts, answers), expected)
    assert not any(copied)  # but for a window's size, which is a tensor too


def test_score_without_a_cache(monkeypatch):
    """A state space model's cache takes one token at a time: labels of several tokens run with their prompts."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "initializer_range": 0.5}
    model = MambaForCausalLM(MambaConfig(vocab_size=96, pad_token_id=0, eos_token_id=1, **sizes)).eval()
    encoder = Encoder(toy.tokenizer(), 64, seq2seq=False)
    rows = [{"sentence": text, "label": LABELS[0]} for text in TEXTS]
    task = TextTask("a", rows, rows, labels=LABELS, instruction="size", prompt=toy.PROMPT)
    prompts = [encoder.prompt_ids(task, text) for text in TEXTS]
    answers = [encoder.answer_ids(task, label) for label in LABELS]
    scores = [torch.tensor([log_likelihood(model, encoder, p, answer) for p in prompts]) for answer in answers]
    used, find = [], scoring._score_whole
    monkeypatch.setattr(scoring, "_score_whole", lambda *given: used.append(find(*given)) or used[-1])
    assert score_labels(model, encoder, task, prompts) == [LABELS[i] for i in torch.stack(scores).argmax(0)]
    torch.testing.assert_close(used, [scores], rtol=1e-4, atol=1e-4)
    assert len(generate_answers(model, encoder, task, prompts)) == len(TEXTS)


@pytest.mark.parametrize("mode", ["generate", "score"])
def test_free_answers_are_generated(mode, model, encoder):
    """There are no labels to choose from; the score is the mean of the task's metric."""
    rows = [{"sentence": text, "label": "very new " * (i % 3 + 1)} for i, text in enumerate(TEXTS)]
    task = TextTask("a", rows, rows, metric="rouge_l", prompt="{text} =", max_answer=6)
    prompts = [encoder.prompt_ids(task, text) for text in TEXTS]
    answers = [generate_answers(model, encoder, task, [prompt])[0] for prompt in prompts]
    expected = sum(rouge_l(answer, row["label"]) for answer, row in zip(answers, rows, strict=True)) / len(rows)
    found = evaluate_task(model, encoder, task, mode, batch_size=1)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 12])
def test_plain_text(batch_size, model, encoder, kind):
    """Every token counts the same, against each piece alone in float64; longer texts are split."""
    if kind in ("seq2seq", "bf16"):
        pytest.skip("a causal model, without rounding")
    short = Encoder(encoder.tokenizer, 5, False)
    task = LanguageModelTask("a", None, [{"text": text} for text in TEXTS], held_out=True)
    hits, loss, tokens = 0, 0.0, 0
    for piece in short.pieces(TEXTS):
        with torch.no_grad():
            logits = model(torch.tensor([piece])).logits[0, :-1].double()
        targets = torch.tensor(piece[1:])
        hits += int((logits.argmax(-1) == targets).sum())
        loss -= logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item()
        tokens += len(targets)
    assert tokens > len(TEXTS) * 2
    accuracy, cross_entropy = evaluate_text(model, short, task, batch_size)
    assert accuracy == pytest.approx(hits / tokens)
    assert cross_entropy == pytest.approx(loss / tokens, rel=1e-5)


def test_plain_text_of_nothing(model, encoder):
    with pytest.raises(ValueError, match="no eval text has two tokens"):
        evaluate_text(model, encoder, LanguageModelTask("a", None, [{"text": ""}], held_out=True))


@pytest.mark.parametrize(("labels", "batch_size"), [(LABELS, 3), (LABELS, 1), (LABELS[:1], 4)])
def test_sequences_at_once(labels, batch_size, model, encoder, task):
    """`per_device_eval_batch_size` on a CPU, whatever the number of labels."""
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs.get("input_ids", kwargs.get("labels")))), with_kwargs=True
    )
    try:
        task.labels, task.eval_dataset = labels, [{**row, "label": labels[0]} for row in task.eval_dataset]
        evaluate_task(model, encoder, task, "score", batch_size)
    finally:
        hook.remove()
    assert max(sizes) == batch_size


def test_batches_by_tokens():
    """Elsewhere than on a CPU as many rows as have about so many tokens with padding; a longer one passes alone."""
    sizes, gpu = {0: 100, 1: 10, 2: 90, 3: 12, 4: 11, 5: 5000, 6: 100}, torch.device("cuda")
    assert scoring._batches(sizes, 2, torch.device("cpu")) == [[1, 4], [3, 2], [0, 6], [5]]
    assert scoring._batches(sizes, 2, gpu, 50) == [[1, 4, 3], [2], [0], [6], [5]]
    assert scoring._batches(sizes, 2, gpu) == [[1, 4, 3, 2, 0, 6], [5]]
    assert scoring._batches(dict.fromkeys(range(100), 100), 2, gpu)[0] == [*range(40)]


# ---- counting ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_each_row_counts_once_and_for_itself(batch_size, monkeypatch, model, encoder, task):
    """Rows are sorted by length for the batches; the answers must find their way back."""
    by_prompt = {tuple(encoder.prompt_ids(task, text)): LABELS[i % 5] for i, text in enumerate(TEXTS)}
    by_prompt[tuple(encoder.prompt_ids(task, TEXTS[2]))] = "nonsense"

    def answers(model, encoder, task, prompts):
        assert len(prompts) <= batch_size
        assert not model.training
        return [f"  {by_prompt[tuple(p)].upper()}\n " for p in prompts]  # case and spaces do not count

    monkeypatch.setattr(scoring, "generate_answers", answers)
    model.train()
    assert evaluate_task(model, encoder, task, "generate", batch_size) == 6 / 7
    assert model.training  # as it was
    model.eval()


def test_fold():
    assert fold(" Science  or\tTechnology\n") == fold("science or technology")
    assert fold("a b") != fold("ab")


def test_unknown_mode(model, encoder, task):
    with pytest.raises(KeyError):
        evaluate_task(model, encoder, task, "guess")
