"""From the texts of tasks to token ids and batches."""

import functools
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import default_data_collator

from ..metrics.text import fold
from ..schema import short
from .tasks import LanguageModelTask, Task, TextTask


logger = logging.getLogger(__name__)


class Encoder:
    """Turns rows of text tasks into token ids for a tokenizer; cuts texts that are too long, and only texts.

    max_length: tokens of prompt and answer together (causal), of the prompt alone (seq2seq).
    truncated: how many prompts and free answers were cut, by task name.
    """

    def __init__(self, tokenizer, max_length: int, seq2seq: bool):
        self.tokenizer, self.max_length, self.seq2seq = tokenizer, max_length, seq2seq
        self.truncated: Counter[str] = Counter()
        self._answers: dict[tuple[str, str], list[int]] = {}

    def longest_answer(self, task: TextTask) -> int:
        """Tokens of the longest answer a task can have."""
        return task.max_answer or max(len(self.answer_ids(task, label)) for label in task.labels)

    def answer_ids(self, task: TextTask, answer: str) -> list[int]:
        """Tokens of an answer, with the end-of-sequence token: in a causal model those that follow the prompt's in the
        text "... Answer: positive", which need not be those of " positive".

        Raises:
            ValueError: the tokenizer joins the end of the prompt with the answer.
        """
        end = self.tokenizer.eos_token_id
        prompt = "" if self.seq2seq else task.render("x")
        if (known := self._answers.get((prompt, answer))) is not None:
            return known
        if self.seq2seq:
            ids = self.tokenizer(text_target=answer).input_ids
            ids = ids if ids[-1:] == [end] else [*ids, end]
        else:
            before, ids = self._start(prompt), self._start(f"{prompt} {answer}")
            if ids[: len(before)] != before:
                raise ValueError(
                    f"task {task.name!r}: the tokenizer joins the end of the prompt with the answer {short(answer)}: "
                    f"let the prompt end in another way than {prompt[-10:]!r} (a colon, and no space behind it)"
                )
            ids = [*ids[len(before) :], end]
        return self._answers.setdefault((prompt, answer), ids)

    def _start(self, text: str) -> list[int]:
        """Tokens of a text that goes on: without what the tokenizer appends to each."""
        ids = self._encode(text)
        return ids[: len(ids) - self._appended]

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text; one that begins with the beginning of a sequence, as chat templates write it, has it once,
        also where the tokenizer puts another before it."""
        ids, start = list(self.tokenizer(text).input_ids), self.tokenizer.bos_token_id
        return ids[1:] if start is not None and ids[:2] == [start, start] else ids

    @cached_property
    def _appended(self) -> int:
        """How many tokens the tokenizer appends to every text (an end of sequence, a separator)."""
        text, whole = (self.tokenizer("x", add_special_tokens=special).input_ids for special in (False, True))
        return next((len(whole) - i for i in range(len(text), len(whole)) if whole[i - len(text) : i] == text), 0)

    def check_labels(self, task: TextTask, generated: bool) -> None:
        """Raise ValueError unless the task's labels differ as tokens and, where answers are `generated`, can be read
        back from them."""
        by_tokens: dict[tuple[int, ...], str] = {}
        for label in task.labels:
            ids = self.answer_ids(task, label)
            first = by_tokens.setdefault(tuple(ids), label)
            if first != label:
                raise ValueError(
                    f"task {task.name!r}: labels {first!r} and {label!r} are the same tokens to the tokenizer, "
                    f"{self.tokenizer.convert_ids_to_tokens(ids)}: no model can tell them apart; call them otherwise"
                )
            written = self.tokenizer.decode(ids, skip_special_tokens=True)
            if generated and fold(written) != fold(label):
                raise ValueError(
                    f"task {task.name!r}: the tokenizer writes label {label!r} as {written!r}, so that no generated "
                    "answer can equal it: give it another name, or eval_mode='score'"
                )

    def prompt_ids(self, task: TextTask, text: str) -> list[int]:
        """Tokens of a prompt, its text cut so that any answer still fits.

        Raises:
            ValueError: instruction, options and answer alone are longer than max_length.
        """
        room = self.max_length
        if not self.seq2seq:
            room -= self.longest_answer(task)
        encode = self._encode if self.seq2seq else self._start
        ids = encode(task.render(text))
        if len(ids) <= room:
            return ids
        self.truncated[task.name] += 1
        pieces = self.tokenizer(text.strip(), add_special_tokens=False).input_ids
        keep = len(pieces)
        while len(ids) > room:
            if keep == 0:
                raise ValueError(
                    f"task {task.name!r}: instruction, options and answer take "
                    f"{self.max_length - room + len(ids)} tokens, max_length is {self.max_length}: raise it or shorten "
                    "them"
                )
            keep = max(0, keep - (len(ids) - room))
            ids = encode(task.render(self.tokenizer.decode(pieces[:keep])))
        return ids

    def pieces(self, texts: Iterable[str]) -> list[list[int]]:
        """Tokens of whole texts for language modelling, each ended by the end-of-sequence token and split where it is
        longer than max_length; a piece of one token, which predicts nothing, is left out."""
        pieces, size = [], self.max_length
        for text in texts:
            ids = self._encode(text.strip())
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids.append(self.tokenizer.eos_token_id)
            pieces += [ids[i : i + size] for i in range(0, len(ids) - 1, size)]
        return pieces

    def train_rows(self, task: TextTask | LanguageModelTask) -> Dataset:
        """input_ids and labels of every training row; in a causal model the loss is on the answer alone, of plain text
        on every token."""
        if isinstance(task, LanguageModelTask):
            pieces = self.pieces(row[task.text_column] for row in task.train_dataset)
            if not pieces:
                raise ValueError(f"task {task.name!r}: all its training texts are empty")
            return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in pieces])
        rows, longest = [], self.longest_answer(task)
        for row in task.train_dataset:
            prompt, answer = self.prompt_ids(task, row[task.text_column]), self.answer_ids(task, row[task.label_column])
            self.truncated[task.name] += len(answer) > longest
            answer = answer[:longest]
            if self.seq2seq:
                rows.append({"input_ids": prompt, "labels": answer})
            else:
                rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
        return Dataset.from_list(rows)


def encode_tasks(encoder: Encoder, tasks: list[Task], held_out: list[Task], model: Any) -> list[Any]:
    """The training set of every task that is trained on. All texts are encoded, held-out ones too, before anything is
    trained, so that bad ones show now; what a prompt gives away, and what was cut, is logged.

    Raises:
        ValueError: a text is too long, or has a token that the model has no embedding for.
    """
    encoded = (TextTask, LanguageModelTask)
    sets = [
        encoder.train_rows(t) if isinstance(t, encoded) else drop_unlabelled_rows(t.train_dataset, t.name)
        for t in tasks
    ]
    for task, rows in zip(tasks, sets, strict=True):
        if isinstance(task, encoded):
            known, table = model.get_input_embeddings().num_embeddings, rows.with_format("arrow")[:]
            highest = [pc.max(pc.list_flatten(table[name])).as_py() for name in ("input_ids", "labels")]
            if (last := max(encoder.tokenizer.pad_token_id or 0, *highest)) >= known:
                raise ValueError(
                    f"task {task.name!r}: the tokenizer's {encoder.tokenizer.convert_ids_to_tokens(last)!r} is number "
                    f"{last}, and the model has embeddings for {known} tokens: use the model's own tokenizer, or save "
                    "the model after resize_token_embeddings and load it from there"
                )
    for task in (*tasks, *held_out):
        if isinstance(task, TextTask):
            if names := task.names_in_prompt():
                logger.warning(
                    "task %s: every prompt names the data set (%s), which tells the model the task: such numbers "
                    "cannot be compared with those of prompts that do not", task.name, ", ".join(names)
                )  # fmt: skip
            for row in task.eval_dataset or ():
                encoder.prompt_ids(task, row[task.text_column])
            if cut := encoder.truncated[task.name]:
                logger.warning("task %s: %d texts were cut to fit max_length=%d", task.name, cut, encoder.max_length)
    return sets


def masked_rows(rows: Any) -> set[int]:
    """Numbers of the rows whose `labels` are all -100; of a streamed data set none are known."""
    if isinstance(rows, Dataset) and "labels" in rows.column_names:
        batches = rows.with_format(None).select_columns("labels").iter(1000)
        column: Iterable[Any] = itertools.chain.from_iterable(batch["labels"] for batch in batches)
    elif isinstance(rows, list):
        column = [row.get("labels") if isinstance(row, dict) else None for row in rows]
    else:
        return set()
    return {i for i, ids in enumerate(column) if isinstance(ids, list) and ids.count(-100) == len(ids)}


def drop_unlabelled_rows(rows: Any, task: str, kind: str = "training") -> Any:
    """Rows of a task (`kind`) without those whose `labels` are all -100 (truncation has cut the answer off). The log
    says how many; nothing can be learned from them, and the loss of a batch of them is 0 / 0.

    Raises:
        ValueError: no row is left.
    """
    if not (masked := masked_rows(rows)):
        return rows
    where = f"task {task!r}: {len(masked)} of {len(rows)} {kind} rows have no label to learn from (all are -100)"
    if len(masked) == len(rows):
        raise ValueError(f"{where}: raise max_length if it cuts the answers off")
    logger.warning("%s, the first is row %d: they are left out; is max_length too short?", where, min(masked))
    kept = [i for i in range(len(rows)) if i not in masked]
    return rows.select(kept) if isinstance(rows, Dataset) else [rows[i] for i in kept]


def pad_rows(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """Integer lists as one int64 tensor [rows, longest], padded with `value`."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([f + r if side == "left" else r + f for r, f in zip(rows, fill, strict=True)])


def collate(tokenizer) -> Callable[[list[dict]], dict]:
    """Batches of [`Encoder.train_rows`], padded on the right, and of the plain tasks beside them, whose rows may hold
    other numbers (position_ids, ...). It can be pickled, for workers that are spawned."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return functools.partial(_batch, pad)


def _batch(pad: int, rows: list[dict]) -> dict:
    rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
    rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    if odd := sorted({key for row in rows for key in row.keys() ^ rows[0].keys()}):
        raise ValueError(f"some rows have {odd[0]!r} and others of the same batch do not: give all the same columns")
    lists = [k for k, v in rows[0].items() if isinstance(v, list) and isinstance((v or [0])[0], (int, float))]
    single = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
    fill = {"input_ids": pad, "labels": -100}
    return default_data_collator(single) | {k: pad_rows([row[k] for row in rows], fill.get(k, 0)) for k in lists}
