"""What a run cannot do is said before it trains, and what it can do but nobody had tried."""

import multiprocessing
import time

import pytest
import torch
import toy
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    TrainerCallback,
)

from hf_jumplora import ContinualRun, JumpLoraConfig, LanguageModelTask, Task, TextTask, load_stack
from hf_jumplora.data import Encoder
from hf_jumplora.methods import METHODS
from hf_jumplora.stack import merge_stack
from hf_jumplora.strategies import KFac
from hf_jumplora.trainer.checkpoints import newest_checkpoint
from hf_jumplora.trainer.record import in_use
from hf_jumplora.trainer.scoring import score_labels
from hf_jumplora.trainer.task import _check_unchanged, _frozen


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[3, 12, 13, 8, 14, 9]])).logits


def test_tied_weights(tmp_path):
    """A merge of lm_head would change the embeddings too."""
    config = toy.config()
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match=r"target module lm_head is that of model\.embed_tokens too \(tied\)"):
        get_peft_model(LlamaForCausalLM(config), JumpLoraConfig(target_modules=["q_proj", "lm_head"]))
    get_peft_model(LlamaForCausalLM(toy.config()), JumpLoraConfig(target_modules=["lm_head"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adapter_config": LoraConfig()}, "adapter_config is a JumpLoraConfig"),
        ({"strategies": [KFac]}, "strategies takes Strategy objects"),
        ({"model": "me/model"}, "model must be a loaded model"),
        (
            {
                "method": "jumplora-hard",
                "adapter_config": JumpLoraConfig(threshold_update="density", target_density=0.4),
            },
            r"3 tasks that keep 40% each.*target_density must be below 0\.333",
        ),
    ],
)
def test_before_training(change, message, toy_base, tmp_path):
    given = {"model": toy.load_base(toy_base), "tasks": toy.tasks(3), "args": toy.arguments(tmp_path)}
    given |= {"processing_class": toy.tokenizer(), **change}
    with pytest.raises(ValueError, match=message):
        ContinualRun(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 5}, "task name 5"),
        ({"prompt": "{instructions}: {text}"}, r"not for 'instructions'"),
        ({"train_dataset": ["a row"]}, "a row is a dict with sentence, label, got 'a row'"),
        ({"labels": [], "metric": "rouge_l", "max_answer": 0}, "max_answer is a positive number"),
    ],
)
def test_bad_tasks(change, message):
    given = {"name": "size", "train_dataset": toy.rows(0, 8), "labels": toy.KINDS[0], **change}
    with pytest.raises(ValueError, match=message):
        TextTask(**given)


def test_empty_texts_and_strange_options(toy_base, tmp_path):
    task = LanguageModelTask("news", [{"text": " "}])
    with pytest.raises(ValueError, match="'news': all its training texts are empty"):
        toy.make_run(toy_base, tmp_path, stream=[task]).train()
    with pytest.raises(ValueError, match="a value has the wrong type"):
        METHODS["kfac"].make_strategies(["kfac.weight=abc"])
    for r in (2.5, 0, -1):
        with pytest.raises(ValueError, match=f"r must be a positive integer, got {r}"):
            JumpLoraConfig(r=r)


def test_one_long_text_is_many_steps(toy_base, tmp_path):
    """The gate's ramp is checked against the steps of the pieces, not of the texts."""
    task = LanguageModelTask("news", [{"text": "the very big cat2 " * 100}])
    assert toy.make_run(toy_base, tmp_path, stream=[task], max_length=16).train().metrics["trained"][0]["steps"] > 5


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"accuracy": float("nan")}, "'a': its accuracy is nan, which is not a score"),
        ({"accuracy": "good"}, "'a': its accuracy is 'good', which is not a score"),
        (None, "'a': compute_metrics returned None, not a dict"),
        (0.5, "'a': compute_metrics returned 0.5, not a dict"),
    ],
)
def test_a_score_is_a_number(found, message, toy_base, tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}] * 32)
    task = Task("a", rows, rows, compute_metrics=lambda output: found)
    with pytest.raises(ValueError, match=message):
        toy.make_run(toy_base, tmp_path, stream=[task]).evaluate()


