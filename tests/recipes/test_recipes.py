"""The scripts a user copies: their command lines, the streams that are shipped, and a whole run of each kind."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import yaml

from hf_jumplora import ContinualTrainingArguments, load_stack
from hf_jumplora.bench.encoder import LabelEmbeddingClassifier, accuracy, embed
from hf_jumplora.bench.tiny_llama import build_tiny_llama
from hf_jumplora.data.streams import load_tasks, read_stream
from hf_jumplora.options import MethodArguments, StreamArguments, parse_recipe
from hf_jumplora.strategies import Ella


RECIPES = Path(__file__).parents[2] / "recipes"


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


# ---- command lines -----------------------------------------------------------------------------------------------


@dataclass
class Model:
    model_name_or_path: str | None = None


CLASSES = (Model, StreamArguments, MethodArguments, ContinualTrainingArguments)


def parse(*argv):
    return parse_recipe(CLASSES, list(argv))


def config(folder, text):
    path = folder / "c.yaml"
    path.write_text(text)
    return str(path)


def test_config_and_options(tmp_path):
    """The file gives the defaults, the line wins; lists, booleans, numbers, mappings and None arrive as such."""
    text = "target_modules: [q_proj, v_proj]\nr: 4\nlearning_rate: 1.0e-3\nbf16: false\nisolation: hard\ndata_dir:\n"
    text += "gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    line = ["--r", "16", "--max_steps", "7", "--output_dir", "out", "--use_cpu", "True"]
    _, stream, method, args = parse("--config", config(tmp_path, text), *line)
    assert (method.r, method.target_modules, method.isolation) == (16, ["q_proj", "v_proj"], "hard")
    assert (args.learning_rate, args.max_steps, args.bf16, args.output_dir) == (1e-3, 7, False, "out")
    assert (stream.data_dir, args.gradient_checkpointing_kwargs) == (None, {"use_reentrant": False})
    _, _, method, _ = parse("--config", config(tmp_path, text), *line, "--target_modules", "k_proj")
    assert method.target_modules == ["k_proj"]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("lerning_rate: 1", [], r"c.yaml: unknown key 'lerning_rate'"),
        ("r: [1, 2]", [], "not understood: 2"),
        ("r: many", [], "argument --r: invalid int value: 'many'"),
        ("r: 4", ["--lerning_rate", "1"], "not understood: --lerning_rate 1; did you mean --learning_rate?"),
        ("eval_mode: guess", [], "argument --eval_mode"),
        ("max_length: 2", [], "max_length = 2 leaves no room"),
        ("- r", [], "c.yaml: expected keys and values"),
        ("r: [", [], "c.yaml is not valid YAML"),
    ],
)
def test_bad_command_line(text, line, message, tmp_path, capsys):
    """Ends with usage and a message that names the key or option."""
    with pytest.raises(SystemExit):
        parse("--config", config(tmp_path, text), "--use_cpu", "True", *line)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"), [(["--config"], "needs a YAML file"), (["--config", "x"], "no such file")]
)
def test_bad_config_option(line, message, capsys):
    with pytest.raises(SystemExit):
        parse(*line)
    assert message in capsys.readouterr().err


def test_method_arguments():
    """Options of the gate are for gated methods, and reach only those in a comparison; ELLA's weight where it means
    something."""
    options = {"isolation": "hard", "threshold_update": "density", "target_density": 0.1}
    gated = MethodArguments("jumplora", **options).adapter_config(["q"])
    assert (gated.isolation, gated.target_density, gated.target_modules) == ("hard", 0.1, {"q"})
    with pytest.raises(ValueError, match="method 'inclora' has no gate"):
        MethodArguments("inclora", **options).adapter_config()
    assert MethodArguments("jumplora", **options).plans(["inclora"])["inclora"][0].isolation == "none"
    assert MethodArguments("ella").strategies() is None
    assert MethodArguments("jumplora-ella", strategy=["ella.weight=5"]).strategies() == [Ella(5)]
    with pytest.raises(ValueError, match=r"'ella\.weight=5': method 'jumplora' has no strategies"):
        MethodArguments("jumplora", strategy=["ella.weight=5"]).strategies()
    with pytest.raises(ValueError, match="unknown method 'lora'"):
        MethodArguments("lora").adapter_config()


@pytest.mark.parametrize("path", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
    """Every key is an option of the recipe, and a stream that is named is there."""
    module = recipe("t5_cl" if "t5" in path.stem else "llama2_cl")
    classes = (module.ModelArguments, StreamArguments, MethodArguments, ContinualTrainingArguments)
    _, stream, method, args = parse_recipe(classes, ["--config", str(path), "--bf16", "False", "--use_cpu", "True"])
    assert method.adapter_config().r == 8
    assert stream.stream is None or (RECIPES.parent / stream.stream).is_file()
    if path.stem in ("llama2_7b", "t5_large"):  # as published
        assert args.learning_rate == 1e-3
        assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32


ORDERS = {  # arXiv 2310.14152, table 9
    1: "dbpedia amazon yahoo agnews",
    2: "dbpedia amazon agnews yahoo",
    3: "yahoo amazon agnews dbpedia",
    4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst-2 dbpedia agnews multirc yahoo",
    5: "multirc boolqa wic mnli cb copa qqp rte imdb sst-2 dbpedia agnews yelp amazon yahoo",
    6: "yelp amazon mnli cb copa qqp rte imdb sst-2 dbpedia agnews yahoo multirc boolqa wic",
}


@pytest.mark.parametrize("order", ORDERS)
def test_streams(order):
    """The published orders, of tasks that the catalogue describes."""
    data, entries, _ = read_stream(RECIPES / "streams" / f"order{order}.yaml")
    names = [entry for _, entry in entries]
    same = {name.lower().replace("-", ""): name for name in names}
    assert [name.lower() for name in same] == [name.replace("-", "") for name in ORDERS[order].split()]
    _, listed, _ = read_stream(RECIPES / "streams" / data["catalogue"])
    assert set(names) <= {entry["name"] for _, entry in listed}


TRACE = {  # arXiv 2310.06762: its order, and what it measures
    "C-STANCE": "accuracy",
    "FOMC": "accuracy",
    "MeetingBank": "rouge_l",
    "Py150": "edit_similarity",
    "ScienceQA": "first_letter",
    "NumGLUE-cm": "exact_match",
    "NumGLUE-ds": "exact_match",
    "20Minuten": "sari",
}


def test_trace(toy_base, tmp_path):
    """From a folder as the authors release it, through a whole run: every task with its own measure."""
    for name in TRACE:
        (tmp_path / name).mkdir()
        rows = [{"prompt": f"the {subject} =", "answer": f"very {'dark' if i % 2 else 'pale'}"}
                for i, subject in enumerate(toy.SUBJECTS)]  # fmt: skip
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.json").write_text(json.dumps(rows))
    tasks = load_tasks("trace", data_dir=tmp_path)
    assert {task.name: task.metric for task in tasks} == TRACE
    assert [task.labels for task in tasks][:3] == [["very dark", "very pale"]] * 2 + [[]]
    assert tasks[0].render("a question: ") == "a question:"
    assert [task.max_answer for task in tasks] == [None, None, 512, 128, 512, 32, 32, 512]
    for task in tasks[2:]:
        task.max_answer = 6  # the toy model has room for 64 tokens
    result = toy.make_run(toy_base, tmp_path / "out", "inclora", tasks, max_steps=2).train().metrics
    assert all(0 <= score <= 1 for row in result["matrix"] for score in row)
    report = (tmp_path / "out" / "report.md").read_text()
    for name, metric in TRACE.items():
        assert f"{name}: {metric}" in report
    with pytest.raises(FileNotFoundError, match=r"streams/C-STANCE/train\.json does not exist"):
        load_tasks("trace")


def test_domains(tmp_path, monkeypatch):
    """Plain text of the Hub, or of a folder; text of no domain is held out."""
    from datasets import Dataset

    asked, columns = [], {"text": ["a b", " "], "abstract": ["c d", "e"], "code": ["f g", "h"]}

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_dict(columns)

    monkeypatch.setattr("hf_jumplora.data.readers.load_dataset", load_dataset)
    tasks = load_tasks("domains")
    assert [(task.name, task.held_out) for task in tasks] == [
        *((name, False) for name in ("reviews", "law", "medicine", "code")),
        ("wikitext", True),
    ]
    assert ("ccdv/pubmed-summarization", "document", "test") in asked
    assert ("Salesforce/wikitext", "wikitext-2-raw-v1", "test") in asked
    assert len(asked) == 10
    assert tasks[0].eval_dataset == [{"text": "a b"}]
    assert tasks[3].source == "hf://datasets/google/code_x_glue_ct_code_to_text"
    for task in tasks:
        (tmp_path / task.name).mkdir()
        for split in ("train", "test"):
            (tmp_path / task.name / f"{split}.json").write_text(json.dumps([{"text": f"{task.name} {split}"}]))
    local = load_tasks("domains", data_dir=tmp_path)
    assert [task.eval_dataset[0]["text"] for task in local] == [f"{task.name} test" for task in tasks]
    assert len(asked) == 10


def test_catalogue_is_complete():
    """Fifteen tasks, each with a place in the folder layout, a Hub id, an instruction and labels that are strings."""
    tasks = yaml.safe_load((RECIPES / "streams" / "benchmark.yaml").read_text())["tasks"]
    assert len({task["name"] for task in tasks}) == len(tasks) == 15
    for task in tasks:
        assert {"folder", "dataset", "instruction", "labels"} <= set(task), task["name"]
        labels = task["labels"]  # or {the data's label: the label in the prompt}
        assert all(isinstance(label, str) for label in (labels.values() if isinstance(labels, dict) else labels))


# ---- encoder_cl --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a random two-layer BERT with the toy tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=96, max_position_embeddings=64, initializer_range=0.3, **sizes))
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return folder


def test_label_embedding_classifier(bert):
    """The classifier is the labels' own embeddings: a label as text is its own best answer."""
    from transformers import AutoModel

    labels = ["tiny", "huge slow", "dark", "pale"]
    batch = toy.tokenizer()(labels, padding=True, return_tensors="pt")
    encoder = AutoModel.from_pretrained(bert).eval()
    with torch.no_grad():
        embeddings = embed(encoder(batch.input_ids, batch.attention_mask).last_hidden_state, batch.attention_mask)
        alone = embed(encoder(batch.input_ids[:1, :1]).last_hidden_state, torch.ones(1, 1))
    torch.testing.assert_close(embeddings.norm(dim=-1), torch.ones(4))
    torch.testing.assert_close(embeddings[:1], alone)  # padding does not count
    model = LabelEmbeddingClassifier(encoder, embeddings, 20.0).eval()
    output = model(batch.input_ids, batch.attention_mask, labels=torch.arange(4))
    assert output.logits.argmax(-1).tolist() == [0, 1, 2, 3]
    assert torch.isfinite(output.logits).all()  # training is over the labels of all tasks
    torch.testing.assert_close(output.logits[0, 0], torch.tensor(20.0))
    assert torch.isfinite(output.loss)


def test_answers_are_chosen_among_the_tasks_own_labels():
    from transformers import EvalPrediction

    logits = np.array([[9.0, 0.0, 1.0, 0.0], [9.0, 0.0, 0.0, 1.0]])
    prediction = EvalPrediction(predictions=logits, label_ids=np.array([2, 2]))
    assert accuracy([1, 2], prediction) == {"accuracy": 0.5}  # 2 and 1: of two equals the first
    assert accuracy([0, 1, 2, 3], prediction) == {"accuracy": 0.0}


def write_stream(folder):
    """The toy tasks in the folder layout."""
    lines = ["tasks:"]
    for task in toy.tasks(2):
        (folder / task.name).mkdir(parents=True)
        for name, rows in (("train", task.train_dataset), ("test", task.eval_dataset), ("labels", task.labels)):
            (folder / task.name / f"{name}.json").write_text(json.dumps(rows))
        lines += [f"- name: {task.name}", f"  folder: {task.name}", f"  instruction: {task.instruction}"]
    (folder / "stream.yaml").write_text("\n".join(lines))
    return str(folder / "stream.yaml")


COMMON = [
    "--report_to",
    "none",
    "--use_cpu",
    "True",
    "--save_strategy",
    "no",
    "--learning_rate",
    "1e-2",
    "--per_device_train_batch_size",
    "4",
    "--disable_tqdm",
    "True",
    "--logging_steps",
    "2",
]


@pytest.mark.parametrize("method", ["jumplora", "mtl"])
def test_encoder_cl(method, bert, tmp_path, monkeypatch, capsys):
    """Its main on a tiny BERT: the whole run, its table and its stack (over a module that is no transformers class)."""
    encoder_cl = recipe("encoder_cl")
    line = ["--stream", write_stream(tmp_path / "data"), "--model_name_or_path", str(bert), "--method", method]
    monkeypatch.setattr(sys, "argv", ["encoder_cl.py", *line, "--output_dir", str(tmp_path / "out"), *COMMON])
    encoder_cl.main()
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(result["matrix"]) == (2 if method == "mtl" else 3)
    assert f"{method}: accuracy in %" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"pass the model itself as base_model="):
        load_stack(tmp_path / "out")


# ---- as a user starts them ---------------------------------------------------------------------------------------


def command(name, *arguments, cwd):
    done = subprocess.run(
        [sys.executable, str(RECIPES / f"{name}.py"), *map(str, arguments)],
        capture_output=True, text=True, cwd=cwd, timeout=400, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_t5_cl(toy_t5, tmp_path, monkeypatch, capsys):
    """A seq2seq run from its command line."""
    t5_cl = recipe("t5_cl")
    line = ["--stream", write_stream(tmp_path / "data"), "--model_name_or_path", toy_t5, *COMMON]
    monkeypatch.setattr(sys, "argv", ["t5_cl.py", *line, "--output_dir", str(tmp_path / "out")])
    t5_cl.main()
    assert "jumplora-best: accuracy in %" in capsys.readouterr().out
    assert len(load_stack(tmp_path / "out").peft_config) == 2


@pytest.mark.slow
def test_llama2_cl_with_everything_made_on_the_spot(tmp_path):
    """No model, no data: pre-trains, trains two methods on the four generated tasks, compares them; a second start is
    done at once."""
    line = ["--tiny_steps", 3, "--max_train", 320, "--max_eval", 8, "--compare", "seqlora", "--output_dir", "out"]
    line += ["--use_cpu", "True", "--disable_tqdm", "True"]
    output = command("llama2_cl", *line, cwd=tmp_path)
    assert "all methods, accuracy in %" in output
    matrix = json.loads((tmp_path / "out" / "jumplora-best" / "metrics.json").read_text())["matrix"]
    assert (len(matrix), len(matrix[0])) == (5, 4)
    model = load_stack(tmp_path / "out" / "jumplora-best")
    assert len(model.peft_config) == 4
    before = (tmp_path / "out" / "seqlora" / "stack.json").read_bytes()
    again = command("llama2_cl", *line, cwd=tmp_path)
    assert again[again.index("all methods") :] == output[output.index("all methods") :]
    assert (tmp_path / "out" / "seqlora" / "stack.json").read_bytes() == before


def test_llama2_cl_with_own_model_and_stream(toy_base, tmp_path, monkeypatch, capsys):
    """In this process: the options that replace the embedded model and stream."""
    llama2_cl = recipe("llama2_cl")
    line = ["--stream", write_stream(tmp_path / "data"), "--model_name_or_path", toy_base, "--eval_mode", "score"]
    line += [
        "--output_dir",
        str(tmp_path / "out"),
        "--method",
        "jumplora-ella",
        "--strategy",
        "ella.weight=100",
        *COMMON,
    ]
    monkeypatch.setattr(sys, "argv", ["llama2_cl.py", *line])
    llama2_cl.main()
    assert "jumplora-ella: accuracy in %" in capsys.readouterr().out
    assert len(load_stack(tmp_path / "out").peft_config) == 2


def test_llama2_cl_with_smollm2(tmp_path, monkeypatch, capsys):
    """`--model smollm2` alone trains it on the demo's tasks; without its package one line says what to install."""
    llama2_cl = recipe("llama2_cl")
    base = str(build_tiny_llama(recipe("demo_stream").demo_corpus(), tmp_path / "base", layers=1, steps=1))
    line = ["--model", "smollm2", "--cache_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    line += ["--max_steps", "5", "--max_eval", "2", "--compare", "inclora", "--use_cpu", "True"]
    monkeypatch.setattr(sys, "argv", ["llama2_cl.py", *line])
    monkeypatch.setattr(llama2_cl, "smollm2", lambda: Path(base))
    llama2_cl.main()
    assert "trained on       animals  places  moods  foods" in capsys.readouterr().out
    assert (tmp_path / "out" / "jumplora-best" / "task_003").is_dir()
    assert json.loads((tmp_path / "out" / "inclora" / "run.json").read_text())["base_model"] == base

    def missing():
        raise FileNotFoundError("SmolLM2 needs two packages")

    monkeypatch.setattr(llama2_cl, "smollm2", missing)
    with pytest.raises(FileNotFoundError, match="SmolLM2 needs two packages"):
        llama2_cl.main()


def test_llama2_cl_in_4_bits(toy_base, tmp_path, monkeypatch):
    """The base is loaded as the options say, and the products are computed in the dtype of its other weights."""
    pytest.importorskip("bitsandbytes")
    llama2_cl = recipe("llama2_cl")
    line = ["--stream", write_stream(tmp_path / "data"), "--model_name_or_path", toy_base, "--eval_mode", "score"]
    line += ["--output_dir", str(tmp_path / "out"), "--load_in_4bit", "--use_bnb_nested_quant", "true", *COMMON]
    monkeypatch.setattr(sys, "argv", ["llama2_cl.py", *line])
    llama2_cl.main()
    found = json.loads((tmp_path / "out" / "run.json").read_text())["quantization"]
    assert found["load_in_4bit"]
    assert found["bnb_4bit_use_double_quant"]
    assert (found["bnb_4bit_quant_type"], found["bnb_4bit_compute_dtype"]) == ("nf4", "float32")
    assert len(load_stack(tmp_path / "out").peft_config) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--load_in_4bit", "--load_in_8bit"], "load_in_4bit and load_in_8bit exclude each other"),
        (["--bnb_4bit_quant_type", "fp4"], "bnb_4bit_quant_type has no meaning without load_in_4bit"),
        (["--from_stack", "x", "--load_in_4bit"], "--load_in_4bit has no meaning with --from_stack"),
        (["--from-stack", "x", "--lora-alpha", "64"], "--lora_alpha has no meaning with --from_stack"),
        (["--from_stack", "x", "--lora_al", "64"], "not understood: --lora_al 64; did you mean --lora_alpha?"),
        (["--model", "gpt2"], "model is 'smollm2' (any other model: model_name_or_path), got 'gpt2'"),
        (["--model", "smollm2"], "model, model_name_or_path and tiny_from_text exclude one another"),
    ],
    ids=["both", "no-4bit", "from-stack", "dashes", "abbreviation", "unknown-model", "smollm2-and-a-model"],
)
def test_llama2_cl_model_options_that_do_not_fit(line, message, toy_base, tmp_path, monkeypatch, capsys):
    llama2_cl = recipe("llama2_cl")
    line = [*line, "--model_name_or_path", toy_base, "--output_dir", str(tmp_path / "out"), *COMMON]
    monkeypatch.setattr(sys, "argv", ["llama2_cl.py", *line])
    with pytest.raises((SystemExit, ValueError)) as stop:
        llama2_cl.main()
    assert message in f"{stop.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--stream", "STREAM"], "--stream needs --model_name_or_path"),
        (["--stream", "STREAM", "--tiny_from_text", "True", "--model_name_or_path", "x"], "makes the model itself"),
    ],
    ids=["no-model", "two-models"],
)
def test_llama2_cl_options_that_do_not_fit(line, message, tmp_path, monkeypatch):
    llama2_cl = recipe("llama2_cl")
    stream = write_stream(tmp_path / "data")
    line = [stream if word == "STREAM" else word for word in line]
    monkeypatch.setattr(sys, "argv", ["llama2_cl.py", *line, "--output_dir", str(tmp_path / "out"), *COMMON])
    with pytest.raises(ValueError, match=message):
        llama2_cl.main()
    assert not (tmp_path / "out").exists()


