"""plm.py: *Personalized Large Language Models* (arXiv 2402.09269) in one file.

Two people read the same comment; one finds it funny, the other hostile. The paper puts the reader's
user ID into the prompt of a language model, fine-tunes the model with QLoRA, and asks how much
better it then predicts the labels that this reader chose. This file is that experiment, from a CSV
of annotations to the F1 score.

    python plm.py cls_p                                 the default: tiny model, sample data
    python plm.py cls_p --model phi2 --data goemotions  the paper's own (first: make data)
    python plm.py lm --model DIR --data file.csv --text-col comment --user-col worker
    python plm.py predict RUN --text "..." --users a,b  a trained model reads for some people

Row of the paper's table -> METHOD. A trailing _p is the personalized twin: it is told the user ID.
    CLS               cls               a classification head reads the end of the prompt
    LM                lm                the language model writes the labels: "anger, joy"
    Q-0S Q-1S Q-2S    q_0s q_1s q_2s    the model is asked untrained, with 0, 1 or 2 examples
    ...-P             ..._p             (the examples are the user's own)
    (baselines)       majority, prior   label rates of everybody, and of each user

Letters in the shapes below:
    R rows (annotations)         L labels                D width of a hidden state   V vocabulary
    T tokens computed            S tokens of the prefix that all prompts share       U users
    N, K out- and inputs of a linear layer               r rank of LoRA
    H, H' heads of queries, of keys and values           E their width; n, m how many of each
    P positions that a head reads                        B prompts of an encoder-decoder

References
    [1] Wozniak et al., Personalized Large Language Models, 2024. arXiv 2402.09269
    [2] Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023. arXiv 2305.14314
    [3] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. arXiv 2106.09685
    [4] bitsandbytes 0.50, whose stored bytes section 4 reproduces: functional.py, csrc/cpu_ops.cpp
    [5] Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021. arXiv 2110.02861
    [6] shared prefixes: Prefix Grouper, arXiv 2506.05433; Tree Training, arXiv 2511.00413
    [7] Sarumi et al., 2024, arXiv 2404.02340: a trained token for each user
"""
import argparse
import csv
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import queue
import random
import re
import resource
import sys
import threading
import time
import timeit
import unicodedata
from collections import Counter, defaultdict, namedtuple
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C before main runs, while torch is loaded, needs no traceback
    sys.excepthook = lambda kind, *e: kind is KeyboardInterrupt or sys.__excepthook__(kind, *e)
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # how long idle threads spin: by default too long

import numpy as np
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
import urllib3
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch.utils._pytree import tree_map
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

HERE = os.path.dirname(os.path.abspath(__file__))
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()  # there are our own

class BadInput(Exception):
    """What the user gave cannot be used; the message says in one line what would have been."""

def check(ok, message):
    """Raises BadInput unless `ok`."""
    if not ok:
        raise BadInput(message)

def progress(items, what, unit, total=None, initial=0):
    """A tqdm bar over items, shown once two seconds have passed; in a file, a line every 10 s."""
    return tqdm(items, what, unit=" " + unit, total=total, initial=initial, delay=2, leave=False,
                dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10)

def write_file(path, content):
    """Writes bytes, or a value as JSON; at any moment the file is the old one or the new one."""
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=1, allow_nan=False).encode()
    with open(path + ".part", "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)

@contextmanager
def reading(what, advice="--fresh starts the run over"):
    """Turns any error into a BadInput that names what was read: such a file may hold anything."""
    try:
        yield
    except Exception as e:
        known = isinstance(e, (BadInput, MemoryError, BrokenPipeError))
        if known or re.search("(out of|allocate) memory", str(e)):
            raise
        why = (getattr(e, "strerror", None) or f"{type(e).__name__}: {e}").split()
        raise BadInput(f"{what}: cannot be used ({' '.join(why)[:200]}); {advice}") from None

def read_json(path):
    """The dict in a JSON file of a run; empty if there is no such file."""
    if not os.path.exists(path):
        return {}
    with reading(path), open(path, encoding="utf-8") as f:
        return {**json.load(f)}

# 1. What can be run -------------------------------------------------------------------------------
# A model, a dataset or a method is a row of a table. A model's row overrules our recipe (but in the
# paper's micro_batch alone), and a flag overrules both.
RECIPES = {
    "ours": dict(
        ids="token",                  # how the prompt names the user: see section 3
        tune="lora", quant=True,      # "full" trains every weight; False leaves them unquantized
        r=8, alpha=32, dropout=0.05,  # LoRA on every linear of the backbone, times alpha / r [3]
        lr=4e-4, head_lr=1,           # learning rate; of the classification head: times lr
        user_lr=75,                   # of the user tokens: times lr, times the embeddings' size
        epochs=3,                     # the epoch with the lowest validation loss is kept
        warmup=0.05, clip=1.0,        # share of all steps; largest norm of the gradient
        batch=32, micro_batch=32)}    # annotations a step; of these computed at once
RECIPES["paper"] = RECIPES["ours"] | dict(ids="number", r=2, lr=1e-4, epochs=10)  # [1]

MODELS = {  # name -> hub id or folder, and what differs from the recipe; [1] has the last five
    "tiny": dict(id=f"{HERE}/data/models/tiny", lr=3e-3, head_lr=3, epochs=4),
    "tiny_t5": dict(id=f"{HERE}/data/models/tiny_t5", lr=1e-3, epochs=8),
    "smollm2": dict(id="HuggingFaceTB/SmolLM2-135M-Instruct", lr=5e-4, epochs=2),
    "flan_t5_small": dict(id="google/flan-t5-small", lr=1e-3),
    "flan_t5_base": dict(id="google/flan-t5-base", lr=5e-4),
    "flan_t5": dict(id="google/flan-t5-xl", micro_batch=8),
    "phi2": dict(id="microsoft/phi-2", lr=1e-4, micro_batch=8),
    "stablelm": dict(id="stabilityai/stablelm-tuned-alpha-3b", lr=1e-4, micro_batch=8),
    "mistral": dict(id="mistralai/Mistral-7B-Instruct-v0.2", lr=1e-4, micro_batch=8),
    "chatgpt": dict(chat="gpt-3.5-turbo")}  # over HTTP; [1] asked it in 2023

# A dataset is data/NAME/annotations.csv; `make data DATA=NAME` makes those that are not there.
DATASETS = {  # name -> columns with other names than text, user and split
    "sample": {}, "goemotions": {}, "unhealthy": {},  # the latter two are those of [1]
    "popquorn": dict(split="draw1", label="offensiveness")}

# head: "cls" and "lm" are trained, "ask" is the LM untrained, "rates" has no model. personalized:
# is the user told? shots: solved examples in the prompt.
Method = namedtuple("Method", "head personalized shots")
METHODS = {
    "majority": Method("rates", False, 0), "prior": Method("rates", True, 0),
    "q_0s": Method("ask", False, 0), "q_0s_p": Method("ask", True, 0),
    "q_1s": Method("ask", False, 1), "q_1s_p": Method("ask", True, 1),
    "q_2s": Method("ask", False, 2), "q_2s_p": Method("ask", True, 2),
    "cls": Method("cls", False, 0), "cls_p": Method("cls", True, 0),
    "lm": Method("lm", False, 0), "lm_p": Method("lm", True, 0)}

# 2. Annotations and splits ------------------------------------------------------------------------
# One row of a CSV is one person's judgement of one text: several 0/1 columns of labels, or one
# column that names the single choice (words, or a rating in numbers). A `split` column is followed
# to the letter. Without one, a hash splits the texts, and validation and test keep only users
# that training knows: the model has met the reader, never the text [1].

Annotation = namedtuple("Annotation", "text user labels")  # labels: (L) of 0 and 1

class Dataset(NamedTuple):
    name: str
    labels: list   # (L) names
    single: bool   # is exactly one label chosen in a row? softmax; else any number, and sigmoids
    ordered: bool  # ... and is it a rating, whose labels are numbers in order?
    none: bool     # are there rows in which nothing is chosen?
    train: list    # of Annotation, as are val and test
    val: list
    test: list
    notes: dict    # what was read and what was left out, in words -> a number or names
    sha: str       # of the file

MISSING = {"", "na", "n/a", "<na>", "nan", "-nan", "null"}  # in upper or lower case
SPELLINGS = {"0/1": {"0": 0, "1": 1, "0.0": 0, "1.0": 1}, "true/false": {"false": 0, "true": 1},
             "yes/no": {"no": 0, "yes": 1}}
ZERO_ONE = {word: value for words in SPELLINGS.values() for word, value in words.items()}
SPLITS = {"": "", "train": "train", "training": "train", "val": "val", "dev": "val",
          "valid": "val", "validation": "val", "test": "test"}

def words_of(text):
    """The words of a text without case and punctuation; -1 is "minus 1", combining marks stay."""
    text = re.sub(r"(?<!\w)-(?=\d)", "minus ", unicodedata.normalize("NFC", text).lower())
    return "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text).split()

@functools.cache
def text_id(text):
    """16 hex digits that stand for a text in files; case and white space make no difference."""
    words = " ".join(text.lower().split())
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]

def split_of(text):
    """'train' (70 %), 'val' (15 %) or 'test' (15 %) by a hash of the text: no seed, no file."""
    share = int(text_id(text)[:8], 16) / 16 ** 8
    return "train" if share < 0.70 else "val" if share < 0.85 else "test"

def user_id(cell):
    """The user that a cell names: 11.0 and 11 are one person, and so are "ann" and "ann "."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", cell.strip())

def csv_rows(path, needed=()):
    """list of (row number, dict of the row) of a CSV file; the one below the header is row 1."""
    csv.field_size_limit(1 << 30)  # a cell may hold more than the csv module's 128 KB
    with reading(path, "a CSV in UTF-8 can"), open(path, newline="", encoding="utf-8-sig") as f:
        first = f.readline()
        delimiter = max(",;\t", key=lambda d: len(next(csv.reader([first], delimiter=d), [])))
        f.seek(0)
        reader, rows = csv.DictReader(f, delimiter=delimiter), []
        columns = reader.fieldnames = [c.strip() for c in reader.fieldnames or ()]
        for number, row in enumerate(reader, 1):
            whole, line = None not in row and None not in row.values(), reader.line_num
            check(whole, f"{path}: row {number} (line {line}): not the {len(columns)} columns")
            rows.append((number, row))
    check(rows, f"{path}: no annotations in it")
    for c in (*columns, *needed):
        n, there = columns.count(c), ", ".join(columns) + " (see --text-col, --user-col)"
        check(n == 1, f"{path}: {n or 'no'} column{'s' * (n > 1)} {c!r}; there are: {there}")
    return rows

def label_columns(path, rows, others):
    """(columns that are mostly 0/1 and all spelled alike, other columns of two values)"""
    found, two_valued, n = defaultdict(list), [], len(rows)
    for column in (c for c in rows[0][1] if c not in others):
        values = Counter(row[column].strip().lower() for _, row in rows)
        mostly = [s for s, words in SPELLINGS.items() if sum(values[w] for w in words) > n / 2]
        if mostly:
            found[mostly[0]].append(column)
        elif len(values) == 2:
            two_valued.append(column)
    there = "; ".join(f"{', '.join(c)} ({s})" for s, c in found.items()) or "no column of 0 and 1"
    check(len(found) == 1, f"{path}: {there}: say --labels A,B or, for one choice, --label-col C")
    return found.popitem()[1], two_valued

def choices(path, column, values):
    """(label names, dict value -> its label, are they ordered?) of a single choice's values."""
    if {value.lower() for value in values} <= ZERO_ONE.keys():
        names = [f"not {column}", column]  # of a column of yes and no
        return names, {value: names[ZERO_ONE[value.lower()]] for value in values}, False
    try:
        names, ordered = {value: f"{float(value):.12g}" for value in values}, True
    except ValueError:
        names, ordered = {value: value for value in values}, False
    labels = sorted({*names.values()}, key=float if ordered else None)
    few = len(labels) <= 100 and all(abs(float(x)) < 1e99 for x in labels if ordered)  # no nan
    check(few, f"{path}: column {column!r} has {len(labels):,} values: not a choice of one")
    return labels, names, ordered

