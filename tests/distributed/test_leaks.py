"""Many tasks in the same processes: no engine stays behind."""

import launch
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu2", "zero1", "zero2", "zero3", "fsdp2"])
def test_ten_tasks(config, toy_base, tmp_path, capsys):
    """From the start of the third task to that of the tenth: no file more, at most 100 objects a task (an engine has
    above 700), at most 8 MiB."""
    options = {"per_device_train_batch_size": 2, "eval_tasks": "seen"}
    sizes = {"tasks": 10, "train": 20, "evaluate": 2}
    job = {"base": toy_base, "output_dir": str(tmp_path / "run"), "options": options, **sizes}
    launch.run([job], tmp_path, launch.CONFIGS / f"{config}.yaml", timeout=900)
    for found in launch.results(job):
        memory, files, objects = zip(*found["usage"], strict=True)
        with capsys.disabled():
            print(f"\n{config}: KiB {[m >> 10 for m in memory]}, files {files}, objects {objects}")
        assert len(memory) == 10
        assert files[9] <= files[2]
        assert objects[9] - objects[2] < 7 * 100
        assert memory[9] - memory[2] < 8 << 20
