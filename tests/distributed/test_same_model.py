"""Two processes, launched with the shipped configurations, train the model that one process trains."""

import json

import launch
import pytest
import torch
import toy
from safetensors.torch import load_file

from hf_jumplora import load_stack
from hf_jumplora.stack import read_manifest, verify_stack
from hf_jumplora.tuner import named_layers


NAMES = {
    "ella": {"method": "jumplora-ella"},
    "olora": {
        "adapter": {"isolation": "hard", "initial_density": 0.05},
        "strategies": {"OLora": {}},
        "options": {"eval_mode": "generate"},
    },
    "kfac": {"strategies": {"KFac": {"general": ["the very new ant", "big cat"]}, "Drift": {}, "Lwf": {"every": 2}}},
    "best": {"method": "jumplora-best"},
}
LAYER = "model.layers.0.self_attn.q_proj"
BATCH = "per_device_train_batch_size"
# What runs the training steps, and the share of the base's weights that each of two processes holds outside of them.
ENGINES = {
    "cpu2": ("DistributedDataParallel", 1.0),
    "ddp": ("DistributedDataParallel", 1.0),
    "zero1": ("DeepSpeedEngine 1", 1.0),
    "zero2": ("DeepSpeedEngine 2", 1.0),
    "zero3": ("DeepSpeedEngine 3", 0.5),
    "zero3_offload": ("DeepSpeedEngine 3", 0.5),
    "fsdp2": ("DistributedDataParallel", 0.5),
}


def jobs(base, folder, batch: int) -> list[dict]:
    """The same global batch whatever the number of processes."""
    sizes = {"tasks": 3, "train": 24, "base": base}
    return [
        {**job, **sizes, "output_dir": str(folder / name), "options": {**job.get("options", {}), BATCH: batch}}
        for name, job in NAMES.items()
    ]


@pytest.fixture(scope="module")
def alone(toy_base, tmp_path_factory):
    """The runs in one process: {name: what worker.py leaves}."""
    import worker

    folder = tmp_path_factory.mktemp("alone")
    worker.main(jobs(toy_base, folder, batch=4))
    return folder


def merged(base: str, stack) -> dict[str, torch.Tensor]:
    model = load_stack(stack, toy.load_base(base), merge=True)
    return {name: weight for name, weight in model.state_dict().items() if "q_proj" in name or "v_proj" in name}


def supports(base: str, stack) -> dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]:
    """{(task, layer): (support, how far |D| is from tau)}."""
    model, found = load_stack(stack, toy.load_base(base)), {}
    for name, layer in named_layers(model):
        for task in layer.jumplora_support:
            distance = (layer.product(task).abs() - layer.gate(task).log_tau.exp()).abs()
            found[task, name] = (layer.support(task), distance)
    return found


