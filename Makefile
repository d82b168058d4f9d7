# Every command of the project. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ROOMS := ops layers models export pipelines
NATIVE := $(shell find ops -name '*.cc' -o -name '*.h')
FUZZED := csv entries parquet tfrecord json_rows recipe manifest embedding_version support_log
LIBRARY := ops/_qianmo_ops.so
READY := $(STAMP) $(LIBRARY)
TENSORFLOW := $(shell sed -n 's/^ *"\(tensorflow[<>=][^"]*\)".*/\1/p' pyproject.toml)

export TF_CPP_MIN_LOG_LEVEL ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv native demo test slow sanitize fuzz lint format bench wheel clean

help:  ## list the commands
	@sed -n 's/^\([a-z]*\):[^#]*## */\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	  printf '  make %-8s %s\n' "$$name" "$$text"; done

venv: $(READY)  ## install everything into .venv (again only when the requirements change)

# The ops compile against the TensorFlow that will load them, hence no isolated build.
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null || { \
	  echo 'TensorFlow 2.21 needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is none. Name one: make venv PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'Python has no venv module. On Debian or Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@command -v g++ >/dev/null || { \
	  echo 'A C++17 compiler is needed as g++. On Debian or Ubuntu: apt-get install g++' >&2; exit 1; }
	[ -x $(BIN)/python ] || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'setuptools>=77' '$(TENSORFLOW)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

native: $(LIBRARY)  ## compile the custom ops (again only when their sources change)

$(LIBRARY): setup.py $(NATIVE) | $(STAMP)
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: $(READY)  ## train, export, serve and query on the shipped sample of real data
	$(BIN)/python -m qianmo.pipelines.demo

test: lint  ## lint, check the types, run the tests and the examples in the docstrings
	$(BIN)/python -m pytest -q -n 2 -m 'not slow' --doctest-modules --pyargs \
	  --ignore=tests/ops/test_cores.py --ignore=tests/fuzz/test_native_harnesses.py \
	  tests/ $(ROOMS:%=qianmo.%)

slow: $(READY)  ## run the tests that take minutes, such as ten days of a daily routine
	$(BIN)/python -m pytest -q -m slow tests/

sanitize: $(STAMP)  ## test the C++ cores for memory, arithmetic and races
	$(BIN)/python -m pytest -q -n 2 tests/ops/test_cores.py tests/fuzz/test_native_harnesses.py

fuzz: $(READY)  ## fuzz the readers of files, with coverage: make fuzz TARGET=csv SECONDS=60
	@command -v clang++ >/dev/null || { \
	  echo 'libFuzzer is needed. On Debian or Ubuntu: apt-get install clang libclang-rt-dev' >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[fuzz]'
	set -e; for target in $(or $(TARGET),$(FUZZED)); do \
	  PYTHONPATH=tests $(BIN)/python -m fuzz.run $$target --seconds=$(or $(SECONDS),300); done

lint: $(READY)  ## check the style and the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE) $(wildcard tests/fuzz/*.cc tests/fuzz/*.h)

format: $(STAMP)  ## rewrite the files in the house style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE) $(wildcard tests/fuzz/*.cc tests/fuzz/*.h)

bench: $(READY)  ## measure: make bench NAME=ctr; without NAME, list what can be measured
	$(if $(NAME),$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[peers]')
	$(BIN)/python benchmarks/run.py $(or $(NAME),--help)

wheel: $(STAMP)  ## build dist/qianmo-*.whl
	rm -f dist/*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps -w dist .

clean:  ## remove what the other commands made, .venv included
	rm -rf .venv .dev build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache $(LIBRARY)
	find . -name __pycache__ -prune -exec rm -rf {} +
