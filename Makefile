# Every target makes its own environment from nothing; the first one that needs it takes about a minute.
#   PYTHON=/path/to/python3.12   the interpreter to build environments with (found by itself otherwise)
#   TEST_ARGS="-k window -x"     further arguments for pytest

.DEFAULT_GOAL := help
.PHONY: help demo test check aot test-latest test-lowest clean

PYTHON ?=
TEST_ARGS ?=
# Workers cost memory and compile the same programs again, so more than four bring little.
PYTEST = -m pytest -q -n logical --maxprocesses 4 --dist worksteal

VENV := .venv
PIP_INSTALL = -m pip --disable-pip-version-check install -qq

# $(call make_venv,folder): an environment that has a working pip; one that is broken or half made is made again.
define make_venv
	@if ! $(1)/bin/python -m pip --version >/dev/null 2>&1; then \
		python=$$($(SHELL) scripts/find_python.sh "$(PYTHON)") || exit 1; \
		echo "Making $(1) with $$python"; \
		"$$python" -m venv --clear $(1); \
	fi
endef

# $(call show_versions,folder)
define show_versions
	@$(1)/bin/python -m pip --disable-pip-version-check list 2>/dev/null \
		| grep -E '^(jax|flax|orbax-checkpoint|transformers|numpy) ' || true
endef

help:
	@echo "make demo         fetch SmolLM2 and answer by AR and by ISD, token for token the same"
	@echo "make test         the test suite on the pinned releases (TEST_ARGS=... for pytest)"
	@echo "make check        formatting, lint and types"
	@echo "make aot          compile the kernels for H100 and TPUs, which need not be there (half an hour, 3.4 GB)"
	@echo "make test-latest  the test suite on the newest releases that pyproject.toml allows"
	@echo "make test-lowest  the test suite on the oldest releases that pyproject.toml allows"
	@echo "make clean        remove environments, caches and build products (models/ stays)"

demo: $(VENV)/.installed
	@$(VENV)/bin/idlm demo

test: $(VENV)/.installed-eval
	@echo "Running the tests"
	@$(VENV)/bin/python $(PYTEST) $(TEST_ARGS)

check: $(VENV)/.installed-eval
	@echo "Checking formatting, lint and types"
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

# The plug-ins only compile: without a chip neither can be the default device. One process, for a whole step takes gigabytes.
aot: .venv-aot/.installed
	@echo "Compiling for accelerators"
	@JAX_PLATFORMS=cpu .venv-aot/bin/python -m pytest -q -m aot tests/kernels tests/planning $(TEST_ARGS)

.venv-aot/.installed: pyproject.toml requirements/pins.txt requirements/aot.txt
	$(call make_venv,.venv-aot)
	@echo "Installing the pinned packages and the compilers into .venv-aot (minutes the first time)"
	@.venv-aot/bin/python $(PIP_INSTALL) -r requirements/pins.txt -r requirements/aot.txt
	@.venv-aot/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed: pyproject.toml requirements/pins.txt
	$(call make_venv,$(VENV))
	@echo "Installing the pinned packages into $(VENV) (about a minute the first time)"
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/pins.txt
	@$(VENV)/bin/python $(PIP_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-eval: $(VENV)/.installed requirements/eval.txt
	@echo "Installing what evaluation needs into $(VENV) (a minute the first time)"
	@$(VENV)/bin/python $(PIP_INSTALL) -r requirements/pins.txt -r requirements/eval.txt
	@touch $@

# These two ask for the current releases at every run: there is no stamp to be up to date.
test-latest:
	$(call make_venv,.venv-latest)
	@echo "Installing the newest allowed packages into .venv-latest (about a minute the first time)"
	@.venv-latest/bin/python $(PIP_INSTALL) --upgrade --upgrade-strategy eager -e '.[test]'
	$(call show_versions,.venv-latest)
	@.venv-latest/bin/python $(PYTEST) $(TEST_ARGS)

test-lowest:
	$(call make_venv,.venv-lowest)
	@echo "Installing the oldest allowed packages into .venv-lowest (about a minute the first time)"
	@.venv-lowest/bin/python $(PIP_INSTALL) -c requirements/lowest.txt -e '.[test]'
	$(call show_versions,.venv-lowest)
	@.venv-lowest/bin/python $(PYTEST) $(TEST_ARGS)

clean:
	rm -rf $(VENV) .venv-aot .venv-latest .venv-lowest build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