def test_a_metric_of_batches(toy_base, tmp_path):
    """`batch_eval_metrics`: only the last call has a result."""
    rows, seen = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}] * 32), []

    def accuracy(output, compute_result):
        seen.append(len(output.predictions))
        return {"accuracy": sum(seen) / 100} if compute_result else None

    options = {"batch_eval_metrics": True, "per_device_eval_batch_size": 20}
    run = toy.make_run(toy_base, tmp_path, stream=[Task("a", rows, rows, accuracy)], **options)
    assert run.evaluate() == {"a": 0.32}
    assert seen == [20, 12]


class Writes(TrainerCallback):
    """Into the base, at a moment of a task's training."""

    def __init__(self, moment: str):
        self.moment = moment

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if self.moment == "init":
            model.get_base_model().lm_head.weight.requires_grad_(True)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.moment == "step" and args.output_dir.endswith("task_001"):
            model.get_base_model().lm_head.weight.data[0, 0] += 1e-6


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("init", r"task 'size': .*lm_head\.weight of the base would be trained"),
        ("step", r"lm_head\.weight of the base changed while task 'light' was trained \(1 weights"),
    ],
)
def test_the_base_stays_as_it_is(moment, message, toy_base, tmp_path):
    """What is trained beside the adapters is in no stack."""
    run = toy.make_run(toy_base, tmp_path, "inclora", toy.tasks(2), callbacks=[Writes(moment)], max_steps=1)
    with pytest.raises(RuntimeError, match=message):
        run.train()
    assert len(list(tmp_path.glob("task_*"))) == (moment == "step")


def test_sums_see_what_digests_see(toy_base, tmp_path):
    """On a GPU the base is known by sums of its bytes, and by what it was known by if it has been moved since."""
    model, args = toy.load_base(toy_base).requires_grad_(False), toy.arguments(tmp_path)
    digests = _frozen(model, args, "a")
    sums = _frozen(model, args, "a", dict.fromkeys(digests, 0))
    _check_unchanged(sums, _frozen(model, args, "a", sums), "a")
    model.model.norm.weight[3] += 1e-3
    for before in (digests, sums):
        with pytest.raises(RuntimeError, match=r"model\.norm\.weight of the base changed .* \(1 weights"):
            _check_unchanged(before, _frozen(model, args, "a", before), "a")


def test_running_statistics(tmp_path):
    """Of a BatchNorm: they change in training, unless told not to."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3)
    model, images = ResNetForImageClassification(config), torch.randn(8, 3, 8, 8).tolist()
    task = Task("a", Dataset.from_list([{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]))
    adapter = JumpLoraConfig(r=2, target_modules=["classifier.1"])
    make = lambda: ContinualRun(model, [task], "inclora", toy.arguments(tmp_path), adapter_config=adapter)  # noqa: E731
    with pytest.raises(ValueError, match=r"embedder\.normalization of the base is a BatchNorm2d, whose running stat"):
        make()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    assert len(make().train().metrics["trained"]) == 1


ROW = {"input_ids": [3, 4, 5], "attention_mask": [1] * 3}
NUMBERS = {
    "a class too many": ({"labels": 3}, "'a', train rows: labels has the number 3, and BertFor.* has 3 classes"),
    "below 0": ({"label": -1}, "'a', train rows: label has the number -1, and .* 0 to 2"),
    "a float": ({"label": 1.0}, r"label holds 1\.0 \(double\), and a class of BertFor.* is a whole number"),
    "a name": ({"label": "sport"}, r"label holds 'sport' \(string\)"),
    "none": ({"labels": None}, r"labels is empty \(None\) in some"),
    "a token": ({"input_ids": [3, 96, 5], "labels": 1}, "input_ids has the number 96, .* embeddings for 96 tokens"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_that_the_model_does_not_know(kind, tmp_path):
    """Before training, in lists and in data sets, in training and in evaluation."""
    odd, message = NUMBERS[kind]
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=32, max_position_embeddings=40, num_labels=3)
    model, name = BertForSequenceClassification(config), "labels" if "labels" in odd else "label"
    good = [{**ROW, name: 2}] * 31 + [{**ROW, name: -100}]
    bad = [{**ROW, **odd}] if kind in ("a float", "a name") else [{**ROW, name: 0}, {**ROW, **odd}]

    def make(rows, evaluate):
        adapter = JumpLoraConfig(r=2, target_modules=["query"])
        ContinualRun(model, [Task("a", rows, evaluate)], args=toy.arguments(tmp_path), adapter_config=adapter)

    make(good, Dataset.from_list(good))
    for rows in (bad, Dataset.from_list(bad)):
        with pytest.raises(ValueError, match=message):
            make(rows, None)
        with pytest.raises(ValueError, match=message.replace("train", "eval")):
            make(good, rows)


def test_labels_of_a_language_model(toy_base, tmp_path):
    rows = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [-100, 4, 96]}])
    with pytest.raises(ValueError, match=r"labels has the number 96, and LlamaForCausalLM .* 96 tokens, 0"):
        toy.make_run(toy_base, tmp_path, stream=[Task("a", rows)])


def test_a_tokenizer_with_more_tokens_than_the_model(toy_base, tmp_path):
    run = toy.make_run(toy_base, tmp_path, stream=toy.tasks(1))
    run.plan.tokenizer.add_tokens([f"w{i}" for i in range(80)])
    run.plan.tasks[0].train_dataset[3]["sentence"] += " w75"
    with pytest.raises(ValueError, match=r"'size': the tokenizer's 'w75' is number \d+, .* embeddings for 96 tokens"):
        run.train()
    run = toy.make_run(toy_base, tmp_path, stream=toy.tasks(1))
    run.plan.tokenizer.add_tokens([f"w{i}" for i in range(80)])
    run.plan.tokenizer.pad_token = "w79"
    with pytest.raises(ValueError, match=r"'size': the tokenizer's 'w79' is number"):
        run.train()


def test_one_run_a_folder(toy_base, tmp_path):
    """Another process that trains there is noticed, and forgotten when it dies."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def train():
        with in_use(tmp_path):
            ready.set()
            time.sleep(600)

    other = context.Process(target=train, daemon=True)
    other.start()
    assert ready.wait(60)
    with pytest.raises(RuntimeError, match="another process is already training in"):
        toy.make_run(toy_base, tmp_path, stream=toy.tasks(1)).train()
    other.kill()
    other.join()
    with in_use(tmp_path):
        pass


