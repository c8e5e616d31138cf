# Every target creates .venv if it is missing: you only need Python >= 3.10 and pip.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
PACKAGE_FILES = pyproject.toml setup.cfg constraints.txt

.PHONY: demo test test-zoo test-kill test-ecosystem pytest type lint format words check-codestyle commit-checks doc notebooks benchmark clean

demo: $(VENV)/.with-examples
	$(BIN)/python examples/pendulum.py

test: type check-codestyle pytest

# COVERAGE=1 also measures coverage, as continuous integration does; it takes half as long again
pytest: $(VENV)/.with-tests
	$(BIN)/python -m pytest -n auto --dist worksteal $(if $(COVERAGE),--cov --cov-report=term --cov-fail-under=95)

# RL Zoo's front-ends, each in its own process. For films of MuJoCo tasks without a display: apt-get install libegl1 libgl1-mesa-dri
test-zoo: $(VENV)/.with-tests
	$(INSTALL) "gymnasium[box2d]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_cli.py tests/test_zoo.py tests/test_zoo_front_ends.py tests/test_zoo_workers.py -m "slow or not slow"

# A training that is killed twenty times, five minutes
test-kill: $(VENV)/.with-tests
	$(BIN)/python -m pytest tests/test_checkpoint_kill.py -m slow -s

# Projects that train with SB3's SAC, three gigabytes in an environment of their own
test-ecosystem: VENV = .venv-ecosystem
test-ecosystem:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[examples,onnx]" pytest pytest-xdist hypothesis -r tests/ecosystem.txt
	$(INSTALL) --no-deps -r tests/ecosystem-no-deps.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_ecosystem.py -m slow --durations=0

type: $(VENV)/.with-tests
	$(BIN)/mypy

lint: $(VENV)/.with-tests
	$(BIN)/ruff check

format: $(VENV)/.with-tests
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

# Spelling, and phrases that are not standard technical English
words: $(VENV)/.with-tests
	$(BIN)/codespell
	$(BIN)/python tests/vocabulary.py

check-codestyle: words
	$(BIN)/ruff check
	$(BIN)/ruff format --check

commit-checks: format type lint words

doc: $(VENV)/.with-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# Run both at full length and keep the outputs in the files
notebooks: $(VENV)/.with-tests
	OMP_NUM_THREADS=1 $(BIN)/jupyter-execute --inplace --timeout=-1 examples/notebooks/*.ipynb

benchmark: $(VENV)/.with-benchmarks
	$(BIN)/python -m benchmarks.speed.throughput --threads 2

clean:
	rm -rf $(VENV) .venv-ecosystem build dist docs/_build docs/tutorials *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.with-%: $(PACKAGE_FILES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing sb3_softvalue[$*] into $(VENV); this takes some minutes the first time"
	$(INSTALL) -e ".[$*]"
	touch $@
