# Each target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test check lint clean

demo: $(STAMP)
	@$(BIN)/python -m launchers.demo

test: check
	$(BIN)/python -m pytest -m "slow and not gpu"

check: lint
	$(BIN)/python -m pytest -m "not slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# Installed anew only when the project's requirements change.
$(STAMP): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
