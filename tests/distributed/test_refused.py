"""What cannot work with several processes: errors in every process, an exit code that is not 0, no partial stack."""

import os
from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import toy

from hf_jumplora.strategies import Ewc
from hf_jumplora.trainer.backend import check_compiler
from hf_jumplora.trainer.checks import check_backend


OPTIONS = {"per_device_train_batch_size": 2}


def test_processes_that_disagree(toy_base, tmp_path):
    """On an option, on the list of tasks, on a method; and a main process that cannot write."""
    (tmp_path / "file").write_text("no folder")
    other = {
        "option": {"options": {**OPTIONS, "learning_rate": 0.5}},
        "tasks": {"tasks": 3},
        "adapter": {"adapter": {"gate_start": 0.4}},
    }
    jobs = [
        {"base": toy_base, "output_dir": str(tmp_path / name), "options": OPTIONS, "fails": True, "rank 1": change}
        for name, change in other.items()
    ]
    jobs += [{"base": toy_base, "output_dir": str(tmp_path / "file" / "run"), "options": OPTIONS, "fails": True}]
    jobs[3]["errors"] = str(tmp_path / "folder")
    jobs += [{**jobs[0], "fails": False, "output_dir": str(tmp_path / "last")}]
    launcher = launch.start(jobs, tmp_path, launch.CONFIGS / "cpu2.yaml")
    assert launcher.wait(120) != 0
    expected = {
        "option": "args.learning_rate: '0.01' in process 0, '0.5' in process 1",
        "tasks": "task 2: None in process 0, 'mood ",
        "adapter": "adapter.gate_start: '0.2' in process 0, '0.4' in process 1",
        "folder": "Not a directory",
    }
    for name, text in expected.items():
        for rank in (0, 1):
            assert text in Path(f"{tmp_path / name}.{rank}.error").read_text()
    assert not list(tmp_path.glob("**/stack.json"))


def fake(plan, stage: int = 3, strategies=(), **config):
    """The plan of a run as if it had been started with DeepSpeed."""
    config = {"zero_optimization": {"stage": stage}, **config}
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=config)
    vars(plan.args).update(deepspeed_plugin=plugin)
    plan.strategies[:] = list(strategies)
    return plan


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stage": 0}, "stage 0 is DDP: use recipes/accelerate/ddp.yaml"),
        ({"optimizer": {"type": "Adam"}}, "has 'optimizer': the run makes the optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "has 'scheduler': .* leave it out and set lr_scheduler_type"),
        ({"zero_optimization": {"zero_hpz_partition_size": 8}}, "zero_hpz_partition_size'.* leave it out"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights'.* leave it out"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "nvme': .*use cpu"),
        ({"strategies": [Ewc()]}, r"Ewc.* needs the whole model in each process.*: use zero1, zero2 or DDP"),
    ],
)
def test_deepspeed_options(config, message, toy_base, tmp_path):
    plan = toy.make_run(toy_base, tmp_path, stream=toy.tasks(1)).plan
    with pytest.raises(ValueError, match=message):
        check_backend(fake(plan, **config))
    check_backend(fake(plan))


def test_other_options(toy_base, tmp_path):
    plan = fake(toy.make_run(toy_base, tmp_path, stream=toy.tasks(1)).plan, 2)
    plan.args.fp16 = True
    with pytest.raises(ValueError, match="use bf16=True"):
        check_backend(plan)
    plan.args.fp16, plan.args.bf16 = False, True
    with pytest.raises(ValueError, match=r"this one is torch\.float32: load it with dtype=bfloat16"):
        check_backend(plan)
    plan.args.bf16, plan.model.is_quantized = False, True
    check_backend(plan)
    with pytest.raises(ValueError, match="a quantised base cannot be sharded by zero3: use DDP"):
        check_backend(fake(plan))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "use fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "use recipes/accelerate/zero3_offload.yaml"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "merged tasks would be missing: use true"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "use false"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "use gradient_checkpointing=True"),
        ("WORLD_SIZE", "1", "FSDP needs several processes"),
    ],
)
def test_fsdp_options(name, value, message, monkeypatch, tmp_path):
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        toy.arguments(tmp_path)


def test_processes_that_do_not_see_each_other(monkeypatch, tmp_path):
    """Started for GPUs that are not there: transformers would train one model in each process, and say nothing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match=r"2 processes were started, and each is alone.*use_cpu=True"):
        toy.arguments(tmp_path, use_cpu=False)


def test_no_compiler(monkeypatch, tmp_path):
    """And the lock of a process that was killed while it compiled."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("CXX", os.fspath(tmp_path / "g++"))
    with pytest.raises(RuntimeError, match=r"compiles an extension.*g\+\+.*cannot be found: install a C\+\+ compiler"):
        toy.arguments(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.fspath(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    check_compiler(SimpleNamespace(deepspeed=None))  # somebody is at it
    os.utime(lock, (0, 0))
    with pytest.raises(RuntimeError, match=f"would wait for ever for {lock}.*: delete it"):
        toy.arguments(tmp_path)
