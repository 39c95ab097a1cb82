# make demo: install into .venv and run the demo.   make test: the same, then lint, types and tests.
# Nothing outside this folder is touched. A second run starts in seconds.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo test clean

demo: $(VENV)/.runtime
	@$(BIN)/python -m llama_sessions demo

test: $(VENV)/.tools
	@echo "== lint (ruff)"
	@$(BIN)/ruff check src tests examples benchmarks tools
	@$(BIN)/ruff format --check src tests examples benchmarks tools
	@echo "== types (mypy --strict)"
	@$(BIN)/mypy
	@echo "== tests"
	@$(BIN)/python -m pytest

# llama.cpp is compiled by pip while llama-cpp-python installs: say so before the long silence.
$(VENV)/.runtime: pyproject.toml
	@command -v $(PYTHON) >/dev/null || \
	  { echo "There is no $(PYTHON); llama-sessions needs Python 3.10 or newer: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "llama-sessions needs Python 3.10 or newer; this is $$($(PYTHON) --version). Try: make PYTHON=python3.11"; exit 1; }
	@if ! $(BIN)/python -c 'import llama_cpp' 2>/dev/null; then \
	  command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	    { echo "llama.cpp has to be compiled and no C++ compiler was found; install one: apt-get install g++ (macOS: xcode-select --install)"; exit 1; }; \
	  echo "Installing. llama.cpp will be compiled now, once: about 7 minutes on two cores, less on more."; \
	fi
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python3 cannot make a virtual environment; install it: apt-get install python3-venv"; exit 1; }
	@$(PIP) install -e .
	@touch $@

$(VENV)/.tools: $(VENV)/.runtime
	@echo "Installing the test tools."
	@$(PIP) install -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis tests/models/.cache
