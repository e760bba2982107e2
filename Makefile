# `make` alone lists the targets. Each prints the commands it runs, so that you can run them without
# make. Written for GNU make 3.81 (macOS) and BSD tools.

PYTHON ?= python3
PY := .venv/bin/python
# What `make gpu` may lack on a machine that has torch: pure Python, with what they need themselves.
WHEELS := tyro docstring-parser typeguard typing-extensions tqdm hypothesis sortedcontainers
WHEELS += pytest iniconfig pluggy packaging pygments

# TORCH: pip arguments that name the torch to install. SYSTEM_TORCH=1: reuse PYTHON's own torch.
export TORCH SYSTEM_TORCH

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-peers lint kernels gpu wheels bench docs clean FORCE

help: ## this list
	@echo 'megalite: make demo trains a model with 3D parallelism; make test shows that it is right.'
	@echo
	@awk -F ':.*## ' '/^[.a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON=python3.12      which Python makes .venv (3.10 to 3.13)"
	@echo "  TORCH='torch==2.13.0'  which torch to install: any pip arguments, --index-url too"
	@echo "  SYSTEM_TORCH=1         reuse the torch (2.11 or later) that PYTHON already has"
	@echo "  ARGS='-k mesh'         more arguments for demo, test, test-peers, kernels, gpu, bench, docs"

.venv: .venv/stamp ## the Python environment; every target below makes it if it is not there
	@echo '.venv is ready: .venv/bin/megalite, or ". .venv/bin/activate" and then megalite'

# A setting on the command line is compared with what .venv was made from; otherwise only a change
# of requirements.txt calls the set-up again.
ifneq ($(TORCH)$(SYSTEM_TORCH)$(filter command,$(origin PYTHON)),)
.venv/stamp: FORCE
endif
.venv/stamp: requirements.txt
	@command -v $(PYTHON) >/dev/null || { \
	    echo 'set-up: error: no $(PYTHON) on this machine (make PYTHON=python3.12 .venv)'; exit 2; }
	$(PYTHON) tools/setup_env.py $(if $(filter command environment,$(origin PYTHON)),--this-python)

.venv-peers/stamp: .venv/stamp pyproject.toml
	$(PY) tools/setup_env.py --peers

.venv-docs/stamp: .venv/stamp pyproject.toml
	$(PY) tools/setup_env.py --docs

demo: .venv/stamp ## raw text to a model that answers, 8 ranks as TP2 x PP2 x DP2 on the way
	examples/demo.sh $(ARGS)

test: .venv/stamp ## all tests that need no GPU and no other system; lists why any is skipped
	$(PY) -m pytest -n auto --dist worksteal --ignore=tests/peers --ignore=tests/gpu $(ARGS)

test-peers: .venv-peers/stamp ## compares with the real tokenizers and TensorBoard
	.venv-peers/bin/python -m pytest tests/peers $(ARGS)

lint: .venv/stamp ## ruff (rules and format) and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

kernels: .venv/stamp ## compiles the CUDA kernels (nvcc; no GPU): sm_80, sm_90, sm_100 and PTX
	$(PY) kernels/build.py $(ARGS)

# With PYTHON on the command line, that interpreter as it is: machines with GPUs are often offline.
GPU_PYTHON := $(if $(filter command,$(word 1,$(origin PYTHON))),$(PYTHON),$(PY))
gpu: $(if $(filter $(PY),$(GPU_PYTHON)),.venv/stamp) ## all that needs a GPU, into docs/gpu (PART=kernels, train, generate or layouts)
	$(GPU_PYTHON) tools/gpu.py $(if $(PART),--part $(PART)) $(ARGS)

wheels: ## pure-Python packages for `make gpu` on a machine without a network, into vendor-wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --platform any \
	    --implementation py --abi none --dest vendor-wheels $(WHEELS)

bench: .venv/stamp ## times a training step (ARGS=--help lists the choices)
	$(PY) tools/bench_train.py $(ARGS)

docs: .venv-docs/stamp ## the guide as HTML and PDF, with pictures of runs/demo, into build/docs
	.venv-docs/bin/python tools/build_docs.py $(ARGS)

clean: ## removes caches and build products; keeps runs/ and the environments
	rm -rf build megalite/ops/built megalite.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find megalite tests tools examples -type d -name __pycache__ -prune -exec rm -rf {} +
