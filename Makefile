# What users, contributors and CI run; `make` alone lists it.
# One virtual environment for all of it; `.ci/install` brings it up to date when it has to.

PYTHON ?= python3
VENV ?= .venv
# More words for the program that a target runs: make train ARGS="seed=3"
ARGS ?=
# Test processes. The tests are for two cores; more do not hurt.
JOBS ?= 2
# torch moves only on purpose: vLLM takes exactly one version of it, and both train together.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
INSTALL := @PYTHON="$(PYTHON)" VENV="$(VENV)" .ci/install
ALL_EXTRAS := train vllm data gguf dev

.DEFAULT_GOAL := help
.PHONY: help train train-smollm2 test test-runs test-families test-attacks test-agents test-vllm lint format bench bench-loop \
	bench-spawn bench-proxy bench-constrained bench-engine bench-weights bench-journal soak soak-rollouts chaos docs \
	bench-async gpu constraints clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train:  ## Train the tiny policy on the calculator task (ARGS="seed=3" and the like)
	$(INSTALL) train
	$(BIN)/areal-sub train --config examples/proxy/config.yaml \
		scheduler.type=local rollout.openai.mode=subproc $(ARGS)

train-smollm2:  ## Fetch SmolLM2-135M and run a few GRPO steps on a reasoning task (slow on a CPU)
	$(INSTALL) train data gguf
	$(BIN)/python examples/smollm2/prepare.py
	$(BIN)/areal-sub train --config examples/smollm2/config.yaml $(ARGS)

test:  ## Run the tests, but for the suites below (ARGS="tests/config -k name" for some)
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not runs and not attacks and not agents and not vllm" $(ARGS)

test-runs:  ## Whole runs in trouble (a full disk, no memory, hanging processes ...) or with rarer settings
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m runs tests/e2e $(ARGS)

test-vllm:  ## Run the tests that need a real vLLM, on the CPU, in an environment of its own
	$(INSTALL) $(ALL_EXTRAS)
	python="$$(PYTHON="$(PYTHON)" .ci/install-vllm)" && \
	AREAL_SUB_VLLM_PYTHON="$$python" $(BIN)/pytest -m vllm $(ARGS)

lint:  ## Check format, style, types and the layering of imports
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports

format:  ## Format the code and fix what can be fixed by itself
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test-families:  ## Model families with their real vocabularies (downloads, some 20 MB, cached)
	$(INSTALL) $(ALL_EXTRAS)
	AREAL_SUB_REGISTRIES=1 $(BIN)/python -m pytest -q tests/proxy/families

test-attacks:  ## Attempt every attack of docs/security.md, in each tier, as this user and as nobody
	$(INSTALL) $(ALL_EXTRAS)
	BIN="$(BIN)" tests/attacks/run $(ARGS)

test-agents:  ## Train a step with each real agent of docs/compatibility.md, which is written anew
	$(INSTALL) $(ALL_EXTRAS)
	BIN="$(BIN)" tests/agents/run -n $(JOBS) $(ARGS)

bench-proxy:  ## The proxy beside others: CPU and latency per model call (ARGS="--litellm PYTHON")
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.proxy $(ARGS)

bench-spawn:  ## Compare ways of starting a child: time to its end, and to its first model call
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.spawn $(ARGS)

soak-rollouts:  ## 20,000 rollouts from admission to the ledger: does anything grow or stay?
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.soak_rollouts $(ARGS)

gpu:  ## Losses, learner, engine and a whole run on one GPU (ARGS="--device cpu --num-steps 1" without)
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.gpu $(ARGS)

soak:  ## 10,000 children in sequence, 500 at once, a killed caller: does anything grow or stay?
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.soak $(ARGS)

bench:  ## Compare ways of running agents: wall time and CPU of 256 rollouts
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.rollouts $(ARGS)

bench-loop:  ## What the sandbox costs a whole run, beside the same run inline
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.loop $(ARGS)

bench-journal:  ## What recording a rollout costs, by journal.fsync, and reading it back
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.journal $(ARGS)

bench-async:  ## Asynchronous against synchronous training where rollouts have long tails
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.asynchrony $(ARGS)

bench-constrained:  ## Tokens per second of the embedded engine with and without a grammar
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.constrained $(ARGS)

bench-engine:  ## Tokens per second: embedded engine, vLLM on the CPU, transformers (ARGS="--model FOLDER")
	$(INSTALL) $(ALL_EXTRAS)
	python="$$(PYTHON="$(PYTHON)" .ci/install-vllm)" && \
	AREAL_SUB_VLLM_PYTHON="$$python" $(BIN)/python -m benchmarks.engine $(ARGS)

bench-weights:  ## Seconds that new weights take, embedded and vLLM, against a copy (ARGS="--model FOLDER")
	$(INSTALL) $(ALL_EXTRAS)
	python="$$(PYTHON="$(PYTHON)" .ci/install-vllm)" && \
	AREAL_SUB_VLLM_PYTHON="$$python" $(BIN)/python -m benchmarks.weights $(ARGS)

chaos:  ## Kill the processes of whole runs at random, 100 times: is anything lost, or left behind?
	$(INSTALL) $(ALL_EXTRAS)
	$(BIN)/python -m benchmarks.chaos $(ARGS)

docs:  ## Write docs/configuration.md from the schema
	$(INSTALL) train
	page="$$($(BIN)/python -m areal_sub.config)" && printf '%s\n' "$$page" > docs/configuration.md

constraints:  ## Pin the newest versions that fit pyproject.toml in constraints.txt
	$(INSTALL) dev
	report="$$(mktemp)" && trap 'rm -f "$$report"' EXIT && \
	$(BIN)/pip install --quiet --dry-run --ignore-installed --report "$$report" \
		".[train,vllm,data,gguf,dev]" $(TORCH) && \
	pins="$$($(BIN)/python .ci/constraints.py < "$$report")" && \
	printf '%s\n' "$$pins" > constraints.txt

clean:  ## Remove the virtual environment and all caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
		.import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
