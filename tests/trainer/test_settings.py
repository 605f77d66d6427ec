"""What a run is, is stored whole: everything that shapes its result is known again, and nothing that does not."""

import copy
import dataclasses
import functools
import platform
import shutil

import numpy as np
import pytest
import toy
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import DataCollatorForSeq2Seq, default_data_collator
from trl import SFTConfig

from hf_jumplora import ContinualRun, ContinualSeq2SeqTrainer, ContinualTrainingArguments, JumpLoraConfig, Task
from hf_jumplora.disk import write_json
from hf_jumplora.schema import HARMLESS, read_json
from hf_jumplora.strategies import KFac, Strategy
from hf_jumplora.trainer.arguments import result_arguments
from hf_jumplora.trainer.plan import describe_code, describe_functions, describe_strategy, tokenizer_identity
from hf_jumplora.trainer.record import METRICS, RUN, check_settings, rewrite


def other(value):
    """A value that differs."""
    if isinstance(value, bool) or value is None:
        return not value
    return value + 1 if isinstance(value, (int, float)) else f"{value} and more"


@pytest.mark.parametrize("args_class", [ContinualTrainingArguments, SFTConfig])
def test_every_argument_counts_or_is_harmless(args_class, tmp_path):
    args = args_class(str(tmp_path), use_cpu=True, report_to=[], bf16=False)
    before = result_arguments(args)
    for f in dataclasses.fields(args):
        changed = copy.copy(args)
        setattr(changed, f.name, other(getattr(args, f.name)))
        assert (result_arguments(changed) != before) == (f.name not in HARMLESS), f.name


def test_what_must_not_reach_a_file(tmp_path):
    """Of what is no number, switch or known word a hash is stored: paths and secrets stay here."""
    args = toy.arguments(tmp_path, label_names=["/home/me/secret"])
    assert result_arguments(args)["label_names"].startswith("sha256 ")
    assert not any("/home" in str(value) for value in result_arguments(args).values())


def claim(base, folder, **change):
    run = toy.make_run(base, folder, **change)
    run.record.claim(run.plan.settings())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, "args.neftune_noise_alpha: None there, 5.0 now"),
        ({"trainer_cls": ContinualSeq2SeqTrainer}, "trainer: 'ContinualTrainer' there, 'ContinualSeq2SeqTrainer' now"),
        ({"label_names": ["labels"]}, "args.label_names: None there, 'sha256 "),
    ],
)
def test_another_run_is_refused(change, message, toy_run, toy_base, tmp_path):
    folder = shutil.copytree(toy_run.output_dir, tmp_path / "run")
    claim(toy_base, folder)
    with pytest.raises(ValueError, match=message):
        claim(toy_base, folder, **change)


