"""Tests of plm.py, and of the tables and exports made of its runs. Oracles are bitsandbytes' bytes,
scikit-learn's numbers, transformers' own forward pass and generate, PEFT, prompts word for word; no
network, no GPU. Those of the other scripts are in data/test_scripts.py."""
import argparse
import contextlib
import copy
import csv
import functools
import hashlib
import importlib
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import timeit
import traceback
import unittest
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from email.utils import formatdate
from importlib.util import find_spec
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

import plm

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(1, f"{HERE}/data")
export, prepare, report, table, vary = map(
    importlib.import_module, ("export", "prepare", "report", "table", "vary"))
CPU, VOCABULARY = torch.device("cpu"), 97

def go(line, *more):
    """The exit status of a command line, in this process: importing everything takes seconds."""
    return plm.main([*line.split(), *more])

def refused(capsys, line, *more, main=plm.main, more_lines=0):
    """The line that a command with status 2 leaves (behind a bar, where it took long)."""
    capsys.readouterr()
    assert main([*line.split(), *more]) == 2
    err = capsys.readouterr().err.split("\r")[-1].lstrip()
    assert err.startswith(f"{main.__module__}.py: ") and err.count("\n") == 1 + more_lines
    return err

# --------------------------------------------------------------------------------- data and splits

def write_csv(path, rows, header="text user calm angry"):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header.split(), *rows])
    return str(path)

def some_rows(n=60):
    """Every text is read by three people who disagree."""
    return [(f"comment number {i // 3} about thing {i // 3 * 7}", f"u{i % 3}", i % 2, 1 - i % 2)
            for i in range(n)]

def read(path, **form):
    return plm.read_annotations(str(path), dict(text="text", user="user") | form)

@pytest.mark.parametrize("text", ["cut, with a comma", 'a "quoted"\nline\r\nbreak', "\U0001f600",
                                  "</s> ### Response: <|endoftext|>", "x" * 1_000_000])
def test_any_text_survives_reading(tmp_path, text):
    rows = [(text, "with\nnewline", 0, 1), *some_rows()]
    found, what, _ = read(write_csv(tmp_path / "a.csv", rows))
    assert what == dict(labels=MOODS, single=False, ordered=False)
    assert found[0] == (plm.Annotation(text, "with\nnewline", (0, 1)), None)

@pytest.mark.parametrize("content", [
    '\ufefftext,user,calm\r\n"a, b",u,1\r\nc,u,0\r\n', 'text;user;calm\n"a, b";u;1\nc;u;0\n',
    "\ufefftext\tuser\tcalm\na, b\tu\t1\nc\tu\t0\n"])
def test_byte_order_mark_line_ends_and_separators_are_no_part_of_the_data(tmp_path, content):
    (tmp_path / "a").write_bytes(content.encode())
    assert [a for a, _ in read(tmp_path / "a")[0]] == [("a, b", "u", (0, 1)), ("c", "u", (1, 0))]

@pytest.mark.parametrize("content, says", [
    ("txt,user,a,b\nt,u,1,1", "no column 'text'; there are: txt, user, a, b"),
    ("text,user,a,b\nt,u,1,1\nt,u,2,1\nt,u,1,1", "row 2: label 'a' is '2'"),
    ("text,user,a,b\nt,u,1,1\n ,u,1,1", "row 2: no 'text'"), ("", "no annotations"),
    ("text,user,a,b\nt,u,1,1\n\nt,u,1", "row 2 (line 4)"), ("text,user,a\n", "no annotations"),
    ("text,user,user,b\nt,u,1,1", "2 columns 'user'"),
    ("text,user,a\ncaf\xe9,u,1\n", "UTF-8"), ("text,user,words\nt,u,hm", "of 0 and 1"),
    ("text,user,a,split\nt,u,1,\nt,u,1,x", "row 2: 'x' is not train")])
def test_bad_rows_and_files_are_named(tmp_path, content, says):
    (tmp_path / "a.csv").write_bytes(content.encode("latin-1"))
    with pytest.raises(plm.BadInput, match=re.escape(says)):
        read(tmp_path / "a.csv")

@pytest.mark.parametrize("cells, labels, ordered, chosen", [
    ("0 1 1", "not X,X", False, "011"), ("1.0 0.0 1", "not X,X", False, "101"),
    ("yes No YES", "not X,X", False, "101"), ("True false true", "not X,X", False, "101"),
    ("3 1 10", "1,3,10", True, "102"), ("2 2.0 1.5", "1.5,2", True, "110"),
    ("1 -1 0", "-1,0,1", True, "201"), ("joy fear joy", "fear,joy", False, "101"),
    ("1000001 1000002 1000001", "1000001,1000002", True, "010")])
def test_one_column_names_the_single_choice(tmp_path, cells, labels, ordered, chosen):
    rows = [(f"t{i}", "u", 0, cell) for i, cell in enumerate(cells.split())]
    found, what, _ = read(write_csv(tmp_path / "a.csv", rows, "text user Z X"), label="X")
    assert what == dict(labels=labels.split(","), single=True, ordered=ordered)
    assert "".join(str(a.labels.index(1)) for a, _ in found) == chosen

def test_several_columns_are_ticks_a_lone_one_a_choice_and_two_spellings_are_doubtful(tmp_path):
    rows = [("t", "u", 0, "TRUE", "false", "m"), ("s", "u", 1, "false", "false", "f")]
    path = write_csv(tmp_path / "a.csv", rows, "text user calm angry sad sex")
    with pytest.raises(plm.BadInput, match=r"calm \(0/1\); angry, sad \(true/false\).*--labels"):
        read(path)
    found, what, _ = read(path, labels=["calm", "angry"])
    assert not what["single"] and [a.labels for a, _ in found] == [(0, 1), (1, 0)]
    write_csv(path, [row[:2] + row[3:5] for row in rows], "text user b c")
    assert [a.labels for a, _ in read(path)[0]] == [(1, 0), (0, 0)]
    write_csv(path, [row[:3] + row[5:] for row in rows], "text user calm sex")
    _, what, notes = read(path)
    assert what == dict(labels=["not calm", "calm"], single=True, ordered=False)
    assert notes["two-valued columns not taken"] == "sex"  # said, since it may have been meant

def test_a_split_column_is_followed_to_the_letter_and_what_is_odd_is_counted(tmp_path):
    parts = "train Training val dev valid validation test TEST none train test".split()
    rows = [(f"t{i % 10}", f"u{i}", i % 2, i % 3 % 2, part.replace("none", ""))
            for i, part in enumerate(parts)]
    for column, said in (("split", None), ("draw", "draw")):
        path = write_csv(tmp_path / "a.csv", rows + rows[:1], f"text user a b {column}")
        data = plm.load_data(path, split=said)
        assert [" ".join(a.text for a in x) for x in (data.train, data.val, data.test)] == [
            "t0 t1 t9 t0", "t2 t3 t4 t5", "t6 t7 t0"]
        assert {what: n for what, n in data.notes.items() if n and isinstance(n, int)} == {
            "rows read": 12, "left out: in no split": 1, "texts in two splits": 1,
            "kept: val, user unknown to training": 4,
            "kept: test, user unknown to training": 3,
            "rows that repeat a (text, user)": 1}

def test_splits_share_no_text_and_know_every_user(tmp_path):
    rows = [(f"text {i} {'!' * (i % 3)}", f"u{i % 40}", i % 2, i % 7 % 2) for i in range(900)]
    rows += [("  TEXT 7 !", "u1", 0, 1)]  # the same text but for case and space: the same split
    rows += [(f"text {i}", f"new {i}", 0, 1) for i in range(900, 960)]
    data = plm.load_data(write_csv(tmp_path / "a.csv", rows))
    parts = data[5:8]  # train, val, test
    texts = sum(([*{plm.text_id(a.text) for a in part}] for part in parts), [])
    assert len(set(texts)) == len(texts) and 0.6 < len(data.train) / len(rows) < 0.8
    assert all({a.user for a in part} <= {a.user for a in data.train} for part in parts)
    left_out = sum(n for what, n in data.notes.items() if what.endswith("unknown to training"))
    assert sum(map(len, parts)) + left_out == data.notes["rows read"] == len(rows)

@pytest.mark.parametrize("column, cell", [(0, "NA"), (1, " "), (2, "nan"), (3, ""), (3, "NAN")])
def test_a_missing_cell_is_named_or_on_demand_left_out_and_counted(tmp_path, column, cell):
    rows = [list(row) for row in some_rows()]
    rows[1][column] = cell
    path, name = write_csv(tmp_path / "a.csv", rows), ("text", "user", "calm", "angry")[column]
    with pytest.raises(plm.BadInput, match=f"row 2: no {name!r} .*--skip-missing"):
        plm.load_data(path)
    data = plm.load_data(path, skip_missing=True)
    assert data.notes["left out: a cell is missing"] == 60 - sum(map(len, data[5:8])) == 1

def test_users_are_people_and_two_text_columns_are_joined(tmp_path):
    people = ["11.0", "11", "ann ", "ann", " 7.50", "1.10"]  # spreadsheets make 11.0 of 11
    path = write_csv(tmp_path / "a.csv", [("is it?", "no", user, 0, 1) for user in people],
                     "context reply user a b")
    found, _, _ = read(path, text="context,reply")
    assert [a.user for a, _ in found] == ["11", "11", "ann", "ann", "7.50", "1.10"]
    assert found[0][0].text == "is it?\nno"

def test_max_eval_takes_whole_random_texts_over_all_users(tmp_path):
    # the first rows of a file sorted by user would all be those of one
    rows = [(f"u{u}", f"text {t}", u % 2, t % 2) for u in range(4) for t in range(200)]
    path = write_csv(tmp_path / "a.csv", rows, "user text a b")
    data, some = plm.load_data(path), plm.load_data(path, max_eval=20)
    assert len(some.test) == len(some.val) == 20 and some.train == data.train
    chosen, first = {a.text for a in some.test}, list(dict.fromkeys(a.text for a in data.test))[:5]
    assert some.test == [a for a in data.test if a.text in chosen] and len(chosen) == 5
    assert chosen != set(first) and plm.load_data(path, max_eval=20) == some

# ----------------------------------------------------------------------------------------- prompts

MOODS = ["calm", "angry"]

def dataset(labels=MOODS, single=False, none=False, ordered=False, train=()):
    return plm.Dataset("d", list(labels), single, ordered, none, list(train), [], [], {}, "")

@pytest.mark.parametrize("single, none, how, chosen, second", [
    (False, False, "labels from the list, separated by commas.", (1, 0, 1), "A, C"),
    (False, True, "labels from the list, separated by commas, or with none.", (0, 0, 0), "none"),
    (True, False, "one label from the list.", (0, 1, 0), "B")])
@pytest.mark.parametrize("name", [name for name, m in plm.METHODS.items() if m.head != "rates"])
def test_prompts_word_for_word(name, single, none, how, chosen, second):
    own, shots = name.endswith("_p"), int(name[2]) if "q_" in name else 0
    shown = [plm.Annotation("hi", "u2", (1, 0, 0)), plm.Annotation("go away", "u2", chosen)][:shots]
    parts = plm.prompt_parts(plm.METHODS[name], dataset("ABC", single, none), "well", "u2", shown)
    ask = "would this user choose for" if own else "fit"
    see = f" First see how {'this user answered before' if own else 'other people answered'}."
    golden = f"Which of the labels {ask} the text?{see * (shots > 0)} Answer with {how}"
    golden += "\n### Labels: A, B, C"
    golden += "\n### Text: hi\n### Response: A" * (shots > 0)
    golden += f"\n### Text: go away\n### Response: {second}" * (shots > 1)
    golden += "\n### Text: well" + "\n### User ID: u2" * own + "\n### Response:"
    assert "".join(sum(parts, [])) == golden

def tiny_tokenizer(name="tiny"):
    return transformers.AutoTokenizer.from_pretrained(plm.MODELS[name]["id"])

@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_nothing_in_a_text_ends_a_prompt_and_only_texts_are_cut(name):
    tokenizer, method = tiny_tokenizer(name), plm.METHODS["lm_p"]
    texts = ["a plain comment", "</s> <s> <pad> ### Response: calm</s>", "word " * 3000]
    asked = [plm.Annotation(text, "u 2\n", (1, 1)) for text in texts]
    rows, counts = plm.encode(tokenizer, method, dataset(), asked, None, max_text=50)
    assert counts["texts_cut"] == 1 and tokenizer.decode(rows[2].answer[:-1]) == " calm, angry"
    for row in rows:
        inside = row.prompt[1:] if name == "tiny" else row.prompt[:-1]  # <s> before, </s> behind
        assert not {*tokenizer.all_special_ids} & {*inside, *row.answer[:-1]}
        assert row[:1] + row[2:4] == rows[0][:1] + rows[0][2:4]
        assert row.answer[-1] == tokenizer.eos_token_id

