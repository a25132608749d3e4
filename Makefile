# SPDX-License-Identifier: Apache-2.0
# make test: the tests; make lint: style; make copies: what the scripts share, from train_sap_lora_sd15.py to the others.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: environment test lint copies clean

environment: $(VENV)/installed

$(VENV)/installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

test: environment
	$(RUN) -m pytest

lint: environment
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

copies: environment
	$(RUN) tests/copies.py

clean:
	rm -rf $(VENV) outputs .pytest_cache .ruff_cache
