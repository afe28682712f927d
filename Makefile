# Each target installs what it needs first; nothing happens when everything is there.

VENV ?= .venv
PYTHON = $(VENV)/bin/python

.PHONY: help install demo test test-nojit quick lint bench compare clean

help:
	@echo 'make demo      a scratch XFS image in memory: mount, fio, compare, unmount, xfs_repair -n'
	@echo 'make test      the whole test suite; the linters are among the tests'
	@echo 'make test-nojit  the tests of allocator and formats, with kernels interpreted'
	@echo 'make quick     the tests that take less than a few seconds each'
	@echo 'make lint      ruff, mypy, import-linter'
	@echo 'make bench     benchmarks against tmpfs and the kernel XFS'
	@echo 'make compare   the fio job files on our mount, tmpfs and the kernel XFS'

install:
	@bash tools/install.sh $(VENV)

demo: install
	$(PYTHON) -m tools.main demo

test: install test-nojit
	$(PYTHON) -m pytest -n 2 --dist loadfile

# Interpreted kernels, where Python looks at bounds and overflow: the allocator and the formats.
# Not what needs threads (the twins of atomic operations are for one), and nothing that copies the
# content of files: that is a loop over bytes, and takes minutes.
NOJIT = tests/alloc $(patsubst %,tests/fs/test_%.py,ag attrleaf btblock btree crc danode dentry \
	dir_pieces dirkernels extents freespace inode inobt lock log_formats radix refcount resident rmap \
	shadow superblock unlinked)
test-nojit: install
	NUMBA_DISABLE_JIT=1 $(PYTHON) -m pytest -n 2 --dist loadfile \
		-m 'not slow and not mount and not compiled' $(NOJIT)

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
