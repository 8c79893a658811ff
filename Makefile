# The two commands: `make demo` and `make test`. Every target sets up its own environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CLANG_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Two jobs on two cores; nvcc and g++ otherwise fight for memory on small machines.
export MAX_JOBS ?= $(shell nproc)

.PHONY: demo test test-gpu-offline bench lint format env build wheel clean help

help:  ## this text
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# Not on pyproject.toml: installing again would mark the tree as not built.
$(INSTALLED): requirements/dev.txt
	@echo "setting up $(VENV) (downloads torch; once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	SEQREC_FAST_BUILD=none $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	@touch $@

env: $(INSTALLED)  ## the environment alone

build: $(INSTALLED)  ## compile the extension in place (only what changed)
	@mkdir -p build
	@echo "compiling what changed (a few minutes the first time; details in build/log)"
	@$(BIN)/python setup.py --quiet build_ext --inplace > build/log 2>&1 || { cat build/log; exit 1; }

demo: build  ## train, compare with stock torch, recommend and explain; on synthetic data
	$(BIN)/python examples/demo.py

test: build  ## every test that needs no GPU
	$(BIN)/python -m pytest tests seqrec_fast --ignore=tests/gpu_offline

test-gpu-offline: build  ## GPU code without a GPU: executed in the emulator and the interpreter, compiled and inspected
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/gpu_offline -m interpreter
	$(BIN)/python -m pytest tests/gpu_offline -m "not interpreter"

bench: build  ## the small table of benchmarks
	$(BIN)/python -m seqrec_fast bench

lint: $(INSTALLED)  ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES)

format: $(INSTALLED)  ## let the formatters rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_SOURCES)

wheel: $(INSTALLED)  ## one abi3 wheel in dist/
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:  ## everything built
	rm -rf build dist *.egg-info seqrec_fast/*.so seqrec_fast/_build_info.py
