# Two commands do everything: `make demo` and `make test`. Both set up .venv first if it is not there.
#
#   VENV=folder     another virtual environment (made if missing); default .venv
#   PYTHON=python   the interpreter a new environment is made from; default: the first of python3, python3.x that is >= 3.10
#   ARGS="..."      passed on, e.g. make test ARGS="tests/ops -k rsd"
#   WORKERS=n       test files that run at a time; default: one per core
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

# The folder kernels/ is installed as xdfast.kernels. With the repository's root on sys.path it would also be importable
# as `kernels` and shadow a package of that name; this keeps the root off sys.path.
export PYTHONSAFEPATH := 1

VENV ?= .venv
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTHON ?=
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.xdfast-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
# "torch>=…" "torchvision>=…" as pyproject.toml has them
TORCH := $(shell sed -n 's/^ *\("torch\(vision\)\{0,1\}>=[^"]*"\),.*/\1/p' pyproject.toml)
INPUTS := pyproject.toml setup.py $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' \))

.PHONY: help install install-robot demo demo-robot test test-slow test-gpu bench bench-data bench-cache bench-robot bench-policy bench-routed bench-actdistill bench-gpu harden figures docs docs-serve lint format build clean

help:
	@echo "make demo        train a small student from a teacher on real images, write a report (4 to 10 minutes on 2 cores)"
	@echo "                 your own: make demo DATA=/path/to/imagefolder TEACHER=vit_small_patch14_dinov2 STUDENT=resnet18"
	@echo "make demo-robot  distil an encoder, train diffusion policies from 10 demonstrations, evaluate them (about 12 minutes)"
	@echo "make test        the tests (make test-slow, make test-gpu: the rest of them)"
	@echo "make bench       benchmarks; writes bench/results/cpu (make bench-gpu: GPU tests and benchmarks)"
	@echo "make bench-data  the image loader; writes bench/results/cpu/data.json (XDFAST_BENCH_IMAGES=folder: with your images)"
	@echo "make bench-cache an epoch with a live teacher against one from the teacher cache (about 4 minutes)"
	@echo "make bench-robot frames/s of simulated tasks; writes bench/results/cpu/robot_sim.json"
	@echo "make bench-routed layers that are skipped, against dense ones and other ways to skip (about 12 minutes)"
	@echo "make bench-actdistill a VLA, its student with half of the layers and two baselines in closed loop (hours; RUNS=folder PART=half|eighth|words SEEDS=\"0 1 2\")"
	@echo "make harden      drawn cases of every loss and op, damaged files; writes bench/results/cpu/hardening.json (PARTS=\"losses ops\")"
	@echo "make figures     tables and pictures of README and docs from bench/results"
	@echo "make docs        the documentation site in site/, warnings are errors      make docs-serve   while you write"
	@echo "make lint        ruff, import rules, types          make format   let ruff rewrite"
	@echo "make build       wheel and source archive in dist/"
	@echo "make install     only set up the environment: $(VENV)"
	@echo "make bench-policy a decision of a diffusion policy against the usual loop; writes bench/results/cpu/policy.json"
	@echo "make install-robot  what simulated robot tasks need: packages and OSMesa (part of make install where that can be done)"
	@echo "make clean       remove what was built (the environment stays)"

install: $(STAMP)

# Before the first download .ci/space.py asks whether there is room, and says whether pip's cache would fit too. torch comes
# first and by itself: pip keeps all that one call downloads until the end of it. The next build is isolated and so cannot
# see torch; the last one builds the compiled extension against the torch just installed. A failing compiler does not fail
# the set-up (unless XDFAST_BUILD_EXT=1); the last line says what came of it.
$(STAMP): $(INPUTS)
	@if [ ! -x "$(BIN)/python" ]; then \
	  python="$(PYTHON)"; \
	  for candidate in $${python:-python3 python3.13 python3.12 python3.11 python3.10}; do \
	    if command -v "$$candidate" >/dev/null && "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then found="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "xdfast needs Python 3.10 or newer; found: $$($${python:-python3} --version 2>&1 || true). Install one, or name it: make $(firstword $(MAKECMDGOALS)) PYTHON=/path/to/python3.11" >&2; exit 1; \
	  fi; \
	  echo "making $(VENV) with $$($$found --version)"; \
	  "$$found" -m venv "$(VENV)" || { rm -rf "$(VENV)"; echo "$$found cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }; \
	fi
	@"$(BIN)/python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(VENV) has $$($(BIN)/python --version); xdfast needs Python 3.10 or newer: remove the folder or name another with VENV=" >&2; exit 1; }
	@options="$$("$(BIN)/python" .ci/space.py "$(VENV)")"; \
	  echo "installing torch into $(VENV) (large: minutes the first time)"; \
	  $(PIP) install $$options $(TORCH); \
	  echo "installing xdfast and what else it needs"; \
	  XDFAST_BUILD_EXT=0 $(PIP) install $$options -e ".[dev]"
	@echo "building the compiled extension"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@"$(BIN)/python" -c 'import json; i = json.load(open("xdfast/_build_info.json")); print("compiled extension: built for torch " + i["torch"] if i["built"] else "compiled extension: not built, xdfast runs without it (" + i["reason"] + "); `xdfast doctor` says how to build it")'
	@"$(BIN)/python" -m xdfast.robot.sim.install
	@touch "$@"

