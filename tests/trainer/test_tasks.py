"""From rows to token ids, and from files to tasks: what is asked for is read, everything else is named and refused."""

import json
import re

import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
import toy
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hf_jumplora import LanguageModelTask, Task, TextTask, load_tasks
from hf_jumplora.data import Encoder, collate, pad_rows
from hf_jumplora.data.encoder import drop_unlabelled_rows
from hf_jumplora.data.readers import read_rows
from hf_jumplora.data.tasks import PROMPT


def task(text="the cat", **options):
    rows = [{"sentence": text, "label": "tiny"}]
    return TextTask(
        "a", rows, **{"labels": ["tiny", "very huge"], "instruction": "size", "prompt": toy.PROMPT, **options}
    )


def words(encoder, ids):
    return encoder.tokenizer.convert_ids_to_tokens(ids)


# ---- prompts -----------------------------------------------------------------------------------------------------


def test_default_prompt_is_the_published_one():
    shown = task(prompt=PROMPT).render(" the cat\n")
    assert shown == "Task Instruction: size\nOptions: tiny | very huge\nText: the cat\nAnswer:"


@pytest.mark.parametrize("text", ["{options}", "{}", "{0}", "{text}", "{instruction!r}", "a } b { c", "\\1 \\g<0> $1"])
def test_braces_in_a_text_mean_nothing(text):
    """Nor do the signs of regular expressions; in an instruction neither."""
    assert task(instruction="{text}").render(text) == f"{{text}} tiny | very huge : {text} ="


@pytest.mark.parametrize("seq2seq", [False, True], ids=["causal", "seq2seq"])
def test_loss_is_on_the_answer_alone(seq2seq):
    encoder = Encoder(toy.tokenizer(), 32, seq2seq)
    (row,) = encoder.train_rows(task())
    prompt = ["size", "tiny", "|", "very", "huge", ":", "the", "cat", "="]
    scored = [i for i in row["labels"] if i != -100]
    assert words(encoder, scored)[0] == "tiny"
    if seq2seq:
        assert words(encoder, row["input_ids"]) == prompt
        assert row["labels"] == scored
    else:
        assert words(encoder, row["input_ids"]) == [*prompt, "tiny", "</s>"]
        assert row["labels"] == [-100] * len(prompt) + scored
        assert words(encoder, scored) == ["tiny", "</s>"]


@pytest.mark.parametrize("seq2seq", [False, True], ids=["causal", "seq2seq"])
@pytest.mark.parametrize("max_length", [11, 13, 20, 40])
def test_only_the_text_is_cut(seq2seq, max_length):
    """From its end, as little as needed, so that the longest answer still fits; and it is counted."""
    encoder = Encoder(toy.tokenizer(), max_length, seq2seq)
    text = "cat dog elk fox gnu hen ant bee cat dog elk fox gnu hen ant bee"
    ids = words(encoder, encoder.prompt_ids(task(), text))
    start, end = ["size", "tiny", "|", "very", "huge", ":"], ["="]
    room = max_length - (0 if seq2seq else 3)  # "very huge </s>"
    kept = min(16, room - len(start) - len(end))
    assert ids == start + text.split()[:kept] + end
    assert encoder.truncated["a"] == (kept < 16)


def test_instruction_that_does_not_fit():
    encoder = Encoder(toy.tokenizer(), 9, False)
    with pytest.raises(ValueError, match=r"task 'a': instruction, options and answer take 10 tokens, max_length is 9"):
        encoder.prompt_ids(task(), "the cat")


def test_truncation_with_a_subword_tokenizer():
    """Decoding the kept pieces and encoding the prompt again may change their number: it must still fit."""
    from hf_jumplora.bench.tiny_llama import train_tokenizer

    tokenizer = train_tokenizer(["the cat sat on the mat and ate the apple, naïve café 漢字 \U0001f600"] * 3, 300, 512)
    text = "the naïve \U0001f600 cat 漢字 sat," * 20
    example = task(text, prompt=PROMPT)
    for max_length in range(90, 130, 3):
        encoder = Encoder(tokenizer, max_length, False)
        ids = encoder.prompt_ids(example, text)
        room = max_length - max(len(encoder.answer_ids(example, label)) for label in example.labels)
        assert room - 6 <= len(ids) <= room  # a whole character may go
        shown = tokenizer.decode(ids, skip_special_tokens=True)
        assert shown.startswith("Task Instruction: size\nOptions: tiny | very huge\nText: the na")
        assert shown.endswith("\nAnswer:")


