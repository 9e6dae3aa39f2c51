# Two commands need nothing but Python, git and a network: make demo, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# ArviZ 1.x needs Python 3.12 or later.
PYTHON312 ?= python3.12
VENV1 := .venv-arviz1

.PHONY: help demo test test-arviz1 lint format bench docs linkcheck build smoke clean

help:
	@echo "make demo    train and compare ensembles on handwritten digits (a minute or two)"
	@echo "make test    run all tests"
	@echo "make test-arviz1  run the tests of the export on ArviZ 1.x, with python3.12"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff rewrite the code"
	@echo "make bench   print the tables of benchmarks/"
	@echo "make docs    build the documentation (docs/_build/html); warnings are errors"
	@echo "make linkcheck  check the links of the documentation that leave it"
	@echo "make build   wheel and source distribution (dist/)"
	@echo "make smoke   install both, core dependencies only, in an empty environment and try them"

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/python examples/digits.py

test: $(BIN)/.installed
	$(BIN)/python -m pytest -n 2

$(VENV1)/.installed: pyproject.toml
	test -x $(VENV1)/bin/python || $(PYTHON312) -m venv $(VENV1)
	$(VENV1)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@

test-arviz1: $(VENV1)/.installed
	$(VENV1)/bin/python -m pytest -n 2 tests/test_io_arviz.py tests/test_arviz.py \
		pyro_fordes/io_arviz.py 'tests/test_docs.py::test_python_blocks_run[docs/diagnostics.md]'

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/deep.py
	$(BIN)/python benchmarks/calibration.py

$(BIN)/.docs-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	@touch $@

docs: $(BIN)/.docs-installed
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "open docs/_build/html/index.html"

linkcheck: $(BIN)/.docs-installed
	@if $(BIN)/python -c "import socket; socket.create_connection(('github.com', 443), 10)" 2> /dev/null; \
	then $(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/linkcheck; \
	else echo "no network: links that leave the documentation were not checked"; fi

build:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet build
	rm -rf dist
	$(BIN)/python -m build

smoke: build
	rm -rf dist/venv && $(PYTHON) -m venv dist/venv
	for file in dist/*.whl dist/*.tar.gz; do \
		dist/venv/bin/python -m pip install --quiet --force-reinstall --no-deps $$file && \
		dist/venv/bin/python -m pip install --quiet $$file && \
		(cd dist && venv/bin/python ../tests/smoke.py) || exit 1; done

clean:
	rm -rf $(VENV) $(VENV1)
