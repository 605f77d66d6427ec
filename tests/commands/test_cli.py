"""The `hf-jumplora` command: help, one-line errors, exit codes."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
import toy
from packaging.version import Version

from hf_jumplora.cli import COMMANDS, main
from hf_jumplora.commands import doctor
from hf_jumplora.commands import eval as eval_command
from hf_jumplora.methods import METHODS
from hf_jumplora.options import run_recipe


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    module, parser = importlib.import_module(f"hf_jumplora.commands.{command}"), argparse.ArgumentParser()
    module.add_arguments(parser)
    assert " ".join(module.__doc__.split()) in shown
    examples = re.findall(rf"^ *hf-jumplora ({command}.*)$", module.__doc__, re.M)
    assert examples
    _, unknown = parser.parse_known_args(shlex.split(examples[0])[1:])
    assert not unknown  # the example takes options that there are
    for action in parser._actions:
        assert (action.option_strings or [action.dest])[-1] in shown


def test_help_lists_all_commands_and_imports_none():
    code = (
        "import sys\nfrom hf_jumplora.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in sys.modules if name.startswith('hf_jumplora.commands.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(re.search(rf"\n    {name}\s", done.stdout) for name in COMMANDS)
    assert done.stdout.strip().endswith("[]")


def test_python_m():
    """`python -m hf_jumplora` is the command: its help, its errors, its exit codes."""
    command = [sys.executable, "-m", "hf_jumplora"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hf-jumplora ")
    done = subprocess.run([*command, "check", "/nowhere"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("hf-jumplora: ")


@pytest.mark.parametrize("argv", [["inspect"], ["verify"], ["eval", "--stream", "order1"]], ids=" ".join)
def test_an_error_is_one_line(argv, capsys):
    assert main([argv[0], "/nowhere", *argv[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "hf-jumplora: /nowhere is no folder, and no stack on the Hub (a repository is named owner/name)"
    assert main(["check", "/nowhere", "--limits", "/no/limits.yaml"]) == 2
    assert capsys.readouterr().err == "hf-jumplora: /no/limits.yaml: No such file or directory\n"


@pytest.mark.parametrize("said", ["", "finished tasks are safe"])
def test_an_interruption_is_one_line(said, monkeypatch, capsys):
    """Ctrl-C (without words) or SIGTERM, in a command and in a recipe: code 130, as shells have it."""

    def stopped(args=None):
        raise KeyboardInterrupt(*filter(None, [said]))

    monkeypatch.setattr(doctor, "run", stopped)
    assert main(["doctor"]) == 130
    with pytest.raises(SystemExit) as stop:
        run_recipe(stopped)
    assert stop.value.code == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"hf-jumplora: {said or 'interrupted'}"
    assert second.endswith(f": {said or 'interrupted'}")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "hf-jumplora: the following arguments are required: COMMAND (see hf-jumplora --help)"),
        (["inspct"], "hf-jumplora: argument COMMAND: invalid choice: 'inspct'"),
        (["--nonsense", "inspect", "x"], "hf-jumplora: not understood: --nonsense"),
        (["inspect"], "hf-jumplora inspect: the following arguments are required: stack"),
        (["inspect", "x", "--nonsense"], "hf-jumplora inspect: not understood: --nonsense (see hf-jumplora inspect -"),
        (["train", "."], "hf-jumplora train: . is a folder, not a YAML file"),
        (["train", "nope.yaml"], "hf-jumplora train: nope.yaml: no such file"),
    ],
)  # fmt: skip
def test_wrong_usage(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_methods(capsys):
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == list(METHODS)
    assert "jumplora           gated  incremental  JumpLoRA (arXiv 2604.16171)" in lines
    assert "                   --strategy loraga.gamma, loraga.examples" in lines
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["name"] == next(iter(METHODS))
    assert {row["name"]: row["options"] for row in rows}["nlora"] == ["nlora.weight", "nlora.l1"]


def test_doctor(capsys, monkeypatch):
    monkeypatch.delenv("HF_JUMPLORA_BACKEND", raising=False)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"  torch {torch.__version__}" in shown
    assert "cpu (processor): backend blocked" in shown


def test_doctor_names_what_is_wrong(capsys, monkeypatch):
    """A library that is too old, an extra that is missing, and a backend that cannot run here."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    monkeypatch.setattr("hf_jumplora._compat.LOWEST", [("peft", Version("0.20"), Version("0.21"), "no hooks")])
    monkeypatch.setenv("HF_JUMPLORA_BACKEND", "nonsense")
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "peft 0.20: no hooks; install peft>=0.21" in shown
    assert "ZeRO: pip install deepspeed" in shown
    assert "HF_JUMPLORA_BACKEND is one of" in shown


def write_stream(folder):
    """The toy tasks as files."""
    lines = ["tasks:"]
    for task in toy.tasks(2):
        for name, rows in (("train", task.train_dataset), ("eval", task.eval_dataset)):
            (folder / f"{task.name}_{name}.json").write_text(json.dumps(rows))
        lines += [
            f"- name: {task.name}",
            f"  train_file: {task.name}_train.json",
            f"  eval_file: {task.name}_eval.json",
        ]
        lines += [f"  instruction: {task.instruction}", "  text: sentence", "  label: label"]
    (folder / "stream.yaml").write_text("\n".join(lines))
    return folder / "stream.yaml"


def test_train_and_eval(toy_base, tmp_path, capsys, monkeypatch):
    """From a YAML file to a stack, whose scores `eval` finds again; and what is wrong is one line."""
    stream, config, out = write_stream(tmp_path), tmp_path / "run.yaml", tmp_path / "out"
    options = {
        "model_name_or_path": toy_base, "stream": str(stream), "output_dir": str(out), "method": "inclora", "r": 2,
        "target_modules": ["q_proj"], "use_cpu": True, "max_length": 32, "save_strategy": "no", "max_steps": 4,
        "per_device_train_batch_size": 4, "report_to": "none", "eval_mode": "score",
    }  # fmt: skip
    config.write_text(json.dumps(options))
    assert main(["train", str(config), "--learning_rate", "1e-2"]) == 0
    result = json.loads((out / "metrics.json").read_text())
    assert json.loads((out / "run.json").read_text())["args.learning_rate"] == 1e-2
    capsys.readouterr()
    argv = ["eval", str(out), "--stream", str(stream), "--eval_mode", "score", "--max_length", "32", "--json", "True"]
    assert main(argv) == 0
    scores = json.loads(capsys.readouterr().out)
    assert [scores[name]["accuracy"] for name in result["tasks"]] == result["matrix"][-1]
    assert main(["router", str(out), "--stream", str(stream), "--examples", "4", "--max_length", "32"]) == 0
    assert "tasks act on a row" in capsys.readouterr().out
    assert main([*argv, "--route", "learned"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == scores.keys()
    with pytest.raises(SystemExit) as stop:
        main(["train", str(config), "--lerning_rate", "1"])
    assert stop.value.code == 2
    config.write_text("stream: x\n")
    assert main(["train", str(config), "--use_cpu", "True"]) == 2
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", str(out), "--lm_eval", "hellaswag"]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-jumplora")]
    assert "pip install lm-eval" in errors.pop()
    assert "not understood: --lerning_rate 1; did you mean --learning_rate?" in errors[0]
    assert "has no model_name_or_path: give it there or as --model_name_or_path" in errors[1]
    assert len(errors) == 2
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(out), "--stream", str(stream), "--limit", "3"])
    assert stop.value.code == 2
    assert "--include_path, --limit and --each_task are for --lm_eval" in capsys.readouterr().err


def test_lm_eval_loads_one_model_at_a_time(toy_run, capsys, monkeypatch):
    """Each merged model is gone when the next one or the base is loaded. lm-eval itself is not needed for that."""
    models = []

    def harness(model, encoder, options):
        assert [ref() for ref in models] == [None] * len(models)
        models.append(weakref.ref(model))
        return {"toy acc": float(len(models))}

    monkeypatch.setattr(eval_command, "find_spec", lambda name: True)
    monkeypatch.setattr(eval_command, "harness", harness)
    names = [task.name for task in toy.tasks(2)]
    argv = ["eval", str(toy_run.output_dir), "--tasks", *names, "--lm_eval", "toy", "--each_task"]
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"toy acc": {"base": 2.0, "stack": 1.0, "each": [3.0, 1.0]}}
    assert main(argv) == 0
    shown = capsys.readouterr().out.split("\n")
    assert shown[-4:-1] == [
        f"{'toy acc':<40} 5.0000 before training, 4.0000 with the stack",
        f"  after {names[0]:<32} 6.0000",
        f"  after {names[1]:<32} 4.0000",
    ]
    snapshots = SimpleNamespace(additive=False, separate=False, competing=False, method="seqlora")
    monkeypatch.setattr("hf_jumplora.stack.load.find_manifest", lambda *_: (None, snapshots))
    assert main(argv) == 2
    assert "which is not how 'seqlora' makes its models" in capsys.readouterr().err


TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: [tiny, huge]
doc_to_target: label
"""


def test_lm_eval(toy_run, tmp_path, capsys, monkeypatch):
    """A local task, on the base and after each task; the page of the run shows all."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    run, task = tmp_path / "run", toy.tasks()[0]
    rows = [
        {"prompt": task.render(row["sentence"]), "label": task.labels.index(row["label"])} for row in task.eval_dataset
    ]
    shutil.copytree(toy_run.output_dir, run)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "toy_choice.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.json")))
    argv = ["eval", str(run), "--max_length", "32", "--include_path", str(tmp_path), "--lm_eval"]
    assert main([*argv, "toy_choice", "--each_task", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    page = (run / "report.html").read_text()
    for key, row in scores.items():
        assert key.startswith("toy_choice acc")
        cells = "".join(f"<td>{value:.4f}</td>" for value in [row["base"], *row["each"]])
        assert f"<th>{key}</th>{cells}" in page
    untrained, *trained = [row[0] for row in toy_run.record.matrix]
    # lm-eval takes the likeliest answer, as eval_mode="score" does
    assert scores["toy_choice acc"] == {"base": untrained, "stack": trained[-1], "each": trained}


@pytest.fixture(scope="module")
def completion():
    """{shell: its script}."""
    out = {}
    for shell in ("bash", "zsh", "fish"):
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            assert main(["completion", shell]) == 0
        out[shell] = stdout.getvalue()
    return out


def bash_completes(script, *words):
    """What bash offers for the last of `words`."""
    script += 'COMP_CWORD=$(($# - 1)); COMP_WORDS=("$@"); _hf_jumplora; printf \'%s\\n\' "${COMPREPLY[@]}"'
    return subprocess.run(["bash", "-c", script, *words[:1], *words], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("squ", ["squeeze"]),
        ("check --max_general", ["--max_general_loss", "--max_general_drop"]),
        ("train run.yaml --gate_l", ["--gate_learning_rate"]),
        ("train run.yaml --method jumplora-b", ["jumplora-best", "jumplora-best-lwf"]),
        ("eval --max_ev", ["--max_eval"]),
        ("bench --methods al", ["all"]),
        ("completion z", ["zsh"]),
        ("report ru", [""]),  # readline goes on with the names of files
    ],
)
def test_completion_in_bash(completion, line, offered):
    assert bash_completes(completion["bash"], "hf-jumplora", *line.split()).split("\n")[:-1] == offered


def test_completion_of_other_shells(completion):
    """zsh runs bash's function; fish knows every command and option."""
    assert completion["zsh"].endswith(completion["bash"])
    lines = completion["fish"].splitlines()
    for command, line in COMMANDS.items():
        quoted = line.replace("'", "\\'")
        assert f"complete -c hf-jumplora -n __fish_use_subcommand -f -a {command} -d '{quoted}'" in lines
    (method,) = [line for line in lines if "_from train'" in line and "-l method " in line]
    assert f"-x -a '{' '.join(METHODS)}'" in method
    if fish := shutil.which("fish"):
        subprocess.run([fish, "--no-config", "-c", completion["fish"]], check=True)


def test_eval_of_a_stack_that_was_moved_with_its_base(toy_base, tmp_path):
    """The tokenizer lies beside the stack, as the base does that the run has copied."""
    base = toy.load_base(toy_base)
    base.lm_head.weight.data[3] += 1  # no longer that of the folder
    with pytest.warns(UserWarning, match="is the base of this stack"):
        toy.make_run(base, tmp_path / "here", stream=toy.tasks(1)).train()
    shutil.move(tmp_path / "here", tmp_path / "there")
    model, encoder = eval_command.merged_and_encoder(str(tmp_path / "there"), None, None, None)
    assert encoder.tokenizer.get_vocab() == toy.tokenizer().get_vocab()
    assert model.lm_head.weight[3].mean() > 0.5
