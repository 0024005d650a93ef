# The vocabulary of this repository. Every target sets up what it lacks.

PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
READY := .venv/.ready
VLLM_ENV ?= build/vllm-env
SGLANG_ENV ?= build/sglang-env
ARGS ?=

# Setting up compiles nothing ahead, so that what is imported must be kept compiled, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup serve test test-faults test-browser test-vllm test-sglang test-quality test-gpu train-tiny bench-gpu bench-check check fix proto docs clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-13s %s\n", $$1, $$2}'
	@echo 'Options: PYTHON=python3.12 (interpreter of a new .venv), ARGS="..." (passed on by serve and test)'

setup: $(READY) ## Make .venv with everything the other targets need

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed; none was found. Name one: make setup PYTHON=/path/to/python3' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[test,check]'
	@touch $@

serve: $(READY) ## Serve the embedded tiny checkpoint on 127.0.0.1:8000; ARGS="DIR --port 9000" for another
	$(BIN)/helios-serve serve $(ARGS)

test: $(READY) ## Run the tests but those of the other test targets, two processes with one thread each
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not ray and not browser and not server and not quality" $(ARGS)

test-faults: $(READY) ## Kill, freeze and crash the workers of a real Ray cluster; attack, starve and drain a started server
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "ray or server" $(ARGS)

test-browser: $(READY) ## Drive the page in Chromium; skips, naming what is missing, without it
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser $(ARGS)

test-vllm: ## Run the tests inside vLLM-Omni, in an environment of their own that is made once (3.6 GB)
	PYTHON=$(PYTHON) tests/runtimes/vllm_env.sh $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pytest -o filterwarnings=default tests/runtimes/in_vllm $(ARGS)

test-sglang: ## Run the tests inside SGLang-Diffusion, in an environment of their own that is made once (3.2 GB)
	PYTHON=$(PYTHON) tests/runtimes/sglang_env.sh $(SGLANG_ENV)
	$(SGLANG_ENV)/bin/python -m pytest -o filterwarnings=default tests/runtimes/in_sglang $(ARGS)

test-quality: $(READY) ## Score the shipped checkpoint on 100 held-back prompts of each task, and 20 chunks
	OMP_NUM_THREADS=1 $(BIN)/pytest -m quality -s tests/quality $(ARGS)

test-gpu: $(READY) ## Compiled kernels against their definitions on a CUDA device; skips, naming what is missing, without it
	TRITON_INTERPRET=0 $(BIN)/pytest -m gpu tests/gpu $(ARGS)

bench-gpu: $(READY) ## Build, check and time everything on one GPU; ARGS="--rehearse" for a tiny run on the CPU
	$(BIN)/python -m benchmarks.gpu $(ARGS)

bench-check: $(READY) ## Compare counts, imports and CPU overheads with benchmarks/baseline.json; ARGS=--update to rewrite it
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.check $(ARGS)

train-tiny: $(READY) ## Train the small checkpoint into build/tiny; ARGS="--preset gpu --device cuda --seconds 400" on a GPU
	$(BIN)/python -m tools.tiny_checkpoint.build $(ARGS)

check: $(READY) ## Format, lint, types and import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY) ## Format and repair what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(READY) ## Generate the gRPC stubs from the proto
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \
		helios_serve/api/proto/helios/video/v1/video_generation.proto

docs: $(READY) ## Generate what comes from the code: the table of settings, the dashboard
	$(BIN)/python -m helios_serve.settings_table docs/configuration.md
	$(BIN)/python deploy/grafana/build.py

clean: ## Remove .venv, caches and build outputs
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