# DDP, ZeRO-3 and FSDP2 are the three ways in which weights are spread; the slow ones are variations on them.
@pytest.mark.parametrize(
    "config", [pytest.param(c, marks=[pytest.mark.slow] * (c not in ("cpu2", "zero3", "fsdp2"))) for c in ENGINES]
)
def test_same_as_one_process(config, alone, toy_base, tmp_path, capsys):
    """Over three tasks: losses <= 1e-5 relative at every step, scores, supports (but for entries within 1e-6 of tau),
    merged weights, what strategies remember."""
    todo = jobs(toy_base, tmp_path, batch=2)
    launch.run(todo, tmp_path, launch.CONFIGS / f"{config}.yaml")
    differ, worst, worst_weight, worst_state = 0, 0.0, 0.0, 0.0
    for name, job in zip(NAMES, todo, strict=True):
        expected = json.loads((alone / f"{name}.0.json").read_text())
        for found in launch.results(job):
            assert found["world_size"] == 2
            assert found["engines"] == [ENGINES[config][0]]
            assert found["held"] == pytest.approx(ENGINES[config][1], abs=0.01)
            assert found["matrix"] == expected["matrix"]
            assert len(found["logs"]) == len(expected["logs"]) == 18
            for mine, one in zip(found["logs"], expected["logs"], strict=True):
                assert (mine["task"], mine["step"], mine.get("mix")) == (one["task"], one["step"], one.get("mix"))
                worst = max(worst, abs(mine["loss"] / one["loss"] - 1))
        verify_stack(tmp_path / name)
        for task in ("task_000", "task_001", "task_002"):
            ours, theirs = (
                json.loads((f / name / task / "adapter_config.json").read_text()) for f in (tmp_path, alone)
            )
            assert {**ours, "support": None} == {**theirs, "support": None}
        assert read_manifest(tmp_path / name).task_names == ["size", "light", "mood"]
        for (key, (mine, _)), (other, (one, distance)) in zip(
            supports(toy_base, tmp_path / name).items(), supports(toy_base, alone / name).items(), strict=True
        ):
            assert key == other
            differ += int((mine != one).sum())
            assert (distance[mine != one] < 1e-6).all()
        ours, theirs = merged(toy_base, tmp_path / name), merged(toy_base, alone / name)
        for key in theirs:
            worst_weight = max(worst_weight, ((ours[key] - theirs[key]).norm() / theirs[key].norm()).item())
    ours, theirs = (load_file(f / "kfac" / "task_002" / "strategies.safetensors") for f in (tmp_path, alone))
    assert ours.keys() == theirs.keys() >= {f"0.G.{LAYER}", f"0.C.{LAYER}", f"1.{LAYER}"}
    for key, moments in theirs.items():
        worst_state = max(worst_state, ((ours[key] - moments).float().norm() / moments.float().norm()).item())
    with capsys.disabled():
        print(
            f"\n{config}: losses {worst:.1e}, weights {worst_weight:.1e}, {differ} entries of supports differ, moments "
            f"{worst_state:.1e}"
        )
    assert worst <= 1e-5
    assert worst_weight <= 1e-5
    assert worst_state <= 1e-5


@pytest.mark.slow
def test_own_trainer(toy_base, tmp_path):
    """A task with a trainer class and arguments of its own trains the same under DDP as in one process."""
    import worker

    def job(name, batch):
        own = {BATCH: batch, "learning_rate": 5e-3, "max_steps": 6, "logging_steps": 1}
        more = {"options": {BATCH: batch}, "own trainer": own}
        return {"base": toy_base, "output_dir": str(tmp_path / name), "method": "inclora", **more}

    one, two = job("one", 4), job("two", 2)
    worker.main([one])
    launch.run([two], tmp_path, launch.CONFIGS / "cpu2.yaml")
    (expected,) = launch.results(one, 1)
    for found in launch.results(two):
        assert found["engines"] == ["DistributedDataParallel"]
        assert [log["loss"] for log in found["logs"]] == pytest.approx([log["loss"] for log in expected["logs"]])
    assert len(expected["logs"]) == 8 + 6
    theirs, ours = (merged(toy_base, tmp_path / name) for name in ("two", "one"))
    torch.testing.assert_close(theirs, ours)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_bf16_base(config, tmp_path):
    """Over a base in bf16 the factors and thresholds that DeepSpeed trains are float32, not rounded to bf16."""
    base = toy.save_base(tmp_path / "base", dtype=torch.bfloat16)
    options = {BATCH: 2, "bf16": True}
    job = {"base": base, "output_dir": str(tmp_path / "run"), "method": "jumplora-ella", "options": options}
    launch.run([job], tmp_path, launch.CONFIGS / f"{config}.yaml")
    tensors = load_file(tmp_path / "run" / "task_001" / "adapter_model.safetensors")
    trained = [t for name, t in tensors.items() if name.endswith(("_A", "_B", "log_tau"))]
    assert len(trained) == 12
    assert all(t.dtype == torch.float32 and not torch.equal(t, t.bfloat16().float()) for t in trained)
