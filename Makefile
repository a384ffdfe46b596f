# make run    pretrain the tiny GPT end to end; installs everything first when it is missing
# make test   formatting, lint and types, then the tests
# make check  formatting, lint and types alone
# make install what the others install first
# make clean  remove what was installed and cached; runs/ and data/ stay

PYTHON ?= python3
CONFIG ?= configs/tiny.toml
WORKERS ?= 3

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
SAMPLE := data/sample.parquet
# pip compiles on one core. `make COMPILE=` leaves each module to its first import.
COMPILE ?= $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true

# Also pins what pip installs into the build's own environment.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# What Python compiled is kept, or each of the many processes of a test compiles it again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test check install clean

run: $(INSTALLED) $(SAMPLE)
	@$(BIN)/overnight run $(CONFIG)

test: check
	@$(BIN)/python -m pytest --numprocesses $(WORKERS)

install: $(INSTALLED)

check: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made last, so that an installation that was broken off is taken up again.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into $(VENV): some minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --progress-bar off --no-compile --editable '.[test]'
	@$(COMPILE)
	@touch $@

$(SAMPLE): | $(INSTALLED)
	@$(BIN)/overnight sample-corpus $@
