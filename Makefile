# make demo: images -> shards -> training -> preempted and resumed -> samples -> metrics -> report, on this machine.
# Everything is installed into .venv; a stamp file there keeps a second `make` from installing again.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
# The exact pin of torch, from pyproject.toml, belongs in the same pip command as everything that depends on it.
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
PYTEST_ARGS ?=

.PHONY: help setup demo test lint bench prove mutants cluster-setup page-setup clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

$(BIN)/python:
	@for name in python3.11 python3.12 python3.13 python3.14 python3; do \
	  if "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$("$$name" --version)"; rm -rf $(VENV); exec "$$name" -m venv $(VENV); fi; \
	done; \
	echo "no Python >= 3.11 with the venv module was found; on Debian: apt-get install python3 python3-venv" >&2; exit 1

$(VENV)/.stamp-demo: pyproject.toml | $(BIN)/python
	@echo "installing hpc-gen and what the demo needs into $(VENV) (about 1.5 GB; once)"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[demo]" "$(TORCH)"
	@touch $@

$(VENV)/.stamp-dev: pyproject.toml | $(BIN)/python
	@echo "installing hpc-gen and what the tests need into $(VENV) (once)"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]" "$(TORCH)"
	@touch $(VENV)/.stamp-demo $@

setup: $(VENV)/.stamp-demo  ## install into .venv
	@echo "set up: $(BIN)/hpc-gen --help"

demo: setup  ## the whole thing on real images, six to nine minutes on two cores
	@$(BIN)/hpc-gen demo

cluster-setup:  ## a real Slurm and a real Apptainer for the cluster tests (Debian, as root)
	@bash slurm/lab/install_slurm.sh || \
	  printf '\n*** SLURM COULD NOT BE INSTALLED (see above): the tests below tests/slurm will be SKIPPED.\n\n' >&2
	@bash slurm/lab/install_apptainer.sh || \
	  printf '\n*** APPTAINER COULD NOT BE INSTALLED (see above): the container tests will be SKIPPED.\n\n' >&2

page-setup:
	@bash tests/support/install_chromium.sh

test: $(VENV)/.stamp-dev cluster-setup page-setup  ## every test; PYTEST_ARGS="-k config" for some
	@mkdir -p build; rm -f build/junit.xml .test-counts.json
	@$(BIN)/python -m pytest -rs --junitxml=build/junit.xml $(PYTEST_ARGS)

lint: $(VENV)/.stamp-dev  ## ruff (rules and format), mypy --strict of config and runtime, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.stamp-dev  ## measurements of this machine
	@$(BIN)/python tests/bench/run.py

prove: $(VENV)/.stamp-dev cluster-setup  ## matrix of engines, 200 random kills, Slurm's preemptions; resumable; to docs/proofs
	@$(BIN)/python tests/prove_engines.py
	@$(BIN)/python tests/prove.py
	@$(BIN)/python tests/prove_slurm.py

mutants: $(VENV)/.stamp-dev  ## seeded mistakes in the code must turn the tests red
	@$(BIN)/python tests/mutants.py

clean:  ## remove .venv, caches and build outputs (runs, tables and downloads stay)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .test-counts.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
