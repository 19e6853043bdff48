# make train | test | lint | clean. The first call sets up $(VENV); later ones need no network.
PYTHON ?= python3
VENV ?= .venv
PRESET ?= harlow-ppo
ARGS ?=
# Tests in parallel, at most four at a time: some start processes of their own. WORKERS=0 is one
# process, for a debugger.
WORKERS ?= logical

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(VENV)/.esmeta-installed

.PHONY: train test lint setup clean

train: $(STAMP)
	$(PY) -m esmeta.train $(PRESET) $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -m "not slow" -n $(WORKERS) --maxprocesses=4 --dist=loadgroup $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath $(PY)

setup: $(STAMP)

# The build backend is installed first and used without isolation: its version is the tested one,
# and a repeated set-up whose versions have not changed works offline.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "esmeta needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; write e.g. make PYTHON=python3.12")'
	test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt hatchling
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev,mujoco]'
	@touch $@

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache
	find esmeta tasks tests -name __pycache__ -type d -prune -exec rm -rf {} +
