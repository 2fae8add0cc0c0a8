# Two commands do everything: `make demo` and `make test`. Both set the environment up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Without a GPU the CPU build of torch is enough; with one, pip's newest CUDA build is wanted.
TORCH := $(if $(shell command -v nvidia-smi 2>/dev/null),torch,torch==2.13.0)

.PHONY: demo test chaos setup lint clean
demo: setup
	$(BIN)/rlhf-t2i run recipes/quickstart.yaml --out runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python -m pytest -n 2

# Half an hour of SIGKILLs on two cores; KILLS=6 NODE_KILLS=2 for a taste.
KILLS ?= 60
NODE_KILLS ?= 10
chaos: setup
	$(BIN)/python benchmarks/chaos.py --kills $(KILLS) --node-kills $(NODE_KILLS) --out runs/chaos-$(shell date +%Y%m%d-%H%M%S)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

setup: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "rlhf-t2i needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt '$(TORCH)' -e '.[dev,zoo,tensorboard]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
