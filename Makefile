# Two commands do all the set-up: `make demo` and `make test`. Both create the virtual environment they need.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-families test-oldest families families-oldest check fix install clean

demo: $(READY)
	$(BIN)/locum demo --out build/demo --force

test: $(READY)
	$(BIN)/python -m pytest

# Every check on every model family; `make test` runs what does not need the whole matrix.
test-families: $(READY)
	$(BIN)/python -m pytest -m families tests/families

# The oldest transformers that is supported and has a release on the GPU machines: families and round trips.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest tests/test_families.py tests/test_checkpoint.py tests/test_apply.py

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks

fix: $(READY)
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

install: $(READY)

# torch first and by its exact version: asked for any other way, pip would fetch gigabytes of CUDA.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' transformers==5.17.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist

# Every check on every model family of the installed transformers; writes docs/families.md and says what changed.
families: $(READY)
	PYTHONPATH=tests $(BIN)/python -m families.matrix

# The same on the oldest transformers that Locum supports.
families-oldest: $(OLDEST)/.ready
	PYTHONPATH=tests $(OLDEST)/bin/python -m families.matrix
