"""plm.py: *Personalized Large Language Models* (arXiv 2402.09269) in one file.

Two people read the same comment; one finds it funny, the other hostile. The paper puts the reader's user ID into
the prompt of a language model, fine-tunes the model with QLoRA, and asks how much better it then predicts the
labels that this reader chose. This file is that experiment from the CSV of annotations to the F1 score, with its
own LoRA, its own NF4 quantization, its own prompts, heads, training loop and scores.

    python plm.py cls_p                                     the default: tiny model, sample data, no network
    python plm.py cls_p --model phi2 --data goemotions      the paper's own
    python plm.py lm --model DIR --data file.csv --text-col comment --user-col worker
    python plm.py table                                     every finished run under out/ as a table

Row of the paper's table -> METHOD. A trailing _p is the personalized twin, which is told the user ID.

    CLS, CLS-P           cls  cls_p       a classification head reads the hidden state at the end of the prompt
    LM, LM-P             lm   lm_p        the language model writes the labels as words, "anger, joy"
    Q-0S, Q-1S, Q-2S     q_0s q_1s q_2s   the untrained model is asked, with 0, 1 or 2 examples in the prompt
    Q-0S-P, ...          q_0s_p ...       ... the examples are the user's own

Letters in the shapes below:

    R annotations (rows)      L labels                 D width of the hidden state    V vocabulary
    T tokens computed         S tokens of the trunk    G groups (texts) in a batch    P positions read by a head
    N, K outputs and inputs of a linear layer          r rank of LoRA                 H, E heads and their width

References
    [1] Wozniak et al., Personalized Large Language Models, 2024. arXiv 2402.09269
    [2] Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023. arXiv 2305.14314
    [3] Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. arXiv 2106.09685
    [4] bitsandbytes 0.50, whose stored NF4 bytes section 4 reproduces: backends/default/ops.py, functional.py
    [5] Dettmers et al., 8-bit Optimizers via Block-wise Quantization (the dynamic map), 2021. arXiv 2110.02861
    [6] Prefix Grouper, 2025, arXiv 2506.05433, and Tree Training, 2025, arXiv 2511.00413 (shared prefixes)

Left out: merging adapters into the base, other quantization formats than NF4, other adapters than LoRA.
"""
import argparse
import csv
import glob
import hashlib
import json
import math
import os
import random
import re
import resource
import sys
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm
import transformers
from transformers import (AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer)

HERE = os.path.dirname(os.path.abspath(__file__))


class BadInput(Exception):
    """What the user gave cannot be used; the message is one line that says what would have worked."""


# --------------------------------------------------------------------------------------------------
# 1. What can be run: a model, a dataset or a method is a row of a table. What a model's row does
# not say is as in TRAINING, which holds the values of the authors' code (its config.ini) [1].

TRAINING = dict(
    r=2, alpha=32, dropout=0.05,    # LoRA on every linear of the backbone; scaling = alpha / r [3]
    lr=1e-4, epochs=10,             # cosine schedule; the epoch with the lowest validation loss is kept
    warmup=0.05, clip=1.0,          # share of all steps; largest norm of the gradient
    batch=32,                       # annotations a step
)

MODELS = {  # name -> hub id or folder, and what differs from TRAINING
    "tiny": dict(id=f"{HERE}/data/models/tiny", lr=5e-3, epochs=5, r=8),
    "tiny_t5": dict(id=f"{HERE}/data/models/tiny_t5", lr=5e-3, epochs=5, r=8),
    "smollm2": dict(id="HuggingFaceTB/SmolLM2-135M-Instruct", lr=1e-3),
    "flan_t5_small": dict(id="google/flan-t5-small", lr=1e-3),
}

DATASETS = {  # name -> files, columns, where the official split is (None: split by a hash of the text)
    "sample": dict(dir=f"{HERE}/data/sample", files="annotations.csv", text="text", user="user"),
    "goemotions": dict(
        dir=f"{HERE}/data/goemotions", files="goemotions_*.csv", text="text", user="rater_id",
        ignore=("id", "author", "subreddit", "link_id", "parent_id", "created_utc", "example_very_unclear"),
        splits=dict(train="train.tsv", val="dev.tsv", test="test.tsv")),
}


class Method(NamedTuple):
    head: str           # "cls": trained classification head, "lm": trained LM, "ask": the LM as it is
    personalized: bool  # is the user ID in the prompt?
    shots: int          # solved examples in the prompt


METHODS = {name + suffix: Method(head, suffix == "_p", shots)
           for name, head, shots in (("q_0s", "ask", 0), ("q_1s", "ask", 1), ("q_2s", "ask", 2),
                                     ("cls", "cls", 0), ("lm", "lm", 0))
           for suffix in ("", "_p")}


# --------------------------------------------------------------------------------------------------
# 2. Annotations and splits. One row is one person's judgement of one text. Splits are by text, so
# that no text is in two of them, and every user of validation and test is seen in training: the
# model has met the reader, never the text [1]. The same rows serve every method and every seed.

class Annotation(NamedTuple):
    text: str
    user: str
    labels: tuple  # of L zeros and ones


class Dataset(NamedTuple):
    name: str
    labels: list   # of L names
    train: list    # of Annotation, as are val and test
    val: list
    test: list
    notes: dict    # how many rows each rule left, in order


