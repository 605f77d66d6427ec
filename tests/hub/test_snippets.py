"""What the cards say to type, typed in: in a process that has nothing but the repository."""

import subprocess
import sys
from pathlib import Path

import toy
from huggingface_hub import HfApi


CODE = """
import os, re, shutil, sys
sys.path.insert(0, {tests!r})
import toy
from hf_jumplora import ContinualRun
from huggingface_hub import hf_hub_download

for method in ("perlora", "seqlora", "jumplora"):  # a model a task; the last folder alone; updates that add up
    repo = "me/stack" if method == "jumplora" else "me/" + method
    toy.make_run("me/base", method, method, push_to_hub=True, hub_model_id=repo, stream=toy.tasks(2)).train()
    count = 0
    shutil.rmtree("merged", ignore_errors=True)
    for card in ("README.md", "task_001/README.md"):
        text = open(hf_hub_download(repo, card)).read()
        blocks = re.findall(r"```python\\n(.*?)```", text, re.S)
        for block in blocks:
            exec(block, {{}})
            count += 1
    assert count == 5, count
from transformers import AutoModelForCausalLM
import torch
from hf_jumplora import load_stack
ids = torch.tensor([[3, 12, 13, 8]])
with torch.no_grad():
    plain = AutoModelForCausalLM.from_pretrained("merged")(ids).logits
    assert torch.equal(plain, load_stack("me/stack")(ids).logits)
new = ContinualRun.from_stack("me/stack", toy.tasks(3)[2:], "more", use_cpu=True, disable_tqdm=True, report_to=[])
new.train()
print("all done")
"""


def test_snippets_of_the_cards(toy_base, hub, tmp_path):
    """Every block of the stack's card and of a task's; and the base model comes by its id."""
    api = HfApi(endpoint=hub.url, token=hub.token)
    api.create_repo("me/base")
    api.upload_folder(repo_id="me/base", folder_path=toy_base)
    root = Path(toy.__file__).parents[1]
    environment = hub.environment(tmp_path / "cache", HF_TOKEN=hub.token, PYTHONPATH=f"{root}:{root / 'kernels'}")
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(tests=str(root / "tests"))],
        env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "all done" in done.stdout, done.stderr[-3000:]
    assert not [c for c in hub.repos["me/stack"].history() if c.title.startswith("task-002")]  # nobody asked for it
