# make train-lora            fine-tune the base on the book with LoRA
# make train-full            the same, training every weight
# make compare               table and picture of both runs
# make generate PROMPT="…"   text from the base, and from the base with the adapter
# make parity               this project against PEFT and transformers, number by number
# make bench                how fast and how small, beside PEFT and transformers
# make reference            the reference run's protocol, and what its numbers mean
# make fault                kills, full disks, broken files: what a run survives (ARGS=--short)
# make test | lint | setup | clean
#
# Variables: BASE (auto, gpt2, mini, a directory), BOOK (a text file), OUT (a directory),
# ARGS (any further options of the command).

PYTHON ?= python3
PY := .venv/bin/python
BASE ?= auto
ADAPTER ?= $(or $(OUT),runs/lora)
PROMPT ?= You climb the stair and
TRAIN_OPTIONS = --base '$(BASE)' $(if $(BOOK),--book '$(BOOK)') $(if $(OUT),--out '$(OUT)') $(ARGS)

.PHONY: help setup train-lora train-full compare generate test lint parity bench reference fault \
	pretrain-mini clean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

# A stamp per set of packages: what a target needs is installed once, and again when it changes.
.venv/run: pyproject.toml
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --editable '.[plots]'
	@touch $@

.venv/dev: .venv/run
	$(PY) -m pip install --quiet --editable '.[dev]'
	@touch $@

setup: .venv/dev

train-lora: .venv/run
	$(PY) train.py lora $(TRAIN_OPTIONS)

train-full: .venv/run
	$(PY) train.py full $(TRAIN_OPTIONS)

compare: .venv/run
	$(PY) evaluate.py --compare $(or $(RUNS),runs/lora runs/full) $(ARGS)

generate: .venv/run
	$(PY) generate.py --base '$(BASE)' --adapter '$(ADAPTER)' --with-base --prompt "$$PROMPT" $(ARGS)

generate: export PROMPT := $(PROMPT)

test: .venv/dev
	$(PY) -m pytest -q $(ARGS)

lint: .venv/dev
	$(PY) -m ruff check .

# Our LoRA against PEFT's, number by number; on mini unless BASE names another.
parity: .venv/dev
	$(PY) -m benchmarks.parity $(if $(filter-out auto,$(BASE)),--base '$(BASE)') $(ARGS)

# The fault campaign (docs/reliability.md); ARGS: --short, or parts, such as "kill signals".
fault: .venv/dev
	$(PY) -m tests.fault $(ARGS)

# On a GPT-2 124M of random weights unless BASE names another; ARGS=--quick takes mini.
bench: .venv/dev
	$(PY) -m benchmarks.speed $(if $(filter-out auto,$(BASE)),--base '$(BASE)') $(ARGS)

# The reference run's protocol and measure (docs/reference-run.md); says first how long it takes.
reference: .venv/run
	$(PY) -m benchmarks.reference --base '$(BASE)' $(if $(BOOK),--book '$(BOOK)') $(ARGS)

# How model/mini was made; CORPUS is a directory of UTF-8 texts (model/mini/README.md lists them).
MINI := .cache/mini
HELD_OUT := emma white-fang the-time-machine

pretrain-mini: .venv/run
	@test -n "$(CORPUS)" || { echo "error: name the texts: make pretrain-mini CORPUS=DIR" >&2; exit 2; }
	$(PY) -m data.corpus '$(CORPUS)' --leave-out $(HELD_OUT) --out $(MINI)/corpus.txt
	@mkdir -p $(MINI)/init && cp model/mini/config.json $(MINI)/init
	$(PY) train.py full --base $(MINI)/init --book $(MINI)/corpus.txt --out $(MINI)/run \
		--block-size 256 --stride 256 --batch-size 16 --epochs 1 --lr 2e-3 \
		--warmup-ratio 0.03 --weight-decay 0.1 --base-dropout 0 --val-fraction 0.005 \
		--precision bf16 --compile --eval-every 1000 --checkpoint-every 250 --log-every 25 \
		--seed 1 $(ARGS)
	$(PY) -m model.export --base $(MINI)/run --out $(MINI)/model
	for text in $(HELD_OUT); do \
		$(PY) evaluate.py --base $(MINI)/model --text "$(CORPUS)/$$text.txt" --block-size 256; done

clean:
	rm -rf .venv .cache runs .pytest_cache .hypothesis .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
