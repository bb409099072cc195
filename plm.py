"""plm.py: *Personalized Large Language Models* (arXiv 2402.09269) in one file.

Two people read the same comment; one finds it funny, the other hostile. The paper puts the reader's
user ID into the prompt of a language model, fine-tunes the model with QLoRA, and asks how much
better it then predicts the labels that this reader chose. This file is that experiment, from the
CSV of annotations to the F1 score, with its own LoRA, NF4 quantization, prompts, heads, training
loop and scores.

    python plm.py cls_p                                 the default: tiny model, sample data
    python plm.py cls_p --model phi2 --data goemotions  the paper's own
    python plm.py lm --model DIR --data file.csv --text-col comment --user-col worker
    python plm.py data --data goemotions                downloads and prepares the original data
    python plm.py table                                 every finished run as a table

Row of the paper's table -> METHOD. A trailing _p is the personalized twin: it is told the user ID.

    CLS               cls               a classification head reads the end of the prompt
    LM                lm                the language model writes the labels: "anger, joy"
    Q-0S Q-1S Q-2S    q_0s q_1s q_2s    the model is asked untrained, with 0, 1 or 2 examples
    ...-P             ..._p             (examples then are the user's own)

Letters in the shapes below:

    R rows (annotations)         L labels                D width of a hidden state   V vocabulary
    T tokens computed            S tokens of the trunk   G groups (texts)            r rank of LoRA
    N, K out- and inputs of a linear layer               H, E attention heads and their width
    P positions that a head reads                        Lq, Lk nodes that ask and answer

References
    [1] Wozniak et al., Personalized Large Language Models, 2024. arXiv 2402.09269
    [2] Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023. arXiv 2305.14314
    [3] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. arXiv 2106.09685
    [4] bitsandbytes 0.50, whose stored bytes section 4 reproduces: functional.py, csrc/cpu_ops.cpp
    [5] Dettmers et al., 8-bit Optimizers via Block-wise Quantization, 2021. arXiv 2110.02861
    [6] shared prefixes: Prefix Grouper, arXiv 2506.05433; Tree Training, arXiv 2511.00413

Left out: merging adapters into the base, quantization other than NF4, adapters other than LoRA.
"""
import argparse
import csv
import glob
import hashlib
import json
import math
import os
import queue
import random
import re
import resource
import shutil
import sys
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from multiprocessing import get_context
from typing import NamedTuple
from urllib.parse import urlsplit

# How long an idle thread spins before it sleeps; torch reads it on import. The default makes a
# busy machine ten times slower; not to spin at all makes a quiet one twice as slow.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import numpy as np
import requests
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from huggingface_hub import snapshot_download
from requests.adapters import HTTPAdapter
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoTokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.modeling_layers import GradientCheckpointingLayer
from urllib3.exceptions import HTTPError, InvalidHeader, MaxRetryError, ProtocolError
from urllib3.util import Retry

HERE = os.path.dirname(os.path.abspath(__file__))


class BadInput(Exception):
    """What the user gave cannot be used; the message, mostly of one line, says what
    would have been."""


def progress(items=None, what="", unit="", total=None):
    """A tqdm bar over items, shown once two seconds have passed; in a file, a line every 10 s."""
    return tqdm(items, what, total=total, unit=" " + unit, delay=2, leave=False,
                disable=os.environ.get("RANK", "0") != "0",
                dynamic_ncols=True, mininterval=0.2 if sys.stderr.isatty() else 10)


# --------------------------------------------------------------------------------------------------
# 1. What can be run. A model, a dataset or a method is a row of a table. What a model's row does
# not say is as in TRAINING, which holds the values of the authors' code [1].

TRAINING = dict(
    r=2, alpha=32, dropout=0.05,  # LoRA on every linear of the backbone; scaled by alpha / r [3]
    lr=1e-4, head_lr=1,           # learning rate; of the classification head in multiples of it
    epochs=10,                    # the epoch with the lowest validation loss is kept
    warmup=0.05, clip=1.0,        # share of all steps; largest norm of the gradient
    batch=32,                     # annotations a step
)

# gb: GPU memory for training with --micro-batch 8, computed and not measured: 4.127 bits for every
# quantized weight, 16 for the rest, 18 D + 6 F values of 16 bits a layer and token (F: width of the
# MLP; 400 tokens for a decoder, 1,040 for an encoder-decoder).
MODELS = {  # name -> hub id or folder, and what differs from TRAINING
    "tiny": dict(id=f"{HERE}/data/models/tiny", lr=3e-3, head_lr=3, epochs=4, r=8),
    "tiny_t5": dict(id=f"{HERE}/data/models/tiny_t5", lr=1e-3, epochs=8, r=8),
    "smollm2": dict(id="HuggingFaceTB/SmolLM2-135M-Instruct", lr=1e-3, gb=1),
    "flan_t5_small": dict(id="google/flan-t5-small", lr=1e-3, gb=1),
    "flan_t5_base": dict(id="google/flan-t5-base", lr=5e-4, gb=1),
    "flan_t5": dict(id="google/flan-t5-xl", gb=6),                        # 2.8 B [1]
    "phi2": dict(id="microsoft/phi-2", gb=5),                             # 2.8 B [1]
    "stablelm": dict(id="stabilityai/stablelm-tuned-alpha-3b", gb=5),     # 3.6 B [1]
    "mistral": dict(id="mistralai/Mistral-7B-Instruct-v0.2", gb=9),       # 7.2 B [1]
    "chatgpt": dict(chat="gpt-3.5-turbo"),                                # over HTTP; of 2023 [1]
}

# files: patterns; the first that finds something is read. splits: the files that say which text is
# in which split, the strongest last. rows, expected: what the original has, and what the authors'
# notebooks printed after each rule, as (train, val, test, users) [1]. Unhealthy may be off by
# `tolerance`: the authors' sample had no seed and took identical rows along, so that two runs of
# their own notebook ended with 168,503 and 168,506 training annotations.
GITHUB = "https://raw.githubusercontent.com"
GOEMOTIONS_RAW = "https://storage.googleapis.com/gresearch/goemotions/data/full_dataset"
GOEMOTIONS_SPLITS = f"{GITHUB}/google-research/google-research/master/goemotions/data"
UNHEALTHY = f"{GITHUB}/conversationai/unhealthy-conversations/main"

DATASETS = {
    "sample": dict(dir=f"{HERE}/data/sample", files=("annotations.csv",), text="text", user="user"),
    "goemotions": dict(
        dir=f"{HERE}/data/goemotions", files=("goemotions_[123].csv", "goemotions_*.csv"),
        text="text", user="rater_id",
        ignore=("id", "author", "subreddit", "link_id", "parent_id", "created_utc",
                "example_very_unclear"),
        splits=dict(val="dev.tsv", test="test.tsv", train="train.tsv"),
        urls={f"goemotions_{i}.csv": f"{GOEMOTIONS_RAW}/goemotions_{i}.csv" for i in (1, 2, 3)} | {
            f"{part}.tsv": f"{GOEMOTIONS_SPLITS}/{part}.tsv" for part in ("train", "dev", "test")},
        license="CC BY 4.0 (Demszky et al. 2020; github.com/google-research/google-research)",
        rows=211_225, tolerance=0, expected={
            "with a label": (207_814,),
            "in a split": (153_797, 19_049, 19_123, 82),
            "of users in all three": (153_796, 19_049, 19_123, 81),
            "rare users dropped": (153_390, 19_017, 19_063),
            "busy users cut": (146_659, 18_199, 18_244),
            "of users in all three again": (146_574, 18_160, 18_233, 72)}),
    "unhealthy": dict(
        dir=f"{HERE}/data/unhealthy", files=("unhealthy_full.csv", "annotations.csv"),
        text="comment", user="_worker_id",
        labels=("antagonize", "condescending", "dismissive", "generalisation",
                "generalisation_unfair", "healthy", "hostile", "sarcastic"),
        splits=dict(val="corpus/val.csv", test="corpus/test.csv", train="corpus/train.csv"),
        urls={file: f"{UNHEALTHY}/{file}" for file in (
            "unhealthy_full.csv", "corpus/train.csv", "corpus/val.csv", "corpus/test.csv")},
        license="CC BY-NC-SA 4.0, not for commercial use (Price et al. 2020; "
                "github.com/conversationai/unhealthy-conversations)",
        rows=227_975, tolerance=0.001, expected={
            "with a label": (215_265,),
            "in a split": (172_550, 20_893, 21_822, 588),
            "of users in all three": (171_873, 20_847, 21_765, 510),
            "rare users dropped": (171_058, 20_770, 21_679),
            "of users in all three again": (168_503, 20_352, 21_289, 427)}),
}


class Method(NamedTuple):
    head: str           # "cls": trained classification head; "lm": trained LM; "ask": untrained LM
    personalized: bool  # is the user ID in the prompt?
    shots: int          # solved examples in the prompt


METHODS = {
    "q_0s": Method("ask", False, 0), "q_0s_p": Method("ask", True, 0),
    "q_1s": Method("ask", False, 1), "q_1s_p": Method("ask", True, 1),
    "q_2s": Method("ask", False, 2), "q_2s_p": Method("ask", True, 2),
    "cls": Method("cls", False, 0), "cls_p": Method("cls", True, 0),
    "lm": Method("lm", False, 0), "lm_p": Method("lm", True, 0),
}


# --------------------------------------------------------------------------------------------------
# 2. Annotations and splits. One row is one person's judgement of one text. Splits are by text, so
# that no text is in two of them, and every user of validation and test is seen in training: the
# model has met the reader, never the text [1]. The same rows serve every method and every seed.

class Annotation(NamedTuple):
    text: str
    user: str
    labels: tuple  # (L) of 0 and 1


class Dataset(NamedTuple):
    name: str
    labels: list   # (L) names
    train: list    # of Annotation, as are val and test
    val: list
    test: list
    notes: dict    # what each rule left over, in order


def words_of(text):
    """The words of a text, without case and punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def text_id(text):
    """16 hex digits that stand for a text in files; case and white space make no difference."""
    words = " ".join(text.lower().split())
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_of(text):
    """'train' (70 %), 'val' (15 %) or 'test' (15 %) by a hash of the text: no seed, no file."""
    share = int(text_id(text)[:8], 16) / 16 ** 8
    return "train" if share < 0.70 else "val" if share < 0.85 else "test"


@contextmanager
def readable(path):
    """The open text file, for reading CSV; whatever is wrong with it in one line."""
    csv.field_size_limit(1 << 30)  # a cell may hold more than the csv module's 128 KB
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            yield f
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror.lower()}") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 (byte {e.object[e.start]:#x}); save it so") from None
    except csv.Error as e:
        raise BadInput(f"{path}: not a CSV file ({e})") from None


def csv_rows(path):
    """list of (row number, dict of the row) of a CSV file; the one below the header is row 1."""
    with readable(path) as f:
        reader, rows = csv.DictReader(f), []
        columns = reader.fieldnames or []
        if len(set(columns)) < len(columns):
            raise BadInput(f"{path}: columns of the same name; there are: {', '.join(columns)}")
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise BadInput(f"{path}: row {number} (line {reader.line_num}) does not have the "
                               f"{len(columns)} columns of the header")
            rows.append((number, row))
    if not rows:
        raise BadInput(f"{path}: no annotations in it")
    return rows


ZERO_ONE = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def label_columns(path, rows, text_col, user_col, labels, ignore):
    """The names of the label columns: `labels`, or all whose values are mostly 0 or 1."""
    columns = list(rows[0][1])
    for column in (text_col, user_col, *(labels or ())):
        if column not in columns:
            raise BadInput(f"{path}: no column {column!r}; there are: {', '.join(columns)}")
    labels = labels or [
        column for column in columns if column not in (text_col, user_col, *ignore)
        and sum(row[column].strip() in ZERO_ONE for _, row in rows) > len(rows) / 2]
    if not labels:
        raise BadInput(f"{path}: no label column (0 or 1) beside {text_col!r} and {user_col!r}")
    for label in labels:
        if "," in label or "\n" in label or not words_of(label):
            raise BadInput(f"{path}: label {label!r}: a comma-separated answer cannot hold it")
    if len({tuple(words_of(label)) for label in labels}) < len(labels):
        raise BadInput(f"{path}: two labels are the same but for case and punctuation: "
                       f"{', '.join(labels)}")
    return labels


def read_annotations(path, text_col, user_col, labels=None, ignore=()):
    """(label names, list of Annotation) of a CSV file."""
    rows, annotations = csv_rows(path), []
    labels = label_columns(path, rows, text_col, user_col, labels, ignore)
    for number, row in rows:
        for column in (text_col, user_col):
            if not row[column].strip():
                raise BadInput(f"{path}: row {number}: {column!r} is empty")
        chosen = tuple(ZERO_ONE.get(row[label].strip()) for label in labels)
        if None in chosen:
            label = labels[chosen.index(None)]
            raise BadInput(f"{path}: row {number}: label {label!r} is {row[label][:40]!r}, not 0 "
                           "or 1 (--labels a,b,c says which columns are labels)")
        annotations.append(Annotation(row[text_col], row[user_col], chosen))
    return labels, annotations


# The authors' preparation, rule by rule. `split` is always dict(train, val, test) of lists of
# Annotation, and every rule keeps the order of the rows.

def split_texts(path, column):
    """The texts of a file of a split: the first column of a .tsv, `column` of a .csv."""
    if path.endswith(".tsv"):  # quotes in it are part of the text
        with readable(path) as f:
            lines = csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [line[0] for line in lines if line]
    rows = csv_rows(path)
    if column not in rows[0][1]:
        raise BadInput(f"{path}: no column {column!r}; there are: {', '.join(rows[0][1])}")
    return [row[column] for _, row in rows]


def official_splits(folder, row, needed):
    """dict text -> its split by the dataset's own files; empty if there is none of them and none is
    needed. A text in two files stays in training, or else in test, as the authors had it. Texts are
    equal to the letter or different: anything softer does not arrive at the authors' counts."""
    paths = {part: os.path.join(folder, file) for part, file in row["splits"].items()}
    missing = [path for path in paths.values() if not os.path.exists(path)]
    if missing and (needed or len(missing) < len(paths)):
        raise BadInput(f"{missing[0]}: no such file; the official split needs "
                       f"{', '.join(paths.values())}")
    return {} if missing else {text: part for part, path in paths.items()
                               for text in split_texts(path, row["text"])}


