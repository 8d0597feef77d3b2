# Everything a person runs. uv comes from the machine or, where it is missing, into its own folder
# under the user's cache; the environment is what uv.lock says and is reused by the next command.

UV_VERSION := 0.13.9
CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stagetune
PYTHON ?= python3
UV := $(or $(shell command -v uv 2>/dev/null),$(CACHE)/uv-$(UV_VERSION)/bin/uv)
RUN := $(UV) run --frozen --no-sync

.PHONY: help setup quickstart test cluster-up cluster-down cluster-demo lint crds manifests images bench-batching bench-compile bench-flops bench-handover bench-memory bench-operator bench-quality bench-staging clean

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

cluster-up: setup  ## Start a Kubernetes control plane without root; with NODE=1, a node, as root
	PYTHONPATH=tests/support $(RUN) python -m local_cluster up $(if $(NODE),--node)

cluster-demo: setup  ## Run the quick start on a real node, as root, and compare it with the local run
	PYTHONPATH=tests/support $(RUN) python -m cluster_demo

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

manifests: setup  ## Write deploy/stagetune.yaml and the chart's generated parts
	PYTHONPATH=tests/support $(RUN) python deploy/render.py

# What pip and uv take packages from on this machine goes to the build as a secret and stays out of
# the images. BUILD_FLAGS goes to the builder as it is.
images: IMAGE_PREFIX ?= stagetune
images: TAG ?= latest
images: CA_BUNDLE ?= $(SSL_CERT_FILE)
images: CA_SECRET = id=ca-bundle,src=$(CA_BUNDLE)
images:  ## Build both images; IMAGE_PREFIX, TAG, BASE_IMAGE, CA_BUNDLE and BUILD_FLAGS
	@set -eu; umask 077; settings=$$(mktemp); trap 'rm -f "$$settings"' EXIT; \
	if timeout 30 docker info > /dev/null 2>&1; then builder="docker build"; \
	elif command -v buildah > /dev/null; then builder="buildah build --layers"; \
	elif command -v podman > /dev/null; then builder="podman build"; \
	else echo "docker, buildah or podman builds the images; install one"; exit 1; fi; \
	PYTHONPATH=tests/support $(PYTHON) -m local_cluster.images > "$$settings"; \
	for kind in operator trainer; do \
	  $$builder $(if $(BASE_IMAGE),--build-arg BASE_IMAGE="$(BASE_IMAGE)") \
	    --label "org.opencontainers.image.revision=$$(git rev-parse HEAD 2> /dev/null)" \
	    --secret id=build-env,src="$$settings" \
	    $(if $(CA_BUNDLE),--secret "$(CA_SECRET)") $(BUILD_FLAGS) \
	    --file Dockerfile.$$kind --tag "$(IMAGE_PREFIX)/$$kind:$(TAG)" .; \
	done

# ARGS: --rounds 1
bench-batching: setup  ## Measure batches of like length, packing and batches made ahead
	$(RUN) python benchmarks/batching.py $(ARGS)

bench-compile: setup  ## Measure what torch.compile gains in a stage's steps, and what it costs
	$(RUN) python benchmarks/compiling.py

bench-flops: setup  ## Count the FLOPs of a stage's step relative to full fine-tuning
	$(RUN) python benchmarks/stage_flops.py

bench-handover: setup  ## Time the hand-overs from stage to stage on a real node, as root
	PYTHONPATH=tests/support $(RUN) python benchmarks/handover.py $(ARGS)

bench-memory: setup  ## Compare each stage's peak memory with the plan's on the small real model
	$(RUN) python benchmarks/memory.py $(ARGS)

bench-operator: setup  ## Time the operator alone with a thousand runs on a control plane
	PYTHONPATH=tests/support $(RUN) python benchmarks/operator_scale.py

# ARGS: --arms lora,open-top --seeds 1 --minutes 60. Hours for everything; what is measured stays.
bench-quality: setup  ## Compare ways of training on the small real model
	$(RUN) python benchmarks/quality.py $(ARGS)

# ARGS: --rounds 1 --arms full,top-cached --resume, or --device cuda. ms-swift gets an environment of
# its own below the user's cache.
bench-staging: setup  ## Measure stages beside full fine-tuning, LoRA and ms-swift
	$(RUN) python benchmarks/staging.py $(ARGS)

clean:  ## Remove the environment and the runs
	rm -rf .venv runs examples/quickstart/inputs
