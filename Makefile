# `make check` is what every change must pass; `make format` mends what can be mended by machine.
PYTHON ?= python3

.PHONY: check format lint types layers spelling test test-quick emulate sanitize bench

check: lint types layers spelling test

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

layers:
	$(PYTHON) -c "from importlinter.cli import lint_imports_command as c; c()"

spelling:
	$(PYTHON) -m codespell_lib $$(git ls-files)

test:
	$(PYTHON) -m pytest

test-quick:
	$(PYTHON) -m pytest -m "not slow"

# Tiers of the kernels that this machine cannot execute (minutes).
emulate:
	native/emulate/run.sh

# The native tests under sanitizers (minutes).
sanitize:
	PYTHON=$(PYTHON) tools/sanitize.sh

format:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

bench:
	$(PYTHON) bench/reference.py