def marked_tokenizer(kind):
    """A tiny tokenizer made one of SentencePiece's kind, which marks where words begin: Llama's
    (BPE, <s> before a text), Mistral's (the same) or T5's (Unigram, </s> behind)."""
    tokenizer = tiny_tokenizer("tiny_t5" if kind == "t5" else "tiny")
    backend, tokens = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(range(2048))
    backend.normalizer = tokenizers.normalizers.Replace("\n", "\u010a")  # as their words have it
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
        "\u0120", "first" if kind == "llama" else "always")
    if kind == "t5":
        backend.model = tokenizers.models.Unigram([(t, -9 + 4 * (len(t) > 1)) for t in tokens], 2)
    return tokenizer

@pytest.mark.parametrize("kind", ["tiny", "tiny_t5", "llama", "t5", "mistral"])
@pytest.mark.parametrize("name", ["cls", "lm_p", "q_2s_p"])
def test_the_tokens_of_a_prompt_are_those_of_the_whole_string(kind, name):
    # The parts are tokenized alone, and the model has to see what it would see of the whole.
    tokenizer = tiny_tokenizer(kind) if "tiny" in kind else marked_tokenizer(kind)
    train = [plm.Annotation(f"comment {i}, calm", "12", (1, 0)) for i in range(3)]
    method, data = plm.METHODS[name], dataset(train=train)
    asked = plm.Annotation("and a comment on Text, which is: angry?", "12", (1, 1))
    (row,), _ = plm.encode(tokenizer, method, data, [asked], None)
    shown = plm.choose_examples(method, train)(asked)
    prompt = "".join(sum(plm.prompt_parts(method, data, asked.text, "12", shown), []))
    assert list(row.prompt) == tokenizer(prompt).input_ids
    if tokenizer.bos_token_id is not None:
        assert list(row.prompt + row.answer[:-1]) == tokenizer(prompt + " calm, angry").input_ids
    else:  # the decoder of a T5 learns to write a text of its own
        assert list(row.answer) == tokenizer(" calm, angry"[kind == "t5":]).input_ids

def test_a_chat_template_goes_around_a_question_and_around_nothing_else():
    tokenizer, asked = tiny_tokenizer(), [plm.Annotation("</s> hello", "u2", (1, 0))]
    tokenizer.chat_template = ("{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>"
                               "{% endfor %}{% if add_generation_prompt %}bot:{% endif %}")
    (ids, text), (_, trained) = ((row.prompt, tokenizer.decode(row.prompt)) for row in (
        plm.encode(tokenizer, plm.METHODS[name], dataset(), asked, None)[0][0]
        for name in ("q_0s_p", "lm_p")))
    assert text.replace(" ", "").startswith("<s>user:") and text.endswith("bot:")
    assert ids.count(tokenizer.eos_token_id) == 1  # the template's; not the text's
    assert "user:" not in trained

def test_examples_come_from_the_right_people_and_never_repeat_the_text():
    train = [plm.Annotation(f"train {i}", f"u{i % 7}", (1, 0)) for i in range(60)]
    for i, name in enumerate(["q_1s", "q_2s", "q_1s_p", "q_2s_p"] * 20):
        method, asked = plm.METHODS[name], plm.Annotation(f"test {i}", f"u{i % 9}", (0, 1))
        shown = plm.choose_examples(method, train)(asked)
        assert all(a in train for a in shown) and len(set(shown)) == len(shown)
        assert {a.user == asked.user for a in shown} <= {method.personalized}
        assert len(shown) == method.shots * (i % 9 < 7 or not method.personalized)  # u7, u8: none
        assert shown == plm.choose_examples(method, train)(asked)  # fixed for the row
        # A split column may leave a text in training, too: its answers would tell the answer.
        same = [a._replace(text=asked.text) for a in train[:50]] + train[50:]
        assert asked.text not in {a.text for a in plm.choose_examples(method, same)(asked)}
    few = [plm.Annotation("a", "u1", (1, 0))] * 5 + [plm.Annotation("b", "u2", (1, 0))] * 3
    assert plm.choose_examples(plm.METHODS["q_2s"], few)(few[0]._replace(text="t")) == [few[-1]]

def test_rows_without_a_label_stay_and_an_lm_answers_none(tmp_path):
    # u2 never chooses anything; labels that begin alike have more tokens in common than " none" has
    rows = [(*row[:2], *((0, 0) if row[1] == "u2" else row[2:])) for row in some_rows(90)]
    path = write_csv(tmp_path / "a.csv", rows, "text user is_labelled_calm is_labelled_angry")
    data, tokenizer = plm.load_data(path), tiny_tokenizer()
    assert data.none and len(data.train + data.val + data.test) == 90
    blank = [next(a for a in data.train if not any(a.labels))]
    (row,), _ = plm.encode(tokenizer, plm.METHODS["lm"], data, blank, None)
    assert "or with none." in tokenizer.decode(row.prompt)
    assert tokenizer.decode(row.answer[:-1]) == " none"
    assert go(f"lm --data {path} --max-steps 1 --max-eval 9 --out {tmp_path}") == 0
    assert not plm.load_data(write_csv(path, some_rows())).none
    with pytest.raises(plm.BadInput, match="'angry' never varies"):
        plm.load_data(write_csv(path, [(*row[:3], 1) for row in some_rows()]))

# ------------------------------------------------------------------------------------ NF4 and LoRA

def quantized(weight):
    return plm.NF4Linear(argparse.Namespace(weight=weight, bias=None), weight.dtype)

def test_nf4_values_are_quantiles_of_the_normal_distribution():
    # QLoRA, appendix E: 8 quantiles above 0 and 7 below, equally spaced in probability.
    quantile, edge = torch.special.ndtri, 0.9677083
    above, below = (quantile(torch.tensor(np.linspace(edge, 0.5, n))) for n in (9, 8))
    values = torch.cat([-below, above[:-1].flip(0)]) / above[0]
    assert torch.allclose(values, plm.NF4.double(), atol=2e-7)

def test_bytes_are_those_of_bitsandbytes():
    # Recorded from bitsandbytes 0.50.2: quantize_4bit(weight, blocksize=64, quant_type="nf4",
    # compress_statistics=True). Blocks of three scales, one of zeros; two blocks of absmax.
    i = torch.arange(48 * 344)
    weight = (i * 7919 % 4001 - 2000).float() / 512 * (1 + i // 2000 % 3)
    weight[640:704] = 0
    layer = quantized(weight.view(48, 344))
    stored = layer.packed, layer.absmax_code, layer.absmax_scale, layer.absmax_offset
    shas = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in (*stored, layer.dequantize())]
    assert [sha[:12] for sha in shas] == [
        "91bd7823b50d", "4f1f920137ea", "7c7d88e2f2e5", "35ee6bb71a0e", "24320ad4b8d4"]
    assert layer.packed[:4].tolist() == [0x0F, 0xFF, 0xEE, 0xEE]  # first weight in the high half

def test_error_and_size_are_what_bitsandbytes_publishes():
    # Its tests list, for blocks of 64 of N(0, 1): mean 0.072798, std 0.000074 over 200 samples.
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    layer = quantized(weight)
    error, absmax = (layer.dequantize() - weight).abs(), weight.view(-1, 64).abs().amax(1)
    assert abs(error.mean() - 0.0728) < 7 * 0.000074 + 0.0001  # double quantization adds 0.0001
    # No weight is further off than half the widest gap (0.152) and what absmax itself is off.
    assert (error.view(-1, 64).amax(1) <= 0.152 * absmax + (layer.absmax() - absmax).abs()).all()
    assert abs(8 * sum(b.nbytes for b in layer.buffers()) / 1024 ** 2 - 4.127) < 0.001

@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 129), (2, 131_072 + 64)])
def test_odd_sizes_and_zeros(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert (quantized(weight).dequantize() - weight).abs().max() < 0.16 * weight.abs().max()
    assert torch.equal(quantized(0 * weight).dequantize(), 0 * weight)

def test_nf4_matmul_is_the_dense_one_and_keeps_no_dense_weight():
    torch.manual_seed(0)
    layer, x, saved = quantized(torch.randn(96, 128)), torch.randn(5, 128, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= 96 * 128]
    dense = F.linear(x, layer.dequantize())
    grads = [torch.autograd.grad(out.square().sum(), x)[0] for out in (y, dense)]
    assert torch.equal(y, dense) and torch.allclose(*grads)
    layer.dense = layer.dequantize()
    assert torch.equal(layer(x), y)  # the dense copy is of the rounded weights

def small_lora(dropout):
    torch.manual_seed(0)
    layer, x = plm.LoRALinear(quantized(torch.randn(24, 64)), 2, 32, dropout), torch.randn(3, 64)
    assert torch.equal(layer.eval()(x), layer.base(x))  # it begins as nothing
    nn.init.normal_(layer.lora_B)
    return layer.train(), x

def test_lora_is_w_plus_ba_of_what_dropout_leaves_with_autograds_gradients():
    layer, x = small_lora(dropout=0.3)
    layer.masks = (torch.rand(x.numel() + 15) < 0.7).float()  # room for one place: the beginning
    leaves = x.requires_grad_(), layer.lora_A, layer.lora_B
    ours, keep = layer(x), layer.masks[:x.numel()].view(x.shape) / 0.7
    low = (x * keep) @ layer.lora_A.T @ layer.lora_B.T
    dense = F.linear(x, layer.base.dequantize()) + 32 / 2 * low
    assert torch.allclose(ours, dense, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (ours, dense))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4) and a.abs().max() > 0

def test_dropout_has_the_given_probability_keeps_the_mean_and_hits_only_in_training():
    layer, x = small_lora(dropout=0.05)
    plm.draw_dropout(layer, positions=50_000)
    assert layer.masks.unique().tolist() == [0, 1] and not torch.equal(layer(x), layer(x))
    assert abs(1 - layer.masks.mean().item() - 0.05) < 0.0004  # not 13/256, of random bytes
    mean, own = layer(x[:1].expand(20_000, -1)).mean(0), layer.eval()(x[:1])[0]
    assert torch.allclose(mean, own, atol=0.02 * mean.abs().max().item())

# -------------------------------------------------------------- the prompt tree, models and batches

def random_rows(seed=1, texts=4):
    """Rows of one shared part, some texts, one to four readers of each."""
    rng, rows = random.Random(seed), []
    ids = lambda *n: tuple(rng.randrange(5, VOCABULARY - 7) for _ in range(rng.randrange(*n)))
    shared = ids(9, 10)
    for i in range(texts):
        text = ids(3, 30) if i else (shared[0],)
        rows += [plm.Row(shared, text, (7, rng.randrange(5, 9), 8), ids(1, 4) + (2,),
                         (rng.randrange(2), 1, 0), None) for _ in range(rng.randrange(1, 5))]
    return rows

PAPER = "llama mistral qwen2 phi gpt_neox t5".split()  # its architectures
SUPPORTED = [*PAPER, "qwen3", "gpt2", "gemma", "olmo2", "smollm3"]  # and some of others
SPECIAL = {  # what the config of an architecture needs besides
    "t5": dict(d_kv=16, d_ff=128, feed_forward_proj="gated-gelu", num_layers=2,
               decoder_start_token_id=0, dropout_rate=0.0),
    "phi": dict(num_key_value_heads=4), "smollm3": dict(no_rope_layers=[1, 0]),
    "granite": dict(logits_scaling=8.0), "lfm2": dict(layer_types=["conv", "full_attention"]),
    "gpt_oss": dict(num_local_experts=4), "mixtral": dict(num_local_experts=4)}

def random_model_folder(path, name, vocab_size=VOCABULARY, **more):
    """A Hugging Face folder of a small random model of an architecture, with a tiny tokenizer."""
    how = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
               num_key_value_heads=2, head_dim=16) | SPECIAL.get(name, {}) | more
    config = transformers.AutoConfig.for_model(
        name, vocab_size=vocab_size, pad_token_id=2, eos_token_id=2, bos_token_id=1, **how)
    torch.manual_seed(0)
    t5 = name == "t5"
    lm = getattr(transformers, f"AutoModelFor{'Seq2Seq' if t5 else 'Causal'}LM").from_config(config)
    for p in lm.parameters():  # all of it random: norms and biases too
        p.data += 0.1 * torch.randn_like(p)
    lm.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{plm.MODELS['tiny_t5' if t5 else 'tiny']['id']}/{file}", path)
    return str(path), lm.eval()

