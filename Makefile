# Two commands do everything on a fresh machine with Python 3.11 and make:
#   make demo   runs the main job      make test   passes the tests

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= auto

.PHONY: demo test test-core test-keras lint format clean

demo: $(VENV)/.installed
	rm -rf build/demo
	$(BIN)/ckptsurg demo build/demo

test: lint test-core test-keras

test-core: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --no-skips --ignore tests/keras

# Keras chooses its backend when it is imported, so each has a run of its own.
test-keras: $(VENV)/.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n $(WORKERS) --no-skips tests/keras
	KERAS_BACKEND=torch $(BIN)/python -m pytest -n $(WORKERS) --no-skips tests/keras

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch comes first and by its exact version, so that no other package chooses one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

clean:
	rm -rf build dist $(VENV)
