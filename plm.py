"""plm.py: *Personalized Large Language Models* (arXiv 2402.09269) in one file.

Two people read the same comment; one finds it funny, the other hostile. The paper puts the reader's
user ID into the prompt of a language model, fine-tunes the model with QLoRA, and asks how much
better it then predicts the labels that this reader chose. This file is that experiment, from a CSV
of annotations to the F1 score.

    python plm.py cls_p                                 the default: tiny model, sample data
    python plm.py cls_p --model phi2 --data goemotions  the paper's model and data (make data)

Two chapters follow. data/evidence.py asks how far the score of a run can be believed. By
data/readers.py a trained run reads new sentences, and gets to know new people.

Row of the paper's table -> METHOD. A trailing _p is the personalized twin: it is told the user ID.
    CLS               cls               a classification head reads the end of the prompt
    LM                lm                the language model writes the labels: "anger, joy"
    Q-0S Q-1S Q-2S    q_0s q_1s q_2s    the model is asked untrained, with 0, 1 or 2 examples
    ...-P             ..._p             (the examples are the user's own)
    (baselines)       rates, rates_p    label rates of everybody, and of each user

Letters in the shapes below; () is a single number:
    R rows (annotations)         L labels                D width of a hidden state   V vocabulary
    T nodes of a prompt tree, or tokens of the longest of the B prompts of an encoder-decoder
    U users
    N, K out- and inputs of a linear layer               r rank of LoRA
    P places that a head reads   n answers that are being written

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
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import sys
import time
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

if __name__ == "__main__":  # Ctrl-C while torch is being loaded needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import requests
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutput

HERE = os.path.dirname(os.path.abspath(__file__))


class BadInput(Exception):
    """What the user gave cannot be used; the message says why in one line."""


def check(ok, message):
    """Raises BadInput unless `ok`."""
    if not ok:
        raise BadInput(message)


def progress(items, what, unit, total=None, initial=0):
    """A tqdm bar over items, shown once two seconds have passed; in a file, a line every 10 s."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(items, what, unit=" " + unit, total=total, initial=initial, delay=2, leave=False,
                dynamic_ncols=True, mininterval=interval)


def write_file(path, content):
    """Writes bytes, or a value as JSON; a killed process leaves the old file or the new one."""
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=1, allow_nan=False).encode()
    with open(path + ".part", "wb") as f:
        f.write(content)
    os.replace(path + ".part", path)


def read_json(path):
    """The dict in a JSON file of a run; empty if there is no such file."""
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as f:
        try:
            return dict(json.load(f))
        except (ValueError, TypeError):  # no JSON, or no dict
            raise BadInput(f"{path} is damaged; --fresh starts the run over") from None


def short(x):
    """A value of metrics.json in a few characters."""
    if isinstance(x, dict):
        return ", ".join(f"{key} {short(value)}" for key, value in x.items())
    if isinstance(x, list):
        return " to ".join(map(short, x))
    return f"{round(x, 6):,.4g}" if isinstance(x, float) else str(x)


# 1. What can be run -------------------------------------------------------------------------------
# A model, a method or a recipe is a row of a table. For every run make_config (section 13) merges
# what the tables, the flags and the data say into one dict, `config`, which most functions below
# are given: the recipe; if it is ours, what was tuned for the model; the flags (section 14), which
# overrule both; the fields of the Method; and labels, single, ordered and none of the Dataset.

OURS = dict(
    ids="token",         # how the prompt names the user: token or number (section 3)
    prompt="tree",       # the reader behind the text; "paper": before it, as in [1]
    nobody=True,         # learn to read for nobody in particular as well (section 10)
    tune="lora",         # "full" trains every weight but those of the LM's head
    quant=True,          # False leaves the weights as they are stored
    r=8, alpha=32, dropout=0.0,  # LoRA on every linear of the backbone, times alpha / r [3]
    lr=4e-4,             # learning rate
    head_lr=1,           # of the classification head: times lr
    user_lr=35,          # of the user tokens: times lr, times the RMS of the embeddings' entries
    epochs=3,            # the epoch with the lowest validation loss is kept [1]
    warmup=0.05,         # share of all steps in which the rate rises
    clip=1.0,            # largest norm of the gradient
    batch=32,            # annotations a step
)
PAPER = dict(ids="number", prompt="paper", nobody=False, r=2, dropout=0.05, lr=1e-4, epochs=10)
RECIPES = {"ours": OURS, "paper": OURS | PAPER}

MODELS = {  # name -> hub id or folder; [1] has the last five
    "tiny": f"{HERE}/data/models/tiny",
    "tiny_t5": f"{HERE}/data/models/tiny_t5",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "flan_t5_small": "google/flan-t5-small",
    "flan_t5_base": "google/flan-t5-base",
    "flan_t5": "google/flan-t5-xl",
    "phi2": "microsoft/phi-2",
    "stablelm": "stabilityai/stablelm-tuned-alpha-3b",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.2",
    "chatgpt": "gpt-3.5-turbo",  # over HTTP; [1] asked it in 2023
}

TUNED = {  # name -> what differs from our recipe
    "tiny": dict(lr=3e-3, head_lr=3, epochs=4),
    "tiny_t5": dict(lr=1e-3, epochs=8),
    "smollm2": dict(lr=5e-4, epochs=2),
    "flan_t5_small": dict(lr=1e-3),
    "flan_t5_base": dict(lr=5e-4),
    "phi2": dict(lr=1e-4),
    "stablelm": dict(lr=1e-4),
    "mistral": dict(lr=1e-4),
}


class Method(NamedTuple):
    head: str           # "cls" and "lm" are trained, "ask" is the LM untrained, "rates" no model
    personalized: bool  # is the user told?
    shots: int          # solved examples in the prompt


METHODS = {
    "rates": Method("rates", False, 0), "rates_p": Method("rates", True, 0),
    "q_0s": Method("ask", False, 0), "q_0s_p": Method("ask", True, 0),
    "q_1s": Method("ask", False, 1), "q_1s_p": Method("ask", True, 1),
    "q_2s": Method("ask", False, 2), "q_2s_p": Method("ask", True, 2),
    "cls": Method("cls", False, 0), "cls_p": Method("cls", True, 0),
    "lm": Method("lm", False, 0), "lm_p": Method("lm", True, 0),
}

# 2. Annotations and splits ------------------------------------------------------------------------
# One row of a CSV is one person's judgement of one text. There is one form of it: columns `text`
# and `user`, and columns of labels, which are all others (but for `time` and splits) in one of
# three kinds:
#
#     several columns of 0 and 1    any number may be chosen; the columns are the labels
#     one column x of 0 and 1       one is chosen; the labels are "not x" and "x"
#     one column of anything else   one is chosen; the values are the labels, and a rating if all of
#                                   them are numbers
#
# A `split` column is followed to the letter. Without one a hash splits the texts, and validation
# and test keep only users that training knows: the model has met the reader, never the text [1].
#
# data/prepare.py makes this form of nearly any file. So nothing is guessed or mended here: the
# first cell that is not what CELLS says ends the run, with the command that makes the form.

PARTS = ("train", "val", "test")
NUMBER = re.compile(r"[+-]?\d{1,18}([.]\d+)?(e[+-]?\d\d?)?")  # in a rating, and finite

CELLS = {  # what a cell has to be -> a regular expression of the whole of it
    "a text": r"(?s).*\S.*",
    "a user ID": r"(?s)(?!\d([.,]\d+)?E\+\d+$)\S(.*\S)?",  # not 3.9E+16, of a spreadsheet
    "0 or 1": r"[01]",
    "one choice": r"(?![\[{])(?!.*\w\s*[#|;]\s*\w)\S(.*\S)?",  # not "a#b", "[a, b]"
    "train, val, test or empty": r"(train|val|test)?",
}


class Annotation(NamedTuple):
    text: str
    user: str
    labels: tuple  # (L) of 0 and 1


def gold_labels(annotations):
    """(R, L) of 0 and 1: what was really chosen."""
    return np.array([a.labels for a in annotations])


def grouped(items, keys):
    """dict key -> list of the items that have it, in their order."""
    found = defaultdict(list)
    for item, key in zip(items, keys):
        found[key].append(item)
    return found


class Dataset(NamedTuple):
    name: str
    labels: list   # (L) names
    single: bool   # a row chooses exactly one label (softmax), or else any number (sigmoids)
    ordered: bool  # single, and the labels are a rating: numbers in order
    none: bool     # are there rows in which nothing is chosen?
    parts: dict    # train, val, test -> list of Annotation
    notes: dict    # for people: "rows read" -> how many, "split by" -> a column or a hash, ...
    sha: str       # of the file


@functools.cache
def text_id(text):
    """16 hex digits that stand for a text in files; case and white space make no difference."""
    words = " ".join(text.lower().split())
    return hashlib.sha256(words.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_of(text):
    """'train' (70 %), 'val' (15 %) or 'test' (15 %) by a hash of the text: no seed, no file."""
    share = int(text_id(text), 16) / 16 ** 16
    if share < 0.70:
        return "train"
    return "val" if share < 0.85 else "test"


@contextmanager
def in_file(path):
    """Adds to a BadInput about a CSV which file it is, and what mends it."""
    try:
        yield
    except BadInput as e:
        raise BadInput(f"{path}: {e}; make data FILE={path} ARGS=\"--text-col A --user-col B\" "
                       "makes the form of nearly any file") from None


def read_csv(path, *needed):
    """list of dicts, one a row, of a CSV in UTF-8 that has the needed columns."""
    csv.field_size_limit(1_000_000_000)  # a cell may hold more than the csv module's 128 KB
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f, restval="", strict=True)
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError) as e:
        raise BadInput(f"no CSV in UTF-8: {e}") from None
    check(rows, "no annotations in it")
    columns = reader.fieldnames
    for column in (*needed, *columns):
        check(columns.count(column) == 1,
              f"needs exactly one column {column!r}, not {', '.join(columns)}")
    for number, row in enumerate(rows, 1):  # DictReader has what is too much under None
        check(None not in row, f"row {number} has more cells than the header")
    return rows


def label_columns(rows, split_col):
    """list of the columns that hold labels: neither time nor another split does."""
    columns = []
    for column in rows[0]:
        values = {row[column] for row in rows}
        another_split = values <= {*PARTS, ""} and values != {""}
        if column not in ("text", "user", "time", split_col) and not another_split:
            columns.append(column)
    check(columns, "no column of labels beside text and user")
    for column in columns:
        check(column and column == column.strip(),
              f"a column of labels is called {column!r}: it needs a name without space around it")
    return columns


def label_cells(rows, columns):
    """(dict label -> (its column, the cell that chooses it), are the labels a rating?)"""
    if len(columns) > 1:
        return {column: (column, "1") for column in columns}, False
    column = columns[0]
    values = {row[column] for row in rows}
    if values <= {"0", "1"}:
        return {f"not {column}": (column, "0"), column: (column, "1")}, False
    ordered = all(map(NUMBER.fullmatch, values))
    meaning = float if ordered else str
    check(len(values) <= 100, f"{column!r} holds {len(values)} values, more than 100")
    check(len(set(map(meaning, values))) == len(values), f"{column!r} spells a value in two ways")
    return {cell: (column, cell) for cell in sorted(values, key=meaning)}, ordered


def read_annotations(path, split_col):
    """(list of (Annotation, its part of the split), dict(labels, single, ordered), the column that
    says the part or None) of a CSV."""
    found = []
    with in_file(path):
        rows = read_csv(path, "text", "user", *([split_col] if split_col else []))
        if split_col is None and "split" in rows[0]:
            split_col = "split"
        columns = label_columns(rows, split_col)
        single = len(columns) == 1
        form = dict.fromkeys(columns, "one choice" if single else "0 or 1")
        form |= {"text": "a text", "user": "a user ID"}
        if split_col:
            form[split_col] = "train, val, test or empty"
        labels, ordered = label_cells(rows, columns)
        for number, row in enumerate(rows, 1):
            for column, what in form.items():
                if not re.fullmatch(CELLS[what], row[column]):
                    raise BadInput(f"row {number}: {column!r} is {row[column]!r:.80}, not {what}")
            chosen = tuple(int(row[column] == cell) for column, cell in labels.values())
            part = row[split_col] if split_col else split_of(row["text"])
            found.append((Annotation(row["text"], row["user"], chosen), part))
    return found, dict(labels=list(labels), single=single, ordered=ordered), split_col


