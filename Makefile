# Every target works alone on a fresh machine: what needs the environment sets it up first.
SHELL := /bin/bash
VENV := .venv
PYTHON := $(VENV)/bin/python
CONSTRAINTS := infra/constraints/cpu.txt
READY := $(VENV)/.ready
JOB ?= jobs/train_demo.py
ARGS ?=
BENCH ?= pipeline
TORCH_INDEX ?=

.PHONY: train test test-all test-chaos setup check bench submit lock fmt

train: $(READY)
	$(PYTHON) jobs/train_demo.py $(ARGS)

test: $(READY)
	$(PYTHON) -m pytest -m "not slow" $(ARGS)

test-all: $(READY)
	$(PYTHON) -m pytest $(ARGS)

# Faults against whole jobs, about half an hour; the table of docs/faults.md comes out in outputs/chaos.md.
test-chaos: $(READY)
	$(PYTHON) -m pytest -m chaos tests/chaos $(ARGS)

setup: $(READY)

# torch first and alone, pinned by the constraints. Where the package index serves CUDA builds (PyPI, on Linux), the
# CPU build is had with TORCH_INDEX=https://download.pytorch.org/whl/cpu
$(READY): pyproject.toml $(CONSTRAINTS)
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch numpy
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

check: $(READY)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy
	@echo every test can be collected; found=$$($(PYTHON) -m pytest --collect-only -qq 2>&1) || { echo "$$found"; exit 1; }

fmt: $(READY)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

bench: $(READY)
	$(PYTHON) -m tests.benchmarks.$(BENCH) $(ARGS)

# To the cluster of RAY_ADDRESS; relative paths in ARGS are those of the job's own folder, so give absolute ones.
submit: $(READY)
	$(VENV)/bin/ray job submit --working-dir . -- python $(JOB) $(ARGS)

# The versions of this environment become the constraints of all.
lock: $(READY)
	$(PYTHON) -m pip freeze --exclude-editable --disable-pip-version-check | sed -E 's/^(torch==[0-9.]+)\+cpu$$/\1/' > $(CONSTRAINTS)
