# Needs Python 3.11 or newer, git and make; everything else is installed into .venv from requirements/*.lock.
# Another interpreter: make install PYTHON=/path/to/python3.12

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
INSTALLED := $(VENV)/.installed
OLD_VENV := .venv-pyarrow14
OLD_INSTALLED := $(OLD_VENV)/.installed
DEMO ?= demo-output
PYTEST_ARGS ?=
MUTATION_ARGS ?=
# Test processes; each takes up to 3 GB. Files stay whole, because their fixtures are servers and clusters.
TEST_PROCESSES ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -lt 4 ] && echo $$n || echo 4)
IN_PARALLEL = -n $(TEST_PROCESSES) --dist loadfile
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
LOCKED_EXTRAS := s3 http clip faiss service clusters kubernetes databricks notebook demo docs test
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header $(LOCK_ARGS)
LOCK_ARGS ?=

# $(call find-python,TEST): the first interpreter on the PATH for which TEST holds and that can make environments.
# Names alone prove nothing: a version manager's shim exists for versions that are not active.
find-python = $(shell for p in "$(PYTHON)" python3.11 python3.12 python3.13 python3.14 python3 python; do \
	[ -n "$$p" ] && "$$p" -c 'import sys, venv, ensurepip; sys.exit(not ($(1)))' >/dev/null 2>&1 \
	&& command -v "$$p" && break; done)

.PHONY: help install demo test test-slow test-slurm test-mutation lint docs bench lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make .venv with everything the demo and the tests need

demo: $(INSTALLED) ## Embed real photographs and draw each beside its nearest neighbours
	$(BIN)/curator-embed demo --output $(DEMO)

test: lint $(OLD_INSTALLED) ## Lint, type-check and run the tests (not the slow ones)
	PYARROW14_PYTHON="$(OLD_PYTHON)" $(BIN)/python -m pytest -m "not slow and not gpu and not slurm" $(IN_PARALLEL) $(PYTEST_ARGS)

test-slow: $(INSTALLED) $(OLD_INSTALLED) ## Run the tests that take minutes
	PYARROW14_PYTHON="$(OLD_PYTHON)" $(BIN)/python -m pytest -m "slow and not gpu and not slurm" $(PYTEST_ARGS)

test-slurm: $(INSTALLED) ## Install Slurm with apt and run the tests that start one (as root, or with sudo)
	@PATH="$$PATH:/usr/sbin"; if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then \
		$(SUDO) apt-get update && $(SUDO) apt-get install -y --no-install-recommends slurm-wlm munge; fi
	$(SUDO) env PYTHONDONTWRITEBYTECODE=1 $(BIN)/python -m pytest -p no:cacheprovider -m slurm tests/clusters $(PYTEST_ARGS)

test-mutation: $(INSTALLED) ## Change pure modules in small ways and ask whether their tests see it (half an hour)
	$(BIN)/python -m tests.mutation.run $(MUTATION_ARGS)

lint: $(INSTALLED) ## Run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED) ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

bench: $(INSTALLED) ## Measure against a DataLoader, decoding alone and the forward pass alone
	$(BIN)/python -m benchmarks

lock: $(UV) ## Resolve the newest allowed versions into requirements/*.lock
	$(COMPILE) --upgrade requirements/bootstrap.in -o requirements/bootstrap.lock
	$(COMPILE) --upgrade requirements/pyarrow14.in -o requirements/pyarrow14.lock
	$(COMPILE) --upgrade pyproject.toml --group build $(LOCKED_EXTRAS:%=--extra %) -o requirements/dev.lock

clean: ## Remove the environments and everything that was built
	rm -rf $(VENV) $(OLD_VENV) build dist site $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip is asked for one package only, uv, by hash; uv installs the rest, by hash.
$(UV): requirements/bootstrap.lock
	@python="$(call find-python,sys.version_info >= (3$(comma) 11))"; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.11 or newer with the modules venv and ensurepip on the PATH." >&2; \
		echo "Install one (Debian: python3 and python3-venv) or name it: make install PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	echo "Making $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.lock
	@touch $@

comma := ,

$(INSTALLED): $(UV) requirements/dev.lock pyproject.toml
	$(UV) pip sync --python $(BIN)/python --require-hashes requirements/bootstrap.lock requirements/dev.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

# An old reader of what is written today. pyarrow 14 has no wheels past Python 3.12; elsewhere its test skips.
OLD_PYTHON = $(shell cat $(OLD_INSTALLED) 2>/dev/null)
$(OLD_INSTALLED): $(INSTALLED) requirements/pyarrow14.lock
	@rm -rf $(OLD_VENV); mkdir -p $(OLD_VENV)
	@python="$(call find-python,(3$(comma) 11) <= sys.version_info < (3$(comma) 13))"; \
	if [ -z "$$python" ]; then echo "No Python 3.11 or 3.12: the pyarrow 14 test will skip"; touch $@; exit 0; fi; \
	"$$python" -m venv --clear --without-pip $(OLD_VENV); \
	$(UV) pip sync --python $(OLD_VENV)/bin/python --require-hashes requirements/pyarrow14.lock; \
	echo "$(CURDIR)/$(OLD_VENV)/bin/python" > $@
