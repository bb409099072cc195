# make                    this list
# make cls_p              the default: tiny model, sample data
# make cls_p MODEL=phi2 DATA=goemotions SEED=1 ARGS="--epochs 3"
# `python plm.py --help` names the models, the datasets and what ARGS may hold.

MODEL ?= tiny
DATA ?= sample
SEED ?= 42
METHOD ?= cls_p
ARGS ?=
PYTHON ?= python3
VENV ?= .venv

PY = $(VENV)/bin/python
PLM = $(PY) plm.py
FLAGS = --model $(MODEL) --data $(DATA) --seed $(SEED) $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help majority prior cls cls_p lm lm_p q_0s q_0s_p q_1s q_1s_p q_2s q_2s_p data table \
	predict export lewidi report bench test tiny sample clean

help:  ## this list
	@sed -n 's/^\([a-z0-9_]*\):.*## /\1\t/p' Makefile | expand -t 10
	@echo 'with MODEL= DATA= SEED= ARGS=, as in: make cls_p MODEL=smollm2 ARGS="--max-steps 30"'

$(VENV)/ready: requirements.txt  # the virtual environment, made once
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

cls: $(VENV)/ready  ## CLS: fine-tune with a classification head
	$(PLM) cls $(FLAGS)

cls_p: $(VENV)/ready  ## CLS-P: ... and the user ID in the prompt
	$(PLM) cls_p $(FLAGS)

lm: $(VENV)/ready  ## LM: fine-tune to write the labels
	$(PLM) lm $(FLAGS)

lm_p: $(VENV)/ready  ## LM-P: ... and the user ID in the prompt
	$(PLM) lm_p $(FLAGS)

q_0s: $(VENV)/ready  ## Q-0S: ask the untrained model
	$(PLM) q_0s $(FLAGS)

q_0s_p: $(VENV)/ready  ## Q-0S-P: ... and the user ID in the prompt
	$(PLM) q_0s_p $(FLAGS)

q_1s: $(VENV)/ready  ## Q-1S: ask, with one example
	$(PLM) q_1s $(FLAGS)

q_1s_p: $(VENV)/ready  ## Q-1S-P: ... of the same user
	$(PLM) q_1s_p $(FLAGS)

q_2s: $(VENV)/ready  ## Q-2S: ask, with two examples
	$(PLM) q_2s $(FLAGS)

q_2s_p: $(VENV)/ready  ## Q-2S-P: ... of the same user
	$(PLM) q_2s_p $(FLAGS)

majority: $(VENV)/ready  ## baseline: how often everybody chooses each label
	$(PLM) majority $(FLAGS)

prior: $(VENV)/ready  ## baseline: how often this user chooses each label
	$(PLM) prior $(FLAGS)

data: $(VENV)/ready  ## download and prepare DATA=goemotions, unhealthy or popquorn
	$(PY) data/prepare.py $(DATA) $(ARGS)

table: $(VENV)/ready  ## F1 of every finished run, and what each personalized one gains
	$(PY) data/table.py $(ARGS)

predict: $(VENV)/ready  ## RUN=out/... TEXT="..." USERS=a,b: one sentence, read by some people
	$(PY) plm.py predict $(RUN) --text "$$TEXT" $(if $(USERS),--users "$(USERS)") $(ARGS)

export: $(VENV)/ready  ## RUN=out/...: the adapter as PEFT stores one; MERGE=1: a whole model
	$(PY) data/export.py $(RUN) $(if $(MERGE),--merge)

lewidi: $(VENV)/ready  ## RUN=out/...: the scores of the LeWiDi tasks beside constants, and a submission
	$(PY) data/lewidi.py $(RUN) $(ARGS)

report: $(VENV)/ready  ## out/report.html: every finished run, to look at
	$(PY) data/report.py $(ARGS)

bench: $(VENV)/ready  ## METHOD=cls_p: how fast, and beside PEFT and bitsandbytes if these are installed
	$(PY) data/bench.py $(METHOD) $(FLAGS)

test: $(VENV)/ready  ## the tests: under five minutes, no network, no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -q test_plm.py data

sample: $(VENV)/ready  ## make the simulated annotations anew
	$(PY) data/make_sample.py

tiny: $(VENV)/ready  ## pretrain the tiny models anew
	$(PY) data/make_tiny.py

# Studies of what the paper leaves open. A study runs rows of the table on CSVs that data/vary.py makes
# of DATA, and prints the table. Stopped, it goes on by the same command. `paper`, `exp1`, `exp2` and
# `architectures` keep their runs in OUT with all others; the rest in a folder of their own below it.

OUT ?= out
SEEDS ?= 42 43 44
MODELS ?= tiny tiny_t5
COUNTS ?= 2 4 7
KNOWN ?= 0 5 15
FULL_LR ?= 3e-4
TIME ?= time
COLS ?=   # flags of data/vary.py for a CSV of yours: --text-col comment --user-col worker

NAME = $(basename $(notdir $(DATA)))
VARY = $(PY) data/vary.py $(DATA)
TABLE = $(PY) data/table.py --out
LATER = $(OUT)/later/$(NAME)_later.csv
BASELINES = majority prior
METHODS = q_0s q_0s_p q_1s q_1s_p q_2s q_2s_p cls cls_p lm lm_p

