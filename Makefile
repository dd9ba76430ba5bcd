# Everything runs in .venv, which `make setup` builds from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?=
DATA ?=
# Warnings of old libraries are no errors here; what CONTRIBUTING.md says of this list is all it shows.
OLDEST := tests/lisa_train/command/test_training.py tests/lisa_train/command/test_cli.py \
  tests/lisa_train/trainer/test_trackers.py tests/lisa_train/measure/test_watching.py
# The analysis has older ends than training allows (datasets wants a newer pyarrow): an environment of its own.
OLDEST_ANALYSIS := $(addprefix tests/lisa_analysis/, views/test_cli.py views/test_html_report.py views/test_report_parts.py \
  views/test_plots.py views/test_notebook.py plans profiles runs metrics/test_registry.py metrics/test_norm_frames.py)
export HF_HUB_OFFLINE ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-classify demo-vision demo-speech test processes slow lint docs other-tools oldest bench \
  gpu notebooks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

setup: .venv/ready  ## install everything into .venv

demo: setup  ## the main job on a real model: probe, layers named, LoRA and LISA by them, report (MODEL=… DATA=…)
	$(BIN)/python -m lisa_train.command.demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))

demo-classify: setup  ## classify conversations: full, LoRA, LISA and the head alone (MODEL=… DATA=…)
	$(BIN)/python -m lisa_train.command.demo.classify $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))

demo-vision: setup  ## classify small pictures with DINOv2: full, LoRA, LISA and the head alone (MODEL=… DATA=…)
	$(BIN)/python -m lisa_train.command.demo.vision $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))

demo-speech: setup  ## teach Whisper synthetic voices in noise: full, LoRA, LISA and the head alone (MODEL=… DATA=…)
	$(BIN)/python -m lisa_train.command.demo.speech $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA))

test: setup  ## the test suite (about 10 minutes on 2 cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

processes: setup  ## the tests of several processes that train together (68 seconds on two idle cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "processes and not slow" $(ARGS) \
	  $$(grep -rl --include='test_*.py' 'mark\.processes' tests | sort -r)

slow: setup  ## the tests that `make test` leaves out for their length; some fetch the demo's model
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow and not gpu and not benchmark" $(ARGS)

lint: setup  ## ruff (lint, format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup  ## build the site of docs/ into build/site, strictly (to search: python -m http.server -d build/site)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

other-tools: setup  ## tests of exports by axolotl, LLaMA-Factory and mergekit themselves, without what they depend on (.other-tools)
	test -d .other-tools || $(BIN)/python -m pip install --quiet --no-deps --target .other-tools --requirement tests/other-tools.txt
	PYTHONPATH=.other-tools $(BIN)/python -m pytest -q -m slow -W default tests/contract/test_exports.py

oldest:  ## tests with the oldest versions that pyproject.toml names, training and analysis (.venv-oldest…)
	test -x .venv-oldest-analysis/bin/python || $(PYTHON) -m venv .venv-oldest-analysis
	.venv-oldest-analysis/bin/python -m pip install --quiet --requirement tests/oldest-analysis.txt
	.venv-oldest-analysis/bin/python -m pip install --quiet --no-deps --editable .
	PYTHONPATH=. .venv-oldest-analysis/bin/python -m pytest -q -p no:cacheprovider -W default -k 'not touch' $(OLDEST_ANALYSIS)
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --requirement tests/oldest.txt
	.venv-oldest/bin/python -m pip install --quiet --no-deps --editable .
	PYTHONPATH=. .venv-oldest/bin/python -m pytest -q -p no:cacheprovider -W default $(OLDEST)

bench: setup  ## measure speed and memory, as ratios within one run
	$(BIN)/python -m pytest -m benchmark -s tests/benchmarks $(ARGS)

gpu: setup  ## the tests that need a CUDA device, then memory and speed (runs/memory)
	$(BIN)/python -m pytest -m gpu -rs $(ARGS)
	$(BIN)/python reports/memory/measure.py --device cuda --out runs/memory

notebooks: setup  ## test the notebooks, on the real model too (python notebooks/execute.py rewrites them)
	$(BIN)/python -m pytest -m "slow or not slow" tests/notebooks $(ARGS)

clean:  ## remove the environment, caches and runs
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist runs *.egg-info
