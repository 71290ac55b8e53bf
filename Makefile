# Everything a checkout can do, in .venv, which the first command makes. PYTHON chooses its interpreter (3.11 or later).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Captions that the demonstration model was never trained on.
PROMPTS := \
	"a large blue circle left of a large red triangle on a white background" \
	"a small green star right of a large yellow circle on a pink background" \
	"a large cyan square above a small red square on a gray background" \
	"a small cyan star below a small yellow square on a black background" \
	"a large red square left of a small blue circle on a pink background" \
	"a large purple star on a pink background"

# A stamp per set of extras: $(VENV)/with-cpu,export says that `pip install -e .[cpu,export]` has been done.
RUN := $(VENV)/with-cpu,export,rtx
TRAIN := $(VENV)/with-distill
TEST := $(VENV)/with-cpu,distill,export,rtx,test
# TensorRT's type stubs, for a test. They lie apart, and come without TensorRT itself, which they ask for.
STUBS := $(VENV)/stubs/.installed

.PHONY: help demo test native native-soak lint train distill bench evaluate clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(RUN) ## Build the demonstration bundle and make six images, out/sheet.png shows them all
	@TIMEFORMAT='build took %R s'; \
	time $(BIN)/glance-trt build export/shapes.yaml -o out/shapes.bundle
	@TIMEFORMAT='generate took %R s'; \
	time $(BIN)/glance-trt generate out/shapes.bundle $(PROMPTS) --target cpu --seed 7 -o out --sheet out/sheet.png --overwrite
	@echo 'The images are in out/, all of them on one sheet in out/sheet.png. About nine in ten show what their caption says.'

test: lint ## Lint, check types, and run every test but those of native/
	@$(BIN)/pytest --ignore=tests/native --numprocesses=logical --maxprocesses=4 --dist=loadfile

native: $(TEST) ## Build the native runtime and run its tests; what it needs is in docs/embedding.md
	@$(BIN)/pytest tests/native

native-soak: ## Sanitizers, threads and fuzzers over the native runtime: some 20 minutes; needs clang
	native/scripts/soak.sh build/soak

lint: $(TEST) ## Lint and check types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

train: $(TRAIN) ## Train the demonstration model from nothing (hours; goes on where it stopped)
	$(BIN)/python examples/shapes/train_teacher.py

distill: $(TRAIN) ## Train the demonstration model's two phase experts
	$(BIN)/glance-trt distill export/shapes.yaml

bench: $(TEST) ## Run every benchmark but those that need an NVIDIA GPU (gpu.py) or C++ (embedding.py)
	@for script in $(filter-out bench/embedding.py bench/figures.py bench/gpu.py bench/random_models.py,$(wildcard bench/*.py)); do echo "$$script"; $(BIN)/python "$$script"; done

evaluate: $(TEST) ## Prompt accuracy of teacher, experts and base over 500 held-out captions, and the README's picture
	$(BIN)/python examples/shapes/evaluate.py
	$(BIN)/python examples/shapes/compare.py

clean: ## Remove outputs and caches, but not .venv
	rm -rf out dist build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/with-%: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing $* into $(VENV) (up to 2 GB; the first time it takes minutes)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]' -c constraints.txt
	@touch '$@'

$(TEST): | $(STUBS)

$(STUBS): constraints.txt | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) tensorrt-stubs -c constraints.txt
	@touch '$@'