def test_the_precision_of_accelerate_launch(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    found = result_arguments(toy.arguments(tmp_path))
    assert (found["bf16"], found["fp16"]) == (True, False)


def test_functions_are_known_by_name_and_settings():
    """And of objects among the settings the type, so that the same objects made anew are the same."""

    def score(prediction, among):
        return {}

    collator = DataCollatorForSeq2Seq(toy.tokenizer(), padding="longest")
    first = [functools.partial(score, [1, 2]), collator, ContinualSeq2SeqTrainer, None]
    known = describe_functions(*first)
    assert [text.split()[0].split(".")[-1] for text in known] == ["score", "DataCollatorForSeq2Seq"]  # fmt: skip
    again = DataCollatorForSeq2Seq(toy.tokenizer(), padding="longest")
    assert describe_functions(functools.partial(score, [1, 2]), again, ContinualSeq2SeqTrainer) == known
    for other_one in (functools.partial(score, [1, 3]), functools.partial(score, among=[1, 2]), score):
        assert describe_functions(other_one)[0] != known[0]
    assert describe_functions(dataclasses.replace(collator, padding=False))[0] != known[1]


def test_the_code_of_functions():
    """Their bytecode, constants and what they hold; not that of an installed package, nor where they stand."""

    def counts(least, body="len"):
        source = f"def score(prediction, least={least}):\n    return {body}(prediction) in {{'a', 'b', 'c'}}"
        exec(source, names := {})
        return names["score"]

    def held(value):
        return lambda prediction: value

    known = describe_code(counts(1))
    assert known.split()[0] == platform.python_version().rpartition(".")[0]
    others = [counts(2), counts(1, "sum"), held(1), held(2), held(counts(1)), held(counts(2))]
    assert len({known, *map(describe_code, others)}) == 7
    assert describe_code(counts(1), DataCollatorForSeq2Seq, default_data_collator, len) == known
    assert describe_code(functools.partial(max, key=[counts(1)])) == known
    assert describe_code(ContinualSeq2SeqTrainer, None) is None


def test_another_function_is_refused(toy_base, tmp_path):
    """Once something was trained; a run that did not know of functions learns of them."""
    rows = Dataset.from_list([{"input_ids": [3, 4], "labels": [3, 4]}] * 8)
    stream = [Task("a", rows, rows, functools.partial(dict, size=1))]
    plan = toy.make_run(toy_base, tmp_path, "inclora", stream).plan
    settings, former = plan.settings(), plan.former_settings()
    (tmp_path / "checkpoints/task_000/checkpoint-1").mkdir(parents=True)
    write_json(tmp_path / METRICS, {})
    write_json(tmp_path / RUN, {key: value for key, value in settings.items() if key != "functions 0"})
    check_settings(tmp_path, settings, former)
    assert read_json(tmp_path / RUN) == settings
    with pytest.raises(ValueError, match=r"functions 0: \['dict [0-9a-f]+'\] there, \['dict [0-9a-f]+'\] now"):
        check_settings(
            tmp_path, {**settings, "functions 0": describe_functions(functools.partial(dict, size=2))}, former
        )
    check_settings(tmp_path, {key: value for key, value in settings.items() if key != "functions 0"}, former)
    check_settings(tmp_path, {**settings, "code 0": "3.11 one"}, former)
    check_settings(tmp_path, {**settings, "code 0": "3.12 two"}, former)
    with pytest.raises(ValueError, match=r"code 0: '3\.11 one' there, '3\.11 two' now"):
        check_settings(tmp_path, {**settings, "code 0": "3.11 two"}, former)


def test_a_run_of_an_earlier_version(toy_run, toy_base, tmp_path):
    """It stored fewer settings, and the fingerprints that data sets have by themselves; what it lacks is added."""
    folder = shutil.copytree(toy_run.output_dir, tmp_path / "run")
    whole = read_json(folder / RUN)
    fewer = {key: value for key, value in whole.items() if key not in ("trainer", "tokenizer")}
    rewrite(folder, {RUN: {**fewer, "functions 0": ["of a past task"]}})
    claim(toy_base, folder)
    assert read_json(folder / RUN) == {**whole, "functions 0": ["of a past task"]}
    task = Task("a", Dataset.from_list([{"input_ids": [3]}] * 8))
    assert task.former_fingerprint() != task.fingerprint()
    plan = toy.make_run(toy_base, tmp_path, stream=[task], method="inclora").plan
    assert plan.former_settings()["task 0"] == f"a {task.former_fingerprint()}"


def test_rows_are_what_data_is(tmp_path):
    """However a data set was made, cut and stored."""
    rows = [{"input_ids": [3] * (i % 5), "odd": i % 2 == 1, "text": "x" * i if i % 3 else None} for i in range(1100)]
    data = Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "data")
    same = [
        concatenate_datasets([data.select(range(13)), data.select(range(13, 1100))]),
        data.filter(lambda row: True),
        Dataset.load_from_disk(str(tmp_path / "data")),
    ]
    assert {Task("a", each).fingerprint() for each in same} == {Task("a", data).fingerprint()}
    assert Task("a", data.select([1, 0, *range(2, 1100)])).fingerprint() != Task("a", data).fingerprint()


def test_the_first_rows_of_a_stream_are_known():
    def rows(numbers):
        for number in numbers:
            yield {"input_ids": np.array([number]), "picture": object()}

    def known(numbers):
        return Task("a", IterableDataset.from_generator(rows, gen_kwargs={"numbers": numbers}))

    assert known([1, 2]).fingerprint() == known([1, 2]).fingerprint()
    assert known([1, 2]).fingerprint() != known([1, 3]).fingerprint()
    assert known([1, 2]).former_fingerprint() == known([1, 3]).former_fingerprint()
    assert known([1] * 101).fingerprint() == known([*[1] * 100, 2]).fingerprint()


def test_the_tokenizer(toy_base):
    tokenizer = toy.tokenizer()
    known = tokenizer_identity(tokenizer)
    tokenizer(["the cat"], truncation=True, max_length=1, padding="max_length")  # it keeps that in its own file
    assert tokenizer_identity(tokenizer) == known
    tokenizer.add_tokens(["another"])
    assert tokenizer_identity(tokenizer) != known


