# Every target makes .venv in the clone when it is missing and installs the package with constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread a process: the machine's cores go to the test processes, and timings repeat better.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-oldest test-newest test-timm lint docs format bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# The CPU build of torch comes first, pinned: an unpinned torch pulls gigabytes of CUDA packages on Linux.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	@touch $@

# The documentation needs packages that the demo and the tests do not.
$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

# Models this small are slower on several threads than on one.
demo: export OMP_NUM_THREADS := 1
demo: $(VENV)/.installed ## few labels, many images: what distillation gains on digits, 5 seeds, 3 to 4 minutes; writes runs/demo
	$(BIN)/hf-kdtl train-teacher --config digits_teacher
	$(BIN)/hf-kdtl distill --config digits

test: $(VENV)/.installed ## the test-suite (offline, CPU, 4 to 7 minutes on 2 cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.docs ## the slow suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow

$(VENV)-oldest/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt torch
	$(VENV)-oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable '.[test]'
	@touch $@

test-oldest: $(VENV)-oldest/.installed ## the test-suite on the oldest versions allowed
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

# Made anew each time: what is newest changes. torch stays the tested one, for its size; `TORCH=torch` for the newest.
test-newest: TORCH ?= --constraint constraints.txt torch
test-newest: ## the test-suite on the newest releases
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet $(TORCH)
	$(VENV)-newest/bin/python -m pip install --quiet --editable '.[test]'
	$(VENV)-newest/bin/python -m pip list
	OMP_NUM_THREADS=1 $(VENV)-newest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

# torchvision imports beside its own torch alone, and brings the CUDA build: 5.6 GB. Not part of CI.
$(VENV)-timm/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-timm
	$(VENV)-timm/bin/python -m pip install --quiet torch==2.14.1 torchvision==0.29.1 timm
	$(VENV)-timm/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@

test-timm: $(VENV)-timm/.installed ## models of timm as teacher and student, in an environment of their own (5.6 GB)
	OMP_NUM_THREADS=1 $(VENV)-timm/bin/python -m pytest tests/timm

lint: docs ## ruff (check, format), mypy, and the documentation without warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs ## the documentation, in build/docs; a warning is an error
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

format: $(VENV)/.installed ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed ## the cost of a step, as ratios (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_cost.py

clean: ## remove the environments, the built documentation and the runs
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-timm build runs
