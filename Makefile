# Two commands are enough:  make test   and   make quickstart
# Each sets up its own .venv from requirements.lock the first time, and again when the lock changes.
#
#   PYTHON=python3.12    another interpreter (3.11 or newer)
#   TORCH_INDEX=URL      a package index for torch alone, such as PyTorch's index of CPU-only builds:
#                        make quickstart TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   ARGS=--fast          passed on to `deepspec quickstart`, or to pytest in the tests

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.installed
TORCH := $(shell sed -n 's/^\(torch==.*\)$$/\1/p' requirements.lock)
# Packages are compiled when they are first imported: compiling all of them takes as long as installing them.
# Some environments forbid Python to keep what it compiled; each process would then compile again for ten seconds.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
unexport PYTHONDONTWRITEBYTECODE
# One process per processor; tests/conftest.py gives each one thread, as small tensors are not worth a second one.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: help quickstart test test-servers real docs lint format soak clean
.DEFAULT_GOAL := help

help:
	@echo 'make quickstart   train three drafts, measure them, write a report (ARGS=--fast: two or three minutes)'
	@echo 'make test         lint, types and tests'
	@echo 'make docs         rewrite the generated parts of docs/ (benchmarks, data, serving, targets)'
	@echo 'make soak         the long fault tests (every command killed again and again)'
	@echo 'make test-servers run the drafts in llama-server, which the first run builds (11 minutes), and in vLLM (3.5 GB)'
	@echo 'make real         a real instruct model: train drafts, serve them (two hours; ARGS=--fast: a smoke run)'
	@echo 'make lint         ruff and mypy only        make format   rewrite with ruff'
	@echo 'make clean        remove .venv, caches and build artefacts (runs/ is kept)'

$(STAMP): requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'The interpreter "$(PYTHON)" was not found. Name a Python 3.11 or newer:  make PYTHON=python3.12 …'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'deepspec needs Python 3.11 or newer, and "$(PYTHON)" is'" $$($(PYTHON) --version 2>&1)."; \
	  echo 'Name another one:  make PYTHON=python3.12 …'; exit 1; }
	@echo '[1/4] virtual environment in .venv'
	@$(PYTHON) -m venv .venv || { \
	  echo '"$(PYTHON)" cannot make virtual environments (on Debian and Ubuntu: apt install python3-venv).'; exit 1; }
	@echo '[2/4] $(TORCH), the one large download'
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),--constraint requirements.lock) $(TORCH)
	@echo '[3/4] everything else in requirements.lock'
	@$(PIP) --quiet --requirement requirements.lock
	@echo '[4/4] deepspec itself, and an answer from it'
	@$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@CUDA_VISIBLE_DEVICES= $(BIN)/deepspec generate 'Ada has 12 apples. Ada buys 5 more apples. How many apples does Ada have now?'
	@touch $@

quickstart: $(STAMP)
	@$(BIN)/deepspec quickstart $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(PYTEST) $(ARGS)

docs: $(STAMP)
	DEEPSPEC_WRITE_DOCS=1 $(BIN)/python -m pytest tests/test_families.py tests/test_named.py tests/test_export.py $(ARGS)
	$(BIN)/python benchmarks/table.py --write

soak: $(STAMP)
	$(BIN)/python -m pytest -m soak $(ARGS)

# The engine is kept in $$DEEPSPEC_CACHE (default ~/.cache/deepspec); the table is written to docs/serving.md.
test-servers: $(STAMP)
	@command -v cmake >/dev/null && command -v c++ >/dev/null || { \
	  echo 'Building llama-server needs cmake and a C++ compiler (on Debian and Ubuntu: apt install cmake g++).'; exit 1; }
	$(BIN)/python -m pytest -m servers $(ARGS)
	$(BIN)/python benchmarks/servers.py --write
	@$(BIN)/python benchmarks/vllm_server.py --install || { \
	  echo 'vLLM for CPUs does not install here, so that the drafts are not compared in it.'; exit 0; }; \
	  $(BIN)/python benchmarks/vllm_server.py --write

# Runs until it is done, however often it is stopped; benchmarks/real.py writes docs/real.md from its results.
real: $(STAMP)
	@command -v cmake >/dev/null && command -v c++ >/dev/null || { \
	  echo 'Building llama-server needs cmake and a C++ compiler (on Debian and Ubuntu: apt install cmake g++).'; exit 1; }
	$(BIN)/python benchmarks/real.py $(ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
