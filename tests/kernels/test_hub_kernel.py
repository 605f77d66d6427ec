"""The kernels as a repository that Hugging Face's `kernels` loads; without that library only the layout is tested."""

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interpreted import DEVICE


try:  # the repository has a folder of this name, which Python imports too
    from kernels import get_local_kernel
except ImportError:
    get_local_kernel = None

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub") / "kernel"
    command = [sys.executable, str(KERNELS / "hub_kernel.py"), str(out)]
    subprocess.run(command, check=True)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "is there already" in again.stderr
    return out


def test_layout(repository):
    variant = repository / "build" / "torch-universal"
    metadata = json.loads((variant / "metadata.json").read_text())
    sources = {path.name: path.read_bytes() for path in (KERNELS / "jumplora_kernels").glob("*.py")}
    for folder in (variant, repository / "torch-ext" / "jumplora_kernels"):
        assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == sources
    digests = {name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in sources.items()}
    assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
    assert metadata["id"].isidentifier()


@pytest.mark.skipif(get_local_kernel is None, reason="needs the library `kernels`")
def test_the_library_loads_it(repository, package):
    """The kernel computes what the package does, and is a module of its own."""
    from kernels._rust import Build, Digest, DigestAlgorithm, Metadata

    assert Build.open(repository).general.backends
    variant = repository / "build" / "torch-universal"
    kernel = get_local_kernel(repository)
    assert kernel.forward is not package.forward
    assert kernel.__all__ == package.__all__
    assert kernel.is_available(torch.device(DEVICE))
    files = Digest.hash_variant(DigestAlgorithm.SHA256, variant).files
    assert Metadata.read_from_file(variant / "metadata.json").digest.files.items() <= files.items()
    rng = torch.Generator().manual_seed(0)
    x, weight, A, B = (torch.randn(shape, generator=rng).to(DEVICE) for shape in ((5, 20), (12, 20), (4, 20), (12, 4)))
    tau, mix = torch.tensor([0.5], device=DEVICE), torch.tensor([0.7], device=DEVICE)
    arguments = (x, weight, None, A, B, tau, mix)
    assert torch.equal(kernel.forward(*arguments, scaling=2.0), package.forward(*arguments, scaling=2.0))