def split_annotations(annotations, where):
    """dict(train, val, test) of annotations, by `where` (text -> split) or, if empty, by a hash."""
    split = {"train": [], "val": [], "test": []}
    for a in annotations:
        part = where.get(a.text) if where else split_of(a.text)
        if part:
            split[part].append(a)
    return split


def users_in_all(split):
    """The split without the users that are missing in a part of it."""
    users = set.intersection(*({a.user for a in rows} for rows in split.values()))
    return {part: [a for a in rows if a.user in users] for part, rows in split.items()}


def users_in_training(split):
    """The split without users that training does not know: all that is asked of other CSV files."""
    known = {a.user for a in split["train"]}
    return {part: [a for a in rows if a.user in known] for part, rows in split.items()}


def drop_rare_users(rows, share=0.01):
    """The rows of all users that have at least `share` of the busiest user's number of rows."""
    count = Counter(a.user for a in rows)
    least = share * max(count.values(), default=0)
    return [a for a in rows if count[a.user] >= least]


def cut_busy_users(rows, share=0.60):
    """The rows; of users above `share` of the busiest one's number only a sample of that size."""
    own = defaultdict(list)
    for i, a in enumerate(rows):
        own[a.user].append(i)
    most = math.ceil(share * max(map(len, own.values()), default=0))
    kept = set()
    for user, ids in own.items():  # seeded by the user: the same rows in every run, whatever --seed
        kept.update(ids if len(ids) <= most else random.Random(user).sample(ids, most))
    return [a for i, a in enumerate(rows) if i in kept]


def each(rule):
    """A rule for lists of rows as a rule for splits."""
    return lambda split: {part: rule(rows) for part, rows in split.items()}


OWN_CSV = {"of users seen in training": users_in_training}
AS_THE_AUTHORS = {  # stage -> rule, in this order [1]
    "of users in all three": users_in_all, "rare users dropped": each(drop_rare_users),
    "busy users cut": each(cut_busy_users), "of users in all three again": users_in_all}


def counts(split):
    """dict(train, val, test, users) of numbers."""
    users = {a.user for rows in split.values() for a in rows}
    return {part: len(split[part]) for part in ("train", "val", "test")} | {"users": len(users)}


def annotation_files(folder, row):
    """(paths of the CSV files, are they the original ones, whose counts are known?)"""
    for pattern in row["files"]:
        path = os.path.join(folder, pattern)  # a name of the user's own may look like a pattern
        paths = [path] if os.path.exists(path) else sorted(
            glob.glob(os.path.join(glob.escape(folder), pattern)))
        if paths:
            return paths, {os.path.basename(path) for path in paths} <= set(row.get("urls", ()))
    return [], False


def load_annotations(name, row, folder, text_col, user_col, labels):
    """(label names, list of Annotation, are they the original data?) of the files in the folder."""
    paths, original = annotation_files(folder, row)
    get = f"python plm.py data --data {name} downloads them; " if "urls" in row else ""
    if not paths:
        hint = f" ({get}--data-dir DIR says where the files are)" if name in DATASETS else ""
        raise BadInput(f"{os.path.join(folder, row['files'][0])}: no such file{hint}")
    annotations, labels = [], labels or row.get("labels")
    for path in paths:
        labels, part = read_annotations(path, text_col or row["text"], user_col or row["user"],
                                        labels, row.get("ignore", ()))
        annotations += part
    if original and len(annotations) != row["rows"]:
        raise BadInput(f"{', '.join(paths)}: {len(annotations):,} annotations, the original has "
                       f"{row['rows']:,} ({get}delete what is damaged before)")
    return list(labels), annotations, original


def load_data(name, data_dir=None, text_col=None, user_col=None, labels=None):
    """The Dataset of a row of DATASETS or of a CSV file of the user's own."""
    row = DATASETS.get(name)
    if row is None and not name.lower().endswith(".csv"):
        raise BadInput(f"--data {name}: not a .csv file and not one of {', '.join(DATASETS)}")
    row = row or dict(dir=os.path.dirname(name), files=(os.path.basename(name),), text="text",
                      user="user")
    folder = data_dir or row["dir"]
    labels, annotations, original = load_annotations(name, row, folder, text_col, user_col, labels)
    notes = {"annotations": len(annotations)}
    annotations = [a for a in annotations if any(a.labels)]
    notes["with a label"] = len(annotations)
    where = official_splits(folder, row, needed=original) if "splits" in row else {}
    notes["split by"] = ", ".join(row["splits"].values()) if where else "a hash of the text"
    split = split_annotations(annotations, where)
    notes["in a split"] = counts(split)
    for stage, rule in (AS_THE_AUTHORS if "splits" in row else OWN_CSV).items():
        split = rule(split)
        notes[stage] = counts(split)
    often = [n for n in Counter(a.text for rows in split.values() for a in rows).values() if n > 20]
    notes["texts judged over 20 times"] = len(often)  # control comments; the authors kept them, too
    notes["annotations of these"] = sum(often)
    for part, rows in split.items():
        if not rows:
            raise BadInput(f"--data {name}: no annotation is left for {part}, of "
                           f"{notes['annotations']} in all; more texts are needed")
    name = name if name in DATASETS else os.path.splitext(os.path.basename(name))[0]
    return Dataset(name, labels, **split, notes=notes)


# --------------------------------------------------------------------------------------------------
# 3. Prompts. Three parts, the constant one first: the instruction with the list of labels, the
# text, the user. The paper puts the user ID before the text; the last token sees the same facts
# either way, and in this order section 6 computes what prompts have in common once. Each piece is
# tokenized by itself and the ids are joined: the same piece always has the same ids, a cut can
# only ever shorten the text, and nothing inside a text can end the prompt, since special tokens
# written there are read as plain letters. An example comes with its own labels, before the text
# that is asked about: the user's own for a personalized prompt, other people's for a plain one,
# always from the training rows.

ASK = {  # personalized? -> the instruction, and what it adds when there are examples
    False: ("Which of the labels fit the text?", " First see how other people answered."),
    True: ("Which of the labels would this user choose for the text?",
           " First see how this user answered before."),
}


def prompt_parts(method, labels, text, user, examples=()):
    """The prompt as (shared, text, user) parts, each a list of pieces that are tokenized alone."""
    ask, see = ASK[method.personalized]
    shared = [f"{ask}{see if method.shots else ''} Answer with labels from the list, separated by "
              f"commas.\n### Labels: {', '.join(labels)}"]
    body = []
    for example in examples:
        body += ["\n### Text:", f" {example.text}", "\n### Response:",
                 answer_text(labels, example.labels)]
    if method.shots:
        body += ["\n### Text:"]
    else:
        shared[0] += "\n### Text:"
    body.append(f" {text}")
    if method.personalized:
        return shared, body + ["\n### User ID:"], [f" {user}", "\n### Response:"]
    return shared, body, ["\n### Response:"]


def answer_text(labels, chosen):
    """The answer that an LM is trained to give, the chosen labels in the list's order: ' a, c'."""
    return " " + ", ".join(label for label, y in zip(labels, chosen) if y)


def choose_examples(method, train):
    """A function: annotation -> up to `shots` training rows, the same for every model and seed."""
    by_user, distinct = defaultdict(list), Counter(a.user for a in set(train))
    for a in train:
        by_user[a.user].append(a)
    total = sum(distinct.values())

    def choose(annotation):
        rng = random.Random(f"{text_id(annotation.text)} {annotation.user}")
        own = by_user[annotation.user]
        if method.personalized:
            return rng.sample(own, min(method.shots, len(own)))
        chosen = []
        while len(chosen) < min(method.shots, total - distinct[annotation.user]):
            other = rng.choice(train)
            if other.user != annotation.user and other not in chosen:
                chosen.append(other)
        return chosen

    return choose


def tokenize(tokenizer, piece):
    """Token ids of a piece of a prompt; special tokens written inside it are read as letters."""
    def plain(piece):
        return tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids

    ids, special = plain(piece), set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if special.intersection(ids):  # a SentencePiece vocabulary has "</s>" as a word: take it apart
        for token in tokenizer.all_special_tokens:
            piece = piece.replace(token, f"{token[0]} {token[1:]}")
        ids = [i for i in plain(piece) if i not in special]
    return ids


def frame(tokenizer, chat):
    """(ids before, ids after) a prompt: <s> or </s> or, to be asked, the model's chat template."""
    if chat and tokenizer.chat_template:
        around = tokenizer.apply_chat_template([{"role": "user", "content": "\0"}], tokenize=False,
                                               add_generation_prompt=True)
        return [tuple(tokenizer(s, add_special_tokens=False).input_ids) for s in around.split("\0")]
    alone = tokenizer("a", add_special_tokens=False).input_ids
    framed = tokenizer("a").input_ids
    start = next(i for i in range(len(framed)) if framed[i:i + len(alone)] == alone)
    return tuple(framed[:start]), tuple(framed[start + len(alone):])


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


def encode(tokenizer, method, labels, annotations, max_text=384, train=()):
    """(list of Row, dict of counts: texts_cut to `max_text` tokens, too_few_examples in `train`)"""
    known, cut, few, choose = {}, set(), 0, choose_examples(method, train)
    before, after = frame(tokenizer, chat=method.head == "ask")

    def ids(pieces, texts=()):
        for piece in pieces:
            if piece not in known:
                known[piece] = tuple(tokenize(tokenizer, piece))
            if piece in texts and len(known[piece]) > max_text:
                cut.add(piece)
        return sum((known[p][:max_text] if p in texts else known[p] for p in pieces), ())

    rows = []
    for a in annotations:
        examples = choose(a)
        few += len(examples) < method.shots
        shared, body, user = prompt_parts(method, labels, a.text, a.user, examples)
        texts = {f" {x.text}" for x in (a, *examples)}
        rows.append(Row(before + ids(shared), ids(body, texts), ids(user) + after,
                        ids([answer_text(labels, a.labels)]) + (tokenizer.eos_token_id,),
                        a.labels, a))
    return rows, dict(texts_cut=len(cut), too_few_examples=few)


# --------------------------------------------------------------------------------------------------
# 4. NF4: frozen weights in 4 bits. Trained weights are close to normally distributed, so the 16
# values of NF4 are quantiles of the normal distribution [2]. A block of 64 weights is divided by
# its largest magnitude (absmax), and each weight becomes the index of the nearest of the 16. Two
# indices make a byte, the first in the high half. The absmax in turn are stored in 8 bits ("double
# quantization"): their mean is taken off, and blocks of 256 are rounded to the 256 values of the
# dynamic map [5] in the same way. Together 4 + 8/64 + 32/(64*256) = 4.127 bits a weight, byte for
# byte what bitsandbytes stores [4].

NF4 = torch.tensor([  # quantiles of N(0, 1) scaled to [-1, 1]; a test computes them anew
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0])
NF4_PAIRS = torch.cartesian_prod(NF4, NF4)  # byte -> its two values, (256, 2)


def midpoints(code):
    """The borders at which the nearest value of an ascending code changes."""
    return (code[1:] + code[:-1]) / 2


# [-1, 1] in cells of 1/16: no cell holds two borders of NF4, so the nearest index is the one at the
# cell's left edge, or one more beyond the cell's border. Two lookups, no search.
CELL_INDEX = torch.bucketize(torch.arange(-16, 17) / 16, midpoints(NF4)).to(torch.uint8)
CELL_BORDER = torch.cat([midpoints(NF4), torch.tensor([2.0])])[CELL_INDEX.long()]


def dynamic_map():
    """(256) ascending: signed, in seven powers of ten, twice as fine with each one up [5]."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        positive.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(positive)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC = dynamic_map()


def in_chunks(n, device):
    """Slices of n weights; on a CPU of a size that stays in its cache, which is 5 times faster."""
    size = 2 ** 18 if device.type == "cpu" else n
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def quantize_nf4(weight):
    """(N, K) -> packed (N*K/2) uint8, absmax (N*K/64) float32; both rounded up."""
    flat, device = weight.detach().flatten(), weight.device
    index_of, border_of = CELL_INDEX.to(device), CELL_BORDER.to(device)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty((flat.numel() + 63) // 64, device=device)
    for chunk in in_chunks(flat.numel(), device):
        part = flat[chunk].float()
        blocks = F.pad(part, (0, -part.numel() % 64)).view(-1, 64)
        largest = blocks.abs().amax(1)
        # Times the inverse and not divided by it, as [4] does it: the last bit differs.
        scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).view(-1)
        cell = (scaled * 16 + 16).int()
        index = index_of.index_select(0, cell) + (scaled > border_of.index_select(0, cell))
        first, n = chunk.start // 2, (part.numel() + 1) // 2
        packed[first:first + n] = ((index[::2] << 4) | index[1::2])[:n]
        absmax[chunk.start // 64:chunk.start // 64 + len(largest)] = largest
    return packed, absmax


def quantize_absmax(absmax):
    """absmax (blocks) -> code (blocks) uint8, scale (blocks/256) float32, offset () float32."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    scale = blocks.abs().amax(1)
    scaled = blocks * (1 / scale.clamp(min=1e-38))[:, None]
    step = (((scaled + 1) * 0.5) * 65535 + 0.5).floor()  # [4] first rounds to 65,536 even steps
    code = torch.bucketize(step.view(-1) / 65535 * 2 - 1, midpoints(DYNAMIC).to(absmax.device))
    return code[:absmax.numel()].to(torch.uint8), scale, offset


