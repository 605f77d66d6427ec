"""Scores of a text task (the greedy answer, or the label of highest likelihood) and of plain text."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import GenerationConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..data import Encoder, LanguageModelTask, TextTask, pad_rows
from ..metrics.text import TEXT_METRICS, exact_match
from ..stack.load import merge_finished
from ..tuner import named_layers


TOKENS = 4096  # that pass through the model at once where it is not on a CPU, padding included


def evaluate_task(model: Any, encoder: Encoder, task: TextTask, mode: str = "generate", batch_size: int = 32) -> float:
    """Score in [0, 1] on the task's eval rows: the mean of [`score_rows`], which takes the same arguments."""
    scores = [score for _, score in score_rows(model, encoder, task, mode, batch_size)]
    return sum(scores) / len(scores)


@torch.no_grad()
def score_rows(
    model: Any, encoder: Encoder, task: TextTask, mode: str = "generate", batch_size: int = 32
) -> list[tuple[str, float]]:
    """(answer, its score in [0, 1]) of every eval row of a task, in their order: whether it is the label, or the task's
    metric where answers are free.

    mode: "generate" (greedy, exact match after lower-casing and white-space folding: the papers' metric) or "score"
    (the label with the largest log-likelihood given the prompt, end of sequence included). Free answers are generated
    in both. With several processes each takes a share of the rows, and all get the whole list.
    batch_size: sequences at once on a CPU, whatever the number of labels; elsewhere batches have about `TOKENS` tokens.
    """
    compare = TEXT_METRICS.get(task.metric, exact_match)
    if not task.labels:
        mode = "generate"
    predict = {"generate": generate_answers, "score": score_labels}[mode]
    was_training = model.training
    model.eval()
    rows, longest = task.eval_dataset, encoder.longest_answer(task)
    prompts = {i: encoder.prompt_ids(task, rows[i][task.text_column]) for i in share_of_rows(len(rows))}
    found: list[tuple[int, tuple[str, float]]] = []
    for batch in _batches({i: len(ids) + longest for i, ids in prompts.items()}, batch_size, model.device):
        answers = predict(model, encoder, task, [prompts[i] for i in batch])
        for i, answer in zip(batch, answers, strict=True):
            score = compare(answer, rows[i][task.label_column], rows[i][task.text_column])
            found.append((i, (answer, score)))
    model.train(was_training)
    return [result for _, result in sorted(dict(gather_object(found)).items())]