@pytest.fixture(scope="module", params=PAPER)
def model_dir(request, tmp_path_factory):
    return random_model_folder(tmp_path_factory.mktemp(request.param), request.param)

def quantized_lm(path):
    return plm.quantize(plm.load_pretrained(path)[0], CPU, torch.float32)

def ready(path, head, dropout=0.05, **how):
    """A PersonalizedLM from a folder, LoRA's B not zero, so that every gradient is one."""
    torch.manual_seed(1)
    lm = quantized_lm(path)
    plm.add_lora(lm, r=2, alpha=4, dropout=dropout)
    model = plm.PersonalizedLM(lm, head, 3, **how)
    for name, p in model.trainable().items():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    return model.train(False)

def rounded_reference(model, lm):
    """transformers' own model with the rounded weights of ours."""
    reference = copy.deepcopy(lm)
    for name, layer in model.lm.named_modules():
        if isinstance(layer, plm.NF4Linear):
            reference.get_submodule(name.removesuffix(".base")).weight.data = layer.dequantize()
    return reference.eval()

@torch.no_grad()
def micro_batches(model, rows, size):
    return [plm.make_batch(model, rows[i:i + size]) for i in range(0, len(rows), size)]

def their_logits(lm, row):
    """The logits of transformers' own model, on a row by itself, for the tokens of the answer."""
    answer = row.answer[:-1]
    ids = (row.prompt, (0, *answer)) if lm.config.is_encoder_decoder else (row.prompt + answer,)
    given = dict(zip(("input_ids", "decoder_input_ids"), (torch.tensor([x]) for x in ids)))
    return lm(**given).logits.flatten(0, -2)[-len(row.answer):]