.PHONY: paper exp1 exp2 exp3 unseen later private full architectures

paper: $(VENV)/ready  ## the paper's table: ten methods and two baselines, SEEDS="42 43 44"
	@set -ex; for seed in $(SEEDS); do for method in $(BASELINES) $(METHODS); do \
	    $(PLM) $$method $(FLAGS) --seed $$seed --out $(OUT); done; done
	$(TABLE) $(OUT) --says \
	    'The whole table of the paper: every method on the same test rows; a gain is of a _p over its plain twin.'

exp1: $(VENV)/ready  ## is it worth training? Q-0S against CLS-P
	$(PLM) q_0s $(FLAGS) --out $(OUT)
	$(PLM) cls_p $(FLAGS) --out $(OUT)
	$(TABLE) $(OUT) --says \
	    'What training is worth: q_0s asks the model as it comes; cls_p is trained, and told the reader.'

exp2: $(VENV)/ready  ## does an example help? Q-1S against Q-0S
	$(PLM) q_0s $(FLAGS) --out $(OUT)
	$(PLM) q_1s $(FLAGS) --out $(OUT)
	$(TABLE) $(OUT) --says \
	    'What an example is worth: q_1s shows one solved row in the prompt, q_0s none.'

exp3: $(VENV)/ready  ## CLS-P against LM-P with the COUNTS="2 4 7" most frequent labels
	@set -ex; for n in $(COUNTS); do csv=$(OUT)/exp3/$(NAME)_labels$$n.csv; \
	    $(VARY) $$csv --labels $$n $(COLS); for method in cls_p lm_p; do \
	    $(PLM) $$method $(FLAGS) --data $$csv --out $(OUT)/exp3; done; done
	$(TABLE) $(OUT)/exp3 --says \
	    'Which head: cls_p scores each label, lm_p writes them; the data are the same with fewer labels.'

unseen: $(VENV)/ready  ## new people, of whom training has KNOWN="0 5 15" rows
	@set -ex; for k in $(KNOWN); do csv=$(OUT)/unseen/$(NAME)_known$$k.csv; \
	    $(VARY) $$csv --unseen --known $$k --seed $(SEED) $(COLS); \
	    for method in $(BASELINES) cls cls_p q_2s q_2s_p; do \
	    $(PLM) $$method $(FLAGS) --data $$csv --out $(OUT)/unseen; done; done
	$(TABLE) $(OUT)/unseen --says \
	    'New people: of the test users training has 0, 5 or 15 rows, and q_2s_p two of these as examples.'

later: $(VENV)/ready  ## does it last? train on the earlier, test on the later by the column TIME
	$(VARY) $(LATER) --by-time $(TIME) $(COLS)
	@set -ex; for method in $(BASELINES) cls cls_p; do \
	    $(PLM) $$method $(FLAGS) --data $(LATER) --out $(OUT)/later; done
	$(TABLE) $(OUT)/later --says \
	    'Does it last: trained on the earlier, tested on the later texts; F1 by quarter of the test period.'
	$(PY) data/vary.py $(LATER) --quarters

private: $(VENV)/ready  ## IDs hashed (export PLM_KEY=...), as words, at random with epsilon 1, 3, 8
	@set -ex; for ids in "dp --epsilon inf" hash words "dp --epsilon 1" "dp --epsilon 3" \
	    "dp --epsilon 8"; do csv=$(OUT)/private/$(NAME)_$$(echo $$ids | tr -d ' -').csv; \
	    $(VARY) $$csv --ids $$ids --seed $(SEED) $(COLS); \
	    for method in prior cls_p; do \
	    $(PLM) $$method $(FLAGS) --data $$csv --out $(OUT)/private; done; done
	$(PLM) cls $(FLAGS) --data $(OUT)/private/$(NAME)_dpepsiloninf.csv --out $(OUT)/private
	$(TABLE) $(OUT)/private --says \
	    'What hiding an ID costs: hashes and words nothing, if cls_p stays; the lower epsilon, the more noise.'

full: $(VENV)/ready  ## LoRA r 2, 8, 64 against full fine-tuning; NF4 against weights as stored
	@set -ex; for how in "--r 2" "--r 8" "--r 64" "--r 8 --no-quant" "--tune full --lr $(FULL_LR)"; do \
	    $(PLM) cls_p $(FLAGS) $$how --out $(OUT)/full/$$(echo $$how | tr -d ' -'); done
	$(TABLE) $(OUT)/full/* --says \
	    'What LoRA and NF4 cost: the same cls_p with other ranks, unquantized, and with every weight trained.'

architectures: $(VENV)/ready  ## a decoder against an encoder-decoder, MODELS="tiny tiny_t5"
	@set -ex; for model in $(MODELS); do for method in cls cls_p lm lm_p; do \
	    $(PLM) $$method $(FLAGS) --model $$model --out $(OUT); done; done
	$(TABLE) $(OUT) --says \
	    'A decoder against an encoder-decoder: the same rows, heads and prompts.'

clean:  ## remove the runs, but for answers that were paid for
	if [ -d out ]; then find out -type f ! -name answers.jsonl -delete; find out -type d -empty -delete; fi
