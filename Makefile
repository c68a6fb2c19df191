# make test and make demo set themselves up: a .venv with the pinned versions of $(CONSTRAINTS), then the job.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV := .venv
BIN := $(VENV)/bin
# Three minutes a test, and half a minute later its process ends with it, whatever it is doing: a test that hangs fails by name, and stops nothing.
LIMITS := --timeout 180 -o faulthandler_timeout=210 --max-worker-restart 2

.PHONY: test test-all demo docs docs-serve session support lint clean
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(LIMITS) --durations 15

test-all: lint $(VENV)/installed-docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

session: $(VENV)/installed
	$(BIN)/python scripts/record_session.py docs/session.md

support: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/support.py --jobs 2 --write docs/support.md

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install.py $(CONSTRAINTS) dev
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python scripts/install.py $(CONSTRAINTS) docs
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
