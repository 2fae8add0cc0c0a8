# `make demo` and `make test` do everything; both set the environment up first. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without a GPU the CPU build of torch is enough; with one, pip's newest CUDA build is wanted. `make TORCH=torch==2.11.0 test`
# takes another one.
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)

.PHONY: help demo check test-local test lint format docs notebooks chaos oracle release setup clean
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*##/\t/' | expand -t 14

demo: setup  ## train a one-step generator on two CPU cores
	$(BIN)/rlhf-t2i demo

check: setup  ## style and the fast tests, under a minute: before every commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -q -n 2 -m fast

test-local: setup  ## all tests of one process, 7 minutes: before a pull request
	$(BIN)/python -m pytest -q -n 2 -m "fast or local"

# Three workers for two cores: tests over Ray mostly wait.
test: $(VENV)/.tested  ## every test, 35 minutes on two cores: what CI runs
	$(BIN)/python -m pytest -n 3

lint: setup  ## style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## rewrite files in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.tested  ## the documentation as a site, in site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

notebooks: setup  ## run the notebooks of examples/ and store their outputs
	$(BIN)/python examples/execute_notebooks.py

# Half an hour of SIGKILLs on two cores; LOCAL=7 RAY=6 NODES=0 for a taste.
LOCAL ?= 70
RAY ?= 24
NODES ?= 6
SEED ?= 0
chaos: setup  ## kill processes and nodes of runs in every phase, over and over
	$(BIN)/python benchmarks/chaos.py --local $(LOCAL) --ray $(RAY) --nodes $(NODES) --seed $(SEED) \
		--out runs/chaos-$(shell date +%Y%m%d-%H%M%S)

# -qq: errors alone. What pip warns of (indexes of the machine's own configuration, newer pips) helps nobody here.
setup: $(VENV)/.ready  ## the environment in .venv
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "rlhf-t2i needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip setuptools wheel
	$(BIN)/python -m pip install -qq -c constraints.txt '$(TORCH)' -e '.[dev,zoo,tensorboard]'
	touch $@

# Extras that only their own tests need, 350 MB.
$(VENV)/.tested: $(VENV)/.ready
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[app,docs,ocr]'
	touch $@

ORACLE ?= build/oracle
oracle:  ## the environment of the original reward packages, in build/oracle
	$(PYTHON) tests/rewards/fixtures/make_oracle.py $(ORACLE)

# RLHF_T2I_WHEELS: the test installs what is in dist/, not wheels of its own.
release: setup  ## both distributions in dist/, checked and tried in an empty environment
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[release]'
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist zoo/emoji64
	$(BIN)/twine check --strict dist/*
	RLHF_T2I_WHEELS=dist $(BIN)/python -m pytest -q -n 0 tests/project/test_wheels.py

clean:  ## remove the environment and builds
	rm -rf $(VENV) build dist site *.egg-info zoo/emoji64/build zoo/emoji64/*.egg-info