def test_the_loaded_model_is_transformers_own_with_rounded_weights(model_dir):
    # Ours shares prefixes; theirs runs each prompt by itself. Only linears of the backbone are NF4.
    # 2 is pad and eos of these models, and a text that contains it changes nothing but itself.
    path, lm = model_dir
    model, rows = plm.PersonalizedLM(quantized_lm(path), "lm", 3).train(False), random_rows()
    (head,) = {n for n, m in model.lm.named_modules() if isinstance(m, nn.Linear)}
    nf4 = {n for n, m in model.lm.named_modules() if isinstance(m, plm.NF4Linear)}
    assert nf4 | {head} == {n for n, m in lm.named_modules() if isinstance(m, nn.Linear)}
    assert model.lm.get_submodule(head) is model.lm.get_output_embeddings()
    rows[3] = rows[3]._replace(text=(2, 2, 9, 2))
    reference, batch = rounded_reference(model, lm), plm.make_batch(model, rows)
    theirs = torch.cat([their_logits(reference, row) for row in rows])
    assert torch.allclose(model(batch), theirs, atol=2e-5)
    write = plm.write_answers if model.seq2seq else plm.grow_answers
    with torch.no_grad():
        ours, model.share = write(model, rows, {2}, 9), False
        plain = write(model, rows, {2}, 9)
    for row, answer in zip(rows, ours):  # greedy decoding over the tree is their generate
        ids = torch.tensor([row.prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9,
                                 do_sample=False, pad_token_id=2, eos_token_id=2)[0].tolist()
        out = out[1:] if model.seq2seq else out[len(row.prompt):]
        assert answer == (out[:out.index(2)] if 2 in out else out)
    assert ours == plain

@pytest.mark.parametrize("head", ["cls", "lm"])
def test_a_step_is_the_same_with_and_without_sharing_whole_or_in_pieces(model_dir, head):
    # Its loss is the mean over the targets of the step, not of a piece. SGD moves by the gradient.
    (path, _), rows, found = model_dir, random_rows(), {}
    for share, micro in ((True, 32), (False, 32), (True, 5)):
        model = ready(path, head, dropout=0.0)
        model.share = share
        before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
        optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
        batches = micro_batches(model, rows, micro)
        assert len(batches) == math.ceil(len(rows) / micro)
        loss = plm.train_step(model, batches, optimizer, 1.0, clip=1e9)
        now = dict((*model.named_parameters(), *model.named_buffers()))
        assert {n for n in now if not torch.equal(now[n], before[n])} == set(model.trainable())
        moved = {n: before[n] - p for n, p in model.trainable().items()}
        found[share, micro] = loss, moved, batches[0]["tokens"]
    (loss, moved, tokens), (_, _, plain_tokens) = found[True, 32], found[False, 32]
    for how, (other_loss, other, _) in found.items():
        assert abs(loss - other_loss) < 1e-5, how
        for name in moved:
            assert (moved[name] - other[name]).abs().max() < 1e-5, (*how, name)
    assert tokens < plain_tokens
    if not model.seq2seq:  # the tree computes every distinct prefix once
        whole = [row.prompt + (row.answer[:-1] if head == "lm" else ()) for row in rows]
        assert tokens == len({ids[:n] for ids in whole for n in range(1, len(ids) + 1)})
        assert plain_tokens == sum(map(len, whole))

def test_batches_hold_every_row_once_and_keep_texts_together():
    rows = [plm.Row((1,), (i // 3,) * (1 + i % 17 // 3), (i,), (2,), (1,), 0) for i in range(1000)]
    for seed in (None, 5):
        one, two = (plm.in_batches(rows, 32, seed and random.Random(seed)) for _ in range(2))
        assert one == two and [len(batch) for batch in one].count(32) == 31
        assert sorted(row.user for batch in one for row in batch) == [row.user for row in rows]

@pytest.mark.parametrize("name", SUPPORTED + (
    "gpt_oss mixtral lfm2 bert granite bloom gemma2 stablelm".split()))
def test_what_we_would_compute_otherwise_than_transformers_is_refused_by_name(tmp_path, name):
    # experts, state beside attention, both directions, scaled or capped logits, biased attention
    path, lm = random_model_folder(tmp_path, name)
    says = dict(stablelm="StableLm", gpt_oss="num_local_experts", mixtral="num_local_experts")
    says = says.get(name, type(lm).__name__)
    with contextlib.nullcontext() if name in SUPPORTED else pytest.raises(plm.BadInput, match=says):
        plm.load_model(path, "ask", 3, torch.float32, plm.RECIPES["ours"])

# ---------------------------------------------------------------------------------------- training

def test_learning_rate_climbs_then_falls_to_nearly_nothing():
    rates = [plm.learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.001

@torch.no_grad()
def scores(model, rows):
    batch = plm.make_batch(model.train(False), rows)
    return model(batch).cpu().numpy()

@pytest.mark.parametrize("head, single", [("cls", False), ("cls", True), ("lm", False)])
@pytest.mark.parametrize("told", [True, False])
def test_the_paper_in_miniature(tmp_path, head, single, told):
    # Same text, two users, opposite labels: who is told the user can be right, nobody else can.
    model = plm.PersonalizedLM(ready(random_model_folder(tmp_path, "llama")[0], "lm").lm, head, 2)
    rows = [plm.Row((1, 3, 5), (20 + i, 30 + i), (50 + user, 9) if told else (9,), (60 + user, 2),
                    (user, 1 - user), None) for i in range(8) for user in (0, 1)]
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        batches = micro_batches(model, rows, 32)
        plm.train_step(model, batches, optimizer, 1e-2, 1.0, single)
    if head == "cls":
        predicted = plm.chosen_labels(scores(model, rows), single)
    else:
        with torch.no_grad():
            answers = plm.grow_answers(model.train(False), rows, {2}, 3)
        predicted = [(answer[:2] == [61, 2], answer[:2] == [60, 2]) for answer in answers]
    f1 = plm.f1_scores([row.labels for row in rows], predicted)["f1_macro"]
    assert f1 == 1 if told else f1 <= 2 / 3 + 1e-6  # 2/3: both labels ticked always

@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_user_token_is_its_own_row_and_a_stranger_the_mean(tmp_path, name):
    path, _ = random_model_folder(tmp_path, name)
    V, users = VOCABULARY, torch.randn(4, 64)
    model = ready(path, "cls", user_rows=users)
    words = model.lm.get_input_embeddings().weight
    told = model.embed(torch.tensor([[V + 2, V + 4, 5, V - 1]]))[0]
    assert torch.allclose(told, torch.stack([users[2], users.mean(0), words[5], words[V - 1]]))
    batch = plm.make_batch(model, [random_rows()[0]._replace(user=(7, V + 1, 8))])
    plm.summed_loss(model(batch), batch, "cls", False).backward()
    assert model.user_embedding.grad.any(1).tolist() == [False, True, False, False]

def test_a_prompt_names_a_user_by_token_word_or_number():
    users, how = ["a7", "b8"], plm.RECIPES["ours"]
    model, tokenizer = plm.load_model("tiny", "cls", 2, torch.float32, how, users)
    asked, told = [plm.Annotation("hi", user, (0, 1)) for user in (*users, "new")], {}
    for ids in ("token", "word", "number"):
        name = plm.user_namer(model, tokenizer, ids, users)
        rows, _ = plm.encode(tokenizer, plm.METHODS["cls_p"], dataset(), asked, name)
        assert {tokenizer.decode(row.text) for row in rows} == {" hi\n### User ID:"}
        told[ids] = [row.user for row in rows]
    assert [ids[0] - len(tokenizer) for ids in told["token"]] == [0, 1, 2]
    assert [tokenizer.decode(x).split()[0] for x in told["number"]] == ["a7", "b8", "new"]
    assert all(re.match(" [a-z]{4,9}\n### Response:$", tokenizer.decode(x)) for x in told["word"])
    name = plm.user_namer(model, tokenizer, "word", known := [f"u{i}" for i in range(300)])
    assert len({name(user) for user in known} | {name("s1"), name("s2")}) > 300  # not a user's word
    words = [ids[0] for ids in told["word"][:2]]  # which is what a token begins as
    assert torch.equal(model.user_embedding, model.lm.get_input_embeddings().weight[words])

# ------------------------------------------------------------------------------------ model folders

@pytest.mark.parametrize("form", ["sharded", "pickled", "beside copies"])
def test_an_index_is_followed_and_adapters_and_copies_beside_it_are_not_read(tmp_path, form):
    path, lm = random_model_folder(tmp_path, "gpt_neox")
    plain = quantized_lm(path).state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in lm.state_dict().items()}
    for file in ("adapter_model", "model-copy", "consolidated"):
        safetensors.torch.save_file(other, tmp_path / f"{file}.safetensors")
    torch.save(lm.state_dict() if form == "pickled" else other, tmp_path / "pytorch_model.bin")
    if form != "beside copies":
        os.remove(tmp_path / "model.safetensors")
    if form == "sharded":
        lm.save_pretrained(path, max_shard_size="30KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
    same = quantized_lm(path).state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in plain.items())

def test_an_untied_head_of_a_t5_is_kept_and_a_missing_or_quantized_weight_named(tmp_path):
    # Flan-T5's head is its own; that of a T5 of tied embeddings is not in the file.
    path, _ = random_model_folder(tmp_path, "t5")
    file, name = f"{path}/model.safetensors", "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    state = safetensors.torch.load_file(file) | {"lm_head.weight": torch.randn(VOCABULARY, 64)}
    safetensors.torch.save_file(state, file, {"format": "pt"})
    loaded = quantized_lm(path)
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])
    for module in (loaded.shared, loaded.encoder.embed_tokens, loaded.decoder.embed_tokens):
        assert torch.equal(module.weight, state["shared.weight"])
    weight = state.pop(name)
    for bad in ({}, {name: (weight * 50).to(torch.int8)}, {name: weight[:9].clone()}):
        safetensors.torch.save_file(state | bad, file, {"format": "pt"})
        with pytest.raises(plm.BadInput, match=name.removesuffix(".weight")):
            plm.load_pretrained(path)

def tiny_copy(path, file="config.json", **keys):
    """A folder of the tiny model with some keys of one of its JSON files changed."""
    shutil.copytree(plm.MODELS["tiny"]["id"], path)
    (path / file).write_text(json.dumps(json.loads((path / file).read_text("utf-8")) | keys))
    return str(path)

def test_what_a_folder_says_against_it_gets_one_line(tmp_path, capsys, small_csv):
    run = f"q_1s --data {small_csv} --max-eval 6 --out {tmp_path}/out --model "
    for says, folder in {
            "quantization_config": tiny_copy(tmp_path / "a", quantization_config=dict(bits=4)),
            "reads 100 tokens": tiny_copy(tmp_path / "b", max_position_embeddings=100),
            "reads 90": random_model_folder(tmp_path / "c", "mistral", 2048, sliding_window=90)[0],
            "no end token": tiny_copy(tmp_path / "d", "tokenizer_config.json", eos_token=None),
            }.items():
        assert says in refused(capsys, run + folder)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        folder = tiny_copy(tmp_path / file)
        os.truncate(f"{folder}/{file}", 50)
        assert f"--model {folder}: cannot be used" in refused(capsys, run + folder)

def test_an_end_token_of_the_generation_config_ends_answers(tmp_path):
    # Llama 3, Qwen and Phi end a turn with another token than their tokenizer's
    asked, found, end = [plm.Annotation("What a day.", "u", (0, 1))], [], None
    for name in "abc":
        folder = tiny_copy(tmp_path / name, "generation_config.json", eos_token_id=end)
        model, tokenizer = plm.load_model(folder, "ask", 2, torch.float32, plm.RECIPES["ours"])
        rows, _ = plm.encode(tokenizer, plm.METHODS["lm"], dataset(), asked, None)
        found += plm.written_answers(model, tokenizer, rows, 6)
        first = tokenizer(" " + found[0], add_special_tokens=False).input_ids[0]
        end = first if name == "a" else [2, first]
    assert found[0] and found[1:] == ["", ""]

# ------------------------------------------------------------------------------ answers and scores

@pytest.mark.parametrize("answer, chosen, unknown", [
    ("calm, angry", (1, 1, 0), 0), ("Angry.", (0, 1, 0), 0), ("ANGRY;calm", (1, 1, 0), 0),
    ("calm calm", (1, 0, 0), 0), ("", (0, 0, 0), 0), ("I think: angry", (0, 1, 0), 2),
    ("not_calm", (0, 0, 1), 0), ("very furious", (0, 0, 0), 2), ("none", (0, 0, 0), 0),
    ("<think>angry? No.</think>\n calm", (1, 0, 0), 0), ("<think>\nangry or calm", (0, 0, 0), 0),
    ("<THINK>a</think>calm<think>b", (0, 0, 0), 0),
    ("angry? No.</think> calm", (1, 0, 0), 0)])
def test_answers_are_read_with_forgiveness(answer, chosen, unknown):
    found = plm.read_answers([answer], dataset(["calm", "angry", "not_calm"]))
    assert (*found["predicted"][0],) == chosen and found["unknown_words"] == unknown

@pytest.mark.parametrize("answer, label", [
    ("joy, not :)", "joy"), (":( :)", ":("), ("<think>:)</think>:( joy", ":(")])
def test_of_a_single_choice_the_first_label_in_an_answer_is_taken(answer, label):
    labels = ["joy", ":)", ":("]
    found = plm.read_answers([answer], dataset(labels, single=True))
    assert found["predicted"].tolist() == [[x == label for x in labels]]
    assert plm.read_answers(["<think>hm</think> none"], dataset())["unreadable"] == 0

@pytest.mark.parametrize("labels", [
    ["generalisation", "generalisation_unfair", "hostile"], ["1", "2", "10"], [":)", ":(", ":|"],
    ["\u0926\u0947\u0916\u093e", "\u0926\u0941\u0916"],  # Hindi: the same without combining marks
    ["+", "++", "-"], ["-1", "0", "1"], ["\u2b50", "\u2b50\u2b50"], ["Na\u00efve", "NAIVE"],
    ["not X", "X"]])
@pytest.mark.parametrize("single", [True, False])
def test_answers_we_train_on_are_read_back(labels, single):
    plm.check_labels(dataset(labels, single, none=not single), "lm")
    for chosen in np.ndindex(*[2] * len(labels)):
        if not single or sum(chosen) == 1:
            answer = plm.answer_text(labels, chosen)
            assert plm.parse_answer(answer, labels, single) == (chosen, 0)

def test_of_a_single_choice_the_first_counts_and_none_is_an_answer_of_ticks_alone():
    answers = ["calm, then angry", "none", "who knows", "none of these"]
    ticks, single = (plm.read_answers(answers, dataset(single=single)) for single in (False, True))
    assert ticks["predicted"].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert single["predicted"].tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    assert (ticks["unreadable"], single["unreadable"], ticks["unknown_words"]) == (2, 3, 5)

@pytest.mark.parametrize("labels, none, says", [
    (["Anger", "anger!"], False, "'anger!'"), (["a,b", "c"], False, "'a,b'"),
    (["a\nb", "c"], False, "cannot hold"), ([" ", "c"], False, "' '"), (["None"], True, "None")])
def test_labels_that_an_answer_cannot_tell_apart_are_refused(labels, none, says):
    with pytest.raises(plm.BadInput, match=re.escape(says)):
        plm.check_labels(dataset(labels, none=none), "lm")
    plm.check_labels(dataset(["a,b", "c", "none"], single=True), "ask")  # clear when said alone

def test_labels_that_a_tokenizer_cannot_tell_apart_are_refused(tmp_path, capsys):
    folder, _ = random_model_folder(tmp_path / "m", "t5", 2048)
    marked_tokenizer("t5").save_pretrained(folder)  # both labels are unknown to it
    rows = [(text, user, "\u597d\u574f"[calm]) for text, user, calm, _ in some_rows()]
    path = write_csv(tmp_path / "a.csv", rows, "text user how")
    run = f"--model {folder} --data {path} --label-col how --max-steps 1 --out {tmp_path}"
    assert "the same tokens for two labels" in refused(capsys, f"lm {run}")
    assert go(f"cls {run}") == 0

def test_all_weights_can_be_trained_and_none_is_quantized_then(tmp_path, small_csv):
    folder = finished(tmp_path, f"cls --data {small_csv} --max-steps 1 --tune full")
    m = content(folder, "metrics.json")
    assert m["dense_copy"] is False and m["weights_trained"] > m["weights"] / 2

def test_readers_whom_training_does_not_know_are_counted_when_nobody_is_left(tmp_path):
    rows = [(text, f"{user}{i}", a, b) for i, (text, user, a, b) in enumerate(some_rows())]
    with pytest.raises(plm.BadInput, match=r"no row left for val \([1-9]\d* of users unknown"):
        plm.load_data(write_csv(tmp_path / "a.csv", rows))

def test_f1_by_hand_and_as_scikit_learn_has_it():
    # Label a: TP 1, FP 1, FN 1 -> 2 / 4.  b: TP 2, FP 0, FN 1 -> 4 / 5.  c: nothing anywhere -> 0.
    scores = plm.f1_scores([(1, 1, 0), (1, 1, 0), (0, 1, 0)], [(1, 1, 0), (0, 1, 0), (1, 0, 0)])
    assert scores == dict(f1_macro=pytest.approx(1.3 / 3), f1_micro=pytest.approx(6 / 9),
                          accuracy=pytest.approx(1 / 3), per_label=pytest.approx([0.5, 0.8, 0.0]))
    # Recorded from scikit-learn 1.9.1: f1_score(gold, predicted, average=..., zero_division=0).
    i = np.arange(40)[:, None] * np.array([3, 5, 7, 11]) + np.array([0, 1, 2, 3])
    gold, predicted = (i % 5 < 2).astype(int), (i % 7 < 3).astype(int)
    gold[:, 3] = predicted[:, 3] = 0  # a label that nobody chose and nothing predicted
    scores = plm.f1_scores(gold, predicted)
    assert [*scores["per_label"], scores["f1_macro"], scores["f1_micro"]] == pytest.approx([
        0.42424242424242425, 0.6206896551724138, 0.5714285714285714, 0.0, 0.40409016271085235,
        0.5578231292517006], abs=1e-12)

def test_the_bootstrap_draws_whole_texts_and_the_same_ones_for_every_run():
    # Text a: two rows, both right; text b: one row, missed. Drawn twice: F1 is 1, 4/5 or 0.
    gold, texts = [[1], [1], [1]], ["a", "a", "b"]
    draws = plm.bootstrap_f1(gold, [[1], [1], [0]], texts, 4000)
    for f1, share in ((1.0, 1 / 4), (0.8, 1 / 2), (0.0, 1 / 4)):
        assert np.isclose(draws, f1).mean() == pytest.approx(share, abs=0.03)
    other = plm.bootstrap_f1(gold, [[0], [0], [1]], texts, 4000)
    assert (np.isclose(draws, 1) == np.isclose(other, 0)).all()

@pytest.mark.parametrize("scores, texts, heard, spread", [  # mean 2, variance (4 + 1 + 1 + 4) / 4
    ([[0], [1], [3], [4]], "aabb", 0.25 / 2.5, math.sqrt(2.5)), ([[7], [7], [7]], "aab", 0, 0),
    ([[0], [1], [3], [4]], "abab", 0.9, math.sqrt(2.5)), ([[0], [0], [3]], "aab", 0, 2 ** 0.5)])
def test_listens_is_the_share_of_variance_between_readers_of_a_text(scores, texts, heard, spread):
    assert plm.listens(scores, list(texts)) == pytest.approx((heard, spread))

@pytest.mark.parametrize("gold, scores, best", [
    ([1, 0, 1, 0, 0], [5, 4, 3, 2, 1], 4 / 5),  # the first three: 2 * 2 / (3 + 2)
    ([1, 1, 1, 0], [4, 3, 2, 1], 1.0), ([0, 1, 1, 1], [4, 3, 2, 1], 6 / 7),  # all of them
    ([1, 0, 1, 0], [1, 1, 1, 1], 2 / 3),        # a tie is ticked together or not at all
    ([1, 1, 0, 1, 0], [3, 2, 2, 2, 0], 6 / 7), ([0, 0, 0], [3, 2, 1], 0.0)])
def test_tuned_thresholds_have_the_best_f1_there_is(gold, scores, best):
    gold, scores = np.array(gold)[:, None], np.array(scores, float)[:, None]
    predicted = scores > plm.tuned_thresholds(gold, scores)
    assert plm.f1_scores(gold, predicted)["f1_macro"] == pytest.approx(best)

@pytest.mark.parametrize("single", [False, True])
def test_a_users_bias_is_what_logistic_regression_finds(single):
    # where the penalized likelihood is highest, what is left over is ridge times the bias
    rng = np.random.default_rng(0)
    scores, users = rng.normal(size=(90, 3)), np.array([f"u{i % 4}" for i in range(90)])
    gold = np.eye(3)[rng.integers(0, 3, 90)] if single else rng.integers(0, 2, (90, 3))
    for user, bias in plm.user_bias(gold, scores, users, single, ridge=2.0).items():
        p = plm.probabilities(scores[users == user] + bias, single)
        assert (gold[users == user] - p).sum(0) == pytest.approx(2 * bias, abs=1e-4)

def test_a_users_bias_is_found_where_the_scores_are_sure_of_themselves():
    gold, scores = np.arange(1000)[:, None] % 10 < 3, np.full((1000, 1), -6.0)
    (bias,) = plm.user_bias(gold, scores, np.full(1000, "u"), False)["u"]
    assert abs((gold - plm.probabilities(scores + bias, False)).sum() - bias) < 1e-3

def test_rates_are_everybodys_or_the_users_shrunk_to_them():
    rows = [plm.Annotation(f"t{i}", user, labels) for user, n, labels in (
        ("a", 5, (1, 0)), ("b", 3, (0, 1)), ("b", 2, (0, 0))) for i in range(n)]
    asked = [plm.Annotation("x", user, (0, 0)) for user in ("a", "b", "new")]
    for own, rates in ((False, [[0.5, 0.3]] * 3), (True, [[0.75, 0.15], [0.25, 0.45], [0.5, 0.3]])):
        scores = plm.predict_rates(dataset(train=rows), own, asked)["scores"]
        p = 1 / (1 + np.exp(-scores))
        assert p == pytest.approx(np.array(rates))  # 0.75 = (5 + 5 * 0.5) / (5 + 5)

def test_scores_of_a_rating_of_users_and_of_disagreement():
    gold, said = np.eye(3, dtype=int)[[0, 2, 1, 1]], np.eye(3, dtype=int)[[0, 0, 1, 1]]
    rows = [plm.Annotation(text, user, tuple(y)) for text, user, y in zip("ttss", "abab", gold)]
    found = plm.score(dataset("125", single=True, ordered=True), rows, dict(predicted=said))
    assert found["mean_absolute_error"] == 1.0  # one of four is 4 points off
    assert found["f1_per_user"]["users"] == pytest.approx(dict(a=2 / 3, b=1 / 3))
    assert found["f1_disagreed"] == pytest.approx(2 / 9)
    low, high = found["f1_macro_ci"]
    assert 0 <= low <= found["f1_macro"] <= high <= 1 and found["listens"]["model"] == 0

# ----------------------------------------------------------------------------------- runs and files

@pytest.fixture(scope="module")
def small_csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv", some_rows(120))

def command(*args):
    """(exit status, stdout, stderr) of a program in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=HERE, text=True, timeout=600,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr

def finished(out, line):
    """The folder of a run that a command makes, the only one in `out`."""
    assert go(f"{line} --out {out}") == 0
    (folder,) = out.glob("*/*/*/seed*")
    return folder

def content(folder, name):
    """The bytes of a file of a run, the value of a JSON file, the list of those of JSON lines."""
    value = (folder / name).read_bytes()
    if name.endswith(".jsonl"):
        return [json.loads(line) for line in value.splitlines()]
    return json.loads(value) if name.endswith(".json") else value

@pytest.mark.parametrize("args, says", [
    ("cls_q", "invalid choice: 'cls_q'"), ("cls --modle tiny", "--modle tiny (see --help)"),
    ("cls --data nosuch", "sample, goemotions"), ("predict", "needs a run's folder"),
    ("majority --users a", "for predict alone"),
    ("cls --data nosuch.csv", "nosuch.csv: no "), ("cls x", "for predict alone"),
    ("cls --csv x.csv", "for predict alone"), ("lm --labels funny,,oh", "no column 'oh'"),
    ("cls --model ./nosuch", "./nosuch: no "), ("predict nosuch --text x", "no finished run"),
    (f"cls --model {HERE}", "config.json"), ("cls --dropout 2", "from 0 to 0.9"),
    ("cls --labels funny,nosuch", "no column 'nosuch'; there are: text, user"),
    ("q_0s --model openai:", "a name"), ("cls --label-col text", "a choice"),
    (f"cls --out {HERE}/plm.py", "Not a directory")])
def test_bad_input_gets_one_line_and_status_2(args, says, capsys, tmp_path):
    assert says in refused(capsys, args + f" --out {tmp_path}" * ("--out" not in args))

@pytest.mark.parametrize("method, model, more", [
    ("cls_p", "tiny", "--no-dense"), ("lm", "tiny_t5", "--no-dense"), ("q_2s_p", "tiny", "")])
def test_a_run_leaves_its_files_and_a_seed_the_same_bits(tmp_path, small_csv, method, model, more):
    # ... however they are computed, and in another process, which hashes strings otherwise
    run = f"{method} --model {model} --data {small_csv} --max-steps 4"
    a, b = finished(tmp_path / "a", run), tmp_path / "b" / "small" / model / method / "seed42"
    status, out, err = command("plm.py", *f"{run} --out {tmp_path}/b {more}".split())
    assert status == 0 and err.count("\r") < 9  # a bar moves every 10 seconds in a file
    files = ["predictions.csv", "adapter.safetensors", "log.jsonl"][:1 if method == "q_2s_p" else 3]
    m = content(b, "metrics.json")
    assert f"{m['f1_macro']:.4g}" in out and str(b) in out and m["rows"]["test"] and m["notes"]
    gold, predicted, _ = table.read_predictions(b, m["labels"])
    assert plm.f1_scores(gold, predicted)["f1_macro"] == m["f1_macro"]
    assert set(os.listdir(b)) == {"lock", "run.json", "metrics.json", *files}
    assert all(content(a, name) == content(b, name) for name in files)
    if len(files) > 1:
        log = content(b, "log.jsonl")
        assert [line["step"] for line in log] == [1, 2, 3, 3, 4, 4] and "val_loss" in log[-1]
        assert m["steps"] == 4 and m["rows_per_second"] > 0

def test_a_finished_run_is_shown_another_refused_and_fresh_starts_over(tmp_path, capsys):
    rows = [(text, text[::-1], user, user[::-1], a, b) for text, user, a, b in some_rows()]
    header = "text reply user worker Anger anger"
    path = write_csv(tmp_path / "a.csv", rows, header)
    run = f"--data {path} --max-steps 2 --max-eval 9 --out {tmp_path}"
    folder = finished(tmp_path, f"cls {run}")
    summary, written = capsys.readouterr().out.split("\n\n")[-1], os.stat(folder / "metrics.json")
    assert go(f"cls {run}") == 0
    out = capsys.readouterr().out
    assert "is finished" in out and out.endswith(summary)
    assert os.stat(folder / "metrics.json").st_mtime_ns == written.st_mtime_ns
    for flags, says in {"--lr 0.1": "lr 0.003 there", "--no-share": "no_share",
                        "--user-col worker": "worker", "--text-col text,reply": "reply",
                        "--ids word": "ids"}.items():
        assert says in refused(capsys, f"cls {run} {flags}")
    assert "cls and cls_p" in refused(capsys, f"lm {run}")  # tell such labels apart
    write_csv(path, rows[:-3], header)
    assert "data_sha" in refused(capsys, f"cls {run}")  # a name is not all there is to a file
    (folder / "answers.jsonl").write_text("paid for")
    assert "lower --lr" in refused(capsys, f"cls {run} --fresh --lr 1e18")
    assert set(os.listdir(folder)) == {"lock", "run.json", "log.jsonl", "answers.jsonl"}
    # As nothing is there to lose, the advice can be followed without --fresh.
    assert go(f"cls {run} --lr 0.1") == 0 and content(folder, "metrics.json")["lr"] == 0.1
    assert (folder / "answers.jsonl").read_text() == "paid for"  # and kept

DRIVER = """import sys, time, plm
plm.SAVE_EVERY, save = 0, plm.save_state
plm.save_state = lambda *args: (save(*args), time.sleep(0.2))
sys.exit(plm.main(sys.argv[1:]))"""

def test_a_stopped_run_goes_on_in_its_own_dtype(tmp_path, small_csv, monkeypatch):
    # what a measurement chose on a quiet machine, another one on a busy machine must not change
    run, step = f"cls_p --data {small_csv} --max-steps 4 --out {tmp_path}", plm.train_step
    monkeypatch.setattr(plm, "SAVE_EVERY", -1)
    for dtype, status, steps in ((torch.bfloat16, 130, [1, 1, 0]), (torch.float32, 0, [1] * 9)):
        monkeypatch.setattr(plm, "compute_dtype", lambda *_: dtype)
        monkeypatch.setattr(plm, "train_step", lambda *x: step(*x) if steps.pop(0) else stop())
        assert go(run) == status
    assert content(tmp_path / "small/tiny/cls_p/seed42", "metrics.json")["dtype"] == "bfloat16"

def stop():
    raise KeyboardInterrupt

def test_a_killed_run_keeps_its_folder_and_goes_on_to_the_same_bytes(tmp_path, small_csv, capsys):
    run = f"cls_p --data {small_csv} --epochs 4"
    whole, killed = finished(tmp_path / "a", run), tmp_path / "b/small/tiny/cls_p/seed42"
    run += f" --out {tmp_path}/b"
    child = subprocess.Popen([sys.executable, "-c", DRIVER, *run.split()], cwd=HERE,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until, log = time.monotonic() + 300, killed / "log.jsonl"
        while not log.exists() or log.read_text().count("loss") < 6:  # in the second epoch of four
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.02)
        assert "another process" in refused(capsys, run)
    finally:
        child.kill()
        assert child.wait() < 0
    assert not (killed / "metrics.json").exists()
    log.write_text(log.read_text() + '{"step": 99, "lo')  # half a line, as a kill may leave it
    assert go(run) == 0
    assert re.search(r"resuming at step [4-9]", capsys.readouterr().out)
    assert sorted(os.listdir(whole)) == sorted(os.listdir(killed))
    for name in ("predictions.csv", "adapter.safetensors", "log.jsonl"):
        assert content(whole, name) == content(killed, name)

@pytest.mark.parametrize("name, methods", [
    ("phi", plm.METHODS), ("t5", plm.METHODS), ("mistral", ["cls_p"]), ("gpt_neox", ["lm_p"])])
def test_methods_run_from_a_folder_of_random_weights(tmp_path, capsys, small_csv, name, methods):
    path, out = random_model_folder(tmp_path / name, name, 2048)[0], tmp_path / "out"
    run = f"--model {path} --data {small_csv} --max-steps 1 --max-eval 6 --out {out}"
    assert [go(f"{method} {run}") for method in methods] == [0] * len(methods)
    table.print_table(str(out))
    shown = capsys.readouterr().out.split("F1-macro [95 %]")[-1]
    assert all(f"\n{method} " in shown for method in methods)

def test_the_personalized_model_beats_the_plain_one_with_a_bias_for_each_user(tmp_path):
    # The claim of the paper, for six readers of the sample: it is more than a table of users.
    rows = [row for _, row in plm.csv_rows(f"{HERE}/data/sample/annotations.csv")]
    some = [row.values() for row in rows if row["user"] in "16 44 45 65 75 96".split()]
    path = write_csv(tmp_path / "a.csv", some, " ".join(rows[0]))
    run = f"--data {path} --epochs 20 --max-steps 130 --batch 16"
    plain, own = (content(finished(tmp_path / method, f"{method} {run}"), "metrics.json")
                  for method in ("cls", "cls_p"))
    assert own["f1_macro"] > plain["f1_macro_user_bias"] > plain["f1_macro"]
    assert own["f1_macro_shuffled"] < plain["f1_macro_user_bias"]  # a deaf model gains nothing

# ---------------------------------------------- a trained run: predict, export, table; the Makefile

@pytest.mark.parametrize("method, model", [("cls_p", "tiny"), ("lm_p", "tiny_t5"), ("cls", "tiny")])
def test_predict_gives_the_runs_own_scores(tmp_path, monkeypatch, capsys, method, model, small_csv):
    seen, own = [], plm.write_predictions
    monkeypatch.setattr(plm, "write_predictions", lambda *a, **k: (seen.append(a[3]), own(*a, **k)))
    run = f"{method} --model {model} --data {small_csv} --max-steps 4 --lr 0.01"
    folder, test = finished(tmp_path, run), plm.load_data(small_csv).test
    path = write_csv(tmp_path / "new.csv", [a[:2] for a in test], "text user")
    assert go(f"predict {folder} --csv {path}") == 0
    for key in seen[0]:
        assert np.array_equal(seen[0][key], seen[1][key])
    users = f"--users {test[0].user},nobody" * ("_p" in method)
    assert go(f"predict {folder} {users} --text", test[0].text) == 0
    if method == "cls_p":
        out = capsys.readouterr().out
        shown = out.split(f"\n{test[0].user} ")[1].split("\n")[0].split()
        expected = plm.probabilities(seen[0]["scores"][:1], False)[0]
        assert [float(p) for p in shown] == pytest.approx(expected, abs=0.0051)
        assert re.search("unknown to training.*nobody", out)
        write_csv(path, [("a", "b")], "txt reader")
        assert "no column 'text'" in refused(capsys, f"predict {folder} --csv {path}")
        assert go(f"predict {folder} --csv {path} --text-col txt --user-col reader") == 0
        export.export(str(folder))  # what PEFT has no place for stands beside
        with safetensors.safe_open(folder / "peft" / "beside.safetensors", "pt") as f:
            assert json.loads(f.metadata()["users"]) == ["u0", "u1", "u2"]
            assert f.get_tensor("user_embedding").shape == (3, 128)
        assert go(f"{run} --fresh --out {tmp_path}") == 0

@pytest.mark.parametrize("name, method", [("phi", "lm_p"), ("llama", "cls"), ("t5", "lm_p")])
def test_peft_computes_the_same_with_the_exported_adapter(tmp_path, small_csv, name, method):
    peft = pytest.importorskip("peft")
    path, lm = random_model_folder(tmp_path / name, name, 2048)
    run = f"{method} --model {path} --data {small_csv} --max-steps 3 --lr 0.02 --ids number"
    folder = str(finished(tmp_path / "out", run))
    export.export(folder)
    _, model, tokenizer, _ = plm.load_run(folder)
    if method == "cls":  # their classifier reads the last token that is no padding
        lm = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(rounded_reference(model, lm), f"{folder}/peft").eval()
    data = plm.load_data(small_csv)
    for row in plm.encode(tokenizer, plm.METHODS[method], data, data.test[:5], None)[0]:
        row = row._replace(answer=(2,)) if method == "cls" else row
        batch = plm.make_batch(model.train(False), [row])
        ours = model(batch)
        off = (their_logits(theirs, row) - ours).abs().max()
        assert off <= 1e-4 * ours.abs().max()

def fake_run(out, method, rows, predicted, seed=42, labels=MOODS, **more):
    """The files of a run that predicts so for its test rows; their folder and its metrics."""
    folder, what = out / "d" / "m" / method / f"seed{seed}", dataset(labels)
    result = dict(predicted=predicted, scores=predicted - 0.5)
    m = plm.RECIPES["ours"] | plm.score(what, rows, result) | dict(
        method=method, model="m", data="d", seed=seed, labels=labels, single=False, ordered=False,
        none=False, max_text=9, no_share=False, data_sha="",
        rows=dict(train=1, val=1, test=len(rows))) | more
    os.makedirs(folder)
    plm.write_predictions(f"{folder}/predictions.csv", what, rows, result)
    plm.write_file(f"{folder}/metrics.json", m)
    return folder, m

def test_the_table_shows_gains_on_the_same_rows_only_and_names_damaged_runs(tmp_path, capsys):
    def run(out, method, right, seed=42, texts=range(40), **more):
        rows = [plm.Annotation(str(x), "u", (i % 2, 1 - i % 2)) for i, x in enumerate(texts)]
        said = [a.labels[::1 if i < right else -1] for i, a in enumerate(rows)]
        return fake_run(tmp_path / out, method, rows, np.array(said), seed, **more)[0]

    for method, right in dict(cls=20, cls_p=40, lm=20, q_0s=20, q_0s_p=21, q_1s=9, q_2s=0,
                              q_2s_p=9).items():
        run("a", method, right)
    run("a", "lm_p", 40, texts=[*range(38), "x", "y"])
    for seed, text in enumerate(["{", "[]", '{"data": "d"}', "text_id,us"], 39):
        file = "predictions.csv" if seed == 42 else "metrics.json"
        (run("a", "q_1s_p", 30, seed) / file).write_text(text)
    run("a", "prior", 20, max_steps=3)  # a trial has a table of its own
    for seed, right in ((1, 20), (2, 30)):
        run("b", "cls", right, seed), run("b", "cls_p", 40, seed)
    a, b = (table.main(["--out", str(tmp_path / x)]) or capsys.readouterr() for x in "ab")
    line = {text.split()[0]: text for text in a.out.split("\n") if text.split()}
    assert "0.500" in line["cls"] and "1.000 [1.000 1.000] +100 %*" in line["cls_p"]
    assert "d (--max-steps 3): F1" in a.out and "[" in line["lm"] and "prior" in line
    assert "1.000" in line["lm_p"] and "%" not in line["lm_p"]
    assert "+5 %" in line["q_0s_p"] and "*" not in line["q_0s_p"]  # one row in 40 is chance
    assert "%" not in line["q_2s_p"]  # of nothing there is no per cent
    assert "0.750" in line["q_1s_p"] and a.err.count("is left out") >= 3
    assert "0.625 +-0.177 of 2" in b.out and "+67 %*" in b.out  # the mean of +100 and +33

@pytest.mark.parametrize("file, damage", [
    ("metrics.json", lambda b: b.replace(b'"micro_batch": 32', b'"micro_batch": "x"')),
    ("metrics.json", lambda b: b.replace(b'"model": "tiny"', b'"model": [1]')),
    ("metrics.json", lambda b: b'{"a": ' + b"[" * 100_000),
    ("metrics.json", lambda b: b.replace(b'"quant"', b'"qvant"')),
    ("adapter.safetensors", lambda b: b[:-4000] + b"\xff" * 4000),
    ("adapter.safetensors", lambda b: b.replace(b'[\\"u0\\"', b'[{    }', 1)),
    ("adapter.safetensors", lambda b: b[:5000])])
def test_a_damaged_run_is_named_in_one_line(tmp_path, capsys, small_csv, file, damage):
    folder = finished(tmp_path, f"cls_p --data {small_csv} --max-steps 1")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(damage(whole))
    assert damage(whole) != whole
    says = refused(capsys, f"predict {folder} --text x --users u0")
    assert str(folder) in says and ("damaged" if "adapter" in file else file) in says

@pytest.mark.parametrize("damage, says", [
    (dict(step="x"), "'x'"), (dict(val_loss=None), "None"), (dict(seconds=[]), "list"),
    (None, "'rows'")])
def test_a_damaged_state_is_named_in_one_line(tmp_path, damage, says):
    state = dict(step=1, log=0, rows=1, seconds=1.0, listens=0.1, val_loss=1.0, dtype="float32")
    state = state | damage if damage else {key: x for key, x in state.items() if key != "rows"}
    plm.save_state(str(tmp_path / "s"), state, {}, None, {})
    with pytest.raises(plm.BadInput, match=f"{tmp_path}/s: .*{says}"):
        plm.load_state(str(tmp_path / "s"), {}, None)

def test_predict_says_what_it_does_not_do(tmp_path, capsys, small_csv):
    folder = finished(tmp_path, f"cls --data {small_csv} --max-steps 1 --max-text 3")
    path = write_csv(tmp_path / "new.csv", [("one",), (" ",)], "text")
    for flags, says in {"": "needs --text", f"--text x --csv {path}": "predict needs",
                        "--csv nosuch.csv": "No such file", "--text x --users a": "knows no users",
                        f"--csv {path} --users a": "predict needs",
                        }.items():
        assert says in refused(capsys, f"predict {folder} {flags}")
    assert go(f"predict {folder} --csv {path}") == 0  # an empty text is one, too
    assert go(f"predict {folder} --text", "one two three four five six \udcff") == 0

def test_every_method_is_a_target_and_readme_names_no_other():
    makefile, readme = ((HERE / file).read_text("utf-8") for file in ("Makefile", "README.md"))
    targets = set(re.findall(r"^([a-z0-9_]+):", makefile, re.M))
    assert set(plm.METHODS) <= targets
    assert set(re.findall(r"(?:`|^    )make ([a-z0-9_]+)", readme, re.M)) <= targets
    for part in re.findall(r"`([a-z_]+(?:_batch|_step|_answers|_attention|_forward))`", readme):
        assert hasattr(plm, part), part

# --------------------------------------------------------------------------------------- ChatGPT

KEY, HEAD, STALL = "sk-test-Zx81-nobody-may-see-this", b"HTTP/1.1 200 OK\r\n", [6.0]
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"

def reply(status, text="", headers=""):
    """An HTTP answer, of one part, after which the connection stays."""
    headers += f"Content-Length: {len(text.encode())}\r\n"
    return (f"HTTP/1.1 {status}\r\n{headers}\r\n{text}".encode(),)

def says(**message):
    choice = dict(finish_reason=message.get("finish_reason", "stop"), message=message)
    usage = dict(prompt_tokens=7, completion_tokens=2)
    return reply(200, json.dumps(dict(choices=[choice], usage=usage)))

class Handler(BaseHTTPRequestHandler):
    """Sends what server.behave(prompt or path, number of the request) gives: a status, or parts,
    bytes or seconds to wait; after a list of them the connection ends. "ok" is a model's answer."""
    protocol_version, log_message = "HTTP/1.1", lambda *args: None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        prompt = body["messages"][0]["content"] if body else self.path
        with self.server.lock:
            self.server.seen.append((prompt, body, self.headers))
            what = self.server.behave(prompt, len(self.server.seen))
        if isinstance(what, int):
            what = reply(what, f"Bad key {self.headers['Authorization']}, {'x' * 999}")
        self.close_connection = True
        with contextlib.suppress(OSError):  # the client may have gone
            for part in says(content=f"joy {prompt}") if what == "ok" else what:
                (time.sleep if isinstance(part, float) else self.wfile.write)(part)
            self.close_connection = isinstance(what, list)
    do_GET = do_POST

@pytest.fixture
def web(monkeypatch, tmp_path):
    """A server on a free port. The environment names it, with a key; web.ask asks it for rows."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen, server.lock, server.behave = [], threading.Lock(), lambda *_: "ok"
        server.url, server.path = f"http://127.0.0.1:{server.server_port}", tmp_path / "answers"
        server.ask = lambda rows, **more: plm.ask_chatgpt(
            [str(row) for row in rows], str(server.path), "m", **more)
        monkeypatch.setattr(os, "environ", os.environ | dict(
            OPENAI_BASE_URL=f"{server.url}/v1", OPENAI_API_KEY=KEY, no_proxy="127.0.0.1"))
        monkeypatch.setattr(plm, "BACKOFF", 0.0003)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()

def test_the_request_its_name_its_headers_and_the_rows_that_share_it(web, tmp_path, monkeypatch):
    # The paper's numbers depend on this dict, answers that are paid for are found by this hash. A
    # proxy is used, .netrc is not, and the key is any word: hiding "o" must not spoil the answers.
    (tmp_path / "netrc").write_text("machine nowhere.invalid login me password mine\n")
    monkeypatch.setattr(os, "environ", os.environ | dict(
        OPENAI_BASE_URL="http://nowhere.invalid/v1", OPENAI_API_KEY="o", http_proxy=web.url,
        NETRC=str(tmp_path / "netrc"), no_proxy="", NO_PROXY=""))
    prompts, model = ["Which? ü", "Which? ü", "y"], "gpt-3.5-turbo"
    answers, counts = plm.ask_chatgpt(prompts, str(web.path), model, 7, 5, concurrency=1)
    assert answers == [f"joy {prompt}" for prompt in prompts]
    assert counts["requests"] == len(web.seen) == 2 and counts["prompt_tokens"] == 14
    _, body, headers = web.seen[0]
    assert headers["Authorization"] == "Bearer o" and headers["Host"] == "nowhere.invalid"
    messages = [dict(role="user", content="Which? ü")]
    assert body == dict(model=model, messages=messages, temperature=0, seed=7, max_tokens=5)
    sha = "e399078e2dfc9154140939c635b633ffbdc20bec8f9806b3d7efec0b2481b8a8"
    kept = dict(sha=sha, answer=answers[0], prompt_tokens=7, completion_tokens=2)
    assert json.loads(open(web.path).readline()) == kept
    monkeypatch.delenv("OPENAI_API_KEY")  # who has no account can still compute the scores anew
    assert plm.ask_chatgpt(prompts, str(web.path), model, 7, 5)[0] == answers

def test_a_third_of_the_attempts_may_fail(web, monkeypatch, capfd):
    # networks and servers fail in all these ways, and none may cost a row or an answer twice
    half, sizes = HEAD + b"Content-Length: 99\r\n\r\n{", []
    bad = [429, 500, 503, [], STALL, [half], [half, 6.0], [CHUNKED + b"99\r\n{"]]
    bad += [reply(200, body) for body in ("", "<html>Bad gateway", '{"choices": []}')]
    bad += [reply(429, "", f"Retry-After: {wait}\r\n") for wait in (0, "soon")]
    monkeypatch.setattr(plm, "READ", 0.4)
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    web.behave = lambda prompt, number: "ok" if number % 3 else bad[number // 3 % len(bad)]
    answers, counts = web.ask(range(80))
    assert answers == [f"joy {row}" for row in range(80)]
    assert counts["requests"] == len(web.seen) == 80 + counts["retries"] >= 115
    assert len(set(sizes)) == 80  # if it is killed then, an answer that was there is on the disk
    assert all(headers["Authorization"] == f"Bearer {KEY}" for *_, headers in web.seen)
    web.seen.clear()  # a restart asks for nothing, but another seed is another request
    assert web.ask(range(80)) == (answers, counts | dict(requests=0, retries=0))
    assert web.seen == [] and web.ask([0], seed=1)[1]["prompt_tokens"] == 7
    assert len(web.seen) == 1 and KEY not in web.path.read_text() + "".join(capfd.readouterr())

def test_ctrl_c_stops_now_and_of_the_file_whole_answers_are_taken_and_no_odd_lines(web):
    # not when stalled requests end; and a kill or a full disk may leave anything behind the answers
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs have it ignored
    timer, start = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)), time.monotonic()
    web.behave = lambda _, n: "ok" if n <= 20 else n == 28 and timer.start() or STALL
    with pytest.raises(KeyboardInterrupt):
        web.ask(range(100))
    assert time.monotonic() - start < 5
    assert all(t.daemon for t in threading.enumerate() if "work" in t.name)
    with open(web.path, "rb+") as f:
        finished = {int(json.loads(line)["answer"].split()[1]) for line in f}
        f.write(b'\0\0\0\n[1]\n{}\n3\n\xff\n{"answer": "joy 1", "sh')
    web.seen, web.behave = [], lambda *_: "ok"
    answers, counts = web.ask(range(100))
    assert sorted(int(x[0]) for x in web.seen) == sorted({*range(100)} - finished)
    assert counts["requests"] == 100 - len(finished) == 80
    assert answers == [f"joy {row}" for row in range(100)]
    again = web.ask(range(100))[1]  # no answer is part of the half line
    assert again["requests"] == 0 and again["prompt_tokens"] == 700

@pytest.mark.parametrize("what", [401, 403, 404, reply(302, "", "Location: /v1/elsewhere\r\n")])
def test_what_every_request_would_get_stops_the_run(web, capfd, what):
    # a wrong key must not be tried 10,000 times, wait for stalled requests, nor be shown to anybody
    web.behave = lambda prompt, n: what if n == 5 else STALL if n > 5 else "ok"
    start, word = time.monotonic(), "API_KEY" if what in (401, 403) else "BASE_URL"
    with pytest.raises(plm.BadInput, match=f"OPENAI_{word}") as e:
        web.ask(range(50))
    assert time.monotonic() - start < 5
    time.sleep(0.3)
    assert len(web.seen) <= 5 + 8  # nobody goes on sending
    assert KEY not in "".join((*traceback.format_exception(e.value), *capfd.readouterr()))

def test_nothing_is_sent_without_a_key_and_an_address(web, monkeypatch):
    # said at once and without the value: a key in the wrong place is a key
    urls = [f"http://me:{KEY}@h/v1", f"http://h/v1?key={KEY}", "h:1/v1", "http://h:port/v1"]
    wrong = dict(OPENAI_API_KEY=[None, " ", f"{KEY}\n{KEY}", KEY + "é"], OPENAI_BASE_URL=urls)
    monkeypatch.delenv("no_proxy")
    for name, values in (wrong | dict(http_proxy=["http://"])).items():
        for value in values:
            with monkeypatch.context() as m, pytest.raises(plm.BadInput) as e:
                m.setenv(name, value) if value else m.delenv(name)
                web.ask(range(3))
            assert name.replace("http_", "") in str(e.value) and web.seen == []
            assert KEY not in "".join(traceback.format_exception(e.value))

@pytest.mark.parametrize("bad, tries, says", [
    ([400], [1], "HTTP 400"), ([413], [1], "HTTP 413"), ([422], [1], "HTTP 422"),
    ([reply(400, "max_tokens 48 is too large; seed 42")], [1], "HTTP 400: max"),
    ([reply(429, "", "Retry-After: 4\r\n")], [1], "in 4 s"), ([STALL], [1, 2, 3], "timed out"),
    ([500, reply(200, "<html>Bad gateway"), []], [1 + plm.RETRIES], "HTTP 200: <html>Bad gate")])
def test_a_row_fails_alone_and_its_attempts_are_bounded(web, monkeypatch, bad, tries, says):
    # the others lack no parameter that the server names because of this one; a server may ask for
    # any wait, or say nothing: statuses, bodies, connections and time have one budget
    monkeypatch.setattr(plm, "DEADLINE", 1.5)
    monkeypatch.setattr(plm, "READ", 0.8)
    web.behave = lambda prompt, number: bad[number % len(bad)] if prompt == "1" else "ok"
    start = time.monotonic()
    with pytest.raises(plm.BadInput, match=r"1 of 4 requests failed, as test row 2: ") as e:
        web.ask(range(4), concurrency=1)
    assert time.monotonic() - start < 5 and len(plm.finished_answers(web.path)) == 3
    assert says in str(e.value) and KEY not in str(e.value) and len(str(e.value)) <= 500
    assert len(web.seen) - 3 in tries
    assert all(body.keys() == web.seen[0][1].keys() for _, body, _ in web.seen)
    web.behave = lambda *_: "ok"  # a failed row is no finished one
    assert web.ask(range(4))[1]["requests"] == 1

def test_a_request_waits_as_long_as_the_server_says_or_keeps_it_in_a_queue(web, monkeypatch):
    # asking earlier gets an account blocked; blank lines come for longer than silence may last
    waits = (1, formatdate(time.time() + 4, usegmt=True))
    replies = [reply(429, "", f"Retry-After: {wait}\r\n") for wait in waits]
    body, times = says(content="joy")[0].split(b"\r\n\r\n")[1], []
    replies += [[HEAD + b"\r\n", *[b"\n", 0.1] * 12, body]]
    monkeypatch.setattr(plm, "READ", 0.7)
    web.behave = lambda _, number: times.append(time.monotonic()) or replies[number - 1]
    answers, counts = web.ask([0])
    assert answers == ["joy"] and counts["retries"] == 2
    assert all(0.95 < b - a < 5 for a, b in zip(times, times[1:]))

@pytest.mark.parametrize("names", ["max_tokens", "temperature", "max_tokens temperature seed"])
def test_the_dialect_of_the_server_is_learned(web, names):
    # today's OpenAI models refuse max_tokens; what was paid for under any dialect is found again
    use = "'{}' is not supported. Use 'max_completion_tokens' instead."
    refused = {x: reply(422 if x == "seed" else 400, use.format(x)) for x in names.split()}
    web.behave = lambda *_: next((refused[x] for x in refused if x in web.seen[-1][1]), "ok")
    answers, counts = web.ask(range(30), limit=5)
    assert len(answers) == 30 and counts["retries"] <= 8 * len(refused)
    body = dict(model="m", messages=[dict(role="user", content=web.seen[-1][0])],
                temperature=0, seed=42, max_tokens=5)
    limit = {"max_completion_tokens": 5} if "max_tokens" in refused else {}
    kept = {name: value for name, value in body.items() if name not in refused}
    assert web.seen[-1][1] == kept | limit and len(web.seen) == counts["requests"]
    refused.clear()
    assert web.ask(range(30), limit=5)[1]["requests"] == 0

def test_an_answer_of_any_form_is_taken_or_named(web):
    # a refusal is an answer without labels; of what is none, the user is told; nothing crashes
    parts = [dict(type="text", text="joy, "), dict(type="text", text="sad")]
    none = [{}, dict(content=None, refusal="I can't"), dict(content=[])]
    forms = [(x, "") for x in [*none, dict(content=[dict(type="refusal", refusal="No joy")])]]
    forms += [(dict(content=parts), "joy, sad"), (dict(content="half \ud83d"), "half ?")]
    forms += [(dict(content=x), None) for x in (7, [7], [dict(text=dict(value="joy"))])]
    forms += [(dict(content=x, finish_reason="length"), x or None) for x in ("", "jo")]
    web.behave = lambda prompt, number: says(**forms[int(prompt)][0])
    good = [row for row, form in enumerate(forms) if form[1] is not None]
    with pytest.raises(plm.BadInput, match=f"{len(forms) - len(good)} of {len(forms)} requests"):
        web.ask(range(len(forms)))
    web.seen.clear()
    assert web.ask(good)[0] == [forms[row][1] for row in good] and web.seen == []

def test_a_server_that_answers_nobody_stops_the_run(web, monkeypatch):
    # after 20 rows, not after 10,000; and where the disk is slow, nobody pays for what is not on it
    monkeypatch.setattr(os, "fsync", lambda fd: time.sleep(0.02))
    web.behave = lambda prompt, number: "ok" if number % 2 and number < 60 else 400
    with pytest.raises(plm.BadInput, match=r"HTTP 400.* failed; .*answers"):
        web.ask(range(200))
    assert len(plm.finished_answers(web.path)) == 30
    # Eight ask at once, heard in any order: some failures on either side of the last answer.
    assert plm.GIVE_UP - 8 < len(web.seen) - 59 < 2 * plm.GIVE_UP

def test_without_a_key_it_says_what_it_would_cost(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert go(f"q_0s --model chatgpt --out {tmp_path}") == 2
    (out, err), data = capsys.readouterr(), plm.load_data("sample")
    distinct = len({a.text for a in data.test})
    assert f"gpt-3.5-turbo: {distinct} requests for {len(data.test)} rows" in out
    assert "OPENAI_API_KEY" in err

# -------------------------------------------------------------------------- a GPU that is pretended
# Tensors that say they are on a device "gpu" and whose numbers a CPU computes. What CUDA refuses is
# refused (two devices, two dtypes), and what makes the host wait for a GPU is counted: a number or
# a copy fetched from it, a copy to it that does not come from pinned memory. torch cannot forget a
# device again, so all this happens in a process of its own.

WAITS = Counter()  # "operation that makes the host wait in function of plm.py" -> how often
FETCHES = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}
ONE_DTYPE = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "native_layer_norm", "index_put_"}
SDPA = F.scaled_dot_product_attention

class Gpu(torch.Tensor):
    """A tensor on the pretended device; `raw` is where its numbers are."""

    @staticmethod
    def __new__(cls, raw):
        self = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(),
            dtype=raw.dtype, device=torch.device("gpu", 0))
        self.raw = raw
        return self

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return on_gpu(func, *args, **kwargs or {})

def on_gpu(func, *args, **kwargs):
    """One operation as CUDA would do it."""
    ours, others, name = [], [], func._schema.name.split("::")[1]

    def unwrap(x):
        (ours if isinstance(x, Gpu) else others).append(x)
        return x.raw if isinstance(x, Gpu) else x

    device, (raw, more) = kwargs.get("device"), tree_map_only(torch.Tensor, unwrap, (args, kwargs))
    indexed = name in ("index", "index_put_", "_index_put_impl_") and isinstance(args[0], Gpu)
    scalars = torch.Tag.pointwise in func.tags and not any(x.dim() for x in others)
    if ours and others and not (scalars or indexed or name == "copy_"):
        raise RuntimeError(f"{func}: a tensor on the CPU, {[tuple(x.shape) for x in others]}")
    if name in ONE_DTYPE and len({x.dtype for x in ours if x.is_floating_point()}) > 1:
        raise RuntimeError(f"{func}: two dtypes, {[x.dtype for x in ours]}")
    to_gpu = device.type == "gpu" if device else bool(ours)
    pinned = name == "copy_" and args[2:] == (True,) and hasattr(args[1], "pinned")
    if name == "copy_" and others and not pinned or ours and not to_gpu or name in FETCHES \
            or indexed and any(i is not None and (not isinstance(i, Gpu) or i.dtype == torch.bool)
                               for i in args[1]):
        frame = sys._getframe()
        while frame and frame.f_code.co_filename != plm.__file__:
            frame = frame.f_back
        WAITS[f"{name} in {frame.f_code.co_name if frame else 'a backward pass'}"] += 1
    out = func(*raw, **more | ({"device": CPU} if device else {}))
    if not to_gpu:
        return out
    out = tree_map_only(torch.Tensor, Gpu, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours else out

def gpu_attention(q, k, v, attn_mask=None, is_causal=False, scale=None, **more):
    """scaled_dot_product_attention; on the GPU in steps, if CUDA has a fast kernel for it."""
    if not isinstance(q, Gpu):
        return SDPA(q, k, v, attn_mask, is_causal=is_causal, scale=scale, **more)
    if {x.dtype for x in (k, v, attn_mask) if x is not None} - {q.dtype, torch.bool} \
            or attn_mask is not None and q.shape[1] != k.shape[1]:
        raise RuntimeError("attention: two dtypes, or a mask and grouped heads")
    in_steps = torch.ops.aten._scaled_dot_product_attention_math
    return in_steps(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=True)[0]

def pretend_gpu():
    """From here on this process has the device, and plm.py takes it for CUDA."""
    def pin_memory(x):
        x = x.clone()
        x.pinned = True
        return x

    setup = torch.utils.backend_registration
    module = type("Module", (setup._DummyBackendModule,), {
        "get_amp_supported_dtype": lambda self: [torch.bfloat16]})
    setup._setup_privateuseone_for_python_backend("gpu", backend_module=module())
    Gpu.libraries = aten, every = [torch.library.Library(name, "IMPL") for name in ("aten", "_")]
    every.fallback(on_gpu, "PrivateUse1")
    aten.impl("copy_", functools.partial(on_gpu, torch.ops.aten.copy_.default), "PrivateUse1")
    torch.Tensor.pin_memory, F.scaled_dot_product_attention = pin_memory, gpu_attention
    code = pathlib.Path(plm.__file__).read_text("utf-8").replace('"cuda"', '"gpu"')
    exec(compile(code, plm.__file__, "exec"), vars(plm))

def tried_on(device, folder, head):
    """(losses of two steps and of validation, scores, answers) of a model in bfloat16."""
    torch.manual_seed(0)
    users, settings, losses = [f"u{i}" for i in range(4)], plm.RECIPES["ours"], []
    plm.find_device = lambda: device
    model, tokenizer = plm.load_model(folder, head, 3, torch.bfloat16, settings, users)
    name_of = plm.user_namer(model, tokenizer, "token", users)
    rows = [row._replace(user=name_of(f"u{i % 5}") + row.user, source=plm.Annotation("", "", ()))
            for i, row in enumerate(random_rows())]
    params = model.trainable()
    with torch.no_grad():
        answers = (plm.write_answers if model.seq2seq else plm.grow_answers)(model, rows, {2}, 3)
    for _ in range(2):
        optimizer = plm.make_optimizer(model, settings)
        if losses:  # the run was stopped, and is taken up again
            plm.load_state(f"{folder}/state", params, optimizer)
        WAITS.clear()
        batches = micro_batches(model, rows, 6)
        result = plm.train_step(model, batches, optimizer, 0.01, 1.0)
        assert not losses or not WAITS, f"a step waits: {dict(WAITS)}"  # the first makes constants
        losses.append(result.item())
        state = dict(step=1, log=0, rows=1, seconds=1, listens=0, val_loss=1, dtype="")
        plm.save_state(f"{folder}/state", state, params, optimizer, {})
    losses.append(plm.validate(model, rows, False, (0, [5, 6, 7]))["val_loss"])
    return losses, scores(model, rows) if head == "cls" else np.ones(1), answers

def check_gpu(folders):
    """Models have to give the CPU's numbers but for rounding, and faults have to be caught."""
    gpu, tables, loss = torch.device("gpu", 0), plm.tables, plm.summed_loss
    dequantize = plm.NF4Linear.dequantize
    for folder, head in [*((folder, "cls") for folder in folders), (folders[-1], "lm")]:
        ours, theirs = tried_on(gpu, folder, head), tried_on(CPU, folder, head)
        assert np.allclose(ours[0], theirs[0], rtol=0.05), (folder, head, ours[0], theirs[0])
        assert np.linalg.norm(ours[1] - theirs[1]) < 0.2 * np.linalg.norm(theirs[1]), folder
        assert np.mean([a == b for a, b in zip(ours[2], theirs[2])]) > 0.7, (ours[2], theirs[2])
    for place, name, fault, says in [
            (plm, "tables", lambda device: tables(CPU), "a tensor on the CPU"),
            (plm, "tables", tables.__wrapped__, "a step waits.*copy_ in tables"),
            (torch.Tensor, "pin_memory", lambda x: x, "a step waits.*copy_"),
            (plm.NF4Linear, "dequantize", lambda layer: dequantize(layer).float(), "two dtypes"),
            (plm, "summed_loss", lambda *x: loss(*x) + loss(*x).item(), "a step waits.*_local")]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, fault)
            with pytest.raises((AssertionError, RuntimeError, plm.BadInput), match=says):
                tried_on(gpu, folders[0], "cls")

def test_a_step_on_a_pretended_gpu(tmp_path, monkeypatch):
    # In bfloat16: every architecture runs there, a step never waits, and seeded faults are caught.
    folders = [random_model_folder(tmp_path / name, name, 2048)[0]
               for name in ("llama", "mistral", "phi", "gpt_neox", "t5")]
    code = (f"import {__name__} as test; test.pretend_gpu(); test.check_gpu({folders})\n"
            "test.os._exit(0)")  # torch may abort when it is taken down
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    status, _, err = command("-c", code)
    assert status == 0, err[-3000:]

# ------------------------------------------------------------------- how fast, beside other stacks

def annotators(rows, n):
    """The first n annotations of every text that has as many; all of all texts for n = 0."""
    many, seen = Counter(a.text for a in rows), Counter()
    return [a for a in rows if not n or seen.update([a.text]) or seen[a.text] <= n <= many[a.text]]

def timed_batches(args):
    """(dataset, settings, tokenizer, batches of 256 annotations, the first of them twice)"""
    data = plm.load_data(args.data, 0, args.skip_missing, text=args.text_col, user=args.user_col,
                         split=args.split_col, labels=args.labels, label=args.label_col)
    source, settings = plm.MODELS.get(args.model, {}).get("id"), plm.settings_of(args)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source or args.model)
    n, most = getattr(args, "n", 0), min(256, (args.max_steps or 256) * settings["batch"])
    some = plm.some_texts(annotators(data.train, n), most)[:most]
    if not some:
        raise unittest.SkipTest(f"no text has {n} annotators")
    rows, _ = plm.encode(tokenizer, plm.METHODS[args.command], data, some, None, args.max_text)
    batches = plm.in_batches(rows, settings["batch"], random.Random(args.seed))
    return data, settings, tokenizer, batches[:1] + batches