def spaced(*joined, end=None):
    """Characters and a few words, as of a tokenizer that puts a space before what it encodes alone (SentencePiece).

    joined: pairs of pieces that become one. end: appended to every text.
    """
    pieces = ["<unk>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyzA:\n"]
    merges = []
    for word in ("\u2581\u2581", "positive", "negative"):
        merges += [(word[:n], word[n]) for n in range(1, len(word))]
    merges += [("\u2581", word) for word in ("positive", "negative")] + list(joined)
    pieces += dict.fromkeys(a + b for a, b in merges)
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>")
    )
    space = [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    made.normalizer = tokenizers.normalizers.Sequence(space)
    shown = [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.Fuse(),
        tokenizers.decoders.Strip(" ", 1, 0),
    ]
    made.decoder = tokenizers.decoders.Sequence(shown)
    if end:
        made.post_processor = tokenizers.processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("end", [None, "</s>"], ids=["plain", "appends-an-end"])
def test_answers_are_tokens_of_the_whole_text(end):
    """Encoded alone, " positive" would begin with two spaces; an end that the tokenizer appends to each text is no part
    of a prompt that an answer follows."""
    encoder = Encoder(spaced(end=end), 64, seq2seq=False)
    made = TextTask("a", [{"sentence": "b", "label": "positive"}], labels=["positive", "negative"], prompt="{text}\nA:")
    whole = spaced()("b\nA: positive").input_ids
    (row,) = encoder.train_rows(made)
    assert row["input_ids"] == [*whole, encoder.tokenizer.eos_token_id]
    assert words(encoder, encoder.answer_ids(made, "positive")) == ["\u2581positive", "</s>"]
    assert words(encoder, encoder.prompt_ids(made, "b")) == ["\u2581", "b", "\n", "A", ":"]
    encoder.check_labels(made, generated=True)


def test_one_beginning_of_a_sequence():
    """A prompt, or a text that a chat template has written, has it already; the tokenizer puts another before it."""
    tokenizer = toy.tokenizer()
    tokenizer.bos_token, number = "new", tokenizer.convert_tokens_to_ids("new")
    first = tokenizers.processors.TemplateProcessing(single="new $A", special_tokens=[("new", number)])
    tokenizer._tokenizer.post_processor = first
    encoder, whole = Encoder(tokenizer, 64, seq2seq=False), ["new", "the", "ant", "="]
    for prompt in ("the {text} =", "new the {text} ="):
        made = TextTask("a", [{"sentence": "ant", "label": "tiny"}], labels=["tiny", "huge"], prompt=prompt)
        assert words(encoder, encoder.prompt_ids(made, "ant")) == whole
        (row,) = encoder.train_rows(made)
        assert words(encoder, row["input_ids"]) == [*whole, "tiny", "</s>"]
    assert [words(encoder, ids) for ids in encoder.pieces(["the ant", "new the ant"])] == [[*whole[:3], "</s>"]] * 2


def test_answers_that_the_tokenizer_joins_with_the_prompt():
    for prompt, joined in (("{text}\nA: ", ()), ("{text}\nA:", ((":", "\u2581"),))):
        made = TextTask("a", [{"sentence": "b", "label": "x"}], labels=["x"], prompt=prompt)
        with pytest.raises(
            ValueError, match=r"task 'a': the tokenizer joins the end of the prompt with the answer 'x'"
        ):
            Encoder(spaced(*joined), 64, seq2seq=False).answer_ids(made, "x")


@pytest.mark.parametrize("seq2seq", [False, True], ids=["causal", "seq2seq"])
def test_labels_of_the_same_tokens(seq2seq, toy_base, toy_t5, tmp_path):
    """No model can tell them apart: refused when the run is made."""
    rows = [{"sentence": "cat", "label": "lion"}]
    made = TextTask("a", rows, labels=["lion", "tiger"], prompt=toy.PROMPT)
    with pytest.raises(
        ValueError, match=r"'lion' and 'tiger' are the same tokens to the tokenizer, \['<unk>', '</s>'\]"
    ):
        toy.make_run(toy_t5 if seq2seq else toy_base, tmp_path, stream=[made])


def test_labels_that_cannot_be_read_back(toy_base, tmp_path):
    """A generated answer could never be right; the likelihoods of labels still can."""
    rows = [{"sentence": "cat", "label": "lion"}] * 32
    made = TextTask("a", rows, rows, labels=["lion", "cat"], prompt=toy.PROMPT)
    with pytest.raises(
        ValueError, match=r"writes label 'lion' as '', so that no generated answer .* eval_mode='score'"
    ):
        toy.make_run(toy_base, tmp_path, stream=[made], eval_mode="generate")
    toy.make_run(toy_base, tmp_path, stream=[made], eval_mode="score")


@pytest.mark.parametrize("seq2seq", [False, True], ids=["causal", "seq2seq"])
def test_free_answers(seq2seq):
    """They take the room they may have, whatever is in the rows, and are cut there, which is counted."""
    encoder = Encoder(toy.tokenizer(), 12, seq2seq)
    rows = [{"sentence": "cat dog " * 9, "label": "very " * n + "tiny"} for n in (1, 5)]
    free = TextTask("a", rows, metric="rouge_l", max_answer=4, prompt="{text} =")
    short, long = encoder.train_rows(free)
    assert encoder.longest_answer(free) == 4
    size = 12 if seq2seq else 8
    if seq2seq:
        assert [len(short["input_ids"]), len(long["labels"])] == [size, 4]
        assert words(encoder, short["labels"]) == ["very", "tiny", "</s>"]
    else:
        assert words(encoder, short["input_ids"])[size - 1 :] == ["=", "very", "tiny", "</s>"]
        assert words(encoder, long["input_ids"])[size - 1 :] == ["=", *["very"] * 4]
        assert short["labels"] == [-100] * size + short["input_ids"][size:]
    assert encoder.truncated["a"] == 3  # two texts and one answer


def test_plain_text():
    """Every token but the first is predicted once, in pieces of max_length; a rest of one token predicts nothing."""
    encoder = Encoder(toy.tokenizer(), 4, False)
    texts = ["cat", "cat dog elk", "cat dog elk fox", " cat dog elk fox gnu hen ant ", ""]
    rows = encoder.train_rows(LanguageModelTask("a", [{"text": text} for text in texts]))
    assert [" ".join(words(encoder, row["input_ids"])) for row in rows] == [
        "cat </s>",
        "cat dog elk </s>",
        "cat dog elk fox",
        "cat dog elk fox",
        "gnu hen ant </s>",
    ]
    assert all(row["labels"] == row["input_ids"] for row in rows)


def test_names_of_prompt_styles():
    assert task(prompt=PROMPT).style() == "jumplora"
    assert task().style() == "own"
    published = "Task:TC\nDataset:dbpedia\n{instruction}\nOption: {option_list} \n{text}\nAnswer:"
    assert task(prompt=published).style() == "olora"
    assert task(prompt="Task:COPA\nDataset:COPA\n{text}\nAnswer:").style() == "olora"


def test_batches():
    """Padded on the right with the pad token, which the mask hides and no loss counts."""
    batch = collate(toy.tokenizer())(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert pad_rows([[1], [2, 3]], 9, "left").tolist() == [[9, 1], [2, 3]]


def test_batches_of_plain_tasks():
    """What else a row holds for the model stays; where only some of a batch have it, that is an error."""
    first = {"input_ids": [5, 6], "labels": [5, 6], "position_ids": [3, 4], "label": 1, "text": "x", "weight": 0.5}
    rows = [first, {**first, "input_ids": [7], "labels": [7], "position_ids": [9], "attention_mask": [0]}]
    batch = collate(toy.tokenizer())(rows)
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6], [7, 0]], "attention_mask": [[1, 1], [0, 0]], "labels": [[5, 6], [7, -100]],
        "position_ids": [[3, 4], [9, 0]], "weight": [0.5, 0.5],
    }  # fmt: skip
    with pytest.raises(ValueError, match="some rows have 'position_ids' and others of the same batch do not"):
        collate(toy.tokenizer())([first, {**first, "position_ids": None}])


