# Each target does its own set-up: `make demo` and `make test` work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
CORE := .venv/.core-installed
STAMP := .venv/.installed
# A process a core, a file of tests at a time: what a file's tests share is made once.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

.PHONY: demo test check lint docs soak audit gpu clean

demo: $(CORE)
	@$(BIN)/python -m moco_dist demo

test: check
	$(PYTEST) -m "slow and not gpu"

check: lint
	$(PYTEST) -m "not slow and not gpu"

# Kills a training 200 times; an hour.
soak: $(STAMP)
	MOCO_DIST_KILLS=200 $(BIN)/python -m pytest tests/faults/test_kills.py

# Known vulnerabilities of what is installed; asks pypi.org. Without --strict a package that it does not answer for would
# count as free of them.
audit: $(STAMP)
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip freeze --exclude-editable | $(BIN)/pip-audit --strict --no-deps --disable-pip -r /dev/stdin

# What is worth measuring on a machine with a GPU, in calls of MINUTES, until all is done: docs/benchmarks.md. Uses .venv if
# it was made, else a Python that has torch already (it fits the driver, and such a machine may have no network), and makes
# .venv only where there is neither.
MINUTES ?= 9
gpu:
	@if test -f $(CORE); then python=$(BIN)/python; \
	elif $(PYTHON) -c 'import importlib.util as u; raise SystemExit(u.find_spec("torch") is None)'; then python=$(PYTHON); \
	else $(MAKE) $(STAMP) && python=$(BIN)/python; fi && $$python -m benchmarks.gpu --minutes $(MINUTES) $(FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The documentation site, as site/index.html; what is wrong with a page or a link ends it.
docs: $(CORE)
	$(BIN)/pip install --quiet --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Both are installed anew only when the project's requirements change. The demo needs no extra and none of the tests' tools.
$(CORE): pyproject.toml
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

$(STAMP): $(CORE)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --editable ".[dev]"
	if pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then $(BIN)/pip install --quiet --editable ".[ffcv]"; \
	else echo "tests against the ffcv package are skipped: it needs apt-get install libopencv-dev libturbojpeg0-dev pkg-config"; fi
	touch $@

clean:
	rm -rf .venv build site *.egg-info