def text_id(text):
    """16 hex digits that stand for the text in files: equal but for case and white space, equal id."""
    return hashlib.sha256(" ".join(text.lower().split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def split_of(text):
    """'train' (70 %), 'val' (15 %) or 'test' (15 %), by a hash of the text: no seed, no order, no file."""
    share = int(text_id(text)[:8], 16) / 16 ** 8
    return "train" if share < 0.70 else "val" if share < 0.85 else "test"


def csv_rows(path):
    """Yields (row number, dict of the row) of a CSV file; the first row after the header is row 1."""
    csv.field_size_limit(1 << 30)
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            reader = csv.DictReader(f)
            for number, row in enumerate(reader, 1):
                if None in row or None in row.values():
                    raise BadInput(f"{path}: row {number} (line {reader.line_num}) does not have the "
                                   f"{len(reader.fieldnames)} columns of the header")
                yield number, row
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (IsADirectoryError, PermissionError) as e:
        raise BadInput(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: not UTF-8 (byte {e.object[e.start]:#x}); save the file as UTF-8") from None
    except csv.Error as e:
        raise BadInput(f"{path}: not a CSV file ({e})") from None


ZERO_ONE = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}


def read_annotations(path, text_col, user_col, labels=None, ignore=()):
    """(label names, list of Annotation). Without `labels`, every column that begins with a 0 or 1 is a label."""
    rows = csv_rows(path)
    first = next(rows, None)
    if first is None:
        raise BadInput(f"{path}: no annotations in it")
    columns = list(first[1])
    for column in (text_col, user_col, *(labels or ())):
        if column not in columns:
            raise BadInput(f"{path}: no column {column!r}; there are: {', '.join(columns)}")
    labels = labels or [c for c in columns if c not in (text_col, user_col, *ignore) and first[1][c].strip() in ZERO_ONE]
    if not labels:
        raise BadInput(f"{path}: no label column (all 0 or 1) besides {text_col!r} and {user_col!r}; name them: --labels")
    for label in labels:
        if "," in label or not label.strip():
            raise BadInput(f"{path}: the label {label!r} cannot be told apart in a comma-separated answer; rename it")
    annotations = []
    for number, row in [first, *rows]:
        for column in (text_col, user_col):
            if not row[column].strip():
                raise BadInput(f"{path}: row {number}: empty {column!r}")
        chosen = [ZERO_ONE.get(row[label].strip()) for label in labels]
        if None in chosen:
            label = labels[chosen.index(None)]
            raise BadInput(f"{path}: row {number}: {label!r} is {row[label][:40]!r}, not 0 or 1 (--labels names the labels)")
        annotations.append(Annotation(row[text_col], row[user_col], tuple(chosen)))
    return labels, annotations


def official_splits(folder, splits):
    """dict text -> the one split it is in by the dataset's own files; texts that cross splits are left out."""
    seen = defaultdict(set)
    for split, file in splits.items():
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            raise BadInput(f"{path}: no such file; the official split needs {', '.join(splits.values())}")
        with open(path, newline="", encoding="utf-8-sig") as f:
            for text, *_ in csv.reader(f, delimiter="\t", quoting=csv.QUOTE_NONE):
                seen[text_id(text)].add(split)
    return {text: where.pop() for text, where in seen.items() if len(where) == 1}


def load_data(name, data_dir=None, text_col=None, user_col=None, labels=None):
    """The Dataset of a row of DATASETS or of a CSV file of the user's own."""
    row = DATASETS.get(name)
    if row is None and not name.lower().endswith(".csv"):
        raise BadInput(f"--data {name}: not a .csv file and not one of {', '.join(DATASETS)}")
    if row is None:
        row = dict(dir=os.path.dirname(name), files=os.path.basename(name), text="text", user="user")
    folder = data_dir or row["dir"]
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), row["files"])))
    if not paths:
        raise BadInput(f"{os.path.join(folder, row['files'])}: no such file (--data-dir DIR says where the files are)")
    annotations = []
    for path in paths:
        labels, part = read_annotations(path, text_col or row["text"], user_col or row["user"], labels, row.get("ignore", ()))
        annotations += part
    notes = {"annotations": len(annotations)}
    annotations = [a for a in annotations if any(a.labels)]
    notes["with a label"] = len(annotations)
    where = official_splits(folder, row["splits"]) if "splits" in row else None
    split = {"train": [], "val": [], "test": []}
    for a in annotations:
        part = split_of(a.text) if where is None else where.get(text_id(a.text))
        if part:
            split[part].append(a)
    notes["in a split"] = sum(map(len, split.values()))
    known = {a.user for a in split["train"]}
    for part in ("val", "test"):
        split[part] = [a for a in split[part] if a.user in known]
    notes["of users seen in training"] = sum(map(len, split.values()))
    for part, rows in split.items():
        if not rows:
            raise BadInput(f"--data {name}: no annotation is left for {part} ({notes}); more texts are needed")
    name = name if name in DATASETS else os.path.splitext(os.path.basename(name))[0]
    return Dataset(name, list(labels), **split, notes=notes)


# --------------------------------------------------------------------------------------------------
# 3. Prompts. Three parts, the constant one first: the shared instruction with the list of labels,
# the text, the user. The paper puts the user ID before the text; the hidden state behind the last
# token sees the same facts either way, and in this order section 7 can compute what prompts have in
# common once. Each piece is tokenized by itself and the ids are put together, so that the same
# piece always has the same ids, a cut can only ever shorten the text, and nothing inside a text can
# end the prompt: special tokens written there are plain letters.

ASK = ("Which of the labels fit the text? Answer with labels from the list, separated by commas.",
       "Which of the labels would this user choose for the text? Answer with labels from the list, separated by commas.")


def prompt_parts(method, labels, text, user):
    """The prompt of one annotation as (shared, text, user) parts, each a list of pieces to be tokenized."""
    shared = [f"{ASK[method.personalized]}\n### Labels: {', '.join(labels)}\n### Text:"]
    if method.personalized:
        return shared, [f" {text}", "\n### User ID:"], [f" {user}", "\n### Response:"]
    return shared, [f" {text}"], ["\n### Response:"]


def answer_text(labels, chosen):
    """The answer that an LM is trained to give: ' anger, joy' for the chosen labels in the list's order."""
    return " " + ", ".join(label for label, y in zip(labels, chosen) if y)


def tokenize(tokenizer, piece):
    """Token ids of a piece of a prompt, with every special token written inside it read as plain letters."""
    ids = tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    if special.intersection(ids):  # SentencePiece vocabularies hold "</s>" as a word too: take it apart
        for token in tokenizer.all_special_tokens:
            piece = piece.replace(token, f"{token[0]} {token[1:]}")
        ids = [i for i in tokenizer(piece, add_special_tokens=False, split_special_tokens=True).input_ids
               if i not in special]
    return ids


class Row(NamedTuple):
    """One annotation in token ids: the prompt in its three parts, and the answer with the end token."""
    shared: tuple
    text: tuple
    user: tuple
    answer: tuple
    labels: tuple
    source: Annotation


def encode(tokenizer, method, labels, annotations, max_text=384):
    """(list of Row, how many texts were cut to max_text tokens)"""
    known = {}

    def ids(piece):
        if piece not in known:
            known[piece] = tuple(tokenize(tokenizer, piece))
        return known[piece]

    around = tokenizer("a").input_ids  # what this tokenizer wants around a text: <s> a, or a </s>
    middle = tokenizer("a", add_special_tokens=False).input_ids
    start = next(i for i in range(len(around)) if around[i:i + len(middle)] == middle)
    before, after = tuple(around[:start]), tuple(around[start + len(middle):])
    rows, cut = [], set()
    for a in annotations:
        shared, (text, *marker), user = prompt_parts(method, labels, a.text, a.user)
        if len(ids(text)) > max_text:
            cut.add(text)
        rows.append(Row(
            before + sum(map(ids, shared), ()), ids(text)[:max_text] + sum(map(ids, marker), ()),
            sum(map(ids, user), ()) + after, ids(answer_text(labels, a.labels)) + (tokenizer.eos_token_id,), a.labels, a))
    return rows, len(cut)


# --------------------------------------------------------------------------------------------------
# 4. NF4: frozen weights in 4 bits. Weights of a trained layer are close to normally distributed, so
# the 16 values of NF4 are quantiles of the normal distribution [2]: a block of 64 weights is
# divided by its largest magnitude (absmax) and each weight becomes the index of the nearest of the
# 16. Two indices make a byte, the first one in the high half. The absmax themselves are stored in 8
# bits ("double quantization"): blocks of 256 of them, minus their mean, by the same idea with the
# 256 values of the dynamic map [5]. That is 4 + 8/64 + 32/(64*256) = 4.127 bits a weight, byte for
# byte what bitsandbytes stores [4].

