# Every target builds what it needs: a bare clone, Python 3.11 or 3.12 and a C++ compiler suffice.
#
#   make train ARGS="--preset smoke"   the whole pipeline; ARGS goes to worldenv-train
#   make test                          lint, build, tests and a smoke run of the pipeline
#   make bench / bench-check           kernel timings against their rivals / fail when a ratio drops
#   make bench-check ARGS="--only gae" the cases whose name contains "gae"
#   make results                       the README's tables and figures anew, from results/
#
# Settings: PYTHON=python3.12   TORCH="torch==2.13.0"   TORCH_INDEX=<index of PyTorch wheels>   VENV=.venv

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
TORCH ?=
TORCH_INDEX ?=
EXTRAS ?= libero,models,dev
CPU_TORCH := torch==2.13.0
GPU_TORCH := torch>=2.11,<2.14
BUILD_TOOLS := setuptools>=77 wheel ninja pybind11 numpy
HF_LIBERO := hf-libero==0.1.4
METAWORLD := metaworld==3.1.1
GL_PACKAGES := libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libosmesa6

# The first interpreter that runs and has a supported version (a pyenv shim may exist and not run).
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)

NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
PIP := $(BIN)/python -m pip --disable-pip-version-check
BUILD := $(BIN)/python setup.py -q build_ext --inplace
# Bytecode of all of torch, scipy and transformers takes a minute; what is imported gets its own then.
INSTALL := $(PIP) install -q --no-compile
REQUIREMENTS := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	extras = filter(None, "$(EXTRAS)".split(",")); \
	print(*p["dependencies"], *sum(map(p["optional-dependencies"].get, extras), []), sep="\n")

.PHONY: help train test bench bench-check results lint install clean

help:
	@sed -n '3,9s/^# *//p' Makefile

train: install
	$(BIN)/worldenv-train $(ARGS)

test: lint
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	train() { echo "worldenv-train --preset $$1"; \
		$(BIN)/worldenv-train --preset $$1 --run-dir "$$folder/$$1" > "$$folder/$$1.log" 2>&1; }; \
	train published-tiny & other=$$!; failed=0; train smoke || failed=1; wait $$other || failed=1; \
	cat "$$folder"/*.log; exit $$failed

bench: install
	$(BIN)/python -m bench $(ARGS)

bench-check: install
	$(BIN)/python -m bench --check $(ARGS)

results: install
	$(BIN)/python -m bench.results

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist worldenv.egg-info worldenv/_C*.so .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --- what every target needs, in four stamps: torch, packages, the compiled extension, a GL library ---

install: $(VENV)/.gl $(VENV)/.built

# torch comes first and alone: the extension compiles against it, and no later package may change it.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "worldenv needs Python 3.11 or 3.12; none was found." \
		"Install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is" \
		"$$($(PYTHON) --version 2>&1): worldenv needs Python 3.11 or 3.12." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks the venv" \
		"module. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	@command -v g++ >/dev/null || command -v c++ >/dev/null || { echo "No C++ compiler was found." \
		"On Debian or Ubuntu: sudo apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig as s; \
		sys.exit(not os.path.exists(os.path.join(s.get_path("include"), "Python.h")))' || { \
		echo "Python.h of $(PYTHON) was not found. On Debian or Ubuntu: sudo apt-get install" \
		"$$($(PYTHON) -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(install_torch)
	@$(PIP) freeze | grep '^torch==' > $(VENV)/constraints.txt
	$(INSTALL) -c $(VENV)/constraints.txt $(foreach tool,$(BUILD_TOOLS),'$(tool)')
	@touch $@

# With an NVIDIA driver: the CUDA build. Without: on x86-64 Linux the plain name may stand for a CUDA
# build of several GB, so the CPU build is asked for by its local version and the plain one only follows,
# announced, where no configured index has it.
define install_torch
	@if [ -n '$(TORCH)' ]; then want='$(TORCH)'; \
	elif command -v nvidia-smi >/dev/null; then want='$(GPU_TORCH)'; \
	else want='$(CPU_TORCH)'; fi; \
	index='$(TORCH_INDEX)'; \
	install() { echo "installing $$1"; $(INSTALL) $${index:+--extra-index-url "$$index"} "$$1"; }; \
	if [ -z '$(TORCH)' ] && [ "$$want" = '$(CPU_TORCH)' ] && [ "$$(uname -sm)" = "Linux x86_64" ]; then \
		install "$$want+cpu" || { echo "No configured package index has a CPU build of torch, so the" \
			"default one is installed: several GB of CUDA libraries. To avoid them, interrupt and run" \
			"make again with TORCH_INDEX=<the CPU index that pytorch.org/get-started names>." >&2; \
			install "$$want"; }; \
	else install "$$want"; fi
endef

# The extension needs torch alone, so it is compiled while packages are fetched; the two steps that
# build it again find it done. Two packages come without their dependencies, which the extra `libero`
# has: hf-libero's reach an unpinned torchvision, and with it a CUDA torch, and metaworld pins mujoco
# 3.3.0 (its tasks and experts are tested with 3.8).
$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	@$(BIN)/python -c '$(REQUIREMENTS)' > $(VENV)/requirements.txt
	$(BUILD) > $(VENV)/build.log 2>&1 & built=$$!; \
	$(INSTALL) -c $(VENV)/constraints.txt -r $(VENV)/requirements.txt; \
	$(INSTALL) --no-deps $(HF_LIBERO) $(METAWORLD); \
	wait $$built || { cat $(VENV)/build.log >&2; exit 1; }
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.built: $(VENV)/.packages setup.py $(NATIVE)
	$(BUILD)
	@touch $@

$(VENV)/.gl: $(VENV)/.packages
	@if ! $(BIN)/python -m worldenv.runtime.graphics; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing $(GL_PACKAGES)"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends $(GL_PACKAGES) >/dev/null; \
		else \
			echo "MuJoCo cannot render here. Install a GL library, then run make again:" >&2; \
			echo "  sudo apt-get install -y $(GL_PACKAGES)" >&2; exit 1; \
		fi; \
		$(BIN)/python -m worldenv.runtime.graphics; \
	fi
	@touch $@