def test_half_written_checkpoint(tmp_path):
    """A process killed while it wrote trainer_state.json: the checkpoint before is the newest."""
    for step, text in ((2, '{"global_step": 2}'), (10, ""), (11, '{"global_st')):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(text)
        save_file({"A": torch.zeros(1)}, folder / "adapter_model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, folder / name)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert newest_checkpoint(tmp_path / "checkpoint-2") is None


def test_foreign_files_are_not_replaced(toy_run, toy_base, tmp_path):
    (tmp_path / "task_000").mkdir()
    (tmp_path / "task_000" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="contains task_000, which belongs to no run"):
        toy.make_run(toy_base, tmp_path).train()
    assert (tmp_path / "task_000" / "mine").read_text() == "mine"
    (tmp_path / "run.json").write_bytes((toy_run.output_dir / "run.json").read_bytes())
    (tmp_path / "task_001").mkdir()
    with pytest.raises(ValueError, match=r"contains task_001 but no stack\.json"):
        toy.make_run(toy_base, tmp_path).train()


def test_loaded_as_it_was_trained(toy_base, tmp_path):
    """In the dtype of the training, whatever the base's files hold; another one when asked for."""
    run = toy.make_run(toy.LlamaForCausalLM.from_pretrained(toy_base, dtype="bfloat16"), tmp_path, stream=toy.tasks(1))
    run.train()
    assert torch.equal(logits(load_stack(tmp_path)), logits(run.model))
    assert logits(load_stack(tmp_path)).dtype == torch.bfloat16
    assert logits(load_stack(tmp_path, dtype="float32")).dtype == torch.float32


def test_peft_round_trip_of_a_stacked_task(toy_run, toy_base, tmp_path):
    """PEFT writes the parents inside the folder of "default"."""
    model = PeftModel.from_pretrained(toy.load_base(toy_base), toy_run.output_dir, subfolder="task_001")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(toy.load_base(toy_base), tmp_path)), expected)


