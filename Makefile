# Each target installs what it needs first; nothing happens when everything is there.

VENV ?= .venv
PYTHON = $(VENV)/bin/python

.PHONY: help install demo test quick lint bench compare clean

help:
	@echo 'make demo      a scratch XFS image in memory: mount, fio, compare, unmount, xfs_repair -n'
	@echo 'make test      the whole test suite; the linters are among the tests'
	@echo 'make quick     the tests that take less than a few seconds each'
	@echo 'make lint      ruff, mypy, import-linter'
	@echo 'make bench     benchmarks against tmpfs and the kernel XFS'
	@echo 'make compare   the fio job files on our mount, tmpfs and the kernel XFS'

install:
	@bash tools/install.sh $(VENV)

demo: install
	$(PYTHON) -m tools.main demo

test: install
	$(PYTHON) -m pytest -n 2 --dist loadfile

quick: install
	$(PYTHON) -m pytest -m 'not slow'

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy
	$(VENV)/bin/lint-imports

bench: install
	$(PYTHON) -m tools.main bench

compare: install
	$(PYTHON) -m tools.main compare

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
