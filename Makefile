# Everything a person runs. uv comes from the machine or, where it is missing, into its own folder
# under the user's cache; the environment is what uv.lock says and is reused by the next command.

UV_VERSION := 0.13.9
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stagetune
PYTHON ?= python3
UV := $(or $(shell command -v uv 2>/dev/null),$(CACHE)/uv-$(UV_VERSION)/bin/uv)
RUN := $(UV) run --frozen --no-sync

.PHONY: help setup quickstart test cluster-up cluster-down lint crds bench-flops clean

help:  ## Show these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/ \t/' | expand -t 16

$(CACHE)/uv-$(UV_VERSION)/bin/uv:
	@mkdir -p $(CACHE)
	rm -rf $(CACHE)/uv-$(UV_VERSION).tmp
	$(PYTHON) -m venv $(CACHE)/uv-$(UV_VERSION).tmp \
	  && $(CACHE)/uv-$(UV_VERSION).tmp/bin/pip install --quiet uv==$(UV_VERSION) \
	  || $(PYTHON) -m pip install --quiet --target $(CACHE)/uv-$(UV_VERSION).tmp uv==$(UV_VERSION) \
	  || { echo "uv is missing and could not be installed: install uv, or python3-venv"; exit 1; }
	rm -rf $(CACHE)/uv-$(UV_VERSION) && mv $(CACHE)/uv-$(UV_VERSION).tmp $(CACHE)/uv-$(UV_VERSION)

setup: $(UV)  ## Make .venv from uv.lock
	$(UV) sync --frozen --quiet --all-extras

quickstart: setup  ## Tune a real small model in stages and compare it with the base
	$(RUN) python examples/quickstart/build_inputs.py
	$(RUN) stagetune run examples/quickstart/finance-qa.yaml

test: setup  ## Run every test tier that this machine can
	$(RUN) python -m pytest

cluster-up: setup  ## Start a Kubernetes control plane without root; says how to use it
	PYTHONPATH=tests/support $(RUN) python -m local_cluster up

cluster-down: setup  ## End it
	PYTHONPATH=tests/support $(RUN) python -m local_cluster down

lint: setup  ## Formatting, lint, types, layers, generated files
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) lint-imports --no-cache
	$(RUN) python -m stagetune_api.schema --check

crds: setup  ## Write crds/*.yaml from the models
	$(RUN) python -m stagetune_api.schema

bench-flops: setup  ## Count the FLOPs of a stage's step relative to full fine-tuning
	$(RUN) python benchmarks/stage_flops.py

clean:  ## Remove the environment and the runs
	rm -rf .venv runs examples/quickstart/inputs