NF4 = torch.tensor([  # quantiles of N(0, 1), scaled to [-1, 1]; a test computes them anew
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def dynamic_map():
    """The 256 values that absmax is rounded to, ascending: finer near 0, signed, 7 powers of ten (cf. [5], [4])."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** i + 1)
        positive.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(positive)
    return torch.cat([-positive, positive, torch.tensor([0.0, 1.0])]).sort().values


DYNAMIC = dynamic_map()
PAIRS = torch.stack([NF4.repeat_interleave(16), NF4.repeat(16)], 1)  # byte -> its two values, (256, 2)


def midpoints(code):
    """The borders at which the nearest value of a sorted code changes."""
    return (code[1:] + code[:-1]) / 2


def quantize_nf4(weight):
    """(N, K) -> packed (N*K/2) uint8, absmax (blocks) float32."""
    flat = weight.detach().flatten().float()
    blocks = F.pad(flat, (0, -flat.numel() % 64)).view(-1, 64)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]  # times the inverse, as [4] does: other bits otherwise
    index = torch.bucketize(scaled.view(-1), midpoints(NF4).to(flat.device), out_int32=True).to(torch.uint8)
    return ((index[::2] << 4) | index[1::2])[:(flat.numel() + 1) // 2], absmax


def quantize_absmax(absmax):
    """absmax (blocks) -> code (blocks) uint8, scale (blocks/256) float32, offset () float32."""
    offset = absmax.mean()
    blocks = F.pad(absmax - offset, (0, -absmax.numel() % 256)).view(-1, 256)
    scale = blocks.abs().amax(1)
    scaled = blocks * (1 / scale.clamp(min=1e-38))[:, None]
    step = (((scaled + 1) * 0.5) * 65535 + 0.5).floor()  # [4] on a CPU rounds to 65,536 steps first
    code = torch.bucketize(step.view(-1) / 65535 * 2 - 1, midpoints(DYNAMIC).to(absmax.device))
    return code[:absmax.numel()].to(torch.uint8), scale, offset


class NF4Matmul(torch.autograd.Function):
    """x (T, K) -> x W^T (T, N) with W in NF4. `F.linear(x, W.dequantize())` would keep the dense W of every layer
    alive until the backward pass; here the layer's packed bytes are all that is kept, and W is made again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dequantize())

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.dequantize(), None  # (T, N) @ (N, K) -> (T, K)


class NF4Linear(nn.Module):
    """A frozen linear layer (N, K) in NF4. Build it with `from_linear`."""
    weight = None  # T5 looks at wo.weight to choose a dtype; there is no dense weight to look at

    @classmethod
    def from_linear(cls, linear, dtype=None):
        """The NF4Linear of an nn.Linear; it computes in `dtype` (default: that of the linear's weight)."""
        self = cls()
        self.N, self.K = linear.weight.shape
        self.dtype = dtype or linear.weight.dtype
        packed, absmax = quantize_nf4(linear.weight)
        code, scale, offset = quantize_absmax(absmax)
        for name, value in dict(packed=packed, absmax_code=code, absmax_scale=scale, absmax_offset=offset).items():
            self.register_buffer(name, value)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(self.dtype))
        self.register_buffer("dense", None, persistent=False)
        return self

    def absmax(self):
        """(blocks) float32"""
        scale = self.absmax_scale.repeat_interleave(256)[:self.absmax_code.numel()]
        return DYNAMIC.to(scale.device)[self.absmax_code.int()] * scale + self.absmax_offset

    def dequantize(self):
        """The rounded weights, (N, K) in self.dtype: products in float32, cast last."""
        if self.dense is not None:
            return self.dense
        values = F.embedding(self.packed.int(), PAIRS.to(self.packed.device)).view(-1)
        values = F.pad(values, (0, -values.numel() % 64)).view(-1, 64) * self.absmax()[:, None]
        return values.view(-1)[:self.N * self.K].view(self.N, self.K).to(self.dtype)

    def forward(self, x):
        y = NF4Matmul.apply(x, self)
        return y if self.bias is None else y + self.bias


# --------------------------------------------------------------------------------------------------
# 5. LoRA: what is trained. A frozen W gets a low-rank companion: y = W x + (alpha / r) B A
# dropout(x), with A (r, K) and B (N, r) in float32 [3]. B starts at zero, so that the model begins
# as it was. LoRALinear wraps the layer and does not care how that keeps its weights.

class LoRAMatmul(torch.autograd.Function):
    """x (.., K), drop (.., K) bool or None -> scaling * (x without the dropped) A^T B^T, (.., N). Autograd would
    keep the thinned-out copy of x for every layer; here x, which the layers of a block share, and one byte an
    entry are kept."""

    @staticmethod
    def forward(ctx, x, drop, lora_A, lora_B, scaling):
        thin = x if drop is None else x.masked_fill(drop, 0)
        low = F.linear(thin, lora_A.to(x.dtype))  # (.., r)
        ctx.save_for_backward(x, drop, low, lora_A, lora_B)
        ctx.scaling = scaling
        return F.linear(low, (scaling * lora_B).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        x, drop, low, lora_A, lora_B = ctx.saved_tensors
        thin = x if drop is None else x.masked_fill(drop, 0)
        grad_low = grad @ (ctx.scaling * lora_B).to(x.dtype)  # (.., N) @ (N, r) -> (.., r)
        grad_x = grad_low @ lora_A.to(x.dtype)  # (.., r) @ (r, K) -> (.., K)
        if drop is not None:
            grad_x.masked_fill_(drop, 0)
        grad_A = grad_low.flatten(0, -2).T @ thin.flatten(0, -2)
        grad_B = grad.flatten(0, -2).T @ low.flatten(0, -2)
        return grad_x, None, grad_A.to(lora_A.dtype), (ctx.scaling * grad_B).to(lora_B.dtype), None


def drop_mask(shape, p, device):
    """A bool tensor that is True with probability p (rounded to 1/256). One random byte an entry, drawn eight at
    a time: a third of the time that torch's bernoulli takes on a CPU."""
    n = math.prod(shape)
    words = torch.empty((n + 7) // 8, dtype=torch.int64, device=device).random_(-2 ** 63, None)
    return (words.view(torch.uint8)[:n] < round(256 * p)).view(shape)


class LoRALinear(nn.Module):
    """base(x) + scaling * B A dropout(x)."""
    weight = None  # see NF4Linear

    def __init__(self, base, K, N, r, alpha, dropout, device=None):
        super().__init__()
        self.base, self.scaling, self.dropout = base, alpha / r, dropout
        self.lora_A = nn.Parameter(torch.empty(r, K, device=device))
        self.lora_B = nn.Parameter(torch.zeros(N, r, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as [3] and PEFT

    def forward(self, x):
        drop, scaling = None, self.scaling
        if self.training and self.dropout:
            drop = drop_mask(x.shape, self.dropout, x.device)
            scaling = scaling / (1 - round(256 * self.dropout) / 256)  # the expectation stays
        return self.base(x) + LoRAMatmul.apply(x, drop, self.lora_A, self.lora_B, scaling)


def add_lora(module, r, alpha, dropout):
    """Wraps every NF4Linear below module in a LoRALinear, in place; returns how many."""
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, LoRALinear):
            raise ValueError(f"{name} has LoRA already")
        if isinstance(child, NF4Linear):
            setattr(module, name, LoRALinear(child, child.K, child.N, r, alpha, dropout, child.packed.device))
            count += 1
        else:
            count += add_lora(child, r, alpha, dropout)
    return count


# --------------------------------------------------------------------------------------------------
# 6. The prompt tree. The prompts of a batch begin alike: all with the shared part, then those of
# one text with that text, and in training the answers of two readers with the same first labels. In
# a decoder the hidden state of a token depends on nothing but the tokens before it, so every
# distinct prefix is computed once, in training as in prediction, and loss and gradients stay the
# same numbers [6]. A batch is one flat sequence without padding: the trunk (the shared part), then
# the nodes of each group (a text and its readers). Everything but attention works on single tokens
# and does not see the difference; a node's position counts along its branch; and the attention
# below lets it see the trunk and its own branch, one small rectangle a group.

class PromptTree:
    """Token ids as a tree under a trunk. `add` makes nodes, `step` hands out those not computed yet; when `cache`
    is a dict, keys and values stay in it, and the tree can grow at its leaves, as greedy decoding does."""

    def __init__(self, trunk, cache=None):
        self.ids, self.depth = list(trunk), list(range(len(trunk)))
        self.S, self.done, self.cache = len(trunk), 0, cache
        self.children = {}               # (group, parent, token) -> node
        self.sees = [0] * len(trunk)     # of each node: the ranks in its group that it attends to, as bits
        self.groups = defaultdict(list)  # group -> its nodes, by rank

    def add(self, ids, group, parent=None):
        """The node at the end of the path `ids` below `parent` (default: the trunk); only new nodes are made."""
        for token in ids:
            node = self.children.get((group, parent, token))
            if node is None:
                node = self.children[group, parent, token] = len(self.ids)
                self.ids.append(token)
                self.depth.append(self.S if parent is None else self.depth[parent] + 1)
                self.sees.append((0 if parent is None else self.sees[parent]) | 1 << len(self.groups[group]))
                self.groups[group].append(node)
            parent = node
        return parent

    def step(self, device):
        """Index tensors of the T nodes that are not computed yet: dict(input_ids, position_ids (1, T), tree=dict)."""
        first, self.done = self.done, len(self.ids)
        groups = [(nodes, [n for n in nodes if n >= first]) for nodes in self.groups.values() if nodes[-1] >= first]
        groups.sort(key=lambda g: (len(g[0]), len(g[1])), reverse=True)
        buckets, slot, offset = [], {}, 0
        while groups:  # groups of about the same size together, so that little is padding
            size = next((i for i, g in enumerate(groups) if 1.5 * len(g[0]) < len(groups[0][0])), len(groups))
            bucket, groups = groups[:size], groups[size:]
            Lq, Lk = max(len(new) for _, new in bucket), len(bucket[0][0])
            q = np.zeros((size, Lq), np.int64)  # which of the T nodes
            k = np.zeros((size, Lk), np.int64)  # which of all nodes
            mask = np.zeros((size, 1, Lq, self.S + Lk), bool)
            mask[..., :self.S] = True
            for g, (nodes, new) in enumerate(bucket):
                k[g, :len(nodes)], q[g, :len(new)] = nodes, np.array(new) - first
                bits = b"".join(self.sees[n].to_bytes((Lk + 7) // 8, "little") for n in new)
                bits = np.unpackbits(np.frombuffer(bits, np.uint8).reshape(len(new), -1), axis=1, bitorder="little")
                mask[g, 0, :len(new), self.S:] = bits[:, :Lk]
                slot.update((n, offset + g * Lq + i) for i, n in enumerate(new))
            offset += size * Lq
            buckets.append(tuple(torch.from_numpy(a).to(device, non_blocking=True) for a in (q, k, mask)))
        order = torch.tensor([slot[n] for n in range(max(first, self.S), self.done)], dtype=torch.int64)
        return dict(
            input_ids=torch.tensor([self.ids[first:]], device=device),
            position_ids=torch.tensor([self.depth[first:]], device=device),
            tree=dict(S=self.S, trunk=max(self.S - first, 0), buckets=buckets, order=order.to(device), cache=self.cache))


def attend(q, k, v, mask, scaling):
    """Attention of q (G, H, Lq, E) to k and v (G, H', Lk, E) where the bool mask (G, 1, Lq, Lk) is True. The query
    heads that share a key head (grouped-query attention) are stacked as further queries of it."""
    G, H, Lq, E = q.shape
    share = H // k.shape[1]
    q, mask = q.reshape(G, k.shape[1], share * Lq, E), mask.repeat(1, 1, share, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling).reshape(G, H, Lq, -1)


def tree_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, *, tree, **kwargs):
    """Attention over a PromptTree: query (1, H, T, E), key and value (1, H', T, E) -> (1, T, H, E), None. It is what
    transformers calls in place of its own ("attn_implementation"); `tree` is handed through the model untouched."""
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") or kwargs.get("s_aux") is not None or (window and window < 4096):
        raise BadInput(f"{type(module).__name__}: soft-capped, sink or short-window attention is not supported")
    H, kv = query.shape[1], key.shape[1]
    q, k, v = (t[0].transpose(0, 1).flatten(1) for t in (query, key, value))  # (T, heads * E)
    if tree["cache"] is not None:
        old = tree["cache"].get(module.layer_idx)
        k, v = (k, v) if old is None else (torch.cat([old[0], k]), torch.cat([old[1], v]))
        tree["cache"][module.layer_idx] = k, v

    def heads(rows, G, n):  # (G * L, n * E) -> (G, n, L, E)
        return rows.view(G, -1, n, rows.shape[-1] // n).transpose(1, 2)

    S, out = tree["S"], []
    if tree["trunk"]:
        causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()[None, None]
        trunk = attend(heads(q[:S], 1, H), heads(k[:S], 1, kv), heads(v[:S], 1, kv), causal, scaling)
        out.append(trunk.transpose(1, 2).flatten(2)[0])
    leaves = []
    for q_index, k_index, mask in tree["buckets"]:
        G = len(q_index)
        ours = heads(q.index_select(0, q_index.view(-1)), G, H)
        keys, values = (
            torch.cat([heads(t[:S], 1, kv).expand(G, -1, -1, -1), heads(t.index_select(0, k_index.view(-1)), G, kv)], 2)
            for t in (k, v))
        leaves.append(attend(ours, keys, values, mask, scaling).transpose(1, 2).flatten(0, 1).flatten(1))
    if leaves:
        out.append(torch.cat(leaves).index_select(0, tree["order"]))
    return torch.cat(out).view(1, query.shape[2], H, -1), None


AttentionInterface.register("tree", tree_attention)


# --------------------------------------------------------------------------------------------------
# 7. The model and its two heads. The backbone is transformers' own module for the architecture,
# built without weights; the checkpoint is read tensor by tensor, and each linear layer turns into
# an NF4Linear as soon as its weights are there, so that no more than one layer is ever dense. Heads
# are neither quantized nor given LoRA: the classification head (L, D) is trained whole, the
# language model's head (V, D) stays as it is. The backbone's own dropout stays off. In an encoder-
# decoder the classification head reads the decoder's state at its start token.

def model_folder(name):
    """The folder of a model: a row of MODELS, a folder, or a Hugging Face id (fetched, or found in the cache)."""
    spec = MODELS[name]["id"] if name in MODELS else name
    if os.path.isdir(spec):
        if not os.path.exists(os.path.join(spec, "config.json")):
            raise BadInput(f"--model {name}: {spec} holds no config.json of a Hugging Face model")
        return spec
    known = f"names: {', '.join(MODELS)}; else a folder or a Hugging Face id"
    if spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise BadInput(f"--model {name}: no such folder ({known})")
    try:
        folder = snapshot_download(spec, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"])
        if not glob.glob(os.path.join(folder, "*.safetensors")):
            folder = snapshot_download(spec, allow_patterns=["*.json", "*.txt", "*.model", "*.bin"])
        return folder
    except Exception as e:  # the hub's client raises errors of four packages; what the user can do is the same
        raise BadInput(f"--model {name}: cannot fetch {spec} from the Hugging Face hub ({type(e).__name__}); "
                       f"with a network run once, or give a folder: --model DIR ({known})") from None


def checkpoint_tensors(folder):
    """Yields (name, tensor) for every weight in a model folder, one tensor in memory at a time."""
    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    for path in files:
        with safe_open(path, "pt") as f:
            for name in f.keys():
                yield name, f.get_tensor(name)
    if not files:
        for path in sorted(glob.glob(os.path.join(folder, "pytorch_model*.bin"))):
            yield from torch.load(path, map_location="cpu", mmap=True, weights_only=True).items()


@contextmanager
def parameters_on_meta():
    """Modules built inside get parameters without memory, and real buffers (rotary frequencies, for one)."""
    register = nn.Module.register_parameter

    def on_meta(module, name, param):
        if param is not None and not param.is_meta:  # one that is, is tied: it stays the same object
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_quantized(folder, device, dtype):
    """The transformers model in a folder, its backbone's linear layers in NF4, frozen."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    attention = "sdpa" if config.is_encoder_decoder else "tree"
    with parameters_on_meta():
        lm = kind.from_config(config, attn_implementation=attention)
    for name, buffer in lm.named_buffers():
        buffer.data = buffer.to(device)
    holders = dict(lm.named_parameters(remove_duplicate=False))  # tied weights under each of their names
    given, head, prefix = {}, lm.get_output_embeddings(), lm.base_model_prefix + "."
    for name, tensor in tqdm(checkpoint_tensors(folder), "quantize", delay=2, unit=" tensors", leave=False):
        name = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in holders), None)
        if name is None:
            continue  # buffers of older versions of transformers
        path, _, leaf = name.rpartition(".")
        module = lm.get_submodule(path)
        setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))
        given[id(holders[name])] = getattr(module, leaf)
        if isinstance(module, nn.Linear) and module is not head and not any(p.is_meta for p in module.parameters()):
            parent, _, child = path.rpartition(".")
            setattr(lm.get_submodule(parent), child, NF4Linear.from_linear(module))
    for name, param in list(lm.named_parameters(remove_duplicate=False)):
        if param.is_meta:
            if id(param) not in given:
                raise BadInput(f"{folder}: the checkpoint has no weights for {name}")
            path, _, leaf = name.rpartition(".")
            setattr(lm.get_submodule(path), leaf, given[id(param)])
    return lm.eval()


class PersonalizedLM(nn.Module):
    """A frozen backbone in NF4, with LoRA if it is to be trained, and one of the two heads."""

    def __init__(self, lm, head, n_labels):
        super().__init__()
        self.lm, self.head, self.seq2seq = lm, head, lm.config.is_encoder_decoder
        width = lm.get_output_embeddings().weight.shape[1]
        if head == "cls":  # trained whole, in float32
            self.score = nn.Linear(width, n_labels, bias=False, device=lm.device)
            nn.init.normal_(self.score.weight, std=0.02)

    @property
    def device(self):
        return self.lm.device

    def trainable(self):
        """dict name -> parameter of everything that is trained: LoRA and the classification head."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def hidden(self, batch):
        """(P, D): the hidden state at each position that the head reads."""
        if not self.seq2seq:
            return self.lm.base_model(**batch["inputs"], use_cache=False).last_hidden_state[0, batch["at"]]
        encoder, inputs = self.lm.get_encoder(), batch["inputs"]
        memory = encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
        of = inputs["encoder_row"]
        out = self.lm.get_decoder()(input_ids=inputs["decoder_input_ids"], encoder_hidden_states=memory[of],
                                    encoder_attention_mask=inputs["attention_mask"][of], use_cache=False)
        return out.last_hidden_state.flatten(0, 1)[batch["at"]]

    def token_logits(self, hidden):
        """(P, D) -> (P, V) float32"""
        if getattr(self.lm.config, "scale_decoder_outputs", False):  # T5 with tied embeddings
            hidden = hidden * self.lm.model_dim ** -0.5
        return self.lm.get_output_embeddings()(hidden).float()

    def forward(self, batch):
        """(P, L) label scores or (P, V) token logits, float32."""
        hidden = self.hidden(batch)
        return self.score(hidden.float()) if self.head == "cls" else self.token_logits(hidden)


def keep_dense(model):
    """Keeps a dense copy of the rounded weights where it takes less than a quarter of the memory
    that is free: same numbers, no dequantizing. Returns whether it did."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    size = sum(m.N * m.K * m.dtype.itemsize for m in layers)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for m in layers if size < free / 4 else ():
        m.dense = m.dequantize()
    return size < free / 4


def load_model(name, head, n_labels, device, settings=TRAINING):
    """(PersonalizedLM, tokenizer), quantized, with LoRA unless the model is only asked."""
    folder = model_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    lm = load_quantized(folder, device, dtype)
    if head != "ask":
        add_lora(lm, settings["r"], settings["alpha"], settings["dropout"])
    return PersonalizedLM(lm, head, n_labels), tokenizer


# --------------------------------------------------------------------------------------------------
# 8. Batches. Rows become index tensors; what a head has to read and what it should say there is the
# same four entries for both heads and both kinds of model: `inputs` of the backbone, `at` (P) the
# positions that are read, `of` which of these each target belongs to (five readers of one prompt,
# whose ID is not told, share one), `target` (R, L) labels or (tokens of the answers) ids.

def tree_batch(rows, head, device, share=True):
    """A batch for a decoder, see above. Without `share`, every row computes its whole prompt."""
    tree, at, of, target = PromptTree(rows[0].shared if share else ()), {}, [], []
    for i, row in enumerate(rows):
        group, path = (row.text, ()) if share else (i, row.shared)
        node = tree.add(path + row.text + row.user, group)
        if head == "cls":
            of.append(at.setdefault(node, len(at)))
            target.append(row.labels)
        else:
            for j, token in enumerate(row.answer):  # the state at a token predicts the next one
                node = tree.add(row.answer[max(j - 1, 0):j], group, node)
                of.append(at.setdefault(node, len(at)))
                target.append(token)
    return batch_of(tree.step(device), list(at), of, target, device, tree.done)


def pair_batch(rows, head, start, device, share=True):
    """A batch for an encoder-decoder: equal prompts are encoded once, equal (prompt, answer) pairs
    decoded once. The encoder reads both ways, so prompts that only begin alike have nothing equal."""
    sources, pairs, at, of, target = {}, {}, {}, [], []
    for i, row in enumerate(rows):
        source = sources.setdefault((row.shared + row.text + row.user, share or i), len(sources))
        answer = row.answer if head == "lm" else (None,)  # CLS reads the state at the start token
        pair = pairs.setdefault((source, (start, *answer[:-1])), len(pairs))
        of += [at.setdefault((pair, j), len(at)) for j in range(len(answer))]
        target += [row.labels] if head == "cls" else answer
    input_ids, attention_mask = padded([ids for ids, _ in sources], device)
    decoder_input_ids, _ = padded([ids for _, ids in pairs], device)
    width = decoder_input_ids.shape[1]
    inputs = dict(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids,
                  encoder_row=torch.tensor([source for source, _ in pairs], device=device))
    tokens = sum(len(ids) for ids, _ in sources) + sum(len(ids) for _, ids in pairs)
    return batch_of(inputs, [pair * width + j for pair, j in at], of, target, device, tokens)


def padded(sequences, device):
    """(ids (B, T), mask (B, T)) of sequences of ids, filled up on the right; the mask is by length."""
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return ids, mask


def batch_of(inputs, at, of, target, device, tokens):
    """The dict that PersonalizedLM reads; `tokens` is how many the backbone computes for it."""
    at, of, target = (torch.tensor(x, device=device) for x in (at, of, target))
    return dict(inputs=inputs, at=at, of=of, target=target, tokens=tokens)


def make_batch(model, rows, share=True):
    """The batch of some rows for this model."""
    if model.seq2seq:
        start = model.lm.config.decoder_start_token_id
        return pair_batch(rows, model.head, start, model.device, share)
    return tree_batch(rows, model.head, model.device, share)


def in_batches(rows, size, rng=None):
    """The rows in lists of `size`, all annotations of a text beside each other and texts of about
    the same length together. With `rng`, in a random order: lengths are sorted in windows of 16
    batches, and the batches are shuffled."""
    texts = defaultdict(list)
    for row in rows:
        texts[row.text].append(row)
    groups = list(texts.values())
    if rng:
        rng.shuffle(groups)
    flat = [row for group in groups for row in group]
    rank = {id(row): i for i, group in enumerate(groups) for row in group}
    window = 16 * size if rng else max(len(flat), 1)
    flat = [row for i in range(0, len(flat), window) for row in
            sorted(flat[i:i + window], key=lambda row: (len(row.text), rank[id(row)]))]
    batches = [flat[i:i + size] for i in range(0, len(flat), size)]
    if rng:
        rng.shuffle(batches)
    return batches


# --------------------------------------------------------------------------------------------------
# 9. Training. Binary cross-entropy over all labels (CLS) or cross-entropy over the tokens of the
# answer (LM), each the mean over everything in the batch of 32, however it was cut into pieces for
# memory; AdamW in float32, a cosine schedule with warm-up, clipped gradients. After every epoch the
# validation loss is taken, and the epoch where it was lowest is kept [1].

def n_targets(rows, head):
    """What the loss of these rows is divided by: their labels, or the tokens of their answers."""
    return sum(len(row.labels) if head == "cls" else len(row.answer) for row in rows)


def summed_loss(model, batch):
    """() the loss of a batch, summed over its targets."""
    out = model(batch)[batch["of"]]
    if model.head == "cls":
        return F.binary_cross_entropy_with_logits(out, batch["target"].float(), reduction="sum")
    return F.cross_entropy(out, batch["target"], reduction="sum")


def learning_rate(step, steps, lr, warmup):
    """The rate of a step (from 0): a line up over the first `warmup` share, half a cosine down to 0."""
    rise = max(math.ceil(warmup * steps), 1)
    if step < rise:
        return lr * (step + 1) / rise
    return lr * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


@torch.no_grad()
def mean_loss(model, rows, share=True):
    """The validation loss: the mean over all targets of the rows."""
    model.train(False)
    bar = tqdm(in_batches(rows, 64), "validate", delay=2, unit=" batches", leave=False)
    return sum(summed_loss(model, make_batch(model, part, share)).item() for part in bar) / n_targets(
        rows, model.head)


def train_step(model, rows, params, optimizer, clip, share=True, micro=0):
    """(loss (), tokens computed) of one optimizer step; `micro` rows are computed at a time, or all."""
    model.train(True)
    loss, tokens, total = 0, 0, n_targets(rows, model.head)
    for i in range(0, len(rows), micro or len(rows)):
        batch = make_batch(model, rows[i:i + (micro or len(rows))], share)
        part = summed_loss(model, batch) / total
        part.backward()
        loss, tokens = loss + part.detach(), tokens + batch["tokens"]
    nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss, tokens


def train(model, rows, val_rows, settings, log, seed=42, share=True, micro=0, max_steps=0):
    """Trains in place and keeps the best epoch; returns dict(seconds, rows, tokens, val_loss).
    `log` is called with a dict for every step and every validation."""
    params, rng = model.trainable(), random.Random(seed)
    optimizer = torch.optim.AdamW(params.values(), lr=settings["lr"], weight_decay=0.0)
    steps = settings["epochs"] * math.ceil(len(rows) / settings["batch"])
    steps = min(steps, max_steps or steps)
    best, kept, step, done = math.inf, None, 0, Counter(seconds=0.0)
    bar = tqdm(total=steps, desc="train", delay=2, unit=" steps", dynamic_ncols=True)
    for epoch in range(settings["epochs"]):
        for part in in_batches(rows, settings["batch"], rng)[:steps - step]:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings["lr"], settings["warmup"])
            loss, tokens = train_step(
                model, part, params.values(), optimizer, settings["clip"], share, micro)
            loss, step = loss.item(), step + 1
            done.update(seconds=time.perf_counter() - start, rows=len(part), tokens=tokens)
            log(dict(step=step, epoch=epoch + 1, loss=round(loss, 6), lr=group["lr"], rows=len(part),
                     tokens=tokens, seconds=round(time.perf_counter() - start, 4)))
            if not math.isfinite(loss):
                ids = ", ".join(sorted({text_id(row.source.text) for row in part}))
                raise BadInput(f"the loss is {loss} at step {step} (texts {ids}): try a lower --lr")
            bar.set_postfix(epoch=epoch + 1, loss=f"{loss:.4f}", refresh=False)
            bar.update()
        val_loss = mean_loss(model, val_rows, share)
        log(dict(step=step, epoch=epoch + 1, val_loss=round(val_loss, 6)))
        if val_loss < best:
            best, kept = val_loss, {name: p.detach().clone() for name, p in params.items()}
        if step == steps:
            break
    bar.close()
    with torch.no_grad():
        for name, value in (kept or {}).items():
            params[name].copy_(value)
    return dict(done, val_loss=best, steps=step)


# --------------------------------------------------------------------------------------------------
# 10. Prediction. CLS ticks a label where its score is above 0. LM writes: greedy decoding, in which
# the prompts of a batch are a tree as before and every answer grows at its leaf, and the answer is
# read back into labels.

MAX_ANSWER = 48  # tokens; the authors allow as many as all labels together, which nobody ticks


@torch.no_grad()
def label_scores(model, rows, share=True):
    """(R, L) scores of the classification head, in the order of the rows."""
    model.train(False)
    scores, bar = {}, tqdm(total=len(rows), desc="predict", delay=2, unit=" rows", leave=False)
    for part in in_batches(rows, 64):
        batch = make_batch(model, part, share)
        scores.update(zip(map(id, part), model(batch)[batch["of"]].float().cpu().numpy()))
        bar.update(len(part))
    bar.close()
    return np.array([scores[id(row)] for row in rows])


def grow_answers(model, rows, end, limit, share=True):
    """Greedy decoding with a decoder: the answer of each row as ids, without the end token."""
    tree, group_of, ends = PromptTree(rows[0].shared if share else (), cache={}), {}, []
    for i, row in enumerate(rows):
        group, path = (row.text, ()) if share else (i, row.shared)
        ends.append(tree.add(path + row.text + row.user, group))
        group_of[ends[-1]] = group
    answers, tips, first = {leaf: [] for leaf in ends}, {leaf: leaf for leaf in ends}, 0
    for _ in range(limit):
        hidden = model.lm.base_model(**tree.step(model.device), use_cache=False).last_hidden_state[0]
        at = torch.tensor([tip - first for tip in tips.values()], device=model.device)
        tokens = dict(zip(tips, model.token_logits(hidden[at]).argmax(1).tolist()))
        tips = {leaf: tip for leaf, tip in tips.items() if tokens[leaf] != end}
        if not tips:
            break
        first = tree.done
        for leaf, tip in tips.items():
            answers[leaf].append(tokens[leaf])
            tips[leaf] = tree.add((tokens[leaf],), group_of[leaf], tip)
    return [answers[leaf] for leaf in ends]


def write_answers(model, rows, end, limit, share=True):
    """Greedy decoding with an encoder-decoder: the answer of each row as ids."""
    sources = {}
    for i, row in enumerate(rows):
        sources.setdefault((row.shared + row.text + row.user, share or i), len(sources))
    ids, mask = padded([ids for ids, _ in sources], model.device)
    out = model.lm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, do_sample=False,
                            num_beams=1, eos_token_id=end, pad_token_id=end)[:, 1:].tolist()
    out = [answer[:answer.index(end)] if end in answer else answer for answer in out]
    return [out[sources[row.shared + row.text + row.user, share or i]] for i, row in enumerate(rows)]


@torch.no_grad()
def written_answers(model, tokenizer, rows, limit, share=True):
    """The answer of each row as a string, in the order of the rows."""
    model.train(False)
    write = write_answers if model.seq2seq else grow_answers
    answers, bar = {}, tqdm(total=len(rows), desc="predict", delay=2, unit=" rows", leave=False)
    for part in in_batches(rows, 64):
        ids = write(model, part, tokenizer.eos_token_id, limit, share)
        answers.update(zip(map(id, part), tokenizer.batch_decode(ids, skip_special_tokens=True)))
        bar.update(len(part))
    bar.close()
    return [answers[id(row)].strip() for row in rows]


def words_of(text):
    """The words of a text without case and punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def parse_answer(answer, labels):
    """(0/1 tuple of L, number of words that belong to no label). Case, punctuation and order are
    forgiven; where labels overlap ("unfair", "unfair generalisation") the longest is meant."""
    names = sorted(((words_of(label), i) for i, label in enumerate(labels)), key=lambda n: -len(n[0]))
    words, chosen, unknown = words_of(answer), [0] * len(labels), 0
    while words:
        match = next(((name, i) for name, i in names if words[:len(name)] == name), None)
        if match:
            chosen[match[1]] = 1
        unknown += match is None
        words = words[len(match[0]) if match else 1:]
    return tuple(chosen), unknown


# --------------------------------------------------------------------------------------------------
# 11. Scores. The paper's: F1 of each label, and their plain mean.

def f1_scores(gold, predicted):
    """dict(f1_macro, f1_micro, per_label) of 0/1 arrays (R, L): F1 = 2TP / (2TP + FP + FN), and 0
    for a label that nobody chose and nothing predicted, as scikit-learn's f1_score(zero_division=0)."""
    gold, predicted = np.asarray(gold, bool), np.asarray(predicted, bool)
    hits, all_ = (gold & predicted).sum(0), gold.sum(0) + predicted.sum(0)  # (L), and 2TP + FP + FN
    per_label = 2 * hits / np.maximum(all_, 1)
    return dict(f1_macro=float(per_label.mean()), f1_micro=float(2 * hits.sum() / max(all_.sum(), 1)),
                per_label=per_label.tolist())


# --------------------------------------------------------------------------------------------------
# 12. Runs on disk: out/<data>/<model>/<method>/seed<S>/. A file appears under its name when it is
# complete; whatever stood there before stays until then.

@contextmanager
def complete_file(path, mode="w"):
    """An open file that takes the name `path` when the block ends well, and is gone if it does not."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    try:
        with open(part, mode, **({} if "b" in mode else dict(encoding="utf-8", newline=""))) as f:
            yield f
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def run_folder(out, data, model, method, seed):
    """The folder of a run; a model given as a folder or a hub id goes by its last part."""
    model = os.path.basename(os.path.abspath(model)) if model not in MODELS else model
    return os.path.join(out, data, model, method, f"seed{seed}")


def write_predictions(path, annotations, labels, predicted, scores=None, answers=None):
    """predictions.csv: one line a test row, in the order of the test rows."""
    with complete_file(path) as f:
        writer = csv.writer(f)
        writer.writerow(["text_id", "user", "gold", "predicted", *([] if scores is None else
                         [f"score:{label}" for label in labels]), *([] if answers is None else ["answer"])])
        for i, (a, chosen) in enumerate(zip(annotations, predicted)):
            writer.writerow([
                text_id(a.text), a.user, answer_text(labels, a.labels).strip(),
                answer_text(labels, chosen).strip(), *([] if scores is None else
                [f"{s:.5f}" for s in scores[i]]), *([] if answers is None else [answers[i]])])


def peak_memory_mb(device):
    """The most memory that was in use: of the GPU, else of the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 1024))


# --------------------------------------------------------------------------------------------------
# 13. One experiment from end to end, and the table of all of them.

def predict(model, tokenizer, labels, rows, share=True):
    """dict(predicted (R, L), and scores (R, L) or answers (R), unknown_words, unreadable)"""
    if model.head == "cls":
        scores = label_scores(model, rows, share)
        return dict(predicted=scores > 0, scores=scores)
    limit = len(tokenize(tokenizer, answer_text(labels, [1] * len(labels)))) + 1
    answers = written_answers(model, tokenizer, rows, min(limit, MAX_ANSWER), share)
    predicted, unknown = zip(*(parse_answer(answer, labels) for answer in answers))
    return dict(predicted=np.array(predicted), answers=answers, unknown_words=sum(unknown),
                unreadable=sum(not any(p) for p in predicted))


def parameter_counts(model):
    """dict(total, trainable, packed_bytes): weights, those trained, bytes of the packed base."""
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    buffers = [b for m in layers for n, b in m.named_buffers() if n not in ("bias", "dense")]
    return dict(total=sum(p.numel() for p in model.parameters()) + sum(m.N * m.K for m in layers),
                trainable=sum(p.numel() for p in model.trainable().values()),
                quantized=sum(m.N * m.K for m in layers),
                packed_bytes=sum(b.numel() * b.element_size() for b in buffers))


def run(method, args):
    """Trains (unless the method only asks), predicts, scores, writes the run's files, prints them."""
    start, kind = time.perf_counter(), METHODS[method]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = TRAINING | {k: v for k, v in MODELS.get(args.model, {}).items() if k in TRAINING}
    settings |= {k: getattr(args, k) for k in TRAINING if getattr(args, k, None) is not None}
    data = load_data(args.data, args.data_dir, args.text_col, args.user_col, args.labels)
    test, val = (rows[:args.max_eval or len(rows)] for rows in (data.test, data.val))
    print(f"{method} on {data.name}: {len(data.train)} train, {len(val)} validation, {len(test)} "
          f"test annotations, {len(data.labels)} labels, "
          f"{len({a.user for a in data.train})} users", flush=True)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args.model, kind.head, len(data.labels), device, settings)
    dense = keep_dense(model)
    counts = parameter_counts(model)
    (train_rows, cut), (val_rows, cut_val), (test_rows, cut_test) = (
        encode(tokenizer, kind, data.labels, part, args.max_text) for part in (data.train, val, test))
    print(f"{args.model}: {counts['total'] / 1e6:.1f} M parameters, {counts['trainable']:,} trained; "
          f"{counts['quantized'] / 1e6:.1f} M weights in {counts['packed_bytes'] / 1e6:.2f} MB of NF4"
          f"{', a dense copy of the rounded weights kept for speed' * dense}; texts cut to "
          f"{args.max_text} tokens: {cut + cut_val + cut_test}", flush=True)
    folder = run_folder(args.out, data.name, args.model, method, args.seed)
    with complete_file(os.path.join(folder, "log.jsonl")) as f:
        def log(line):
            f.write(json.dumps(line) + "\n")
            f.flush()
        done = train(model, train_rows, val_rows, settings, log, args.seed, not args.no_share,
                     args.micro_batch, args.max_steps)
    result = predict(model, tokenizer, data.labels, test_rows, not args.no_share)
    gold = [a.labels for a in test]
    unshared = sum(len(r.shared + r.text + r.user) + (len(r.answer) - 1) * (kind.head == "lm")
                   for r in train_rows) / len(train_rows)
    metrics = dict(
        method=method, model=args.model, data=data.name, seed=args.seed,
        **f1_scores(gold, result["predicted"]), labels=data.labels,
        rows=dict(train=len(data.train), val=len(val), test=len(test), notes=data.notes),
        seconds=round(time.perf_counter() - start, 1), train_seconds=round(done["seconds"], 2),
        rows_per_second=round(done["rows"] / done["seconds"], 2), steps=done["steps"],
        val_loss=done["val_loss"], tokens_computed=done["tokens"],
        tokens_unshared=round(unshared * done["rows"]), peak_memory_mb=peak_memory_mb(device),
        parameters=counts, texts_cut=cut + cut_val + cut_test,
        **{k: result[k] for k in ("unknown_words", "unreadable") if k in result},
        config=dict(settings, max_text=args.max_text, share=not args.no_share, dense_copy=dense,
                    micro_batch=args.micro_batch, max_steps=args.max_steps, max_eval=args.max_eval,
                    device=str(device)))
    write_predictions(os.path.join(folder, "predictions.csv"), test, data.labels,
                      result["predicted"], result.get("scores"), result.get("answers"))
    with complete_file(os.path.join(folder, "adapter.safetensors"), "wb") as f:
        f.write(safetensors_bytes({k: p.detach().cpu().contiguous() for k, p in model.trainable().items()}))
    with complete_file(os.path.join(folder, "metrics.json")) as f:
        json.dump(metrics, f, indent=1)
    print_summary(metrics, folder)


def print_summary(m, folder):
    """What a run ends with, for people."""
    print(f"""
{m['method']} with {m['model']} on {m['data']}, seed {m['seed']}
  parameters  {m['parameters']['total']:,} in all, {m['parameters']['trainable']:,} trained, packed base {m['parameters']['packed_bytes']:,} bytes
  time        {m['seconds']:.0f} s, {m['train_seconds']:.0f} s of it {m['steps']} training steps ({m['rows_per_second']:.1f} annotations/s), peak memory {m['peak_memory_mb']:,} MB
  tokens      {m['tokens_computed']:,} computed in training; without sharing {m['tokens_unshared']:,}
  F1-macro    {m['f1_macro']:.4f}   (micro {m['f1_micro']:.4f}, {m['rows']['test']} test annotations)""")
    width = max(map(len, m["labels"]))
    for label, f1 in zip(m["labels"], m["per_label"]):
        print(f"    {label:{width}}  {f1:.4f}  {'#' * round(40 * f1)}")
    print(f"  files       {folder}/")


def finished_runs(out):
    """The metrics of every finished run below a folder."""
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "*", "*", "*", "seed*", "metrics.json"))):
        with open(path, encoding="utf-8") as f:
            yield json.load(f)


def print_table(out):
    """F1-macro (mean over seeds) of every finished run: methods in rows, models in columns, one
    table a dataset, and behind each personalized value what it gains over its plain twin."""
    f1 = defaultdict(list)
    for m in finished_runs(out):
        f1[m["data"], m["method"], m["model"]].append(m["f1_macro"])
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
                value, plain = (mean.get((data, x, model)) for x in (method, method.removesuffix("_p")))
                cells.append("" if value is None else f"{value:.4f}" if plain is None or plain is value
                             else f"{value:.4f} ({value - plain:+.4f})")
            if any(cells):
                print(f"{method:8}" + "".join(f"{cell:>{width}}" for cell in cells))


# --------------------------------------------------------------------------------------------------
# 14. The command line.

class Parser(argparse.ArgumentParser):
    def error(self, message):
        flags = " ".join(s for a in self._actions for s in a.option_strings if s.startswith("--"))
        raise BadInput(f"{message} (flags: {flags})" if "unrecognized" in message else message)


def make_parser():
    """The argparse parser; every default stands here or in the tables."""
    p = Parser(prog="plm.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
               description=__doc__.split("\n\n")[0], epilog=f"models: {', '.join(MODELS)}\ndatasets: "
               f"{', '.join(DATASETS)}\nmethods: {', '.join(METHODS)}; a trailing _p is told the user ID")
    p.add_argument("command", choices=[*METHODS, "table"], metavar="METHOD | table")
    p.add_argument("--model", default="tiny", help="a name below, a folder or a Hugging Face id (tiny)")
    p.add_argument("--data", default="sample", help="a name below or a CSV file (sample)")
    p.add_argument("--data-dir", help="where the files of a named dataset are")
    p.add_argument("--text-col", help="the CSV's column of texts (text)")
    p.add_argument("--user-col", help="the CSV's column of users (user)")
    p.add_argument("--labels", type=lambda s: s.split(","), help="a,b,c (all remaining 0/1 columns)")
    p.add_argument("--seed", type=int, default=42, help="of everything random in training (42)")
    p.add_argument("--out", default="out", help="the folder of all runs (out)")
    for name, what in (("lr", "learning rate"), ("epochs", "passes over the training rows"),
                       ("r", "rank of LoRA")):
        kind = type(TRAINING[name])
        p.add_argument(f"--{name}", type=kind, help=f"{what} (the model's row, else {TRAINING[name]})")
    p.add_argument("--max-steps", type=int, default=0, help="stop training after N steps")
    p.add_argument("--max-eval", type=int, default=0, help="validate and test on the first N rows")
    p.add_argument("--max-text", type=int, default=384, help="tokens of a text that are read (384)")
    p.add_argument("--micro-batch", type=int, default=0, help="annotations computed at once (32)")
    p.add_argument("--no-share", action="store_true", help="compute every prompt by itself")
    return p


def main(argv=None):
    """Runs one command; returns the exit status."""
    transformers.logging.set_verbosity_error()
    try:
        args = make_parser().parse_args(argv)
        if args.command == "table":
            print_table(args.out)
        else:
            run(args.command, args)
    except BadInput as e:
        print(f"plm.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nplm.py: stopped; files of earlier runs are as they were", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
