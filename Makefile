# `make quickstart` shows that it works, `make test` that it is right. Both begin from a bare clone.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := partitioning checkpoints models data objectives training evaluation launch
RUN ?= runs/quickstart

# No accelerator is asked for where one is not: tests run on eight fake CPU devices.
TEST_ENV := JAX_PLATFORMS=cpu
# What a file trains and compiles serves all its tests: they stay on one worker.
PARALLEL := -n 2 --dist loadfile

.PHONY: install lint browser compiler test test-all test-pods quickstart docs bench chaos clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); sys.exit(0 if ok else "make install: $(PYTHON) is Python %d.%d, expected 3.11, 3.12 or 3.13: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $(STAMP)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(TEST_ENV) $(BIN)/python -m pytest tests/test_house.py

# Pages are tested in a headless Chromium.
BROWSERS := chromium chromium-browser google-chrome google-chrome-stable chrome
browser:
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; \
	else echo 'make test: none of $(BROWSERS) is on PATH: install one (Debian: apt-get install chromium)' >&2; exit 2; fi

# Decoding's kernels are compiled.
compiler:
	@command -v c++ >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends g++ >/dev/null; \
	else echo 'make test: no c++ on PATH: install a C++ compiler (Debian: apt-get install g++)' >&2; exit 2; fi

# With libtpu's compiler, and without `transformers`.
test: lint browser compiler
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tpu]'
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL) -m 'not long'

# The long tests too, against `transformers` itself and libtpu's compiler, and the other end of the supported stack: the newest Python with the newest jax.
test-all: lint browser compiler
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity,data,tpu,wandb]'
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL)
	@python3.13 -c '' 2>/dev/null || { echo 'make test-all: python3.13 does not start, expected one on PATH: it runs the suite with jax 0.12' >&2; exit 2; }
	$(MAKE) VENV=.venv313 PYTHON=python3.13 install
	.venv313/bin/python -m pip install --quiet --disable-pip-version-check -e '.[tpu]'
	.venv313/bin/python -c 'import jax; assert jax.__version__.startswith("0.12."), f"jax {jax.__version__}, expected 0.12"'
	$(TEST_ENV) .venv313/bin/python -m pytest $(PARALLEL) -m 'not long'

# Every config of configs/pods compiled for its topology: minutes each.
test-pods: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[tpu]'
	$(TEST_ENV) $(BIN)/python -m pytest tests/launch/test_plan.py -m long -k pod

quickstart: $(STAMP)
	$(BIN)/palmette prepare configs/quickstart.gin
	$(BIN)/palmette train configs/quickstart.gin --out $(RUN)
	$(BIN)/palmette evaluate $(RUN)
	@# Each [MASK] is one piece of the vocabulary, with the space before it.
	$(BIN)/palmette fill $(RUN) \
	  'Return True if the object [MASK] a string.' \
	  '    return [MASK].name' \
	  'def __init__([MASK], name):'
	@echo 'run:         $(RUN)'
	@echo 'TensorBoard: $(BIN)/tensorboard --logdir $(RUN)'
	@echo 'checkpoints: $(RUN)/checkpoints'

# The site, in site/: open site/index.html. A link that leads nowhere is an error.
docs: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m docs.generator
	$(BIN)/zensical build --strict --clean

bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[parity]'
	$(BIN)/python -m benchmarks

# RUNS=100 runs on two hosts, from seed SEED=0 on, each hit by a fault and started again; Ctrl-C ends it with what there is.
chaos: $(STAMP)
	$(BIN)/python -m benchmarks chaos

clean:
	rm -rf .venv .venv313 .pytest_cache .ruff_cache .mypy_cache .hypothesis