def split_annotations(found, by_hash):
    """(dict part -> list of Annotation, Counter of the strangers and of what is left out)"""
    left_out = Counter()
    known = {a.user for a, part in found if part == "train"}
    parts = {part: [] for part in PARTS}
    for a, part in found:
        if a.user not in known:
            left_out["rows of users unknown to training"] += 1
            part = "" if by_hash else part
        if part:
            parts[part].append(a)
        else:
            left_out["rows left out"] += 1
    return parts, left_out


def some_texts(annotations, n):
    """About n annotations, all those of the texts that a hash chooses, whatever --seed."""
    first = set(sorted(text_id(a.text) for a in annotations)[:n])
    return [a for a in annotations if text_id(a.text) in first]


def file_sha(path):
    """16 hex digits that stand for a file."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def csv_of(name):
    """The path of a CSV, or of the CSV data/NAME/annotations.csv."""
    path = name if os.path.isfile(name) else f"{HERE}/data/{name}/annotations.csv"
    check(os.path.isfile(path), f"--data {name}: no CSV, nor in data/; make data DATA={name} makes "
                                "known ones, as goemotions")
    return path


def load_data(name, split_col=None, max_eval=0):
    """The Dataset of data/NAME/annotations.csv or of a CSV file of that form."""
    path = csv_of(name)
    found, what, split_col = read_annotations(path, split_col)
    check(len(what["labels"]) > 1, f"--data {name}: every row chooses {what['labels'][0]!r}")
    parts, left_out = split_annotations(found, by_hash=split_col is None)
    notes = {"rows read": len(found), "split by": split_col or "a hash of the text", **left_out}
    for part in PARTS:
        advice = "it has too few texts, or readers whom training does not know"
        if split_col:
            advice = f'make data FILE={path} ARGS="--split-col none" splits its texts anew'
        check(parts[part], f"--data {name}: no row for {part}; {notes}; {advice}")
    if max_eval:
        for part in ("val", "test"):
            parts[part] = some_texts(parts[part], max_eval)
    none = not all(any(a.labels) for a, _ in found)
    name = os.path.splitext(os.path.basename(os.path.normpath(name)))[0]
    return Dataset(name, **what, none=none, parts=parts, notes=notes, sha=file_sha(path))


def print_data(data):
    """The first lines of a run: what was read and left out, and what there is."""
    print(short(data.notes))
    for part, annotations in data.parts.items():
        texts = {a.text for a in annotations}
        users = {a.user for a in annotations}
        print(f"{part}: {len(annotations)} rows, {len(texts)} texts, {len(users)} users")
    rates = gold_labels(data.parts["train"]).mean(0)
    print("a row of train chooses", short(dict(zip(data.labels, rates))))


# 3. Prompts and answers ---------------------------------------------------------------------------
# Our prompt asks about the text first and names the reader last: all readers of a text share what
# stands before them, and section 6 computes it once. CLS-P's ends at the reader, where the head
# reads the classes. LM-P's has a colon behind the reader, and there the answer begins. (Q-P's has
# the line "### Response:" there, and a prompt that names no reader ends with that line, too.)
#
#     Which of the labels would this user choose for the text? Answer with labels from the list,
#     separated by commas.
#     ### Labels: funny, hostile, sad
#     ### Text: well done, genius
#     ### User ID: 17:                        and the LM goes on: " funny, hostile"
#
# The paper's order (--prompt paper) has the reader before the text. Readers share no text then, and
# it costs three to four times the tokens:
#
#     Which of the labels would this user choose for the text? Answer with labels from the list,
#     separated by commas.
#     ### Labels: funny, hostile, sad
#     ### User ID: 17
#     ### Text: well done, genius
#     ### Response:
#
# `ids` says how a user is named: "number", as in the paper, by the CSV's own ID; "token" by a token
# of the user's own, whose embedding is trained [7]. One more token stands for nobody in particular,
# and strangers are read by it.

QUESTION = {  # is the user told?
    False: "Which of the labels fit the text?",
    True: "Which of the labels would this user choose for the text?"}
SHOWN = {
    False: " First see how other people answered.",
    True: " First see how this user answered before."}
HOW = {  # (one label a row?, are there rows without?)
    (True, False): " Answer with one label from the list.",
    (False, False): " Answer with labels from the list, separated by commas.",
    (False, True): " Answer with labels from the list, separated by commas, or with none."}
NONE = "none"     # the answer where no label is chosen
NOBODY = None     # the user who is nobody in particular
SECTION = "\n###"  # begins every part of a prompt but the first
# A piece of a prompt is (kind, string); prompt_pieces says which kinds there are.
TEXT = ("words", f"{SECTION} Text:")
USER_ID = ("words", f"{SECTION} User ID:")
RESPONSE = ("words", f"{SECTION} Response:")
BEHIND_READER = {"cls": [], "lm": [("words", ":")], "ask": [RESPONSE]}


def instruction(config):
    """What every prompt of a run begins with: the question and the list of labels."""
    question = QUESTION[config["personalized"]]
    if config["shots"]:
        question += SHOWN[config["personalized"]]
    question += HOW[config["single"], config["none"]]
    return f"{question}{SECTION} Labels: {', '.join(config['labels'])}"


def answer_text(labels, chosen):
    """The answer that an LM is trained to give, the chosen labels in the list's order: ' a, c'."""
    names = [label for label, y in zip(labels, chosen) if y]
    return " " + (", ".join(names) or NONE)


def prompt_pieces(config, text, user, examples=()):
    """list of (kind, string): the prompt in pieces, each tokenized by itself. Kind "first" begins
    it, "text" may be cut if it is long, "reader" may be a token, "words" are ours."""
    reader = [USER_ID, ("reader", f" {user}")]
    told = config["personalized"]
    pieces = [("first", instruction(config))]
    if told and config["prompt"] == "paper":
        pieces += reader
    for example in examples:
        answer = answer_text(config["labels"], example.labels)
        pieces += [TEXT, ("text", f" {example.text}"), RESPONSE, ("words", answer)]
    pieces += [TEXT, ("text", f" {text}")]
    if told and config["prompt"] == "tree":
        return pieces + reader + BEHIND_READER[config["head"]]
    return pieces + [RESPONSE]


def words_of(text):
    """The words of a text without case and punctuation; -1 is "minus 1", combining marks stay."""
    text = unicodedata.normalize("NFC", text).lower()
    text = re.sub(r"(?<!\w)-(?=\d)", "minus ", text)
    letters = [c if unicodedata.category(c)[0] in "LNM" else " " for c in text]
    return "".join(letters).split()


def parse_answer(answer, labels, single=False):
    """((L) of 0 and 1, number of words that belong to no label). Where one label begins another the
    longer is read. If only one label may be chosen, the first that is named counts."""
    label_of = {}  # the words of a label -> the label
    for i, label in enumerate(sorted(labels, key=len, reverse=True)):
        name = " ".join(words_of(label))
        if not name:  # a label of symbols alone gets a word
            name = f"symbol{i}"
            answer = answer.replace(label, f" {name} ")
        label_of[name] = label
    names = "|".join(sorted(label_of, key=len, reverse=True))
    whole = rf"(?<!\S)(?:{names})(?!\S)"  # words are letters and digits: none to escape
    words = " ".join(words_of(answer))
    found = [label_of[name] for name in re.findall(whole, words)]
    if single:
        found = found[:1]
    rest = re.sub(whole, "", words).split()
    unknown = sum(word != NONE for word in rest)
    return tuple(int(label in found) for label in labels), unknown


def chosen_together(data):
    """set of what rows of the data choose, each (L) of 0 and 1."""
    return {a.labels for a in sum(data.parts.values(), [])}


def check_answers(data):
    """BadInput if an answer would be read as other labels than it was written for."""
    check(NONE not in data.labels, f"a label is called {NONE!r}, which is the answer without a "
                                   "label: rename it, or take cls or cls_p")
    for chosen in chosen_together(data):
        answer = answer_text(data.labels, chosen)
        read, _ = parse_answer(answer, data.labels, data.single)
        check(read == chosen, f"the answer {answer.strip()!r} could mean other labels: rename "
                              "them, or take cls or cls_p")


def answer_room(data):
    """How many tokens an answer may take, here and over HTTP: half the bytes of the longest in the
    data (a token seldom holds less than two), and 32 for a sentence around it."""
    answers = [answer_text(data.labels, chosen).encode() for chosen in chosen_together(data)]
    return 32 + max(map(len, answers), default=0) // 2


def example_chooser(config, train):
    """A function: an annotation -> up to `shots` of other texts, the user's own or other users'."""
    by_user = grouped(train, [a.user for a in train])

    def choose(asked):
        if not config["shots"]:
            return []
        rng = random.Random(f"{text_id(asked.text)} {asked.user}")
        candidates = by_user[asked.user]
        if not config["personalized"]:
            candidates = [a for a in rng.choices(train, k=100) if a.user != asked.user]
        distinct = dict.fromkeys(candidates)
        fitting = [a for a in distinct if text_id(a.text) != text_id(asked.text)]
        return rng.sample(fitting, min(config["shots"], len(fitting)))

    return choose


