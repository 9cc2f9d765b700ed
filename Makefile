# Two commands for a newcomer: make demo, make test. Both work on a bare machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo quick test cover check docs baseline format bench coverage clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "torchslim needs Python 3.11 or newer; make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.demo

$(VENV)/.bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[bench]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	$(BIN)/torchslim demo examples/fashion_mnist/recipe.toml

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# what a developer runs at every change
quick: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not (slow or browser or distributed or database)'

# before a release: two thirds more time than make test
cover: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal --cov --cov-report term

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs: $(VENV)/.dev
	$(BIN)/python -m docs.house
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

baseline: $(VENV)/.demo
	$(BIN)/python -m examples.fashion_mnist.baseline

bench: $(VENV)/.demo
	$(BIN)/python -m benchmarks.demo

coverage: $(VENV)/.bench
	$(BIN)/python -m benchmarks.coverage
	$(BIN)/python -m benchmarks.coverage_quantize

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
