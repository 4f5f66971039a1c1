# Each target sets up what it needs in .venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCHMARKS ?= directional spectrum batch_sharpness stabilization noise edge

# Test processes: each has one thread, and two more where ranks are tested.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope

.PHONY: demo check test test-all coverage lint docs benchmark compatibility clean

# gradient descent and AdamW reach the edge of stability on real data: table, picture, TensorBoard log
demo: $(VENV)/.demo
	$(BIN)/python examples/edge_of_stability.py $(ARGS)

# everything but what is marked slow: in some six minutes on two cores
test: $(VENV)/.ready
	$(PYTEST) $(ARGS)

# those too: before a change of the package lands
test-all: $(VENV)/.ready
	$(PYTEST) -m "not soak" $(ARGS)

# within a minute: formulas, linear algebra, operators, one bit-identity and one oracle of each monitor, the order of imports
check: $(VENV)/.ready
	$(PYTEST) -m check tests/functional tests/linalg tests/operators tests/test_*.py tests/*/test_contract.py $(ARGS)

# which lines the tests run, and which they do not
coverage: $(VENV)/.ready
	$(PYTEST) -m "not soak" --cov --cov-report=term-missing:skip-covered $(ARGS)

# docs/compatibility.md and its evidence, from what the tests find, also those of other packages
compatibility: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[loggers,integrations]"
	$(BIN)/python -m pytest -p tests.compatibility.table --table docs/compatibility.md \
		-m "integrations or not soak" tests/compatibility tests/distributed

# the site, in docs/_build/html; a warning is an error, and nothing is fetched
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# all of them; one with its own options: make benchmark BENCHMARKS=spectrum ARGS=--fast
benchmark: $(VENV)/.ready
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(ARGS); done

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[examples,test,benchmarks]"
	touch $@

# What the demo needs, and no more: unless the whole of .ready is there.
$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e $(VENV)/.ready || $(BIN)/python -m pip install --editable ".[examples]"
	touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) runs docs/_build docs/api/generated