def read_annotations(path, form, skip_missing=False):
    """(list of (Annotation, its split or None), dict(labels, single, ordered), notes) of a CSV."""
    labels = form.get("labels") or ([form["label"]] if form.get("label") else [])
    cells, split_col = [*form["text"].split(","), form["user"]], form.get("split")
    rows = csv_rows(path, [*cells, *labels, *[split_col] * bool(split_col)])
    split_col = split_col or ("split" if "split" in rows[0][1] else None)
    labels, two_valued = (labels, []) if labels else label_columns(path, rows, [*cells, split_col])
    cells += labels
    missing = {n: c for n, row in rows for c in cells if row[c].strip().lower() in MISSING}
    for n, c in missing.items():
        check(skip_missing, f"{path}: row {n}: no {c!r} (--skip-missing: {len(missing)} rows less)")
    notes = {"rows read": len(rows), "left out: a cell is missing": len(missing),
             "columns taken as labels": ", ".join(labels),
             "two-valued columns not taken": ", ".join(two_valued),
             "split by": f"column {split_col}" if split_col else "a hash of the text"}
    rows = [(n, row) for n, row in rows if n not in missing]
    names, single, ordered, found = labels, len(labels) == 1, False, []
    if single:
        names, said, ordered = choices(path, labels[0], {r[labels[0]].strip() for _, r in rows})
        notes["columns taken as labels"] += " (ratings)" * ordered
    for n, row in rows:
        chosen = [ZERO_ONE.get(row[label].strip().lower()) for label in labels]
        if single:
            chosen = [int(name == said[row[labels[0]].strip()]) for name in names]
        odd = [f"{c!r} is {row[c][:40]!r}" for c, y in zip(labels, chosen) if y is None]
        check(not odd, f"{path}: row {n}: label {', '.join(odd)}, not 0 or 1 (see --labels)")
        split = SPLITS.get(row[split_col].strip().lower(), "?") if split_col else None  # by hash
        check(split != "?", f"{path}: row {n}: {row.get(split_col)!r} is not train, val or test")
        text = "\n".join(row[c] for c in form["text"].split(","))
        found.append((Annotation(text, user_id(row[form["user"]]), tuple(chosen)), split))
    return found, dict(labels=names, single=single, ordered=ordered), notes

def split_annotations(found, notes):
    """dict(train, val, test) of lists of Annotation; what is left out goes into `notes`."""
    split, by_hash = dict(train=[], val=[], test=[]), any(part is None for _, part in found)
    for a, part in found:
        if part := split_of(a.text) if by_hash else part:
            split[part].append(a)
    notes["left out: in no split"] = len(found) - sum(map(len, split.values()))
    known, verb = {a.user for a in split["train"]}, "left out" if by_hash else "kept"
    for part in ("val", "test"):
        kept = [a for a in split[part] if a.user in known]
        notes[f"{verb}: {part}, user unknown to training"] = len(split[part]) - len(kept)
        split[part] = kept if by_hash else split[part]
    texts = Counter(x for rows in split.values() for x in {text_id(a.text) for a in rows})
    notes["texts in two splits"] = sum(n > 1 for n in texts.values())
    pairs = Counter(a[:2] for rows in split.values() for a in rows)
    notes["rows that repeat a (text, user)"] = sum(n - 1 for n in pairs.values())
    return split

def some_texts(rows, n):
    """About n rows, all those of randomly chosen texts; the same ones whatever --seed says."""
    order = {a.text: hashlib.sha256(a.text.encode()).digest() for a in rows}
    last = sorted(order[a.text] for a in rows)[:n][-1]
    return [a for a in rows if order[a.text] <= last]

def load_data(name, max_eval=0, skip_missing=False, **columns):
    """The Dataset of a row of DATASETS or of a CSV file; `columns` (text, user, ...) overrule."""
    path = f"{HERE}/data/{name}/annotations.csv" if name in DATASETS else name
    there, known = os.path.isfile(path), ", ".join(DATASETS)
    check(there, f"--data {name}: no file {path} (known: {known}; make data DATA=NAME)")
    check(not (columns.get("labels") and columns.get("label")), "--labels or --label-col, not both")
    form = dict(text="text", user="user") | DATASETS.get(name, {})
    form |= {key: value for key, value in columns.items() if value}
    found, what, notes = read_annotations(path, form, skip_missing)
    split = split_annotations(found, notes)
    for part, rows in split.items():
        out = notes.get(f"left out: {part}, user unknown to training", 0)
        check(rows, f"--data {name}: no row left for {part} ({out} of users unknown to training)")
    for label, rate in zip(what["labels"], np.mean([a.labels for a in split["train"]], 0)):
        check(0 < rate < 1, f"--data {name}: {label!r} never varies ({rate:.0%}; see --labels)")
    split |= {part: some_texts(split[part], max_eval) for part in ("val", "test") if max_eval}
    with open(path, "rb") as f:
        sha = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    none = not all(any(a.labels) for a, _ in found)
    name = name if name in DATASETS else os.path.splitext(os.path.basename(name))[0]
    return Dataset(name, **what, **split, none=none, notes=notes, sha=sha)

def print_data(data):
    """The first lines of a run: what was read, left out and why, and what there is."""
    print("; ".join(f"{what} {n:,}" if type(n) is int else f"{what} {n}"
                    for what, n in data.notes.items() if n))
    print(f"{'':8}{'rows':>8}{'texts':>8}{'users':>7}  how often each label is chosen")
    for part in ("train", "val", "test"):
        rows, labels = getattr(data, part), [*data.labels, *["(nothing)"] * data.none]
        rates = np.mean([[*a.labels, not any(a.labels)] for a in rows], 0)
        often = ", ".join(f"{label} {rate:.1%}" for label, rate in zip(labels, rates))
        texts, users = {a.text for a in rows}, {a.user for a in rows}
        print(f"{part:8}{len(rows):8,}{len(texts):8,}{len(users):7,}  {often}", flush=True)

# 3. Prompts ---------------------------------------------------------------------------------------
# Three parts: the instruction with the list of labels, the text, the user. The paper puts the user
# before the text; here the user comes last, so that section 6 computes what prompts have in common
# once. `ids` says how the prompt names a user: "number", as the paper, by the CSV's own ID; "word"
# by an everyday word, drawn by a hash of the ID; "token" by a token of the user's own, which starts
# out as that word and whose embedding is trained [7]. A prompt of LM-P:
#
#     Which of the labels would this user choose for the text? Answer with labels from the list,
#     separated by commas.
#     ### Labels: funny, hostile, sad
#     ### Text: well done, genius
#     ### User ID: 17                   (or the user's token: see user_namer and embed)
#     ### Response:                     and the LM goes on: " funny, hostile"

QUESTION = {False: "Which of the labels fit the text?",
            True: "Which of the labels would this user choose for the text?"}
SEE = {False: " First see how other people answered.",
       True: " First see how this user answered before."}
ANSWER_WITH = {  # single choice?, may nothing be chosen?
    (True, False): " Answer with one label from the list.",
    (False, False): " Answer with labels from the list, separated by commas.",
    (False, True): " Answer with labels from the list, separated by commas, or with none."}
NONE = "none"  # the answer where no label is chosen

def prompt_parts(method, data, text, user, examples=()):
    """(shared, text, user): lists of pieces, each tokenized by itself; `user` begins at the ID."""
    told = method.personalized
    question = QUESTION[told] + SEE[told] * bool(method.shots) + ANSWER_WITH[data.single, data.none]
    shared = [f"{question}\n### Labels: {', '.join(data.labels)}\n### Text:"]
    body = []
    for x in examples:
        body += [f" {x.text}", "\n### Response:", answer_text(data.labels, x.labels), "\n### Text:"]
    body.append(f" {text}")
    if told:
        return shared, body + ["\n### User ID:"], [f" {user}", "\n### Response:"]
    return shared, body, ["\n### Response:"]

def answer_text(labels, chosen):
    """The answer that an LM is trained to give, the chosen labels in the list's order: ' a, c'."""
    return " " + (", ".join(label for label, y in zip(labels, chosen) if y) or NONE)

def check_labels(data, head):
    """BadInput if a label breaks a list of labels, or if an LM's answer in words could mean two."""
    words = defaultdict(list)
    for label in [*data.labels, *[NONE] * data.none]:
        words[tuple(words_of(label)) or label].append(label)
        fits = "\n" not in label and label.strip() and (data.single or "," not in label)
        check(fits, f"label {label!r}: a comma-separated answer cannot hold it")
    alike = [x for x in words.values() if len(x) > 1] if head in ("lm", "ask") else []
    check(not alike, f"labels {alike}: an answer cannot tell them apart (cls and cls_p can)")

def choose_examples(method, train):
    """A function: a row -> up to `shots` rows of other texts, the user's if told, or others'."""
    by_user = defaultdict(list)
    for a in train:
        by_user[a.user].append(a)
    def choose(asked):
        if not method.shots:
            return []
        rng = random.Random(f"{text_id(asked.text)} {asked.user}")
        rows = by_user[asked.user] if method.personalized else [
            a for a in rng.choices(train, k=100) if a.user != asked.user]
        fit = dict.fromkeys(a for a in rows if text_id(a.text) != text_id(asked.text))
        return rng.sample([*fit], min(method.shots, len(fit)))

    return choose

