PYTHON ?= python3
BIN := .venv/bin
TORCH := 'torch==2.13.0'

.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make demo       adapt, train, swap, save and revert SmolLM2-135M (about five minutes)'
	@echo 'make demo-composition  two trained adapters by row, thread, weight and from disk (seven minutes)'
	@echo 'make test       every test, the core alone from its wheel, and the README from the wheels'
	@echo 'make test-fast  the tests that take less than a second each'
	@echo 'make test-thorough  the property tests with ten times as many examples'
	@echo 'make fuzz       faults and damaged files, counted; then by coverage, SECONDS=60 for each reader'
	@echo 'make docs       the documentation as a site, in site/'
	@echo 'make dist       a wheel and an sdist of every distribution, in dist/'
	@echo 'make test-wheels  what the README shows, in an environment that has the wheels alone'
	@echo 'make test-matrix PYTHON=... TORCH=... TRANSFORMERS=...  every test with other versions'
	@echo 'make lint types bench study docs-tables clean'

# torch first and pinned, so that nothing else chooses its version.
.venv/.torch:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

.venv/.demo: .venv/.torch demo/requirements.txt pyproject.toml plugins/adaption_prompt/pyproject.toml plugins/low_rank/pyproject.toml plugins/scale_shift/pyproject.toml plugins/training/pyproject.toml
	$(BIN)/python -m pip install --quiet -e . -e plugins/adaption_prompt -e plugins/low_rank -e plugins/scale_shift -e plugins/training -r demo/requirements.txt
	touch $@

.venv/.test: .venv/.demo tests/requirements.txt docs/requirements.txt
	$(BIN)/python -m pip install --quiet -r tests/requirements.txt
	touch $@

.PHONY: demo
demo: .venv/.demo
	$(BIN)/python demo/run.py

.PHONY: demo-composition
demo-composition: .venv/.demo
	$(BIN)/python demo/composition.py

.PHONY: test
test: test-core-alone test-wheels .venv/.test
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term:skip-covered --cov-fail-under=98

.PHONY: test-fast
test-fast: .venv/.test
	$(BIN)/python -m pytest -n 2 -m 'not slow'

# Ten times as many examples for every property, drawn anew each time.
.PHONY: test-thorough
test-thorough: .venv/.test
	HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest -n 2 tests/property tests/fuzz

# Every test that damages files, fails writes or kills processes, and what it counted; then readers
# steered by coverage. What is found is kept in build/fuzz. READERS="record adapter" chooses some.
SECONDS := 60
READERS :=
.PHONY: fuzz
fuzz: .venv/.test
	$(BIN)/python -m pip install --quiet 'atheris==3.0.0'
	PYTHONPATH=tests $(BIN)/python -m pytest -n 2 -q -p fuzz.tally
	$(BIN)/python -W ignore tests/fuzz/coverage_guided.py $(SECONDS) $(READERS)

# The core from its built wheel, in an environment that has neither plugin nor transformers.
.PHONY: test-core-alone
test-core-alone: .venv-core/.torch
	rm -rf .venv-core/wheels
	.venv-core/bin/python -m pip wheel --quiet --no-deps --wheel-dir .venv-core/wheels .
	.venv-core/bin/python -m pip install --quiet --force-reinstall --no-deps .venv-core/wheels/surgery_core-*.whl
	cd tests && ../.venv-core/bin/python -m pytest -n 2 core property/test_core_*.py

.venv-core/.torch: tests/requirements-core.txt pyproject.toml
	$(PYTHON) -m venv .venv-core
	.venv-core/bin/python -m pip install --quiet $(TORCH)
	.venv-core/bin/python -m pip install --quiet -r tests/requirements-core.txt
	touch $@

.PHONY: lint
lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.PHONY: types
types: .venv/.test
	$(BIN)/mypy

# Of the sources alone: nothing is imported, so no torch is needed.
.PHONY: docs
docs: .venv-docs/.docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

.venv-docs/.docs: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet -r docs/requirements.txt
	touch $@

# Each wheel is built from its sdist.
.PHONY: dist
dist: .venv/.test
	rm -rf dist
	for folder in . plugins/*; do $(BIN)/python -m build --no-isolation --outdir dist $$folder || exit 1; done
	$(BIN)/python -m twine check --strict dist/*

# Nothing of the repository is in the environment but its wheels.
.PHONY: test-wheels
test-wheels: dist
	rm -rf .venv-wheels
	$(PYTHON) -m venv .venv-wheels
	.venv-wheels/bin/python -m pip install --quiet $(TORCH)
	.venv-wheels/bin/python -m pip install --quiet dist/*.whl
	.venv-wheels/bin/python -I tests/e2e/readme.py README.md build/readme

# One cell of the matrix, in an environment of its own; docs/reference/compatibility.md says how.
TRANSFORMERS :=
TESTS := tests
MATRIX = .venv-matrix/$(shell echo '$(notdir $(PYTHON)) $(TORCH) $(TRANSFORMERS)' | tr -cs 'A-Za-z0-9.\n' '-')
.PHONY: test-matrix
test-matrix:
	$(PYTHON) -m venv $(MATRIX)
	$(MATRIX)/bin/python -m pip install --quiet $(TORCH)
	$(MATRIX)/bin/python -m pip install --quiet $(foreach folder,. $(wildcard plugins/*),-e $(folder)) -r tests/requirements.txt
	$(if $(TRANSFORMERS),$(MATRIX)/bin/python -m pip install --quiet --upgrade $(TRANSFORMERS))
	$(MATRIX)/bin/python -m pytest -n 2 $(TESTS)

.PHONY: docs-tables
docs-tables: .venv/.test
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_peft_tables.py

.PHONY: bench
bench: .venv/.test
	$(BIN)/python benchmarks/bench.py --out-dir benchmarks/results

# Goes on where it was; begins anew if benchmarks/results/quality.jsonl is moved away.
.PHONY: study
study: .venv/.test
	$(BIN)/python benchmarks/quality/study.py run
	$(BIN)/python benchmarks/quality/study.py report

.PHONY: clean
clean:
	rm -rf .venv .venv-core .venv-docs .venv-matrix .venv-wheels dist build site
