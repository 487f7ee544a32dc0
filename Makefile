# One command each, on a fresh clone: the environment is made first, in .venv, and again when its two inputs change.
#
#   make demo     the demonstration             (ARGS="--help" are passed on)
#   make test     everything that must pass     (ARGS="-k resume" go to pytest)
#   make lint     format, lint and types only
#   make format   rewrite the code in the one format
#   make docs     run the code in README.md and docs/, and build the site of them into site/
#   make pictures  draw the pictures in docs/pictures/ again
#   make soak     the tests that take minutes
#   make bench    side-by-side timings          (45 minutes; ARGS="overhead memory": those rows)
#   make clean    remove what was built and cached; distclean: .venv as well
#
# PYTHON=python3.12 chooses the interpreter of a new .venv.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
BIN := .venv/bin

.DEFAULT_GOAL := test
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: demo test lint format docs pictures soak bench clean distclean

# Threads that wait by spinning slow each other down where the machine has other work to do.
demo: .venv/.run
	OMP_WAIT_POLICY=passive $(BIN)/forgather demo $(ARGS)

# The tests are dealt out to as many processes as there are cores; each computes with one thread.
test: lint
	$(BIN)/pytest -n logical --maxprocesses=8 --dist worksteal $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

# Not with --quiet: what it does not say, --strict does not count.
docs: .venv/.docs
	$(BIN)/pytest tests/test_documents.py tests/website $(ARGS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'site/index.html; with its search: $(BIN)/python -m http.server --directory site'

pictures: .venv/.dev
	$(BIN)/python -m website.pictures

soak: .venv/.dev
	$(BIN)/pytest -m soak --timeout=3600 $(ARGS)

bench: .venv/.bench
	$(BIN)/python -m benchmarks $(or $(ARGS),all)

clean:
	rm -rf build dist site .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean
	rm -rf .venv

# A stamp for each set of dependencies: the demo needs neither the tools nor transformers.
.venv/.run: EXTRAS :=
.venv/.dev: EXTRAS := [dev]
.venv/.bench: EXTRAS := [bench]
.venv/.docs: EXTRAS := [dev,docs]
.venv/.run .venv/.dev .venv/.bench .venv/.docs: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)'
	@touch .venv/.run $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "forgather-fn needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
