# Two commands do everything on a fresh machine with Python 3.11 and make:
#   make demo   runs the main job      make test   passes the tests
# Of the tests, make faults runs those that stop, starve and deceive a rewrite, and counts; make fuzz reads what nobody
# wrote, for a minute or, with make fuzz SECONDS=3600, for as long as there is time. What is found is kept in build/fuzz.
# Another command measures, for as long as the machine is left alone (about an hour, 25 GB of disk, 24 GB of memory):
#   make bench  ckptsurg, its peers and `cp`, in turns, on this file system and, as root, on an XFS image; the peers
#               have an environment of their own, and table, chart and runs go into docs/.
#               For less: make bench BENCH="--sizes 0.25 --rounds 3 --where ext4 --docs /tmp --readme /tmp/README.md"

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= auto
SECONDS ?= 60
BENCH ?=
BENCH_VENV := build/bench-venv

.PHONY: demo test test-core test-keras faults fuzz lint format bench clean

demo: $(VENV)/.installed
	rm -rf build/demo
	$(BIN)/ckptsurg demo build/demo

# The same inputs each time, as far as a minute goes.
test: SEED := 1
test: lint test-core test-keras fuzz

test-core: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --no-skips --ignore tests/keras

# Keras chooses its backend when it is imported, so each has a run of its own.
test-keras: $(VENV)/.installed
	KERAS_BACKEND=tensorflow $(BIN)/python -m pytest -n $(WORKERS) --no-skips tests/keras
	KERAS_BACKEND=torch $(BIN)/python -m pytest -n $(WORKERS) --no-skips tests/keras

# A part of test-core, and how many points it went through. As root: file systems are mounted.
faults: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --no-skips --junitxml build/faults.xml tests/faults
	$(BIN)/python -m tests.faults.figures build/faults.xml

# All targets in so many seconds together, as many at once as there are processors.
fuzz: $(VENV)/.installed
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

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
	$(BIN)/python -m compileall -q ckptsurg  # as pip does for what it does not install in place
	touch $@

bench: $(BENCH_VENV)/.installed
	$(BENCH_VENV)/bin/python -m compileall -q ckptsurg
	$(BENCH_VENV)/bin/python benchmarks/speed.py $(BENCH)

$(BENCH_VENV)/.installed: pyproject.toml constraints.txt benchmarks/constraints.txt
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BENCH_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-c benchmarks/constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf build dist $(VENV)
