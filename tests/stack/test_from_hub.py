"""A stack on the (stand-in) Hub: tags, only the files that are needed, the cache alone, PEFT's own ways of loading."""

import json

import pytest
import torch
from forks import forks
from hub.stand_in import StandInHub
from huggingface_hub import HfApi

from hf_jumplora import load_stack
from hf_jumplora.stack import subset


IMPORTS = "transformers.models.llama.modeling_llama, hf_jumplora.stack.load"
HEAD = """
import json
import torch
from huggingface_hub import constants
from hf_jumplora import load_stack

def show(model):
    with torch.no_grad():
        logits = model.eval()(torch.tensor([[3, 12, 13, 8, 14, 9]])).logits
    print("RESULT", json.dumps(logits.flatten().tolist()))
"""


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[3, 12, 13, 8, 14, 9]])).logits.flatten()


WRONG = ["'me/stack', revision='task-009'", "'me/nothing'"]


@pytest.fixture(scope="module")
def on_hub(toy_run, tmp_path_factory):
    """(hub, run a script: logits and errors it prints): me/stack after two tasks (tag task-001) and after three."""
    folder = tmp_path_factory.mktemp("hub")
    subset(toy_run.output_dir, ["size", "light"], folder / "two")
    hub = StandInHub()
    environment = hub.environment(folder / "cache", HF_HUB_DISABLE_XET="1")
    with hub, forks(IMPORTS, environment) as run:
        api = HfApi(endpoint=hub.url, token=hub.token)
        for repo in ("me/stack", "me/other"):
            api.create_repo(repo)
            for stack, tag in ((folder / "two", "task-001"), (toy_run.output_dir, "task-002")):
                api.upload_folder(repo_id=repo, folder_path=stack, allow_patterns=["*.json", "task_*/*"])
                api.create_tag(repo, tag=tag)
        hub.requests.clear()

        def script(code):
            lines = run(HEAD + code).splitlines()
            shown = [torch.tensor(json.loads(line[7:])) for line in lines if line.startswith("RESULT")]
            return shown, [line for line in lines if line.startswith("ERROR")]

        yield hub, script


def downloads(hub):
    return {path.split("/resolve/")[1].split("/", 1)[1] for method, path in hub.requests if "/resolve/" in path}


def test_tags_chosen_tasks_and_the_cache(on_hub, toy_run):
    hub, script = on_hub
    (one,), _ = script("show(load_stack('me/stack', tasks=['mood']))")
    assert torch.equal(one, logits(load_stack(toy_run.output_dir, tasks=["mood"])))
    got = {path for path in downloads(hub) if not path.startswith("task_002/")}
    assert got == {"stack.json"}
    assert "task_002/adapter_model.safetensors" in downloads(hub)

    code = "show(load_stack('me/stack', revision='task-001')); show(load_stack('me/stack', tasks=['mood'], merge=True))"
    code += "".join(f"\ntry: load_stack({call})\nexcept FileNotFoundError as e: print('ERROR', e)" for call in WRONG)
    (tagged, merged), errors = script(code)
    assert "no stack on the Hub at revision 'task-009'" in errors[0]
    assert "me/nothing is no folder, and no stack on the Hub" in errors[1]
    assert torch.equal(tagged, logits(load_stack(toy_run.output_dir, tasks=slice(2))))
    assert torch.equal(merged, logits(load_stack(toy_run.output_dir, tasks=["mood"], merge=True)))
    hub.requests.clear()
    code += "\ntry: load_stack('me/stack', tasks=['size'])\nexcept FileNotFoundError as e: print('ERROR', e)"
    again, errors = script("constants.HF_HUB_OFFLINE = True\n" + code)
    assert "me/stack: task_000 cannot be downloaded" in errors[-1]
    assert torch.equal(again[0], tagged)
    assert torch.equal(again[1], merged)
    assert not hub.requests


def test_through_peft(on_hub, toy_run, toy_base):
    """`from_pretrained` of a task's folder in the repository brings the tasks before it."""
    _, script = on_hub
    code = (
        "from peft import AutoPeftModelForCausalLM, PeftModel\nfrom transformers import LlamaForCausalLM\n"
        f"base = LlamaForCausalLM.from_pretrained({toy_base!r})\n"
        "show(PeftModel.from_pretrained(base, 'me/other', subfolder='task_001'))\n"
        f"show(AutoPeftModelForCausalLM.from_pretrained({str(toy_run.output_dir / 'task_001')!r}))\n"
        "from huggingface_hub import snapshot_download\n"
        "show(AutoPeftModelForCausalLM.from_pretrained(snapshot_download('me/other') + '/task_001'))\n"
    )
    expected = logits(load_stack(toy_run.output_dir, tasks=slice(2)))
    shown = script(code)[0]
    assert len(shown) == 3
    for found in shown:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
