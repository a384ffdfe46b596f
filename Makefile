# make run       pretrain the tiny GPT end to end; installs what a run needs first
# make test      checks, unit and property tests, one pipeline, one service, one kill: minutes
# make test-all  the same, and the long fault, service and cluster tests
# make test-cuda the tests of the CUDA path, on a stub of the driver: no card is needed
# make check     formatting, lint and types only
# make gpu-check what only a GPU can show, in under nine minutes
# make docs      build the documentation into site/, offline
# make install   what `make run` installs
# make clean     remove what was installed and cached; runs/ and data/ stay

PYTHON ?= python3
CONFIG ?= configs/tiny.toml
WORKERS ?= 3

VENV := .venv
BIN := $(VENV)/bin
VENV_CUDA := .venv-cuda
SAMPLE := data/sample.parquet
UV := $(shell command -v uv 2>/dev/null)
# pip compiles on one core. `make COMPILE=` leaves each module to its first import.
COMPILE ?= $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true

# Also pins what pip and uv install into the build's own environment.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export UV_CONSTRAINT := $(CURDIR)/constraints.txt
export UV_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
# Without Python's compiled files each of the many processes of a test compiles every module again.
unexport PYTHONDONTWRITEBYTECODE

ifdef UV
make_venv = $(UV) venv --quiet --python $(PYTHON) $(VENV)
install = $(UV) pip install --quiet --python $(BIN)/python --editable
else
# Beside packages that are installed already, pip before 23.2 resolves for many minutes.
make_venv = $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet 'pip>=23.2,<25'
install = $(BIN)/python -m pip install --quiet --progress-bar off --no-compile --editable
endif

.PHONY: run test test-all test-cuda check gpu-check docs install clean

run: $(VENV)/installed $(SAMPLE)
	@$(BIN)/overnight run $(CONFIG)

test: check
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) -m "not slow"

test-all: check
	@$(BIN)/python -m pytest --numprocesses $(WORKERS)

test-cuda: $(VENV_CUDA)/installed
	@$(VENV_CUDA)/bin/python tests/cuda/run_on_cards.py --jobs 2

install: $(VENV)/installed

check: $(VENV)/installed-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

gpu-check: $(VENV)/installed
	@$(BIN)/python tests/benchmarks/gpu_check.py

docs: $(VENV)/installed-docs
	@NO_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(VENV_CUDA) .cuda-driver *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis site
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each marker file is written last, so that an interrupted installation is repeated.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(make_venv)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): some minutes the first time"
	@$(install) .
	@$(COMPILE)
	@touch $@

$(VENV)/installed-%: pyproject.toml constraints.txt $(VENV)/installed
	@echo "installing what \`make $*\` needs"
	@$(install) '.[$*]'
	@$(COMPILE)
	@touch $@

# torch's CUDA build, before the packages of the tests. `===` refuses a build like 2.13.0+cpu, which
# a configured find-links may offer.
$(VENV_CUDA)/installed: constraints.txt $(VENV)/installed-test
	@echo "installing torch's CUDA build into $(VENV_CUDA): 5 GB, some minutes the first time"
	@$(PYTHON) -m venv $(VENV_CUDA)
	@PIP_FIND_LINKS= $(VENV_CUDA)/bin/python -m pip install --quiet --progress-bar off \
		--no-compile "torch===$$(sed -n 's/^torch==//p' constraints.txt)"
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % \
		sysconfig.get_path("purelib"))' > $$($(VENV_CUDA)/bin/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_tests.pth
	@touch $@

$(SAMPLE): | $(VENV)/installed
	@$(BIN)/overnight sample-corpus $@