def test_a_merged_model_is_not_its_own_base(toy_run, tmp_path):
    """The updates would count twice; the same weights under another stack are an ordinary base."""
    merge_stack(toy_run.output_dir, tmp_path / "disk")
    load_stack(toy_run.output_dir, tasks=["mood"], merge=True).save_pretrained(tmp_path / "memory")
    for name, task in (("disk", "size"), ("memory", "mood")):
        with pytest.raises(ValueError, match=f"task '{task}' is in the weights of this base already"):
            load_stack(toy_run.output_dir, base_model=tmp_path / name)
        with pytest.raises(ValueError, match=f"task '{task}' is in the weights of this base already"):
            merge_stack(toy_run.output_dir, tmp_path / "twice", base_model=tmp_path / name)
    toy.tokenizer().save_pretrained(tmp_path / "disk")
    toy.make_run(str(tmp_path / "disk"), tmp_path / "more", stream=toy.tasks(1), seed=7).train()
    load_stack(tmp_path / "more")


def test_unload_gives_the_base(toy_run, toy_base):
    loaded = load_stack(toy_run.output_dir)
    assert not torch.equal(logits(loaded), logits(toy.load_base(toy_base)))
    assert torch.equal(logits(loaded.unload()), logits(toy.load_base(toy_base)))


def test_training_after_inference_mode(toy_base):
    """The workspace of the blocked backend is an ordinary tensor, whoever asked for it first."""
    from hf_jumplora.ops import blocked

    blocked._workspaces.__dict__.clear()
    config = JumpLoraConfig(r=2, target_modules=["q_proj"], backend="blocked", init_weights=False)
    model = get_peft_model(toy.load_base(toy_base), config)
    ids = torch.tensor([[3, 12, 13, 8]])
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "jumplora_B" in name)


def test_closed_entries_follow_the_model(toy_base):
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(r=2, target_modules=["q_proj"], isolation="hard"))
    layers = [m for m in model.modules() if hasattr(m, "jumplora_free")]
    assert all("jumplora_free" not in key for key in model.state_dict())
    model.to("meta")
    assert {layer.jumplora_free["default"].device.type for layer in layers} == {"meta"}


@pytest.mark.parametrize("method", ["jumplora-best", "kfac", "drift", "ewc", "gorp"])
def test_layers_that_are_never_called(method, toy_base, tmp_path):
    """A second tower that matches the targets and that no text reaches."""
    model = toy.load_base(toy_base)
    model.tower = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32)})
    result = toy.make_run(model, tmp_path, method, stream=toy.tasks(2)).train().metrics
    assert len(result["trained"]) == 2


def test_curvature_of_a_layer_that_no_answer_depends_on(toy_t5, tmp_path):
    """T5's first decoder position attends to itself alone: the factor of its query is exactly zero."""
    assert len(toy.make_run(toy_t5, tmp_path, "jumplora-best", stream=toy.tasks(2)).train().metrics["trained"]) == 2


def test_label_smoothing_of_an_encoder_decoder(toy_t5, tmp_path):
    """The Trainer takes the labels out of the inputs, and a T5 makes its decoder's of them."""
    with pytest.raises(ValueError, match="label_smoothing_factor takes the labels out"):
        toy.make_run(toy_t5, tmp_path, stream=toy.tasks(2), label_smoothing_factor=0.1)


NEEDS_CLASSES = {"jumplora-best": True, "ewc": True, "lwf": True, "drift": False, "jumplora": False}


