# Everything is installed into .venv. Nothing outside this folder changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROMETHEUS := $(VENV)/tools/usr/bin/prometheus

export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup prometheus demo test test-long test-faults benchmark bench-scale bench-nodes lint check hooks format clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) $(PROMETHEUS) ## virtual environment with everything

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps daft==0.7.26  # asks for pyarrow<26, which its Parquet reader does not need
	@touch $@

prometheus: $(PROMETHEUS) ## unpack Debian's Prometheus into .venv, for the tests of infra/observability; needs apt-get

# Without apt-get, setup continues and those tests are skipped.
$(PROMETHEUS): | $(READY)
	@mkdir -p $(VENV)/tools
	@cd $(VENV)/tools && apt-get download -qq prometheus && dpkg -x prometheus_*.deb . && rm prometheus_*.deb \
		|| echo 'no Prometheus from apt-get here: the tests that need it are skipped'

demo: $(READY) ## label a drawn archive and map a drawn scene: embed, fit, classify, map (2-3 minutes)
	$(BIN)/python jobs/demo.py demo

test: $(READY) $(PROMETHEUS) ## all tests except the longest (test-long, test-faults)
	$(BIN)/python -m pytest -m 'not long and not faults' -n 2 --dist loadfile

test-long: $(READY) $(PROMETHEUS) ## the tests that take longest
	$(BIN)/python -m pytest -m long

test-faults: $(READY) ## kills, lost workers, a failing store, paused drivers (half an hour)
	$(BIN)/python -m pytest -m faults

benchmark: $(READY) ## compare with peers, on drawn images or on IMAGES=folder (half an hour); FORM=long: hours
	$(BIN)/python jobs/bench/compare.py --form $(or $(FORM),standard) --json benchmark.json --chart benchmark.png \
		$(if $(IMAGES),--images '$(IMAGES)')

bench-scale: $(READY) ## memory and speed with ten thousand, a hundred thousand and a million images (an hour)
	$(BIN)/python jobs/bench/growth.py
	$(BIN)/python jobs/bench/commits.py

bench-nodes: $(READY) ## the cost of Ray per image and per task, on clusters of 1, 2 and 4 nodes (an hour)
	$(BIN)/python jobs/bench/nodes.py
	$(BIN)/python jobs/bench/nodes.py --case tiles --small 10000 --large 40000 --topology together

lint: $(READY) ## ruff check, ruff format and mypy --strict; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint ## lint and the fast tests
	$(BIN)/python -m pytest -m 'not slow and not long and not faults'

hooks: $(READY) ## run lint's checks before every commit, with pre-commit
	$(BIN)/pip install --quiet --constraint constraints.txt pre-commit
	$(BIN)/pre-commit install

format: $(READY) ## reformat the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and the outputs of demo and benchmark; keep .venv
	rm -rf demo benchmark.json benchmark.png build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
