# Everything installs into .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROMETHEUS := $(VENV)/tools/usr/bin/prometheus

export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup prometheus demo test test-faults benchmark bench-scale bench-nodes check format clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) $(PROMETHEUS) ## virtual environment with everything

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

prometheus: $(PROMETHEUS) ## Debian's Prometheus into .venv, for the tests of infra/observability; needs apt-get

# Where there is none, setup goes on and those tests are skipped.
$(PROMETHEUS): | $(READY)
	@mkdir -p $(VENV)/tools
	@cd $(VENV)/tools && apt-get download -qq prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb \
		|| echo 'no Prometheus from apt-get here: the tests that need it are skipped'

demo: $(READY) ## make a small archive, embed and classify it, look at the result (2-3 minutes)
	$(BIN)/python jobs/demo.py demo

test: $(READY) $(PROMETHEUS) ## all tests but the long faults
	$(BIN)/python -m pytest -m 'not faults' -n 2 --dist loadfile

test-faults: $(READY) ## kills, lost workers, a store that fails, paused drivers (half an hour)
	$(BIN)/python -m pytest -m faults

benchmark: $(READY) ## our job and its peers side by side, on drawn images or on IMAGES=folder (half an hour); FORM=long: hours
	$(BIN)/python jobs/benchmark.py --form $(or $(FORM),standard) --json benchmark.json --chart benchmark.png \
		$(if $(IMAGES),--images '$(IMAGES)')

bench-scale: $(READY) ## memory and speed at ten thousand, a hundred thousand and a million images (an hour)
	$(BIN)/python jobs/bench_scale.py
	$(BIN)/python jobs/bench_commits.py

bench-nodes: $(READY) ## what Ray costs an image and a task, on clusters of 1, 2 and 4 nodes (an hour)
	$(BIN)/python jobs/bench_nodes.py
	$(BIN)/python jobs/bench_nodes.py --case tiles --small 10000 --large 40000 --topology together

check: $(READY) ## ruff, mypy strict, and the tests' fast part
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -m 'not slow and not faults'

format: $(READY) ## put the code into the common format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the outputs of demo and benchmark and all caches; keeps .venv
	rm -rf demo benchmark.json benchmark.png build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