@pytest.mark.parametrize("kind", [Dataset.from_list, list])
def test_rows_without_a_label(kind, caplog):
    rows = kind([{"labels": [-100, -100]}, {"labels": [-100, 5]}, {"labels": []}, {"labels": [6, 7]}])
    assert [row["labels"] for row in drop_unlabelled_rows(rows, "a")] == [[-100, 5], [6, 7]]
    assert (
        "task 'a': 2 of 4 training rows have no label to learn from (all are -100), the first is row 0" in caplog.text
    )
    with pytest.raises(ValueError, match=r"task 'a': 1 of 1 training rows .* raise max_length"):
        drop_unlabelled_rows(kind([{"labels": [-100]}]), "a")
    for whole in (kind([{"labels": [1]}]), kind([{"labels": 1}]), kind([{"text": "x"}]), None):
        assert drop_unlabelled_rows(whole, "a") is whole


# ---- tasks that cannot be ----------------------------------------------------------------------------------------

ROW = {"sentence": "x", "label": "tiny"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "../up"}, "task name '../up'"),
        ({"name": "a b"}, "task name 'a b'"),
        ({"name": ""}, "task name ''"),
        ({"name": ".hidden"}, "task name"),
        ({"name": "a\n"}, "task name"),
        ({"train_dataset": []}, "task 'a' has no training example"),
        ({"train_dataset": None}, "task 'a' has no training example"),
        ({"eval_dataset": []}, "task 'a' has an empty eval set"),
        ({"labels": []}, "task 'a' has no labels; where answers are free text, a metric says .*: exact_match"),
        ({"metric": "bleu"}, "unknown metric 'bleu'; known: accuracy, exact_match"),
        ({"metric": "rouge_l"}, "metric 'rouge_l' compares free answers: leave the labels out"),
        ({"max_answer": 9}, "max_answer is for free answers"),
        ({"held_out": True}, "is held out, so it needs an eval_dataset"),
        ({"labels": [True, False]}, "labels must be strings"),
        ({"labels": ["tiny", " "]}, "labels must be strings that are not empty"),
        ({"labels": ["tiny", "Tiny "]}, "two labels differ only in case, spaces"),
        ({"labels": ["caf\u00e9", "cafe\u0301"]}, r"differ only .* Unicode form.*\\xe9.*\\u0301"),
        ({"labels": ["1", "0", "1.0"]}, "differ only in .* or as 1 and 1.0"),
        ({"train_dataset": {"train": [], "test": []}}, "train_dataset is a dict of 'train', 'test': give one data set"),
        ({"eval_dataset": {"a": []}}, "eval_dataset is a dict of 'a'"),
        ({"prompt": "no place"}, r"a place for '\{text\}'"),
        ({"train_dataset": [ROW, {"sentence": "x"}]}, r"train row 1: no column 'label', only \['sentence'\]"),
        ({"train_dataset": [{"sentence": 3, "label": "tiny"}]}, "train row 0: no string in column 'sentence', but 3"),
        ({"train_dataset": [ROW, {**ROW, "label": "big"}]}, r"train row 1: label 'big' is not among \['tiny'"),
        ({"eval_dataset": [{**ROW, "label": "Tiny"}]}, "eval row 0: label 'Tiny' is not among"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(f"{k}={v}"[:30] for k, v in value.items()),
)  # fmt: skip
def test_task_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        TextTask(**{"name": "a", "train_dataset": [ROW], "labels": ["tiny", "huge"], **options})