def test_plans_are_checked_before_anything_is_built():
    from hf_jumplora.options import MethodArguments

    plans = MethodArguments(method="jumplora-ella", strategy=["ella.weight=5"]).plans(["inclora", "ella"])
    assert list(plans) == ["jumplora-ella", "inclora", "ella"]
    assert [plans[name][1] and plans[name][1][0].weight for name in plans] == [5.0, None, 5.0]
    assert [plans[name][0].gate for name in plans] == [True, False, False]  # the method's own prescription
    with pytest.raises(ValueError, match="unknown method 'typo'"):
        MethodArguments().plans(["typo"])
    with pytest.raises(ValueError, match="target_density"):
        MethodArguments(threshold_update="density", target_density=7).plans([])


def test_seq_cls_cl_keeps_the_base_it_made(toy_base, tmp_path, monkeypatch):
    """A stack needs the same base again; one of other labels or another seed is refused, not taken for it."""
    monkeypatch.syspath_prepend(RECIPES)
    with_head, folder = recipe("seq_cls_cl").with_head, tmp_path / "run" / "base"
    assert with_head(toy_base, ["cat", "dog"], folder, 0, "float32") == str(folder)
    made = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert with_head(toy_base, ["cat", "dog"], folder, 0, "float32") == str(folder)
    for labels, seed in ((["dog", "cat"], 0), (["cat", "dog"], 1)):
        with pytest.raises(ValueError, match="was made of another model, seed, dtype or labels"):
            with_head(toy_base, labels, folder, seed, "float32")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == made
