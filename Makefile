# One room for the commands of the README. PYTHON picks the interpreter that the virtual environment is made with.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# `make test` also installs the prebuilt torch-sparse pair where this folder is given.
QGNN_TEST_WHEELS ?=

.PHONY: demo test test-processes test-beside test-one-process test-long recovery-table check sanitize sanitized-tests setup clean
.DEFAULT_GOAL := demo

# The stamp is older than pyproject.toml or a C++ source after a change, so that the next command builds again.
NATIVE := CMakeLists.txt $(wildcard qgnn_dist/kernels/csrc/*)
$(VENV)/.stamp: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch, Ray and what the tests need into $(VENV), and compiling the kernels: some minutes, 2 GB"
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

# Two lanes: tests of many processes, which wait much and look at the clock, and beside them, at a lower priority, the
# checks and all tests that do not. The second lane's words come at its end. tests/unit/test_lanes.py holds that no test
# is in none.
PROCESSES := tests/dist tests/fault
CALM := $(addprefix tests/,dist/test_bench_inference.py dist/test_bench_ranks.py dist/test_bench_train.py dist/test_cli.py \
  dist/test_cli_inspect.py dist/test_real_graphs.py dist/test_run.py fault/test_comm_frames.py fault/test_disks.py \
  fault/test_fuzz.py fault/test_hostile_files.py)
BESIDE := tests/unit tests/parity tests/golden tests/property $(CALM)
BESIDE_LOG := build/beside.log
test: setup
	if [ -n "$(QGNN_TEST_WHEELS)" ] && [ -d "$(QGNN_TEST_WHEELS)" ]; then \
	  $(BIN)/pip install --quiet --no-deps --no-index --find-links "$(QGNN_TEST_WHEELS)" torch-sparse torch-scatter || true; fi
	$(MAKE) --no-print-directory --jobs=2 --keep-going test-processes test-beside

test-processes:
	$(BIN)/python -m pytest -m "not long" $(PROCESSES) $(addprefix --ignore=,$(CALM))

test-beside:
	mkdir -p build
	failed=0; nice -n 10 $(MAKE) --no-print-directory check sanitize test-one-process > $(BESIDE_LOG) 2>&1 || failed=$$?; \
	  cat $(BESIDE_LOG); exit $$failed

test-one-process:
	$(BIN)/python -m pytest -q -m "not long" -p no:cacheprovider $(BESIDE)

# Its results are the page docs/long-tests.md, also where some failed. Each is kept once it is there: a stopped run goes
# on with what has not passed with this code; remove $(LONG).jsonl to start over.
LONG := build/long-tests
test-long: setup
	mkdir -p build
	$(BIN)/python -m pytest -m long --collect-only -q > $(LONG).txt
	failed=0; $(BIN)/python -m pytest -m long -p tests.results --keep-results=$(LONG).jsonl || failed=$$?; \
	  $(BIN)/python -m tests.long_table $(LONG).jsonl --collected $(LONG).txt --out docs/long-tests.md && exit $$failed

# Times of the tables of lost workers and hosts in docs/recovery.md and README.md; on a quiet machine.
recovery-table: setup
	mkdir -p build
	rm -f build/recovery.jsonl
	$(BIN)/python -m pytest tests/fault/test_recovery.py tests/fault/test_cut_network.py -m "not long" \
	  -p tests.results --keep-results=build/recovery.jsonl
	$(BIN)/python -m tests.recovery_table build/recovery.jsonl

clean:
	rm -rf $(VENV) build demo-run .pytest_cache .mypy_cache .ruff_cache
