# make demo   fine-tune the embedded model on the embedded reviews: two processes, ZeRO-2, a few minutes on a CPU
# make test   all tests;  make test-fast  those that start no processes;  make lint  ruff and mypy
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# The demo's two processes share the cores.
THREADS := $(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )))
# Tests and the demo use what is installed and reach no hub.
QUIET := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-fast lint format clean

demo: $(READY)
	$(QUIET) DS_ACCELERATOR=cpu OMP_NUM_THREADS=$(THREADS) PATH="$(CURDIR)/$(BIN):$$PATH" \
	  $(BIN)/accelerate launch --config_file launch/zero2.yaml \
	  -m aflora_dist.training.run --preset demo --run.overwrite true

test: $(READY)
	$(QUIET) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

test-fast: $(READY)
	$(QUIET) $(BIN)/python -m pytest -m "not distributed"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,profiling,dev]'
	@touch $(READY)
