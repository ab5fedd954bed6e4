# Everything a person or a machine runs here. Each target sets up what it needs: Python 3.11+, git and make are enough.
#
#   make demo     two examples on several processes, in about a minute
#   make test     format, lint, types, import rules, all tests; stops at the first failure
#   make soak     the same with every case, thousands of seeds, and drills that take long: hours
#   make table    the table of split models in the README, from the tests (LONG_TESTS=1: all their cases)
#   make smoke    the quick part of it, under 30 seconds
#   make bench    measures, writes bench/results/*.json and prints the tables (make bench QUICK=1: fewer repetitions)
#   make lint     format, lint, types, import rules
#   make clean    removes what was built here; runs/ and demo/ stay
#
# WORKERS=2       how many tests run at once in make test
# PYTHON=...      the interpreter that .venv is made with
# PIP_FLAGS=...   further flags for pip, such as another index

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test table soak smoke bench lint format-check ruff types imports pytest clean

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
PIP_FLAGS ?=
QUICK ?=
SEEDS ?= 20000
MINUTES ?= 30
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) -c constraints.txt

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(READY)

# Torch first and pinned: resolved together with the rest, another build of it could come. The build backend lives in
# the environment, so the last line needs no network once all packages are there.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Paceline needs Python 3.11 or newer; give it as PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "setting up $(VENV) (the first time this downloads torch)"
	$(PIP) "hatchling>=1.27" editables torch
	$(PIP) --no-build-isolation -e ".[test,lint,examples]"
	@touch $@

demo: $(READY)
	$(BIN)/paceline demo

test: lint pytest

lint: format-check ruff types imports

format-check: $(READY)
	$(BIN)/ruff format --check .

ruff: $(READY) format-check
	$(BIN)/ruff check .

types: $(READY) ruff
	$(BIN)/mypy

imports: $(READY) types
	$(BIN)/lint-imports

pytest: $(READY) imports
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

soak: $(READY)
	LONG_TESTS=1 $(BIN)/python -m pytest --seeds $(SEEDS)
	PYTHONPATH=tests $(BIN)/python bench/soak.py --for $(MINUTES)

table: $(READY)
	mkdir -p .build && rm -f .build/parity.jsonl
	PARITY_RECORD=$(CURDIR)/.build/parity.jsonl $(BIN)/python -m pytest tests/peers/test_shard.py tests/peers/test_tensor.py tests/peers/test_pipeline.py tests/parity/test_split.py
	PYTHONPATH=tests $(BIN)/python tests/support/parity_table.py .build/parity.jsonl

smoke: $(READY)
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest -m smoke -q

bench: $(READY)
	$(BIN)/python bench/run.py $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) .build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
