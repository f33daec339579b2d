# make setup, make demo, make test; the others take longer and are not in CI.
PYTHON ?= python3
# Pinned here, since the package itself takes every torch from 2.11 on. Its version is the one that
# the numbers in bench/results come from.
TORCH ?= torch==2.13.0
BIN = .venv/bin
SOURCES = CMakeLists.txt $(shell find csrc -type f)
PYTHON_FILES = vlmops python_tests bench csrc

.PHONY: setup demo test lint families tables check-tables bench gpu gpu-static triton-static mutants \
  clean FORCE suite-lint suite-nvcc suite-tools suite-contract suite-emulator suite-triton suite-hf

setup: .venv/built

.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" scikit-build-core cmake ninja
	touch $@

# An editable install knows its modules by name: it is renewed when one comes or goes.
.venv/modules: .venv/installed FORCE
	@find vlmops -name '*.py' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

# Python files are used where they are, only the library is built.
.venv/built: .venv/modules $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev,demo,cuda]"
	touch $@

demo: setup
	OMP_PROC_BIND=true OMP_PLACES=cores $(BIN)/vlmops demo

# Suite and seconds that it may take on two slow cores; .ci/suite says what it took. Most of them keep
# one core busy, so two run at a time, the longest first behind lint; those that look at the clock
# have the machine for themselves.
LOOK_AT_THE_CLOCK = $(addprefix python_tests/,test_bench.py test_compare.py test_demo.py)

test: setup
	$(MAKE) --no-print-directory -j2 --output-sync=target suite-lint suite-triton suite-hf suite-nvcc \
	  suite-contract suite-emulator suite-tools
	.ci/suite clock 400 $(BIN)/python -m pytest -q $(LOOK_AT_THE_CLOCK)

suite-lint:
	.ci/suite lint 240 $(MAKE) --no-print-directory lint

suite-nvcc:
	.ci/suite nvcc 300 $(BIN)/python bench/gpu_static.py --arch 90

suite-tools:
	.ci/suite tools 600 $(BIN)/python -m pytest -q python_tests --ignore=python_tests/ops \
	  --ignore=python_tests/hf --ignore=python_tests/emulator \
	  $(addprefix --ignore=,python_tests/test_contract.py $(LOOK_AT_THE_CLOCK))

suite-contract:
	OMP_NUM_THREADS=1 .ci/suite contract 1200 $(BIN)/python -m pytest -q python_tests/test_contract.py \
	  python_tests/ops -k "not triton and not emulator"

# Compiles the emulator first: a minute of processor time.
suite-emulator:
	.ci/suite emulator 900 $(BIN)/python -m pytest -q python_tests/emulator \
	  python_tests/test_contract.py python_tests/ops -k emulator

# The interpreter takes a hundredth of a second a program.
suite-triton:
	OMP_NUM_THREADS=1 .ci/suite triton 900 $(BIN)/python -m pytest -q python_tests/test_contract.py \
	  python_tests/ops -k triton

# One thread: the models are tiny, a second one only waits.
suite-hf:
	OMP_NUM_THREADS=1 .ci/suite hf 900 $(BIN)/python -m pytest -q python_tests/hf

# Patching with the oldest transformers that vlmops supports and with the newest, each in an
# environment of its own over .venv.
families: .venv-oldest/built .venv-newest/built
	OMP_NUM_THREADS=1 .ci/suite oldest 600 .venv-oldest/bin/python -m pytest -q python_tests/hf
	OMP_NUM_THREADS=1 .ci/suite newest 600 .venv-newest/bin/python -m pytest -q python_tests/hf

.venv-oldest/built: TRANSFORMERS = transformers==5.17.0
.venv-newest/built: TRANSFORMERS = transformers

.venv-%/built: setup FORCE
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % \
	  sysconfig.get_path('purelib'))" > $$(echo $(@D)/lib/python*/site-packages)/base.pth
	$(@D)/bin/pip install --quiet --disable-pip-version-check --upgrade "$(TRANSFORMERS)"
	touch $@

lint: setup
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.h' -o -name '*.cpp' -o -name '*.c' \
	  -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/mypy

tables: setup
	$(BIN)/python bench/tables.py

check-tables: setup
	$(BIN)/python bench/tables.py --check

bench: setup
	$(BIN)/vlmops bench mrope

# Registers, spills, 128-bit accesses of every CUDA kernel on every architecture, against
# csrc/gpu_budget.json, then of Triton's. No GPU needed.
gpu-static: setup
	$(BIN)/python bench/gpu_static.py

# Everything that only a GPU can tell: OUT=folder for results, PYTHON=one with a torch for CUDA. Uses
# no .venv and no network.
gpu:
	PYTHON=$(PYTHON) bench/gpu_check.sh $(or $(OUT),build/gpu)

triton-static: setup
	OMP_NUM_THREADS=1 $(BIN)/python python_tests/triton_aot.py

mutants: setup
	$(BIN)/python python_tests/mutate.py
	$(BIN)/python python_tests/emulator/mutate.py

clean:
	rm -rf .venv .venv-oldest .venv-newest build
