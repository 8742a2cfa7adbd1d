# Two commands do all their set-up on a machine that has only Python >= 3.11 and make: `make demo`, `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo docs test test-slow test-all lint lint-style lint-types lint-imports lint-structure minimum bench gpu clean
.DEFAULT_GOAL := test

# editable_mode=compat puts the checkout on the path of $(VENV). Setuptools' default is an import hook, which Python asks
# last: started in the folder above a checkout, it would take the checkout itself for an empty package of the same name.
# uv does in one minute what takes pip three; it does not read pip's settings, so pip does it where they name an index, or where uv fails.
WANTED = --constraint constraints.txt --config-settings editable_mode=compat -e '.[$*]'
PIP    := $(BIN)/python -m pip --disable-pip-version-check
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "featurepipe needs Python >= 3.11; choose one: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), with PyTorch: some minutes, with a line for each package"
	@if ! $(PIP) config list | grep -qE '[.](index-url|no-index)=' && $(PIP) install --quiet uv; \
	then $(BIN)/uv pip install --python $(BIN)/python --cache-dir $(VENV)/.uv $(WANTED) && rm -r $(VENV)/.uv; \
	else false; fi || $(PIP) install --progress-bar off --no-compile $(WANTED)
	@touch $@

# As pip would, but beside the types, which keep one core busy for a minute; some packages have files of Python 2.
$(VENV)/.compiled: $(VENV)/.installed-dev
	@$(BIN)/python -m compileall -qq $(VENV)/lib || true
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/featurepipe demo --out demo-output

# The types take as long as all else, so they are checked beside it; with GNU make >= 4 each step's output stays together.
lint: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory -j 2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) lint-types lint-style lint-imports lint-structure $(VENV)/.compiled

lint-style:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_words.py

lint-types:
	$(BIN)/mypy

lint-imports:
	$(BIN)/lint-imports --no-cache

lint-structure:
	$(BIN)/python tools/measure_structure.py --check

# Two processes on two cores: more threads would wait for each other.
# Each takes half of the list and then from the other's, so that what a module prepares is mostly prepared once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations=30

SELECT := -m 'not slow'
test: lint
	$(PYTEST) $(SELECT)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow tests

# Both at once: modules are imported, and what their tests share is prepared, once.
test-all:
	$(MAKE) --no-print-directory test SELECT=

# The oldest versions that pyproject.toml allows of what it names, in an environment of their own (6 GB): the tests that are most of what
# those packages are used for, and the demo.
MINIMUM := build/minimum
minimum:
	$(PYTHON) -m venv --clear $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(MINIMUM)/bin/uv pip install --quiet --python $(MINIMUM)/bin/python --resolution lowest-direct -r pyproject.toml --extra demo \
		'pytest>=8.3' 'pytest-timeout>=2.3' 'hypothesis>=6.115'
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(MINIMUM)/bin/python -m pytest -m 'not slow' tests/test_cnn_features.py tests/cli/test_extract_text.py tests/heads/bundle \
		tests/heads/test_families.py tests/heads/test_linear.py tests/extraction/test_increments.py tests/extraction/test_compute_shard.py \
		tests/store/test_store.py tests/store/test_parts.py tests/store/test_feature_sets.py tests/store/test_archives.py
	$(MINIMUM)/bin/python -m featurepipe demo --out $(MINIMUM)/demo

bench: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks

# On a machine with a CUDA device, in the Python that has PyTorch for it: nothing is installed. The tests marked gpu and the benchmark, one
# file benchmarks/results/bench_gpu.json, at most 8 minutes.
gpu:
	$(PYTHON) -m benchmarks.bench_gpu --tests --record

# Without a network: the pages where they lie, the interface from docstrings, the options from the parser. Warnings are errors.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -c docs -b html -W --keep-going -q . build/site
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) demo-output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
