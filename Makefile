# make serve   start a cluster on the model that ships; Ctrl-C stops everything
# make test    run every test
# make soak    twenty minutes under load with a fault every ten seconds (ARGS="--minutes 1" for a short one)
# make simulate  simulated clusters with faults, from seeds (ARGS="--seeds 100000 --jobs 8" as a nightly run)
# make lint    formatting, lint, types
# make gpu-check   on a machine with a GPU: kernels, exactness and benchmarks, within eight minutes
# make proto   regenerate the protobuf modules
# make clean   remove everything generated, .venv included
#
# Variables: PYTHON (3.11 or newer), ARGS (for `baton up`, pytest, soak or gpu-check), PIP_ARGS (for pip install), WHEELS (a
# folder of wheels for what gpu-check misses on a machine without a network).

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
# What an editable install depends on; everything else is used from the checkout as it is.
SOURCES := pyproject.toml setup.py $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

# The Python that is asked for, else that of the virtual environment, else one that has torch; nothing is installed.
GPU_PYTHON = $(shell for python in $(if $(filter file default undefined,$(origin PYTHON)),,"$(PYTHON)") $(BIN)/python python3; do \
	$$python -c 'import torch' 2>/dev/null && echo $$python && break; \
	done)

.PHONY: serve test soak simulate lint gpu-check proto clean
.DELETE_ON_ERROR:

serve: $(VENV)/.serve
	@exec $(BIN)/baton up $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

soak: $(VENV)/.serve
	$(BIN)/python bench/soak.py $(ARGS)

simulate: $(VENV)/.dev
	@$(BIN)/python -m tests.simulation $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check:
	@test -n "$(GPU_PYTHON)" || { echo "gpu-check needs a Python that has torch: make gpu-check PYTHON=/path/to/python3" >&2; \
	exit 1; }
	@$(GPU_PYTHON) bench/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

proto: $(VENV)/.dev
	$(BIN)/python tools/gen_proto.py

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "Baton needs Python 3.11 or newer with venv (Debian: apt install python3-venv); \
	or say make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.serve: $(VENV)/.python $(SOURCES)
	@echo "installing Baton into $(VENV); the first time this downloads torch and takes minutes"
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(SOURCES)
	@echo "installing Baton and its development tools into $(VENV)"
	$(INSTALL) --editable ".[dev]"
	@touch $(VENV)/.serve $@