@pytest.mark.parametrize("method", NEEDS_CLASSES)
@pytest.mark.parametrize(
    ("model_class", "options", "labels", "message"),
    [
        (BertForQuestionAnswering, {}, {"start_positions": 1, "end_positions": 2}, "answers with places in a text"),
        (BertForSequenceClassification, {"num_labels": 1}, {"labels": 1.0}, "num_labels=1 answers with a number"),
        (
            BertForSequenceClassification,
            {"problem_type": "regression"},
            {"labels": [1.0, 0.5]},
            "problem_type is 'regression'",
        ),
        (BertForSequenceClassification, {"num_labels": 3}, {"labels": [1.0, 0.0, 1.0]}, "a label of task 'a' is"),
    ],
    ids=["places", "number", "regression", "several"],
)
def test_answers_that_are_no_classes(method, model_class, options, labels, message, tmp_path):
    """Curvature and distillation of a softmax would be those of another likelihood, in silence."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = model_class(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=40, **options))
    task = Task("a", Dataset.from_list([{"input_ids": [3, 4, 5], "attention_mask": [1] * 3, **labels}] * 32))
    config = JumpLoraConfig(r=2, target_modules=["query"])
    make = lambda: ContinualRun(model, [task], method, toy.arguments(tmp_path), adapter_config=config)  # noqa: E731
    if NEEDS_CLASSES[method]:
        with pytest.raises(ValueError, match=message):
            make()
    else:
        assert len(make().train().metrics["trained"]) == 1


def test_a_batch_without_labels_is_named(toy_base, tmp_path):
    row = {"input_ids": [3, 4, 5], "attention_mask": [1] * 3}  # nothing stands before its one label:
    rows = Dataset.from_list([{**row, "labels": [3, 4, 5]}] * 15 + [{**row, "labels": [3, -100, -100]}])
    run = toy.make_run(toy_base, tmp_path, "inclora", [Task("a", rows)], per_device_train_batch_size=1)
    with pytest.raises(FloatingPointError, match="or a batch had no label to learn from"):
        run.train()


def test_seq2seq_scores_do_not_depend_on_the_batch():
    """Learned absolute positions: short prompts are padded on the right, as in training."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
    heads = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "decoder_start_token_id": 1}
    model = BartForConditionalGeneration(BartConfig(vocab_size=96, init_std=1.0, **sizes, **heads, **special)).eval()
    encoder = Encoder(toy.tokenizer(), 64, seq2seq=True)
    task = toy.tasks(1)[0]
    short = [encoder.prompt_ids(task, row["sentence"])[-n:] for n, row in enumerate(toy.rows(0, 12), 2)]
    alone = [score_labels(model, encoder, task, [ids])[0] for ids in short]
    assert len(set(alone)) == 2
    assert score_labels(model, encoder, task, [*short, list(range(3, 40))])[:-1] == alone


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl_tasks_are_evaluated_and_go_on(kind, toy_base, tmp_path):
    """Data sets as TRL takes them, with an eval set where it can be; a task later; other arguments are refused."""
    trl = pytest.importorskip("trl")
    from hf_jumplora import make_continual

    if kind == "sft":
        rows = [{"text": row["sentence"]} for row in toy.rows(0, 32)]
        cls, config, more = make_continual(trl.SFTTrainer), trl.SFTConfig, {"max_length": 16}
    else:
        rows = [{"prompt": r["sentence"], "chosen": " tiny", "rejected": " huge"} for r in toy.rows(0, 32)]
        cls, config, more = make_continual(trl.DPOTrainer), trl.DPOConfig, {"max_length": 16}
    data = Dataset.from_list(rows)
    options = {
        "max_steps": 6, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "save_strategy": "no",
        "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, **more,
    }  # fmt: skip

    def run(args, evaluated):
        tasks = [Task(name, data, evaluated, metric="loss") for name in "ab"]
        return ContinualRun(
            toy.load_base(toy_base), tasks, "jumplora", args,
            toy.tokenizer(), trainer_cls=cls, adapter_config=JumpLoraConfig(r=2, target_modules=["q_proj"]),
        )  # fmt: skip

    evaluated = data if kind == "sft" else None
    with pytest.raises(TypeError, match=r"args must be of the class it takes"):
        run(toy.arguments(tmp_path / "other"), evaluated).train()
    if kind == "dpo":
        with pytest.raises(ValueError, match="leave eval_dataset out"):
            run(config(str(tmp_path), **options), data)
    result = run(config(str(tmp_path), **options), evaluated).train().metrics
    assert all((value is not None) == (kind == "sft") for row in result["matrix"] for value in row)
    with pytest.raises(ValueError, match="not trained with ContinualTrainingArguments: give args_cls"):
        ContinualRun.from_stack(tmp_path, [Task("c", data)], tmp_path, trainer_cls=cls, use_cpu=True)
    again = ContinualRun.from_stack(
        tmp_path, [Task("c", data, evaluated, metric="loss")], tmp_path, trainer_cls=cls, args_cls=config,
        processing_class=toy.tokenizer(), report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    assert [info["name"] for info in again.train().metrics["trained"]] == ["a", "b", "c"]


@pytest.mark.parametrize("method", ["jumplora", "kfac"])
def test_default_dtype_in_bf16(method, toy_base, tmp_path):
    """torch.set_default_dtype changes no threshold and no sum of updates."""
    files = []
    for dtype in (torch.float32, torch.bfloat16):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            toy.make_run(toy_base, tmp_path / str(dtype), method, stream=toy.tasks(2), eval_tasks="seen").train()
        finally:
            torch.set_default_dtype(before)
        files.append((tmp_path / str(dtype) / "task_001" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
