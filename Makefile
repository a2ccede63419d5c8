# One room for the commands of the README. PYTHON picks the interpreter that the virtual environment is made with.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# `make test` also installs the prebuilt torch-sparse pair where this folder is given.
QGNN_TEST_WHEELS ?=

.PHONY: demo test test-long check setup clean
.DEFAULT_GOAL := demo

# The stamp is older than pyproject.toml or a C++ source after a change, so that the next command builds again.
NATIVE := CMakeLists.txt $(wildcard qgnn_dist/kernels/csrc/*)
$(VENV)/.stamp: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=23"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

setup: $(VENV)/.stamp

demo: setup
	$(BIN)/python jobs/demo.py

check: setup
	$(BIN)/ruff check qgnn_dist tests jobs
	$(BIN)/mypy

test: setup check
	if [ -n "$(QGNN_TEST_WHEELS)" ] && [ -d "$(QGNN_TEST_WHEELS)" ]; then \
	  $(BIN)/pip install --quiet --no-deps --no-index --find-links "$(QGNN_TEST_WHEELS)" torch-sparse torch-scatter || true; fi
	$(BIN)/python -m pytest -m "not long"

test-long: setup
	$(BIN)/python -m pytest -m long

clean:
	rm -rf $(VENV) build demo-run .pytest_cache .mypy_cache .ruff_cache
