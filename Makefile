# make fit: the quickstart. make test: the tests. TORCH="torch==2.13.0" asks for that build of torch; for another one
# in a virtual environment that exists already, make clean first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
BIN := $(VENV)/bin
# Python keeps what it compiles: pytest rewrites every test module otherwise, in each process and at each run
export PYTHONDONTWRITEBYTECODE :=

.PHONY: fit test test-all check lint types matrix corners clean

fit: $(VENV)/installed
	$(BIN)/python train.py fit --config configs/quickstart.yaml

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal

# also what the markers slow, conformance and chaos keep out of the default run
test-all: $(VENV)/installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not pretrained"

check: lint types

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy knows no package-dir: it gets the package as it is installed, made of links
types: $(VENV)/installed-dev
	rm -rf build/types && mkdir -p build/types/layershed
	ln -s $(CURDIR)/src/layershed/* $(CURDIR)/callbacks build/types/layershed/
	$(BIN)/mypy

# environments of old and new versions in build/matrix (some minutes each); writes docs/compatibility.md
matrix: $(VENV)/bin/uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.matrix $(MATRIX)

# a few dozen of these tests, with the oldest versions and with pytorch_lightning alone
corners: $(VENV)/bin/uv
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.matrix --quick

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/bin/uv: $(VENV)/installed-test
	$(BIN)/python -m pip install uv

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install $(if $(TORCH),"$(TORCH)") -e ".[all]"
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install $(if $(TORCH),"$(TORCH)") -e ".[test]"
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install $(if $(TORCH),"$(TORCH)") -e ".[dev]"
	touch $@ $(VENV)/installed-test  # dev holds the test extra
