# `make demo` and `make test` set up .venv and do everything; the rest is for developers.
PYTHON ?= python3
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
MARKS ?= not slow and not parity
WORKERS ?= 2# processes that tests run in; each may take a few GiB

.PHONY: demo test lint parity bench clean

demo: .venv/ready
	$(BIN)/python -m scripts.demo $(ARGS)

test: .venv/ready-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "$(MARKS)" $(ARGS)

lint: .venv/ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

parity: .venv/ready-parity .venv/mergekit
	$(BIN)/python -m pytest tests/parity -m parity $(ARGS)

bench: .venv/ready-parity
	$(BIN)/python -m scripts.benchmark_training
	$(BIN)/python -m scripts.benchmark_arrow
	$(BIN)/python -m scripts.benchmark_routing
	$(BIN)/python -m scripts.benchmark_merging
	$(BIN)/python -m scripts.benchmark_per_example
	$(BIN)/python -m scripts.benchmark_sweep
	$(BIN)/python -m scripts.benchmark_compile

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing the packages into .venv: a few minutes the first time"
	@$(INSTALL) "."
	touch $@

.venv/ready-test: .venv/ready
	$(INSTALL) ".[test]"
	touch $@

.venv/ready-parity: .venv/ready-test
	$(INSTALL) ".[test,parity,harness]"
	touch $@

# mergekit's pins clash with ours: it and what it pins live in a folder that only its tests look into.
.venv/mergekit: | .venv/ready-parity
	$(BIN)/python -m pip install --quiet --no-deps --target $@ \
		mergekit==0.1.4 pydantic==2.10.6 pydantic-core==2.27.2 immutables==0.21

clean:
	rm -rf .venv out