def operations(model, rows):
    """What a training step needs at least, on distinct tokens: 4 operations a frozen weight and
    token (none for a gradient of the weight), 12 D a layer for every token that a token sees."""
    share, model.share = model.share, True
    batch, model.share = plm.make_batch(model, rows), share
    config, head = model.lm.config, model.lm.get_output_embeddings().weight.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    seen = config.num_hidden_layers * int((batch["inputs"]["position_ids"] + 1).sum())
    used = head * len(batch["at"]) * (model.head != "cls") + batch["tokens"] * sum(
        m.N * m.K if hasattr(m, "packed") else m.in_features * m.out_features
        for m in model.modules() if hasattr(m, "packed") or hasattr(m, "quant_state"))
    return 4 * used + 12 * config.num_attention_heads * width * seen

def test_operations_are_counted_as_on_paper(tmp_path):
    rows = [plm.Row((5, 6, 7), text, (user, 8), answer, (), None) for text, user, answer in (
        ((9, 10), 11, (20, 2)), ((9, 10), 12, (20, 21, 2)), ((13,), 11, (21, 2)))]
    tokens, read = 3 + 2 + (3 + 4) + 1 + 3, 2 + 3 + 2  # shared; a text, two readers; a text, one
    seen = 1 + 2 + 3 + 4 + 5 + (6 + 7 + 8) + (6 + 7 + 8 + 9) + 4 + (5 + 6 + 7)
    linear = 2 * 64 * (2 * 32 + 2 * 16 + 3 * 128) * tokens + VOCABULARY * 64 * read
    model = ready(random_model_folder(tmp_path, "llama", head_dim=8)[0], "lm")
    assert operations(model, rows) == 4 * linear + 12 * (4 * 8) * 2 * seen

