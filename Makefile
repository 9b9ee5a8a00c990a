# The entry points of this repository. `make help` lists them; .ci/run calls the same recipes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# OpenMP threads that wait for others sleep instead of spinning. On 2 cores that others use as well, an epoch of the demo
# took 5.7 s so, and 23.3 s with spinning.
export OMP_WAIT_POLICY := passive

VENV := .venv
BIN := $(VENV)/bin
# Python 3.11 first: it is the version that every dependency has a wheel for. Override with `make env PYTHON=...`.
PYTHON ?=
PYTHON_CANDIDATES := python3.11 python3.12 python3
# This exact release has CPU wheels. Installed before the rest, so that no other package chooses another torch.
TORCH ?= torch==2.13.0
EXTRAS := export,cpu,rtx,plugin,dev
# The TensorRT 10.14 headers. Without its dependencies: they would replace torch and Triton.
HEADERS := kernel-lens==2.0.1
# tritonserver with its Python backend, as a box of binaries: the Python code in it is not used, nor are its requirements.
# The backend is built against NumPy 1, which gets a folder of its own.
TRITON_SERVER := nvidia-pytriton==0.7.0
TRITON_NUMPY := numpy>=1.26,<2
# What the environment was made from; `make env` does nothing while this is unchanged.
ENV_STAMP := $(VENV)/.made-from
PIP := $(BIN)/python -m pip --disable-pip-version-check
TREE := build/tree
# Those that are Python.
SAMPLES := $(sort $(dir $(wildcard samples/*/*.py)))
# Where mypy finds what the programs import: the package, and the samples, which share the data set's module.
SAMPLES_PATH := $(TREE):$(subst $() ,:,$(strip $(SAMPLES)))

# An environment holds the package of one checkout, by its path. That of another one would be turned over to this one, or
# the recipes would test that one's code.
define WHOSE
import importlib.metadata, json, os, sys, urllib.request
try:
    found = importlib.metadata.distribution("hstu-compile").read_text("direct_url.json")
except importlib.metadata.PackageNotFoundError:
    found = None
path = urllib.request.url2pathname(json.loads(found)["url"].removeprefix("file://")) if found else "."
if os.path.isdir(path) and not os.path.samefile(path, "."):
    sys.exit(f"error: {sys.argv[1]} is the environment of {path}\n  Fix: leave VENV out, or give it a folder of its own")
endef
export WHOSE

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: env
env: ## create .venv with all that the CPU path needs; nothing to do when current
	@if [ -x $(BIN)/python ]; then $(BIN)/python -I -c "$$WHOSE" $(VENV); fi
	wanted="$$(sha256sum pyproject.toml | cut -d ' ' -f 1) $(TORCH) $(EXTRAS) $(HEADERS) $(TRITON_SERVER)"
	if [ -x $(BIN)/hstu-compile ] && [ "$$(cat $(ENV_STAMP) 2>/dev/null || true)" = "$$wanted" ]; then exit 0; fi
	if [ ! -x $(BIN)/python ]; then
		python=""
		for candidate in $(or $(PYTHON),$(PYTHON_CANDIDATES)); do
			if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
				2>/dev/null; then python="$$candidate"; break; fi
		done
		if [ -z "$$python" ]; then
			echo "error: no Python 3.11 or 3.12 with venv among: $(or $(PYTHON),$(PYTHON_CANDIDATES))" >&2
			echo "  Fix: install one (Debian and Ubuntu: python3.11 python3.11-venv), or: make env PYTHON=/path/to/python" >&2
			exit 2
		fi
		echo "env: creating $(VENV) with $$("$$python" --version)"
		"$$python" -m venv $(VENV)
	fi
	install() {
		# Not the modules that nobody imports: Python compiles each that somebody does.
		if ! $(PIP) install -qq --no-compile "$$@"; then
			echo "error: pip could not install: $$*" >&2
			echo "  Fix: see pip's message above. Without a network, point PIP_INDEX_URL or PIP_FIND_LINKS at a mirror" >&2
			echo "  that has the packages of pyproject.toml, then repeat: make env" >&2
			exit 1
		fi
	}
	if ! $(BIN)/python -c 'import torch' 2>/dev/null; then
		echo "env: installing $(TORCH) (a large download the first time)"
		install "$(TORCH)"
	fi
	echo "env: installing hstu-compile with its extras ($(EXTRAS))"
	install "setuptools>=77"
	install --no-build-isolation --editable ".[$(EXTRAS)]"
	install --no-deps "$(HEADERS)"
	# It needs glibc 2.35. Where it cannot be installed, the tests of tests/triton skip and say so.
	if $(PIP) install -qq --no-compile --no-deps "$(TRITON_SERVER)"; then
		install --no-deps --upgrade --target $(VENV)/triton-numpy "$(TRITON_NUMPY)"
	else
		echo "env: no $(TRITON_SERVER) for this system; the tests that start a tritonserver will be skipped" >&2
	fi
	echo "$$wanted" > $(ENV_STAMP)
	echo "env: ready, $(BIN)/hstu-compile"

.PHONY: demo
demo: env ## train on MovieLens-100K, build the fp16 bundle, compare the ranking metrics
	@$(BIN)/python samples/01_movielens_demo/demo.py

.PHONY: demo-ranking
demo-ranking: env ## train a ranker on MovieLens-100K, build its three graphs, serve with the KV cache, compare
	@$(BIN)/python samples/02_ranking/ranking_demo.py

.PHONY: test
test: env lint tree ## lint, type check, and every test but the slow ones
	@# Two processes on two cores: threads of each would only wait for those of the other. Types are checked meanwhile, in what
	@# the tests leave of the cores.
	$(MAKE) types >build/types.log 2>&1 &
	types=$$!
	trap 'kill $$types 2>/dev/null || true' EXIT
	tests=0
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 || tests=$$?
	checked=0
	wait $$types || checked=$$?
	cat build/types.log
	exit $$((tests > checked ? tests : checked))

.PHONY: test-slow
test-slow: env ## the slow tests, among them the whole demo
	@$(BIN)/python -m pytest -m slow

.PHONY: lint
lint: env ## ruff: rules and format
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: typecheck
typecheck: env tree ## mypy --strict on the package and the samples
	@$(MAKE) types

# The folders model/, calibration/ and plugins/ become subpackages only when installed, so an installed tree is checked.
.PHONY: tree
tree: env
	@rm -rf $(TREE) build/lib build/bdist.*
	$(PIP) install -qq --no-deps --no-build-isolation --target $(TREE) .

.PHONY: types
types:
	@(cd $(TREE) && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../.mypy_cache --python-executable \
		../../$(BIN)/python -p hstu_compile)
	for sample in $(SAMPLES); do
		MYPYPATH=$(SAMPLES_PATH) $(BIN)/mypy --cache-dir build/.mypy_cache $$sample*.py
	done

.PHONY: bench
bench: env ## CPU benchmarks; rewrites tests/bench/results
	@shopt -s nullglob
	scripts=(tests/bench/bench_*.py)
	if [ $${#scripts[@]} = 0 ]; then echo "error: no tests/bench/bench_*.py" >&2; exit 1; fi
	for script in "$${scripts[@]}"; do $(BIN)/python "$$script"; done

.PHONY: clean
clean: ## remove what was built; .venv and the downloaded data stay
	@if [ -d build ]; then find build -mindepth 1 -maxdepth 1 ! -name data -exec rm -rf {} +; fi
	rm -rf dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

.ONESHELL:
