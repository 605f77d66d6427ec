# `make demo` and `make test` set everything up by themselves, in .venv, on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# What pip installs before anything else; TORCH="torch==X+cpu" (or an index of yours in pip's config) picks another build.
TORCH ?= torch==2.13.0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-all test-gpu quality bench
demo: $(VENV)/.installed
	$(RUN) recipes/llama2_cl.py --compare jumplora inclora seqlora --output_dir runs/demo

# The kernels first and apart: triton prints pages about its own bindings when the process ends.
test: $(VENV)/.installed
	$(RUN) -m pytest tests/kernels tests/convergence
	$(RUN) -m pytest --ignore tests/kernels --ignore tests/convergence

test-all: $(VENV)/.installed
	$(RUN) -m pytest tests/kernels tests/convergence -m "slow or not slow"
	$(RUN) -m pytest --ignore tests/kernels --ignore tests/convergence -m "slow or not slow"

# On a GPU, with a torch built for it (TORCH=...): the kernels as they are, not interpreted, and the timing table.
test-gpu: $(VENV)/.installed
	$(RUN) -c "import torch; assert torch.cuda.is_available(), 'no GPU, or a torch without CUDA or ROCm'"
	$(RUN) -m pytest tests/kernels tests/convergence/test_backends.py
	$(RUN) benchmarks/layer.py

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed
	$(RUN) benchmarks/run.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet -e ".[dev]"
	touch $@
