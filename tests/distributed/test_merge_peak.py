"""What merging a finished task needs of memory while it is at work, where each process holds a piece of the base."""

import sys

import launch
import pytest
import torch
import toy
from transformers import LlamaForCausalLM


WIDTH = 512


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_layer_at_a_time(tmp_path, capsys):
    """Under ZeRO-3 the peak stays below four matrices of one adapted weight in float32, less than half of
    one block. (Decoding a dense support needs more.)"""
    torch.manual_seed(0)
    config = toy.config()
    config.hidden_size, config.intermediate_size, config.num_key_value_heads = WIDTH, 2 * WIDTH, 4
    config.num_hidden_layers, config.head_dim = 2, WIDTH // 4
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    toy.tokenizer().save_pretrained(tmp_path / "base")
    job = {"base": str(tmp_path / "base"), "output_dir": str(tmp_path / "run"), "train": 24, "evaluate": 1, "tasks": 3}
    job["adapter"] = {"threshold_update": "density", "initial_density": 0.02}
    job["options"] = {"per_device_train_batch_size": 2, "eval_tasks": "seen"}
    # Every large tensor in pages of its own, which are given back when it is freed.
    launch.run([job], tmp_path, launch.CONFIGS / "zero3.yaml", MALLOC_MMAP_THRESHOLD_="65536")
    matrix, block = 4 * WIDTH**2, 4 * (4 + 3 * 2) * WIDTH**2
    for found in launch.results(job):
        assert found["held"] == pytest.approx(0.5, abs=0.01)
        with capsys.disabled():
            print("\nmerging, in matrices of one weight:", [round(peak / matrix, 2) for peak in found["merge_peaks"]])
        assert len(found["merge_peaks"]) == 5  # each task at its end, and the earlier ones below a new adapter
        assert max(found["merge_peaks"]) < 4 * matrix < block
