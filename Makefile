# Needs Python >= 3.10 and make; everything else is installed into .venv/, one environment for each purpose.
#
#   make test PYTHON=python3.12       another Python
#   make test ARGS="-k memory -x"     more arguments for pytest (or for the quickstart)
#   make quickstart CONSTRAINTS=      the newest versions of everything, instead of those that CI tests
#
# A CUDA build of torch: these environments pin torch's version, not its build. Where pip's configuration leads to a
# CUDA build (on Linux, PyPI's own), they get it. To use an environment and a torch that you have already, leave make out:
#
#   pip install -e '.[examples]' && python examples/quickstart.py     # keeps an installed torch >= 2.6 as it is

PYTHON ?= python3
CONSTRAINTS ?= .ci/constraints.txt
ARGS ?=
WORKERS ?= 2

TEST := .venv/test/bin/python
QUICKSTART := .venv/quickstart/bin/python

# The kernels and the number of threads that decide how torch rounds: what is promised bit for bit holds with each.
ROUNDINGS := ATEN_CPU_CAPABILITY=avx2 ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MEMTUNE_TEST_THREADS=2
EXACT := tests/backbones tests/streams tests/methods tests/tasks tests/models

.PHONY: help docs quickstart test coverage test-fast test-exact fuzz soak lint format clean FORCE
.DELETE_ON_ERROR:

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## *\(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  make %-12s %s\n' "$$name" "$$text"; done

quickstart: .venv/quickstart.stamp  ## train two tasks apart on a small frozen model, and answer both from one pass (3 minutes, no network)
	$(QUICKSTART) examples/quickstart.py $(ARGS)

test: .venv/test.stamp  ## run all tests
	$(TEST) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

coverage: .venv/test.stamp  ## run all tests, and say which lines none of them reaches (half as long again)
	$(TEST) -m pytest --cov -n $(WORKERS) --dist worksteal $(ARGS)

test-fast: .venv/test.stamp  ## run the tests that take seconds
	$(TEST) -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(ARGS)

test-exact: .venv/test.stamp  ## run the exact tests with other kernels and numbers of threads
	@for rounding in $(ROUNDINGS); do echo "$$rounding" && \
		env $$rounding $(TEST) -m pytest -q -m "not slow or exact" -n $(WORKERS) --dist worksteal $(EXACT) $(ARGS) || exit; done

fuzz: .venv/test.stamp  ## give 200,000 changed folders and files to everything that reads them (an hour)
	$(TEST) tests/trust/fuzz.py --workers $(WORKERS) $(ARGS)

soak: .venv/test.stamp  ## kill 500 saves, read 110,000 times beside a writer, share models among threads
	$(TEST) tests/trust/soak.py $(ARGS)

lint: .venv/test.stamp  ## check style, format, types, and that rooms import only rooms below
	$(TEST) -m ruff check
	$(TEST) -m ruff format --check
	$(TEST) -m pyright --pythonpath $(TEST)
	.venv/test/bin/lint-imports

docs: .venv/docs.stamp  ## build the documentation's site into build/site
	NO_MKDOCS_2_WARNING=1 .venv/docs/bin/mkdocs build --quiet

format: .venv/test.stamp  ## put the code into the project's format
	$(TEST) -m ruff check --fix
	$(TEST) -m ruff format

clean:  ## remove the environments and everything that tools left behind
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .coverage htmlcov build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is made anew when its stamp is missing (no install ever came to its end), or when it was made for another
# folder, Python or constraints file (its key differs). When only pyproject.toml or the constraints changed, it is updated.

PACKAGES_test := --editable '.[dev]'
PACKAGES_quickstart := --editable '.[examples]'
PACKAGES_docs := mkdocs-material 'mkdocstrings[python]'
KEY = $(CURDIR) $(PYTHON) $(CONSTRAINTS)
ENVIRONMENTS := test quickstart docs

$(ENVIRONMENTS:%=.venv/%.key): .venv/%.key: FORCE
	@mkdir -p .venv
	@{ test -x .venv/$*/bin/python && echo "$(KEY)" | cmp -s - $@; } || { rm -f .venv/$*.stamp && echo "$(KEY)" >$@; }

$(ENVIRONMENTS:%=.venv/%.stamp): .venv/%.stamp: .venv/%.key pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("memtune needs Python 3.10 or newer; $(PYTHON) is " + sys.version if sys.version_info < (3, 10) else 0)'
	@echo "Setting up .venv/$* (the first time takes some minutes)"
	@test -e $@ || $(PYTHON) -m venv --clear .venv/$*
	@rm -f $@
	.venv/$*/bin/python -m pip install -qq --no-input --disable-pip-version-check \
		$(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) $(PACKAGES_$*) </dev/null
	@touch $@