class NF4Matmul(torch.autograd.Function):
    """x (.., K) -> x W^T (.., N) with W in NF4. `F.linear(x, layer.dequantize())` would keep the
    dense W of every layer alive until the backward pass. This keeps the layer, whose bytes are in
    memory anyhow, and makes W again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(), None  # (.., N) @ (N, K) -> (.., K)


class NF4Linear(nn.Module):
    """A frozen linear layer (N, K) in NF4; build it with `from_linear`."""
    weight = None  # T5 asks a layer's weight for its dtype; there is no dense weight to ask

    @classmethod
    def from_linear(cls, linear, dtype=None):
        """The NF4Linear of an nn.Linear. It computes in `dtype`, or in that of the weight."""
        self = cls()
        (self.N, self.K), self.dtype = linear.weight.shape, dtype or linear.weight.dtype
        packed, absmax = quantize_nf4(linear.weight)
        code, scale, offset = quantize_absmax(absmax)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax_code", code)
        self.register_buffer("absmax_scale", scale)
        self.register_buffer("absmax_offset", offset)
        bias = None if linear.bias is None else linear.bias.detach().to(self.dtype)
        self.register_buffer("bias", bias)
        self.register_buffer("dense", None, persistent=False)  # see keep_dense
        return self

    def absmax(self):
        """(blocks) float32"""
        scale = self.absmax_scale.repeat_interleave(256)[:self.absmax_code.numel()]
        return DYNAMIC.to(scale.device)[self.absmax_code.int()] * scale + self.absmax_offset

    def dequantize(self):
        """(N, K) the rounded weights; products in float32, cast to the layer's dtype last."""
        if self.dense is not None:
            return self.dense
        n, device, absmax = self.N * self.K, self.packed.device, self.absmax()
        weight = torch.empty(n, dtype=self.dtype, device=device)
        pairs = NF4_PAIRS.view(torch.int64).view(-1).to(device)  # two floats moved as one word
        for chunk in in_chunks(n, device):
            bytes_ = self.packed[chunk.start // 2:(chunk.stop + 1) // 2]
            values = pairs.index_select(0, bytes_.int()).view(torch.float32)
            values = F.pad(values, (0, -values.numel() % 64)).view(-1, 64)
            values *= absmax[chunk.start // 64:chunk.start // 64 + len(values), None]
            weight[chunk] = values.view(-1)[:chunk.stop - chunk.start]
        return weight.view(self.N, self.K)

    def forward(self, x):
        return NF4Matmul.apply(x, self)


# --------------------------------------------------------------------------------------------------
# 5. LoRA: what is trained. The frozen W gets a companion of low rank [3]:
#     y = W x + (alpha / r) B A dropout(x),   A (r, K), B (N, r), both float32
# A is drawn at random and B is zero, so that the model begins as it was. LoRALinear wraps a layer
# and leaves its bytes alone.

class LoRAMatmul(torch.autograd.Function):
    """x (.., K), keep (.., K) of 0 and 1 or None -> layer(x) + scaling * (x keep) A^T B^T (.., N).
    In training it takes the place of NF4Matmul, in one pass over x and y. Autograd would save x
    once more for every layer, thinned out. This saves x itself, which the query, key and value
    layers have in common."""

    @staticmethod
    def forward(ctx, x, layer, keep, lora_A, lora_B, scaling):
        low = F.linear(x if keep is None else x * keep, lora_A.to(x.dtype))  # (.., r)
        ctx.save_for_backward(x, keep, low, lora_A, lora_B)
        ctx.layer, ctx.scaling = layer, scaling
        y = F.linear(x, layer.dequantize(), layer.bias)
        y.view(-1, layer.N).addmm_(low.flatten(0, -2), (scaling * lora_B.T).to(x.dtype))
        return y

    @staticmethod
    def backward(ctx, grad):
        x, keep, low, lora_A, lora_B = ctx.saved_tensors
        grad_low = grad @ (ctx.scaling * lora_B).to(x.dtype)  # (.., N) @ (N, r)
        through = grad_low @ lora_A.to(x.dtype)  # (.., r) @ (r, K)
        grad_x = grad @ ctx.layer.dequantize()  # (.., N) @ (N, K)
        grad_x += through if keep is None else through.mul_(keep)
        thin = x if keep is None else torch.mul(x, keep, out=through)  # through was its last use
        grad_A = grad_low.flatten(0, -2).T @ thin.flatten(0, -2)
        grad_B = ctx.scaling * (low.flatten(0, -2).T @ grad.flatten(0, -2)).T
        return grad_x, None, None, grad_A.to(lora_A.dtype), grad_B.to(lora_B.dtype), None


class LoRALinear(nn.Module):
    """base(x) + scaling * B A dropout(x)"""
    weight = None  # see NF4Linear
    pool = None    # see draw_dropout

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / r, dropout
        device = base.packed.device
        self.lora_A = nn.Parameter(torch.empty(r, base.K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.N, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as [3]

    def forward(self, x):
        keep, scaling = None, self.scaling
        if self.training and self.dropout:
            start = int(torch.randint(len(self.pool) - x.numel() + 1, ()))
            keep = self.pool[start:start + x.numel()].view(x.shape)
            scaling /= 1 - round(256 * self.dropout) / 256  # so that the expectation stays
        return LoRAMatmul.apply(x, self.base, keep, self.lora_A, self.lora_B, scaling)


def draw_dropout(module, positions):
    """Draws what the LoRA layers below `module` drop in one forward pass, of that many positions at
    most: a pool of ones, and zeros with probability `dropout` (to the nearest 1/256). Each layer
    takes a piece of it from a random place on: a draw for each layer of its own, and masks of
    bool, took a tenth of the time of a step on a CPU."""
    layers = [m for m in module.modules() if isinstance(m, LoRALinear) and m.training and m.dropout]
    if not layers:
        return
    n, base = 2 * positions * max(layer.base.K for layer in layers), layers[0].base
    words = torch.empty((n + 7) // 8, dtype=torch.int64, device=base.packed.device)
    words.random_(-2 ** 63, None)  # eight bytes to a draw, of which an entry takes one
    pool = (words.view(torch.uint8) >= round(256 * layers[0].dropout)).to(base.dtype)
    for layer in layers:
        layer.pool = pool


def add_lora(module, r, alpha, dropout):
    """Wraps every NF4Linear below `module` in a LoRALinear, in place; returns how many."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, LoRALinear):
            raise ValueError(f"{name} has LoRA already")
        if isinstance(child, NF4Linear):
            setattr(module, name, LoRALinear(child, r, alpha, dropout))
            count += 1
        else:
            count += add_lora(child, r, alpha, dropout)
    return count


# --------------------------------------------------------------------------------------------------
# 6. The prompt tree. The prompts of a batch begin alike: all with the shared part, those of one
# text with that text, and in training the answers of readers whose first labels agree. In a
# decoder the hidden state of a token depends on the tokens before it and on nothing else, so every
# distinct prefix need be computed only once, in training as in prediction, and loss and gradients
# stay the same numbers [6]. A batch is one flat sequence without padding: the trunk (the shared
# part), then the nodes of each group (a text and its readers). Everything but attention works on
# single tokens and does not notice; a node's position counts along its branch; and attention,
# below, lets it see the trunk and its own branch: one small rectangle a group.

class PromptTree:
    """Token ids as a tree on a trunk. `add` makes nodes, `step` hands out those not computed yet.
    Where `cache` is a dict, keys and values stay in it and the tree can grow on at its leaves."""

    def __init__(self, trunk, cache=None):
        self.ids, self.position, self.S = list(trunk), list(range(len(trunk))), len(trunk)
        self.children = {}               # (group, parent, token) -> node
        self.groups = defaultdict(list)  # group -> its nodes, by rank
        self.sees = [0] * len(trunk)     # node -> which ranks of its group it sees, as bits
        self.computed, self.cache = 0, cache

    def add(self, ids, group, parent=None):
        """The node at the end of the path `ids` from `parent` (None: the trunk)."""
        for token in ids:
            node = self.children.get((group, parent, token))
            if node is None:
                node = self.children[group, parent, token] = len(self.ids)
                self.ids.append(token)
                self.position.append(self.S if parent is None else self.position[parent] + 1)
                above = 0 if parent is None else self.sees[parent]
                self.sees.append(above | 1 << len(self.groups[group]))
                self.groups[group].append(node)
            parent = node
        return parent

    def step(self, device):
        """What a model needs to compute the T new nodes: dict(input_ids (1, T), position_ids
        (1, T), tree), where `tree` goes through to tree_attention: which nodes ask, which answer,
        trunk first and then rectangle by rectangle."""
        first, self.computed = self.computed, len(self.ids)
        groups = [(nodes, [n for n in nodes if n >= first]) for nodes in self.groups.values()]
        groups = sorted([g for g in groups if g[1]], key=lambda g: len(g[0]), reverse=True)
        q_index, k_index, masks = [np.arange(first, self.S)], [np.arange(self.S)], []
        while groups:  # groups of about one size together, so that little is padding
            size = sum(1.5 * len(nodes) >= len(groups[0][0]) for nodes, _ in groups)
            q, k, mask = self.rectangles(groups[:size])
            q_index, k_index, masks = [*q_index, q.ravel()], [*k_index, k.ravel()], [*masks, mask]
            groups = groups[size:]
        q_index = np.concatenate(q_index) - first
        padding, real = np.flatnonzero(q_index < 0), np.flatnonzero(q_index >= 0)
        slot = np.zeros(self.computed - first, np.int64)
        slot[q_index[real]] = real  # where each new node stands in q_index
        q_index[padding] = 0

        def tensor(a):
            return torch.as_tensor(a).to(device, non_blocking=True)

        return dict(
            input_ids=tensor([self.ids[first:]]), position_ids=tensor([self.position[first:]]),
            tree=dict(S=self.S, new_trunk=max(self.S - first, 0), cache=self.cache,
                      q_index=tensor(q_index), k_index=tensor(np.concatenate(k_index)),
                      slot=tensor(slot), padding=tensor(padding), masks=[*map(tensor, masks)]))

    def rectangles(self, groups):
        """For some groups, padded to the largest: which of their new nodes ask (G, Lq; -1 pads),
        which of all nodes answer (G, Lk), who sees whom, trunk first (G, 1, Lq, S + Lk)."""
        G, Lq, Lk = len(groups), max(len(new) for _, new in groups), len(groups[0][0])
        q, k = np.full((G, Lq), -1), np.zeros((G, Lk), np.int64)
        mask = np.zeros((G, 1, Lq, self.S + Lk), bool)
        mask[..., :max(self.S, 1)] = True  # padding sees something, else its softmax were NaN
        for g, (nodes, new) in enumerate(groups):
            k[g, :len(nodes)], q[g, :len(new)] = nodes, new
            bits = b"".join(self.sees[n].to_bytes((Lk + 7) // 8, "little") for n in new)
            bits = np.frombuffer(bits, np.uint8).reshape(len(new), -1)
            mask[g, 0, :len(new), self.S:] = np.unpackbits(
                bits, axis=1, count=Lk, bitorder="little")
        return q, k, mask


class Rearrange(torch.autograd.Function):
    """Rows of x (n, ..) -> x[index]. Backward looks up as well, by the inverse index: autograd
    would add row by row, as slow as a matmul. `padding`: rows of x that get no gradient."""

    @staticmethod
    def forward(ctx, x, index, inverse, padding=None):
        ctx.save_for_backward(inverse, padding)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        inverse, padding = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return grad if padding is None else grad.index_fill_(0, padding, 0), None, None, None


def attend(q, k, v, k_trunk, v_trunk, mask, scaling):
    """(G, H, Lq, E): attention of q (G, H, Lq, E) to the trunk (1, H', S, E) and then to k, v
    (G, H', Lk, E), where the bool mask (G, 1, Lq, S + Lk) is True. Query heads that share a key
    head are stacked as more queries of it."""
    G, H, Lq, E = q.shape
    if k_trunk is not None:
        k = torch.cat([k_trunk.expand(G, -1, -1, -1), k], 2)
        v = torch.cat([v_trunk.expand(G, -1, -1, -1), v], 2)
    share = H // k.shape[1]
    q, mask = q.reshape(G, H // share, share * Lq, E), mask.repeat(1, 1, share, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    return out.reshape(G, H, Lq, E)


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *,
                   tree=None, softcap=None, sliding_window=None, **kwargs):
    """Attention over a PromptTree: query (1, H, T, E), key, value (1, H', T, E) -> (1, T, H, E).
    transformers calls it in place of its own and hands `tree` through."""
    if tree is None or softcap or (sliding_window or math.inf) < 4096:
        raise BadInput(f"{type(module).__name__}: attention of this kind (soft-capped, in "
                       "short windows, without keyword arguments) is not supported: take another")
    tree["used"] = True
    q, k, v = (t[0].transpose(0, 1).flatten(1) for t in (query, key, value))  # (T, H * E)
    if tree["cache"] is not None:
        old = tree["cache"].get(module.layer_idx)
        k, v = (k, v) if old is None else (torch.cat([old[0], k]), torch.cat([old[1], v]))
        tree["cache"][module.layer_idx] = k, v
    S, E, slot, masks = tree["S"], query.shape[3], tree["slot"], tree["masks"]
    q = Rearrange.apply(q, tree["q_index"], slot)
    k, v = (Rearrange.apply(t, tree["k_index"], slot) for t in (k, v))  # in training as q
    q_sizes = [tree["new_trunk"], *(m.shape[0] * m.shape[2] for m in masks)]
    k_sizes = [S, *(m.shape[0] * (m.shape[3] - S) for m in masks)]

    def heads(rows, G):  # (G * L, H * E) -> (G, H, L, E)
        return rows.view(G, -1, rows.shape[1] // E, E).transpose(1, 2) if len(rows) else None

    q_trunk, *q = q.split(q_sizes)
    (k_trunk, *k), (v_trunk, *v) = k.split(k_sizes), v.split(k_sizes)
    k_trunk, v_trunk, out = heads(k_trunk, 1), heads(v_trunk, 1), []
    if len(q_trunk):
        causal = torch.ones(1, 1, S, S, dtype=torch.bool, device=q_trunk.device).tril()
        out.append(attend(heads(q_trunk, 1), k_trunk, v_trunk, None, None, causal, scaling))
    for q_part, k_part, v_part, mask in zip(q, k, v, masks):
        parts = (heads(part, len(mask)) for part in (q_part, k_part, v_part))
        # A copy of the trunk's keys for every text is a fifth of what the backward pass would keep;
        # made again, it costs 3 % of the time.
        out.append(checkpoint(attend, *parts, k_trunk, v_trunk, mask, scaling, use_reentrant=False,
                              preserve_rng_state=False))
    out = torch.cat([o.transpose(1, 2).flatten(0, 1) for o in out])  # as q_index: (.., H, E)
    return Rearrange.apply(out, slot, tree["q_index"], tree["padding"])[None], None


AttentionInterface.register("tree", tree_attention)


# --------------------------------------------------------------------------------------------------
# 7. The model and its two heads. The backbone is transformers' own module for the architecture,
# built without weights; the checkpoint is read tensor by tensor, and a linear layer turns into an
# NF4Linear as soon as its weights are there, so that never more than one is dense. Heads are
# neither quantized nor given LoRA: the classification head (L, D) is trained whole, the language
# model's (V, D) stays as it is. The backbone's own dropout stays off. In an encoder-decoder the
# classification head reads the decoder's state at its start token.

def model_folder(name):
    """The folder of a model: a row of MODELS, a folder or a Hugging Face id (fetched or cached)."""
    spec = MODELS[name]["id"] if name in MODELS else name
    if os.path.isdir(spec):
        if not os.path.exists(os.path.join(spec, "config.json")):
            raise BadInput(f"--model {name}: {spec} holds no config.json of a Hugging Face model")
        return spec
    known = f"names are {', '.join(MODELS)}; else a folder or a Hugging Face id"
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise BadInput(f"--model {name}: no such model ({known})")
    wanted = ["*.json", "*.txt", "*.model"]
    try:
        folder = snapshot_download(spec, allow_patterns=[*wanted, "*.safetensors"])
        if not glob.glob(os.path.join(folder, "*.safetensors")):
            folder = snapshot_download(spec, allow_patterns=[*wanted, "*.bin"])
        return folder
    except Exception as e:  # the hub's client raises errors of four packages; the remedy is one
        raise BadInput(f"--model {name}: cannot fetch {spec} from the Hugging Face hub "
                       f"({type(e).__name__}); run it once with a network, or give a folder that "
                       f"holds the model: --model DIR ({known})") from None


def checkpoint_tensors(folder):
    """Yields (name, tensor) of every weight in a model folder, one at a time in memory."""
    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    for path in files:
        with safe_open(path, "pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)
    for path in [] if files else sorted(glob.glob(os.path.join(folder, "pytorch_model*.bin"))):
        yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()


@contextmanager
def parameters_on_meta():
    """Modules built inside have parameters without memory, and real buffers (rotary tables)."""
    register = nn.Module.register_parameter

    def on_meta(module, name, param):
        if param is not None and not param.is_meta:  # if it is, it is tied: keep the object
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def put(model, name, value):
    """Sets the parameter, buffer or module `name` ("a.b.c") of a model."""
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, value)


def load_quantized(folder, device, dtype):
    """The transformers model in a folder, frozen, the linear layers of its backbone in NF4."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with parameters_on_meta():
        lm = kind.from_config(
            config, attn_implementation="sdpa" if config.is_encoder_decoder else "tree")
    for buffer in lm.buffers():
        buffer.data = buffer.to(device)
    empty = dict(lm.named_parameters(remove_duplicate=False))  # a tied one under each of its names
    given, head, prefix = {}, lm.get_output_embeddings(), lm.base_model_prefix + "."
    head_name = next(name for name, module in lm.named_modules() if module is head)
    for name, tensor in progress(checkpoint_tensors(folder), "quantize", "tensors"):
        if name in ("lm_head.weight", "embed_out.weight"):  # GPT-NeoX: the one became the other
            name = f"{head_name}.weight"
        names = (name, prefix + name, name.removeprefix(prefix))
        name = next((n for n in names if n in empty), None)
        if name is None:
            continue  # older versions of transformers stored buffers, too
        if tensor.shape != empty[name].shape:
            raise BadInput(f"{folder}: {name} is {tuple(tensor.shape)} in the checkpoint and "
                           f"{tuple(empty[name].shape)} by config.json")
        path = name.rpartition(".")[0]
        layer = lm.get_submodule(path)
        if not isinstance(layer, nn.Linear) or layer is head:
            param = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
            put(lm, name, param)
            if layer is not head or id(empty[name]) not in given:  # an untied head is its own
                given[id(empty[name])] = param
            continue
        put(lm, name, nn.Parameter(tensor.to(device), requires_grad=False))  # as it is on disk
        if not any(p.is_meta for p in layer.parameters()):
            put(lm, path, NF4Linear.from_linear(layer, dtype))
        del layer, tensor  # so that the next one is the only dense one
    for name, param in list(lm.named_parameters(remove_duplicate=False)):
        if param.is_meta:
            if id(param) not in given:
                raise BadInput(f"{folder}: the checkpoint has no weights for {name}")
            put(lm, name, given[id(param)])  # tied to one that had weights
    return lm.eval()


class PersonalizedLM(nn.Module):
    """A frozen backbone in NF4, with LoRA if it is to be trained, and one of the two heads."""

    def __init__(self, lm, head, n_labels):
        super().__init__()
        self.lm, self.head, self.seq2seq = lm, head, lm.config.is_encoder_decoder
        if head == "cls":
            width = lm.get_output_embeddings().weight.shape[1]
            self.score = nn.Linear(width, n_labels, bias=False, device=lm.device)
            nn.init.normal_(self.score.weight, std=0.02)

    @property
    def device(self):
        return self.lm.device

    def train(self, mode=True):
        """Dropout is LoRA's alone: the backbone stays as it is at prediction, but for the layers
        that compute their activations again where --checkpoint asks for that."""
        for module in self.modules():
            if isinstance(module, (LoRALinear, GradientCheckpointingLayer)):
                module.training = mode
        return self

    def trainable(self):
        """dict name -> parameter of all that is trained: LoRA and the classification head."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def hidden(self, batch):
        """(P, D) the hidden states that the head reads. By index_select and not by x[index], whose
        backward pass adds up in another order in every run."""
        inputs = dict(batch["inputs"])
        input_ids = inputs["input_ids"]
        if not self.seq2seq:
            draw_dropout(self, input_ids.numel())
            out = self.lm.base_model(**inputs, use_cache=False)
            if "used" not in inputs["tree"]:
                raise BadInput(f"{type(self.lm).__name__}: transformers does not let its attention "
                               "be replaced; take another model")
            return out.last_hidden_state[0].index_select(0, batch["at"])
        row, mask = inputs.pop("encoder_row"), inputs["attention_mask"]
        decoder_input_ids = inputs.pop("decoder_input_ids")
        draw_dropout(self, len(row) * max(input_ids.shape[1], decoder_input_ids.shape[1]))
        memory = self.lm.get_encoder()(**inputs).last_hidden_state
        out = self.lm.get_decoder()(
            input_ids=decoder_input_ids, encoder_hidden_states=memory.index_select(0, row),
            encoder_attention_mask=mask[row], use_cache=False)
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch["at"])

    def token_logits(self, hidden):
        """(P, D) -> (P, V) float32"""
        if getattr(self.lm.config, "scale_decoder_outputs", False):  # a T5 of tied embeddings
            hidden = hidden * self.lm.model_dim ** -0.5
        return self.lm.get_output_embeddings()(hidden).float()

    def forward(self, batch):
        """(P, L) scores of the labels, or (P, V) logits of the next token; float32."""
        hidden = self.hidden(batch)
        return self.score(hidden.float()) if self.head == "cls" else self.token_logits(hidden)


def free_memory(device):
    """Bytes that can still be had: of the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as f:  # counts what caches would give back
            return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", f.read())[1])
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def keep_dense(model):
    """Keeps a dense copy of the rounded weights if that takes less than a quarter of the free
    memory: the same numbers without dequantizing. Returns whether it did."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    fits = sum(m.N * m.K * m.dtype.itemsize for m in layers) < free_memory(model.device) / 4
    for layer in layers if fits else ():
        layer.dense = layer.dequantize()
    return fits


def load_model(name, head, n_labels, device, settings=TRAINING, recompute=False):
    """(PersonalizedLM, tokenizer): quantized, and with LoRA unless it is only asked."""
    folder = model_folder(name)
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        lm = load_quantized(folder, device, torch.bfloat16 if bf16 else torch.float32)
    except (BadInput, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # of four packages, for whatever is damaged in a folder
        why = " ".join(str(e).split())[:200]
        raise BadInput(f"--model {name}: cannot load {folder}: {type(e).__name__}: {why}") from None
    if head != "ask":
        if not add_lora(lm, settings["r"], settings["alpha"], settings["dropout"]):
            raise BadInput(f"--model {name}: {type(lm).__name__} has no linear layer for LoRA")
        if recompute:
            lm.gradient_checkpointing_enable(dict(use_reentrant=False))
    return PersonalizedLM(lm, head, n_labels), tokenizer


def quantized_layers(model):
    """The names, without their paths, of the layers whose weights are in NF4."""
    names = {name.removesuffix(".base").rpartition(".")[2]
             for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    return sorted(names)


def parameter_counts(model):
    """dict(total, trained, quantized) numbers of weights, and packed_bytes of the quantized."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    quantized = sum(m.N * m.K for m in layers)
    buffers = [b for m in layers
               for b in (m.packed, m.absmax_code, m.absmax_scale, m.absmax_offset)]
    biases = sum(m.bias.numel() for m in layers if m.bias is not None)
    return dict(total=sum(p.numel() for p in model.parameters()) + biases + quantized,
                trained=sum(p.numel() for p in model.trainable().values()), quantized=quantized,
                packed_bytes=sum(b.numel() * b.element_size() for b in buffers))


# --------------------------------------------------------------------------------------------------
# 8. Batches. What a head reads and what it should say there are the same four entries for both
# heads and both kinds of model: `inputs` of the backbone; `at` (P), the positions that are read;
# `of`, which of these each target belongs to (the readers of one text share one where their ID is
# not told); `target`, labels (R, L) or the ids of all answers.

def tree_batch(rows, head, device, share=True):
    """A batch for a decoder. Without `share`, every row computes its whole prompt."""
    tree, at, of, target = PromptTree(rows[0].shared if share else ()), {}, [], []
    for i, row in enumerate(rows):
        group = row.text if share else i
        node = tree.add(row.text + row.user if share else row.prompt, group)
        if head == "cls":
            of.append(at.setdefault(node, len(at)))
            target.append(row.labels)
            continue
        for j, token in enumerate(row.answer):  # the state at a token predicts the next one
            node = tree.add(row.answer[max(j - 1, 0):j], group, node)
            of.append(at.setdefault(node, len(at)))
            target.append(token)
    return as_batch(tree.step(device), list(at), of, target, device, tree.computed)


def pair_batch(rows, head, start, device, share=True):
    """A batch for an encoder-decoder: equal prompts are encoded once, equal (prompt, answer) pairs
    decoded once. Its encoder reads both ways: prompts that only begin alike share nothing."""
    prompts, pairs, at, of, target = {}, {}, {}, [], []
    for i, row in enumerate(rows):
        prompt = prompts.setdefault((row.prompt, share or i), len(prompts))
        answer = row.answer if head == "lm" else (None,)  # CLS reads the state at the start token
        pair = pairs.setdefault((prompt, (start, *answer[:-1])), len(pairs))
        of += [at.setdefault((pair, j), len(at)) for j in range(len(answer))]
        target += [row.labels] if head == "cls" else answer
    input_ids, attention_mask = padded([ids for ids, _ in prompts], device)
    decoder_input_ids, _ = padded([ids for _, ids in pairs], device)
    inputs = dict(input_ids=input_ids, attention_mask=attention_mask,
                  decoder_input_ids=decoder_input_ids,
                  encoder_row=torch.tensor([prompt for prompt, _ in pairs], device=device))
    at = [pair * decoder_input_ids.shape[1] + j for pair, j in at]
    tokens = sum(len(ids) for ids, _ in prompts) + sum(len(ids) for _, ids in pairs)
    return as_batch(inputs, at, of, target, device, tokens)


def padded(sequences, device):
    """(ids (B, T), mask (B, T)) of some sequences of ids; the mask goes by their lengths."""
    lengths = torch.tensor([len(s) for s in sequences])
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sequences], batch_first=True)
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.to(device), mask.long().to(device)


def as_batch(inputs, at, of, target, device, tokens):
    """The dict that PersonalizedLM takes; `tokens` is how many are computed for it."""
    at, of, target = (torch.tensor(x, device=device) for x in (at, of, target))
    return dict(inputs=inputs, at=at, of=of, target=target, tokens=tokens)


def make_batch(model, rows, share=True):
    """The batch of some rows for this model."""
    if model.seq2seq:
        start = model.lm.config.decoder_start_token_id
        return pair_batch(rows, model.head, start, model.device, share)
    return tree_batch(rows, model.head, model.device, share)


def in_batches(rows, size, rng=None):
    """The rows in lists of `size`, all of a text side by side, texts of a length together. With
    `rng` in random order: texts sorted by length in windows of 16 batches, batches shuffled."""
    by_text = defaultdict(list)
    for row in rows:
        by_text[row.text].append(row)
    texts = list(by_text)
    if rng:
        rng.shuffle(texts)
    windows, count = defaultdict(list), 0
    for text in texts:
        windows[count // (16 * size) if rng else 0].append(text)
        count += len(by_text[text])
    flat = [row for window in windows.values() for text in sorted(window, key=len)
            for row in by_text[text]]
    batches = [flat[i:i + size] for i in range(0, len(flat), size)]
    if rng:
        rng.shuffle(batches)
    return batches


# --------------------------------------------------------------------------------------------------
# 9. Ranks. Under torchrun several processes do one run: each computes its share of the rows of a
# step, gradients are added up, and since every part of the loss is divided by the targets of the
# whole step, their sum is the gradient of one process. Rank 0 alone prints and writes.

def ranks():
    """(rank of this process, number of processes)"""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def join_ranks():
    """Under torchrun: finds the other processes, takes a GPU if there are any."""
    if "LOCAL_RANK" not in os.environ:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def own_share(rows):
    """This rank's part of some rows: neighbours, which have most in common."""
    rank, world = ranks()
    return rows[len(rows) * rank // world:len(rows) * (rank + 1) // world]


def summed(tensor):
    """The tensor, added up over all ranks in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(params):
    """Adds the gradients of all ranks up, in one message."""
    if not dist.is_initialized():
        return
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = summed(torch.cat([p.grad.view(-1) for p in params]))
    for p, grad in zip(params, flat.split([p.numel() for p in params])):
        p.grad.copy_(grad.view_as(p))


def merged(results):
    """dict of what all ranks found: dict index -> result."""
    if not dist.is_initialized():
        return results
    found = [None] * ranks()[1]
    dist.all_gather_object(found, results)
    return {i: result for part in found for i, result in part.items()}


# --------------------------------------------------------------------------------------------------
# 10. Training. Binary cross-entropy over the labels (CLS) or cross-entropy over the tokens of the
# answer (LM): the mean over all targets of the 32 rows of a step, however these are cut into
# pieces for memory. AdamW in float32, a cosine schedule with warm-up, clipped gradients. The
# validation loss is taken after every epoch, and the epoch where it was lowest is kept [1].

def n_targets(rows, head):
    """How many targets the rows have: labels, or tokens of answers."""
    return sum(len(row.labels if head == "cls" else row.answer) for row in rows)


def summed_loss(model, batch):
    """() the loss of a batch, summed over its targets."""
    out = model(batch).index_select(0, batch["of"])
    if model.head == "cls":
        return F.binary_cross_entropy_with_logits(out, batch["target"].float(), reduction="sum")
    return F.cross_entropy(out, batch["target"], reduction="sum")


def learning_rate(step, steps, lr, warmup):
    """The rate of a step (from 0): a line up, then half a cosine down to nearly 0."""
    rise = max(math.ceil(warmup * steps), 1)
    if step < rise:
        return lr * (step + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


@torch.no_grad()
def mean_loss(model, rows, share=True, size=64):
    """The mean loss over all targets of some rows, without dropout."""
    model.train(False)
    rank, world = ranks()
    parts = progress(in_batches(rows, size)[rank::world], "validate", "batches")
    total = sum(summed_loss(model, make_batch(model, part, share)).item() for part in parts)
    return summed(torch.tensor(total, device=model.device)).item() / n_targets(rows, model.head)


def bytes_per_token(model, rows, share=True):
    """What the backward pass keeps of a token, measured on some rows."""
    model.train(True)
    kept, batch = {}, make_batch(model, rows, share)

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = summed_loss(model, batch)
    for t in [*model.parameters(), *model.buffers()]:
        kept.pop(t.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values()) / batch["tokens"]


def token_budget(model, rows, share=True):
    """How many tokens to compute at once: what half of a GPU's free memory holds, or 1/25 of a
    computer's, which others need too and which is no faster with more."""
    longest = sorted(rows, key=lambda row: len(row.text))[-1:]
    room = free_memory(model.device) * (1 / 2 if model.device.type == "cuda" else 1 / 25)
    return room / bytes_per_token(model, longest, share)


def pieces(rows, head, budget, micro=0, share=True):
    """The rows of a step in as few lists as keep to about the budget of tokens, or `micro` each."""
    if micro:
        return [rows[i:i + micro] for i in range(0, len(rows), micro)]
    cost, seen = [], set()
    for row in rows:
        own = len(row.user) + len(row.answer) * (head == "lm")
        new = row.text not in seen or not share
        cost.append(own + (len(row.text) if new else 0) + (0 if share else len(row.shared)))
        seen.add(row.text)
    trunk = len(rows[0].shared) if share else 0
    n = min(max(math.ceil(sum(cost) / max(budget - trunk, 1)), 1), len(rows))
    parts, done = [[] for _ in range(n)], 0
    for row, tokens in zip(rows, cost):
        parts[min(int(done * n / sum(cost)), n - 1)].append(row)
        done += tokens
    return [part for part in parts if part]


def tokens_alone(row, model):
    """How many tokens a row has by itself, all of which are computed where nothing is shared."""
    answer = len(row.answer) - 1 if model.head == "lm" else 0  # its end is not read again
    return len(row.prompt) + answer + model.seq2seq            # a second stack has a start token


def train_step(model, rows, optimizer, clip, share=True, budget=math.inf, micro=0):
    """(loss (), tokens computed) of one optimizer step on some rows, computed in `pieces`."""
    model.train(True)
    params, total = list(model.trainable().values()), n_targets(rows, model.head)
    loss, tokens, own = torch.zeros((), device=model.device), 0, own_share(rows)
    for part in pieces(own, model.head, budget, micro, share) if own else ():
        batch = make_batch(model, part, share)
        part_loss = summed_loss(model, batch) / total
        part_loss.backward()
        loss, tokens = loss + part_loss.detach(), tokens + batch["tokens"]
    sum_gradients(params)
    nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()
    optimizer.zero_grad()
    loss, tokens = summed(torch.stack([loss, torch.tensor(float(tokens), device=model.device)]))
    return loss, tokens


def train(model, rows, val_rows, settings, log, seed=42, share=True, micro=0, max_steps=0):
    """dict(seconds, rows, tokens, unshared, steps, val_loss); trains in place, best epoch kept.
    `log` is called with a dict for every step and every validation."""
    params, rng = model.trainable(), random.Random(seed)
    heads = [p for name, p in params.items() if name.startswith("score")]
    lora = [p for name, p in params.items() if not name.startswith("score")]
    optimizer = torch.optim.AdamW([dict(params=lora, times=1),
                                   dict(params=heads, times=settings["head_lr"])], weight_decay=0.0)
    steps = settings["epochs"] * math.ceil(len(rows) / settings["batch"])
    steps = min(steps, max_steps or steps)
    best, kept, step, done = math.inf, {}, 0, Counter()
    budget = math.inf if micro else token_budget(model, rows, share)
    torch.manual_seed(seed + ranks()[0])  # dropout: the same in every run, another in every rank
    bar = progress(what="train", unit="steps", total=steps)
    for epoch in range(1, settings["epochs"] + 1):
        for part in in_batches(rows, settings["batch"], rng)[:steps - step]:
            start = time.perf_counter()
            lr = learning_rate(step, steps, settings["lr"], settings["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = lr * group["times"]
            loss, tokens = train_step(
                model, part, optimizer, settings["clip"], share, budget, micro)
            loss, tokens = loss.item(), int(tokens)
            step, seconds = step + 1, time.perf_counter() - start
            log(dict(step=step, epoch=epoch, loss=round(loss, 6), lr=lr, rows=len(part),
                     tokens=tokens, seconds=round(seconds, 4)))
            if not math.isfinite(loss):
                texts = ", ".join(sorted({text_id(row.source.text) for row in part}))
                raise BadInput(f"the loss is {loss} at step {step} (texts {texts}): lower --lr")
            unshared = sum(tokens_alone(row, model) for row in part)
            done.update(seconds=seconds, rows=len(part), tokens=tokens, unshared=unshared, steps=1)
            bar.set_postfix(epoch=epoch, loss=f"{loss:.4f}", refresh=False)
            bar.update()
        val_loss = mean_loss(model, val_rows, share, micro or 64)
        if not math.isfinite(val_loss):
            raise BadInput(f"the validation loss is {val_loss} after step {step}: lower --lr")
        log(dict(step=step, epoch=epoch, val_loss=round(val_loss, 6)))
        if val_loss < best:
            best, kept = val_loss, {name: p.detach().clone() for name, p in params.items()}
        if step == steps:
            break
    bar.close()
    for name, value in kept.items():
        params[name].data.copy_(value)
    return dict(done, val_loss=best)


# --------------------------------------------------------------------------------------------------
# 11. Prediction. CLS ticks a label where its score is above 0. LM writes: greedy decoding, in
# which the prompts of a batch are a tree as before and every answer grows on at its leaf; the
# answer is read back into labels.

MAX_ANSWER = 48  # tokens; the authors allow as many as all labels together, which nobody ticks


@torch.no_grad()
def for_each_batch(model, rows, function, size=64):
    """List of what function(`size` rows) returns for each row, in the order of the rows."""
    model.train(False)
    place, found = {id(row): i for i, row in enumerate(rows)}, {}
    bar, (rank, world) = progress(what="predict", unit="rows", total=len(rows)), ranks()
    for part in in_batches(rows, size)[rank::world]:
        found.update(zip((place[id(row)] for row in part), function(part)))
        bar.update(len(part) * world)
    bar.close()
    found = merged(found)
    return [found[i] for i in range(len(rows))]


def label_scores(model, rows, share=True, size=64):
    """(R, L) scores of the classification head, in the order of the rows."""
    def scores(part):
        batch = make_batch(model, part, share)
        return model(batch)[batch["of"]].cpu().numpy()

    return np.array(for_each_batch(model, rows, scores, size))


def grow_answers(model, rows, end, limit, share=True):
    """Greedy decoding with a decoder: the answer of each row in ids, without the end token."""
    tree, group_of, leaves, first = PromptTree(rows[0].shared if share else (), cache={}), {}, [], 0
    for i, row in enumerate(rows):
        group = row.text if share else i
        leaves.append(tree.add(row.text + row.user if share else row.prompt, group))
        group_of[leaves[-1]] = group
    answers, tips = {leaf: [] for leaf in leaves}, {leaf: leaf for leaf in leaves}
    while tips:
        inputs = tree.step(model.device)
        at = torch.tensor([tip - first for tip in tips.values()], device=model.device)
        logits = model.token_logits(model.hidden(dict(inputs=inputs, at=at)))
        first = tree.computed
        for (leaf, tip), token in zip(list(tips.items()), logits.argmax(1).tolist()):
            if token == end or len(answers[leaf]) == limit:
                del tips[leaf]
            else:
                answers[leaf].append(token)
                tips[leaf] = tree.add((token,), group_of[leaf], tip)
    return [answers[leaf] for leaf in leaves]


def write_answers(model, rows, end, limit, share=True):
    """Greedy decoding with an encoder-decoder: the answer of each row in ids."""
    prompts = {}
    for i, row in enumerate(rows):
        prompts.setdefault((row.prompt, share or i), len(prompts))
    ids, mask = padded([ids for ids, _ in prompts], model.device)
    out = model.lm.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, num_beams=1,
        eos_token_id=end, pad_token_id=end)[:, 1:].tolist()
    out = [ids[:ids.index(end)] if end in ids else ids for ids in out]
    return [out[prompts[row.prompt, share or i]] for i, row in enumerate(rows)]


def written_answers(model, tokenizer, rows, limit, share=True, size=64):
    """The answer of each row as a string, in the order of the rows."""
    def answers(part):
        write = write_answers if model.seq2seq else grow_answers
        ids = write(model, part, tokenizer.eos_token_id, limit, share)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    return for_each_batch(model, rows, answers, size)


def parse_answer(answer, labels):
    """((L) zeros and ones, number of words that belong to no label). Case, punctuation and order
    are forgiven; of labels that begin alike ("unfair", "unfair_to_all") the longest is meant."""
    names = sorted(((words_of(label), i) for i, label in enumerate(labels)),
                   key=lambda name: -len(name[0]))
    words, chosen, unknown = words_of(answer), [0] * len(labels), 0
    while words:
        name, i = next((n for n in names if words[:len(n[0])] == n[0]), (words[:1], None))
        if i is None:
            unknown += 1
        else:
            chosen[i] = 1
        words = words[len(name):]
    return tuple(chosen), unknown


def read_answers(answers, labels):
    """dict(predicted (R, L), answers, unknown_words, unreadable: answers without a label)"""
    predicted, unknown = zip(*(parse_answer(answer, labels) for answer in answers))
    return dict(predicted=np.array(predicted), answers=answers, unknown_words=sum(unknown),
                unreadable=sum(not any(chosen) for chosen in predicted))


def predict(model, tokenizer, labels, rows, share=True, size=64):
    """dict(predicted (R, L) and scores (R, L)), or what read_answers returns."""
    if model.head == "cls":
        scores = label_scores(model, rows, share, size)
        return dict(predicted=scores > 0, scores=scores)
    limit = len(tokenize(tokenizer, answer_text(labels, [1] * len(labels)))) + 1
    return read_answers(
        written_answers(model, tokenizer, rows, min(limit, MAX_ANSWER), share, size), labels)


# --------------------------------------------------------------------------------------------------
# 12. ChatGPT. A model that cannot be downloaded is asked over HTTP, in the protocol that OpenAI
# made and many servers speak. Answers cost money and networks fail, so: an answer is on disk as
# soon as it is there and is never asked for again, rows with the same prompt are asked about once,
# a failure that may pass is tried again within bounds, and one that will not (a wrong key) stops
# the run. The key goes into the header of the request and nowhere else. Threads send and report
# what happens through a queue; the main thread alone counts, writes and decides.

OPENAI = "https://api.openai.com/v1"  # unless OPENAI_BASE_URL names another server
TOKENS = ("prompt_tokens", "completion_tokens")  # as a server counts them
CONNECT, READ = 10, 40  # seconds to reach the server; of its silence, and for a whole body
RETRIES = 8     # where a third of all attempts fail, 9 in a row do for one request in 20,000
PASSING = [408, 409, 425, 429, *range(500, 600)]  # statuses that may be another one the next time
BACKOFF = 0.5   # the waits between attempts are 0, 2, 4, 8, .. times this, at most 20 s, and jitter
DEADLINE = 120  # seconds for a request: all attempts and waits, those that the server asks for too
GIVE_UP = 20    # requests that fail one after the other: it is not the rows then; the run stops
STOP = {        # statuses that every request would get -> what to do
    401: "the server does not accept the key: correct OPENAI_API_KEY",
    403: "the server does not let the owner of OPENAI_API_KEY use {model}: another key, or --model "
         "openai:NAME",
    404: "no model {model}, or no such server: correct --model openai:NAME or OPENAI_BASE_URL "
         "(.../v1)"}


def chat_body(model, prompt, seed, limit):
    """The body of the request for one prompt, as a dict."""
    return dict(model=model, messages=[dict(role="user", content=prompt)], temperature=0, seed=seed,
                max_tokens=limit)


def server_and_key():
    """(URL to post to, key) from the environment. No message repeats a value, maybe a secret."""
    base = os.environ.get("OPENAI_BASE_URL", "").strip() or OPENAI
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key:
        raise BadInput("nothing was sent: OPENAI_API_KEY is not set; it has to hold the key of "
                       "your account (or any word, for a server that asks for none)")
    if not re.fullmatch(r"[!-~]+", key):
        raise BadInput("nothing was sent: OPENAI_API_KEY holds spaces or letters that no key has")
    try:
        parts = urlsplit(base)
        plain = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        plain = False
    if not plain or re.search(r"[@?#\s]", base):
        raise BadInput(f"nothing was sent: OPENAI_BASE_URL has to be an address like {OPENAI}, "
                       "without a user name, password or key (that belongs into OPENAI_API_KEY)")
    return base.rstrip("/") + "/chat/completions", key


class BoundedRetry(Retry):
    """urllib3's Retry that calls `tell` before each new attempt, and in which no wait goes past
    `deadline` (in time.monotonic) nor past the event `stop`."""

    def __init__(self, deadline, stop, tell, **kw):
        super().__init__(**kw)
        self.deadline, self.stop, self.tell = deadline, stop, tell

    def new(self, **kw):
        return super().new(deadline=self.deadline, stop=self.stop, tell=self.tell, **kw)

    def sleep(self, response=None):
        try:
            asked = (response and self.get_retry_after(response)) or 0
        except (InvalidHeader, ValueError, OverflowError):
            asked = 0  # a Retry-After that nobody can read
        wait, last = max(asked, self.get_backoff_time()), self.history[-1]
        if time.monotonic() + wait > self.deadline:
            raise MaxRetryError(None, None, TimeoutError(
                f"{last.error or f'HTTP {last.status}'}; the next attempt, in {wait:.0f} s, would "
                f"be later than the {DEADLINE} s that a request may take"))
        if self.stop.wait(wait):
            raise MaxRetryError(None, None, InterruptedError("the run was stopped"))
        self.tell()


def new_session(key):
    """A requests.Session that sends the key: by an auth callable, since a mere header is replaced
    by what a .netrc holds for the host; trust_env=False prevents that but loses the proxies."""
    def bearer(request):
        request.headers["Authorization"] = f"Bearer {key}"
        return request

    session, adapter = requests.Session(), HTTPAdapter()
    session.auth = bearer
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def read_body(raw):
    """The bytes of a urllib3 response. A server that sends a byte now and then never meets a
    socket's time-out, so the whole body has its own; read1 hands over what is there at once."""
    body, until = b"", time.monotonic() + READ
    while part := raw.read1(2 ** 16, decode_content=True):
        body += part
        if time.monotonic() > until:
            raise ProtocolError(f"the body took more than {READ} s")
    return body


def parse_reply(body):
    """dict(answer, prompt_tokens, completion_tokens) of a body; ValueError if it has no answer."""
    try:
        reply = json.loads(body)
        answer = reply["choices"][0]["message"]["content"].strip()
        answer = answer.encode("utf-8", "replace").decode()  # half a surrogate pair cannot be kept
        usage = dict(reply.get("usage") or {})  # not every server counts
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        answer = None
    if not answer:
        start = body[:80].decode("utf-8", "replace")
        raise ValueError(f"no answer in the body: {start or '(empty)'}")
    counts = {name: usage.get(name) for name in TOKENS}
    return dict(answer=answer, **{k: n if isinstance(n, int) else 0 for k, n in counts.items()})


def request_answer(session, url, body, retry):
    """The parsed reply to one request. Retry handles statuses, connections and time-outs; what is
    wrong with a body it cannot see, so that is charged to it here: one budget for both."""
    while True:
        session.get_adapter(url).max_retries = retry
        with session.post(url, json=body, timeout=(CONNECT, READ), stream=True,
                          allow_redirects=False) as response:
            status, retry = response.status_code, response.raw.retries
            if status in STOP or 300 <= status < 400:  # a redirect: the address is not quite right
                remedy = STOP.get(status, STOP[404]).format(model=body["model"])
                raise BadInput(f"HTTP {status}: {remedy}")
            if status >= 400:
                said = read_body(response.raw).decode("utf-8", "replace")
                raise requests.HTTPError(f"HTTP {status}: {said}")
            try:
                return parse_reply(read_body(response.raw))
            except (HTTPError, ValueError) as e:
                retry = retry.increment("POST", url, error=ProtocolError(str(e)))
        retry.sleep()


def replies(bodies, url, key, concurrency):
    """Yields (sha, kind, value) for dict sha -> body as it happens: "retried", and last "answered"
    with the parsed reply or "failed" with the reason. Threads are daemons: one that hangs can be
    left behind."""
    events, stop, idle = queue.SimpleQueue(), threading.Event(), []

    def work(sha, session, deadline):
        retry = BoundedRetry(
            deadline, stop, lambda: events.put((sha, "retried", None)), total=RETRIES,
            allowed_methods=["POST"], status_forcelist=PASSING, raise_on_status=False,
            backoff_factor=BACKOFF, backoff_jitter=BACKOFF, backoff_max=20)
        try:
            event = "answered", request_answer(session, url, bodies[sha], retry)
        except (requests.RequestException, HTTPError) as e:
            why = next((x.reason for x in (e, *e.args) if getattr(x, "reason", None)), e)
            event = "failed", " ".join(str(why).replace(key, "[key]").split())[:200]
        except Exception as e:
            event = "stop", e
        idle.append(session)
        events.put((sha, *event))

    # running: sha -> its deadline, kept here too since a thread cannot stop its own blocking call
    waiting, running = list(reversed(bodies)), {}
    try:
        while waiting or running:
            while waiting and len(running) < concurrency:
                sha = waiting.pop()
                running[sha] = time.monotonic() + DEADLINE
                args = sha, idle.pop() if idle else new_session(key), running[sha]
                threading.Thread(target=work, args=args, daemon=True).start()
            first = min(running, key=running.get)
            try:
                left = max(0, running[first] - time.monotonic())
                sha, kind, value = events.get(timeout=left)
            except queue.Empty:
                sha, kind, value = first, "failed", f"no answer within {DEADLINE} s"
            if kind == "stop":
                raise value
            if kind == "retried" or running.pop(sha, None):  # else it comes too late and has failed
                yield sha, kind, value
    finally:
        stop.set()


def finished_answers(path):
    """dict sha -> line of the answers file. The half line that a killed run may have left at its
    end is cut off, so that the next one starts on a line of its own."""
    if not os.path.exists(path):
        return {}
    with open(path, "rb+") as f:
        whole, newline, _ = f.read().rpartition(b"\n")
        f.truncate(len(whole + newline))
    finished = {}
    for line in whole.split(b"\n"):
        try:
            line = json.loads(line)
            finished[line["sha"]] = dict(
                answer=line["answer"], **{name: int(line[name]) for name in TOKENS})
        except (ValueError, KeyError, TypeError):
            continue  # no answer: it is asked for again
    return finished


def ask_chatgpt(prompts, path, model, seed=42, limit=48, concurrency=8):
    """(dict row -> answer, dict of counts) for dict row -> prompt; answers are kept in `path`. Of
    the counts, requests and retries were sent now, cached were answered before; tokens, as the
    server counted them, are those of all the answers; failed is a list of (row, reason)."""
    bodies = {row: chat_body(model, prompt, seed, limit) for row, prompt in prompts.items()}
    shas = {row: hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
            for row, body in bodies.items()}
    row_of = {sha: row for row, sha in reversed(shas.items())}  # the first one with this prompt
    answered = finished_answers(path)
    cached = len(row_of.keys() & answered.keys())
    todo = {sha: bodies[row_of[sha]] for sha in shas.values() if sha not in answered}
    failed, count, in_a_row = {}, Counter(), 0
    if todo:
        url, key = server_and_key()
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with (open(path, "a", encoding="utf-8") as f,
              closing(replies(todo, url, key, concurrency)) as events,
              progress(what="ask", unit="requests", total=len(todo)) as bar):
            for sha, kind, value in events:
                count[kind] += 1
                if kind == "answered":
                    answered[sha], in_a_row = value, 0
                    f.write(json.dumps(dict(key=row_of[sha], sha=sha, **value)) + "\n")
                    f.flush()
                    os.fsync(f.fileno())
                elif kind == "failed":
                    failed[sha], in_a_row = value, in_a_row + 1
                    if in_a_row == GIVE_UP:
                        raise BadInput(f"{GIVE_UP} requests failed one after the other, the last: "
                                       f"{value} ({len(answered)} answers are kept in {path})")
                bar.set_postfix({k: count[k] for k in ("answered", "failed", "retried")}, False)
                bar.update(kind != "retried")
    used = [answered[sha] for sha in row_of if sha in answered]
    answers = {row: answered[sha]["answer"] for row, sha in shas.items() if sha in answered}
    return answers, dict(
        requests=len(todo) + count["retried"], retries=count["retried"], cached=cached,
        **{name: sum(a[name] for a in used) for name in TOKENS},
        failed=[(row, failed[sha]) for row, sha in shas.items() if sha in failed])


def dry_run(prompts, model, limit):
    """Prints what ask_chatgpt would send, without sending it."""
    distinct = list(dict.fromkeys(prompts.values()))
    tokens = sum(map(len, distinct)) // 4
    print(f"{model}: {len(distinct):,} requests for {len(prompts):,} rows (the same prompt "
          f"is sent once), about {tokens:,} tokens of prompts (estimated: 4 characters a token), "
          f"at most {len(distinct) * limit:,} of answers ({limit} a request). Nothing was sent.\n"
          "The first prompt:\n")
    print(distinct[0] if distinct else "(none)")


# --------------------------------------------------------------------------------------------------
# 13. Scores. The paper's: the F1 of each label and their plain mean.

def f1_scores(gold, predicted):
    """dict(f1_macro, f1_micro, per_label) of 0/1 arrays (R, L): 2TP / (2TP + FP + FN), and 0 where
    nobody chose the label and nothing predicted it (scikit-learn's zero_division=0)."""
    gold, predicted = np.asarray(gold, bool), np.asarray(predicted, bool)
    hits = 2 * (gold & predicted).sum(0)        # 2TP of each label
    ticks = gold.sum(0) + predicted.sum(0)      # 2TP + FP + FN
    per_label = hits / np.maximum(ticks, 1)
    return dict(f1_macro=float(per_label.mean()), f1_micro=float(hits.sum() / max(ticks.sum(), 1)),
                per_label=per_label.tolist())


# --------------------------------------------------------------------------------------------------
# 14. Runs on disk: out/<data>/<model>/<method>/seed<S>/. A file takes its name when it is
# complete; what stood there before stays until then.

@contextmanager
def run_files(folder):
    """A folder to write a run's files into; they move to `folder` together when the block has ended
    well, metrics.json last, and are gone if it has not. Only rank 0 moves any."""
    part = f"{folder}.part" + (f"{ranks()[0]}" if ranks()[0] else "")
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
    try:
        yield part
        if not ranks()[0]:
            os.makedirs(folder, exist_ok=True)
            for name in sorted(os.listdir(part), key=lambda name: name == "metrics.json"):
                os.replace(os.path.join(part, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(part, ignore_errors=True)


def model_name(model):
    """What a model is called in folders and tables: a name of MODELS, else the last part of it."""
    return os.path.basename(os.path.abspath(model)).replace(":", "_")


def run_folder(out, data, model, method, seed):
    """The folder of a run."""
    return os.path.join(out, data, model_name(model), method, f"seed{seed}")


def check_other_run(folder, source):
    """BadInput if a run on other data or with another model of that name has this folder."""
    for m in finished_runs([os.path.join(folder, "metrics.json")]):
        if m.get("source") != source:
            raise BadInput(f"{folder} holds a run of {m.get('source')}, and this is one of "
                           f"{source}: give it another folder with --out")


def finished_runs(paths):
    """Yields the metrics in some metrics.json; what cannot be read is named on stderr."""
    for path in paths:
        try:
            with open(path, encoding="utf-8") as f:
                m = json.load(f)
            names = {type(m[key]) for key in ("data", "method", "model")}
            if names == {str} and 0 <= m["f1_macro"] <= 1:
                yield m
                continue
            why = "not the metrics of a run"
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError) as e:
            why = f"{type(e).__name__}: {e}"
        print(f"plm.py: {path} is left out ({why})", file=sys.stderr)


def write_run(folder, metrics, data, rows, result, adapter):
    """Writes predictions.csv (a record a test row), adapter.safetensors and metrics.json."""
    scores, answers = result.get("scores"), result.get("answers")
    with open(os.path.join(folder, "predictions.csv"), "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        more = [f"score:{label}" for label in data.labels] if answers is None else ["answer"]
        writer.writerow(["text_id", "user", "gold", "predicted", *more])
        for i, a in enumerate(rows):
            more = [f"{s:.5f}" for s in scores[i]] if answers is None else [answers[i]]
            gold, predicted = (answer_text(data.labels, chosen).strip()
                               for chosen in (a.labels, result["predicted"][i]))
            writer.writerow([text_id(a.text), a.user, gold, predicted, *more])
    if adapter:
        with open(os.path.join(folder, "adapter.safetensors"), "wb") as f:
            f.write(safetensors_bytes({k: p.detach().cpu() for k, p in adapter.items()}))
    with open(os.path.join(folder, "metrics.json"), "w", encoding="utf-8") as f:
        json.dump(metrics, f, indent=1, allow_nan=False)


def peak_memory_mb(device):
    """The most memory in use so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10  # bytes there, kilobytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


# --------------------------------------------------------------------------------------------------
# 15. One experiment from end to end, and the table of all of them.

def settings_of(args):
    """TRAINING, overruled by the model's row, overruled by flags."""
    row = MODELS.get(args.model, {})
    return {key: next(value for value in (getattr(args, key, None), row.get(key), TRAINING[key])
                      if value is not None) for key in TRAINING}


def fit(model, rows, val_rows, settings, folder, args):
    """Trains; returns what the metrics say of it. log.jsonl gets a line a step."""
    with open(os.path.join(folder, "log.jsonl"), "w", encoding="utf-8") as f:
        def log(line):
            f.write(json.dumps(line) + "\n")
            f.flush()

        done = train(model, rows, val_rows, settings, log, args.seed, not args.no_share,
                     args.micro_batch, args.max_steps)
    return dict(train_seconds=round(done["seconds"], 2), steps=done["steps"],
                rows_per_second=round(done["rows"] / done["seconds"], 2), val_loss=done["val_loss"],
                tokens_computed=done["tokens"], tokens_unshared=done["unshared"])


def run_local(kind, args, settings, data, val, test, folder):
    """(what `predict` returns, facts for the metrics, dict of trained parameters)"""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, kind.head, len(data.labels), device, settings,
                                  args.checkpoint)
    counts, share = parameter_counts(model), not args.no_share
    dense = not args.no_dense and keep_dense(model)
    trained = kind.head != "ask"
    (rows, cut), (val_rows, cut_val), (test_rows, cut_test) = (
        encode(tokenizer, kind, data.labels, part, args.max_text, data.train)
        for part in (data.train if trained else [], val if trained else [], test))
    cut = {key: cut[key] + cut_val[key] + cut_test[key] for key in cut}
    room = getattr(model.lm.config, "max_position_embeddings", math.inf)  # a T5 has no such end
    longest = max(len(row.prompt) for row in (*rows, *val_rows, *test_rows)) + MAX_ANSWER
    if longest > room:
        raise BadInput(f"--model {args.model} reads {room} tokens and the longest prompt with its "
                       f"answer may have {longest}: cut texts with --max-text")
    print(f"{args.model}: {counts['quantized'] / 1e6:.1f} M of {counts['total'] / 1e6:.1f} M "
          f"weights in {counts['packed_bytes'] / 1e6:.1f} MB of NF4 "
          f"({', '.join(quantized_layers(model))})"
          f"{' and, since memory allows, a dense copy of the rounded' * dense}; "
          f"{cut['texts_cut']} texts cut to {args.max_text} tokens", flush=True)
    facts = fit(model, rows, val_rows, settings, folder, args) if trained else {}
    result = predict(model, tokenizer, data.labels, test_rows, share, args.micro_batch or 64)
    facts |= dict(peak_memory_mb=peak_memory_mb(device), parameters=counts, dense_copy=dense,
                  device=str(device), **cut)
    return result, facts, model.trainable()


def run_chat(chat, kind, args, data, test, folder):
    """As run_local, of a model behind HTTP; BadInput if a row got no answer; None for --dry-run."""
    if kind.head != "ask":
        asking = ", ".join(name for name, method in METHODS.items() if method.head == "ask")
        raise BadInput(f"--model {args.model} can only be asked ({asking}), not trained")
    choose, prompts, few = choose_examples(kind, data.train), {}, 0
    for i, a in enumerate(test):
        examples = [x._replace(text=x.text[:4 * args.max_text]) for x in choose(a)]
        few += len(examples) < kind.shots
        parts = prompt_parts(kind, data.labels, a.text[:4 * args.max_text], a.user, examples)
        prompts[f"{i}:{text_id(a.text)}:{a.user}"] = "".join(sum(parts, []))
    if args.dry_run:
        dry_run(prompts, chat, MAX_ANSWER)
        return None
    path = os.path.join(folder, "answers.jsonl")
    answers, counts = ask_chatgpt(prompts, path, chat, args.seed, MAX_ANSWER, args.concurrency)
    if counts["failed"]:
        row, why = counts["failed"][0]
        raise BadInput(f"{len(counts['failed'])} of {len(prompts)} rows got no answer, the first "
                       f"({row}): {why}. Nothing is scored; the {len(answers)} answers are kept in "
                       f"{path}, and the same command asks for the others only")
    del counts["failed"]
    facts = dict(chat=counts, too_few_examples=few,
                 texts_cut=sum(len(a.text) > 4 * args.max_text for a in test))
    return read_answers([answers[row] for row in prompts], data.labels), facts, {}


def chat_model(name):
    """What a server calls the model that --model names, None if it runs here."""
    if not name.startswith("openai:"):
        return MODELS.get(name, {}).get("chat")
    if name == "openai:":
        raise BadInput("--model openai: needs a name behind it, as in openai:gpt-4o-mini")
    return name.removeprefix("openai:")


def run(method, args):
    """One row of the paper's table for one model and dataset: trains (unless the method only asks),
    predicts, scores, writes the run's files and prints a summary."""
    start, kind, settings = time.perf_counter(), METHODS[method], settings_of(args)
    chat = chat_model(args.model)
    if args.dry_run and not chat:
        raise BadInput(f"--dry-run is for models that cost money, and --model {args.model} is free")
    data = load_data(args.data, args.data_dir, args.text_col, args.user_col, args.labels)
    val, test = (rows[:args.max_eval or len(rows)] for rows in (data.val, data.test))
    print(f"{method} on {data.name}: {len(data.train):,} train, {len(val):,} validation, "
          f"{len(test):,} test annotations by {len({a.user for a in data.train})} users; "
          f"{len(data.labels)} labels: {', '.join(data.labels)}", flush=True)
    folder = run_folder(args.out, data.name, args.model, method, args.seed)
    source = f"{args.model} on {args.data_dir or args.data}, labels {','.join(data.labels)}"
    check_other_run(folder, source)
    if chat:
        outcome = run_chat(chat, kind, args, data, test, folder)
        if outcome is None:
            return
    with run_files(folder) as part:
        if not chat:
            outcome = run_local(kind, args, settings, data, val, test, part)
        result, facts, adapter = outcome
        metrics = dict(
            method=method, model=args.model, data=data.name, seed=args.seed, source=source,
            **f1_scores([a.labels for a in test], result["predicted"]), labels=data.labels,
            rows=dict(train=len(data.train), val=len(val), test=len(test), notes=data.notes),
            seconds=round(time.perf_counter() - start, 1), **facts,
            **{key: result[key] for key in ("unknown_words", "unreadable") if key in result},
            config=settings | {key: getattr(args, key) for key in (
                "max_text", "max_steps", "max_eval", "micro_batch", "no_share", "no_dense",
                "checkpoint")})
        write_run(part, metrics, data, test, result, adapter)
    print_summary(metrics, folder)


def print_summary(m, folder):
    """What a run ends with, for people."""
    print(f"\n{m['method']} with {m['model']} on {m['data']}, seed {m['seed']}")
    if "parameters" in m:
        p = m["parameters"]
        print(f"  parameters  {p['total']:,} in all, {p['trained']:,} trained; the packed base has "
              f"{p['packed_bytes']:,} bytes")
        print(f"  memory      {m['peak_memory_mb']:,} MB at most")
    print(f"  time        {m['seconds']:.0f} s")
    if "chat" in m:
        c = m["chat"]
        print(f"  requests    {c['requests']:,} sent, {c['retries']:,} of them again, "
              f"{c['cached']:,} answered before; tokens as the server counted them: "
              f"{c['prompt_tokens']:,} of prompts, {c['completion_tokens']:,} of answers")
    if "steps" in m:
        print(f"  training    {m['steps']} steps in {m['train_seconds']:.0f} s, "
              f"{m['rows_per_second']:.1f} annotations/s; {m['tokens_computed']:,} tokens "
              f"computed, {m['tokens_unshared']:,} without sharing")
    if m.get("too_few_examples"):
        print(f"  examples    {m['too_few_examples']} prompts have fewer than the method asks for")
    if "unreadable" in m:
        print(f"  answers     {m['unreadable']} of {m['rows']['test']} without a known label; "
              f"{m['unknown_words']} unknown words dropped")
    print(f"  F1-macro    {m['f1_macro']:.4f} (micro {m['f1_micro']:.4f}) on {m['rows']['test']:,} "
          "test annotations; by label:")
    width = max(map(len, m["labels"]))
    for label, f1 in zip(m["labels"], m["per_label"]):
        print(f"    {label:{width}}  {f1:.4f}  {'#' * round(40 * f1)}".rstrip())
    print(f"  files       {folder}{os.sep}")


def print_table(out):
    """F1-macro (mean over seeds) of every finished run: methods in rows, models in columns, a table
    a dataset, and behind each personalized value its gain over the plain twin."""
    f1 = defaultdict(list)
    pattern = os.path.join(glob.escape(out), "*", "*", "*", "seed*", "metrics.json")
    for m in finished_runs(sorted(glob.glob(pattern))):
        f1[m["data"], m["method"], model_name(m["model"])].append(m["f1_macro"])
    if not f1:
        raise BadInput(f"{out}: no finished run in it; make one with: python plm.py cls_p")
    mean = {key: sum(values) / len(values) for key, values in f1.items()}
    for data in sorted({data for data, *_ in mean}):
        models = sorted({model for d, _, model in mean if d == data})
        width = max(18, *(len(model) + 2 for model in models))
        print(f"\n{data}: F1-macro\n{'':8}" + "".join(f"{model:>{width}}" for model in models))
        for method in METHODS:
            cells = []
            for model in models:
                value = mean.get((data, method, model))
                plain = mean.get((data, method.removesuffix("_p"), model))
                gain = METHODS[method].personalized and None not in (value, plain)
                cells.append(("" if value is None else f"{value:.4f}")
                             + (f" ({value - plain:+.4f})" if gain else ""))
            if any(cells):
                print(f"{method:8}" + "".join(f"{cell:>{width}}" for cell in cells))


# --------------------------------------------------------------------------------------------------
# 16. How fast. `plm.py bench` times training steps on rows of the dataset and compares them with
# the floor: the operations that the distinct tokens cannot do without, at the rate at which this
# machine multiplies matrices. A frozen weight costs 4 operations a token: 2 forward, and 2 for the
# gradient of what went in; it needs none of its own.

BENCH_ROWS = 256  # annotations timed for a line, after a step of warm-up
BENCH = [  # a line of the bench: method, annotations a step, and annotators a text (0: all)
    ("cls", 32, 0), ("cls_p", 32, 0), ("lm", 32, 0), ("lm_p", 32, 0),
    ("cls_p", 8, 0), ("cls_p", 128, 0), ("cls_p", 32, 1), ("cls_p", 32, 3), ("cls_p", 32, 5)]


def annotators(rows, n, rng):
    """The first n annotations of every text that has as many, all of all texts for n = 0; the texts
    in random order."""
    by_text = defaultdict(list)
    for a in rows:
        by_text[a.text].append(a)
    groups = [group[:n or None] for group in by_text.values() if len(group) >= n]
    rng.shuffle(groups)
    return [a for group in groups for a in group]


def matmul_rate(device, dtype, n=1024, repeats=8):
    """Operations a second of (n, n) @ (n, n): the best of some."""
    a, best = torch.randn(n, n, device=device, dtype=dtype), math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        b = a @ a
        b[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n ** 3 / best


@contextmanager
def counted_operations(model):
    """A Counter in which `operations` adds up what training steps inside need at least: 4 a weight
    and token of linear layers; in a decoder also 12 D a layer for every token that a token sees."""
    count, config = Counter(), model.lm.config

    def linear(layer, args, out):
        n = layer.base.N * layer.base.K if isinstance(layer, LoRALinear) else layer.weight.numel()
        count["operations"] += 4 * n * math.prod(args[0].shape[:-1])

    def attention(backbone, args, kwargs):
        seen = (kwargs["position_ids"] + 1).sum().item()
        width = getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
        width *= config.num_attention_heads
        count["operations"] += 12 * config.num_hidden_layers * width * seen

    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    hooks = [m.register_forward_hook(linear) for m in (*layers, model.lm.get_output_embeddings())]
    if not model.seq2seq:
        hooks.append(model.lm.base_model.register_forward_pre_hook(attention, with_kwargs=True))
    yield count
    for hook in hooks:
        hook.remove()


def bench_rows(args, kind, tokenizer, data, batch, n):
    """The batches to time, and before them the first of them for warming up. Without --max-steps
    batches of any size hold the same annotations, or else the length of texts would tell more."""
    rng, most = random.Random(args.seed), min(BENCH_ROWS, (args.max_steps or BENCH_ROWS) * batch)
    some = annotators(data.train, n, rng)[:most]
    parts = in_batches(encode(tokenizer, kind, data.labels, some, args.max_text)[0], batch, rng)
    return parts[:1] + parts


def bench_line(args, method, batch, n):
    """dict of what a line of BENCH measures, in a process of its own for its peak of memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, settings, share = METHODS[method], settings_of(args), not args.no_share
    data = load_data(args.data, args.data_dir, args.text_col, args.user_col, args.labels)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, kind.head, len(data.labels), device, settings,
                                  args.checkpoint)
    dense = not args.no_dense and keep_dense(model)
    parts = bench_rows(args, kind, tokenizer, data, batch, n)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=settings["lr"], weight_decay=0.0)
    budget = math.inf if args.micro_batch else token_budget(model, sum(parts, []), share)
    done, needed, seconds, first = Counter(), 0, 0, None
    for i, part in enumerate(progress(parts, f"{method} {batch} {n or 'all'}", "steps")):
        distinct = make_batch(model, part)["tokens"]  # cut into pieces, a step computes some twice
        start = time.perf_counter()
        with counted_operations(model) as count:
            loss, tokens = train_step(model, part, optimizer, settings["clip"], share, budget,
                                      args.micro_batch)
            loss, tokens = loss.item(), int(tokens)  # waits for a GPU
        first = loss if i == 0 else first
        if i:
            seconds += time.perf_counter() - start
            needed += count["operations"] * distinct / tokens
            done.update(rows=len(part), tokens=tokens)
    rate = matmul_rate(device, model.lm.dtype)
    return dict(data=data.name, method=method, batch=batch, annotators=n or "all",
                steps=len(parts) - 1,
                rows_per_second=done["rows"] / seconds, tokens_per_second=done["tokens"] / seconds,
                tokens_per_row=done["tokens"] / done["rows"], matmul_gflops=rate / 1e9,
                share_of_floor=needed / rate / seconds, peak_memory_mb=peak_memory_mb(device),
                dense_copy=dense, first_loss=first)


def in_own_process(function, *args):
    """What function(*args) returns, computed in a new process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def bench(args):
    """`plm.py bench`: prints the lines of BENCH and writes them to bench.json."""
    lines = []
    data = load_data(args.data, args.data_dir, args.text_col, args.user_col, args.labels)
    most = max(Counter(a.text for a in data.train).values())
    print(f"{args.model} on {args.data}, {torch.get_num_threads()} threads\n"
          "method  batch  annotators  rows/s  tokens/s  tokens/row  of the floor  peak MB")
    for method, batch, n in BENCH:
        if n > most:
            print(f"{method:8}{batch:5}{n:12}  no text has as many")
            continue
        m = in_own_process(bench_line, args, method, batch, n)
        print(f"{m['method']:8}{m['batch']:5}{m['annotators']:>12}{m['rows_per_second']:8.2f}"
              f"{m['tokens_per_second']:10.0f}{m['tokens_per_row']:12.1f}"
              f"{m['share_of_floor']:13.0%}{m['peak_memory_mb']:10,}", flush=True)
        lines.append(m)
    folder = os.path.join(args.out, data.name, model_name(args.model))
    with run_files(folder) as part:
        with open(os.path.join(part, "bench.json"), "w", encoding="utf-8") as f:
            json.dump(lines, f, indent=1)
    print(f"files: {os.path.join(folder, 'bench.json')}")


# --------------------------------------------------------------------------------------------------
# 17. The original files. A file gets its name when it is complete and checked. Until then it is
# FILE.part, and FILE.part.version says which version of it the server was sending (its ETag), so
# that a later run goes on where this one ended, or begins again if it has changed.

def no_answer(url, seconds=6):
    """Why the server of an address does not answer at all; None if it does, whatever it says."""
    why = [f"no answer in {seconds} s"]

    def ask():
        try:
            requests.head(url, timeout=seconds)
            why[0] = None
        except requests.exceptions.ProxyError:
            why[0] = "the proxy refuses"
        except requests.RequestException:
            why[0] = "no connection"
    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no timeout
    thread.start()
    thread.join(seconds)
    return why[0]


def bad_content(path, file, row):
    """Why this cannot be the file it should be, going by its first line; None if it can."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as f:
        first = f.readline()
    if not first.strip() or first.lstrip().startswith("<"):
        return "a web page and not the file" if first.strip() else "nothing in it"
    if file.endswith(".tsv"):
        return None if first.count("\t") == 2 else "not three columns with tabs between them"
    needed = {row["text"]} if file in row["splits"].values() else {
        row["text"], row["user"], *row.get("labels", ())}
    missing = needed - set(next(csv.reader([first])))
    return f"no column {', '.join(sorted(missing))} in it" if missing else None


def fetch(session, url, part):
    """Asks once for what `part` lacks; True if it is whole then, going by the length named."""
    have, known, headers = 0, None, {"Accept-Encoding": "identity"}  # ranges of the file itself
    if os.path.exists(part) and os.path.exists(part + ".version"):
        with open(part + ".version", encoding="utf-8") as f:
            known = f.read()
        have = os.path.getsize(part) if known else 0
        headers |= {"Range": f"bytes={have}-", "If-Range": known} if have else {}
    with session.get(url, headers=headers, stream=True, timeout=(5, 30)) as r:
        version = r.headers.get("ETag", "W/")  # a weak ETag promises nothing about bytes
        version = r.headers.get("Last-Modified", "") if version.startswith("W/") else version
        if r.status_code == 416 or r.status_code == 206 and version != known:
            os.remove(part + ".version")  # the rest of something else: the next try begins again
            return False
        r.raise_for_status()
        have = have if r.status_code == 206 else 0
        with open(part, "ab" if have else "wb") as f:
            with open(part + ".version", "w", encoding="utf-8") as g:
                g.write(version)
            length, chunked = r.headers.get("Content-Length"), r.headers.get("Transfer-Encoding")
            total = have + int(length) if length else None
            with tqdm(total=total, initial=have, unit="B", unit_scale=True, dynamic_ncols=True,
                      desc=os.path.basename(part).removesuffix(".part")) as bar:
                for block in r.iter_content(1 << 13):
                    f.write(block)
                    bar.update(len(block))
    return os.path.getsize(part) == total if length else bool(chunked)  # chunks say where they end


def download(session, url, path, check, tries=5):
    """None when the file is there, else why it is not; check(path) says what is wrong with it."""
    part, complete = path + ".part", False
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    for _ in range(tries):
        try:
            complete = fetch(session, url, part)
        except requests.HTTPError as e:
            return f"{url}: {e.response.status_code} {e.response.reason}"
        except requests.RequestException:
            continue  # it broke off; what has come stays
        if complete:
            break
    if not complete:
        return f"{url}: broke off {tries} times (run this again to go on from there)"
    wrong = check(part)
    if wrong:
        os.remove(part)
    else:
        os.replace(part, path)
    os.remove(part + ".version")
    return f"{url}: {wrong}" if wrong else None


def download_data(name, folder):
    """Fetches the original files that the folder does not have, or says how to do it by hand."""
    row = DATASETS[name]
    missing = [file for file in row["urls"] if not os.path.exists(os.path.join(folder, file))]
    one_of_each_host = {urlsplit(row["urls"][file]).netloc: row["urls"][file] for file in missing}
    silent = (f"{host}: {w}" for host, url in one_of_each_host.items() if (w := no_answer(url)))
    why = next(silent, None)
    with requests.Session() as session:
        for scheme in ("https://", "http://"):  # a server that is busy is asked again
            session.mount(scheme, HTTPAdapter(max_retries=Retry(
                3, connect=1, backoff_factor=0.3, status_forcelist=(429, 500, 502, 503, 504),
                raise_on_status=False)))
        while missing and not why:
            file = missing[0]
            why = download(session, row["urls"][file], os.path.join(folder, file),
                           lambda path: bad_content(path, file, row))
            missing = missing if why else missing[1:]
    if why:
        raise BadInput("\n".join([
            f"cannot download {name} ({why}). By hand: save these files where the arrow points, "
            "then run this again",
            *(f"  {row['urls'][file]} -> {os.path.join(folder, file)}" for file in missing)]))
    for file in row["urls"]:  # also those that somebody put there by hand
        wrong = bad_content(os.path.join(folder, file), file, row)
        if wrong:
            raise BadInput(f"{os.path.join(folder, file)}: {wrong}; delete it, then run this again")


def make_data(name, data_dir=None, labels=None):
    """`plm.py data`: downloads, prepares, and prints the counts beside those of the authors."""
    row = DATASETS.get(name, {})
    if "urls" not in row:
        raise BadInput(f"--data {name}: nothing to download; there are: "
                       f"{', '.join(n for n in DATASETS if 'urls' in DATASETS[n])}")
    folder, expected, differ = data_dir or row["dir"], {}, False
    paths, original = annotation_files(folder, row)
    if original or not paths:
        print(f"{name}: {row['license']}", flush=True)
        try:
            download_data(name, folder)
        except OSError as e:
            raise BadInput(f"{e.filename or folder}: {e.strerror} (see --data-dir DIR)") from None
        expected = {"annotations": (row["rows"],)} | row["expected"]
    print(f"{'':30}", *(f"{part:>8}" for part in ("train", "val", "test", "users")))
    for stage, found in load_data(name, data_dir, labels=labels).notes.items():
        found = tuple(found.values()) if isinstance(found, dict) else (found,)
        print(f"{stage:30}", *(f"{n:>8,}" if isinstance(n, int) else n for n in found))
        if stage in expected:
            print(f"{'    the authors':30}", *(f"{n:>8,}" for n in expected[stage]))
            differ |= any(abs(n - m) > row["tolerance"] * m for n, m in zip(found, expected[stage]))
    if differ:
        print("WARNING: these counts are not the authors'; scores do not compare with theirs")
    elif not expected:
        print(f"{', '.join(paths)}: not the original files, so there are no counts to compare with")


# --------------------------------------------------------------------------------------------------
# 18. The command line.

class Parser(argparse.ArgumentParser):
    def error(self, message):
        flags = " ".join(flag for action in self._actions for flag in action.option_strings[-1:])
        raise BadInput(f"{message} (flags: {flags})" if "unrecognized" in message else message)


def number(kind, least, most=2 ** 62):
    """An argparse type: a number of that kind, from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most:,}")
        return value

    parse.__name__ = kind.__name__
    return parse


def make_parser():
    """The argparse parser. What a flag overrules stands in the tables."""
    p = Parser(
        prog="plm.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Personalized Large Language Models: one experiment, from annotations to F1.",
        epilog=f"methods:  {', '.join(METHODS)} (_p: told the user ID)\n"
               f"models:   {', '.join(MODELS)}\ndatasets: {', '.join(DATASETS)}")
    count = number(int, 1)
    p.add_argument("command", choices=[*METHODS, "data", "table", "bench"], metavar="COMMAND",
                   help="a method below; data: download and prepare; table: F1 of all runs; "
                        "bench: how fast")
    p.add_argument("--model", default="tiny", metavar="M",
                   help="a name below, a folder, a hub id, or openai:NAME over HTTP (tiny)")
    p.add_argument("--data", default="sample", metavar="D", help="a name below or a CSV (sample)")
    p.add_argument("--data-dir", metavar="DIR", help="where a named dataset is (data/NAME)")
    p.add_argument("--text-col", metavar="COL", help="column of the texts")
    p.add_argument("--user-col", metavar="COL", help="column of the user IDs")
    p.add_argument("--labels", type=lambda s: s.split(","), metavar="A,B,C",
                   help="columns of the labels (all others that are 0 or 1)")
    p.add_argument("--seed", type=number(int, 0), default=42, metavar="S",
                   help="of everything random in training (42)")
    p.add_argument("--out", default="out", metavar="DIR", help="folder of all runs (out)")
    for name, kind, what in (("lr", number(float, 1e-12), "learning rate"),
                             ("epochs", count, "passes over the training rows"),
                             ("r", count, "rank of LoRA"),
                             ("dropout", number(float, 0, 0.9), "dropout of LoRA")):
        p.add_argument(f"--{name}", type=kind, metavar="X",
                       help=f"{what} (as the model's row says, else {TRAINING[name]})")
    for name, default, what in (
            ("max-steps", 0, "train N steps at most"),
            ("max-eval", 0, "validate and test on the first N rows"),
            ("max-text", 384, "read N tokens of a text (384)"),
            ("micro-batch", 0, "compute N rows at once (what memory allows; this changes no result "
             "but the draw of dropout)"),
            ("concurrency", 8, "send N requests at a time to --model chatgpt (8)")):
        p.add_argument(f"--{name}", type=count, default=default, metavar="N", help=what)
    p.add_argument("--checkpoint", action="store_true",
                   help="keep less for the backward pass and compute it again: less memory, slower")
    p.add_argument("--no-dense", action="store_true",
                   help="keep no dense copy of the rounded weights, even where memory allows it")
    p.add_argument("--no-share", action="store_true", help="compute every prompt by itself")
    p.add_argument("--dry-run", action="store_true",
                   help="print what --model chatgpt would be asked and send nothing")
    return p


def main(argv=None):
    """Runs one command; returns the exit status."""
    transformers.logging.set_verbosity_error()
    try:
        args = make_parser().parse_args(argv)
        if args.command == "table":
            print_table(args.out)
        elif args.command == "data":
            make_data(args.data, args.data_dir, args.labels)
        elif args.command == "bench":
            bench(args)
        else:
            join_ranks()
            run(args.command, args)
    except BadInput as e:
        print(f"plm.py: {e}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) \
                and "allocate memory" not in str(e):
            raise
        gb = MODELS.get(args.model, {}).get("gb")
        need = f"; {args.model} was computed to need {gb} GB with --micro-batch 8" if gb else ""
        print("plm.py: out of memory: --micro-batch 1 computes one row at a time, --checkpoint "
              f"keeps less of it, --max-text 128 cuts long texts{need}", file=sys.stderr)
        return 2
    except OSError as e:
        print(f"plm.py: {e.filename or 'output'}: {e.strerror or e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nplm.py: stopped; the files of earlier runs are as they were", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
