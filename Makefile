# SPDX-License-Identifier: Apache-2.0
# make demo [BACKBONE=sd15|sdxl|sd3]: train on the tiny world; make test: the tests, 7 minutes on 2 quiet cores;
# make test-slow: 8 minutes more of full-size memory, repeated kills and random flags; make lint: style;
# make copies: bring what the scripts share from train_sap_lora_sd15.py to the others.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

BACKBONE ?= sd3

.PHONY: demo environment test test-slow lint copies clean

environment: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt examples/dreambench/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

demo: environment
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

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
