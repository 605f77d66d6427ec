"""What files from outside may hold, and what becomes of text of others on its way out."""

import json

import pytest
import toy
from trl import SFTConfig

from hf_jumplora import ContinualTrainingArguments, JumpLoraConfig, load_tasks
from hf_jumplora.escape import cell, code, plot, terminal
from hf_jumplora.schema import check_adapter_config, read_json, read_yaml, short, stored_arguments
from hf_jumplora.trainer.record import RUN


HOSTILE = {
    "nested deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 5000 digits": b"[" + b"9" * 5000 + b"]",
    "half a surrogate pair": rb'["\ud800"]',
    "not UTF-8": b'["\xff"]',
    "cut": b'{"a": 1',
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_json_that_cannot_be(name, tmp_path):
    path = tmp_path / "stack.json"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"stack\.json is damaged"):
        read_json(path)


def test_json_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_jumplora.schema.MAX_FILE", 100)
    (tmp_path / "run.json").write_text(json.dumps(["x" * 100]))
    with pytest.raises(ValueError, match=r"run\.json is larger than"):
        read_json(tmp_path / "run.json")


CONFIG = json.loads(json.dumps(JumpLoraConfig(r=2, target_modules=["q_proj"]).to_dict(), default=str))
WRONG = [
    {"gate": []}, {"gate": 1}, {"use_rslora": [1]}, {"r": "2"}, {"r": 0}, {"r": 2**40}, {"lora_alpha": float("nan")},
    {"lora_alpha": None}, {"support": [1]}, {"support": {"q": [2**40, "0" * 64]}}, {"support": {"q": [1, "0"]}},
    {"threshold_scope": ["global"]}, {"peft_type": "LORA"}, {"rank_pattern": {"q": 1.5}}, {"alpha_pattern": {"q": -1}},
    {"target_modules": [1]}, {"target_modules": "(.|.)*!"}, {"exclude_modules": "(a+)+$"}, {"target_modules": "("},
    {"rank_pattern": {"(.|.)*!": 2}}, {"target_modules": ".*.*.*.*!"}, {"target_modules": "x" * 2000},
    {"base_model_name_or_path": "a\nb"}, {"revision": "$(x)"}, {"parent_adapters": "task_000"},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG, ids=short)
def test_adapter_config_that_cannot_be(change):
    assert check_adapter_config("adapter_config.json", CONFIG, JumpLoraConfig) == CONFIG
    with pytest.raises(ValueError, match=r"^adapter_config\.json"):
        check_adapter_config("adapter_config.json", {**CONFIG, **change}, JumpLoraConfig)


@pytest.mark.parametrize(
    "pattern", [r".*\.(q_proj|v_proj)", r".*layers\.\d+\..*q_proj", r"[)]*x", r"(a)?\)*", "q_proj"]
)
def test_expressions_that_end(pattern):
    check_adapter_config("adapter_config.json", {**CONFIG, "target_modules": pattern}, JumpLoraConfig)


@pytest.mark.parametrize(
    "name", ["hub_token", "output_dir", "deepspeed", "fsdp", "report_to", "push_to_hub", "torch_compile"]
)
def test_arguments_that_are_not_for_a_stack(name):
    with pytest.raises(ValueError, match=rf"^run\.json names the training argument '{name}'"):
        stored_arguments("run.json", {f"args.{name}": "x"}, ContinualTrainingArguments)


def test_arguments_of_a_stack(toy_run):
    """Everything that a run stores, and that TRL's would, may come back; not with a value of another type."""
    settings = read_json(toy_run.output_dir / RUN)
    for args_class in (ContinualTrainingArguments, SFTConfig):
        assert stored_arguments("run.json", settings, args_class)["learning_rate"] == 0.01
        with pytest.raises(ValueError, match=r"run\.json: args\.learning_rate cannot be 'fast'"):
            stored_arguments("run.json", {**settings, "args.learning_rate": "fast"}, args_class)


STREAMS = {
    "a bomb of aliases": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{k}: &{k} [{','.join(['*' + j] * 10)}]\n" for j, k in zip("abcdefgh", "bcdefghi", strict=True)),
    "an alias in itself": "a: &a [*a]",
    "nested deep": "tasks: " + "[" * 20_000 + "]" * 20_000,
    "a number of 5000 digits": "tasks: " + "9" * 5000,
    "a date that is none": "tasks: 2020-99-99",
    "a zero byte": "tasks: \0",
    "a list as a key": "? [1, 2]\n: x",
}


@pytest.mark.parametrize("name", STREAMS)
def test_yaml_that_cannot_be(name, tmp_path):
    (tmp_path / "s.yaml").write_text(STREAMS[name])
    for read in (read_yaml, load_tasks):
        with pytest.raises(ValueError, match=r"s\.yaml is not valid YAML"):
            read(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '[{"sentence": ' + "9" * 6000 + "}]", r'[{"sentence": "\ud800", "label": "x"}]']
)
def test_rows_that_cannot_be(text, tmp_path):
    (tmp_path / "s.yaml").write_text("tasks: [{name: one, train_file: t.json}]")
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json, line 1.* not valid JSON"):
        load_tasks(tmp_path / "s.yaml")


def test_task_names_are_bounded():
    toy.TextTask("n" * 200, toy.rows(0, 4), labels=toy.KINDS[0])
    with pytest.raises(ValueError, match="200 at most") as error:
        toy.TextTask("n" * 200_000, toy.rows(0, 4), labels=toy.KINDS[0])
    assert len(str(error.value)) < 400


def test_a_token_is_not_shown():
    args = ContinualTrainingArguments("x", hub_token="hf_SECRET", use_cpu=True)
    assert "hf_SECRET" not in repr(args) + str(args)


def test_text_on_its_way_out():
    evil = 'x"]) | <script>\n# head ![i](http://x) \x1b]0;owned\x07 $\\frac{'
    assert "\n" not in cell(evil)
    assert not {"<script", "](", " | "} & {part for part in ("<script", "](", " | ") if part in cell(evil)}
    assert cell("`a | b < c`") == "`a \\| b < c`"
    assert code("a `` b") == "``` a `` b ```"
    assert "\x1b" not in terminal(evil) + plot(evil)
    assert terminal("a\tb\nc") == "a\tb\nc"
    assert "$" not in plot(evil).replace(r"\$", "")
    assert len(plot("n" * 10_000)) == 60
