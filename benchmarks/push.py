"""What pushing costs a run: training with pushes to a stand-in Hub that fails 30 % of them, against training alone.

    python benchmarks/push.py [--rows 4000] [--rounds 3]

Interleaved rounds in one process; the time from the start of `train()` to the end of the last task (waiting for the
last push is told apart). Prints a JSON line a run, then the median ratio of the rounds, and of each run that pushes the
processor time of the thread that pushes as a share of that of the thread that trains: what pushing can take from the
training at most, and hardly noisy where the clock is.
"""

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import toy  # noqa: E402
from hub.stand_in import StandInHub  # noqa: E402
from huggingface_hub import constants  # noqa: E402

from hf_jumplora.hub import Pusher  # noqa: E402


KINDS = (500, 503, 412, "refuse", "drop")
TAGS = ["task-000", "task-001", "task-002"]


def one_run(base: str, folder: str, hub: StandInHub | None, seed: int, rows: int) -> dict:
    """Three tasks; with a hub every request that commits or tags fails with probability 0.3."""
    options, repo, ended = {}, f"me/run{seed}", []
    if hub is not None:
        hub.faults.clear()
        share = 1 - 0.7 ** (1 / len(KINDS))  # 30 % in all
        for number, kind in enumerate(KINDS):
            hub.fail(kind, "/commit/|/tag/", share=share, seed=10 * seed + number, retry_after=1)
        options = {"push_to_hub": True, "hub_model_id": repo, "hub_token": hub.token}
    run = toy.make_run(base, folder, stream=toy.tasks(3, train=rows), **options)
    finish, work, busy = Pusher.finish, Pusher.run, []

    def timed(pusher):
        ended.extend((time.perf_counter(), time.thread_time()))
        finish(pusher)

    def counted(pusher):
        work(pusher)
        busy.append(time.thread_time())

    start, begun = time.perf_counter(), time.thread_time()
    with mock.patch.object(Pusher, "finish", timed), mock.patch.object(Pusher, "run", counted):
        run.train()
    end = time.perf_counter()
    ended = ended or [end, time.thread_time()]
    trained, work_s = ended[0] - start, ended[1] - begun
    result = {"pushing": hub is not None, "train_s": round(trained, 2), "wait_s": round(end - start - trained, 2)}
    result["train_cpu_s"] = round(work_s, 2)
    if hub is not None:
        titles = [commit.title for commit in hub.repos[repo].history()][:-1]
        result |= {"commits": len(titles), "duplicates": len(titles) - len(set(titles))}
        result |= {"tags": len(hub.repos[repo].tags), "failures": sum(fault.hits for fault in hub.faults)}
        result["push_cpu_s"] = round(busy[0], 3)
        result["requests"] = hub.count("POST", f"{repo}/commit/|{repo}/tag/")
        assert sorted(hub.repos[repo].tags) == TAGS
    return result


def main() -> None:
    """Run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000, help="of a task")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)  # a second one waits for whatever else runs here
    with tempfile.TemporaryDirectory() as temporary, StandInHub() as hub:
        constants.ENDPOINT = hub.url
        constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        base = toy.save_base(Path(temporary) / "base")
        one_run(base, f"{temporary}/warm", hub, 99, 32)
        times: dict[bool, list[float]] = {False: [], True: []}
        shares, work = [], []
        for seed in range(args.rounds):
            for pushing in (False, True) if seed % 2 else (True, False):
                result = one_run(base, f"{temporary}/{seed}-{pushing}", hub if pushing else None, seed, args.rows)
                times[pushing].append(result["train_s"])
                work += [result["push_cpu_s"]] if pushing else []
                shares += [result["push_cpu_s"] / result["train_cpu_s"]] if pushing else []
                print(json.dumps(result), flush=True)
        alone, pushed = (statistics.median(times[key]) for key in (False, True))
        pairs = [b / a for a, b in zip(times[False], times[True], strict=True)]
        print(json.dumps({"alone_s": alone, "pushing_s": pushed, "median_ratio": round(statistics.median(pairs), 3),
                          "pairs": [round(ratio, 3) for ratio in pairs],
                          "push_cpu_s_a_task": round(statistics.median(work) / len(TAGS), 3),
                          "push_share": [round(share, 4) for share in shares]}))  # fmt: skip


if __name__ == "__main__":
    main()