@torch.no_grad()
def evaluate_text(model: Any, encoder: Encoder, task: LanguageModelTask, batch_size: int = 32) -> tuple[float, float]:
    """(token accuracy in [0, 1], cross-entropy in nats per token) over the tokens of the task's eval texts, each given
    those before it in its piece of `max_length` tokens; every token counts the same.

    Raises:
        ValueError: no text has two tokens.
    """
    pieces = encoder.pieces(row[task.text_column] for row in task.eval_dataset)
    if not pieces:
        raise ValueError(f"task {task.name!r}: no eval text has two tokens")
    was_training = model.training
    model.eval()
    sizes, pad = {i: len(pieces[i]) for i in share_of_rows(len(pieces))}, _pad_token(encoder.tokenizer)
    found: list[tuple[int, tuple[int, float]]] = []
    # A quarter of the others' batches: the logits of every token are needed, not the last one's alone.
    for batch in _batches(sizes, max(1, batch_size // 4), model.device, TOKENS // 4):
        ids = pad_rows([pieces[i] for i in batch], pad).to(model.device)
        mask = pad_rows([[1] * len(pieces[i]) for i in batch], 0).to(ids.device)
        logits, targets, kept = model(input_ids=ids, attention_mask=mask).logits[:, :-1], ids[:, 1:], mask[:, 1:].bool()
        losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        hits = ((logits.argmax(-1) == targets) & kept).sum(1).tolist()
        found += zip(batch, zip(hits, (losses * kept).sum(1).tolist(), strict=True), strict=True)
    model.train(was_training)
    sums, tokens = dict(gather_object(found)).values(), sum(len(piece) - 1 for piece in pieces)
    return sum(hits for hits, _ in sums) / tokens, sum(loss for _, loss in sums) / tokens


def share_of_rows(rows: int) -> list[int]:
    """The rows of this process. Equal shares, because under ZeRO-3 all processes must run the model equally often:
    the last row may be there several times, and its results must count once."""
    state = PartialState()
    share = -(-rows // state.num_processes)
    return [min(i, rows - 1) for i in range(state.process_index * share, (state.process_index + 1) * share)]


def _batches(sizes: dict[int, int], at_once: int, device: torch.device, tokens: int = TOKENS) -> list[list[int]]:
    """Rows {number: tokens} in batches of rows of similar length, the shortest first: `at_once` rows on a CPU,
    elsewhere as many as have about `tokens` tokens when padded. Equally many in all processes."""
    batches: list[list[int]] = []
    for i in sorted(sizes, key=lambda i: sizes[i]):
        most = at_once if device.type == "cpu" else tokens // sizes[i]  # the longest so far
        if not batches or len(batches[-1]) >= most:
            batches.append([])
        batches[-1].append(i)
    return batches + batches[-1:] * (max(gather_object([len(batches)])) - len(batches))


@contextmanager
def own_adapter(model: Any, index: int):
    """The model as task number `index` knows it: its own adapter alone, or the base model when it has none yet."""
    name = f"task_{index:03d}"
    if not isinstance(model, PeftModel):
        yield
        return
    model.unmerge_adapter()
    if name in model.peft_config:
        model.set_adapter(name, inference_mode=True)
        merge_finished(model, [name])
        yield
    else:
        with model.disable_adapter():
            yield


def _pad_token(tokenizer) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _padded(encoder: Encoder, prompts: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    side = "right" if encoder.seq2seq else "left"  # an encoder with learned positions counts them from the left
    ids = pad_rows(prompts, _pad_token(encoder.tokenizer), side).to(device)
    return ids, pad_rows([[1] * len(p) for p in prompts], 0, side).to(device)


def generate_answers(model: Any, encoder: Encoder, task: TextTask, prompts: list[list[int]]) -> list[str]:
    """Greedy answers to a batch of prompts (token ids), as long as the task's longest answer at most."""
    ids, mask = _padded(encoder, prompts, model.device)
    with _greedy(model, encoder.tokenizer, encoder.longest_answer(task)) as config:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    new = out if encoder.seq2seq else out[:, ids.shape[1] :]
    return encoder.tokenizer.batch_decode(new, skip_special_tokens=True)


@contextmanager
def _greedy(model: Any, tokenizer: Any, longest: int) -> Iterator[GenerationConfig]:
    """Nothing else that the base's generation_config says has an effect inside (a repetition penalty, a minimum length,
    forced or suppressed tokens): `generate` takes from there whatever is not given."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    its = base.generation_config
    ends = its.eos_token_id if isinstance(its.eos_token_id, list) else [its.eos_token_id]
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=False, num_beams=1, pad_token_id=_pad_token(tokenizer),
        eos_token_id=sorted({tokenizer.eos_token_id, *ends} - {None}),
        bos_token_id=its.bos_token_id, decoder_start_token_id=its.decoder_start_token_id,
    )  # fmt: skip
    base.generation_config = config
    try:
        yield config
    finally:
        base.generation_config = its


@torch.no_grad()
def score_labels(model: Any, encoder: Encoder, task: TextTask, prompts: list[list[int]]) -> list[str]:
    """The likeliest label for each prompt: argmax over labels of log p(label, end of sequence | prompt).

    The prompts run through the model once, and the labels one after the other on their cache. Where there is none, or
    one that takes single tokens alone (a state space model's), each label runs with its prompts.
    """
    answers = [encoder.answer_ids(task, label) for label in task.labels]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if encoder.seq2seq:
        columns = _score_decoder(model, encoder, prompts, answers)
    else:
        cached = None if getattr(base, "_is_stateful", False) else _score_on_cache(model, encoder, prompts, answers)
        if cached is None and any(layer.task_weights is not None for _, layer in named_layers(model)):
            raise ValueError(
                "this model has no cache that its labels could share, and a router would read them with the prompt: "
                "score it with eval_mode='generate', or without route="
            )
        columns = _score_whole(model, encoder, prompts, answers) if cached is None else cached
    return [task.labels[i] for i in torch.stack(columns, 1).argmax(1).tolist()]


def _likelihood(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[prompts]: sum over tokens of log p(target); logits [prompts, tokens, vocabulary], targets [prompts, tokens],
    -100 is none."""
    log_p = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    return (log_p * (targets != -100)).sum(1)


def _score_decoder(model, encoder, prompts, answers) -> list[torch.Tensor]:
    """Of an encoder-decoder: the log-likelihood of each answer, [prompts] each."""
    ids, mask = _padded(encoder, prompts, model.device)
    hidden = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
    columns = []
    for answer in answers:
        targets = torch.tensor([answer], device=ids.device).expand(len(prompts), -1)
        logits = model(encoder_outputs=hidden, attention_mask=mask, labels=targets.contiguous()).logits
        columns.append(_likelihood(logits, targets))
    return columns


def _score_on_cache(model, encoder, prompts, answers) -> list[torch.Tensor] | None:
    """As [`_score_decoder`], of a causal model; None if it returns no cache."""
    known = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # as it was called before transformers 5.24

    def options(positions, **more):
        """What not every model takes: positions (else worked out from the mask), logits of the last token alone."""
        return {key: value for key, value in {"position_ids": positions, **more}.items() if key in known}

    ids, mask = _padded(encoder, prompts, model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    first = model(input_ids=ids, attention_mask=mask, use_cache=True, **options(positions, logits_to_keep=1))
    past = getattr(first, name, None)
    if past is None:
        return None
    # Layers of these kinds put new tensors in the place of the old ones, which need no copy.
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    growing = [layer for layer in getattr(past, "layers", ()) if type(layer) in kinds]
    shared = {id(tensor): tensor for layer in growing for tensor in (layer.keys, layer.values)}
    columns = []
    for answer in answers:
        targets = torch.tensor([answer], device=ids.device).expand(len(prompts), -1)
        logits, inputs = first.logits[:, -1:], targets[:, :-1]
        if inputs.shape[1]:
            full_mask = torch.cat([mask, torch.ones_like(inputs)], 1)
            where = mask.sum(1)[:, None] + torch.arange(inputs.shape[1], device=ids.device)
            cache = {name: copy.deepcopy(past, dict(shared))}  # the model writes into it
            rest = model(input_ids=inputs, attention_mask=full_mask, **cache, **options(where))
            logits = torch.cat([logits, rest.logits], 1)
        columns.append(_likelihood(logits, targets))
    return columns


def _score_whole(model, encoder, prompts, answers) -> list[torch.Tensor]:
    """As [`_score_on_cache`], without one."""
    columns = []
    for answer in answers:
        texts = [prompt + answer for prompt in prompts]
        ids = pad_rows(texts, _pad_token(encoder.tokenizer)).to(model.device)
        mask = pad_rows([[1] * len(text) for text in texts], 0).to(ids.device)
        targets = pad_rows([[-100] * len(prompt) + answer for prompt in prompts], -100).to(ids.device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        columns.append(_likelihood(logits[:, :-1], targets[:, 1:]))
    return columns
