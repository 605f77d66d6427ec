"""Code run in processes that import only what it asks for, at the price of importing torch once."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


# Imports what all need, which is most of the time, and runs each piece of code in a fork of itself.
FORKS = """
import json, os, sys, tempfile
import torch, {imports}
torch.set_num_threads(1)
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            exec(json.loads(line), dict())
            sys.exit()
        status = os.waitpid(child, 0)[1]
        out.seek(0)
        print(json.dumps([status, out.read()]), flush=True)
"""


@contextlib.contextmanager
def forks(imports: str, environment: dict[str, str] | None = None) -> Iterator[Callable[[str], str]]:
    """A function that runs code in a process that has imported torch and `imports`, nothing else; it returns what was
    printed, or raises AssertionError with the end of it."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS.format(imports=imports)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=environment or dict(os.environ),
    ) as process:

        def run(code: str) -> str:
            process.stdin.write(json.dumps(code) + "\n")
            process.stdin.flush()
            status, printed = json.loads(process.stdout.readline())
            assert status == 0, printed[-3000:]
            return printed

        yield run
        process.stdin.close()
