"""Scores of a text task (the greedy answer, or the label of highest likelihood) and of plain text."""

import inspect
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel

from ..data import Encoder, LanguageModelTask, TextTask, pad_rows
from ..metrics.text import TEXT_METRICS, exact_match
from ..stack.load import merge_finished


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
    """
    compare = TEXT_METRICS.get(task.metric, exact_match)
    if not task.labels:
        mode = "generate"
    if mode == "score":  # the cache of a prompt is repeated for each label: so many sequences at once, not prompts
        batch_size = max(1, batch_size // len(task.labels))
    predict = {"generate": generate_answers, "score": score_labels}[mode]
    was_training = model.training
    model.eval()
    rows = task.eval_dataset
    mine = share_of_rows(len(rows))
    mine.sort(key=lambda i: len(rows[i][task.text_column]))  # texts of similar length share a batch: less padding
    found: list[tuple[int, tuple[str, float]]] = []
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        prompts = [encoder.prompt_ids(task, rows[i][task.text_column]) for i in batch]
        for i, answer in zip(batch, predict(model, encoder, task, prompts), strict=True):
            score = compare(answer, rows[i][task.label_column], rows[i][task.text_column])
            found.append((i, (answer, score)))
    model.train(was_training)
    return [result for _, result in sorted(dict(gather_object(found)).items())]


@torch.no_grad()
def evaluate_text(model: Any, encoder: Encoder, task: LanguageModelTask, batch_size: int = 32) -> tuple[float, float]:
    """(token accuracy in [0, 1], cross-entropy in nats a token) over the tokens of the task's eval texts, each given
    those before it in its piece of `max_length` tokens; every token counts the same.

    Raises:
        ValueError: no text has two tokens.
    """
    pieces = sorted(encoder.pieces(row[task.text_column] for row in task.eval_dataset), key=len)
    if not pieces:
        raise ValueError(f"task {task.name!r}: no eval text has two tokens")
    was_training = model.training
    model.eval()
    batch_size = max(1, batch_size // 4)  # the logits of every token are needed, not the last one's alone
    mine, pad = share_of_rows(len(pieces)), _pad_token(encoder.tokenizer)
    found: list[tuple[int, tuple[int, float]]] = []
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
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
    longest = encoder.longest_answer(task)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, num_beams=1,
        pad_token_id=_pad_token(encoder.tokenizer),
    )  # fmt: skip
    new = out if encoder.seq2seq else out[:, ids.shape[1] :]
    return encoder.tokenizer.batch_decode(new, skip_special_tokens=True)


def score_labels(model: Any, encoder: Encoder, task: TextTask, prompts: list[list[int]]) -> list[str]:
    """The likeliest label for each prompt: argmax over labels of log p(label, end of sequence | prompt).

    The prompt runs through the model once; the labels follow on its cache.
    """
    answers = [encoder.answer_ids(label) for label in task.labels]
    ids, mask = _padded(encoder, prompts, model.device)
    n = len(answers)
    targets = pad_rows(answers, -100).to(ids.device).repeat(len(prompts), 1)  # [prompts * labels, longest]
    if encoder.seq2seq:
        hidden = model.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
        hidden["last_hidden_state"] = hidden["last_hidden_state"].repeat_interleave(n, 0)
        logits = model(encoder_outputs=hidden, attention_mask=mask.repeat_interleave(n, 0), labels=targets).logits
    else:
        known = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters

        def options(positions, **more):
            """What not every model takes: positions (else worked out from the mask), logits of the last token alone."""
            return {key: value for key, value in {"position_ids": positions, **more}.items() if key in known}

        positions = (mask.cumsum(1) - 1).clamp_min(0)
        first = model(input_ids=ids, attention_mask=mask, use_cache=True, **options(positions, logits_to_keep=1))
        cache = first.past_key_values
        cache.batch_repeat_interleave(n)
        last = first.logits[:, -1:].repeat_interleave(n, 0)
        inputs = targets[:, :-1].clamp_min(0)  # padding: its predictions are not scored
        logits = last
        if inputs.shape[1]:
            steps = torch.arange(inputs.shape[1], device=ids.device)
            full_mask = torch.cat([mask.repeat_interleave(n, 0), torch.ones_like(inputs)], 1)
            where = mask.sum(1).repeat_interleave(n)[:, None] + steps
            rest = model(input_ids=inputs, attention_mask=full_mask, past_key_values=cache, **options(where))
            logits = torch.cat([last, rest.logits], 1)
    log_p = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
    scores = (log_p * (targets != -100)).sum(1).view(len(prompts), n)
    return [task.labels[i] for i in scores.argmax(1).tolist()]
