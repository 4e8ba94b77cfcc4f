# One environment for everything, .venv, made from the versions in constraints.txt.
# A stamp file in it says that it is up to date: a second call installs nothing.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
INSTALLED_DOCS := $(VENV)/installed-docs
STATED := pyproject.toml setup.py constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install install-dev quickstart test test-kernels test-gpu test-mutations lint check docs clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(INSTALLED) ## install, then train split digits: the first result
	$(BIN)/clframe run quickstart

# With bytecode, even where the caller disables it: without, every worker rewrites the assertions of all tests again.
test: $(INSTALLED_DEV) ## install, then run the whole default suite (ARGS="-k name" to narrow it)
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

# Other CPU kernels round differently: a test that asks for equal bits where mathematics does not promise them fails here.
test-kernels: $(INSTALLED_DEV) ## the suite under other CPU kernels and with two threads (four times as long as test)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
	  $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	ONEDNN_MAX_CPU_ISA=AVX512_CORE $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	TEST_THREADS=2 $(BIN)/python -m pytest -n 1 --dist loadfile $(ARGS)

test-gpu: $(INSTALLED_DEV) ## the tests that need a CUDA device
	TEST_GPU=1 $(BIN)/python -m pytest -m gpu $(ARGS)

# One change of a sign, a term or an index at a time in strategies and functional modules: at least 95 % must fail a test.
test-mutations: $(INSTALLED_DEV) ## the tests of the tests: 100 small errors, most of which must be found (an hour)
	$(BIN)/python tests/mutation/mutate.py $(ARGS)

lint: $(INSTALLED_DEV) ## formatting rules, types, and the arrows between packages
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test ## everything a change must pass

docs: $(INSTALLED_DOCS) ## the documentation as a site in build/site; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

install: $(INSTALLED) ## make .venv with clframe in it

install-dev: $(INSTALLED_DEV) ## the same with pytest, ruff, mypy and import-linter

clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find clframe strategies tests perf examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): $(STATED)
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make: $(PYTHON) was not found; install Python 3.10 or later, or name one: make PYTHON=/path/to/python3" >&2; \
	  exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make: $(PYTHON) is $$($(PYTHON) --version 2>&1), clframe needs 3.10 or later;" \
	    "name another: make PYTHON=python3.12" >&2; \
	  exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "make: $(PYTHON) cannot make a virtual environment; install its venv module (Debian: python3-venv)" >&2; \
	  exit 2; }
	$(PIP) -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(PIP) -e '.[dev]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP) -e '.[docs]'
	@touch $@