def test_plain_text_that_cannot_be():
    with pytest.raises(ValueError, match=r"task 'a', eval row 0: no column 'text', only \['sentence'\]"):
        LanguageModelTask("a", [{"text": "x"}], [{"sentence": "x"}])
    with pytest.raises(ValueError, match="plain text is scored by token_accuracy, not by 'accuracy'"):
        LanguageModelTask("a", [{"text": "x"}], metric="accuracy")


def test_fingerprints_of_before():
    """A stack that an earlier version wrote goes on: what its tasks could not have does not count."""
    known = task().fingerprint()
    assert known == "1c41fe44b37ce4f5"
    assert task(held_out=True, eval_dataset=[ROW]).fingerprint() != known  # of its eval rows
    free = {"labels": [], "metric": "rouge_l"}
    assert task(**free, max_answer=9).fingerprint() != task(**free, max_answer=8).fingerprint()


@pytest.mark.parametrize("name", ["agnews", "20ng", "a.b-c_d", "A"])
def test_names_that_are_fine(name):
    assert Task(name, [1]).name == name


# ---- streams -----------------------------------------------------------------------------------------------------

ROWS = [{"sentence": f"text {i}", "label": "yes" if i % 2 else "no"} for i in range(6)]


def stream(folder, text, name="stream.yaml"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    else:
        pa.parquet.write_table(pa.Table.from_pylist(rows), path)


def test_folder_layout(tmp_path):
    """{train,test,labels}.json below data_dir, or below the stream's own folder; the file's labels win."""
    for root in (tmp_path, tmp_path / "elsewhere"):
        folder = root / "TC" / "a"
        write(folder / "train.json", ROWS)
        write(folder / "test.json", ROWS[:2])
        (folder / "labels.json").write_text(json.dumps(["no", "yes", root.name[:4]]))
    path = stream(tmp_path, "tasks:\n- name: a\n  folder: TC/a\n  labels: [x]\n  instruction: Say it.\n")
    (found,) = load_tasks(path)
    assert (found.name, found.instruction, found.source) == ("a", "Say it.", "TC/a")
    assert found.train_dataset == ROWS
    assert found.eval_dataset == ROWS[:2]
    assert found.labels[:2] == ["no", "yes"]
    assert load_tasks(path, data_dir=tmp_path / "elsewhere")[0].labels[2] == "else"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_file_formats(suffix, tmp_path):
    """With own column names, a text made of two columns, labels from the rows, limits from three places."""
    rows = [{"title": f"T{i}", "body": f"b{{{i}}}, \u2028 ü", "class": "ja" if i % 2 else "nein"} for i in range(6)]
    write(tmp_path / f"d{suffix}", rows)
    text = (
        f'max_train: 5\nprompt: "{{text}} ?"\ntasks:\n- name: a\n  train_file: d{suffix}\n  eval_file: d{suffix}\n'
        f'  text: "{{title}}: {{body}}"\n  label: class\n  max_eval: 3\n'
    )
    (found,) = load_tasks(stream(tmp_path, text))
    assert {"sentence": "T2: b{2}, \u2028 ü", "label": "nein"} in found.train_dataset
    assert (len(found.train_dataset), len(found.eval_dataset)) == (5, 3)
    assert found.labels == ["ja", "nein"]
    assert found.render("x") == "x ?"
    (few,) = load_tasks(tmp_path / "stream.yaml", max_train=2, max_eval=1)
    assert (len(few.train_dataset), len(few.eval_dataset)) == (2, 1)


def test_byte_order_mark(tmp_path):
    """As Excel writes it: no part of the first column's name."""
    (tmp_path / "d.csv").write_bytes(b'\xef\xbb\xbfsentence,label\r\nx,yes\r\n"a, b\nc",no\r\n')
    assert read_rows(tmp_path / "d.csv") == [{"sentence": "x", "label": "yes"}, {"sentence": "a, b\nc", "label": "no"}]
    (tmp_path / "d.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert read_rows(tmp_path / "d.json") == ROWS


def test_catalogue(tmp_path):
    """Tasks by name, in the order asked for; paths are relative to the catalogue."""
    for name in ("a", "b"):
        write(tmp_path / "data" / f"{name}.json", ROWS)
    entries = "".join(f"- name: {n}\n  train_file: {n}.json\n" for n in ("a", "b"))
    stream(tmp_path / "data", f"tasks:\n{entries}", "all.yaml")
    path = stream(tmp_path, "catalogue: data/all.yaml\ntasks: [b, a]\n")
    assert [found.name for found in load_tasks(path)] == ["b", "a"]
    path = stream(tmp_path, "catalogue: data/all.yaml\ntasks:\n- b\n- c\n")
    with pytest.raises(ValueError, match=r"stream\.yaml, line 4: .*all\.yaml has no task 'c', only a, b"):
        load_tasks(path)


def test_skipped_labels(tmp_path):
    write(tmp_path / "d.json", [*ROWS, {"sentence": "?", "label": "-"}])
    path = stream(tmp_path, 'tasks:\n- {name: a, train_file: d.json, labels: ["yes", "no"], skip_labels: ["-"]}\n')
    assert load_tasks(path)[0].train_dataset == ROWS


def test_no_file_is_written(tmp_path, monkeypatch):
    """Reading leaves no cache behind, neither beside the data nor in the home folder."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    data = tmp_path / "data"
    write(data / "d.parquet", ROWS)
    load_tasks(stream(data, "tasks:\n- {name: a, train_file: d.parquet}\n"))
    assert {p.name for p in tmp_path.rglob("*")} == {"home", "data", "d.parquet", "stream.yaml"}


def test_plain_text_and_free_answers(tmp_path):
    """From files and from the folder layout, with columns of their own; empty texts are no rows."""
    texts = [{"body": f"text {i}"} for i in range(4)] + [{"body": " "}]
    write(tmp_path / "d.jsonl", texts)
    write(tmp_path / "f" / "train.json", [{"text": "a b"}])
    write(tmp_path / "f" / "test.json", [{"text": "c d"}])
    write(tmp_path / "e.json", ROWS)
    text = (
        "tasks:\n- {name: a, train_file: d.jsonl, eval_file: d.jsonl, language_model: true, text: body, max_eval: 2}\n"
        "- {name: b, folder: f, dataset: org/b, language_model: true, text: body}\n"
        "- {name: c, train_file: e.json, eval_file: e.json, metric: rouge_l, max_answer: 7, instruction: Say it.}\n"
    )
    a, b, c = load_tasks(stream(tmp_path, text), data_dir=tmp_path)
    assert (type(a), len(a.train_dataset), len(a.eval_dataset)) == (LanguageModelTask, 4, 2)
    assert a.train_dataset[1] == {"text": "text 1"}  # not limited: in their order
    assert (b.train_dataset, b.eval_dataset) == ([{"text": "a b"}], [{"text": "c d"}])
    assert (c.metric, c.max_answer, c.labels) == ("rouge_l", 7, [])
    assert c.render("x") == "Task Instruction: Say it.\nText: x\nAnswer:"


def test_held_out(tmp_path):
    """Behind the others, in the file or by the caller's wish; of a catalogue any task; training rows are not needed."""
    write(tmp_path / "d.json", ROWS)
    write(tmp_path / "c" / "test.json", ROWS)
    entries = "- {name: a, train_file: d.json, eval_file: d.json}\n- {name: b, train_file: d.json, eval_file: d.json}\n"
    stream(tmp_path, f"tasks:\n{entries}- {{name: c, folder: c}}\n", "all.yaml")
    path = stream(tmp_path, "catalogue: all.yaml\ntasks: [b, a]\nheld_out:\n- c\n")
    assert [(t.name, t.held_out) for t in load_tasks(path)] == [("b", False), ("a", False), ("c", True)]
    assert [(t.name, t.held_out) for t in load_tasks(path, held_out=["b"])] == [("a", False), ("b", True)]
    own = stream(tmp_path, f"tasks:\n{entries}held_out:\n- {{name: d, eval_file: d.json}}\n", "own.yaml")
    assert [(t.name, t.held_out) for t in load_tasks(own)][-1] == ("d", True)
    with pytest.raises(ValueError, match=r"held_out: .*all\.yaml has no task 'x', only a, b, c"):
        load_tasks(path, held_out=["x"])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_general_text(suffix, tmp_path, monkeypatch):
    """One half of the texts is measured, the other is for strategies; the same ones every time."""
    write(tmp_path / "d.json", ROWS)
    texts = [{"text": f"line {i}"} for i in range(20)] + [{"text": ""}]
    path = tmp_path / f"general{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(row["text"] for row in texts))
    else:
        write(path, texts)
    *_, found = load_tasks(stream(tmp_path, ONE), general_text=str(path))
    assert (found.name, found.held_out, found.source) == ("general_text", True, path.name)
    halves = [{row["text"] for row in rows} for rows in (found.train_dataset, found.eval_dataset)]
    assert halves[0] | halves[1] == {f"line {i}" for i in range(20)}
    assert list(map(len, halves)) == [10, 10]
    assert load_tasks(stream(tmp_path, ONE), general_text=str(path))[-1].fingerprint() == found.fingerprint()
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        load_tasks(stream(tmp_path, ONE), general_text=str(tmp_path / "none.txt"))


def test_general_text_of_the_hub(tmp_path, monkeypatch):
    from datasets import Dataset

    write(tmp_path / "d.json", ROWS)
    asked, data = [], Dataset.from_dict({"text": ["", *(f"t{i}" for i in range(9))]})
    monkeypatch.setattr(
        "hf_jumplora.data.readers.load_dataset", lambda name, config, split: asked.append((name, config)) or data
    )
    *_, found = load_tasks(stream(tmp_path, ONE), general_text="org/wiki:raw")
    assert asked == [("org/wiki", "raw")]
    assert (found.source, len(found.eval_dataset)) == ("hf://datasets/org/wiki", 5)


ONE = "tasks:\n- name: a\n  train_file: d.json\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tasks: [", r"(?s)stream\.yaml is not valid YAML: .*line 1"),
        (
            ONE + "  label: a\n  label: b\n",
            r"not valid YAML: line 5: the key 'label' stands there twice",
        ),
        ("- a\n- b\n", r"stream\.yaml: expected keys and values, found list"),
        ("", r"stream\.yaml: expected keys and values, found NoneType"),
        ("name: x\n", "key 'tasks' is missing"),
        ("tasks: []\n", "'tasks' must be a list of tasks"),
        ("tasks: a\n", "'tasks' must be a list of tasks"),
        ("task: 1\n" + ONE, "unknown key 'task'; known: catalogue, held_out, max_eval"),
        ("# c\n" + ONE + "- 7\n", r"stream\.yaml, line 5: expected keys and values, found int 7"),
        ("\n\n" + ONE + "  lables: [x]\n", r"stream\.yaml, line 4: unknown key 'lables'; known: .*labels"),
        ("tasks:\n- train_file: d.json\n", "line 2: key 'name' is missing"),
        ("tasks:\n- name: 20\n  train_file: d.json\n", "line 2: 'name' must be a string, found 20"),
        ("tasks:\n- name: a\n", "line 2: needs 'folder', 'train_file' or 'dataset'"),
        ("tasks:\n- name: a/b\n  train_file: d.json\n", "line 2: task name 'a/b'"),
        (ONE + "  labels: [yes, no]\n", r"'labels' must be a list of strings .*quote yes.*found \[True, False\]"),
        (ONE + "  labels: yes\n", "'labels' must be a list"),
        (
            ONE + "  labels: {x: [y]}\n",
            "'labels' must be a list of strings, or {label of the data: label in the prompt}",
        ),
        (ONE + '  labels: ["yes"]\n', r"line 2: task 'a', train row 0: label 'no' is not among \['yes'\]"),
        (ONE + "  language_model: false\n", "'language_model' must be true, or be left out"),
        (ONE + "  language_model: true\n  labels: [a]\n", "line 2: plain text \\(language_model\\) has no 'labels'"),
        (ONE + "  language_model: true\n", "train row 0: column 'text' does not exist"),
        (ONE + "  metric: bleu\n", "line 2: task 'a': unknown metric 'bleu'; known: accuracy, exact_match"),
        (ONE + "  max_answer: 0\n", "'max_answer' must be a number above 0"),
        (ONE + "held_out: [b]\n", r"line 4: .*has no task 'b', only a"),
        (ONE + "held_out:\n- {name: b, train_file: d.json}\n", "line 5: task 'b' is held out, so it needs an eval"),
        (ONE + "  max_train: 0\n", "'max_train' must be a number above 0, found 0"),
        (ONE + "  max_train: -3\n", "'max_train' must be a number above 0"),
        (ONE + "  max_eval: many\n", "'max_eval' must be a number above 0, found 'many'"),
        ("max_train: yes\n" + ONE, "'max_train' must be a number above 0, found True"),
        (ONE + "  text: body\n", r"line 2, train row 0: column 'body' does not exist; there are 'label', 'sentence'"),
        (ONE + '  text: "{sentence} {title}"\n', "column 'title' does not exist"),
        (ONE + '  text: "{sentence} {label}"\n', "train row 0: the text shows the answer, column 'label'"),
        (ONE + "  label: class\n", "column 'class' does not exist"),
        (ONE + "  instruction: 3\n", "'instruction' must be a string, found 3"),
        (ONE + '  skip_labels: ["yes", "no"]\n', "line 2: task 'a' has no training example"),
        ("prompt: Answer\n" + ONE, r"a place for '\{text\}'"),
        ("catalogue: d.yaml\ntasks: [a]\n", r"stream file .*d\.yaml does not exist"),
        ("catalogue: stream.yaml\ntasks: [a]\n", r"line 2: expected keys and values, found str 'a'"),
        (ONE.replace("d.json", "e.json"), r"data file .*e\.json does not exist"),
        (ONE.replace("d.json", "d.txt"), r"d\.txt: cannot read '\.txt'; use \.json"),
        ("tasks:\n- name: a\n  folder: nowhere\n", r"line 2: .*nowhere is not a folder; set data_dir"),
    ],
    ids=lambda value: value.encode("unicode_escape").decode()[:40].replace(" ", "_"),
)
def test_malformed_stream(text, message, tmp_path):
    """The file, its line and the key are named."""
    write(tmp_path / "d.json", ROWS)
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_tasks(stream(tmp_path, text))


