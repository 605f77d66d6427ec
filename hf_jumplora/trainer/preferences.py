"""The score of a task of preferences, which needs neither a trainer nor a reference model."""

import itertools
from typing import Any

import torch
from accelerate.utils import gather_object

from ..data import pad_rows
from .scoring import share_of_rows


PREFERENCE_ACCURACY = "preference_accuracy"
_COLUMNS = ("prompt", "chosen", "rejected")


def check_preferences(name: str, rows: Any, tokenizer: Any) -> None:
    """Raise ValueError unless rows are preferences as TRL's DPO takes them with an explicit prompt."""
    if tokenizer is None:
        raise ValueError(f"task {name!r}: metric {PREFERENCE_ACCURACY!r} needs processing_class (the tokenizer)")
    for number, row in enumerate(rows):
        missing = [column for column in _COLUMNS if not isinstance(row.get(column), (str, list))]
        if missing:
            raise ValueError(
                f"task {name!r}, eval row {number}: metric {PREFERENCE_ACCURACY!r} needs the columns "
                f"{', '.join(_COLUMNS)}, texts or lists of messages; there is no {missing[0]!r}"
            )


@torch.no_grad()
def preference_accuracy(model: Any, tokenizer: Any, rows: Any, max_length: int | None, batch_size: int = 32) -> float:
    """The share, in [0, 1], of rows whose chosen answer has the larger log-likelihood given the prompt.

    DPO's implicit reward without its reference (arXiv 2305.18290): summed over the answer's tokens, end of sequence
    included. A tie counts as wrong.

    rows: "prompt", "chosen", "rejected": texts, or lists of messages for the tokenizer's chat template.
    max_length: tokens of prompt and answer; what is longer is cut at its end, as TRL does.
    """
    was_training = model.training
    model.eval()
    mine, right = share_of_rows(len(rows)), []
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        pairs = [_encode(tokenizer, rows[i], answer, max_length) for answer in ("chosen", "rejected") for i in batch]
        ids = pad_rows([ids for ids, _ in pairs], tokenizer.pad_token_id or 0).to(model.device)
        targets = pad_rows([[-100] * n + ids[n:] for ids, n in pairs], -100).to(ids.device)[:, 1:]
        mask = pad_rows([[1] * len(ids) for ids, _ in pairs], 0).to(ids.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        chosen, rejected = losses.sum(1).chunk(2)
        right += list(zip(batch, (chosen < rejected).tolist(), strict=True))
    model.train(was_training)
    found = dict(gather_object(right))
    return sum(found.values()) / len(found)


def _encode(tokenizer: Any, row: Any, answer: str, max_length: int | None) -> tuple[list[int], int]:
    """(tokens of prompt and answer, how many of them are the prompt's)."""
    prompt, said = row["prompt"], row[answer]
    if isinstance(prompt, str):
        before = tokenizer(prompt).input_ids
        ids = [*tokenizer(prompt + said).input_ids]
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
    else:
        before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template([*prompt, *said], return_dict=True)["input_ids"]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))  # no end of sequence
    return ids[:max_length], sum(1 for _ in same)
