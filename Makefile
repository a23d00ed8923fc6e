# make demo       install what is missing, then plant and remove a backdoor and write demo-report/index.html
# make test       install what is missing, then run what every push needs; continuous integration calls exactly this
# make test-all   the same, and the tests marked slow
# make test-busy  make test again and again while every core is busy elsewhere, and the time of each
# make lint       the style and type checks alone
# make clean      remove everything that was made here

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-busy lint clean

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
	$(BIN)/unbackdoor demo --out demo-report --force

# One thread for each of the two test processes; more would only get in each other's way.
test test-all test-busy: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n 2

# More test processes than cores, as there are more loops: all of them wait for their turn.
test-busy: $(READY)
	$(BIN)/python scripts/busy_machine.py --runs 5 --loops 4 -- $(BIN)/python -m pytest -n 4 -m "not slow"

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
