PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := hf_mars tests benchmarks run_clm.py

.PHONY: demo test quality style clean

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt torch
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e ".[plot,test,quality]"
	touch $@

test: $(VENV)/.installed
	$(BIN)/python -m pytest

quality: $(VENV)/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: $(VENV)/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:
	rm -rf $(VENV) demo build dist *.egg-info
