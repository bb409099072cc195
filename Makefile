# make                    this list
# make cls_p              the default: tiny model, sample data
# make cls_p MODEL=phi2 DATA=goemotions SEED=1 ARGS="--epochs 3"
# make cls_p NPROC=2      two processes, a GPU each if there are
# `python plm.py --help` names the models, the datasets and what ARGS may hold.

MODEL ?= tiny
DATA ?= sample
SEED ?= 42
ARGS ?=
PYTHON ?= python3
VENV ?= .venv
NPROC ?= 1

LAUNCH = $(VENV)/bin/$(if $(filter-out 1,$(NPROC)),torchrun --standalone --nproc-per-node $(NPROC),python)
RUN = $(LAUNCH) plm.py
FLAGS = --model $(MODEL) --data $(DATA) --seed $(SEED) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help cls cls_p lm lm_p q_0s q_0s_p q_1s q_1s_p q_2s q_2s_p data table bench test tiny \
	sample clean

help:  ## this list
	@sed -n 's/^\([a-z0-9_]*\):.*## /\1\t/p' Makefile | expand -t 10
	@echo 'with MODEL= DATA= SEED= ARGS=, as in: make cls_p MODEL=smollm2 ARGS="--max-steps 30"'

$(VENV)/ready: requirements.txt  # the virtual environment, made once
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

cls: $(VENV)/ready  ## CLS: fine-tune with a classification head
	$(RUN) cls $(FLAGS)

cls_p: $(VENV)/ready  ## CLS-P: ... and the user ID in the prompt
	$(RUN) cls_p $(FLAGS)

lm: $(VENV)/ready  ## LM: fine-tune to write the labels
	$(RUN) lm $(FLAGS)

lm_p: $(VENV)/ready  ## LM-P: ... and the user ID in the prompt
	$(RUN) lm_p $(FLAGS)

q_0s: $(VENV)/ready  ## Q-0S: ask the untrained model
	$(RUN) q_0s $(FLAGS)

q_0s_p: $(VENV)/ready  ## Q-0S-P: ... and the user ID in the prompt
	$(RUN) q_0s_p $(FLAGS)

q_1s: $(VENV)/ready  ## Q-1S: ask, with one example
	$(RUN) q_1s $(FLAGS)

q_1s_p: $(VENV)/ready  ## Q-1S-P: ... of the same user
	$(RUN) q_1s_p $(FLAGS)

q_2s: $(VENV)/ready  ## Q-2S: ask, with two examples
	$(RUN) q_2s $(FLAGS)

q_2s_p: $(VENV)/ready  ## Q-2S-P: ... of the same user
	$(RUN) q_2s_p $(FLAGS)

data: $(VENV)/ready  ## download and prepare DATA=goemotions or DATA=unhealthy
	$(RUN) data --data $(DATA) $(ARGS)

table: $(VENV)/ready  ## F1 of every finished run, and what each personalized one gains
	$(RUN) table $(ARGS)

bench: $(VENV)/ready  ## how fast, and beside PEFT and bitsandbytes if these are installed
	$(VENV)/bin/python plm.py bench $(FLAGS)
	@BENCH='$(FLAGS)' $(VENV)/bin/python -m pytest -qs -k bench -rs test_plm.py

test: $(VENV)/ready  ## the tests: under five minutes, no network, no GPU
	$(VENV)/bin/python -m pytest -q test_plm.py

sample: $(VENV)/ready  ## make the simulated annotations anew
	$(VENV)/bin/python data/make_sample.py

tiny: $(VENV)/ready  ## pretrain the tiny models anew
	$(VENV)/bin/python data/make_tiny.py

clean:  ## remove the runs
	rm -rf out