@pytest.mark.parametrize("limit", [0, -1])
def test_limits_of_the_call(limit, tmp_path):
    write(tmp_path / "d.json", ROWS)
    with pytest.raises(ValueError, match=f"'max_eval' must be a number above 0, found {limit}"):
        load_tasks(stream(tmp_path, ONE), max_eval=limit)
    with pytest.raises(TypeError, match="max_rows"):
        load_tasks(tmp_path / "stream.yaml", max_rows=3)


def test_missing_stream(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stream file .*none\.yaml does not exist"):
        load_tasks(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'[\n {"sentence": "x",}\n]', r"d\.json, line 2, column \d+: not valid JSON"),
        ("d.json", b'{"sentence": "x"}', r"d\.json: expected a list of objects"),
        ("d.json", b"[1, 2]", r"d\.json: expected a list of objects"),
        (
            "d.jsonl",
            b'{"sentence": "x", "label": "y"}\n\n{"sentence"\n',
            r"d\.jsonl, line 3, column 12: not valid JSON",
        ),
        ("d.jsonl", b"[]\n", "expected a list of objects"),
        ("d.csv", b"sentence,label\nx,y\nx,y,z\n", r"d\.csv, line 3: more fields than columns"),
        ("d.csv", b"sentence,label,label\nx,y,z\n", r"d\.csv, line 1: two columns are called 'label'"),
        ("d.csv", b"sentence,label\nx,y\nz,y\n", "all 2 rows have the label 'y', so that every answer is right"),
        (
            "d.csv",
            b"sentence,label\n" + b"".join(b"x,%d.5\n" % i for i in range(150)),
            r"150 different labels in 150 rows, such as '0\.5': where answers are free text, metric says",
        ),
        ("d.csv", b"sentence,label\nx\n", r"train row 0: column 'label' is empty; there are 'label', 'sentence'"),
        ("d.csv", b"sentence,label\n\xff\xfe,y\n", r"d\.csv is not UTF-8"),
        ("d.parquet", b"PAR1 and then nothing", r"d\.parquet cannot be read"),
        ("d.parquet", b"", r"d\.parquet cannot be read"),
        ("d.json", b"[]", "task 'a' has no training example"),
        ("d.csv", b"", "task 'a' has no training example"),
    ],
    ids=lambda value: str(value)[:24].replace(" ", "_"),
)
def test_damaged_data(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    path = stream(tmp_path, f"tasks:\n- name: a\n  train_file: {name}\n")
    with pytest.raises(ValueError, match=message):
        load_tasks(path)


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", "[true]", "[", '"yes"'])
def test_damaged_labels_file(content, tmp_path):
    write(tmp_path / "a" / "train.json", ROWS)
    write(tmp_path / "a" / "test.json", ROWS)
    (tmp_path / "a" / "labels.json").write_text(content)
    with pytest.raises(ValueError, match=r"a/labels\.json"):
        load_tasks(stream(tmp_path, "tasks:\n- name: a\n  folder: a\n"))


def hub(monkeypatch, names, numbers):
    """A Hub data set of so many rows "t0", "t1", ... whose label is a class number. Returns what was asked for."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=names) if names else Value("int64")})
    data = Dataset.from_dict({"text": [f"t{i}" for i in range(len(numbers))], "label": numbers}, features)
    asked = []
    load = lambda name, config, split: asked.append((name, config, split)) or data  # noqa: E731
    monkeypatch.setattr("hf_jumplora.data.readers.load_dataset", load)
    return asked


HUB = "tasks:\n- {name: a, folder: TC/a, dataset: org/a, config: c, text: text, eval_split: validation%s}\n"


def test_hub_rows(tmp_path, monkeypatch):
    """The limit takes rows of a fixed shuffle (many sets are sorted), and no class is lost by it."""
    asked = hub(monkeypatch, ["w", "s", "never seen"], [i // 10 for i in range(20)])
    (own,) = load_tasks(stream(tmp_path, HUB % ", max_train: 8"))
    assert asked == [("org/a", "c", "train"), ("org/a", "c", "validation")]
    assert own.labels == ["never seen", "s", "w"]
    assert len(own.train_dataset) == 8
    assert {row["label"] for row in own.train_dataset} == {"w", "s"}


def test_class_numbers_have_the_data_sets_own_names(tmp_path, monkeypatch):
    """Whatever the order of the stream's labels; other names only where the stream says what each is called."""
    hub(monkeypatch, ["World", "Sports", "Sci/Tech"], [0, 1, 2, 1])
    of = lambda task: {row["sentence"]: row["label"] for row in task.train_dataset}  # noqa: E731
    (found,) = load_tasks(stream(tmp_path, HUB % ", labels: [Sci/Tech, Sports, World]"))
    assert found.labels == ["Sci/Tech", "Sports", "World"]
    assert of(found) == {"t0": "World", "t1": "Sports", "t2": "Sci/Tech", "t3": "Sports"}
    (found,) = load_tasks(stream(tmp_path, HUB % ", labels: {Sci/Tech: Science, Sports: Sports, World: Sports}"))
    assert found.labels == ["Science", "Sports"]
    assert of(found) == {"t0": "Sports", "t1": "Sports", "t2": "Science", "t3": "Sports"}
    for labels in ("[World, Sports]", "[World, Sports, Science]", "{World: World, Sports: Sports}"):
        with pytest.raises(ValueError, match=r"own labels are \['World', .* 'Sci/Tech' is not among the stream's"):
            load_tasks(stream(tmp_path, HUB % f", labels: {labels}"))
    hub(monkeypatch, [f"intent{i:03d}" for i in range(150)], [0, 1, 2, 1])  # more classes than rows
    (found,) = load_tasks(stream(tmp_path, HUB % ""))
    assert (len(found.labels), of(found)["t2"]) == (150, "intent002")
    hub(monkeypatch, ["World", "Sports", "Sci/Tech"], [0, 1, 2, 1])
    (found,) = load_tasks(stream(tmp_path, HUB % ", labels: [World, Sports], skip_labels: [Sci/Tech]"))
    assert of(found) == {"t0": "World", "t1": "Sports", "t3": "Sports"}


def test_numbers_without_a_name(tmp_path, monkeypatch):
    """A row without a label (-1) is an error or skipped by name; numbers that nobody named are in no order."""
    hub(monkeypatch, ["no", "yes"], [0, 1, -1, 1])
    with pytest.raises(ValueError, match=r"row \d: label '-1' is not among \['no', 'yes'\]"):
        load_tasks(stream(tmp_path, HUB % ""))
    (found,) = load_tasks(stream(tmp_path, HUB % ', skip_labels: ["-1"]'))
    assert len(found.train_dataset) == 3
    hub(monkeypatch, None, [1, 0, 1])
    with pytest.raises(
        ValueError, match=r"label '[01]' is not among \['bad', 'good'\].*label of the data: label in the"
    ):
        load_tasks(stream(tmp_path, HUB % ", labels: [bad, good]"))
    (found,) = load_tasks(stream(tmp_path, HUB % ", labels: {1: bad, 0: good}"))
    assert {row["sentence"]: row["label"] for row in found.train_dataset} == {"t0": "bad", "t1": "good", "t2": "bad"}


def test_class_numbers_of_a_parquet_file(tmp_path):
    """What the library `datasets` wrote has names; damaged ones are an error that names the file."""
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"kind": ClassLabel(names=["news", "mail"]), "text": Value("string"), "label": ClassLabel(2)})
    Dataset.from_dict({"kind": [1, 0], "text": ["x", "y"], "label": [1, -1]}, features).to_parquet(
        tmp_path / "d.parquet"
    )
    assert read_rows(tmp_path / "d.parquet")[0] == {"kind": "mail", "text": "x", "label": "1"}
    path = stream(tmp_path, 'tasks:\n- {name: a, train_file: d.parquet, text: "{kind}: {text}"}\n')
    with pytest.raises(ValueError, match=r"train row 1: label '-1' is not among \['0', '1'\]"):
        load_tasks(path)
    table = pa.Table.from_pylist(ROWS).replace_schema_metadata({b"huggingface": b'{"info": {"features": 3}}'})
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet cannot be read: its features are damaged"):
        load_tasks(path)


