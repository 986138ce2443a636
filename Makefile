# One word per intention, the same for a person and for CI. `make` alone lists them.
#
#   PYTHON   any Python 3.10 to 3.13          make test PYTHON=python3.12 VENV=.venv312
#   TORCH    what pip is asked for as torch   make test TORCH="torch==2.7.1"
#   VENV     where everything is installed    (demo, test and the rest share it)
#   JOBS     how many test processes          make test JOBS=8
#
# Needed beforehand: Python, a C++17 compiler, make. CMake and Ninja come from pip.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3.10 python3,$(shell command -v $(p))))
TORCH  ?= torch==2.13.0
VENV   ?= .venv
JOBS   ?= 2

BIN    := $(VENV)/bin
PY     := $(BIN)/python
DEPS   := $(VENV)/.dependencies
STAMP  := $(VENV)/.installed
NATIVE := $(wildcard CMakeLists.txt csrc/*) $(wildcard csrc/*/*)
PYTEST := $(PY) -m pytest -q

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-all bench build lint fix wheel sanitize clean

help:  ## this list
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: $(STAMP)  ## train, compress, pack, run and report a small network: about a minute, no download of models or data
	$(BIN)/lowbit demo

test: $(STAMP)  ## the fast tests, about a minute
	$(PYTEST) -n $(JOBS)

test-slow: $(STAMP)  ## the slow tests, one after the other, and the kernel tests once more on the scalar rows
	LOWBIT_ISA=scalar $(PYTEST) -n $(JOBS) tests/kernels tests/runtime
	$(PYTEST) -m slow

test-all: test test-slow  ## every test there is

bench: $(STAMP)  ## time the kernels on this machine, and say what moved since the last `make bench` (build/bench.json)
	@mkdir -p build && { test -f build/bench.json || echo "no earlier figures: these become the baseline"; }
	$(BIN)/lowbit bench kernels --threads 1 --threads 2 --save build/bench.new.json `test -f build/bench.json && echo --against build/bench.json`
	@mv build/bench.new.json build/bench.json

build: $(STAMP)  ## install, and compile the kernels again where they changed

lint: $(STAMP)  ## check only: format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(STAMP)  ## format, and repair what can be repaired
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel:  ## build a wheel, install it into a bare environment of its own and run it there
	rm -rf build/wheel-venv dist/*.whl
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/python -m pip wheel -q --no-deps -w dist --config-settings=build-dir=build/wheel .
	build/wheel-venv/bin/python -m pip install -q "numpy>=1.26" $(TORCH)
	build/wheel-venv/bin/python -m pip install -q dist/lowbit-*.whl
	cd build/wheel-venv && bin/lowbit doctor && bin/python ../../.ci/check_wheel.py && bin/lowbit demo --quick
	rm -rf build/wheel-venv

# A second environment that borrows the packages of the first and holds a kernel build of its own.
# The preloaded libraries: a Python that was not built with the sanitizers must load their runtime first.
sanitize: $(STAMP)  ## the kernel tests under AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
	rm -rf build/sanitize-venv build/sanitize-dist
	$(PY) -m venv --without-pip build/sanitize-venv
	$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > `build/sanitize-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/borrowed.pth
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w build/sanitize-dist --config-settings=build-dir=build/sanitize --config-settings=cmake.define.LOWBIT_SANITIZE=ON .
	$(PY) -m pip --python build/sanitize-venv/bin/python install -q --no-deps build/sanitize-dist/*.whl
	build/sanitize/check_rows
	LD_PRELOAD="`c++ -print-file-name=libasan.so` `c++ -print-file-name=libstdc++.so`" ASAN_OPTIONS=detect_leaks=0 \
	  build/sanitize-venv/bin/python -m pytest -q -p no:cacheprovider --capture=sys tests/kernels

clean:  ## remove environments, builds and caches
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f src/lowbit/_kernels*
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first: a plain requirement could otherwise bring a build with several GB of GPU libraries.
# The build tools live in the environment, so that a change in one kernel compiles that kernel only.
$(DEPS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info[:2] <= (3, 13) else "lowbit needs Python 3.10 to 3.13: say which with make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "numpy>=1.26" $(TORCH)
	$(PY) -m pip install -q "scikit-build-core>=0.11" "nanobind>=2.4" "cmake>=3.20" ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	@touch $@

$(STAMP): $(DEPS) $(NATIVE)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@
