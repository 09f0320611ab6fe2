# `make` alone prints this list.
PYTHON ?= python3.11
NB ?= 05
NAME ?= snips

PROJECT := <<cookiecutter.project>>
VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
IN_PROJECT := $(MAKE) --no-print-directory -C '$(PROJECT)' VENV='$(VENV)' PYTHON='$(PYTHON)' NB='$(NB)'

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench open save clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo '  with PYTHON=python3.11  NB=05  NAME=snips'

setup:  ## install the tested set into .venv, once
	@$(IN_PROJECT) deps

# A bake copies what lies in the folder, .venv included: bake from a copy without it.
demo: setup  ## bake the default project to build/demo and run its eight notebooks on the embedded model
	rm -rf build/demo build/template && mkdir -p build/template
	tar -c --exclude=./.venv --exclude=./build --exclude=./.git . | tar -x -C build/template
	cd build && $(BIN)/cookiecutter --no-input --default-config --output-dir . ./template project=demo
	rm -rf build/template
	cd build/demo && $(BIN)/python -m slm run all --profile cpu --run-id demo
	@echo && sed -n '/^!\[/q;p' build/demo/outputs/eval_reports/demo/eval_report.md
	@echo && echo "The project: build/demo"
	@echo "Report, model card, plots: build/demo/outputs/eval_reports/demo/"
	@echo "Executed notebooks: build/demo/outputs/runs/demo/    Model files: build/demo/outputs/gguf/demo/"

# One thread for each of the two workers: more than the machine has cores spend half their time waiting for each other.
test: setup  ## every test of the template, the baked project's included
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: setup  ## a measurement: make bench NAME=snips
	$(BIN)/python tests/benchmarks/$(NAME).py

open: setup  ## a notebook as a Python script to edit: make open NB=05
	@$(IN_PROJECT) open-script

save: setup  ## put the edited script back into its notebook, clean, export: make save NB=05
	@$(IN_PROJECT) save-script

clean:  ## remove build/ and caches; .venv stays
	rm -rf build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