def tokenize(tokenizer, piece, first=False):
    """Token ids of a piece as it stands inside a prompt (or, `first`, at its beginning). A letter
    goes before it and is cut off again: a SentencePiece tokenizer would otherwise mark it as the
    beginning of a text. Special tokens written inside a piece are read as letters or left out."""
    def plain(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    special, letter, apart = set(tokenizer.all_special_ids), "" if first else "a", piece
    for token in tokenizer.all_special_tokens:  # a SentencePiece vocabulary has "</s>" as a word
        apart = apart.replace(token, f"{token[0]} {token[1:]}")
    for text in (piece, apart):
        ids, mark = plain(letter + text), plain(letter) if letter else []
        ids = ids[len(mark):] if ids[:len(mark)] == mark else plain(text)
        if not special.intersection(ids) - {tokenizer.unk_token_id}:
            return ids
    return [i for i in ids if i not in special or i == tokenizer.unk_token_id]

def frame(tokenizer, chat):
    """(ids before, ids after) a prompt: its <s> or </s>; if `chat`, the model's chat template."""
    if chat and tokenizer.chat_template:
        asked = [{"role": "user", "content": "\0"}]
        around = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        return [tuple(tokenizer(s, add_special_tokens=False).input_ids) for s in around.split("\0")]
    alone, framed = (tokenizer("a", add_special_tokens=x).input_ids for x in (False, True))
    starts = [i for i in range(len(framed)) if framed[i:i + len(alone)] == alone]
    check(starts, "the tokenizer changes a text between its begin and end tokens")
    return tuple(framed[:starts[0]]), tuple(framed[starts[0] + len(alone):])

def user_words(tokenizer, users):
    """dict user -> id of an everyday word, by a hash of the user: distinct while words last."""
    everyday = re.compile("[\u0120\u2581][a-z]{4,9}")  # a mark where the word begins, and the word
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [i for i, token in enumerate(tokens) if token and everyday.fullmatch(token)]
    words, found, taken = words or list(range(len(tokens))), {}, set()
    for user in users:
        place = int(hashlib.sha256(user.encode()).hexdigest()[:8], 16) % len(words)
        while len(taken) < len(words) and place in taken:
            place = (place + 1) % len(words)
        taken.add(place)
        found[user] = words[place]
    return found

class Row(NamedTuple):
    """An annotation in token ids: the prompt in its three parts, and the answer with its end."""
    shared: tuple
    text: tuple
    user: tuple
    answer: tuple
    labels: tuple
    source: Annotation

    @property
    def prompt(self):
        return self.shared + self.text + self.user

def encode(tokenizer, method, data, annotations, name_of, max_text=384):
    """(list of Row, Counter of texts_cut, too_few_examples). `name_of`: see user_namer."""
    known, rows, cut, few, choose = {}, [], set(), 0, choose_examples(method, data.train)
    before, after = frame(tokenizer, chat=method.head == "ask")
    def ids(pieces, texts=(), first=False):
        for piece in pieces:
            if piece not in known:
                known[piece] = tuple(tokenize(tokenizer, piece, first))
            if piece in texts and len(known[piece]) > max_text:
                cut.add(piece)
        return sum((known[p][:max_text] if p in texts else known[p] for p in pieces), ())

    for a in annotations:
        examples = choose(a)
        few += len(examples) < method.shots
        shared, body, user = prompt_parts(method, data, a.text, a.user, examples)
        texts = {f" {x.text}" for x in (a, *examples)}
        who = name_of(a.user) + ids(user[1:]) if name_of and method.personalized else ids(user)
        prompt = before + ids(shared, first=True), ids(body, texts), who + after
        answer = ids([answer_text(data.labels, a.labels)]) + (tokenizer.eos_token_id,)
        rows.append(Row(*prompt, answer, a.labels, a))
    return rows, Counter(texts_cut=len(cut), too_few_examples=few)

# 4. NF4: frozen weights in 4 bits -----------------------------------------------------------------
# The 16 values of NF4 are quantiles of the normal distribution, as trained weights nearly are [2].
# A block of 64 weights is divided by its largest magnitude (absmax); each weight becomes the index
# of the nearest value, two indices a byte, the first in the high half. The absmax themselves take 8
# bits ("double quantization"): less their mean, blocks of 256 are rounded to the 256 values of the
# dynamic map [5] in the same way. Together 4 + 8/64 + 32/(64*256) = 4.127 bits a weight, byte for
# byte what bitsandbytes stores [4].
NF4 = torch.tensor([float(x) for x in """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635
    -0.18477343022823334 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725
    0.24611230194568634 0.33791524171829224 0.44070982933044434 0.5626170039176941
    0.7229568362236023 1.0""".split()])  # a test computes these quantiles anew

@functools.cache
def tables(device):
    """(NF4, values of each byte's two indices, dynamic map (256) [5]), copied to a device once."""
    edges = [torch.linspace(0.1, 1, 2 ** i + 1) for i in range(7)]
    positive = torch.cat([10.0 ** (i - 6) * (e[:-1] + e[1:]) / 2 for i, e in enumerate(edges)])
    dynamic = torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values
    pairs = torch.cartesian_prod(NF4, NF4)
    if device.type == "cpu":  # two floats are moved as one word, which a GPU's compiler cannot fuse
        pairs = pairs.view(torch.int64).view(-1)
    return NF4.to(device), pairs.to(device), dynamic.to(device)

def nearest(values, code):
    """The place of the nearest value of an ascending code."""
    return torch.bucketize(values, (code[1:] + code[:-1]) / 2)

CHUNK = {"cpu": 2 ** 18, "cuda": 2 ** 62}  # weights done at once: in a CPU's cache, 5 times faster

def in_blocks(flat, size):
    """(n) -> (blocks, size), filled up with zeros."""
    return (F.pad(flat, (0, -len(flat) % size)) if len(flat) % size else flat).view(-1, size)

def quantize_nf4(weight):
    """(N, K) -> packed (N*K/2) uint8, absmax (N*K/64) float32; sizes rounded up."""
    packed, absmax = [], []
    for chunk in weight.detach().flatten().split(CHUNK[weight.device.type]):
        blocks = in_blocks(chunk.float(), 64)
        absmax.append(blocks.abs().amax(1))
        # Times the inverse and not divided by it, as [4] does it: the last bit differs.
        scaled = blocks * (1 / absmax[-1].clamp(min=1e-38))[:, None]
        index = nearest(scaled.view(-1), tables(weight.device)[0]).to(torch.uint8)
        packed.append(((index[::2] << 4) | index[1::2])[:(len(chunk) + 1) // 2])
    return torch.cat(packed), torch.cat(absmax)

def quantize_absmax(absmax):
    """absmax (blocks) -> code (blocks) uint8, scale (blocks/256) float32, offset () float32."""
    offset = absmax.mean()
    blocks = in_blocks(absmax - offset, 256)
    scale = blocks.abs().amax(1)
    scaled = blocks * (1 / scale.clamp(min=1e-38))[:, None]
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()  # [4] first rounds to 65,536 even steps
    code = nearest(step.view(-1) / 65535 * 2 - 1, tables(absmax.device)[2])
    return code[:absmax.numel()].to(torch.uint8), scale, offset

def rounded(packed, absmax, pairs, dtype):
    """The weights of some blocks: products in float32, cast last."""
    values = pairs.index_select(0, packed.int()).view(torch.float32).view(-1)
    return (in_blocks(values, 64) * absmax[:, None]).view(-1).to(dtype)

if torch.cuda.is_available():  # one kernel, which moves a tenth of the bytes
    torch._dynamo.config.suppress_errors = True  # the plain way if it cannot be compiled
    rounded = torch.compile(rounded, dynamic=True)

class NF4Matmul(torch.autograd.Function):
    """x (.., K) -> x W^T (.., N). `F.linear(x, layer.dequantize())` would keep the dense W of every
    layer alive until the backward pass; this keeps the layer's bytes and makes W again."""
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(), None  # (.., N) @ (N, K) -> (.., K)

class NF4Linear(nn.Module):
    """A frozen nn.Linear (N, K), its weight in NF4. It computes in `dtype`."""
    weight = None  # T5 asks a layer's weight for its dtype; there is no dense weight to ask
    dense = None   # see keep_dense

    def __init__(self, linear, dtype):
        super().__init__()
        (self.N, self.K), self.dtype, bias = linear.weight.shape, dtype, linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        packed, absmax = quantize_nf4(linear.weight)
        names = "packed", "absmax_code", "absmax_scale", "absmax_offset"
        for name, buffer in zip(names, (packed, *quantize_absmax(absmax))):
            self.register_buffer(name, buffer)

    def absmax(self):
        """(blocks) float32"""
        scale = self.absmax_scale.repeat_interleave(256)[:self.absmax_code.numel()]
        dynamic = tables(scale.device)[2].index_select(0, self.absmax_code.int())
        return dynamic * scale + self.absmax_offset

    def dequantize(self):
        """(N, K) the rounded weights"""
        if self.dense is not None:
            return self.dense
        size, pairs = CHUNK[self.packed.device.type], tables(self.packed.device)[1]
        parts = zip(self.packed.split(size // 2), self.absmax().split(size // 64))
        parts = [rounded(*part, pairs, self.dtype) for part in parts]
        weight = torch.cat(parts) if len(parts) > 1 else parts[0]  # a GPU has one: no second copy
        return weight[:self.N * self.K].view(self.N, self.K)

    def forward(self, x):
        return NF4Matmul.apply(x, self)

# 5. LoRA: what is trained -------------------------------------------------------------------------
# The frozen W gets a companion of low rank [3]:
#     y = W x + (alpha / r) B A dropout(x),   A (r, K), B (N, r), both float32
# A is drawn at random and B is zero, so that the model begins as it was. LoRALinear wraps a layer
# and leaves its bytes alone.

class LoRALinear(nn.Module):
    """base(x) + scaling * B A dropout(x)"""
    weight = None  # see NF4Linear
    masks = None   # see draw_dropout

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / r, dropout
        device = base.packed.device
        self.lora_A = nn.Parameter(torch.empty(r, base.K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.N, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as [3]

    def train(self, mode=True):
        """Casts A and scaling * B to what the layer computes in: once a step, as they change."""
        self.training, dtype, zero = mode, self.base.dtype, torch.zeros(())
        scaling = self.scaling / (1 - self.dropout * mode)  # so that the expectation stays
        # A tuple, lest nn.Module register A twice; add, as mul cannot go backward a second time.
        self.factors = self.lora_A.to(dtype), torch.add(zero, self.lora_B, alpha=scaling).to(dtype)
        return self

    def forward(self, x):
        dropped, (A, B) = x, self.factors
        if self.training and self.dropout:
            # From a random place, a multiple of 16 for the vector units.
            start = 16 * int(torch.randint((len(self.masks) - x.numel()) // 16 + 1, ()))
            dropped = x * self.masks[start:start + x.numel()].view(x.shape)
        return self.base(x) + F.linear(F.linear(dropped, A), B)

def draw_dropout(model, positions):
    """Draws the zeros and ones of a forward pass of at most that many positions. Layers read their
    masks from random places: a draw for each would take a fifth of a step's time on a CPU."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear) and m.training and m.dropout]
    if layers:
        # Twice the longest mask, so that there are many places to read one from.
        n, base = 2 * positions * max(layer.base.K for layer in layers), layers[0].base
        masks = (torch.rand(n, device=base.packed.device) >= layers[0].dropout).to(base.dtype)
        for layer in layers:
            layer.masks = masks

def add_lora(model, r, alpha, dropout):
    """Wraps every NF4Linear of a model in a LoRALinear, in place."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    check(layers, f"{type(model).__name__} has no linear layer for LoRA")
    for path, layer in layers.items():
        model.set_submodule(path, LoRALinear(layer, r, alpha, dropout))

# 6. The prompt tree -------------------------------------------------------------------------------
# The prompts of a batch begin alike: all with the shared prefix, those of one text with that text,
# and in training equal prompts with what their answers begin with. In a decoder the hidden
# state of a token depends on the tokens before it alone, so each distinct prefix is computed once,
# and, dropout aside, loss and gradients stay the same numbers [6]. A batch is one flat sequence of
# nodes without padding: the shared prefix, then text by text, branch by branch. Only attention
# mixes tokens: there a node sees what its parent sees, and itself. Positions count along a branch.

def prompt_tree(paths, S):
    """(ids, position, parent, group: lists over nodes; nodes: those of each path, in order) of
    sorted (group, ids) paths. All share their first S ids, a group's share what they can."""
    ids, position, parent = list(paths[0][1][:S]), list(range(S)), list(range(-1, S - 1))
    groups, nodes, branch, last_group, last = [-1] * S, [], list(range(S)), None, ()
    for group, path in paths:
        known = len(os.path.commonprefix([path, last])) if group == last_group else S
        branch = branch[:known] + [*range(len(ids), len(ids) + len(path) - known)]
        parent += [-1, *branch][known:-1]  # of each new node, the one before it on the branch
        ids += path[known:]
        position += range(known, len(path))
        groups += [group] * (len(path) - known)
        nodes.append(branch)
        last_group, last = group, path
    return ids, position, parent, groups, nodes

def attention_blocks(parent, groups, S, size, dtype):
    """list of (first node, last + 1, mask over the prefix and these): groups until `size` nodes."""
    ends = [i for i in range(1, len(parent)) if groups[i] != groups[i - 1]] + [len(parent)]
    blocks, first = [], 0
    for end in ends:
        if end - first < size and end not in (S, len(parent)):
            continue
        n, prefix = end - first, S if first else 0
        sees = np.eye(n, prefix + n, prefix, bool)  # itself,
        sees[:, :prefix] = True  # the prefix,
        for i in range(n):  # and what its parent sees
            if parent[first + i] >= first:
                sees[i] |= sees[parent[first + i] - first]
        blocks.append((first, end, additive_mask(torch.from_numpy(sees), dtype)))
        first = end
    return blocks

def additive_mask(sees, dtype):
    """(1, 1, n, m): 0 where a node sees another, -inf where it does not."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -math.inf)[None, None]

def attend(q, k, v, mask, causal, scaling):
    """Attention of q (1, H, n, E) to k, v (1, H', m, E); is the mask (1, 1, n, m) causal?"""
    (_, H, n, E), (_, few, m, _) = q.shape, k.shape
    if q.device.type == "cuda":  # its kernel wants as many heads of keys as of queries
        k, v = (t.repeat_interleave(H // few, 1) for t in (k, v))
        mask = None if causal else mask  # the fastest kernel knows this mask by itself
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling)
    # A CPU's kernel is three times slower than this in bfloat16. Heads that share keys are stacked:
    # (H, n) queries become (H', n H / H').
    weights = (q * (scaling or E ** -0.5)).reshape(1, few, -1, E) @ k.transpose(2, 3)
    weights = (weights.view(1, H, n, m) + mask).softmax(-1)
    return (weights.view(1, few, -1, m) @ v).view(1, H, n, E)

def tree_attention(module, query, key, value, attention_mask, scaling=None, *, tree=None, **kwargs):
    """query (1, H, T, E), key, value (1, H', T, E) -> (1, T, H, E); called by transformers."""
    check(tree, f"{type(module).__name__} does not pass arguments on to its attention")
    S, cache, out = tree["S"], tree["cache"], []
    if cache is not None:
        if module.layer_idx in cache:
            key, value = (torch.cat(pair, 2) for pair in zip(cache[module.layer_idx], (key, value)))
        cache[module.layer_idx] = key, value
    for first, end, mask in tree["blocks"]:
        k, v = (torch.cat([t[:, :, :S], t[:, :, first:end]], 2) if first else t[:, :, :end]
                for t in (key, value))
        out.append(attend(query[:, :, first:end], k, v, mask, end == S, scaling))
    return torch.cat(out, 2).transpose(1, 2), None

transformers.AttentionInterface.register("tree", tree_attention)

# 7. The model and its two heads -------------------------------------------------------------------
# The backbone is transformers' own module with its linear layers turned into NF4Linear; its own
# dropout stays off. Heads are neither quantized nor given LoRA: the classification head (L, D) is
# trained whole, the language model's (V, D) stays as it is. In an encoder-decoder the
# classification head reads the decoder's state at its start token. Users with a token of their own
# have the ids V, V + 1, ... and a row each of one more trained matrix (U, D).

def load_pretrained(name):
    """(transformers' model as it is stored, its tokenizer); BadInput if it is not whole."""
    source = MODELS.get(name, {}).get("id", name)
    there = os.path.isdir(source) or re.fullmatch(r"[^./~][^/]*/[^/]+", source)
    check(there, f"--model {name}: no folder, Hugging Face id or name ({', '.join(MODELS)})")
    with reading(f"--model {name}", "a folder of a decoder or T5, or online a hub id, can"):
        config = transformers.AutoConfig.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        for key in ("quantization_config", "num_local_experts", "num_experts"):
            check(not getattr(config, key, None), f"--model {name} has {key}: not supported")
        check(tokenizer.eos_token_id is not None, f"--model {name}: no end token (eos_token)")
        auto, attention = transformers.AutoModelForCausalLM, "tree"
        if config.is_encoder_decoder:
            auto, attention = transformers.AutoModelForSeq2SeqLM, "sdpa"
        lm, info = auto.from_pretrained(source, attn_implementation=attention, dtype="auto",
                                        output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    wrong += [key for key in info["unexpected_keys"] if "scale" in key]  # of integers
    wrong += [path for path, m in lm.named_modules()
              if isinstance(m, nn.Linear) and m.weight[:16].any() and not (m.weight[:16] % 1).any()]
    check(not wrong, f"--model {name}: missing, of another shape or quantized: {wrong[:1]}")
    return lm, tokenizer

def quantize(lm, device, dtype, quant=True):
    """The model, frozen, in `dtype`; layers in NF4, with dense ones beside unless `quant`."""
    linear = {path: layer for path, layer in lm.named_modules()
              if isinstance(layer, nn.Linear) and layer is not lm.get_output_embeddings()}
    for path, layer in progress(linear.items(), "quantize", "layers", len(linear)):
        packed = NF4Linear(layer.to(device), dtype)
        packed.dense = None if quant else layer.weight.detach().to(dtype)  # see keep_dense
        lm.set_submodule(path, packed)
        layer.weight = None  # so that its dense weight goes now
    for param in lm.parameters():  # not the buffers: scales of NF4 and rotary tables are float32
        param.data = param.data.to(dtype, copy=True)  # and no view of the mapped file
    return lm.requires_grad_(False).to(device).eval()

class PersonalizedLM(nn.Module):
    """A backbone with one of the heads; `user_rows` (U, D): what users' embeddings start as."""
    def __init__(self, lm, head, n_labels, user_rows=None):
        super().__init__()
        self.lm, self.head, self.seq2seq = lm, head, lm.config.is_encoder_decoder
        self.device, self.share = lm.device, True  # share: compute once what prompts have in common
        if head == "cls":
            width = lm.get_output_embeddings().weight.shape[1]
            self.score = nn.Linear(width, n_labels, bias=False, device=lm.device)
            nn.init.normal_(self.score.weight, std=0.02)
        self.user_embedding = None if user_rows is None else nn.Parameter(user_rows.float())

    def train(self, mode=True):
        """Dropout is LoRA's alone: the backbone stays as it is at prediction."""
        for layer in self.modules():
            if isinstance(layer, LoRALinear):
                layer.train(mode)
        return self

    def trainable(self):
        """dict name -> parameter of all that is trained: LoRA, the classification head, users."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def embed(self, input_ids):
        """(.., D) the embeddings of tokens, from V on of users; V + U is the mean of all users."""
        words = self.lm.get_input_embeddings()
        if self.user_embedding is None:
            return words(input_ids)
        V = words.weight.shape[0]
        users = self.user_embedding * getattr(words, "embed_scale", 1)  # Gemma 3 scales words so
        rows = torch.cat([users, users.mean(0, keepdim=True)])
        rows = F.embedding((input_ids - V).clamp(min=0), rows).to(words.weight.dtype)
        return torch.where((input_ids < V)[..., None], words(input_ids.clamp(max=V - 1)), rows)

    def hidden(self, batch):
        """(P, D) the hidden states that the head reads. By index_select and not by x[index], whose
        backward pass on a CPU adds up in another order in every run (on a GPU both do)."""
        inputs = dict(batch["inputs"])
        input_ids = inputs.pop("input_ids")
        if not self.seq2seq:
            draw_dropout(self, input_ids.numel())
            out = self.lm.base_model(inputs_embeds=self.embed(input_ids), use_cache=False, **inputs)
            return out.last_hidden_state[0].index_select(0, batch["at"])
        answers, pair = inputs["decoder_input_ids"], inputs["pair"]
        draw_dropout(self, len(pair) * max(input_ids.shape[1], answers.shape[1]))
        mask = inputs["attention_mask"][:, None, None].bool()  # transformers leaves 4-D as it is
        memory = self.encode(input_ids, mask).index_select(0, pair)
        out = self.lm.get_decoder()(
            input_ids=answers, encoder_hidden_states=memory, use_cache=False,
            encoder_attention_mask=mask.index_select(0, pair))
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch["at"])

    def encode(self, input_ids, mask):
        """(B, T, D) what the decoder of an encoder-decoder reads of some prompts."""
        encoder = self.lm.get_encoder()
        return encoder(inputs_embeds=self.embed(input_ids), attention_mask=mask).last_hidden_state

    def token_logits(self, hidden):
        """(P, D) -> (P, V) float32"""
        if getattr(self.lm.config, "scale_decoder_outputs", False):  # a T5 of tied embeddings
            hidden = hidden * self.lm.model_dim ** -0.5
        return self.lm.get_output_embeddings()(hidden).float()

    def forward(self, batch):
        """For each target (L) scores of the labels, or (V) logits of the next token; float32."""
        hidden = self.hidden(batch)
        out = self.score(hidden.float()) if self.head == "cls" else self.token_logits(hidden)
        return out.index_select(0, batch["of"])

def find_device():
    """The GPU if there is one, else the CPU; BadInput if there is one that does not start."""
    if torch.cuda.is_available():
        # cuDNN's attention plans every new shape anew, and shapes change every step here.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", torch.cuda.current_device())
    none = not os.path.exists("/proc/driver/nvidia/version")
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    check(none or wanted, "CUDA does not start; CUDA_VISIBLE_DEVICES= computes on the CPU")
    return torch.device("cpu")

def compute_dtype(device, width):
    """bfloat16 where it is clearly faster, on a CPU by a measurement at the model's width."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        def seconds(a, b):
            return min(timeit.repeat(lambda: a @ b, number=1))  # the best of five

        a, b = torch.ones(512, width), torch.ones(width, width)
        fast = width >= 256 and seconds(a.bfloat16(), b.bfloat16()) < seconds(a, b) / 1.5
    return torch.bfloat16 if fast else torch.float32

def keep_dense(model):
    """Keeps dense copies of the rounded weights if a quarter of the memory holds them; did it?"""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    room = torch.cuda.mem_get_info()[1] if model.device.type == "cuda" else \
        os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = 0 < 4 * sum(m.N * m.K * m.dtype.itemsize for m in layers) < room
    for layer in layers if fits else ():
        layer.dense = layer.dequantize()
    return fits

def user_namer(model, tokenizer, ids, users):
    """A function: user -> the token ids that name the user in a prompt; None for "number"."""
    if ids == "number":
        return None
    V = model.lm.get_input_embeddings().weight.shape[0]
    if ids == "token":
        known = {user: V + i for i, user in enumerate(users)}
        return lambda user: (known.get(user, V + len(users)),)
    known = user_words(tokenizer, users)
    stranger = functools.cache(lambda user: user_words(tokenizer, [*users, user])[user])
    return lambda user: (known[user] if user in known else stranger(user),)

# 8. Batches, and loading a model ------------------------------------------------------------------
# What a head reads and what it should say there is the same for both heads and both kinds of model:
# `inputs` of the backbone; `at` (P), the positions that are read; `of`, for each target its place
# in `at` (the readers of one text share one where their ID is not told); `target`, labels (R, L) or
# the ids of all answers. `tokens` counts what is computed. A first batch checks a new model.

def tree_batch(model, rows, head):
    """The parts of a batch for a decoder; without `share` every row computes its whole prompt."""
    S, groups, paths = len(rows[0].shared) if model.share else 0, {}, []
    for i, row in enumerate(rows):
        group = groups.setdefault(row.text if model.share else i, len(groups))
        answer = row.answer[:-1] if head == "lm" else ()  # the state at a token predicts the next
        paths.append((group, row.prompt + answer))
    distinct = sorted(set(paths))
    ids, position, parent, group_of, nodes = prompt_tree(distinct, S)
    branch, at, of, target = dict(zip(distinct, nodes)), {}, [], []
    for row, path in zip(rows, paths):
        of += [at.setdefault(node, len(at)) for node in branch[path][len(row.prompt) - 1:]]
        target += [row.labels] if head == "cls" else row.answer
    size = 64 if model.device.type == "cpu" else 2048  # a GPU likes few and large calls
    blocks = attention_blocks(parent, group_of, S, size, model.lm.dtype)
    inputs = dict(input_ids=torch.tensor([ids]), position_ids=torch.tensor([position]),
                  tree=dict(S=S, blocks=blocks, cache=None))
    return inputs, at, of, target, dict(tokens=len(ids), branches=nodes)

def pair_batch(model, rows, head):
    """As tree_batch, for an encoder-decoder; it reads both ways, so only equal prompts share."""
    prompts, pairs, at, of, target = {}, {}, {}, [], []
    start = model.lm.config.decoder_start_token_id
    for i, row in enumerate(rows):
        prompt = prompts.setdefault((row.prompt, 0 if model.share else i), len(prompts))
        answer = row.answer if head == "lm" else (None,)  # CLS reads the state at the start token
        pair = pairs.setdefault((prompt, (start, *answer[:-1])), len(pairs))
        of += [at.setdefault((pair, j), len(at)) for j in range(len(answer))]
        target += [row.labels] if head == "cls" else answer
    input_ids, mask = padded([ids for ids, _ in prompts])
    decoder_input_ids, _ = padded([ids for _, ids in pairs])
    inputs = dict(input_ids=input_ids, attention_mask=mask, decoder_input_ids=decoder_input_ids,
                  pair=torch.tensor([prompt for prompt, _ in pairs]))
    at = [pair * decoder_input_ids.shape[1] + j for pair, j in at]
    tokens = sum(len(ids) for ids, _ in prompts) + sum(len(ids) for _, ids in pairs)
    return inputs, at, of, target, dict(tokens=tokens)

def padded(sequences):
    """(ids (B, T), mask (B, T)) of some sequences of ids; the mask goes by their lengths."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()

def to_device(batch, device):
    """A batch on the device. A GPU copies from pinned memory while the host goes on."""
    return batch if device.type == "cpu" else tree_map(
        lambda x: x.pin_memory().to(device, non_blocking=True) if torch.is_tensor(x) else x, batch)

def make_batch(model, rows, head=None):
    """The batch of some rows for this model, on its device."""
    make = pair_batch if model.seq2seq else tree_batch
    inputs, at, of, target, facts = make(model, rows, head or model.head)
    at, of, target = (torch.tensor(list(x)) for x in (at, of, target))
    return to_device(dict(inputs=inputs, at=at, of=of, target=target), model.device) | facts

def in_batches(rows, size, rng=None):
    """Lists of `size` rows sorted by length; with `rng` shuffled, then sorted within 16 batches."""
    by_text, windows, count = defaultdict(list), defaultdict(list), 0
    for row in rows:
        by_text[row.text].append(row)
    texts = list(by_text)
    if rng:
        rng.shuffle(texts)
    for text in texts:
        windows[count // (16 * size) if rng else 0].append(text)
        count += len(by_text[text])
    texts = [text for window in windows.values() for text in sorted(window, key=len)]
    flat = [row for text in texts for row in by_text[text]]
    batches = [flat[i:i + size] for i in range(0, len(flat), size)]
    if rng:
        rng.shuffle(batches)
    return batches

@torch.no_grad()
def check_forward(model):
    """BadInput if our forward pass differs from transformers' own, on the very same weights."""
    lm, V, theirs = model.lm, model.lm.get_input_embeddings().weight.shape[0], []
    ids = [tuple((7 + 13 * n + 29 * j) % min(V, 997) for j in range(n)) for n in (9, 6, 3)]
    rows = [Row(ids[0], text, user, (5, 6), (), None) for text in ids[1:] for user in ids[1:]]
    model.train(False)
    with reading(type(lm).__name__, "take another --model"):
        batch = make_batch(model, rows, head="lm")
        ours = model.token_logits(model.hidden(batch)).index_select(0, batch["of"])
        lm.set_attn_implementation("sdpa")
        for row in rows:
            inputs = dict(input_ids=[row.prompt + (() if model.seq2seq else (5,))])
            if model.seq2seq:
                inputs["decoder_input_ids"] = [[lm.config.decoder_start_token_id, 5]]
            inputs = {name: torch.tensor(x, device=lm.device) for name, x in inputs.items()}
            theirs.append(lm(**inputs, use_cache=False).logits[0, -2:].float())
        lm.set_attn_implementation("sdpa" if model.seq2seq else "tree")
    off = float((ours - torch.cat(theirs)).norm() / torch.cat(theirs).norm())
    check(off < (1e-3 if lm.dtype == torch.float32 else 0.05),
          f"{type(lm).__name__} is not supported: our forward pass is {off:.1%} off")

def load_model(name, head, n_labels, dtype, settings, users=()):
    """(PersonalizedLM, tokenizer), checked and ready to be trained or asked."""
    lm, tokenizer = load_pretrained(name)
    trained, user_rows, device = head != "ask", None, find_device()
    if trained and settings["tune"] == "full":  # for comparison, in float32; not the LM's head
        lm = lm.to(device).float().eval()
        lm.get_output_embeddings().requires_grad_(False)
    else:
        dtype = dtype or compute_dtype(device, lm.config.hidden_size)
        lm = quantize(lm, device, dtype, settings["quant"])
        if trained:
            add_lora(lm, settings["r"], settings["alpha"], settings["dropout"])
    if trained and settings["ids"] == "token" and users:
        words = list(user_words(tokenizer, users).values())
        user_rows = lm.get_input_embeddings().weight.detach()[words]
    model = PersonalizedLM(lm, head, n_labels, user_rows)
    model.share = not settings.get("no_share")
    check_forward(model)
    return model, tokenizer

# 9. Scores and controls ---------------------------------------------------------------------------
# The paper's score is the F1 of each label and their plain mean. Beside it stand: an interval from
# a bootstrap over texts; F1 with thresholds tuned on validation; F1 of each user, and on texts that
# people read differently; F1 with the user IDs shuffled, where the gain of knowing the user has to
# vanish; `listens`, which is 0 for a model that is deaf to the user; and the plain model with a
# bias for each user, a table that a personalized model has to beat.

def f1_scores(gold, predicted):
    """dict(f1_macro, f1_micro, accuracy of whole rows, per_label) of 0/1 arrays (R, L). F1 is
    2TP / (2TP + FP + FN), and 0 where there is nothing (scikit-learn's zero_division=0)."""
    gold, predicted = np.asarray(gold, bool), np.asarray(predicted, bool)
    hits, ticks = 2 * (gold & predicted).sum(0), gold.sum(0) + predicted.sum(0)
    per_label, exact = hits / np.maximum(ticks, 1), (gold == predicted).all(1)
    return dict(f1_macro=float(per_label.mean()), f1_micro=float(hits.sum() / max(ticks.sum(), 1)),
                accuracy=float(exact.mean()), per_label=per_label.tolist())

def bootstrap_f1(gold, predicted, texts, draws=1000):
    """(draws) macro F1 of resampled texts; the same draws for every run on the same texts."""
    gold, predicted = np.asarray(gold, bool), np.asarray(predicted, bool)
    names, of = np.unique(texts, return_inverse=True)
    n, counts = len(names), np.zeros((len(names), 2, gold.shape[1]))
    np.add.at(counts, of, np.stack([2 * (gold & predicted), gold.astype(int) + predicted], 1))
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, n)
    hits, ticks = np.tensordot(times, counts, 1).transpose(1, 0, 2)
    return (hits / np.maximum(ticks, 1)).mean(-1)

def listens(scores, texts):
    """(share of the variance of scores (R, L) between readers of one text, standard deviation)"""
    scores = np.asarray(scores, float)
    _, of = np.unique(texts, return_inverse=True)
    means = np.stack([np.bincount(of, column) for column in scores.T], 1) / np.bincount(of)[:, None]
    total = ((scores - scores.mean(0)) ** 2).mean(0).sum()
    within = ((scores - means[of]) ** 2).mean(0).sum()
    return float(within / max(total, 1e-12)), float(math.sqrt(total / scores.shape[1]))

def probabilities(scores, single):
    """(R, L) of scores."""
    if not single:
        return 1 / (1 + np.exp(-scores))
    e = np.exp(scores - scores.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)

def chosen_labels(scores, single):
    """(R, L) of 0 and 1: the highest score of a single choice, else all above 0."""
    return np.eye(scores.shape[1], dtype=int)[scores.argmax(1)] if single else 1 * (scores > 0)

def tuned_thresholds(gold, scores):
    """(L) the threshold of each label with the best F1 on these rows."""
    best = np.zeros(scores.shape[1])
    for label, (y, s) in enumerate(zip(np.asarray(gold).T, scores.T)):
        order = np.argsort(-s)
        y, s = y[order], np.append(s[order], -np.inf)  # the first i + 1 rows are ticked
        f1 = 2 * np.cumsum(y) / (np.arange(1, len(y) + 1) + y.sum())
        i = int(np.where(s[:-1] > s[1:], f1, -1).argmax())  # equal scores are ticked together
        best[label] = (s[i] + max(s[i + 1], s[i] - 1)) / 2
    return best

def user_bias(gold, scores, users, single, ridge=1.0):
    """dict user -> (L) to add to the scores: ridge logistic regression, the scores its offset."""
    names, of = np.unique(users, return_inverse=True)
    order = np.argsort(of, kind="stable")  # user by user
    gold, scores, of = np.asarray(gold, float)[order], scores[order], of[order]
    starts, bias = np.flatnonzero(np.diff(of, prepend=-1)), np.zeros((len(names), scores.shape[1]))
    for _ in range(100):  # Newton's steps, of at most 1: longer ones may swing for ever
        p = probabilities(scores + bias[of], single)
        up = np.add.reduceat(gold - p, starts) - ridge * bias
        bias += np.clip(0.7 * up / (np.add.reduceat(p * (1 - p), starts) + ridge), -1, 1)
    return dict(zip(names.tolist(), bias))

def predict_rates(data, personalized, rows, strength=5):
    """dict(predicted, scores): log odds of labels in training, a user's shrunk to everybody's."""
    overall, own = np.mean([a.labels for a in data.train], 0), defaultdict(list)
    for a in data.train if personalized else ():
        own[a.user].append(a.labels)
    p = np.array([np.sum([strength * overall, *own[a.user]], 0) / (len(own[a.user]) + strength)
                  for a in rows])
    scores = np.log(p) - (0 if data.single else np.log1p(-p))
    return dict(predicted=chosen_labels(scores, data.single), scores=scores)

def score(data, rows, result):
    """dict of the scores of a run's predictions on test rows."""
    gold, predicted = np.array([a.labels for a in rows]), np.asarray(result["predicted"])
    texts, users = np.array([text_id(a.text) for a in rows]), np.array([a.user for a in rows])
    found = f1_scores(gold, predicted)
    found["f1_macro_ci"] = np.percentile(bootstrap_f1(gold, predicted, texts), [2.5, 97.5]).tolist()
    f1 = {user: f1_scores(gold[users == user], predicted[users == user])["f1_macro"]
          for user in sorted(set(users))}
    about = dict(zip(("percentile_10", "median"), np.percentile([*f1.values()], [10, 50])))
    found["f1_per_user"] = about | dict(mean=sum(f1.values()) / len(f1), users=f1)
    answers = Counter(text for text, _ in {(text_id(a.text), a.labels) for a in rows})
    apart = np.array([answers[text] > 1 for text in texts])
    if apart.any():
        found["f1_disagreed"] = f1_scores(gold[apart], predicted[apart])["f1_macro"]
    shown = probabilities(result["scores"], data.single) if "scores" in result else predicted
    heard, found["spread"] = listens(shown, texts)
    found["listens"] = dict(model=heard, people=listens(gold, texts)[0])
    said = predicted.any(1)  # an answer without a label is no point on a scale
    if data.ordered and said.any():
        off = (gold - predicted)[said] @ np.array(data.labels, float)
        found["mean_absolute_error"] = float(np.abs(off).mean())
    return found

# 10. Training -------------------------------------------------------------------------------------
# The loss of CLS is the cross-entropy of a single choice, else binary cross-entropy of each label;
# that of LM is the cross-entropy of the answer's tokens: the mean over all targets of a step,
# however its rows are cut into micro-batches. AdamW in float32, a cosine schedule with warm-up,
# clipped gradients; the epoch with the lowest validation loss is kept [1]. Dropout depends on seed
# and step alone, so a run that is taken up again needs no random state.

def summed_loss(out, batch, head, single):
    """() the loss of a batch, summed over its targets. out: what the model returned for them."""
    target = batch["target"]
    if head == "cls" and not single:
        return F.binary_cross_entropy_with_logits(out, target.float(), reduction="sum")
    if head == "cls":  # times L: a row counts as L targets, as it does with binary cross-entropy
        return F.cross_entropy(out, target.argmax(1), reduction="sum") * target.shape[1]
    return F.cross_entropy(out, target, reduction="sum")

def learning_rate(step, steps, lr, warmup):
    """The rate of a step (from 0): a line up, then half a cosine down to nearly 0."""
    rise = max(math.ceil(warmup * steps), 1)
    fallen = max(step - rise, 0) / max(steps - rise, 1)
    return lr * min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * fallen)))

def make_optimizer(model, settings):
    """AdamW over LoRA, the classification head and the user tokens, each at its own rate."""
    rows = model.lm.get_input_embeddings().weight
    # A step of AdamW is as long as its rate; T5's embeddings are 100 times as long as SmolLM2's.
    size = torch.linalg.vector_norm(rows, dtype=torch.float32).item() / math.sqrt(rows.numel())
    rates, by_rate = dict(score=settings["head_lr"], user_embedding=settings["user_lr"] * size), {}
    for name, p in model.trainable().items():
        by_rate.setdefault(rates.get(name.partition(".")[0], 1), []).append(p)
    groups = [dict(params=params, times=times) for times, params in by_rate.items()]
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=model.device.type == "cuda")

def step_batches(model, rows, settings, first, steps):
    """Yields (step, epoch, is it the epoch's last?, rows, batches) of the steps after `first`."""
    size, order = settings["micro_batch"], []  # of neighbours, which share most
    for epoch in range(1, settings["epochs"] + 1):
        rng = random.Random(f"{settings['seed']} {epoch - 1}")
        order += [(epoch, part) for part in in_batches(rows, settings["batch"], rng)]
    for step, (epoch, part) in enumerate(order[first:steps], first + 1):
        last = step == steps or order[step][0] > epoch
        batches = [make_batch(model, part[i:i + size]) for i in range(0, len(part), size)]
        yield step, epoch, last, part, batches

def train_step(model, batches, optimizer, lr, clip, single=False):
    """() the loss of one optimizer step: the mean over the targets of all its batches."""
    model.train(True)
    loss, targets = torch.zeros((), device=model.device), sum(b["target"].numel() for b in batches)
    for batch in batches:
        part = summed_loss(model(batch), batch, model.head, single) / targets
        part.backward()
        loss += part.detach()
    nn.utils.clip_grad_norm_(model.trainable().values(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("times", 1)
    optimizer.step()
    optimizer.zero_grad()
    return loss

@torch.no_grad()
def validate(model, rows, single, label_ids, size=64):
    """dict(val_loss, listens, spread), without dropout. Of LM the probabilities are those of the
    first token in which labels differ (`label_ids`: its place, and what it is for each label)."""
    model.train(False)
    total, targets, found = torch.zeros((), device=model.device), 0, []
    for part in progress(in_batches(rows, size), "validate", "batches"):
        batch = make_batch(model, part)
        out = model(batch)
        total += summed_loss(out, batch, model.head, single)
        targets += batch["target"].numel()
        if model.head == "lm":
            starts = np.cumsum([0] + [len(row.answer) for row in part[:-1]])
            p = out[starts + label_ids[0]].softmax(1)[:, label_ids[1]]
        else:
            p = out.softmax(1) if single else out.sigmoid()
        found += zip(p.cpu().numpy(), (text_id(row.source.text) for row in part))
    heard, spread = listens(*zip(*found))
    return dict(val_loss=total.item() / targets, listens=round(heard, 4), spread=round(spread, 4))

STATE, SAVE_EVERY = "state.safetensors", 120  # seconds; and after every epoch
DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)

def save_state(path, state, params, optimizer, best):
    """Writes what a run needs to go on: trained parameters, those of the best epoch, AdamW's."""
    tensors = {f"param.{name}": p.detach() for name, p in params.items()}
    tensors |= {f"best.{name}": p for name, p in best.items()}
    tensors |= {f"{key}.{n}": x for n, p in params.items() for key, x in optimizer.state[p].items()}
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    write_file(path, safetensors_bytes(tensors, {"state": json.dumps(state)}))

def load_state(path, params, optimizer):
    """(state, parameters of the best epoch) of save_state, or new ones; puts the rest in place."""
    state = dict(step=0, log=0, rows=0, seconds=0.0, listens=0.0, val_loss=math.inf, dtype="")
    if not os.path.exists(path):
        return state, {}
    with reading(path), safe_open(path, "pt") as f:
        found = json.loads(f.metadata()["state"])
        best = {name: f.get_tensor(f"best.{name}").to(p).view_as(p) for name, p in params.items()
                if f"best.{name}" in f.keys()}
        for name, p in params.items():
            p.data.copy_(f.get_tensor(f"param.{name}").view_as(p))
            for key, like in dict(step=torch.zeros(()), exp_avg=p, exp_avg_sq=p).items():
                optimizer.state[p][key] = f.get_tensor(f"{key}.{name}").to(p).view_as(like)
        print(f"resuming at step {found['step']}, in {found['dtype']}", flush=True)
        return {key: type(value)(found[key]) for key, value in state.items()}, best

def train(model, rows, val_rows, single, settings, folder, label_ids):
    """Trains on from the state in `folder`, if any; keeps the best epoch, returns the state."""
    params, optimizer, saved = model.trainable(), make_optimizer(model, settings), time.time()
    steps = settings["epochs"] * math.ceil(len(rows) / settings["batch"])
    steps = min(steps, settings["max_steps"] or steps)
    dtype, log = str(model.lm.dtype).removeprefix("torch."), open(f"{folder}/log.jsonl", "a", 1)
    state, best = load_state(f"{folder}/{STATE}", params, optimizer)
    stream = step_batches(model, rows, settings, state["step"], steps)
    ahead = next(stream, None)
    with log, progress(None, "train", "steps", steps, state["step"]) as bar:
        log.truncate(min(state["log"], log.tell()))  # what it held when the state was saved
        while ahead:
            start, (step, epoch, last, part, batches) = time.perf_counter(), ahead
            lr = learning_rate(step - 1, steps, settings["lr"], settings["warmup"])
            torch.manual_seed(1000003 * settings["seed"] + 1009 * (step - 1))
            loss = train_step(model, batches, optimizer, lr, settings["clip"], single)
            ahead = next(stream, None)  # built while a GPU computes
            loss, n = loss.item(), sum(batch["tokens"] for batch in batches)
            print(json.dumps(dict(step=step, epoch=epoch, loss=loss, lr=lr, tokens=n)), file=log)
            check(math.isfinite(loss), f"loss {loss} at step {step}: lower --lr")
            state |= dict(step=step, rows=state["rows"] + len(part),
                          seconds=state["seconds"] + time.perf_counter() - start)
            bar.set_postfix(dict(epoch=epoch, loss=loss, listens=state["listens"]), False)
            bar.update()
            if last:
                found = validate(model, val_rows, single, label_ids, settings["micro_batch"])
                print(json.dumps(dict(step=step, epoch=epoch, **found)), file=log)
                check(math.isfinite(found["val_loss"]), f"validation: {found}: lower --lr")
                says = ", ".join(f"{key} {value:.4f}" for key, value in found.items())
                (bar.write if state["seconds"] > 2 else print)(f"epoch {epoch}: {says}")
                if found["val_loss"] < state["val_loss"]:
                    best = {name: p.detach().clone() for name, p in params.items()}
                state |= dict(found, val_loss=min(found["val_loss"], state["val_loss"]))
            if last or time.time() - saved > SAVE_EVERY:
                state, saved = state | dict(log=log.tell(), dtype=dtype), time.time()
                save_state(f"{folder}/{STATE}", state, params, optimizer, best)
    model.load_state_dict(best, strict=False)
    return state

# 11. Prediction -----------------------------------------------------------------------------------
# CLS ticks the labels whose scores are above 0; if only one can be chosen, that of the highest. LM
# writes, by greedy decoding: the prompts of a batch are a tree as before, and every answer grows on
# at its leaf; the answer is read back into labels.
MAX_ANSWER = 48  # tokens; the authors allow as many as all labels together, which nobody ticks

@torch.no_grad()
def for_each_batch(model, rows, function, size):
    """List of what function(`size` rows) returns for each row, in the order of the rows."""
    model.train(False)
    batches = progress(in_batches(rows, size), "predict", "batches")
    found = {id(row): x for part in batches for row, x in zip(part, function(part))}
    return [found[id(row)] for row in rows]

def grow_answers(model, rows, ends, limit):
    """Greedy decoding with a decoder: the ids of each answer, whose nodes go behind all others."""
    batch, cache = make_batch(model, rows, head="cls"), {}  # the ends of prompts alone are read
    batch["inputs"]["tree"]["cache"] = cache
    hidden, n = model.hidden(batch), len(batch["at"])
    branch_of = {branch[-1]: branch for branch in batch["branches"]}
    sees = torch.zeros(n, batch["tokens"], dtype=torch.bool)
    for i, leaf in enumerate(batch["at"].tolist()):
        sees[i, branch_of[leaf]] = True
    start = sees, torch.eye(n, dtype=torch.bool), sees.sum(1), torch.arange(n)
    sees, own, position, at = to_device(start, model.device)
    ends = torch.tensor(sorted(ends), device=model.device)
    answers = torch.empty(n, 0, dtype=torch.long, device=model.device)
    while True:
        answers = torch.cat([answers, model.token_logits(hidden).argmax(1, keepdim=True)], 1)
        if answers.shape[1] == limit or torch.isin(answers, ends).any(1).all():
            return answers[batch["of"]].tolist()
        sees = torch.cat([sees, own], 1)
        tree = dict(S=0, cache=cache, blocks=[(0, None, additive_mask(sees, model.lm.dtype))])
        inputs = dict(input_ids=answers[:, -1:].T, position_ids=position[None], tree=tree)
        hidden, position = model.hidden(dict(inputs=inputs, at=at)), position + 1

def write_answers(model, rows, ends, limit):
    """Greedy decoding with an encoder-decoder: the answer of each row in ids."""
    batch = make_batch(model, rows, head="cls")
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    memory = BaseModelOutput(last_hidden_state=model.encode(ids, mask))
    out = model.lm.generate(
        encoder_outputs=memory, attention_mask=mask, max_new_tokens=limit, do_sample=False,
        num_beams=1, eos_token_id=sorted(ends), pad_token_id=min(ends))
    return out[batch["of"], 1:].tolist()

def written_answers(model, tokenizer, rows, limit, size=64):
    """The answer of each row as a string, in the order of the rows."""
    # Many chat models end a turn with another token than the tokenizer's.
    also = getattr(model.lm.generation_config, "eos_token_id", None) or []
    ends = {tokenizer.eos_token_id, *(also if isinstance(also, list) else [also])}
    write = write_answers if model.seq2seq else grow_answers
    def answers(part):
        ids = [list(takewhile(lambda i: i not in ends, x)) for x in write(model, part, ends, limit)]
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    return for_each_batch(model, rows, answers, size)

def parse_answer(answer, labels, single=False):
    """((L) zeros and ones, number of words that belong to no label). Of labels that begin alike the
    longest is meant, of a single choice the first."""
    said = {}  # the words of a label -> the label
    for i, label in enumerate(sorted(labels, key=len, reverse=True)):
        name = " ".join(words_of(label)) or f"symbol{i}"  # a word for a label of symbols alone
        answer = answer if words_of(label) else answer.replace(label, f" {name} ")
        said[name] = label
    names, words = "|".join(sorted(said, key=len, reverse=True)), " ".join(words_of(answer))
    whole = rf"(?<!\S)(?:{names})(?!\S)"  # words are letters and digits: none to escape
    found = [said[name] for name in re.findall(whole, words)][:1 if single else None]
    unknown = sum(word != NONE for word in re.sub(whole, "", words).split())
    return tuple(int(label in found) for label in labels), unknown

def read_answers(answers, data):
    """dict(predicted (R, L), answers, unknown_words, unreadable: answers that say nothing)"""
    ends = [re.split("</think>", a, flags=re.I)[-1] for a in answers]
    ends = ["" if "<think>" in a.lower() else a for a in ends]  # a thought that did not end
    predicted, unknown = zip(*(parse_answer(a, data.labels, data.single) for a in ends))
    said = [any(p) or words_of(a) == [NONE] and not data.single for p, a in zip(predicted, ends)]
    return dict(predicted=np.array(predicted), answers=answers, unknown_words=sum(unknown),
                unreadable=len(said) - sum(said))

def predict(model, tokenizer, method, data, config, users, annotations):
    """dict(predicted (R, L), texts_cut, ...); CLS adds scores (R, L), LM what read_answers has."""
    name_of = user_namer(model, tokenizer, config["ids"], users)
    rows, counts = encode(tokenizer, method, data, annotations, name_of, config["max_text"])
    size = 2 * config["micro_batch"]
    if model.head == "cls":
        scores = np.array(for_each_batch(
            model, rows, lambda part: model(make_batch(model, part)).cpu().numpy(), size))
        return dict(counts, predicted=chosen_labels(scores, data.single), scores=scores)
    limit = len(tokenize(tokenizer, answer_text(data.labels, [1] * len(data.labels)))) + 1
    answers = written_answers(model, tokenizer, rows, min(limit, MAX_ANSWER), size)
    return dict(counts, **read_answers(answers, data))

# 12. ChatGPT --------------------------------------------------------------------------------------
# A model that cannot be downloaded is asked over HTTP, in the protocol that OpenAI made and many
# servers speak. An answer costs money: it is on disk as soon as it is there, is never asked for
# again and serves all rows with that prompt. Workers take requests from one queue and report to
# another; the main thread alone counts and writes. The key gets into no file or message.
OPENAI = "https://api.openai.com/v1"  # unless OPENAI_BASE_URL names another server
TOKENS = ("prompt_tokens", "completion_tokens")  # as a server counts them
CONNECT, READ, DEADLINE = 10, 120, 600  # seconds to connect, of silence, for new attempts
RETRIES = 8   # where a third of all attempts fail, 9 in a row do for one request in 20,000
BACKOFF = 1   # seconds to the second attempt, then 2, 4, ... 20; at random down to half of that
GIVE_UP = 20  # requests that fail one after the other: it is not the rows then; the run stops

def parse_reply(said):
    """("answered", reply) or ("failed", why); None of an odd body. A refusal is an empty answer."""
    with suppress(Exception):  # a body may be anything
        reply = json.loads(said)
        choice, usage = reply["choices"][0], reply.get("usage") or {}  # not every server counts
        parts = choice["message"].get("content") or ""  # a list of parts; a string is one too
        text = "".join(p if isinstance(p, str) else p.get("text") or "" for p in parts).strip()
        if not text and choice.get("finish_reason") == "length":
            return "failed", "the model used up its tokens before it began to answer"
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be kept
        return "answered", dict(answer=text, **{k: int(usage.get(k) or 0) for k in TOKENS})

def ask_once(session, url, key, body, names, events):
    """("answered", reply), ("failed", why), ("stop", why). `names`: field -> this server's name."""
    until, wait, why = time.monotonic() + DEADLINE, 0, ""
    for attempt in range(1 + RETRIES):
        if time.monotonic() + wait > until:
            why = f"too late for an attempt in {wait:.0f} s, after {why}"
            break
        time.sleep(wait)
        events.put((None, "sent", None))
        sent = {name: value for k, value in body.items() if (name := names.get(k, k))}
        wait = min(20, BACKOFF * 2 ** attempt) * random.uniform(0.5, 1)
        try:
            response = session.post(url, json=sent, timeout=(CONNECT, READ), allow_redirects=False)
            status, said = response.status_code, response.content.decode("utf-8", "replace")
            why = f"HTTP {status}: {said}"
            if status < 300 and (event := parse_reply(said)):
                names.update((k, k) for k in body if k in sent)  # a later 400 is about its row
                return event
            if status in (401, 403, 404) or 300 <= status < 400:
                return "stop", f"HTTP {status}: wrong OPENAI_API_KEY, OPENAI_BASE_URL or --model"
            wait = max(wait, urllib3.Retry().get_retry_after(response.raw) or 0)
            named = status in (400, 422) and re.search(r"\b(max_tokens|temperature|seed)\b", said)
            if named and named[1] in sent and names.get(named[1]) != named[1]:
                wait, names[named[1]] = 0, {"max_tokens": "max_completion_tokens"}.get(named[1])
            elif 400 <= status < 500 and status not in (408, 409, 425, 429):
                break  # the next attempt would end like this one
        except ValueError as e:  # an address or a proxy that cannot be
            return "stop", str(e)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
            why = next((x.reason for x in (e, *e.args) if getattr(x, "reason", None)), e)
    return "failed", " ".join(str(why).replace(key, "[key]").split())[:200]

def start_workers(bodies, concurrency):
    """The queue of events (sha, kind, value) for dict sha -> body. It holds one: a worker that is
    not heard does not send, so none gets ahead of the disk or goes on when the run has stopped."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    base = (os.environ.get("OPENAI_BASE_URL") or OPENAI).strip().rstrip("/")
    check(re.fullmatch("[!-~]+", key), "set OPENAI_API_KEY (to any word if the server needs none)")
    valid = re.fullmatch(r"https?://([\w.-]+|\[[\da-f:]+\])(:\d+)?(/[^@?#\s]*)?", base, re.I)
    check(valid, f"OPENAI_BASE_URL has to be like {OPENAI}, with no user or key in it")
    todo, events, names, url = queue.SimpleQueue(), queue.Queue(1), {}, f"{base}/chat/completions"
    def work():
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {key}"
        session.auth = lambda request: request  # without one, a .netrc would replace the header
        try:
            for sha, body in iter(todo.get, None):
                events.put((sha, *ask_once(session, url, key, body, names, events)))
        except Exception as e:  # a mistake in this file
            events.put((None, "stop", repr(e).replace(key, "[key]")))

    for item in (*bodies.items(), *[None] * concurrency):
        todo.put(item)
    for _ in range(concurrency):
        threading.Thread(target=work, daemon=True).start()  # and none outlives the run
    return events

def finished_answers(path):
    """dict sha -> reply of the answers file; half a line at its end, left by a kill, is cut off."""
    finished = {}
    with suppress(FileNotFoundError), open(path, "rb+") as f:
        *lines, half = f.read().split(b"\n")
        f.truncate(f.tell() - len(half))
        for line in lines:
            with suppress(Exception):  # no answer: it is asked for again
                x = json.loads(line)
                finished[x["sha"]] = dict({k: int(x[k]) for k in TOKENS}, answer=x["answer"] + "")
    return finished

def ask_chatgpt(prompts, path, model, seed=42, limit=MAX_ANSWER, concurrency=8):
    """(answers to the prompts, dict of counts); `path` keeps all answers. BadInput if one fails."""
    same = dict(model=model, temperature=0, seed=seed, max_tokens=limit)
    bodies = [same | dict(messages=[dict(role="user", content=prompt)]) for prompt in prompts]
    shas = [hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest() for x in bodies]
    answered, failed, count, in_a_row = finished_answers(path), {}, Counter(), 0
    todo = {sha: body for sha, body in zip(shas, bodies) if sha not in answered}
    if todo:
        events = start_workers(todo, concurrency)
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "a", buffering=1) as f, progress(None, "ask", "requests", len(todo)) as bar:
            while count["answered"] + count["failed"] < len(todo):
                sha, kind, value = events.get()
                count[kind] += 1
                bar.set_postfix(count, False)
                bar.update(kind != "sent")
                if kind == "answered":
                    answered[sha], in_a_row = value, 0
                    f.write(json.dumps(dict(sha=sha, **value)) + "\n")
                    os.fsync(f.fileno())
                elif kind == "failed":
                    failed[sha], in_a_row = value, in_a_row + 1
                if kind == "stop" or in_a_row == GIVE_UP:
                    raise BadInput(f"{value} ({len(failed)} failed; the answers are in {path})")
    example = next((f"test row {shas.index(sha) + 1}: {why}" for sha, why in failed.items()), "")
    check(not failed, f"{len(failed)} of {len(todo)} requests failed, as {example}; "
                      f"the same command asks for the rest ({path})")
    counts = {name: sum(answered[sha][name] for sha in {*shas}) for name in TOKENS}
    counts |= dict(requests=count["sent"], retries=count["sent"] - len(todo))
    return [answered[sha]["answer"] for sha in shas], counts

# 13. One experiment from end to end ---------------------------------------------------------------
# A run lives in out/<data>/<model>/<method>/seed<S>/, a folder that belongs to one configuration
# (run.json) and to one process at a time. The same command resumes a stopped run, and prints the
# summary of a finished one again. metrics.json comes last.

def model_name(model):
    """What a model is called in folders and tables: its name, else the last part of its path."""
    return os.path.basename(os.path.abspath(model)).replace(":", "_")

@contextmanager
def run_folder(folder, config, fresh):
    """Takes a run's folder, if it is of this configuration, and yields the metrics it may hold."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BadInput(f"{folder}: another process runs this; wait, or use --out") from None
        for name in os.listdir(folder) if fresh else ():
            if os.path.isfile(f"{folder}/{name}") and name not in ("lock", "answers.jsonl"):
                os.remove(f"{folder}/{name}")  # not the answers: they were paid for
        begun = any(os.path.exists(f"{folder}/{name}") for name in ("metrics.json", STATE))
        there = read_json(f"{folder}/run.json") if begun else {}
        odd = [key for key in there | config if there and there.get(key) != config.get(key)]
        odd = ", ".join(f"{key} {there.get(key)} there, {config.get(key)} here" for key in odd[:3])
        check(not odd, f"{folder} holds another run ({odd}): --fresh, or --out DIR to keep it")
        write_file(f"{folder}/run.json", config)
        yield read_json(f"{folder}/metrics.json")

def write_predictions(path, data, rows, result, gold=True):
    """predictions.csv: one line a row, with what was really chosen if that is known (`gold`)."""
    lines = io.StringIO(newline="")
    writer, answers = csv.writer(lines), result.get("answers")
    more = ["answer"] if answers else [f"score:{label}" for label in data.labels]
    writer.writerow(["text_id", "user", *["gold"] * gold, "predicted", *more])
    for i, a in enumerate(rows):
        more = [answers[i]] if answers else [f"{s:.5f}" for s in result["scores"][i]]
        chosen = [a.labels] * gold + [result["predicted"][i]]
        said = [answer_text(data.labels, labels).strip() for labels in chosen]
        writer.writerow([text_id(a.text), a.user, *said, *more])
    write_file(path, lines.getvalue().encode("utf-8", "replace"))

def peak_memory_mb():
    """The most memory in use so far: of a GPU, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of macOS in bytes, else kilobytes
    return round(peak / 2 ** (20 if sys.platform == "darwin" else 10))

def settings_of(args):
    """The recipe, overruled by the model's row (the paper's: micro_batch only), then by flags."""
    row, ours = MODELS.get(args.model, {}), args.recipe == "ours"
    row = {key: value for key, value in row.items() if ours or key == "micro_batch"}
    flags = {key: value for key, value in vars(args).items() if value is not None}
    return {key: (RECIPES[args.recipe] | row | flags)[key] for key in RECIPES["ours"]}

def check_length(name, config, longest):
    """BadInput if a prompt with its answer is longer than what the model reads at once."""
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    room = min(getattr(config, "max_position_embeddings", None) or math.inf, window or math.inf)
    fits = config.is_encoder_decoder or longest <= room  # a T5 knows distances, not places
    check(fits, f"--model {name} reads {room} tokens, a prompt needs {longest}: lower --max-text")

def describe(model, dense, quant):
    """Prints what there is to say of a model before it is trained, and returns it as a dict."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    trained = sum(p.numel() for p in model.trainable().values())
    quantized = sum(m.N * m.K for m in layers)
    total = quantized + sum(p.numel() for p in model.parameters())
    cpu = f"a CPU with {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if model.device.type == "cuda" else cpu
    dtype = str(model.lm.dtype).removeprefix("torch.")
    also = " and a dense copy" * dense + ", computing with the weights as they were" * (not quant)
    print(f"{type(model.lm).__name__} on {name}, computing in {dtype}: {quantized:,} of {total:,} "
          f"weights in NF4{also}, {trained:,} trained", flush=True)
    return dict(device=name, dense_copy=dense, dtype=dtype, weights=total, weights_trained=trained)

def run_local(method, args, config, data, folder):
    """(function: annotations -> what `predict` returns, facts for the metrics), after training."""
    trained = method.head != "ask"
    users = sorted({a.user for a in data.train}) if method.personalized else []
    dtype, state, n = DTYPES.get(args.dtype), f"{folder}/{STATE}", len(data.labels)
    if os.path.exists(state):  # a stopped run goes on in the dtype that it began in
        with reading(state), safe_open(state, "pt") as f:
            dtype = DTYPES[json.loads(f.metadata()["state"])["dtype"]]
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, method.head, n, dtype, config, users)
    name_of, rows, cut = user_namer(model, tokenizer, config["ids"], users), {}, Counter()
    for part in ("train", "val", "test") if trained else ("test",):
        some = getattr(data, part)
        rows[part], counts = encode(tokenizer, method, data, some, name_of, args.max_text)
        cut += counts
    longest = max(len(row.prompt) for part in rows.values() for row in part)
    check_length(args.model, model.lm.config, longest + MAX_ANSWER * (method.head != "cls"))
    facts = describe(model, not args.no_dense and keep_dense(model), config["quant"]) | cut
    if trained:
        names = [*data.labels, *[NONE] * data.none] if method.head == "lm" else []
        ids = [(*tokenize(tokenizer, f" {name}"), tokenizer.eos_token_id) for name in names]
        check(len({*ids}) == len(ids), f"--model {args.model} has the same tokens for two labels")
        place = len(os.path.commonprefix(ids))  # " 1", " 2": for some tokenizers behind the space
        label_ids = place, [x[place] for x in ids]
        done = train(model, rows["train"], rows["val"], data.single, config, folder, label_ids)
        facts |= dict(steps=done["step"], rows_per_second=done["rows"] / (done["seconds"] or 1))
        tensors = {name: p.detach().cpu().contiguous() for name, p in model.trainable().items()}
        users_of = {"users": json.dumps(users)}
        write_file(f"{folder}/adapter.safetensors", safetensors_bytes(tensors, users_of))
    return functools.partial(predict, model, tokenizer, method, data, config, users), facts

def run_chat(chat, method, args, data, folder):
    """As run_local, for a model behind HTTP; the function knows the test rows only."""
    choose, prompts, few, most = choose_examples(method, data.train), [], 0, 4 * args.max_text
    for a in data.test:
        examples = [x._replace(text=x.text[:most]) for x in choose(a)]  # a token: 4 characters
        few += len(examples) < method.shots
        parts = prompt_parts(method, data, a.text[:most], a.user, examples)
        prompts.append("".join(sum(parts, [])))
    n, tokens = len({*prompts}), sum(map(len, {*prompts})) // 4
    print(f"{chat}: {n:,} requests for {len(prompts):,} rows (equal prompts are sent once), about "
          f"{tokens:,} tokens of prompts, at most {n * MAX_ANSWER:,} of answers", flush=True)
    path, cut = f"{folder}/answers.jsonl", {a.text for a in data.test if len(a.text) > most}
    answers, counts = ask_chatgpt(prompts, path, chat, args.seed, MAX_ANSWER)
    result = read_answers(answers, data)
    return lambda test: result, dict(chat=counts, too_few_examples=few, texts_cut=len(cut))

def chat_model(args, method):
    """What a server calls the model that --model names, None if it runs here."""
    name, chat = args.model, MODELS.get(args.model, {}).get("chat")
    chat = name.removeprefix("openai:") if name.startswith("openai:") else chat
    check(chat != "", "--model openai: needs a name behind it, as in openai:gpt-4o-mini")
    check(method.head == "ask" or not chat, f"--model {name} can only be asked: q_0s, q_1s_p, ...")
    return chat

def evaluate(method, data, read):
    """(what `read` returns of the test rows, dict of all scores and controls)"""
    result, gold = read(data.test), np.array([a.labels for a in data.test])
    found = score(data, data.test, result)
    if "scores" in result and not data.single:
        tuned = tuned_thresholds([a.labels for a in data.val], read(data.val)["scores"])
        found["f1_macro_tuned"] = f1_scores(gold, result["scores"] > tuned)["f1_macro"]
    if method.head == "cls" and not method.personalized:
        _, users, labels = zip(*data.train)
        bias = user_bias(labels, read(data.train)["scores"], users, data.single)
        own = np.array([bias.get(a.user, np.zeros(len(data.labels))) for a in data.test])
        chosen = chosen_labels(result["scores"] + own, data.single)
        found["f1_macro_user_bias"] = f1_scores(gold, chosen)["f1_macro"]
    if method.head in ("cls", "lm") and method.personalized:
        users = [a.user for a in data.test]
        random.Random(0).shuffle(users)
        strangers = [a._replace(user=user) for a, user in zip(data.test, users)]
        found["f1_macro_shuffled"] = f1_scores(gold, read(strangers)["predicted"])["f1_macro"]
    found |= {key: result[key] for key in ("unknown_words", "unreadable") if key in result}
    return result, found

CONFIG = ("model", "seed", "recipe", "text_col", "user_col", "skip_missing", "max_text",
          "max_steps", "max_eval", "dtype", "no_share")  # flags that make another run

def run(args):
    """One row of the paper's table for one model and dataset: trains, predicts, scores, reports."""
    start, method = time.perf_counter(), METHODS[args.command]
    args.model = "baseline" if method.head == "rates" else args.model
    chat, settings = chat_model(args, method), settings_of(args)
    columns = dict(text=args.text_col, user=args.user_col, split=args.split_col)
    columns |= dict(labels=args.labels, label=args.label_col)
    data = load_data(args.data, args.max_eval, args.skip_missing, **columns)
    print_data(data)
    check_labels(data, method.head)
    settings["ids"] = "number" if method.head == "ask" else settings["ids"]  # it knows no token
    config = dict(method=args.command, data=data.name, data_sha=data.sha, split=args.split_col)
    config |= settings | {key: getattr(args, key) for key in CONFIG}
    config |= {key: getattr(data, key) for key in ("labels", "single", "none", "ordered")}
    name = f"{data.name}.{args.split_col}" if args.split_col else data.name
    folder = os.path.join(args.out, name, model_name(args.model), args.command, f"seed{args.seed}")
    with run_folder(folder, config, args.fresh) as metrics:
        if metrics:
            print(f"{folder} is finished; --fresh runs it again")
        else:
            read, facts = functools.partial(predict_rates, data, method.personalized), {}
            if chat:
                read, facts = run_chat(chat, method, args, data, folder)
            elif method.head != "rates":
                read, facts = run_local(method, args, config, data, folder)
            result, found = evaluate(method, data, read)
            metrics = finish(folder, config | found | facts, data, result, start)
    with reading(f"{folder}/metrics.json"):
        print_summary(metrics, folder)

def finish(folder, metrics, data, result, start):
    """Writes a run's last files, removes what only resuming needs, and returns all metrics."""
    rows = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    metrics |= dict(rows=rows, notes=data.notes, peak_memory_mb=peak_memory_mb(),
                    seconds=round(time.perf_counter() - start, 1), command=" ".join(sys.argv),
                    versions=versions | dict(python=sys.version.split()[0]))
    write_predictions(f"{folder}/predictions.csv", data, data.test, result)
    write_file(f"{folder}/metrics.json", metrics)
    with suppress(FileNotFoundError):
        os.remove(f"{folder}/{STATE}")
    return metrics

SUMMARY = {  # key of the metrics -> its unit, or what it says
    "seconds": "s in all", "rows_per_second": "annotations a second in training",
    "peak_memory_mb": "MB at most", "chat": "", "texts_cut": "texts are cut to --max-text tokens",
    "too_few_examples": "prompts have fewer examples than the method asks for",
    "unreadable": "answers without a known label",
    "unknown_words": "words in answers that belong to no label",
    "f1_macro": "mean over labels", "f1_macro_ci": "95 % interval over texts",
    "f1_macro_tuned": "with thresholds tuned on validation",
    "f1_macro_user_bias": "with a bias for each user: what cls_p has to beat",
    "f1_macro_shuffled": "with user IDs shuffled: the gain has to vanish",
    "f1_disagreed": "on texts that people read differently", "accuracy": "of whole rows",
    "mean_absolute_error": "points", "listens": "share of variance between readers of one text"}

def print_summary(m, folder):
    """What a run ends with, for people: the part of metrics.json that they look for first."""
    def short(x):
        if isinstance(x, dict):
            return ", ".join(f"{key} {short(value)}" for key, value in x.items())
        return " to ".join(map(short, x)) if isinstance(x, list) else f"{round(x, 6):,.4g}"

    n = m["rows"]["test"]
    print(f"\n{m['method']} with {m['model']} on {m['data']}, seed {m['seed']}, {n:,} test rows")
    for key, what in SUMMARY.items():
        if m.get(key) or isinstance(m.get(key), float):  # a count of 0 says nothing, a score does
            print(f"  {key:20} {short(m[key])}  {what}".rstrip())
    for label, f1 in zip(m["labels"], m["per_label"]):
        print(f"    {f1:.4f}  {label:12}  {'#' * round(40 * min(f1, 1))}".rstrip())
    if m["spread"] < 0.01 and METHODS[m["method"]].head in ("cls", "lm"):
        print("  COLLAPSED: every row gets the same scores; lower --lr or train longer")
    elif METHODS[m["method"]].personalized and m["listens"]["model"] < 0.02:
        print("  DEAF: the scores hardly differ between the readers of a text")
    print(f"  files: {folder}{os.sep}")

# 14. A trained run reads new sentences ------------------------------------------------------------
# ... with the very model that it ended with: the scores of its own test rows are the same bits.

def load_run(folder):
    """(metrics, PersonalizedLM, tokenizer, users) of a finished run, as it was when it ended."""
    m, path = read_json(f"{folder}/metrics.json"), f"{folder}/adapter.safetensors"
    check(m, f"{folder}: no finished run (metrics.json)")
    with reading(folder, "a finished run of a trained method can"):
        config = read_json(f"{folder}/run.json") | dict(dtype=m["dtype"])
        check(m | config == m, f"{folder}: metrics.json does not fit run.json")
        with safe_open(path, "pt") as f:
            users = [user + "" for user in json.loads(f.metadata()["users"])]  # of strings
            tensors = {name: f.get_tensor(name) for name in f.keys()}
        head, n, dtype = METHODS[m["method"]].head, len(m["labels"]), DTYPES[m["dtype"]]
        model, tokenizer = load_model(m["model"], head, n, dtype, m, users)
    shapes, there = ({n: t.shape for n, t in x.items()} for x in (model.trainable(), tensors))
    sound = all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors.values())
    check(sound and shapes == there, f"{path}: damaged, or of another model than {m['model']}")
    model.load_state_dict(tensors, strict=False)
    keep_dense(model)
    return m, model, tokenizer, users

def predict_run(args):
    """`plm.py predict RUN`: a sentence through several people's eyes, or a CSV of (text, user)."""
    fits = not (args.text or args.users) if args.csv else args.text
    check(fits, "predict needs --text T (--users A,B) or --csv FILE")
    m, model, tokenizer, users = load_run(args.run)
    method, nothing = METHODS[m["method"]], (0,) * len(m["labels"])
    check(method.personalized or not args.users, f"{m['method']} knows no users: no --users")
    asked = [(args.text, user) for user in args.users or users[:5] or ["(anybody)"]]
    if args.csv:
        text = args.text_col or m["text_col"] or "text"
        user = args.user_col or m["user_col"] or "user"
        rows = csv_rows(args.csv, [*text.split(","), *[user] * method.personalized])
        asked = [("\n".join(row[c] for c in text.split(",")), row.get(user, "")) for _, row in rows]
    asked = [Annotation(text, user_id(user), nothing) for text, user in asked]
    unknown = sorted({a.user for a in asked} - {*users})
    if unknown and method.personalized:
        mean = " (read with the mean of all user tokens)" * (m["ids"] == "token")
        print(f"unknown to training{mean}: {unknown[:20]}{' ...' * (len(unknown) > 20)}")
    data = Dataset(*(m.get(key, []) for key in Dataset._fields))  # no rows, but all of the labels
    result = predict(model, tokenizer, method, data, m, users, asked)
    if result["texts_cut"]:
        print(f"{result['texts_cut']} texts are cut to {m['max_text']} tokens")
    if args.csv:
        path = f"{os.path.splitext(args.csv)[0]}.predictions.csv"
        write_predictions(path, data, asked, result, gold=False)
        return print(f"files       {path}")
    shown = result["predicted"]
    if "scores" in result:
        shown = probabilities(result["scores"], data.single)
    print(f"{'user':12}", *(f"{label:>8}" for label in m["labels"]), sep="  ")
    for a, line in zip(asked, shown):
        cells = (f"{p:>{max(len(label), 8)}.2f}" for p, label in zip(line, m["labels"]))
        print(f"{a.user[:12]:12}", *cells, sep="  ")

# 15. The command line -----------------------------------------------------------------------------
# What a user can say, and what a user is told if it cannot be done: one line, and status 2.

def number(kind, least, most=10 ** 18):
    """An argparse type: a number of that kind, from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most:,.10g}")
        return value

    parse.__name__ = kind.__name__
    return parse

COUNT, LIST = number(int, 1), lambda s: [*dict.fromkeys(filter(None, map(str.strip, s.split(","))))]
FLAGS = [  # flag, what argparse is told; without a default, the model's row or the recipe says
    ("--model", dict(default="tiny", help="a name below, a folder, a hub id, openai:NAME (tiny)")),
    ("--data", dict(default="sample", help="a name below or a CSV (sample)")),
    ("--text-col", dict(metavar="COL", help="column of the texts; A,B joins two (text)")),
    ("--user-col", dict(metavar="COL", help="column of the user IDs (user)")),
    ("--split-col", dict(metavar="COL", help="column that says train, val or test (split)")),
    ("--labels", dict(type=LIST, metavar="A,B,C", help="0/1 columns of labels (all there are)")),
    ("--label-col", dict(metavar="COL", help="one column that names the single choice")),
    ("--skip-missing", dict(action="store_true", help="leave rows with a missing cell out")),
    ("--seed", dict(type=number(int, 0, 2 ** 32), default=42, help="of what is random (42)")),
    ("--out", dict(default="out", metavar="DIR", help="folder of all runs (out)")),
    ("--fresh", dict(action="store_true", help="start a run over that is there already")),
    ("--recipe", dict(default="ours", choices=RECIPES, help="ours, or the paper's settings")),
    ("--ids", dict(choices=["number", "word", "token"], help="how the prompt names a user")),
    ("--lr", dict(type=number(float, 1e-12), help="learning rate")),
    ("--epochs", dict(type=COUNT, help="passes over the training rows")),
    ("--tune", dict(choices=["lora", "full"], help="train LoRA, or every weight (lower --lr)")),
    ("--no-quant", dict(dest="quant", action="store_const", const=False, help="weights as stored")),
    ("--r", dict(type=number(int, 1, 4096), help="rank of LoRA")),
    ("--dropout", dict(type=number(float, 0, 0.9), help="dropout of LoRA")),
    ("--batch", dict(type=COUNT, help="annotations a step")),
    ("--micro-batch", dict(type=COUNT, help="of these computed at once: less memory")),
    ("--max-steps", dict(type=COUNT, default=0, help="train so many steps at most")),
    ("--max-eval", dict(type=COUNT, default=0, help="score about so many rows")),
    ("--max-text", dict(type=COUNT, default=384, help="tokens of a text (384)")),
    ("--dtype", dict(choices=[*DTYPES], help="compute in it (the faster one)")),
    ("--no-dense", dict(action="store_true", help="keep no dense copy of the rounded weights")),
    ("--no-share", dict(action="store_true", help="compute every prompt by itself")),
    ("--text", dict(help="predict: this sentence")),
    ("--users", dict(type=LIST, metavar="A,B", help="predict: as these people read it")),
    ("--csv", dict(metavar="FILE", help="predict: a CSV with texts and users"))]

def make_parser():
    """The argparse parser."""
    rows = f"commands: {', '.join(METHODS)}, predict RUN\nmodels:   {', '.join(MODELS)}\n"
    p = argparse.ArgumentParser(
        "plm.py", description="Personalized Large Language Models: from annotations to F1.",
        epilog=f"{rows}datasets: {', '.join(DATASETS)}", allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: check(False, f"{message} (see --help)")
    p.add_argument("command", metavar="COMMAND", choices=[*METHODS, "predict"], help="see below")
    p.add_argument("run", nargs="?", metavar="RUN", help="folder of a finished run")
    for flag, what in FLAGS:
        p.add_argument(flag, **what)
    return p

def main(argv=None):
    """Runs one command; returns the exit status."""
    said = sys.argv[1:] if argv is None else argv
    try:  # bytes that are no UTF-8 become U+FFFD
        said = [x.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for x in said]
        args = make_parser().parse_args(said)
        for_predict = args.run, args.text, args.csv, args.users
        fits = args.run if args.command == "predict" else not any(for_predict)
        check(fits, "predict needs a run's folder; --text, --csv, --users are for predict alone")
        (predict_run if args.command == "predict" else run)(args)
        return 0
    except BadInput as e:
        why, status = e, 2
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, MemoryError) or re.search("(out of|allocate) memory", str(e))):
            raise
        why, status = "out of memory: try --micro-batch 1, --max-text 128 or --no-dense", 2
    except OSError as e:
        why, status = f"{e.filename or args.out}: {e.strerror or e}", 2
    except KeyboardInterrupt:
        why, status = "stopped; a run goes on by the same command", 130
    line = "".join(c if c.isprintable() else " " for c in f"plm.py: {why}")
    print(line[:2000], file=sys.stderr)
    return status

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(main())
