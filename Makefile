# Every target makes .venv by itself; needs Python 3.11 or newer with pip. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_OUT ?= runs/demo

# explicit, so that a timing or a float does not depend on how many cores the machine happens to have
export OMP_NUM_THREADS ?= 2
export MKL_NUM_THREADS ?= $(OMP_NUM_THREADS)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test check bench docs format clean
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:
	@echo "make demo    sample real problems beside the usual samplers, one report ($(DEMO_OUT)/report.html)"
	@echo "make test    the tests                      (one file: make test ARGS=tests/test_cli.py)"
	@echo "make check   format, lint, types, import rules, docs build"
	@echo "make bench   speed ratios                   make docs    the site, into site/"
	@echo "make format  apply the format               make clean   remove .venv and everything built"

# A stamp per set of extras: a second call installs nothing until pyproject.toml or constraints.txt changes.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "noisewise needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." \
	       "Name another one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-all,demo
	$(BIN)/noisewise demo --out $(DEMO_OUT)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet

# jaxtyping's run-time checks belong to the tests; here they would be what is measured
bench: $(VENV)/.installed-dev
	$(BIN)/python -m pytest benchmarks -o addopts= -o python_files='bench_*.py test_*.py' $(ARGS)

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict
	@echo "the site is in site/; look at it with: $(BIN)/mkdocs serve"

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks .import_linter_cache
