# SPDX-License-Identifier: Apache-2.0
# make demo [BACKBONE=sd15|sdxl|sd3]: train on the tiny world; make test: the tests, 6 minutes on 2 quiet cores;
# make test-slow: a quarter of an hour more of full-size memory, repeated kills and random flags; make lint: style;
# make copies: bring what the scripts share from train_sap_lora_sd15.py to the others; make docs: docs/flags.md.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --constraint constraints.txt --requirement

BACKBONE ?= sd3

.PHONY: demo environment test test-slow lint copies docs clean

environment: $(VENV)/installed

$(RUN):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "$(PYTHON) is not Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What the tests install holds what the demo needs.
$(VENV)/demo-installed: requirements-demo.txt constraints.txt | $(RUN)
	@echo "Installing PyTorch, diffusers and matplotlib into $(VENV), 1.3 GB or, with CUDA, more: some minutes of silence"
	$(PIP) requirements-demo.txt
	touch $@

$(VENV)/installed: requirements.txt requirements-demo.txt requirements-dev.txt constraints.txt \
  examples/dreambench/requirements.txt | $(RUN)
	@echo "Installing what the tests and all examples need into $(VENV), 2.2 GB or, with CUDA, more: some minutes of silence"
	$(PIP) requirements-dev.txt
	touch $(VENV)/demo-installed $@

demo: $(VENV)/demo-installed
	$(RUN) examples/tiny_world/demo.py --backbone $(BACKBONE)

test: environment
	$(RUN) -m pytest --numprocesses auto --dist worksteal -m "not slow"

test-slow: environment
	$(RUN) -m pytest --numprocesses auto --dist worksteal -m slow

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

copies: environment
	$(RUN) tests/copies.py

docs: environment
	$(RUN) tests/flags_page.py

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