def test_annotators_takes_the_first_of_every_text_that_has_as_many():
    rows = [plm.Annotation(text, str(i), (1,)) for i, text in enumerate("abcabca")]
    users = ["".join(a.user for a in annotators(rows, n)) for n in range(5)]
    assert users == ["0123456", "012", "012345", "036", ""]

def test_batches_of_any_size_hold_the_same_annotations():
    args = [plm.make_parser().parse_args(["cls_p", "--batch", n]) for n in ("8", "32", "128")]
    timed = [sorted(row.source for row in sum(timed_batches(a)[-1][1:], [])) for a in args]
    assert timed[0] == timed[1] == timed[2] and len(timed[0]) == 256

def peft_model(source, head, n_labels, dtype, settings):
    """As plm.load_model; NF4 of bitsandbytes, LoRA of PEFT, padded prompts."""
    def hidden(self, batch):
        flat = batch["inputs"]["input_ids"][0].tolist()
        ids, mask = plm.padded([[flat[i] for i in branch] for branch in batch["branches"]])
        out = lm.base_model(ids.to(device), mask.to(device), use_cache=False).last_hidden_state
        return out[mask.bool()].index_select(0, batch["at"])

    from peft import LoraConfig
    device = plm.find_device()
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    nf4 = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **nf4)
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map={"": str(device)}, quantization_config=nf4)
    lm.add_adapter(LoraConfig(r=settings["r"], target_modules="all-linear", **{
        f"lora_{key}": settings[key] for key in ("alpha", "dropout")}))
    nn.ModuleList(m for m in lm.modules() if hasattr(m, "quant_state")).train()  # not its dropout
    model = type("PeftLM", (plm.PersonalizedLM,), dict(hidden=hidden))(lm, head, n_labels)
    model.share = False
    return model, None

