# make demo   install what is missing, then plant and remove a backdoor and write demo-report/index.html
# make test   install what is missing, then run every check; continuous integration calls exactly this
# make lint   the style and type checks alone
# make clean  remove everything that was made here

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Data sets beside the checkout are used where there are any; tests that need them are skipped elsewhere.
UNBACKDOOR_DATA ?= $(abspath $(wildcard ../shared/datasets))
ifneq ($(strip $(UNBACKDOOR_DATA)),)
export UNBACKDOOR_DATA
else
unexport UNBACKDOOR_DATA
endif

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(READY)
	$(BIN)/unbackdoor demo --out demo-report

# One thread for each of the two test processes; more would only get in each other's way.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests/typed_ends.py

# Touched last, so that an installation that broke off is taken up again.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

clean:
	rm -rf $(VENV) demo-report .pytest_cache .mypy_cache .ruff_cache .hypothesis