def test_limits_are_drawn(tmp_path):
    """Files are often sorted: a limit takes the first rows of a fixed shuffle, and labels are those of all rows."""
    rows = [{"sentence": f"t{i}", "label": "neg" if i < 50 else "pos"} for i in range(100)] + [
        {"sentence": "u", "label": "rare"}
    ]
    write(tmp_path / "d.csv", rows)
    path = stream(tmp_path, "tasks:\n- {name: a, train_file: d.csv, eval_file: d.csv, max_train: 20, max_eval: 20}\n")
    (found,) = load_tasks(path)
    assert found.labels == ["neg", "pos", "rare"]
    assert 5 < sum(row["label"] == "pos" for row in found.train_dataset) < 15
    assert found.train_dataset == found.eval_dataset == load_tasks(path)[0].train_dataset
    assert load_tasks(path, max_train=30)[0].train_dataset[:20] == found.train_dataset
    assert load_tasks(path, max_train=101)[0].train_dataset == rows  # all of them: as they stand


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["sport", "news"], "holds no text but a list, ['sport', 'news']"),
        ({"role": "user"}, "holds no text but a dict"),
        (None, "is empty"),
        (float("nan"), "is empty"),
    ],
    ids=["list", "dict", "none", "nan"],
)
@pytest.mark.parametrize("entry", ["text: x", 'text: "{y} {x}"', "text: x, language_model: true", "label: x, text: y"])
def test_values_that_are_no_text(value, message, entry, tmp_path):
    """Row and column are named, whether it is a text, a part of one or a label; never what Python prints for it."""
    write(tmp_path / "d.jsonl", [{"x": "fine", "y": 3, "label": "a"}, {"x": value, "y": 4, "label": "a"}])
    path = stream(tmp_path, f"tasks:\n- {{name: a, train_file: d.jsonl, {entry}}}\n")
    with pytest.raises(ValueError, match=re.escape(f"line 2, train row 1: column 'x' {message}")):
        load_tasks(path)


def test_an_eval_file_without_rows(tmp_path):
    """It was given, so that something would be measured."""
    write(tmp_path / "d.json", ROWS)
    write(tmp_path / "e.json", [])
    with pytest.raises(ValueError, match="line 2: task 'a' has an empty eval set"):
        load_tasks(stream(tmp_path, ONE + "  eval_file: e.json\n"))
    assert load_tasks(stream(tmp_path, ONE))[0].eval_dataset is None