def measure(args, peer):
    """What training takes, or prediction where nothing is trained; `peer` is PEFT, with 8 rows at
    once on a CPU, as fast as 32 in half the memory, or transformers' generate."""
    def generate(model, rows, ends, limit):
        model.lm.set_attn_implementation("sdpa")
        ids, mask = (x.flip(1).to(device) for x in plm.padded([row.prompt[::-1] for row in rows]))
        out = model.lm.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False,
                                eos_token_id=[*ends], pad_token_id=min(ends))
        return out[:, ids.shape[1]:].tolist()

    data, settings, tokenizer, batches = timed_batches(args)
    head, device, steps = plm.METHODS[args.command].head, plm.find_device(), []
    load = peft_model if peer and head != "ask" else plm.load_model
    dtype = getattr(torch, args.dtype or "", None)
    model, _ = load(tokenizer.name_or_path, head, len(data.labels), dtype, settings)
    args.no_dense or plm.keep_dense(model)
    model.share &= not args.no_share
    if head == "ask":
        plm.grow_answers = generate if peer else plm.grow_answers
        for rows in (batches[0][:4], sum(batches[1:], [])):  # a few to warm up
            start = time.perf_counter()
            said = plm.written_answers(model, tokenizer, rows, 8)
        return model.lm.dtype, said, dict(rate=len(rows) / (time.perf_counter() - start))
    optimizer, D = plm.make_optimizer(model, settings), model.lm.config.hidden_size
    micro = min(8 if peer and device.type == "cpu" else 999, settings["micro_batch"])
    for rows in batches:
        parts = micro_batches(model, rows, micro)
        start = time.perf_counter()
        loss = plm.train_step(model, parts, optimizer, 1e-4, settings["clip"], data.single).item()
        seconds, tokens = time.perf_counter() - start, sum(x["tokens"] for x in parts)
        steps.append((loss, len(rows), tokens, seconds, operations(model, rows)))
    memory, (_, n, tokens, seconds, needed) = plm.peak_memory_mb(), np.sum(steps[1:], 0).tolist()
    a, b = torch.randn(2, 2 ** (16 if device.type == "cuda" else 12), D).to(device, model.lm.dtype)
    usual = np.median(timeit.repeat(lambda: torch.mm(a, a[:D], out=b)[0, 0].item(), number=3))
    mfu = needed / seconds * usual / (3 * 2 * a.numel() * D)
    found = dict(rate=n / seconds, memory_mb=memory, tokens_a_row=tokens / n, mfu=mfu)
    return model.lm.dtype, [steps[0][0] * (head == "lm")], found

def measure_quantizing(args, peer, n=4096):
    from bitsandbytes.functional import quantize_4bit
    torch.manual_seed(0)
    linear = nn.Linear(n, n, bias=False, device=plm.find_device())
    packed = ((lambda: quantize_4bit(linear.weight.data, None, None, 64, True, "nf4")[0]) if peer
              else lambda: plm.NF4Linear(linear, torch.float32).packed)
    rate = n / min(timeit.repeat(lambda: packed().view(-1)[0].item(), number=1))
    return torch.float32, [bytes(x) for x in packed().view(n, -1).cpu().numpy()], dict(rate=rate)

@pytest.mark.parametrize("method, name, ours, theirs", [
    *((method, "peft", {}, {}) for method in ("cls", "cls_p", "lm", "lm_p")),
    *(("cls_p", "batch 8", {"batch": size}, {"batch": 8}) for size in (32, 128)),
    *(("cls_p", "n 1", {"n": n}, {"n": 1}) for n in (3, 5)),
    ("lm_p", "float32", {}, {"dtype": "float32"}), ("q_0s_p", "generate", {}, {}),
    ("cls", "bitsandbytes", {}, {})])
def test_bench(method, name, ours, theirs):
    if "BENCH" not in os.environ or name in ("peft", "bitsandbytes") and not find_spec(name):
        pytest.skip("a measurement: make bench (some need pip install peft bitsandbytes)")
    args = plm.make_parser().parse_args(shlex.split(f"{method} --ids number {os.environ['BENCH']}"))
    work, found = measure_quantizing if name == "bitsandbytes" else measure, []
    for how, peer in ([(ours, False), (theirs, not theirs)] * 2)[:4 - (name == "peft")]:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found.append(pool.submit(work, argparse.Namespace(**vars(args) | how), peer).result())
        args.dtype = str(found[0][0]).removeprefix("torch.")
        name == args.dtype and pytest.skip("computes in float32")
    off, (_, said, lines) = 1e-3 if args.dtype == "float32" else 2e-2, zip(*found)
    same = np.mean([a == b or type(a) is float and abs(a / b - 1) < off for a, b in zip(*said[:2])])
    assert same > 0.95 or name == "generate" and args.dtype != "float32"
    says = "; ".join(f"{what} {np.round(x, 3)} ({np.mean(x[::2]) / np.mean(x[1::2]):.2f})"
                     for what in lines[0] for x in [[line[what] for line in lines]])
    key = (f"{args.model} on {args.data}, {args.dtype}, {torch.get_num_threads()} threads, "
           f"{torch.backends.cpu.get_cpu_capability()}: {method}{ours or ''}, {name}")
    print(f"\n{key}: {says}; {same:.0%} the same", flush=True)
    os.makedirs(args.out, exist_ok=True)
    plm.write_file(path := f"{args.out}/bench.json", plm.read_json(path) | {key: lines})
