"""A task is finished when its training came to its end, and what it leaves is all there."""

import os
import pickle
import signal

import pytest
import torch
import toy
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from safetensors.torch import load_file
from test_run import files
from transformers import BertConfig, BertForSequenceClassification, EarlyStoppingCallback, Trainer, TrainerCallback

from hf_jumplora import ContinualRun, ContinualTrainer, JumpLoraConfig, LanguageModelTask, Task, make_continual
from hf_jumplora.strategies import Ella, KFac, Replay
from hf_jumplora.trainer import evaluator, record
from hf_jumplora.tuner.density_sample import DensitySample


EARLY = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "learning_rate": 0.0}
ROWS = Dataset.from_list([{"input_ids": [3, 12, 13, 8], "labels": [3, 12, 13, 8]}] * 32)


def weights(run, task):
    return load_file(run.output_dir / task / "adapter_model.safetensors")


class Stop(TrainerCallback):
    """As a scheduler's signal or a limit of time does it; and a tracker that writes where the trainer writes."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = args.output_dir.endswith("task_001") and state.global_step == 5

    def on_train_begin(self, args, state, control, **kwargs):
        torch.save({}, f"{args.output_dir}/events")


def test_an_interrupted_task_is_not_finished(toy_base, tmp_path):
    """Its checkpoint stays, and the same command continues from there."""
    options = {"save_strategy": "steps", "save_steps": 3, "stream": toy.tasks(2)}
    straight = toy.make_run(toy_base, tmp_path / "straight", "inclora", **options)
    straight.train()
    with pytest.raises(RuntimeError, match=r"task 'light' was stopped at step 5 of 8.*checkpoint-3"):
        toy.make_run(toy_base, tmp_path / "run", "inclora", callbacks=[Stop()], **options).train()
    run = toy.make_run(toy_base, tmp_path / "run", "inclora", **options)
    assert [task["name"] for task in run.record.stack_tasks] == ["size"]
    assert [info["steps"] for info in run.train().metrics["trained"]] == [8, 8]
    for task in ("task_000", "task_001"):
        assert all(torch.equal(value, weights(straight, task)[key]) for key, value in weights(run, task).items())
    left = [str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").glob("checkpoints/*/*")]
    assert sorted(left) == ["checkpoints/task_000/events", "checkpoints/task_001/events"]
    assert not (tmp_path / "straight" / "checkpoints").exists()


class Preempt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_at_any_moment_of_a_task(toy_base, tmp_path, monkeypatch):
    """Between steps it leaves a checkpoint, after the last one too; while a task is finished it ends the run at once,
    and of the task nothing is there. The same command gives the same bits in the end."""
    handler, folder = signal.getsignal(signal.SIGTERM), tmp_path / "run"
    options = {"stream": toy.tasks(1), "enable_jit_checkpoint": True}
    toy.make_run(toy_base, tmp_path / "straight", "jumplora-best", **options).train()

    def interrupted(*callbacks):
        run = toy.make_run(toy_base, folder, "jumplora-best", callbacks=callbacks, **options)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted by SIGTERM.*the same command continues"):
            run.train()
        assert signal.getsignal(signal.SIGTERM) is handler
        assert not (folder / "stack.json").exists()
        assert not list(folder.glob(".*"))
        return max(int(path.name.split("-")[1]) for path in folder.glob("checkpoints/task_000/*"))

    assert interrupted(Preempt(3)) == 3
    assert interrupted(Preempt(8)) == 8
    for owner, name in [(KFac, "on_task_end"), (evaluator, "score_rows"), (record, "write_manifest")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
            assert interrupted() == 8
    metrics = toy.make_run(toy_base, folder, "jumplora-best", **options).train().metrics
    assert [info["steps"] for info in metrics["trained"]] == [8]
    assert files(folder) == files(tmp_path / "straight")


def test_early_stopping_is_a_task_s_own(toy_base, tmp_path):
    """With the task's own eval set and patience; nothing improves here, so every task ends at the second look. No
    checkpoint of that step is left, from which a run that is killed then would train on."""
    saved = []

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saved.append(state.global_step)

    stopping = EarlyStoppingCallback()
    options = {"stream": toy.tasks(2), "callbacks": [stopping, Saved()], **EARLY}
    options |= {"save_strategy": "steps", "save_steps": 2}
    result = toy.make_run(toy_base, tmp_path, "inclora", **options).train().metrics
    assert [info["steps"] for info in result["trained"]] == [4, 4]
    assert saved == [2, 2]
    assert stopping.early_stopping_patience_counter == 0


def test_early_stopping_begins_where_the_gate_is_closed(toy_base, tmp_path, monkeypatch):
    """That is after step 6 here: the score of then is the first that counts, however good those before it were. The
    density is exact in the end, whatever the sample that held it said."""
    monkeypatch.setattr(DensitySample, "hold", lambda *args: None)
    stopping = EarlyStoppingCallback(early_stopping_threshold=1e9)  # nothing is an improvement
    options = {"stream": toy.tasks(1), "callbacks": [stopping], **EARLY, "learning_rate": 0.01, "eval_steps": 1}
    adapter = {"threshold_update": "density", "target_density": 0.25, "threshold_scope": "global"}
    trained = toy.make_run(toy_base, tmp_path, adapter=adapter, **options).train().metrics["trained"][0]
    assert trained["steps"] == 7
    assert trained["density"] == pytest.approx(0.25, abs=1e-3)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("codyra", {}, r"EarlyStoppingCallback: CoDyRA.* needs all steps"),
        ("inclora", {"eval_strategy": "no"}, "EarlyStoppingCallback needs eval_strategy"),
        ("inclora", {"metric_for_best_model": "accuracy"}, "its 'loss' is measured"),
        ("inclora", {"stream": [Task("a", ROWS)]}, "'a' has no eval_dataset"),
        ("mtl", {}, "leave it out"),
        ("inclora", {"save_only_model": True}, "save_only_model: .*could not continue exactly"),
        ("inclora", {"ignore_data_skip": True}, "ignore_data_skip: "),
        ("inclora", {"resume_from_checkpoint": "x"}, "resume_from_checkpoint: "),
    ],
)
def test_what_could_not_end_well(method, change, message, toy_base, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy.make_run(toy_base, tmp_path, method, callbacks=[EarlyStoppingCallback()], **{**EARLY, **change})


class Averaging(torch.optim.SGD):
    """Evaluates other weights than it trains, as schedule-free optimizers do."""

    def train(self):
        pass

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.fill_(0.25)


class Averages(Trainer):
    def create_optimizer(self, *args):
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = Averaging(trained, lr=0.1)
        return self.optimizer


def test_the_weights_that_an_optimizer_evaluates(toy_base, tmp_path):
    options = {"stream": toy.tasks(1), "trainer_cls": make_continual(Averages)}
    run = toy.make_run(toy_base, tmp_path / "plain", "inclora", **options)
    run.train()
    assert all((value == 0.25).all() for key, value in weights(run, "task_000").items() if "jumplora_A" in key)
    with pytest.raises(ValueError, match="Averaging evaluates other weights than it trains"):
        toy.make_run(toy_base, tmp_path / "gate", "jumplora", **options).train()


def test_a_trainer_by_itself_tells_its_strategies(toy_base, tmp_path):
    """`train` is the start of a task and `finish` its end; what only a run can do is refused."""
    told = []

    class Told(Ella):
        def on_task_start(self, *args):
            told.append("start")
            super().on_task_start(*args)

        def on_task_end(self, model, adapter, examples):
            told.append(len(list(examples(3))))

    options = {"args": toy.arguments(tmp_path), "train_dataset": ROWS}
    model = get_peft_model(toy.load_base(toy_base), JumpLoraConfig(r=2, target_modules=["q_proj"]))
    trainer = ContinualTrainer(model, strategies=[Told()], **options)
    trainer.train()
    trainer.finish("task_000")
    assert told == ["start", 3]
    with pytest.raises(ValueError, match=r"Replay.*which only ContinualRun does"):
        ContinualTrainer(model, strategies=[Replay()], **options).train()


def test_streamed_data(toy_base, tmp_path):
    """Without a length it needs max_steps; and what goes into the metric is chosen by the task."""
    seen = []

    def first(logits, labels):
        return logits[..., :1]

    def count(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": 0.5}

    streamed = IterableDataset.from_generator(lambda: iter(ROWS))
    task = Task("a", streamed, ROWS, count, preprocess_logits_for_metrics=first)
    with pytest.raises(ValueError, match="'a' has a streamed data set, whose length is not known: give max_steps"):
        toy.make_run(toy_base, tmp_path, stream=[task])
    trained = toy.make_run(toy_base, tmp_path, stream=[task], max_steps=8).train().metrics["trained"]
    assert (trained[0]["steps"], trained[0]["train_examples"]) == (8, 32)
    assert seen == [(32, 4, 1)] * 2
    with pytest.raises(ValueError, match=r"Replay.* cannot mix rows"):
        toy.make_run(toy_base, tmp_path, "replay", stream=[task], max_steps=8)
    with pytest.raises(ValueError, match="'text': a run encodes the texts of a task before it trains"):
        LanguageModelTask("text", streamed)


def test_the_same_model_again(toy_base, tmp_path):
    """A run changes its model in place: another one does not train on what is left in it."""
    run = toy.make_run(toy_base, tmp_path / "first", stream=toy.tasks(1))
    assert pickle.loads(pickle.dumps(run.data_collator))([{"input_ids": [1], "labels": [1]}])  # for spawned workers
    run.train()
    with pytest.raises(ValueError, match="load the base model again"):
        toy.make_run(run.model.get_base_model(), tmp_path / "second")


def test_a_head_that_peft_adds(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(intermediate_size=64, num_labels=3, **sizes))
    rows = [{"input_ids": [5, 6, 7], "labels": 1}] * 32
    config = JumpLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"task_type='SEQ_CLS' makes PEFT train classifier, score in full"):
        ContinualRun(model, [Task("a", rows)], "inclora", toy.arguments(tmp_path), adapter_config=config)
    assert "modules_to_save" not in str(model)
