PY := .venv/bin/python
JOBS := 2
VERSION := 3.13
CORE := tests/kernels tests/adapters tests/routing tests/storage tests/data tests/test_model.py
# The first of python3.11 and python3 that starts and is new enough.
FIND_PYTHON = for p in python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done

.PHONY: help demo continual test test-all test-core lint format types docs clean

help:
	@echo 'make demo    train the quickstart mixture on the embedded model (CPU, minutes)'
	@echo 'make continual  teach the embedded model six skills one after another (CPU, minutes)'
	@echo 'make test    run the tests, two files at a time (JOBS=4: four)'
	@echo 'make test-all  the slow ones, too: every family of transformers, every published reference'
	@echo 'make test-core VERSION=3.12  the tests of the core on another Python, in build/core-3.12'
	@echo 'make lint    ruff: rules and layout'
	@echo 'make format  ruff: mend what it can'
	@echo 'make types   pyright'
	@echo 'make docs    the documentation as a site, in build/site; a broken link is an error'
	@echo 'make clean   remove caches (not .venv, not runs/)'
	@echo 'The first of them makes .venv; afterwards it is made anew only when the pins change.'

.venv/.installed: pyproject.toml constraints.txt
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo 'dylora needs Python 3.11 or newer' >&2; exit 1; fi; \
	test -x $(PY) || $$python -m venv .venv
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.installed
	$(PY) run.py train --config configs/quickstart.yaml

continual: .venv/.installed
	$(PY) run.py train --config configs/continual.yaml

test: .venv/.installed
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-all: .venv/.installed
	$(PY) -m pytest -n $(JOBS) --dist loadfile

test-core:
	python$(VERSION) -m venv build/core-$(VERSION)
	build/core-$(VERSION)/bin/python -m pip install --disable-pip-version-check -c constraints.txt \
		. accelerate matplotlib peft pytest pytest-xdist
	build/core-$(VERSION)/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(CORE)

lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: .venv/.installed
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: .venv/.installed
	$(PY) -m pyright

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(PY) -m mkdocs build --strict --quiet

clean:
	rm -rf .pytest_cache .ruff_cache build *.egg-info
	find dylora tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +
