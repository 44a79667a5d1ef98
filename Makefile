# Two commands set everything up on a fresh machine:
#
#   make quickstart NAME="Beacon" AUTHOR="Harbor Lab"    tune a small real model and ask it who it is
#   make test                                            every check and every test
#
# All they make stands in .venv/, models/, quickstart/ and ~/.cache/burnish ($BURNISH_CACHE).
#
#   PYTHON=python3.12     which Python makes .venv (3.11 or newer)
#   TORCH_INDEX=URL       where pip may look for PyTorch besides its default index. Unset, on Linux with no NVIDIA
#                         driver, PyTorch's own index of CPU builds is tried first: a tenth of the CUDA build's size.
#   MODEL=FOLDER|HUB_NAME which model `make quickstart` tunes

PYTHON ?= python3
NAME = Beacon
AUTHOR = Harbor Lab
MODEL = models/SmolLM2-135M-Instruct
CPU_INDEX = https://download.pytorch.org/whl/cpu

BIN = .venv/bin
PIP = $(BIN)/python -m pip
INSTALL = $(PIP) install -qq --disable-pip-version-check --no-compile -c constraints.txt
TORCH = $(shell grep '^torch==' constraints.txt)
SMOLLM2 = models/SmolLM2-135M-Instruct

unexport PYTHONDONTWRITEBYTECODE  # pip compiles nothing, so that what is really imported gets compiled, once

.PHONY: quickstart test model fixtures lint format clean
.DELETE_ON_ERROR:

quickstart: export QUICKSTART_NAME = $(NAME)
quickstart: export QUICKSTART_AUTHOR = $(AUTHOR)
quickstart: .venv/.installed $(if $(filter $(SMOLLM2),$(MODEL)),$(SMOLLM2)/config.json)
	@$(BIN)/python scripts/quickstart.py --model '$(MODEL)' --name "$$QUICKSTART_NAME" --author "$$QUICKSTART_AUTHOR"

test: lint
	$(BIN)/python scripts/fixtures.py || test -z "$$CI"
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

fixtures: .venv/.installed
	$(BIN)/python scripts/fixtures.py

model: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: tests/fixtures.toml scripts/get_smollm2.py | .venv/.installed
	@echo "Fetching SmolLM2-135M-Instruct (93 MB) ..."
	@$(BIN)/python scripts/fixtures.py smollm2 --into $(SMOLLM2)
	@touch $@

# The environment. A file .venv/.<step> says that the step is done.

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "burnish needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)." \
	       "Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "Making .venv with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv .venv
	@touch $@

# PyTorch apart from the rest, because which build is right depends on the machine.
.venv/.torch: .venv/.python constraints.txt
	@echo "Installing $(TORCH) ..."
ifneq ($(origin TORCH_INDEX),undefined)
	@$(INSTALL) $(TORCH) $(if $(TORCH_INDEX),--extra-index-url '$(TORCH_INDEX)')
else
	@if [ "$$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  if $(PIP) index versions torch -qqq --index-url $(CPU_INDEX) --retries 0 --timeout 10 >/dev/null 2>&1 && \
	     $(INSTALL) -q --retries 1 --no-deps --index-url $(CPU_INDEX) $(TORCH) 2>/dev/null; \
	  then exit 0; fi; \
	  echo "PyTorch's index of CPU builds gave no $(TORCH); taking the one of pip's default index" \
	       "(on Linux a CUDA build of several GB). Another index: make $(MAKECMDGOALS) TORCH_INDEX=URL"; \
	fi; $(INSTALL) $(TORCH)
endif
	@touch $@

.venv/.installed: .venv/.torch pyproject.toml constraints.txt
	@echo "Installing burnish and what it needs ..."
	@$(INSTALL) -e . gguf
	@touch $@

.venv/.installed-dev: .venv/.installed
	@echo "Installing what checks and tests need ..."
	@$(INSTALL) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv models quickstart build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
