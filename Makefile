# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Idle OpenMP threads that spin make CPU training several times slower when models share cores.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-long test-faults test-cluster check lint types floors wheel lock audit docs

help:            ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(VENV)/.installed  ## the locked environment in .venv

$(VENV)/.installed: pyproject.toml constraints.hashed.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python .ci/install
	touch $@

demo: install    ## human ratings to a registered model; FRESH=1 starts over
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/polyref demo $(if $(FRESH),--fresh)

# bitsandbytes announces what it lacks whenever peft is imported, so only the tests get to see it.
$(VENV)/quantization: $(VENV)/.installed
	$(BIN)/pip install --quiet --require-hashes --no-deps --constraint constraints.hashed.txt --target $@ bitsandbytes

TESTS = OMP_NUM_THREADS=1 PYTHONPATH="$(abspath $(VENV)/quantization)" PATH="$(abspath $(BIN)):$$PATH" \
  $(BIN)/python -m pytest -q

test: install $(VENV)/quantization  ## all tests that need no GPU, under an hour on 2 cores; PYTEST="-k name" for some
	$(BIN)/python -m orchestrator.demo.assets
ifdef PYTEST
	$(TESTS) $(PYTEST)
else
	$(TESTS) -n 2 --dist loadgroup tests --ignore tests/orchestrator --ignore tests/references \
	  --ignore tests/cluster --ignore tests/faults
	$(TESTS) -n 2 --dist loadfile -m "not long" tests/orchestrator tests/references  # on Ray
endif

FAST = tests/losses tests/preferences tests/tune_spaces tests/polyref tests/docs/test_docs.py tests/models \
  --ignore tests/models/test_strategies.py --ignore tests/models/test_parallel.py \
  $(addprefix tests/orchestrator/test_,$(addsuffix .py,checkpoint config examples explain metrics placement record report search step sweep))

test-fast: install $(VENV)/quantization  ## the ground floors and most of what needs no Ray: under two minutes on 2 cores
	$(TESTS) -n 2 --dist loadgroup -m "not smollm2 and not long" $(FAST)

test-long: install  ## searches and runs in shards, killed and resumed, and jobs: some 25 minutes on 2 cores
	$(TESTS) -n 2 --dist loadfile --timeout 1200 -m long tests/orchestrator

test-faults: install  ## kill, stop, damage, fill and cut off what a run needs, for real (root on Linux)
	rm -f .faults.csv
	FAULT_LOG="$(CURDIR)/.faults.csv" $(TESTS) tests/faults
	$(BIN)/python -m tests.support.fault_table .faults.csv $(if $(WRITE),--write)  # WRITE=1: into docs/faults.md

test-cluster: install  ## ray up, jobs and an autoscaler on hosts made on this machine (root on Linux), ten minutes
	tests/cluster/run.sh $(BIN)/python

check: lint types floors  ## everything that reads the code without running it

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: install
	$(BIN)/mypy

floors: install
	$(BIN)/lint-imports

wheel: install   ## build the wheel, install it elsewhere and run it there
	tests/wheel.sh $(BIN)/python

lock: install $(VENV)/quantization  ## write the installed versions to constraints.txt, and with hashes to constraints.hashed.txt
	.ci/lock $(BIN)/python

docs: install    ## write the tables of fields and of other trainers' settings into docs/
	$(BIN)/python docs/generate.py

audit: install   ## known faults of the locked versions; says so where no advisory service answers
	$(BIN)/python .ci/audit
