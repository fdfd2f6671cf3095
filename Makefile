# Everything runs from .venv, which `make venv` builds once and rebuilds when
# pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
TEST_PROCESSES ?= 3
AZURITE_VERSION := 3.37.0
AZURITE := .venv/azurite/node_modules/.bin/azurite-blob
AXE_VERSION := 4.14.1
AXE := .venv/axe/node_modules/axe-core/axe.min.js

.DEFAULT_GOAL := help
.PHONY: help venv azurite axe demo test test-slow test-s3 test-cluster test-chaos test-gpu bench bench-more docs lint format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## create .venv and install the package with its development tools

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv .venv; }
	@echo "installing imgcls[dev,demo] into .venv (the first time takes minutes)"
	@# compat: a path entry, which a folder named imgcls in the working directory does not shadow.
	@# Python compiles the modules that are imported; of all packages that takes more than a minute.
	@# Where it may not write what it compiles, pip does: else each start takes ten seconds longer.
	@$(BIN)/pip install --quiet $(if $(PYTHONDONTWRITEBYTECODE),--compile,--no-compile) \
		--disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[dev,demo]'
	@touch $@

azurite: $(AZURITE)  ## install Azurite by npm: the server that the tests of Azure use

$(AZURITE):
	npm install --prefix .venv/azurite --ignore-scripts --no-audit --no-fund --loglevel error \
		azurite@$(AZURITE_VERSION)

axe: $(AXE)  ## install axe-core by npm: it checks the accessibility of pages in the tests

$(AXE):
	npm install --prefix .venv/axe --ignore-scripts --no-audit --no-fund --loglevel error \
		axe-core@$(AXE_VERSION)

demo: venv  ## train, label and measure on a small data set, on this machine
	$(BIN)/imgcls demo

test: lint  ## all checks: lint, types, layers, tests
	@# compiled once, not in every process of the tests
	PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test-chaos: venv  ## the long tests: killed workers, killed drivers, fuzzed files
	$(BIN)/pytest -m chaos -s --timeout 3600

test-slow: venv  ## what takes too long for every change
	$(BIN)/pytest -m slow --timeout 1200

test-cluster: venv  ## machines that are lost, come and are cut off, for minutes
	$(BIN)/pytest -m cluster -s --timeout 1800

test-s3: venv  ## the tests on an object store: moto's, or the one that IMGCLS_TEST_S3_ENDPOINT names
	$(BIN)/pytest -m "not chaos" -k "s3 or test_registry or test_listing" --timeout 1200

bench: venv  ## measure this machine's limits, labelling beside other tools, training, evaluation
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		--config-settings editable_mode=compat -e '.[bench]'
	@# apart: Daft requires older packages than the rest
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .venv/daft \
		-r benchmarks/requirements-daft.txt
	$(BIN)/python -m benchmarks.labeling
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.evaluation

bench-more: venv  ## other models and kinds of images, agreement, start-up, growth: an hour and a half
	$(BIN)/python -m benchmarks.labeling --peers --models resnet50 squeezenet1_1 mobilenet_v3_small vit_b_16
	$(BIN)/python -m benchmarks.labeling --peers --images 12mp small png
	$(BIN)/python -m benchmarks.agreement
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.sources speed
	$(BIN)/python -m benchmarks.sources memory --rows 28000
	$(BIN)/python -m benchmarks.scale work
	$(BIN)/python -m benchmarks.scale plan --rows 10000 100000 1000000 10000000
	$(BIN)/python -m benchmarks.scale resume
	$(BIN)/python -m benchmarks.scale nodes
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.duplicates
	$(BIN)/python -m benchmarks.engines

test-gpu: venv  ## what needs a CUDA device
	$(BIN)/pytest -m gpu

docs: venv  ## build the documentation site in build/site; a broken link or anchor is an error
	$(BIN)/python docs/build_site.py

lint: venv  ## style, types and the layers between packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy imgcls jobs benchmarks
	$(BIN)/lint-imports

format: venv  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, caches, and what the demo and the benchmarks wrote
	rm -rf .venv build dist demo bench-results *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