def test_from_stack_trains_as_the_stack_was_trained(toy_base, tmp_path):
    toy.make_run(
        toy_base, tmp_path / "stack", "jumplora-best", stream=toy.tasks(1), neftune_noise_alpha=5.0,
        adapter={"threshold_update": "learned"}, trainer_cls=ContinualSeq2SeqTrainer,
    ).train()  # fmt: skip
    more = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "processing_class": toy.tokenizer()}
    run = ContinualRun.from_stack(tmp_path / "stack", toy.tasks(2)[1:], tmp_path / "more", **more)
    assert run.args.neftune_noise_alpha == 5.0
    assert run.plan.trainer_cls is ContinualSeq2SeqTrainer
    assert (run.config.threshold_update, run.config.target_density) == ("learned", None)
    with pytest.raises(ValueError, match=r"args\.neftune_noise_alpha: 5\.0 there, 1\.0 now"):
        ContinualRun.from_stack(tmp_path / "stack", toy.tasks(2)[1:], tmp_path / "x", neftune_noise_alpha=1.0, **more)


class Hidden(Strategy):
    def __init__(self, weight):
        self.weight = weight


class Inherits(KFac):
    def __init__(self, power):
        super().__init__()
        self.power = power


@dataclasses.dataclass
class Address(Strategy):
    function: object = object()


@pytest.mark.parametrize("strategy", [Hidden(2.0), Inherits(2.0), Address()], ids=lambda s: type(s).__name__)
def test_a_strategy_says_what_it_is(strategy, toy_base, tmp_path):
    with pytest.raises(ValueError, match="by which a restarted run knows it"):
        toy.make_run(toy_base, tmp_path, "inclora", strategies=[strategy])


def test_what_a_strategy_draws_counts():
    strategy = KFac()
    assert describe_strategy(strategy) == repr(strategy)
    strategy.seed = 3
    assert describe_strategy(strategy) == f"{strategy!r} seed=3"


def test_general_text_is_a_run_s_own(toy_base, tmp_path):
    """A strategy that is used again gets the next run's, not the first one's."""
    from hf_jumplora import LanguageModelTask

    strategy = KFac(general=True)
    for text in ("the ant", "the very new bee"):
        held_out = LanguageModelTask("news", [{"text": text}], [{"text": text}], held_out=True)
        run = toy.make_run(toy_base, tmp_path, "kfac", [*toy.tasks(1), held_out], strategies=[strategy])
        assert (run.strategies[0].general, strategy.general) == ([text], True)


# ---- who prescribes what ------------------------------------------------------------------------------------------


def test_a_method_does_not_beat_its_user(toy_base, tmp_path):
    """Nor the other way round: a conflict is refused, and what the method leaves to its user acts."""
    from hf_jumplora.methods import get_method
    from hf_jumplora.options import MethodArguments

    conflict = "method 'jumplora-hard' prescribes isolation='hard', and isolation='none' is given"
    with pytest.raises(ValueError, match=conflict):
        MethodArguments("jumplora-hard", isolation="none").adapter_config()
    with pytest.raises(ValueError, match=conflict):
        toy.make_run(toy_base, tmp_path, "jumplora-hard", adapter={"isolation": "none"})
    for given in ({"threshold_update": "density"}, {"gate_end": 0.5}):
        with pytest.raises(ValueError, match=r"method 'inclora' has no gate"):
            get_method("inclora").adapter_config(given)
    learned = get_method("jumplora-best").adapter_config({"threshold_update": "learned"})
    again = get_method("jumplora-best").adapter_config(copy.deepcopy(learned))
    assert again == learned
    assert (again.threshold_update, again.target_density) == ("learned", None)
    other_rank = dataclasses.replace(get_method("inclora").adapter_config(None), r=4)
    assert get_method("inclora").adapter_config(other_rank).r == 4
    assert get_method("jumplora-hard").adapter_config(JumpLoraConfig(r=2)).threshold_update == "density"
    plans = MethodArguments("jumplora", r=4, isolation="none", gate_end=0.5).plans(["jumplora-hard", "inclora"])
    assert [(config.isolation, config.r) for config, _ in plans.values()] == [("none", 4), ("hard", 4), ("none", 4)]
    assert plans["jumplora-hard"][0].gate_end == 0.5
