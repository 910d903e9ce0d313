# Everything sets itself up: Python 3.10 or newer, git and make are all that is needed.
PYTHON ?= python3
PY := .venv/bin/python
PHOTO ?=

.PHONY: demo test test-slow lint docs bench install clean help

help:  ## these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: .venv/ready  ## restore a photograph, train masked autoencoders, compare optimizers; ends with one report (PHOTO=path.jpg for yours)
	@$(PY) -m sfumato demo $(if $(PHOTO),--photo "$(PHOTO)")

test: .venv/ready-dev  ## the whole default test suite, with the doctests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

test-slow: .venv/ready-dev  ## the long tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow

lint: .venv/ready-dev  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m sfumato.catalogue --check

docs: .venv/ready-docs  ## the documentation in site/, which can be opened from disk
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: .venv/ready-bench  ## race our parts against other libraries on this machine: about ten minutes
	OMP_NUM_THREADS=1 $(PY) -m benchmarks --all

install: .venv/ready  ## the virtual environment with sfumato in it

.venv/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "sfumato needs Python 3.10 or newer; try make PYTHON=python3.11")'
	@echo "setting up .venv (a few minutes: PyTorch is large)"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/ready-dev: .venv/ready
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

.venv/ready-docs: .venv/ready
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

.venv/ready-bench: .venv/ready
	@$(PY) -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

clean:  ## remove the environment and what was built
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache
