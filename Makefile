# `make demo` and `make test` are all that a newcomer needs; both make .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip asks nobody and prints its errors only.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint conformance clean

demo: $(VENV)/demo-installed
	$(BIN)/vla-adapter demo --output outputs/demo.png

test: $(VENV)/test-installed lint
	$(BIN)/python -m pytest

lint: $(VENV)/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# transformers' own common tests for models, configurations and processors, against ours.
conformance: $(VENV)/test-installed
	$(BIN)/python -m pytest tests/conformance

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[plot,fast-jpeg]'
	touch $@

$(VENV)/test-installed: setup.cfg constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build outputs .cache
