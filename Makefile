# make                    this list
# make cls_p              the default: tiny model, sample data
# make cls_p MODEL=phi2 DATA=goemotions SEED=1 ARGS="--epochs 3"
# `python plm.py --help` names the models and what ARGS may hold.

MODEL ?= tiny
DATA ?= sample
SEED ?= 42
SEEDS ?= $(SEED)
MODELS ?= tiny tiny_t5
METHOD ?= cls_p
ARGS ?=
PYTHON ?= python3
VENV ?= .venv

PY = $(VENV)/bin/python
FLAGS = --model $(MODEL) --data $(DATA) --seed $(SEED) $(ARGS)
STUDY = --model $(MODEL) --data $(DATA) --seeds $(SEEDS) $(ARGS)

# How often a thread that has nothing to do looks for work before it sleeps. OpenMP's own number, 30
# times this, gains nothing and keeps a core from whatever else wants to run. With 3,000 a run that
# has the machine to itself loses a fifth of its speed (data/SPEED.md).
export GOMP_SPINCOUNT = 10000

.DEFAULT_GOAL := help
.PHONY: help rates rates_p q_0s q_0s_p q_1s q_1s_p q_2s q_2s_p cls cls_p lm lm_p data predict \
	adapt export lewidi table report paper exp1 exp2 exp3 unseen later private full architectures \
	bench test sample tiny clean

help:  ## this list
	@sed -n 's/^\([a-z0-9_]*\):.*## /\1\t/p' Makefile | expand -t 15
	@echo 'with MODEL= DATA= SEED= ARGS=, as in: make cls_p MODEL=smollm2 ARGS="--max-steps 30"'

$(VENV)/ready: requirements.txt  # the virtual environment, made once
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The rows of the paper's table: data/evidence.py has plm.py make the run, and says how far to
# believe its score.

cls: $(VENV)/ready  ## CLS: fine-tune with a classification head
	$(PY) data/evidence.py cls $(FLAGS)

cls_p: $(VENV)/ready  ## CLS-P: ... and the user ID in the prompt
	$(PY) data/evidence.py cls_p $(FLAGS)

lm: $(VENV)/ready  ## LM: fine-tune to write the labels
	$(PY) data/evidence.py lm $(FLAGS)

lm_p: $(VENV)/ready  ## LM-P: ... and the user ID in the prompt
	$(PY) data/evidence.py lm_p $(FLAGS)

q_0s: $(VENV)/ready  ## Q-0S: ask the untrained model
	$(PY) data/evidence.py q_0s $(FLAGS)

q_0s_p: $(VENV)/ready  ## Q-0S-P: ... and the user ID in the prompt
	$(PY) data/evidence.py q_0s_p $(FLAGS)

q_1s: $(VENV)/ready  ## Q-1S: ask, with one example
	$(PY) data/evidence.py q_1s $(FLAGS)

q_1s_p: $(VENV)/ready  ## Q-1S-P: ... of the same user
	$(PY) data/evidence.py q_1s_p $(FLAGS)

q_2s: $(VENV)/ready  ## Q-2S: ask, with two examples
	$(PY) data/evidence.py q_2s $(FLAGS)

q_2s_p: $(VENV)/ready  ## Q-2S-P: ... of the same user
	$(PY) data/evidence.py q_2s_p $(FLAGS)

rates: $(VENV)/ready  ## baseline: how often everybody chooses each label
	$(PY) data/evidence.py rates $(FLAGS)

rates_p: $(VENV)/ready  ## baseline: how often this user chooses each label
	$(PY) data/evidence.py rates_p $(FLAGS)

# Data, and what to do with a finished run.

data: $(VENV)/ready  ## DATA=goemotions (known by name), or FILE=a.csv NAME=my: make data/NAME/
	$(PY) data/prepare.py $(if $(FILE),--file $(FILE) $(if $(NAME),--name $(NAME)),$(DATA)) $(ARGS)

predict: $(VENV)/ready  ## RUN=out/... TEXT="..." USERS=a,b (or CSV=a.csv): some people read it
	$(PY) data/readers.py predict $(RUN) $(if $(CSV),--csv $(CSV),--text="$$TEXT" --users="$$USERS") $(ARGS)

adapt: $(VENV)/ready  ## RUN=out/... CSV=new.csv OUT=out: a run gets to know new people
	$(PY) data/readers.py adapt $(RUN) --csv $(CSV) $(if $(OUT),--out $(OUT)) $(ARGS)

export: $(VENV)/ready  ## RUN=out/...: the adapter as PEFT stores one; MERGE=1: a whole model
	$(PY) data/export.py $(RUN) $(if $(MERGE),--merge) $(ARGS)

lewidi: $(VENV)/ready  ## RUN=out/...: scores as in LeWiDi's shared tasks, and a submission
	$(PY) data/lewidi.py $(RUN) $(ARGS)

table: $(VENV)/ready  ## F1 of every finished run, and what each personalized one gains
	$(PY) data/table.py $(ARGS)

report: $(VENV)/ready  ## out/report.html: every finished run, to look at
	$(PY) data/report.py $(ARGS)

# Studies: data/study.py has a table of them, data/STUDIES.md has what came out. Several seeds, as
# in SEEDS="42 43 44", are averaged; ARGS="--print" prints the commands for other machines.

paper: $(VENV)/ready  ## study: the whole table of the paper, ten methods and two baselines
	$(PY) data/study.py paper $(STUDY)

exp1: $(VENV)/ready  ## study: is it worth training? Q-0S against CLS-P
	$(PY) data/study.py exp1 $(STUDY)

exp2: $(VENV)/ready  ## study: does an example help? Q-1S against Q-0S
	$(PY) data/study.py exp2 $(STUDY)

exp3: $(VENV)/ready  ## study: CLS-P against LM-P with the 2, 4 and 7 most frequent labels
	$(PY) data/study.py exp3 $(STUDY)

unseen: $(VENV)/ready  ## study: new people, known by 0, 5 or 15 rows
	$(PY) data/study.py unseen $(STUDY)

later: $(VENV)/ready  ## study: train on the earlier, test on the later (column `time` of DATA)
	$(PY) data/study.py later $(STUDY)

private: $(VENV)/ready  ## study: IDs hashed (export PLM_KEY=...), as words, or partly at random
	$(PY) data/study.py private $(STUDY)

full: $(VENV)/ready  ## study: LoRA of rank 2, 8, 64 against full fine-tuning; NF4 against none
	$(PY) data/study.py full $(STUDY)

architectures: $(VENV)/ready  ## study: a decoder against an encoder-decoder, MODELS="tiny tiny_t5"
	$(PY) data/study.py architectures --model $(MODELS) --data $(DATA) --seeds $(SEEDS) $(ARGS)

# Around it.

bench: $(VENV)/ready  ## METHOD=cls_p: how fast, and beside PEFT and bitsandbytes if installed
	$(PY) data/bench.py $(METHOD) $(FLAGS)

test: $(VENV)/ready  ## the tests: no network, no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -q test_plm.py data

sample: $(VENV)/ready  ## make the simulated annotations anew
	$(PY) data/make_sample.py

tiny: $(VENV)/ready  ## pretrain the tiny models anew
	$(PY) data/make_tiny.py

clean:  ## remove the runs, but for answers that were paid for
	mkdir -p out
	find out -type f ! -name answers.jsonl -delete
	find out -depth -type d -empty -delete
