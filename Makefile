# make demo: distils a real language model and shows what came of it.    make test: runs the tests.
# Both create .venv first. Without a GPU, `make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu` saves
# the download of the CUDA libraries. PYTHON=... picks the interpreter.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TORCH_INDEX ?=
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.10 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)

# OpenMP's threads wait for work by spinning. Beside other busy processes they then take the cores from each other, and a
# step takes ten times as long; PASSIVE lets them sleep. It has to be set before PyTorch is loaded.
export OMP_WAIT_POLICY ?= PASSIVE

# The tests' matrices are small: more threads than one would only wait for each other, more processes do not. Many of the slow
# tests wait for processes of their own.
ifeq ($(origin JOBS),undefined)
test test-nightly: JOBS := 3
endif
JOBS ?= 2
check test test-nightly test-fast test-oldest: export OMP_NUM_THREADS ?= 1
CHECKED := $(wildcard tests/test_*.py) $(addprefix tests/,checkpoints config configs data demo \
	distributed docs evaluation launch losses models plan reports storage sweeps tools training) $(addsuffix .py,$(addprefix tests/kernels/test_, \
	linear_cost meta properties softmax_autograd workspaces))
PYTEST = $(BIN)/pytest -n $(JOBS) --dist worksteal --durations 25
# PyTorch 2.6 and what was new when it was: what pyproject.toml promises to work with
OLDEST := .venv-oldest
# transformers and peft, in which the tests load what a run exports; peft refuses the torchao that torchtune needs
EXPORTS := .venv-exports

.DEFAULT_GOAL := install
.PHONY: install exports demo docs check test test-nightly test-fast test-oldest lint types format build clean

install: $(INSTALLED)

# torch first and alone, so that TORCH_INDEX decides on its build and nothing else's.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: Python 3.10 or newer with venv was not found; install python3.11 (and python3.11-venv) or set PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,demo]'
	@touch $@

# ARGS: options of the demo, such as --cached
demo: install
	$(BIN)/python -m torchtune_kd.demo $(ARGS)

# Lint, types, and what can be tested within this process in half a minute: no compiler, other process or recipe runs, few runs
# are planned, and of the kernels' tests the grids are left out.
check: lint types
	$(PYTEST) -m 'not slow and not heavy' $(CHECKED)

test: lint exports
	$(PYTEST) -m 'not nightly'

test-nightly: lint exports
	$(PYTEST)

test-fast: lint
	$(PYTEST) -m 'not slow'

test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -n $(JOBS) --dist worksteal -m 'not slow'

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c constraints-oldest.txt 'setuptools>=77' -e '.[demo]' datasets hypothesis pandas pyarrow pytest pytest-xdist tensorboard
	@touch $@

exports: $(EXPORTS)/.installed

$(EXPORTS)/.installed: pyproject.toml constraints-exports.txt | $(INSTALLED)
	$(PYTHON) -m venv $(EXPORTS)
	$(EXPORTS)/bin/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints-exports.txt torch
	$(EXPORTS)/bin/python -m pip install -c constraints-exports.txt accelerate lm_eval peft pytest safetensors transformers
	$(EXPORTS)/bin/python -m pip install --no-deps -e .
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Links show pyright the package as it installs, with kernels/, recipes/ and configs/ in it.
types: install
	rm -rf build/types && mkdir -p build/types/torchtune_kd
	cd build/types/torchtune_kd && ln -s ../../../torchtune_kd/* ../../../kernels ../../../recipes ../../../configs .
	$(BIN)/pyright

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages of docs/ and the API reference, in site/. Material announces another project's plans with every build.
docs: export NO_MKDOCS_2_WARNING ?= 1
docs: install
	$(BIN)/mkdocs build --strict

# setuptools would pack what an earlier build left in build/.
build: install
	rm -rf build
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) $(OLDEST) $(EXPORTS) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