# Packages, and OSMesa by apt-get as root; otherwise it prints what to run. Never an error.
install-robot: $(STAMP)
	@"$(BIN)/python" -m xdfast.robot.sim.install

demo: $(STAMP)
	@"$(BIN)/xdfast" demo $(if $(DATA),--data "$(DATA)") $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(STUDENT),--student "$(STUDENT)") $(ARGS)

demo-robot: $(STAMP)
	@"$(BIN)/xdfast" demo-robot $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(TASK),--task "$(TASK)") $(ARGS)

# Several files at a time, with one thread each: most of a test's time is a process that starts, not arithmetic.
test: $(STAMP)
	@OMP_NUM_THREADS="$${OMP_NUM_THREADS:-1}" "$(BIN)/pytest" -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP)
	@"$(BIN)/pytest" -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP)
	@"$(BIN)/pytest" -m gpu $(ARGS)

# Twice: with glibc told to keep freed memory, so that figures are the code's and not the page faults' of large
# temporaries, and as processes start by default.
bench: $(STAMP)
	@mkdir -p bench/results/cpu
	@KINETO_LOG_LEVEL=99 MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 "$(BIN)/pytest" bench/bench_rsd.py \
	  -m "not gpu" --benchmark-only --benchmark-json=bench/results/cpu/rsd.json $(ARGS)
	@KINETO_LOG_LEVEL=99 "$(BIN)/pytest" bench/bench_rsd.py \
	  -m "not gpu" --benchmark-only --benchmark-json=bench/results/cpu/rsd_default_malloc.json $(ARGS)
	@$(MAKE) figures

bench-data: $(STAMP)
	@mkdir -p bench/results/cpu
	@"$(BIN)/pytest" bench/bench_data.py --benchmark-only --benchmark-json=bench/results/cpu/data.json $(ARGS)

bench-cache: $(STAMP)
	@mkdir -p bench/results/cpu
	@"$(BIN)/pytest" bench/bench_cache.py -m "not gpu" --benchmark-only --benchmark-json=bench/results/cpu/cache.json $(ARGS)

bench-robot: $(STAMP)
	@mkdir -p bench/results/cpu
	@"$(BIN)/pytest" bench/bench_robot_sim.py -m "not gpu" --benchmark-only --benchmark-json=bench/results/cpu/robot_sim.json $(ARGS)

bench-policy: $(STAMP)
	@mkdir -p bench/results/cpu
	@"$(BIN)/pytest" bench/bench_policy.py -m "not gpu" --benchmark-only --benchmark-json=bench/results/cpu/policy.json $(ARGS)

# Freed memory stays with the process: page faults would cost more than the layers.
bench-routed: $(STAMP)
	@mkdir -p bench/results/cpu
	@KINETO_LOG_LEVEL=99 MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 \
	  "$(BIN)/xdfast" bench routed --device cpu --out bench/results/cpu/routed.json $(ARGS)

bench-actdistill: $(STAMP)
	@MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 PYTHON="$(BIN)/python" \
	  bash bench/actdistill.sh "$(or $(RUNS),runs/actdistill)" 60 "$(or $(PART),half)" "$(or $(SEEDS),0)"

bench-gpu: $(STAMP)
	@PYTHON="$(BIN)/python" bash bench/gpu.sh

harden: $(STAMP)
	@mkdir -p bench/results/cpu
	@"$(BIN)/python" -m xdfast.bench.hardening $(PARTS)

figures: $(STAMP)
	@"$(BIN)/python" -m xdfast.bench.table README.md bench/results/cpu/rsd.json
	@"$(BIN)/python" -m xdfast.bench.table docs/rsd.md bench/results/cpu/rsd_avx2.json limits
	@"$(BIN)/python" -m xdfast.bench.routed_table README.md bench/results/cpu/routed.json B=16 exact 1 0.5 0.25
	@"$(BIN)/python" -m xdfast.bench.routed_table docs/routed.md bench/results/cpu/routed.json
	@"$(BIN)/python" -m xdfast.bench.recipes
	@"$(BIN)/python" -m xdfast.bench.figures

# Material for MkDocs announces a MkDocs 2 that pyproject.toml does not allow.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" build --strict --quiet $(ARGS)
	@echo "site/index.html"

docs-serve: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 "$(BIN)/mkdocs" serve $(ARGS)

lint: $(STAMP)
	@"$(BIN)/ruff" check .
	@"$(BIN)/ruff" format --check .
	@"$(BIN)/lint-imports"
	@"$(BIN)/mypy"

format: $(STAMP)
	@"$(BIN)/ruff" check --fix .
	@"$(BIN)/ruff" format .

# An old build/ would put deleted modules into the wheel.
build: $(STAMP)
	@rm -rf build dist
	@"$(BIN)/python" -m build --no-isolation

clean:
	@rm -rf build dist site *.egg-info xdfast/_C.*.so xdfast/_build_info.json .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .benchmarks .hypothesis "$(STAMP)"
	@find xdfast kernels tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
