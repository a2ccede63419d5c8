# One room for the commands of the README. PYTHON picks the interpreter that the virtual environment is made with.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# `make test` also installs the prebuilt torch-sparse pair where this folder is given.
QGNN_TEST_WHEELS ?=

.PHONY: demo test test-long check sanitize sanitized-tests setup clean
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

# The kernels' own tests on a second build, which stops at a byte outside a buffer and at undefined arithmetic. The
# sanitizer is loaded before Python, with the C++ library whose exceptions it follows; its report goes past pytest.
SANITIZED := build/sanitize
KERNEL_TESTS := $(addprefix tests/parity/test_,kernels_levels.py kernels_limits.py fused_layers.py fused_float.py \
  gradient_kernels.py perceptron_rows.py training_kernels.py matmul_codes.py partition_passes.py) \
  tests/property/test_kernels_properties.py
$(SANITIZED)/.stamp: pyproject.toml $(NATIVE) $(VENV)/.stamp
	CXX="$(CXX)" $(BIN)/pip install --quiet --no-deps --upgrade --target $(SANITIZED) \
	  -C cmake.define.QGNN_SANITIZE=ON -C build-dir=$(SANITIZED)/cmake .
	touch $@

sanitize: setup
	@if [ -f "$$($(CXX) -print-file-name=libasan.so)" ]; then $(MAKE) --no-print-directory sanitized-tests; \
	  else echo "sanitize: SKIPPED, $(CXX) comes without libasan.so; use g++ and install its sanitizer libraries"; fi

sanitized-tests: $(SANITIZED)/.stamp
	build=$$(ls $(SANITIZED)/qgnn_dist/kernels/_kernels*.so) && \
	  libraries=$$(ldd "$$build" | awk '/libasan|libstdc\+\+/ {print $$3}' | tr '\n' ' ') && \
	  LD_PRELOAD="$$libraries" QGNN_KERNELS="$$build" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(BIN)/python -m pytest -q -x --capture=sys $(KERNEL_TESTS)

test: setup check sanitize
	if [ -n "$(QGNN_TEST_WHEELS)" ] && [ -d "$(QGNN_TEST_WHEELS)" ]; then \
	  $(BIN)/pip install --quiet --no-deps --no-index --find-links "$(QGNN_TEST_WHEELS)" torch-sparse torch-scatter || true; fi
	$(BIN)/python -m pytest -m "not long"

# Its results are the page docs/long-tests.md, also where some failed.
LONG := build/long-tests
test-long: setup
	mkdir -p build
	$(BIN)/python -m pytest -m long --collect-only -q > $(LONG).txt
	failed=0; $(BIN)/python -m pytest -m long --junit-xml=$(LONG).xml || failed=$$?; \
	  $(BIN)/python -m tests.long_table $(LONG).xml --collected $(LONG).txt --out docs/long-tests.md && exit $$failed

clean:
	rm -rf $(VENV) build demo-run .pytest_cache .mypy_cache .ruff_cache