def tokenize(tokenizer, piece, first=False):
    """Token ids of a piece as it stands inside a prompt, or `first` in it. SentencePiece marks what
    begins a text, so a piece inside is tokenized behind a letter, whose token is then cut off.
    Special tokens that somebody wrote into a text are read as letters."""
    def plain(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids

    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if special.intersection(plain(piece)):  # a SentencePiece vocabulary has "</s>" as a word
        for token in tokenizer.all_special_tokens:
            piece = piece.replace(token, f"{token[0]} {token[1:]}")
    letter = plain("a")
    inside = plain("a" + piece)
    if first or inside[:len(letter)] != letter:  # or the letter grew together with the piece
        return plain(piece)
    return inside[len(letter):]


def frame(tokenizer, chat=False):
    """(ids before, ids after) a prompt: its <s> or </s>; if `chat`, the model's chat template."""
    if chat and tokenizer.chat_template:
        asked = [{"role": "user", "content": "\0"}]
        try:
            around = tokenizer.apply_chat_template(asked, tokenize=False,
                                                   add_generation_prompt=True).split("\0")
        except Exception:  # a template is a program: it may want a system message, or parts
            around = []
        if len(around) == 2:
            return [tuple(tokenizer(x, add_special_tokens=False).input_ids) for x in around]
        print("the chat template of this model takes no plain question; it is asked without one")
    around = tuple(tokenizer("").input_ids)
    start = around.count(tokenizer.bos_token_id)  # <s> begins a prompt, T5's </s> ends it
    return around[:start], around[start:]


def ids_of_users(config, users, V):
    """dict user -> the token id that stands for the user, from V on; the last is nobody's, by which
    strangers are read. It is empty where users have no token."""
    if not config["personalized"] or config["ids"] == "number":
        return {}
    return {user: V + i for i, user in enumerate([*users, NOBODY])}


class Row(NamedTuple):
    """An annotation in token ids."""
    prompt: tuple
    reader_at: int  # where the reader stands in the prompt, or None
    nobody: tuple   # the prompt as it is for nobody in particular; () if there is no such token
    answer: tuple   # with the end token
    labels: tuple
    annotation: Annotation
    weight: float = 1.0  # of this row in the loss


def encode_rows(tokenizer, config, annotations, train, user_ids):
    """(list of Row, Counter of texts_cut and too_few_examples) of the annotations. `train` has the
    examples, `user_ids` is what ids_of_users returned."""
    before, after = frame(tokenizer, chat=config["head"] == "ask")
    choose_examples = example_chooser(config, train)
    counts = Counter()

    @functools.cache
    def ids_of(kind, piece):
        ids = tokenize(tokenizer, piece, kind == "first")
        if kind == "text" and len(ids) > config["max_text"]:
            counts["texts_cut"] += 1  # once, however many rows have the text
            ids = ids[:config["max_text"]]
        return tuple(ids)

    rows = []
    for a in annotations:
        examples = choose_examples(a)
        counts["too_few_examples"] += len(examples) < config["shots"]
        prompt = before
        reader_at = None
        for kind, piece in prompt_pieces(config, a.text, a.user, examples):
            ids = ids_of(kind, piece)
            if kind == "reader":
                reader_at = len(prompt)
                if user_ids:
                    ids = (user_ids.get(a.user, user_ids[NOBODY]),)
            prompt += ids
        prompt += after
        nobody = ()
        if user_ids:
            nobody = (*prompt[:reader_at], user_ids[NOBODY], *prompt[reader_at + 1:])
        answer = (*ids_of("words", answer_text(config["labels"], a.labels)), tokenizer.eos_token_id)
        rows.append(Row(prompt, reader_at, nobody, answer, a.labels, a))
    return rows, counts


def label_tokens(tokenizer, config):
    """(place, ids): the place at which the answers begin to differ, and the token of each label
    there, whose logit is the label's score. Labels with the same token there share a score."""
    names = [*config["labels"], NONE] if config["none"] else config["labels"]
    answers = [(*tokenize(tokenizer, f" {name}"), tokenizer.eos_token_id) for name in names]
    check(len(set(answers)) == len(names), "this model has the same tokens for two labels")
    place = len(os.path.commonprefix(answers))  # " 1", " 2" may share the space
    tokens = [ids[place] for ids in answers]
    if config["single"] and len(set(tokens)) < len(names):
        print("some labels begin with the same token: answers tell them apart, scores do not")
    return place, tokens


# 4. NF4: frozen weights in 4 bits -----------------------------------------------------------------
# Why quantize? The weights of the backbone are never trained, only read, so they may be stored
# coarsely: a model of 7 billion weights takes 3.6 GB instead of 14.
#
# How? Trained weights are nearly normally distributed: most of them are small. The 16 values of NF4
# are quantiles of the normal distribution, and so lie closest where most weights are [2]. A block
# of 64 weights is divided by its largest magnitude (absmax), and each weight becomes the index of
# the nearest of the 16 values. Two indices fill a byte, the first in its high half:
#
#     weights   -0.31   0.02   0.11  ...   one block of 64, its absmax 0.31
#     / absmax  -1.00   0.06   0.35  ...
#     index         0      8     11  ...   of -1.0, 0.0796, 0.3379
#     bytes      0x08         0xB?   ...
#
# The absmax themselves take 8 bits ("double quantization"): their mean is subtracted, and in blocks
# of 256 they are rounded to the 256 values of the dynamic map [5] in the same way. Together that
# makes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits a weight, byte for byte what bitsandbytes stores
# [4].
#
# And in training? The gradient of x W^T by x needs W. Had we written F.linear(x, dequantize()),
# autograd would keep the dense W of every layer until the backward pass, and the saving would be
# gone. NF4Matmul keeps the layer's bytes alone and dequantizes once more on the way back. (Where
# memory is plentiful, section 7 keeps a dense copy of the rounded weights after all: the same
# numbers, faster.)

NF4 = torch.tensor([  # a test computes these quantiles anew
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


@functools.cache
def dynamic_map():
    """(256) the values of an 8-bit code that is fine near 0: 7 decades, both signs, 0 and 1 [5]."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        positive.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(positive)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


@functools.cache
def codebook(code, device):
    """What a stored byte means, as a table on the device: of "nf4" its two values (256, 2), of
    "dynamic" the one value of dynamic_map (256)."""
    values = torch.cartesian_prod(NF4, NF4) if code == "nf4" else dynamic_map()
    return values.to(device)


def nearest(values, code):
    """The index of the nearest value of an ascending code."""
    midpoints = (code[1:] + code[:-1]) / 2
    return torch.bucketize(values, midpoints.to(values.device))


def in_blocks(flat, size):
    """(numbers) -> (blocks, size), filled up with zeros."""
    missing = -len(flat) % size
    return F.pad(flat, (0, missing)).view(-1, size)


def scaled_to_one(blocks):
    """(blocks (blocks, size), each divided by its largest magnitude, and these (blocks))"""
    absmax = blocks.abs().amax(1)
    inverse = 1 / absmax.clamp(min=1e-38)  # as [4]: blocks / absmax has other last bits
    return blocks * inverse[:, None], absmax


def quantize_nf4(weight):
    """(N, K) -> packed (N*K/2) uint8, absmax (N*K/64) float32; sizes rounded up."""
    scaled, absmax = scaled_to_one(in_blocks(weight.detach().flatten().float(), 64))
    index = nearest(scaled.flatten(), NF4).to(torch.uint8)
    packed = (index[::2] << 4) | index[1::2]
    n_bytes = (weight.numel() + 1) // 2
    return packed[:n_bytes], absmax


def quantize_absmax(absmax):
    """absmax (blocks) -> code (blocks) uint8, scale (blocks/256) float32, offset () float32."""
    offset = absmax.mean()
    scaled, scale = scaled_to_one(in_blocks(absmax - offset, 256))
    step = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()  # [4] first rounds to 65,536 even steps
    code = nearest(step.flatten() / 65535 * 2 - 1, dynamic_map())
    return code[:len(absmax)].to(torch.uint8), scale, offset


class NF4Matmul(torch.autograd.Function):
    """x (.., K) -> x W^T + bias (.., N), with a backward pass that dequantizes W again."""
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(grad.dtype), None  # (.., N) @ (N, K) -> (.., K)


class NF4Linear(nn.Module):
    """A frozen nn.Linear (N, K) whose weight is stored in NF4."""
    weight = None  # T5 asks a layer's weight for its dtype; there is no dense weight to ask

    def __init__(self, linear):
        super().__init__()
        self.N, self.K = linear.weight.shape
        self.bias = linear.bias
        self.dense = None  # a dense W to compute with instead of the bytes, if somebody sets one
        packed, absmax = quantize_nf4(linear.weight)
        code, scale, offset = quantize_absmax(absmax)
        self.register_buffer("packed", packed)
        self.register_buffer("absmax_code", code)
        self.register_buffer("absmax_scale", scale)
        self.register_buffer("absmax_offset", offset)

    def absmax(self):
        """(blocks) float32, what quantize_absmax rounded"""
        code = codebook("dynamic", self.packed.device)[self.absmax_code.int()]
        scale = self.absmax_scale.repeat_interleave(256)[:len(code)]
        return code * scale + self.absmax_offset

    def dequantize(self, dtype=torch.float32):
        """(N, K) the weights to compute with; from the bytes in float32, cast last."""
        if self.dense is not None:
            return self.dense.to(dtype)
        values = codebook("nf4", self.packed.device)[self.packed.int()]
        blocks = in_blocks(values.flatten(), 64) * self.absmax()[:, None]
        return blocks.flatten()[:self.N * self.K].view(self.N, self.K).to(dtype)

    def forward(self, x):
        if self.dense is not None:
            return F.linear(x, self.dense.to(x.dtype), self.bias)
        return NF4Matmul.apply(x, self)


# 5. LoRA: what is trained -------------------------------------------------------------------------
# The frozen W gets a companion of low rank [3]:
#     y = W x + (alpha / r) B A dropout(x),   A (r, K), B (N, r), both float32
# A is drawn at random and B is zero, so that the model begins as it was. LoRALinear wraps a layer
# and leaves its bytes alone.

class LoRALinear(nn.Module):
    """base(x) + scaling * B A dropout(x)"""
    weight = None  # see NF4Linear

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base = base
        self.scaling = alpha / r
        self.dropout = dropout
        device = base.packed.device
        self.lora_A = nn.Parameter(torch.empty(r, base.K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.N, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as the code of [3]

    def forward(self, x):
        dropped = F.dropout(x, self.dropout, self.training)
        low = F.linear(dropped, self.lora_A.to(x.dtype)) * self.scaling
        return self.base(x) + F.linear(low, self.lora_B.to(x.dtype))


def add_lora(model, r, alpha, dropout):
    """Wraps every NF4Linear of a model in a LoRALinear, in place."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, NF4Linear)}
    check(layers, f"{type(model).__name__} has no linear layer for LoRA")
    for path, layer in layers.items():
        model.set_submodule(path, LoRALinear(layer, r, alpha, dropout))


# 6. The prompt tree -------------------------------------------------------------------------------
# The prompts of a batch begin alike: all of them with the instruction, and those of one text with
# that text. In a decoder the state of a token depends on itself and the tokens before it alone. So
# a beginning that two prompts have in common comes out the same in both, and it is enough to
# compute it once. Written one below the other, the prompts of a batch are a tree:
#
#     Which of ... Text: -+- well done, genius ... User ID: -+- 17
#                         |                                  +- 44
#                         +- nice dog ... User ID: -+- 17
#                                                   +- 96
#
# Every token of it is a node. We lay all nodes into one flat sequence without padding, each behind
# its parent, and call the transformer once. Its tokens know of each other in two ways only, and we
# pass both to the call. The first are positions: that of a node is its depth in the tree, so 17 and
# 44 above have the same position. The second is the mask of attention: a node sees itself and what
# its parent sees, that is, its own branch back to the root, as in a prompt of its own:
#
#     node  token  parent  position    sees 0 1 2 3 4 5
#        0  Text:      -          0         x
#        1  well       0          1         x x
#        2  17         1          2         x x x
#        3  44         1          2         x x   x
#        4  nice       0          1         x       x
#        5  17         4          2         x       x x
#
# Dropout aside, the states, the loss and the gradients are those of separate prompts: this is no
# approximation [6]. A text with nine readers costs little more than one with a single reader.
#
# Most of the mask is empty, since no text sees another. On a CPU the nodes are therefore taken a
# block at a time, in their order, and a block looks only at the columns that one of its nodes sees:
# what all texts share, the block itself, and what its first text has in the blocks before. The
# products grow with the texts and not with their square. (A GPU's kernel takes the whole mask.)

def prompt_tree(paths, share=True):
    """Merges sequences of ids (paths) into a tree. Returns input_ids, positions and parents, lists
    over its T nodes, and branches: the nodes of each path from its first token on. Nodes are
    numbered as they are met: all of the first path, then what the second adds, and so on. Without
    `share` no two paths meet."""
    input_ids = []
    positions = []
    parents = []
    branches = []
    node_of = {}  # (parent, token) -> node
    for i, path in enumerate(paths):
        parent = -1 if share else -1 - i  # above the first token: one root for all, or one each
        branch = []
        for position, token in enumerate(path):
            key = (parent, token)
            if key not in node_of:
                node_of[key] = len(input_ids)
                input_ids.append(token)
                positions.append(position)
                parents.append(parent)
            parent = node_of[key]
            branch.append(parent)
        branches.append(branch)
    return input_ids, positions, parents, branches


def tree_mask(parents):
    """(T, T) bool: does the node of the row see that of the column?"""
    sees = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    return torch.from_numpy(sees)


def additive_mask(sees, dtype):
    """(1, 1, rows, columns) as transformers adds it to the scores of attention: 0 or -inf."""
    mask = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    return mask.masked_fill_(~sees, -math.inf)[None, None]


BLOCK = 96  # rows of the mask for which attention is computed at once, on a CPU


def tree_blocks(sees):
    """list: for each block of a mask (rows, columns) the columns that any of its rows sees."""
    return [rows.any(0).nonzero().flatten() for rows in sees.split(BLOCK)]


def tree_inputs(paths, share=True):
    """(dict of what a decoder is given of the tree of some paths, branches as of prompt_tree)"""
    input_ids, positions, parents, branches = prompt_tree(paths, share)
    inputs = dict(input_ids=torch.tensor(input_ids), positions=torch.tensor(positions),
                  sees=tree_mask(parents))
    return inputs, branches


def to_device(inputs, device):
    """A dict of tensors on the device. A GPU copies from pinned memory while the host goes on."""
    if device.type == "cpu":
        return inputs
    return {name: x.pin_memory().to(device, non_blocking=True) for name, x in inputs.items()}


def attend(query, key, value, mask):
    """(B, heads, n, width) what n tokens of each of B texts (a tree counts as one) attend to among
    m. query (B, heads, n, width) is scaled; key and value (B, kv_heads, m, width) may have fewer
    heads, each for some of the query's in a row; mask (B, 1, n, m) is added to the scores."""
    B, heads, n, width = query.shape
    scores = query.reshape(B, key.shape[1], -1, width) @ key.transpose(2, 3)
    weights = F.softmax(scores.view(B, heads, n, -1) + mask, -1)
    return (weights.view_as(scores) @ value).view_as(query)


def tree_attention(module, query, key, value, attention_mask, scaling, blocks=None, **_):
    """((B, n, heads, width), None): attention as transformers calls it, query (B, heads, n, width),
    block by block if there are blocks, as of tree_blocks (data/readers.py has none)."""
    query = query * scaling
    if blocks is None:
        return attend(query, key, value, attention_mask).transpose(1, 2), None
    found = []
    for rows, mask, seen in zip(query.split(BLOCK, 2), attention_mask.split(BLOCK, 2), blocks):
        found.append(attend(rows, key.index_select(2, seen), value.index_select(2, seen),
                            mask.index_select(3, seen)))
    return torch.cat(found, 2).transpose(1, 2), None


transformers.AttentionInterface.register("tree", tree_attention)


# 7. The model and its two heads -------------------------------------------------------------------
# The backbone is transformers' own module with its linear layers turned into NF4Linear; its own
# dropout stays off. Heads are neither quantized nor given LoRA: the classification head (L, D) is
# trained whole, the language model's (V, D) stays as it is. In an encoder-decoder the
# classification head reads the decoder's state at its start token.
#
# Users with a token of their own have the ids V, V + 1, ..., V + U - 1, behind those of words, and
# their embeddings (U, D) are trained. The id V + U is nobody's. Its embedding is the mean of all
# words and stays so: it is LoRA that learns to read for nobody. Every user starts there too, and so
# differs from nobody by what the user's own annotations teach and by nothing else.
#
# What a backbone is given is a dict, made in section 8. Of a decoder it holds input_ids, positions
# and sees, the tree of section 6; of an encoder-decoder input_ids and mask, the distinct prompts,
# prompt_of, the prompt of each row, and decoder_input_ids.

MAX_NODES = {"cpu": 640, "cuda": 8192}  # computed at once, unless --max-nodes says otherwise


class PersonalizedLM(nn.Module):
    """A backbone with a head, "cls" or "lm", for users with tokens of their own (if there are any).
    label_tokens: where an LM begins to tell labels apart (see label_tokens)."""
    def __init__(self, lm, head, n_labels, n_users=0, label_tokens=None):
        super().__init__()
        self.lm = lm
        self.head = head
        self.label_tokens = label_tokens
        self.seq2seq = lm.config.is_encoder_decoder
        self.share = True  # compute once what prompts have in common
        self.max_nodes = MAX_NODES[lm.device.type]
        if not self.seq2seq:
            lm.set_attn_implementation("tree" if lm.device.type == "cpu" else "sdpa")
        self.user_embedding = None
        if n_users:
            words = lm.get_input_embeddings().weight.detach()
            self.register_buffer("nobody", words.float().mean(0, keepdim=True), persistent=False)
            self.user_embedding = nn.Parameter(self.nobody.repeat(n_users, 1))
        if head == "cls":
            width = lm.get_output_embeddings().weight.shape[1]
            self.score = nn.Linear(width, n_labels, bias=False, device=lm.device)
            nn.init.normal_(self.score.weight, std=0.02)

    @property
    def device(self):
        return self.lm.device

    @property
    def V(self):
        return self.lm.get_input_embeddings().weight.shape[0]

    def train(self, mode=True):
        """Dropout is LoRA's alone: the backbone stays as it is at prediction."""
        for layer in self.modules():
            if isinstance(layer, LoRALinear):
                layer.training = mode
        return self

    def trainable(self):
        """dict name -> parameter of all that is trained: LoRA (or the whole backbone), the
        classification head, users."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def embed(self, input_ids):
        """(.., D) the embeddings of tokens, from V on of users."""
        words = self.lm.get_input_embeddings()
        if self.user_embedding is None:
            return words(input_ids)
        as_words = words(input_ids.clamp(max=self.V - 1))
        rows = torch.cat([self.user_embedding, self.nobody])
        as_users = F.embedding((input_ids - self.V).clamp(min=0), rows)
        as_users = as_users * getattr(words, "embed_scale", 1)  # as a Gemma does with words
        is_user = input_ids[..., None] >= self.V
        return torch.where(is_user, as_users.to(as_words.dtype), as_words)

    def decode(self, input_ids, positions, sees, cache=None):
        """(T, D) the states of T nodes of a tree in a decoder; sees (T, nodes in the cache + T).
        These nodes are numbered behind those in the cache, if there is one, and are added to it."""
        blocks = tree_blocks(sees) if self.device.type == "cpu" else None
        out = self.lm.base_model(
            inputs_embeds=self.embed(input_ids[None]), position_ids=positions[None],
            attention_mask=additive_mask(sees, self.lm.dtype), past_key_values=cache,
            use_cache=cache is not None, blocks=blocks)
        return out.last_hidden_state[0]

    def encode(self, input_ids, mask):
        """(B, T, D) what the decoder of an encoder-decoder reads of prompts (B, T)."""
        encoder = self.lm.get_encoder()
        return encoder(inputs_embeds=self.embed(input_ids), attention_mask=mask).last_hidden_state

    def hidden(self, batch):
        """(P, D) the states that the head reads, at the places of a batch. They are taken with
        index_select: on a CPU its gradient adds up in the same order in every run, which that of
        x[at] need not do. (On a GPU neither order is promised here.)"""
        if not self.seq2seq:
            states = self.decode(batch["input_ids"], batch["positions"], batch["sees"])
            return states.index_select(0, batch["at"])
        memory = self.encode(batch["input_ids"], batch["mask"]).index_select(0, batch["prompt_of"])
        out = self.lm.get_decoder()(
            input_ids=batch["decoder_input_ids"], encoder_hidden_states=memory, use_cache=False,
            encoder_attention_mask=batch["mask"].index_select(0, batch["prompt_of"]))
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch["at"])

    def token_logits(self, hidden):
        """(P, D) -> (P, V) float32"""
        if getattr(self.lm.config, "scale_decoder_outputs", False):  # a T5 with tied embeddings
            hidden = hidden * self.lm.model_dim ** -0.5
        return self.lm.get_output_embeddings()(hidden).float()

    def read(self, hidden):
        """(P, L) scores of the labels, or (P, V) logits of the next token; float32."""
        if self.head == "cls":
            return self.score(hidden.float())
        return self.token_logits(hidden)

    def forward(self, batch):
        """What the head reads at every place of a batch."""
        return self.read(self.hidden(batch))


UNSUPPORTED = ("quantization_config", "num_local_experts", "num_experts")  # in a model's config


def load_pretrained(name):
    """(transformers' model as it is stored, its tokenizer); BadInput if it is not whole."""
    source = MODELS.get(name, name)
    there = os.path.isdir(source) or re.fullmatch(r"[^./~][^/]*/[^/]+", source)
    check(there, f"--model {name}: no folder, Hugging Face id or name ({', '.join(MODELS)})")
    check(not os.path.exists(f"{source}/adapter_model.safetensors"),
          f"--model {name}: an adapter lies beside the weights; merge it, or move it away")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # there are our own
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        auto = transformers.AutoModelForCausalLM
        if config.is_encoder_decoder:
            auto = transformers.AutoModelForSeq2SeqLM
        lm, info = auto.from_pretrained(source, attn_implementation="eager", dtype="auto",
                                        output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as e:  # whatever a library says of a file that may hold anything
        why = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        raise BadInput(f"--model {name} cannot be used ({why})") from None
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    wrong += [key for key in info["unexpected_keys"] if "scale" in key]  # of quantized weights
    wrong += [key for key in UNSUPPORTED if getattr(config, key, None)]
    check(not wrong, f"--model {name}: missing, of another shape or not supported: {wrong[:1]}")
    return lm, tokenizer


def fit_tokenizer(name, lm, tokenizer):
    """Gives a model its end tokens; BadInput if a tokenizer does not fit it. Many chat models end
    a turn with another token than their tokenizer's, so both count; the model's other settings for
    writing (sampling, penalties) do not."""
    ends = lm.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = sorted({*ends, tokenizer.eos_token_id} - {None})
    check(ends, f"--model {name}: no end token (eos_token)")
    if tokenizer.eos_token_id is None:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    start = getattr(lm.config, "decoder_start_token_id", None)
    lm.generation_config = transformers.GenerationConfig(
        eos_token_id=ends, decoder_start_token_id=start)
    V = lm.get_input_embeddings().weight.shape[0]
    last = max(tokenizer.get_vocab().values())
    check(last < V, f"--model {name}: its tokenizer has a token {last}, its embeddings end at "
                    f"{V - 1}; resize them (resize_token_embeddings), then save the folder again")


def fingerprint(lm, tokenizer):
    """16 hex digits that stand for a model's weights, as stored, and its tokenizer."""
    sha = hashlib.sha256()
    for name, tensor in sorted(lm.state_dict().items()):
        flat = tensor.flatten()
        some = flat[::max(len(flat) // 1000, 1)].float()  # enough: training changes nearly all
        sha.update(name.encode() + some.numpy().tobytes())
    sha.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return sha.hexdigest()[:16]


def freeze(lm, device, quant=True):
    """The model, frozen, in float32 on the device, its linear layers turned into NF4Linear. Without
    `quant` these have their bytes all the same, but compute with unrounded weights (`dense`)."""
    head = lm.get_output_embeddings()
    linear = {path: layer for path, layer in lm.named_modules()
              if isinstance(layer, nn.Linear) and layer is not head}
    for path, layer in progress(linear.items(), "quantize", "layers", len(linear)):
        frozen = NF4Linear(layer.to(device))
        if not quant:  # a parameter, so that its dtype changes as that of all others
            frozen.dense = nn.Parameter(layer.weight.detach())
        lm.set_submodule(path, frozen)
        layer.weight = None  # so that its dense weight goes now
    for p in lm.parameters():
        p.data = p.data.to(torch.float32, copy=True)  # no view of the mapped file
    return lm.requires_grad_(False).to(device).eval()


@torch.no_grad()
def check_forward(model):
    """BadInput if our forward pass gives other numbers than transformers' own for some prompts, or
    the same numbers for all prompts. The model has to be in float32 for that."""
    lm = model.lm
    name = f"{type(lm).__name__} is not supported"
    if model.seq2seq:  # its own encoder and decoder are called as they are
        check(lm.config.model_type in ("t5", "mt5"), f"{name}: no T5")
        return
    prompts = [[3, 4, 5, 6], [3, 4, 7, 5], [3, 4, 7, 6], [7, 3, 6, 4]]  # any tokens
    attention = lm.config._attn_implementation
    lm.set_attn_implementation("eager")
    theirs = lm(torch.tensor(prompts, device=model.device), use_cache=False).logits[:, -1]
    lm.set_attn_implementation(attention)
    inputs, branches = tree_inputs(prompts)
    try:
        states = model.decode(**to_device(inputs, model.device))
    except ValueError as e:
        raise BadInput(f"{name}: it takes no mask of ours ({e})") from None
    logits = model.token_logits(states[[branch[-1] for branch in branches]])
    off = (logits - theirs).norm() / theirs.norm()
    check(off < 1e-4, f"{name}: our forward pass is {off:.2%} off")
    check((logits[1:] != logits[:-1]).any(1).all(), f"{name}: it reads no prompt")


def find_device():
    """The GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # cuDNN's attention plans every new shape anew, and shapes change every step here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda")


def compute_dtype(device, width, asked=None):
    """The dtype asked for, else bfloat16 where the device multiplies it faster than float32."""
    if asked:
        return getattr(torch, asked)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = width >= 256 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def cast(model, dtype):
    """Lets a model compute in `dtype`. What is trained stays float32; so do the scales of NF4 and
    the tables of rotary positions, which are buffers."""
    for p in model.lm.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)


def keep_dense(model):
    """Keeps dense copies of the rounded weights if a quarter of the memory holds them: nothing is
    dequantized anew then, which is faster."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    if model.device.type == "cuda":
        memory = torch.cuda.mem_get_info()[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    dtype = model.lm.dtype
    needed = sum(layer.N * layer.K * dtype.itemsize for layer in layers)
    if 4 * needed <= memory:
        for layer in layers:
            layer.dense = layer.dequantize(dtype)


def load_model(config, users=()):
    """(PersonalizedLM, tokenizer, fingerprint of the base model), checked and ready to be used.
    Users are those that training knows, in the order of their tokens."""
    device = find_device()
    lm, tokenizer = load_pretrained(config["model"])
    fit_tokenizer(config["model"], lm, tokenizer)
    base_sha = fingerprint(lm, tokenizer)
    trained = config["head"] != "ask"
    full = trained and config["tune"] == "full"
    if full:  # no NF4, no LoRA: the backbone itself is trained, in float32, to compare with
        lm = lm.to(device).float().eval()
        lm.get_output_embeddings().requires_grad_(False)  # and words' embeddings where tied to it
    else:
        lm = freeze(lm, device, config["quant"])
        if trained:
            add_lora(lm, config["r"], config["alpha"], config["dropout"])
    n_users = len(users) if config["ids"] == "token" else 0
    tokens = label_tokens(tokenizer, config) if config["head"] == "lm" else None
    head = "cls" if config["head"] == "cls" else "lm"
    model = PersonalizedLM(lm, head, len(config["labels"]), n_users, tokens).train(False)
    model.share = config["share"]
    model.max_nodes = config["max_nodes"] or model.max_nodes
    check_forward(model)
    if not full:
        cast(model, compute_dtype(device, lm.config.hidden_size, config["dtype"]))
        if config["quant"] and not config["no_dense"]:
            keep_dense(model)
    return model, tokenizer, base_sha


# 8. Batches ---------------------------------------------------------------------------------------
# A batch says in the same three fields, for both heads and both kinds of model, where the head
# reads and what it should say there: `at` (P) the places; `target` the labels (P, L) or the ids of
# all answers (P); `weight` (P) in the loss. CLS reads one place of a row, the end of its prompt (in
# an encoder-decoder the decoder's start token stands for it). LM reads that and every token of the
# answer but the last: the state at a token predicts the next. The other fields are for the backbone
# (section 7).

def targets_of(rows, head):
    """dict(target, weight) of some rows, in their order."""
    if head == "cls":
        target = [row.labels for row in rows]
        weight = [row.weight for row in rows]
    else:
        target = [token for row in rows for token in row.answer]
        weight = [row.weight for row in rows for token in row.answer]
    return dict(target=torch.tensor(target), weight=torch.tensor(weight))


def path_of(row, head):
    """What the ids of a row are in a tree. The last one of an LM's answer is only predicted."""
    return row.prompt + row.answer[:-1] if head == "lm" else row.prompt


def tree_batch(model, rows, head):
    """The batch of some rows for a decoder: their prompt tree."""
    inputs, branches = tree_inputs([path_of(row, head) for row in rows], model.share)
    at = []
    for row, branch in zip(rows, branches):
        at += branch[len(row.prompt) - 1:]
    return inputs | dict(at=torch.tensor(at))


def padded(sequences):
    """(ids (B, T), mask (B, T): 1 where there is a token) of some sequences of ids."""
    pad = nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(s) for s in sequences], batch_first=True)
    return ids, pad([torch.ones(len(s), dtype=torch.long) for s in sequences], batch_first=True)


def pair_batch(model, rows, head):
    """The batch of some rows for an encoder-decoder: an encoder reads both ways, so only equal
    prompts are computed once."""
    start = (model.lm.config.decoder_start_token_id,)
    place_of = {}  # prompt -> its place in the batch
    prompt_of = []
    answers = []
    for i, row in enumerate(rows):
        key = (row.prompt, 0 if model.share else i)
        prompt_of.append(place_of.setdefault(key, len(place_of)))
        answers.append(start + row.answer[:-1] if head == "lm" else start)
    input_ids, mask = padded([prompt for prompt, _ in place_of])
    decoder_input_ids, there = padded(answers)
    return dict(input_ids=input_ids, mask=mask, decoder_input_ids=decoder_input_ids,
                prompt_of=torch.tensor(prompt_of), at=there.flatten().nonzero().flatten())


def make_batch(model, rows):
    """The batch of some rows for this model, on its device."""
    of_rows = pair_batch if model.seq2seq else tree_batch
    batch = of_rows(model, rows, model.head) | targets_of(rows, model.head)
    return to_device(batch, model.device)


def by_text(rows):
    """list of lists: the rows of each text, in the order of the rows."""
    return list(grouped(rows, [row.annotation.text for row in rows]).values())


def shuffled_steps(rows, size, rng):
    """Lists of `size` rows in random order; those of a text stand side by side, to share nodes."""
    texts = by_text(rows)
    rng.shuffle(texts)
    flat = [row for own in texts for row in own]
    return [flat[i:i + size] for i in range(0, len(flat), size)]


def micro_batches(model, rows, max_nodes):
    """Lists of rows, neighbours, that have at most max_nodes nodes, or a single row. Padding counts
    in an encoder-decoder, where every row is as long as the longest of its list."""
    chunks = []
    nodes = 0
    longest = 0
    last = ()
    for row in rows:
        path = path_of(row, model.head)
        longest = max(longest, len(path))
        if model.seq2seq and chunks:
            nodes = longest * (len(chunks[-1]) + 1)
        else:
            shared = os.path.commonprefix([path, last]) if model.share else ()  # of any sequences
            nodes += len(path) - len(shared)  # at most so many are new
        if not chunks or nodes > max_nodes:
            chunks.append([])
            longest = len(path)
            nodes = len(path)  # in a new list nothing is shared
        chunks[-1].append(row)
        last = path
    return chunks


# 9. Scores ----------------------------------------------------------------------------------------
# The paper's score is the F1 of each label and their plain mean: a rare label counts as much as a
# frequent one. Beside it stands the loss, which asks how probable the model took the truth to be.
# How far such numbers can be believed is the subject of data/evidence.py.

def f1_scores(gold, predicted):
    """dict(f1_macro, accuracy of whole rows, per_label) of 0/1 arrays (R, L). F1 is
    2TP / (2TP + FP + FN), and 0 where there is nothing (scikit-learn's zero_division=0)."""
    gold = np.asarray(gold, bool)
    predicted = np.asarray(predicted, bool)
    hits = 2 * (gold & predicted).sum(0)
    ticks = gold.sum(0) + predicted.sum(0)
    per_label = hits / np.maximum(ticks, 1)
    return dict(
        f1_macro=float(per_label.mean()),
        accuracy=float((gold == predicted).all(1).mean()),
        per_label=per_label.tolist())


def probabilities(scores, single):
    """(R, L) of scores: a softmax of a single choice, else sigmoids."""
    scores = torch.as_tensor(scores)
    p = scores.softmax(1) if single else scores.sigmoid()
    return p.numpy()


def mean_loss(gold, scores, single):
    """Mean negative log-likelihood, per row of a single choice, else per label of each row."""
    p = probabilities(scores, single)
    of_truth = p[gold.astype(bool)] if single else np.where(gold, p, 1 - p)
    return float(-np.log(np.maximum(of_truth, 1e-12)).mean())


def chosen_labels(scores, single):
    """(R, L) of 0 and 1: the highest score of a single choice, else all above 0."""
    if single:
        return np.eye(scores.shape[1], dtype=int)[scores.argmax(1)]
    return (scores > 0).astype(int)


def measure(config, annotations, result):
    """dict of the metrics of what a run predicted for some annotations. result: dict(predicted
    (R, L), scores (R, L) where there are any, counts of answers in words)."""
    gold = gold_labels(annotations)
    found = f1_scores(gold, result["predicted"])
    found["labels_without_test_row"] = int((~gold.any(0)).sum())
    for key in ("unknown_words", "unreadable", "cut"):  # of answers in words
        if key in result:
            found[key] = result[key]
    if "scores" in result:
        found["test_loss"] = mean_loss(gold, result["scores"], config["single"])
    return found


# 10. Training -------------------------------------------------------------------------------------
# The loss of CLS is the cross-entropy of a single choice, else the binary cross-entropy of the
# labels; the loss of LM is the cross-entropy of the answer's tokens. Either is a weighted mean over
# all targets of a step, however its rows are cut into micro-batches. A personalized model of ours
# also learns to read for nobody: each text of a step is read once more behind nobody's token (for
# CLS, one more node of the tree), and what its readers chose is what should be said there, at a
# lower weight. AdamW in float32, a cosine schedule with warm-up, clipped gradients; the epoch with
# the lowest validation loss is kept [1]. Dropout depends on seed and step alone, so a run that is
# taken up again needs no random state.

STATE = "state.pt"  # in a run's folder, until the run is finished
SAVE_EVERY = 120    # seconds; and after every epoch
NOBODY_WEIGHT = 0.3  # of a row that is read for nobody, beside 1 for its reader


def summed_loss(out, batch, head, single):
    """() the loss of a batch, the weighted sum over its targets. out: what the model returned."""
    target = batch["target"]
    if head == "cls" and not single:
        losses = F.binary_cross_entropy_with_logits(out, target.float(), reduction="none").mean(1)
    else:
        answer = target.argmax(1) if head == "cls" else target
        losses = F.cross_entropy(out, answer, reduction="none")
    return (losses * batch["weight"]).sum()


def for_nobody(rows):
    """The rows as nobody in particular reads them."""
    return [row._replace(prompt=row.nobody, weight=NOBODY_WEIGHT) for row in rows]


def learning_rate(step, steps, lr, warmup):
    """The rate of a step (from 0): a line up, then half a cosine down to nearly 0."""
    rise = max(math.ceil(warmup * steps), 1)
    if step < rise:
        return lr * (step + 1) / rise
    fallen = (step - rise) / max(steps - rise, 1)
    return lr * 0.5 * (1 + math.cos(math.pi * fallen))


def make_optimizer(model, config):
    """AdamW over LoRA (or the backbone), the classification head and the user tokens, each at its
    own rate."""
    # AdamW moves every number by about its rate, whatever its size. Those in T5's embeddings are
    # 100 times SmolLM2's, so the rate of users is in units of their root mean square (RMS).
    words = model.lm.get_input_embeddings().weight
    rms = torch.linalg.vector_norm(words, dtype=torch.float32).item() / math.sqrt(words.numel())
    times_lr = dict(lm=1.0, score=config["head_lr"], user_embedding=config["user_lr"] * rms)
    groups = []
    for kind, times in times_lr.items():
        params = [p for name, p in model.trainable().items() if name.startswith(kind)]
        if params:
            groups.append(dict(params=params, times=times))
    return torch.optim.AdamW(groups, lr=config["lr"], weight_decay=0.0, fused=True)


def prepare_step(model, rows, config):
    """list of batches of a step: its rows, and its texts as nobody reads them."""
    if config["nobody"]:
        texts = by_text(rows)
        rows = []
        for own in texts:
            rows += own + for_nobody(own)
    return [make_batch(model, chunk) for chunk in micro_batches(model, rows, model.max_nodes)]


def update(optimizer, lr):
    """One step of the optimizer, of each group at its own rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["times"]
    optimizer.step()
    optimizer.zero_grad()


def train_step(model, batches, optimizer, lr, config):
    """() the loss of one optimizer step: the weighted mean over the targets of its batches."""
    model.train(True)
    total = sum(batch["weight"].sum() for batch in batches)
    loss = 0
    for batch in batches:
        part = summed_loss(model(batch), batch, model.head, config["single"]) / total
        part.backward()
        loss += part.detach()
    nn.utils.clip_grad_norm_(model.trainable().values(), config["clip"])
    update(optimizer, lr)
    return loss


def save_tensors(path, tensors, key, value):
    """Writes tensors and, under one key, a value as JSON. safetensors writes several keys in any
    order; one keeps the file the same bytes in every run."""
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_file(path, safetensors_bytes(tensors, {key: json.dumps(value)}))


def load_tensors(path, key):
    """(dict name -> tensor, the value of `key`) that save_tensors wrote."""
    try:
        with safe_open(path, "pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}, json.loads(f.metadata()[key])
    except SafetensorError as e:
        raise BadInput(f"{path} is damaged ({e}); --fresh runs it again") from None


def save_state(path, state, model, optimizer, best):
    """Writes what a run needs to go on."""
    whole = dict(state=state, best=best, model=model.trainable(), optimizer=optimizer.state_dict())
    file = io.BytesIO()
    torch.save(whole, file)
    write_file(path, file.getvalue())


def load_state(path, model, optimizer):
    """(state, parameters of the best epoch) that save_state wrote; the rest goes where it was."""
    try:
        whole = torch.load(path, map_location=model.device, weights_only=True)
    except Exception as e:  # whatever torch says of bytes that may be anything
        raise BadInput(f"{path} is damaged ({type(e).__name__}); --fresh runs it again") from None
    model.load_state_dict(whole["model"], strict=False)
    optimizer.load_state_dict(whole["optimizer"])
    return whole["state"], whole["best"]


def plan_steps(rows, config):
    """list of (epoch, rows) of all the steps of a run."""
    plan = []
    for epoch in range(1, config["epochs"] + 1):
        rng = random.Random(f"{config['seed']} {epoch - 1}")
        for step_rows in shuffled_steps(rows, config["batch"], rng):
            plan.append((epoch, step_rows))
    return plan[:config["max_steps"] or None]


def chunks_to_read(model, rows):
    """Lists of rows for one forward pass each. Neighbours share most, and are of about one length,
    for an encoder's padding."""
    rows = sorted(rows, key=lambda row: (len(row.annotation.text), row.prompt))
    return micro_batches(model, rows, model.max_nodes)


@torch.no_grad()
def read_labels(model, rows, config, what):
    """(mean loss, scores (R, L)) of encoded rows. An LM reads each prompt with its true answer
    behind it. Its scores are the logits at the first place where answers differ (label_tokens):
    only what all answers have in common stands before it, so nothing of the truth is in them."""
    model.train(False)
    loss = 0
    total = 0
    scores = {}  # of each prompt
    for chunk in progress(chunks_to_read(model, rows), what, "batches"):
        batch = make_batch(model, chunk)
        out = model(batch)
        loss += summed_loss(out, batch, model.head, config["single"])
        total += batch["weight"].sum()
        if model.head == "lm":
            place, tokens = model.label_tokens
            tokens = tokens[:len(config["labels"])]  # without that of "none"
            answers = out.split([len(row.answer) for row in chunk])  # (tokens, V) for each row
            out = torch.stack([logits[place, tokens] for logits in answers])
        for row, line in zip(chunk, out.cpu().numpy()):
            scores[row.prompt] = line
    return (loss / total).item(), np.array([scores[row.prompt] for row in rows])


def begin(path, model, optimizer, base_sha):
    """(state, parameters of the best epoch) to train on from: new, or those of a stopped run."""
    if not os.path.exists(path):
        return dict(step=0, seconds=0.0, log=0, val_loss=math.inf, base_sha=base_sha), {}
    state, best = load_state(path, model, optimizer)
    check(state["base_sha"] == base_sha,
          f"{path} was begun with other weights or another tokenizer: --fresh starts over")
    print(f"resuming at step {state['step']}")
    return state, best


def record(log, **line):
    """Adds a line to log.jsonl; BadInput if a number in it is not finite."""
    print(json.dumps(line), file=log)
    for key, value in line.items():
        check(math.isfinite(value), f"{key} is {value} at step {line['step']}: lower --lr")


def train(model, rows, config, base_sha, folder):
    """Trains on from the state in `folder`, if any, and leaves the best epoch's parameters in the
    model. Returns dict(step, val_loss, rows_per_second)."""
    optimizer = make_optimizer(model, config)
    plan = plan_steps(rows["train"], config)
    state, best = begin(f"{folder}/{STATE}", model, optimizer, base_sha)
    saved = time.time()
    with open(f"{folder}/log.jsonl", "a", buffering=1) as log, \
            progress(None, "train", "steps", len(plan), state["step"]) as bar:
        log.truncate(min(state["log"], log.tell()))  # later steps are done again
        for step, (epoch, step_rows) in enumerate(plan[state["step"]:], state["step"] + 1):
            start = time.perf_counter()
            batches = prepare_step(model, step_rows, config)
            lr = learning_rate(step - 1, len(plan), config["lr"], config["warmup"])
            torch.manual_seed(1000003 * config["seed"] + 1009 * step)
            loss = train_step(model, batches, optimizer, lr, config).item()
            record(log, step=step, epoch=epoch, loss=loss, lr=lr)
            bar.set_postfix(dict(epoch=epoch, loss=loss), refresh=False)
            bar.update()
            state["step"] = step
            state["seconds"] += time.perf_counter() - start
            epoch_ends = step == len(plan) or plan[step][0] > epoch  # that of the next step
            if epoch_ends:
                val_loss, _ = read_labels(model, rows["val"], config, "validate")
                record(log, step=step, epoch=epoch, val_loss=val_loss)
                bar.write(f"epoch {epoch}: val_loss {short(val_loss)}", file=sys.stdout)
                if val_loss < state["val_loss"]:
                    state["val_loss"] = val_loss
                    best = {name: p.detach().clone() for name, p in model.trainable().items()}
            if epoch_ends or time.time() - saved > SAVE_EVERY:
                state["log"] = log.tell()
                save_state(f"{folder}/{STATE}", state, model, optimizer, best)
                saved = time.time()
    model.load_state_dict(best, strict=False)
    return dict(val_loss=state["val_loss"], step=len(plan),
                rows_per_second=sum(len(step_rows) for _, step_rows in plan) / state["seconds"])


# 11. Prediction -----------------------------------------------------------------------------------
# CLS ticks the labels whose scores are above 0, or the highest if only one can be chosen. LM
# writes, by greedy decoding: the prompts of a batch are a tree as before, every answer grows on at
# the end of its prompt, and is read back into labels. An answer that was cut off before it ended,
# or a thought that did not end, says nothing.

def write_with_decoder(model, prompts, ends, limit):
    """Greedy decoding: the ids of the answers to n prompts. Every pass adds a token to each."""
    device = model.device
    inputs, branches = tree_inputs(prompts, model.share)
    inputs = to_device(inputs, device)
    leaves = [branch[-1] for branch in branches]
    own = torch.eye(len(prompts), dtype=torch.bool, device=device)
    position = torch.tensor([len(ids) for ids in prompts], device=device)
    answers = torch.empty(len(prompts), 0, dtype=torch.long, device=device)
    ends = torch.tensor(ends, device=device)
    cache = transformers.DynamicCache()
    hidden = model.decode(**inputs, cache=cache)[leaves]
    sees = inputs["sees"][leaves]  # an answer sees what the end of its prompt sees ...
    while True:
        written = model.token_logits(hidden).argmax(1)
        answers = torch.cat([answers, written[:, None]], 1)
        ended = torch.isin(answers, ends).any(1)
        if answers.shape[1] == limit or ended.all():
            return answers.tolist()
        sees = torch.cat([sees, own], 1)  # ... and its own tokens, one more every time
        hidden = model.decode(written, position, sees, cache)
        position = position + 1


def write_with_encoder_decoder(model, prompts, ends, limit):
    """Greedy decoding: the ids of the answers to n prompts."""
    input_ids, mask = padded(prompts)
    mask = mask.to(model.device)
    memory = model.encode(input_ids.to(model.device), mask)
    out = model.lm.generate(encoder_outputs=BaseModelOutput(last_hidden_state=memory),
                            attention_mask=mask, max_new_tokens=limit, eos_token_id=ends,
                            pad_token_id=ends[0])
    return out[:, 1:].tolist()


@torch.no_grad()
def write_answers(model, tokenizer, rows, config):
    """list of dict(answer, cut: did it end at the limit?), one a row."""
    model.train(False)
    ends = model.lm.generation_config.eos_token_id
    limit = config["answer_room"]
    write = write_with_encoder_decoder if model.seq2seq else write_with_decoder
    distinct = {row.prompt: row for row in rows}  # equal prompts are answered once
    replies = {}
    for chunk in progress(chunks_to_read(model, distinct.values()), "write", "batches"):
        prompts = [row.prompt for row in chunk]
        for prompt, ids in zip(prompts, write(model, prompts, ends, limit)):
            end = next((i for i, token in enumerate(ids) if token in ends), None)
            answer = tokenizer.decode(ids[:end], skip_special_tokens=True)
            replies[prompt] = dict(answer=answer.strip(), cut=end is None)
    return [replies[row.prompt] for row in rows]


def final_words(reply, in_thought=False):
    """The answer in a reply, without the thoughts before it and without a "###" section behind it,
    which models that only continue a text go on to write. "" if it was cut off before its end."""
    _, thought_ended, answer = reply["answer"].rpartition("</think>")
    unfinished = in_thought and not thought_ended
    if unfinished or "<think>" in answer:
        return ""
    answer, next_section, _ = f"\n{answer}".partition(SECTION)  # it may be all that was written
    return "" if reply["cut"] and not next_section else answer.strip()


def read_answers(replies, config, in_thought=False):
    """dict(predicted (R, L), answers, unknown_words, unreadable: replies that say nothing, cut:
    those that ended at the limit). in_thought: does the prompt begin a thought?"""
    predicted = []
    found = Counter(unknown_words=0, unreadable=0, cut=0)
    for reply in replies:
        answer = final_words(reply, in_thought)
        labels, unknown = parse_answer(answer, config["labels"], config["single"])
        nothing = words_of(answer) == [NONE] and not config["single"]
        found["unknown_words"] += unknown
        found["unreadable"] += not any(labels) and not nothing
        found["cut"] += reply["cut"]
        predicted.append(labels)
    return dict(found, predicted=np.array(predicted), answers=[r["answer"] for r in replies])


def predict(model, tokenizer, rows, config):
    """dict(predicted (R, L), ...) of encoded rows. CLS, and an LM of a single choice whose labels
    begin with different tokens, add scores (R, L); an LM adds what read_answers returns."""
    result = {}
    scored = config["head"] == "cls"
    if config["head"] == "lm" and config["single"]:
        _, tokens = model.label_tokens
        scored = len(set(tokens)) == len(tokens)  # or two labels would have one score
    if scored:
        _, result["scores"] = read_labels(model, rows, config, "predict")
    if config["head"] == "cls":
        result["predicted"] = chosen_labels(result["scores"], config["single"])
        return result
    # Some chat templates end with "<think>": a reply then begins inside a thought.
    _, after = frame(tokenizer, chat=config["head"] == "ask")
    in_thought = "<think>" in tokenizer.decode(after).rpartition("</think>")[2]
    replies = write_answers(model, tokenizer, rows, config)
    return result | read_answers(replies, config, in_thought)


def predict_rates(data, config, annotations):
    """dict(predicted, scores): log odds of the labels in training (of a single choice log rates), a
    user's shrunk to everybody's as if five more of the user's rows were everybody's mean."""
    train = data.parts["train"]
    gold = gold_labels(train)
    overall = gold.mean(0)
    rates = {}
    if config["personalized"]:
        for user, own in grouped(gold, [a.user for a in train]).items():
            rates[user] = (np.sum(own, axis=0) + 5 * overall) / (len(own) + 5)
    p = np.clip([rates.get(a.user, overall) for a in annotations], 1e-6, 1 - 1e-6)
    scores = np.log(p) if config["single"] else np.log(p / (1 - p))
    return dict(predicted=chosen_labels(scores, config["single"]), scores=scores)


# 12. ChatGPT --------------------------------------------------------------------------------------
# A model that cannot be downloaded is asked over HTTP, in the protocol that OpenAI made and many
# servers speak.
#
# An answer costs money and time. It is on the disk before the next one is heard, and it is found
# again by a hash of the server's address and the whole request: it is never asked for twice, and
# rows with equal prompts share it.
#
# Requests are sent in rounds, those of a round at once, each by a thread that makes one attempt.
# The main thread hears what comes back, keeps the answers, and decides after the round:
#
#     what comes back                         what follows
#     an answer                               it is kept
#     REFUSED_ROW (the row is at fault)       it is not sent again; the others go on
#     REFUSED_ROW that names a parameter      before the first answer: it is renamed or left out
#     HOPELESS (every request would fail)     the run ends
#     anything else, or nothing               a pause, and it is sent again
#
# Until the first answer, rounds have one request, which shows whether the key, the model and the
# parameters are right. Then each round without a failure lets one more into the next, up to
# AT_ONCE, and a failure sets the number back to one. A pause takes a second, after the next failure
# two, four, ..., or as long as the server says. If a row has no answer in the end, nothing is
# scored.

OPENAI = "https://api.openai.com/v1"  # unless OPENAI_BASE_URL names another server
AT_ONCE = 8          # requests of a round, at most
TIMEOUT = (10, 300)  # seconds for a connection, and of silence, that fail an attempt
LONGEST_PAUSE = 300  # seconds; the tenth failure in a row would ask for 512, and ends the run
MOST_REFUSED = 10    # so many refused rows end the run, too
REFUSED_ROW = "HTTP (400|413|422):"
# Google's limit per minute speaks of billing, too, and says when to retry.
HOPELESS = "(?i)HTTP (3|40[1-7]|429.*(insufficient_quota|billing(?!.*retry in)))"


def server_address():
    """The address of the server: OPENAI_BASE_URL, or OpenAI's."""
    address = (os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
    valid = re.fullmatch(r"(?i)https?://(\w[\w-]*(\.[\w-]+)*|\[[\da-f:]+\])(:\d+)?(/[^@?#\s]*)?",
                         address)
    check(valid, f"OPENAI_BASE_URL has to be like {OPENAI}, with no user or key in it")
    return address


def attempt(settings, prompt):
    """Asks once. Returns (prompt, response, what the server or the network said)."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    check(re.fullmatch("[!-~]+", key), "set OPENAI_API_KEY (to any word if the server needs none)")
    try:
        response = requests.post(
            f"{server_address()}/chat/completions", timeout=TIMEOUT,
            json=dict(settings, messages=[dict(role="user", content=prompt)]),
            headers={"Authorization": f"Bearer {key}"},
            auth=lambda request: request,  # without one, a .netrc replaces the header
            allow_redirects=False)         # no other server gets the prompts
        words = f"HTTP {response.status_code}: {response.text or response.reason}"
    except OSError as e:  # as all errors of requests are
        response = requests.Response()  # an empty one
        # Of "...Pool(host=.., port=443): Max retries exceeded .. (Caused by X)" X is kept.
        words = re.sub(r'.*(port=\d+\): |Caused by )|"\)+$', "", str(e))
    if len(key) > 7:  # a key, and no word that stands for one
        words = words.replace(key, "[key]")
    words = " ".join(words.split())
    return prompt, response, words[:500]


def read_reply(response):
    """What a model said, as a dict; None if the response is none in the protocol."""
    try:
        reply = response.json()
        choice = reply["choices"][0]
        text = choice["message"]["content"] or ""  # nothing where the model refuses
        return dict(answer=text.strip(), cut=choice.get("finish_reason") == "length",
                    model=str(reply.get("model")), usage=reply.get("usage"))
    except (ValueError, TypeError, LookupError, AttributeError):  # other JSON, or none
        return None


def change_refused(settings, words):
    """Renames or leaves out a parameter that the server's words name. Did they name one?"""
    for name in ("max_tokens", "temperature", "seed"):
        if name in settings and name in words:
            value = settings.pop(name)
            if name == "max_tokens":
                settings["max_completion_tokens"] = value
            return True
    return False


def wait(seconds, response, words):
    """Waits after a failure, at least so many seconds; BadInput where that does not help."""
    check(not re.match(HOPELESS, words),
          f"{words}; check OPENAI_API_KEY, OPENAI_BASE_URL, --model and your account")
    asked = response.headers.get("Retry-After", "")
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        seconds = max(seconds, float(asked))
    check(seconds <= LONGEST_PAUSE, f"{words}; later, the same command asks for the rest")
    tqdm.write(f"{words}; again in {seconds:.0f} s")
    time.sleep(seconds)


def ask_server(settings, prompts, waiting):
    """Yields (prompt, reply) for the prompts that are waiting; BadInput if one has no answer."""
    send = functools.partial(attempt, settings)
    room = 1   # requests of the next round
    pause = 1  # seconds, after the next failure
    answered = False
    refused = []
    with ThreadPool(AT_ONCE) as pool:  # its threads end with the process
        while waiting and len(refused) < MOST_REFUSED:
            batch = waiting[:room]
            waiting = waiting[room:]
            failure = None
            for prompt, response, words in pool.imap_unordered(send, batch):
                reply = read_reply(response)
                if reply:
                    yield prompt, reply
                    answered = True
                    pause = 1
                elif not re.match(REFUSED_ROW, words):
                    waiting.append(prompt)
                    failure = (response, words)
                elif not answered and change_refused(settings, words):
                    waiting.insert(0, prompt)
                else:
                    refused.append(f"test row {prompts.index(prompt) + 1}: {words}")
            if failure:
                wait(pause, *failure)
                pause *= 2
                room = 1
            elif answered:
                room = min(AT_ONCE, room + 1)
    check(not refused, f"refused: {'; '.join(refused)}; if it is too long, lower --max-text")


def kept_answers(file):
    """dict sha -> answer of a file of answers; half a line at its end, left by a kill, is cut."""
    file.seek(0)
    *lines, half = file.read().split("\n")
    file.truncate(file.tell() - len(half))
    return {record.get("sha"): record for record in map(json.loads, lines)}


def ask_chat(prompts, path, model, seed, limit):
    """(dict(answer, cut, ...) of each prompt, dict of facts); the file `path` keeps answers."""
    address = server_address()
    settings = dict(model=model, temperature=0, seed=seed, max_tokens=limit)
    shas = {}
    for prompt in prompts:
        whole = json.dumps([address, settings, prompt])
        shas[prompt] = hashlib.sha256(whole.encode()).hexdigest()
    with open(path, "a+", encoding="utf-8") as file:
        answers = kept_answers(file)
        todo = [prompt for prompt, sha in shas.items() if sha not in answers]
        tokens = sum(map(len, todo)) // 4
        print(f"{model} at {address}: {len(todo):,} requests, about {tokens:,} tokens; "
              f"{len(shas) - len(todo):,} answers are there", flush=True)
        replies = ask_server(settings, prompts, todo)
        for prompt, reply in progress(replies, "ask", "requests", len(todo)):
            left_out = sorted({"temperature", "seed"} - set(settings))
            record = dict(reply, sha=shas[prompt], left_out=left_out)
            print(json.dumps(record), file=file, flush=True)
            os.fsync(file.fileno())
        answers = kept_answers(file)
    replies = [answers[shas[prompt]] for prompt in prompts]
    return replies, dict(
        answered_by=sorted({reply["model"] for reply in replies}),
        left_out=sorted({name for reply in replies for name in reply["left_out"]}))


# 13. One experiment from end to end ---------------------------------------------------------------
# A run lives in out/<data>/<model>/<method>/seed<S>/, a folder that belongs to one configuration
# (run.json) and to one process at a time. The same command resumes a stopped run, and prints the
# summary of a finished one again. metrics.json comes last. `load_run` gives a finished run's model
# back; data/readers.py goes on from there.

def chat_model(name):
    """What a server calls the model that --model names, None if it runs here."""
    if name.startswith("openai:"):
        check(name != "openai:", "--model openai: needs a name behind it, as openai:gpt-4o-mini")
        return name.removeprefix("openai:")
    return MODELS["chatgpt"] if name == "chatgpt" else None


def make_config(args, data):
    """The configuration of a run, one dict, final before anything is loaded: the recipe, overruled
    by what was tuned for the model and by flags; the method; and what there is to know of the
    data."""
    method = METHODS[args.command]
    config = dict(RECIPES[args.recipe], dtype=None, server=None, max_nodes=None)
    if args.recipe == "ours":
        config |= TUNED.get(args.model, {})
    for key, value in vars(args).items():
        if value is not None and key not in ("command", "data", "split_col", "out", "fresh"):
            config[key] = value
    config |= dict(method=args.command, **method._asdict())
    if method.head == "ask":  # an untrained model knows no token
        config["ids"] = "number"
    if method.head in ("lm", "ask"):
        check_answers(data)
    if config["tune"] == "full":
        check(config["dtype"] != "bfloat16", "--tune full trains in float32")
        check({args.r, args.dropout, args.quant} == {None} and not args.no_dense, "--tune full has "
              "no LoRA and no NF4: leave out --r, --dropout, --no-quant and --no-dense")
    config["nobody"] &= method.personalized and config["ids"] == "token"
    if method.head == "rates":
        config["model"] = "baseline"
    elif chat_model(args.model):
        check(method.head == "ask", f"--model {args.model} can only be asked: q_0s, q_1s_p, ...")
        config["server"] = server_address()
    return config | dict(
        data=data.name, split=args.split_col, data_sha=data.sha, labels=data.labels,
        single=data.single, ordered=data.ordered, none=data.none, answer_room=answer_room(data))


def model_name(model):
    """What a model is called in folders and tables: its name, else the last part of its path."""
    if model.startswith("openai:"):
        return re.sub(r"[^\w.-]", "_", model)
    return os.path.basename(os.path.abspath(model))


def folder_of(config, out):
    """The folder of a run."""
    data = config["data"]
    if config["split"]:
        data += f".{config['split']}"
    return os.path.join(out, data, model_name(config["model"]), config["method"],
                        f"seed{config['seed']}")


@contextmanager
def alone_in(folder):
    """Makes a folder, which no other process may use meanwhile."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise BadInput(f"{folder}: another process runs this; wait, or use --out") from None
        except OSError as e:
            print(f"{folder}: this file system has no locks ({e.strerror}); start it only once")
        yield


def settle(folder, config, fresh):
    """Writes run.json; BadInput if the folder holds what another configuration worked out."""
    if fresh:
        # metrics.json first: without it a run is not finished, wherever this is stopped.
        for file in sorted(os.scandir(folder), key=lambda file: file.name != "metrics.json"):
            if file.is_dir():
                shutil.rmtree(file)
            elif file.name not in ("lock", "answers.jsonl"):  # answers were paid for
                os.remove(file)
    if {"metrics.json", STATE}.intersection(os.listdir(folder)):
        there = read_json(f"{folder}/run.json")
        odd = []
        for key in there | config:
            if there.get(key) != config.get(key):
                odd.append(f"{key} {there.get(key)} there, {config.get(key)} here")
        check(not odd, f"{folder} holds another run ({', '.join(odd[:3])}): --fresh, or --out DIR "
                       "to keep it")
    write_file(f"{folder}/run.json", config)


def encode_parts(model, tokenizer, config, users, parts, train):
    """(dict part -> list of Row, Counter of texts_cut and too_few_examples) of the annotations of
    parts; BadInput if a prompt with its answer is longer than what a decoder reads at once."""
    user_ids = ids_of_users(config, users, model.V)
    rows = {}
    counts = Counter()
    for part, annotations in parts.items():
        rows[part], found = encode_rows(tokenizer, config, annotations, train, user_ids)
        counts.update(found)
    longest = max(len(row.prompt) for row in sum(rows.values(), []))
    if config["head"] != "cls":
        longest += config["answer_room"]
    for limit in ("max_position_embeddings", "sliding_window"):  # a T5 has neither
        room = getattr(model.lm.config, limit, None) or math.inf
        check(longest <= room, f"--model {config['model']} reads {room} tokens, a prompt needs "
                               f"{longest}: lower --max-text")
    return rows, counts


def describe(model):
    """Prints what there is to say of a model before it is trained, and returns it as a dict."""
    trained = sum(p.numel() for p in model.trainable().values())
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else "a CPU"
    dtype = str(model.lm.dtype).removeprefix("torch.")
    print(f"{type(model.lm).__name__} on {device}, computing in {dtype}; "
          f"{trained:,} weights are trained", flush=True)
    return dict(device=device, computed_in=dtype, weights_trained=trained)


def chat_prompts(config, data):
    """(list of the prompts of the test rows in words, Counter as encode_parts has it)"""
    choose_examples = example_chooser(config, data.parts["train"])
    longest = 1 + 4 * config["max_text"]  # a space, and about 4 characters a token
    cut = set()
    counts = Counter()
    prompts = []
    for a in data.parts["test"]:
        examples = choose_examples(a)
        counts["too_few_examples"] += len(examples) < config["shots"]
        prompt = ""
        for kind, piece in prompt_pieces(config, a.text, a.user, examples):
            if kind == "text" and len(piece) > longest:
                cut.add(piece)
                piece = piece[:longest]
            prompt += piece
        prompts.append(prompt)
    counts["texts_cut"] = len(cut)
    return prompts, counts


def write_predictions(path, config, annotations, result, gold=True):
    """predictions.csv: one line a row, with what was really chosen and what is predicted."""
    lines = []
    for i, a in enumerate(annotations):
        line = dict(text_id=text_id(a.text), user=a.user)
        if gold:
            line["gold"] = answer_text(config["labels"], a.labels).strip()
        line["predicted"] = answer_text(config["labels"], result["predicted"][i]).strip()
        if "answers" in result:
            line["answer"] = result["answers"][i]
        if "scores" in result:
            for label, s in zip(config["labels"], result["scores"][i]):
                line[f"score:{label}"] = f"{s:.5f}"
        lines.append(line)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, lines[0])
    writer.writeheader()
    writer.writerows(lines)
    write_file(path, text.getvalue().encode("utf-8", "replace"))


def peak_memory_mb():
    """The most memory in use so far: of a GPU, else of the process."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2 ** (20 if sys.platform == "darwin" else 10))  # macOS counts bytes


def write_results(folder, metrics, parts, result, start):
    """Writes predictions.csv and then metrics.json, which ends a run; returns all the metrics."""
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    metrics = metrics | measure(metrics, parts["test"], result) | dict(
        rows={part: len(annotations) for part, annotations in parts.items()},
        versions=versions, command=" ".join(sys.argv), peak_memory_mb=peak_memory_mb(),
        seconds=round(time.perf_counter() - start, 1))
    write_predictions(f"{folder}/predictions.csv", metrics, parts["test"], result)
    write_file(f"{folder}/metrics.json", metrics)
    return metrics


def run_chat(config, data, folder):
    """(what is predicted for the test rows, facts) of a model behind HTTP."""
    prompts, counts = chat_prompts(config, data)
    replies, facts = ask_chat(prompts, f"{folder}/answers.jsonl", chat_model(config["model"]),
                              config["seed"], config["answer_room"])
    return read_answers(replies, config), dict(counts, chat=facts)


def run_model(config, data, folder):
    """(what is predicted for the test rows, facts) of a model that runs here, which is trained
    first unless it is only asked."""
    parts = data.parts
    users = sorted({a.user for a in parts["train"]}) if config["personalized"] else []
    torch.manual_seed(config["seed"])
    model, tokenizer, base_sha = load_model(config, users)
    facts = dict(base_sha=base_sha, **describe(model))
    trained = config["head"] != "ask"
    read = parts if trained else dict(test=parts["test"])
    rows, counts = encode_parts(model, tokenizer, config, users, read, parts["train"])
    if trained:
        facts |= train(model, rows, config, base_sha, folder)
        save_tensors(f"{folder}/adapter.safetensors", model.trainable(), "users", users)
    facts |= counts
    return predict(model, tokenizer, rows["test"], config), facts


def run(args):
    """One row of the paper's table for one model and dataset, from the CSV to metrics.json. Returns
    (the run's folder, Dataset)."""
    start = time.perf_counter()
    data = load_data(args.data, args.split_col, args.max_eval)
    print_data(data)
    config = make_config(args, data)
    folder = folder_of(config, args.out)
    with alone_in(folder):
        settle(folder, config, args.fresh)
        metrics = read_json(f"{folder}/metrics.json")
        if metrics:
            print(f"{folder} is finished; --fresh runs it again")
        else:
            if config["head"] == "rates":
                result = predict_rates(data, config, data.parts["test"])
                facts = {}
            elif config["server"]:
                result, facts = run_chat(config, data, folder)
            else:
                result, facts = run_model(config, data, folder)
            facts["notes"] = data.notes
            metrics = write_results(folder, config | facts, data.parts, result, start)
        pathlib.Path(folder, STATE).unlink(missing_ok=True)  # a finished run is not resumed
        print_summary(metrics, folder)
    return folder, data


SUMMARY = {  # key of the metrics -> its unit, or what it says
    "seconds": "s since its last start", "rows_per_second": "annotations a second in training",
    "peak_memory_mb": "MB at most", "chat": "", "texts_cut": "texts are cut to --max-text tokens",
    "too_few_examples": "prompts have fewer examples than the method asks for",
    "cut": "answers ended at the limit", "unreadable": "answers without a known label",
    "unknown_words": "words in answers that belong to no label",
    "f1_macro": "mean over labels",
    "labels_without_test_row": "labels have no test row, and count as 0 in f1_macro",
    "accuracy": "of whole rows", "test_loss": "negative log-likelihood",
}


def print_metrics(m, says):
    """What a run was, and the metrics that `says` explains."""
    head = "\n{method} with {model} on {data}, seed {seed}, {rows[test]:,} test rows"
    print(head.format(**m))
    for key, what in says.items():
        if m.get(key) or isinstance(m.get(key), float):  # a count of 0 says nothing
            print(f"  {key:25} {short(m[key])}  {what}")


def print_summary(m, folder):
    """What a run ends with, for people: the part of metrics.json that they look for first."""
    print_metrics(m, SUMMARY)
    for label, f1 in zip(m["labels"], m["per_label"]):
        print(f"    {f1:.4f}  {label:12}  {'#' * round(40 * f1)}")
    print(f"  files: {folder}/")


def load_run(folder):
    """(configuration and metrics, PersonalizedLM, tokenizer, users) of a finished run."""
    config = read_json(f"{folder}/metrics.json")
    path = f"{folder}/adapter.safetensors"
    check(config, f"{folder}: no finished run (metrics.json)")
    check(os.path.exists(path), f"{folder}: nothing was trained here (adapter.safetensors)")
    tensors, users = load_tensors(path, "users")
    model, tokenizer, base_sha = load_model(config | dict(dtype=config["computed_in"]), users)
    check(base_sha == config["base_sha"], f"--model {config['model']}: other weights or another "
                                          f"tokenizer than {folder} was trained on")
    check(tensors.keys() == model.trainable().keys(),
          f"{path} has not all that is trained: --fresh runs it again")
    model.load_state_dict(tensors, strict=False)
    return config, model, tokenizer, users


# 14. The command line -----------------------------------------------------------------------------
# The flags. What cannot be done is said in one line, and the exit status is 2.

def number(kind, least, most=10 ** 18):
    """An argparse type: a number of that kind, from `least` to `most`."""
    def parse(text):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {least} to {most:,.10g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number
    return parse


COUNT = number(int, 1)
FLAGS = [  # (flag, arguments of add_argument); without a default, TUNED or the recipe has the value
    ("--model", dict(default="tiny",
                     help=f"{', '.join(MODELS)}, openai:NAME, a folder or a hub id (tiny)")),
    ("--data", dict(default="sample", help="NAME of data/NAME/annotations.csv, or a CSV (sample)")),
    ("--split-col", dict(metavar="COL", help="column that says train, val or test (split)")),
    ("--seed", dict(type=number(int, 0, 2 ** 32), default=42, help="of all that is random (42)")),
    ("--out", dict(default="out", metavar="DIR", help="folder of all runs (out)")),
    ("--fresh", dict(action="store_true", help="start a run over that is there already")),
    ("--recipe", dict(default="ours", choices=RECIPES, help="ours, or the paper's settings")),
    ("--ids", dict(choices=["number", "token"], help="how the prompt names a user")),
    ("--prompt", dict(choices=["tree", "paper"], help="the reader behind the text, or before it")),
    ("--lr", dict(type=number(float, 1e-12), help="learning rate")),
    ("--epochs", dict(type=COUNT, help="passes over the training rows")),
    ("--tune", dict(choices=["lora", "full"], help="train LoRA, or every weight (lower --lr)")),
    ("--no-quant", dict(dest="quant", action="store_const", const=False, help="weights as stored")),
    ("--r", dict(type=number(int, 1, 4096), help="rank of LoRA")),
    ("--dropout", dict(type=number(float, 0, 0.9), help="dropout of LoRA")),
    ("--batch", dict(type=COUNT, help="annotations a step")),
    ("--max-nodes", dict(type=COUNT, help="tokens computed at once; fewer take less memory")),
    ("--max-steps", dict(type=COUNT, default=0, help="train so many steps at most")),
    ("--max-eval", dict(type=COUNT, default=0, help="score about so many rows")),
    ("--max-text", dict(type=COUNT, default=384, help="tokens of a text (384)")),
    ("--dtype", dict(choices=["float32", "bfloat16"], help="compute in it (the faster one)")),
    ("--no-dense", dict(action="store_true", help="keep no dense copy of the rounded weights")),
    ("--no-share", dict(dest="share", action="store_false", help="every prompt by itself")),
]


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(f"{message} (see --help)")


def make_parser():
    """The argparse parser."""
    parser = Parser("plm.py", allow_abbrev=False,
                    description="Personalized Large Language Models: from annotations to F1.")
    parser.add_argument("command", choices=METHODS, help="a row of the paper's table")
    for flag, what in FLAGS:
        parser.add_argument(flag, **what)
    return parser


def guarded(parser, work, argv=None, short_of_memory="", stopped=""):
    """Calls work(args) with a command line's args; returns the exit status. What a user can mend is
    said in one line, with some advice. An error of ours keeps its traceback."""
    status = 2
    try:
        work(parser.parse_args(argv))
        return 0
    except BadInput as e:
        why = str(e)
    except (MemoryError, RuntimeError) as e:
        if not re.search("MemoryError|(out of|allocate) memory", repr(e)):
            raise
        why = f"out of memory{short_of_memory}"
    except OSError as e:
        if not e.filename and e.errno != errno.ENOSPC:
            raise
        why = f"{e.filename or 'a file'}: {e.strerror}"
    except KeyboardInterrupt:
        why = f"stopped{stopped}"
        status = 130
    line = "".join(c if c.isprintable() else " " for c in f"{parser.prog}: {why}")
    print(line[:2000], file=sys.stderr)
    return status


ADVICE = dict(  # what to do about a run that ended early, for guarded
    stopped="; the same command goes on",
    short_of_memory=": try --max-nodes 256, --max-text 128 or --no-dense, and --fresh if the run "
                    "had begun")


def main(argv=None):
    """Runs one command; returns the exit status."""
    return guarded(make_parser(), run, argv, **ADVICE)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(main())
