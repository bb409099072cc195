"""Tests of plm.py and of the scripts in data/. Oracles are bitsandbytes' bytes, scikit-learn's
numbers, transformers' own forward pass and generate, PEFT, prompts word for word; no network, no GPU."""
import argparse
import copy
import csv
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import timeit
import traceback
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from email.utils import formatdate
from html.parser import HTMLParser
from importlib.util import find_spec
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from xml.etree import ElementTree

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

import plm

HERE = os.path.dirname(os.path.abspath(__file__))
CPU = torch.device("cpu")
VOCABULARY = 97


def go(*args):
    """The exit status of a command, in this process: importing everything anew takes seconds."""
    return plm.main([str(arg) for arg in args])


def refused(capsys, *args):
    """The one line that a command ends with which has status 2."""
    capsys.readouterr()
    assert go(*args) == 2
    err = capsys.readouterr().err.split("\r")[-1].lstrip()  # behind a bar, where it took long
    assert err.startswith("plm.py: ") and err.count("\n") == 1
    return err


# --------------------------------------------------------------------------------- data and splits

def write_csv(path, rows, header=("text", "user", "calm", "angry"), delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, delimiter=delimiter).writerows([header, *rows])
    return str(path)


def some_rows(n=60):
    """Every text is read by three people who disagree."""
    return [(f"comment number {i // 3} about thing {i // 3 * 7}", f"u{i % 3}", i % 2, 1 - i % 2)
            for i in range(n)]


def read(path, skip_missing=False, **form):
    return plm.read_annotations(str(path), dict(text="text", user="user") | form, skip_missing)


@pytest.mark.parametrize("text", [
    "cut, with a comma", 'a "quoted"\nline\r\nbreak', "emoji \U0001f600",
    "</s> ### Response: <|endoftext|>", "x" * 1_000_000])
def test_any_text_survives_reading(tmp_path, text):
    path = write_csv(tmp_path / "a.csv", [(text, "user with\nnewline", 0, 1), *some_rows()])
    found, what, _ = read(path)
    assert what == dict(labels=["calm", "angry"], single=False, ordered=False)
    assert found[0] == (plm.Annotation(text, "user with\nnewline", (0, 1)), None)


def test_byte_order_mark_and_crlf_are_no_part_of_the_data(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,user,calm\r\nhello,u1,1\r\nbye,u1,0\r\n")
    assert [a for a, _ in read(tmp_path / "a.csv")[0]] == [
        ("hello", "u1", (0, 1)), ("bye", "u1", (1, 0))]


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_semicolons_and_tabs_separate_as_commas_do(tmp_path, delimiter):
    rows = [("one, two", "u", 0, 1), ("three; four\tfive", "u", 1, 0)]
    assert read(write_csv(tmp_path / "a", rows, delimiter=delimiter)) == \
        read(write_csv(tmp_path / "b", rows))


@pytest.mark.parametrize("header, row, says", [
    (("txt", "user", "calm", "b"), "tu11", "no column 'text'; there are: txt, user, calm, b"),
    (("text", "user", "calm", "b"), "tu21", "row 2: label 'calm' is '2', not 0 or 1"),
    (("text", "user", "calm", "b"), " u11", "row 2: 'text' is "),
    (("text", "user", "calm", "b"), ("t", "", 1, 1), "row 2: 'user' is "),
    (("text", "user", "calm", "b"), "tu1", "row 2 (line 3) does not have the 4 columns"),
    (("text", "user", "user", "b"), "tu11", "2 columns are called 'user'"),
    (("text", "user", "b", "split"), "tu1x", "row 2: 'split' is 'x', not train, val or test"),
    (("text", "user", "c", "d"), ("t", "u", "x", "y"), "no column of 0 and 1")])
def test_bad_rows_are_named(tmp_path, header, row, says):
    fine = ("fine", "u", "joy", "x") if "c" in header else ("fine", "u", 1, "" if "split" in header
                                                            else 1)
    path = write_csv(tmp_path / "a.csv", [fine, row, fine], header)
    with pytest.raises(plm.BadInput, match=re.escape(says)):
        read(path)


def test_files_that_are_no_csv(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,user,a\ncaf\xe9,u,1\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("text,user,a\n")
    for name, says in (("latin.csv", "not UTF-8"), ("empty.csv", "no annotations"), (
            "header.csv", "no annotations"), ("none.csv", "no such file"), (".", "is a directory")):
        with pytest.raises(plm.BadInput, match=says):
            read(tmp_path / name)


@pytest.mark.parametrize("cells, labels, ordered, chosen", [
    ("0 1 1", "not X,X", False, "011"), ("1.0 0.0 1", "not X,X", False, "101"),
    ("yes No YES", "not X,X", False, "101"), ("True false true", "not X,X", False, "101"),
    ("3 1 10", "1,3,10", True, "102"), ("2 2.0 1.5", "1.5,2", True, "110"),
    ("1 -1 0", "-1,0,1", True, "201"), ("joy fear joy", "fear,joy", False, "101"),
    ("1000001 1000002 1000001", "1000001,1000002", True, "010")])
def test_one_column_names_the_single_choice(tmp_path, cells, labels, ordered, chosen):
    rows = [(f"t{i}", "u", 0, cell) for i, cell in enumerate(cells.split())]
    found, what, _ = read(write_csv(tmp_path / "a.csv", rows, ("text", "user", "Z", "X")), label="X")
    assert what == dict(labels=labels.split(","), single=True, ordered=ordered)
    assert [a.labels.index(1) for a, _ in found] == [int(c) for c in chosen]
    assert {sum(a.labels) for a, _ in found} == {1}


def test_a_lone_column_of_0_and_1_is_a_single_choice_and_several_are_ticks(tmp_path):
    rows = [("t", "u", "TRUE", "false"), ("s", "u", "false", "false")]
    found, what, notes = read(write_csv(tmp_path / "b.csv", rows))
    assert not what["single"] and [a.labels for a, _ in found] == [(1, 0), (0, 0)]
    assert notes["columns taken as labels"] == "calm, angry"
    rows = [("t", "u", 1, "m"), ("s", "u", 0, "f")]
    _, what, notes = read(write_csv(tmp_path / "a.csv", rows, ("text", "user", "calm", "sex")))
    assert what == dict(labels=["not calm", "calm"], single=True, ordered=False)
    assert notes["two-valued columns not taken"] == "sex"  # said, since it may have been meant


def test_label_columns_in_two_spellings_are_doubtful_until_the_user_says(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("t", "u", 0, 1, "True"), ("s", "u", 1, 1, "False")],
                     ("text", "user", "calm", "angry", "unclear"))
    with pytest.raises(plm.BadInput, match=r"calm, angry \(0/1\); unclear \(true/false\).*--labels"):
        read(path)
    assert read(path, labels=["calm", "unclear"])[0][0][0].labels == (0, 1)


def test_a_split_column_is_followed_to_the_letter(tmp_path):
    parts = ["train", "Training", "val", "dev", "valid", "validation", "test", "TEST", "", "train"]
    rows = [(f"t{i}", f"u{i}", i % 2, i % 3 % 2, part) for i, part in enumerate(parts)]
    for column, said in (("split", None), ("draw", "draw")):
        path = write_csv(tmp_path / f"{column}.csv", rows, ("text", "user", "a", "b", column))
        data = plm.load_data(path, split=said)
        assert [[a.text for a in x] for x in (data.train, data.val, data.test)] == [
            ["t0", "t1", "t9"], ["t2", "t3", "t4", "t5"], ["t6", "t7"]]
        assert data.notes["left out: in no split"] == 1
        assert data.notes["kept, as the split says: test, user unknown to training"] == 2


def test_splits_share_no_text_and_know_every_user(tmp_path):
    rows = [(f"text {i} {'!' * (i % 3)}", f"u{i % 40}", i % 2, i % 7 % 2) for i in range(900)]
    rows += [("  TEXT 7 !", "u1", 0, 1)]  # the same text but for case and space: the same split
    rows += [(f"text {i}", f"new {i}", 0, 1) for i in range(900, 960)]
    data = plm.load_data(write_csv(tmp_path / "a.csv", rows))
    parts = data.train, data.val, data.test
    ids = [{plm.text_id(a.text) for a in part} for part in parts]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    assert all({a.user for a in part} <= {a.user for a in data.train} for part in parts)
    assert 0.6 < len(data.train) / len(rows) < 0.8
    left_out = [data.notes[f"left out: {part}, user unknown to training"] for part in ("val", "test")]
    assert sum(map(len, parts)) + sum(left_out) == data.notes["rows read"] == len(rows)


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("cell", ["", "NA", "nan", "null"])
def test_a_missing_cell_is_named_or_on_demand_left_out_and_counted(tmp_path, column, cell):
    rows = some_rows()
    rows[1] = [cell if i == column else x for i, x in enumerate(rows[1])]
    path = write_csv(tmp_path / "a.csv", rows)
    says = f"row 2: {('text', 'user', 'calm', 'angry')[column]!r} is .*--skip-missing"
    with pytest.raises(plm.BadInput, match=says):
        plm.load_data(path)
    data = plm.load_data(path, skip_missing=True)
    assert len(data.train + data.val + data.test) == 59
    assert data.notes["left out: a cell is missing"] == 1


def test_numbers_and_spaces_do_not_make_two_people_of_one(tmp_path):
    rows = [("t", user, 0, 1) for user in ("11.0", "11", "ann ", "ann", " 7.50", "1.10")]
    found, _, _ = read(write_csv(tmp_path / "a.csv", rows))
    assert [a.user for a, _ in found] == ["11", "11", "ann", "ann", "7.50", "1.10"]


def test_two_text_columns_are_joined(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("is it?", "no", "u", 0, 1), ("why", "so", "u", 1, 0)],
                     ("context", "reply", "user", "a", "b"))
    assert [a.text for a, _ in read(path, text="context,reply")[0]] == ["is it?\nno", "why\nso"]
    with pytest.raises(plm.BadInput, match="no column 'answer'"):
        read(path, text="context,answer")


def test_duplicates_and_texts_in_two_splits_are_counted(tmp_path):
    data = plm.load_data(write_csv(tmp_path / "a.csv", some_rows() + some_rows(3)))
    assert data.notes["rows that repeat a (text, user)"] == 3
    rows = [(t, "u", i % 2, 1 - i % 2, s) for i, (t, s) in enumerate(
        [("a", "train"), ("b", "train"), ("c", "val"), ("A ", "test"), ("d", "test")])]
    data = plm.load_data(write_csv(tmp_path / "b.csv", rows, ("text", "user", "a", "b", "split")))
    assert data.notes["texts in two splits"] == 1


def test_a_label_that_never_varies_is_refused(tmp_path):
    rows = [(*row[:3], 1) for row in some_rows()]
    with pytest.raises(plm.BadInput, match="'angry' never varies"):
        plm.load_data(write_csv(tmp_path / "a.csv", rows))


def test_max_eval_takes_whole_random_texts_over_all_users(tmp_path):
    # the first rows of a file sorted by user would all be those of one
    rows = sorted((f"text {t}", f"u{u}", u % 2, t % 2) for t in range(200) for u in range(4))
    path = write_csv(tmp_path / "a.csv", sorted(rows, key=lambda row: row[1]))
    data, some = plm.load_data(path), plm.load_data(path, max_eval=20)
    assert len(some.test) == len(some.val) == 20 and some.train == data.train
    chosen = {a.text for a in some.test}
    assert len(chosen) == 5 and some.test == [a for a in data.test if a.text in chosen]
    assert chosen != set(list(dict.fromkeys(a.text for a in data.test))[:5])
    assert plm.load_data(path, max_eval=20) == some


# ----------------------------------------------------------------------------------------- prompts

LABELS = ["calm", "angry"]


def dataset(labels=LABELS, single=False, none=False, ordered=False, train=(), val=(), test=()):
    return plm.Dataset("d", list(labels), single, ordered, none, list(train), list(val), list(test),
                       {}, "")


PLAIN = "Which of the labels fit the text? "
TOLD = "Which of the labels would this user choose for the text? "
OTHERS, OWN = "First see how other people answered. ", "First see how this user answered before. "
HOW = "HOW\n### Labels: A, B, C"
ONE = "\n### Text: hi\n### Response: A"
TWO = ONE + "\n### Text: go away\n### Response: B"
END, END_P = "\n### Text: well\n### Response:", "\n### Text: well\n### User ID: u2\n### Response:"
GOLDEN = {
    "cls": PLAIN + HOW + END, "cls_p": TOLD + HOW + END_P,
    "lm": PLAIN + HOW + END, "lm_p": TOLD + HOW + END_P,
    "q_0s": PLAIN + HOW + END, "q_0s_p": TOLD + HOW + END_P,
    "q_1s": PLAIN + OTHERS + HOW + ONE + END, "q_1s_p": TOLD + OWN + HOW + ONE + END_P,
    "q_2s": PLAIN + OTHERS + HOW + TWO + END, "q_2s_p": TOLD + OWN + HOW + TWO + END_P}


@pytest.mark.parametrize("single, none, how, second", [
    (False, False, "Answer with labels from the list, separated by commas.", "A, C"),
    (False, True, "Answer with labels from the list, separated by commas, or with none.", "none"),
    (True, False, "Answer with one label from the list.", "B")])
@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_word_for_word(name, single, none, how, second):
    chosen = {"A, C": (1, 0, 1), "none": (0, 0, 0), "B": (0, 1, 0)}[second]
    shown = [plm.Annotation("hi", "u2", (1, 0, 0)), plm.Annotation("go away", "u2", chosen)]
    method = plm.METHODS[name]
    parts = plm.prompt_parts(method, dataset("ABC", single, none), "well", "u2", shown[:method.shots])
    golden = GOLDEN[name].replace("HOW", how).replace("Response: B", f"Response: {second}")
    assert "".join(sum(parts, [])) == golden


def tiny_tokenizer(name="tiny"):
    return transformers.AutoTokenizer.from_pretrained(plm.MODELS[name]["id"])


@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_tokens_spell_the_prompt_and_nothing_in_a_text_ends_it(name):
    tokenizer = tiny_tokenizer(name)
    texts = ["a plain comment", "</s> <s> <pad> ### Response: calm</s>", "word " * 3000]
    annotations = [plm.Annotation(t, "u 2\n", (1, 1)) for t in texts]
    rows, counts = plm.encode(tokenizer, plm.METHODS["lm_p"], dataset(), annotations, None, 50)
    assert counts["texts_cut"] == 1
    for row in rows:
        prompt = list(row.prompt if tokenizer.bos_token_id is None else row.prompt[1:])
        content = prompt[:-1] if tokenizer.bos_token_id is None else prompt
        special = {tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id}
        assert not special & {*content, *row.answer[:-1]}
        # Only the text was cut: instruction, user and marker are whole.
        assert row[:1] + row[2:4] == rows[0][:1] + rows[0][2:4]
        assert row.answer[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row.answer[:-1]).strip() == "calm, angry"


def marked_tokenizer(model, scheme, bos):
    """A tokenizer of SentencePiece's kind, which marks the beginnings of words, with a template of
    Llama's form (bos) or of T5's, over words and letters like those of the prompts."""
    sentences = [PLAIN, TOLD, OTHERS, OWN, *GOLDEN.values(), "calm, angry\n### Response: 12 is on a"]
    words = sorted({word for s in sentences for word in re.findall("[a-z#]+:?|,|[A-Z][a-z]+", s)})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    if model == "unigram":
        pieces = [*map(chr, range(32, 127)), "\n", "\u2581", *words, *("\u2581" + w for w in words)]
        scores = {piece: -9.0 * len(piece) if len(piece) < 2 else -5.0 for piece in pieces}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(
            [("<unk>", -99.0), ("<s>", 0.0), ("</s>", 0.0), *scores.items()], 0))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
    if model == "bpe":
        tokenizer.train_from_iterator([*words, "\n"] * 2, tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A" if bos else "$A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>",
        bos_token="<s>" if bos else None)


@pytest.mark.parametrize("kind", ["tiny", "tiny_t5", "llama", "t5", "mistral"])
@pytest.mark.parametrize("name", ["cls", "lm_p", "q_2s_p"])
def test_the_tokens_of_a_prompt_are_those_of_the_whole_string(kind, name):
    # The parts are tokenized alone, and the model has to see what it would see of the whole.
    tokenizer = tiny_tokenizer(kind) if kind.startswith("tiny") else marked_tokenizer(*{
        "llama": ("bpe", "first", True), "mistral": ("bpe", "always", True),
        "t5": ("unigram", "always", False)}[kind])
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
        assert list(row.answer) == tokenizer("calm, angry" if kind == "t5" else " calm, angry").input_ids


def test_a_chat_template_goes_around_a_question_and_around_nothing_else():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>"
        "{% endfor %}{% if add_generation_prompt %}bot:{% endif %}")
    annotation = plm.Annotation("</s> hello", "u2", (1, 0))
    (row,), _ = plm.encode(tokenizer, plm.METHODS["q_0s_p"], dataset(), [annotation], None)
    (trained,), _ = plm.encode(tokenizer, plm.METHODS["lm_p"], dataset(), [annotation], None)
    text = tokenizer.decode(row.prompt)
    assert text.replace(" ", "").startswith("<s>user:") and text.endswith("bot:")
    assert list(row.prompt).count(tokenizer.eos_token_id) == 1  # the template's; not the text's
    assert "user:" not in tokenizer.decode(trained.prompt)


def test_examples_come_from_the_right_people_and_never_repeat_the_text():
    train = [plm.Annotation(f"train {i}", f"u{i % 7}", (1, 0)) for i in range(60)]
    for seed in range(40):
        asked = plm.Annotation(f"test {seed}", f"u{seed % 9}", (0, 1))  # u7, u8 have no rows
        for name in ("q_1s", "q_2s", "q_1s_p", "q_2s_p"):
            method = plm.METHODS[name]
            shown = plm.choose_examples(method, train)(asked)
            assert all(a in train for a in shown) and len(set(shown)) == len(shown)
            assert {a.user == asked.user for a in shown} <= {method.personalized}
            own = seed % 9 < 7
            assert len(shown) == (method.shots if own or not method.personalized else 0)
            assert shown == plm.choose_examples(method, train)(asked)  # fixed for the row
            # A split column may leave a text in training, too: its answers would tell the answer.
            same = [a._replace(text=asked.text) for a in train[:50]] + train[50:]
            assert asked.text not in {a.text for a in plm.choose_examples(method, same)(asked)}


def test_examples_end_where_there_are_no_more_distinct_ones():
    train = [plm.Annotation("a", "u1", (1, 0))] * 5 + [plm.Annotation("b", "u2", (1, 0))] * 3
    shown = plm.choose_examples(plm.METHODS["q_2s"], train)(plm.Annotation("t", "u1", (1, 0)))
    assert shown == [train[-1]]


def test_rows_without_a_label_stay_and_an_lm_answers_none(tmp_path):
    rows = [(text, user, calm, 0) if calm == 0 else (text, user, 0, 1)
            for text, user, calm, _ in some_rows(90)]
    data = plm.load_data(write_csv(tmp_path / "a.csv", [*rows, *some_rows()]))
    assert data.none and len(data.train + data.val + data.test) == 150
    blank = next(a for a in data.train if not any(a.labels))
    (row,), _ = plm.encode(tiny_tokenizer(), plm.METHODS["lm"], data, [blank], None)
    assert tiny_tokenizer().decode(row.answer[:-1]) == " none"
    assert "or with none." in tiny_tokenizer().decode(row.prompt)
    assert not plm.load_data(write_csv(tmp_path / "b.csv", some_rows())).none


# --------------------------------------------------------------------------------------------- NF4

def quantized(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return plm.NF4Linear.from_linear(linear)


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    # QLoRA, appendix E: 8 quantiles above 0 and 7 below, equally spaced in probability.
    quantile, edge = statistics.NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    values = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
    assert torch.allclose(values, plm.NF4, atol=2e-7)


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_bytes_are_those_of_bitsandbytes():
    # Recorded from bitsandbytes 0.50.2: quantize_4bit(weight, blocksize=64, quant_type="nf4",
    # compress_statistics=True). Blocks of three scales, one of zeros; two blocks of absmax.
    i = torch.arange(48 * 344)
    weight = (i * 7919 % 4001 - 2000).float() / 512 * (1 + i // 2000 % 3)
    weight[640:704] = 0
    layer = quantized(weight.view(48, 344))
    assert digest(layer.packed) == "91bd7823b50daf8d"
    assert digest(layer.absmax_code) == "4f1f920137eacf51"
    assert digest(layer.absmax_scale) == "7c7d88e2f2e5d748"
    assert digest(layer.absmax_offset) == "35ee6bb71a0ee20c"
    assert digest(layer.dequantize()) == "24320ad4b8d4f7a4"
    assert layer.packed[:4].tolist() == [0x0F, 0xFF, 0xEE, 0xEE]  # first weight in the high half


def test_nearest_value_by_two_lookups_is_the_nearest_value():
    x = torch.cat([torch.linspace(-1, 1, 100_001), plm.NF4, plm.midpoints(plm.NF4)])
    cell = (x * 16 + 16).int()
    index = plm.CELL_INDEX[cell] + (x > plm.CELL_BORDER[cell])
    assert torch.equal(index.long(), torch.bucketize(x, plm.midpoints(plm.NF4)))


def test_error_is_what_bitsandbytes_publishes():
    # Its tests list, for blocks of 64 of N(0, 1): mean 0.072798, std 0.000074 over 200 samples.
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    layer = quantized(weight)
    error = (layer.dequantize() - weight).abs()
    assert abs(error.mean() - 0.0728) < 7 * 0.000074 + 0.0001  # double quantization adds 0.0001
    # No weight is further off than half the widest gap (0.152) and what absmax itself is off.
    absmax = weight.view(-1, 64).abs().amax(1)
    assert (error.view(-1, 64).amax(1) <= 0.152 * absmax + (layer.absmax() - absmax).abs()).all()
    assert abs(8 * sum(b.nbytes for b in layer.buffers()) / 1024 ** 2 - 4.127) < 0.001


@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 129), (2, 131_072 + 64)])
def test_odd_sizes_and_zeros(shape):
    weight = torch.zeros(shape)
    assert torch.equal(quantized(weight).dequantize(), weight)
    torch.manual_seed(0)
    weight = torch.randn(shape)
    assert (quantized(weight).dequantize() - weight).abs().max() < 0.16 * weight.abs().max()


def test_nf4_matmul_is_the_dense_one_and_keeps_no_dense_weight():
    torch.manual_seed(0)
    layer, x = quantized(torch.randn(96, 128)), torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= 96 * 128]
    y.square().sum().backward()
    dense = x.detach().clone().requires_grad_()
    F.linear(dense, layer.dequantize()).square().sum().backward()
    assert torch.equal(y, F.linear(x, layer.dequantize())) and torch.allclose(x.grad, dense.grad)
    layer.dense = layer.dequantize()
    assert torch.equal(layer(x), y)  # the dense copy is of the rounded weights


# -------------------------------------------------------------------------------------------- LoRA

def small_lora(dropout=0.0):
    torch.manual_seed(0)
    layer = plm.LoRALinear(quantized(torch.randn(24, 64)), r=2, alpha=32, dropout=dropout)
    return layer, torch.randn(3, 64)


def test_lora_begins_as_nothing_and_is_w_plus_ba():
    layer, x = small_lora()
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.lora_B)
    dense = layer.base.dequantize() + 32 / 2 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer(x), F.linear(x, dense), atol=1e-4)


def test_lora_gradients_are_those_of_the_dense_layer_with_the_same_mask():
    layer, x = small_lora(dropout=0.3)
    nn.init.normal_(layer.lora_B)
    layer.masks = (torch.rand(x.numel() + 15) < 0.7).float()  # room for one place: the beginning
    x.requires_grad_()
    leaves = x, layer.lora_A, layer.lora_B
    ours = layer(x)
    keep = layer.masks[:x.numel()].view(x.shape) / 0.7
    dense = F.linear(x, layer.base.dequantize()) + 16 * (x * keep) @ layer.lora_A.T @ layer.lora_B.T
    assert torch.allclose(ours, dense, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (ours, dense))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4) and a.abs().max() > 0


def test_dropout_has_the_given_probability_and_hits_only_in_training():
    layer, x = small_lora(dropout=0.05)
    nn.init.normal_(layer.lora_B)
    plm.draw_dropout(layer, positions=50_000)
    assert layer.masks.unique().tolist() == [0, 1]
    assert abs(1 - float(layer.masks.mean()) - 0.05) < 0.0004  # not 13/256 of random bytes, which is 0.0508
    kept = [layer(x) for _ in range(2)]  # two places of the draw
    assert not torch.equal(*kept)
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer(x), kept[0])


def test_dropout_keeps_the_expectation():
    layer, x = small_lora(dropout=0.5)
    nn.init.normal_(layer.lora_B)
    plm.draw_dropout(layer, positions=20_000)
    mean = layer(x[:1].expand(20_000, -1)).mean(0)
    assert torch.allclose(mean, layer.eval()(x[:1])[0], atol=0.05 * mean.abs().max().item())


# --------------------------------------------------------------- the prompt tree, models and batches

def random_rows(seed=1, texts=4):
    """Rows of one shared part, some texts, one to four readers of each."""
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(5, VOCABULARY - 7) for _ in range(rng.randrange(low, high)))

    shared, rows = ids(9, 10), []
    for i in range(texts):
        text = ids(3, 30) if i else (shared[0],)
        for _ in range(rng.randrange(1, 5)):
            rows.append(plm.Row(shared, text, (7, rng.randrange(5, 9), 8), ids(1, 4) + (2,),
                                (rng.randrange(2), 1, 0), None))
    return rows


GROUPED = dict(num_key_value_heads=2)
ARCHITECTURES = {  # name -> config and what it needs besides; the first six are those of the paper
    "llama": ("LlamaConfig", GROUPED), "mistral": ("MistralConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED), "phi": ("PhiConfig", {}), "gpt_neox": ("GPTNeoXConfig", {}),
    "t5": ("T5Config", dict(d_kv=16, d_ff=128, feed_forward_proj="gated-gelu", num_layers=2,
                            decoder_start_token_id=0, dropout_rate=0.0)),
    "qwen3": ("Qwen3Config", dict(GROUPED, head_dim=16)), "gpt2": ("GPT2Config", {}),
    "gemma": ("GemmaConfig", dict(GROUPED, head_dim=16)), "olmo2": ("Olmo2Config", GROUPED),
    "smollm3": ("SmolLM3Config", dict(GROUPED, no_rope_layers=[1, 0])),
    "stablelm": ("StableLmConfig", GROUPED), "granite": ("GraniteConfig", dict(logits_scaling=8.0)),
    "lfm2": ("Lfm2Config", dict(GROUPED, layer_types=["conv", "full_attention"])),
    "gpt_oss": ("GptOssConfig", dict(GROUPED, num_local_experts=4, head_dim=16)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4)), "bert": ("BertConfig", {}),
    "gemma2": ("Gemma2Config", dict(GROUPED, head_dim=16)), "bloom": ("BloomConfig", {}),
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=4, num_experts_per_tok=2))}


def random_model_folder(path, name, vocab_size=VOCABULARY, **more):
    """A Hugging Face folder of a small random model of an architecture, with a tiny tokenizer."""
    config, extra = ARCHITECTURES[name]
    config = getattr(transformers, config)(
        vocab_size=vocab_size, pad_token_id=2, eos_token_id=2, bos_token_id=1, hidden_size=64,
        num_hidden_layers=2, num_attention_heads=4, **{"intermediate_size": 128, **extra, **more})
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    lm = kind.from_config(config)
    for p in lm.parameters():  # all of it random: norms and biases too
        p.data += 0.1 * torch.randn_like(p)
    lm.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(plm.MODELS["tiny_t5" if name == "t5" else "tiny"]["id"], file), path)
    return str(path), lm.eval()


@pytest.fixture(scope="module", params=[*ARCHITECTURES][:6])
def model_dir(request, tmp_path_factory):
    path, lm = random_model_folder(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, path, lm


def ready(path, head, lora=True, **how):
    """A PersonalizedLM from a folder, LoRA's B not zero, so that every gradient is one."""
    torch.manual_seed(1)
    lm, _ = plm.load_quantized(path, CPU, torch.float32)
    if lora:
        plm.add_lora(lm, r=2, alpha=4, dropout=0.05)
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


def test_only_the_linears_of_the_backbone_are_quantized(model_dir):
    name, path, _ = model_dir
    model = ready(path, "lm")
    leaves = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, plm.LoRALinear)}
    usual = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    names = dict(phi="q_proj k_proj v_proj dense fc1 fc2", t5="q k v o wi_0 wi_1 wo",
                 gpt_neox="query_key_value dense dense_h_to_4h dense_4h_to_h").get(name, usual)
    assert leaves == set(names.split())
    assert isinstance(model.lm.get_output_embeddings(), nn.Linear)
    assert {n.split(".")[-1] for n in model.trainable()} == {"lora_A", "lora_B"}


def test_the_loaded_model_is_transformers_own_with_rounded_weights(model_dir):
    # Ours shares prefixes; theirs runs each prompt by itself.
    name, path, lm = model_dir
    model, rows = ready(path, "lm", lora=False), random_rows()
    reference, theirs = rounded_reference(model, lm), []
    batch = plm.make_batch(model, rows)
    ours = model(batch)[batch["of"]]
    for row in rows:
        if name == "t5":
            theirs.append(reference(input_ids=torch.tensor([row.prompt]), decoder_input_ids=torch.tensor(
                [(0, *row.answer[:-1])])).logits[0])
        else:
            out = reference(torch.tensor([row.prompt + row.answer[:-1]]))
            theirs.append(out.logits[0, len(row.prompt) - 1:])
    assert torch.allclose(ours, torch.cat(theirs), atol=2e-5)


@pytest.mark.parametrize("head", ["cls", "lm"])
def test_loss_and_every_gradient_are_equal_with_and_without_sharing(model_dir, head):
    _, path, _ = model_dir
    rows, results = random_rows(), []
    for share in (True, False):
        model = ready(path, head)
        batch = plm.make_batch(model, rows, share)
        loss = plm.summed_loss(model(batch), batch, head, False) / plm.n_targets(rows, head)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.trainable().items()}, batch["tokens"]))
    (loss, grads, tokens), (plain_loss, plain_grads, plain_tokens) = results
    alone = sum(plm.make_batch(model, [row])["tokens"] for row in rows)
    assert abs(loss - plain_loss) < 1e-5 and tokens < plain_tokens == alone
    for name in plain_grads:
        assert grads[name].abs().max() > 0, f"{name} gets no gradient"
        assert (grads[name] - plain_grads[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("head", ["cls", "lm"])
def test_the_tree_computes_every_distinct_prefix_once(head):
    rows = random_rows(texts=6)
    whole = [row.prompt + (row.answer[:-1] if head == "lm" else ()) for row in rows]
    prefixes = {ids[:n] for ids in whole for n in range(1, len(ids) + 1)}
    assert plm.tree_batch(rows, head)["tokens"] == len(prefixes)
    assert plm.tree_batch(rows, head, share=False)["tokens"] == sum(map(len, whole))


def test_micro_batches_give_the_whole_gradient(model_dir):
    # 32 rows at once or 5 at a time: the mean is over the targets of the step, not of a piece.
    _, path, _ = model_dir
    rows, found = random_rows(), []
    for micro in (32, 5):
        model = ready(path, "lm")
        for layer in (m for m in model.modules() if isinstance(m, plm.LoRALinear)):
            layer.dropout = 0.0
        before = {n: p.detach().clone() for n, p in model.trainable().items()}
        optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
        batches = plm.micro_batches(model, rows, micro)
        assert len(batches) == math.ceil(len(rows) / micro)
        plm.train_step(model, batches, plm.n_targets(rows, "lm"), optimizer, clip=1e9)
        found.append({n: before[n] - p.detach() for n, p in model.trainable().items()})
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-5) for n in found[0])


def test_greedy_decoding_over_the_tree_is_transformers_generate(model_dir):
    _, path, lm = model_dir
    model, rows = ready(path, "lm", lora=False), random_rows(seed=3)
    reference = rounded_reference(model, lm)
    write = plm.write_answers if model.seq2seq else plm.grow_answers
    with torch.no_grad():
        ours, plain = write(model, rows, {2}, 9), write(model, rows, {2}, 9, share=False)
    for row, answer in zip(rows, ours):
        ids = torch.tensor([row.prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9,
                                 do_sample=False, pad_token_id=2, eos_token_id=2)[0].tolist()
        out = out[1:] if model.seq2seq else out[len(row.prompt):]
        assert answer == (out[:out.index(2)] if 2 in out else out)
    assert ours == plain


def test_frozen_bytes_stay_and_everything_trained_moves(model_dir):
    _, path, _ = model_dir
    model, rows = ready(path, "cls"), random_rows()
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    frozen |= {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.trainable().items()}
    optimizer = plm.make_optimizer(model, dict(head_lr=1, user_lr=1))
    plm.train_step(model, plm.micro_batches(model, rows, 32), 3 * len(rows), optimizer, clip=1.0)
    now = dict(model.named_buffers()) | dict(model.named_parameters())
    assert all(torch.equal(now[n], t) for n, t in frozen.items())
    assert all(not torch.equal(now[n], t) for n, t in trained.items())


def test_masks_go_by_length_when_pad_is_eos_and_stands_inside(model_dir):
    # 2 is pad and eos of these models; texts that contain it must change nothing but themselves.
    _, path, _ = model_dir
    model, rows = ready(path, "cls"), random_rows()
    rows[3] = rows[3]._replace(text=(2, 2, 9, 2))
    batch = plm.make_batch(model, rows)
    for row, scores in zip(rows, model(batch)[batch["of"]]):
        alone = plm.make_batch(model, [row])
        assert torch.allclose(model(alone)[alone["of"]][0], scores, atol=1e-5)


def test_batches_hold_every_row_once_and_keep_texts_together():
    rows = [plm.Row((1,), (i // 3,) * (1 + i % 17 // 3), (i,), (2,), (1,), None) for i in range(1000)]
    for rng in (None, random.Random(0)):
        batches = plm.in_batches(rows, 32, rng)
        assert sorted(row.user for b in batches for row in b) == sorted(row.user for row in rows)
        assert [len(b) for b in batches].count(32) == 31
    assert plm.in_batches(rows, 32, random.Random(0)) == plm.in_batches(rows, 32, random.Random(0))


def test_every_step_has_its_rows_whenever_it_is_taken_up():
    # a run that goes on at step 5 sees what it would have seen
    model = type("", (), dict(head="cls", seq2seq=False, device=CPU, lm=type("", (), dict(
        dtype=torch.float32))))
    rows, how = random_rows(texts=30), dict(batch=8, micro_batch=3)
    whole = list(plm.step_batches(model, rows, how, 30))
    again = list(plm.step_batches(model, rows, how, 30, first=5))
    assert [step[:3] for step in whole[5:]] == [step[:3] for step in again]
    per_epoch = math.ceil(len(rows) / 8)
    assert [step[1] for step in whole].index(True) == per_epoch - 1 and whole[-1][1]
    assert sum((step[2] for step in whole[:per_epoch]), []) != sum(
        (step[2] for step in whole[per_epoch:2 * per_epoch]), [])


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "phi", "gpt_neox", "t5", "qwen3", "gpt2",
                                  "gemma", "olmo2", "smollm3"])
def test_check_forward_passes_what_we_compute_as_transformers_does(tmp_path, name):
    path, _ = random_model_folder(tmp_path, name)
    plm.load_model(path, "ask", 3, CPU, torch.float32, {})


@pytest.mark.parametrize("name, says", [
    ("lfm2", "Lfm2ForCausalLM"), ("gpt_oss", "num_local_experts"), ("mixtral", "num_local_experts"),
    ("bert", "BertLMHeadModel"), ("granite", "GraniteForCausalLM"), ("bloom", "BloomForCausalLM"),
    ("gemma2", "Gemma2ForCausalLM"), ("qwen3_moe", "experts"), ("stablelm", "StableLm")])
def test_check_forward_refuses_by_name_what_we_would_compute_otherwise(tmp_path, name, says):
    # state beside attention, experts, both directions, scaled or capped logits, biased attention
    path, _ = random_model_folder(tmp_path, name)
    with pytest.raises(plm.BadInput, match=says):
        plm.load_model(path, "ask", 3, CPU, torch.float32, {})


# ---------------------------------------------------------------------------------------- training

def test_learning_rate_climbs_then_falls_to_nearly_nothing():
    rates = [plm.learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.001


def miniature(head, personalized, single, path):
    """F1 after training on texts that two users label in opposite ways."""
    path, _ = random_model_folder(path, "llama")
    model, rows = plm.PersonalizedLM(ready(path, "lm").lm, head, 2), []
    for i in range(8):
        for user in (0, 1):
            rows.append(plm.Row((1, 3, 5), (20 + i, 30 + i), (50 + user, 9) if personalized else (9,),
                                (60 + user, 2), (user, 1 - user), None))
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        batches = plm.micro_batches(model, rows, 32)
        plm.train_step(model, batches, plm.n_targets(rows, head), optimizer, 1.0, single)
    if head == "cls":
        predicted = plm.chosen_labels(plm.label_scores(model, rows), single)
    else:
        with torch.no_grad():
            answers = plm.grow_answers(model.train(False), rows, {2}, 3)
        predicted = [(answer == [61], answer == [60]) for answer in answers]
    return plm.f1_scores([row.labels for row in rows], predicted)["f1_macro"]


@pytest.mark.parametrize("head, single", [("cls", False), ("cls", True), ("lm", False)])
def test_the_paper_in_miniature(head, single, tmp_path):
    # Same text, two users, opposite labels: who is told the user can be right, nobody else can.
    # Without the user the best is to tick both labels always: F1 = 2 / 3.
    assert miniature(head, True, single, tmp_path / "p") == 1.0
    assert miniature(head, False, single, tmp_path / "plain") <= 2 / 3 + 1e-6


def test_recompute_keeps_less_and_changes_nothing(tmp_path):
    path, _ = random_model_folder(tmp_path, "llama")
    found = []
    for recompute in (False, True):
        model, saved = ready(path, "cls"), []
        if recompute:
            model.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        torch.manual_seed(5)  # of dropout, which is drawn again in the same way
        batch = plm.make_batch(model.train(True), random_rows())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            loss = plm.summed_loss(model(batch), batch, "cls", False)
        loss.backward()
        found.append((sum(t.nbytes for t in saved), [p.grad for p in model.trainable().values()]))
    assert found[1][0] < found[0][0] / 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1]))


def test_a_user_token_is_its_own_row_and_a_stranger_the_mean(model_dir):
    _, path, _ = model_dir
    torch.manual_seed(0)
    users = torch.randn(4, 64)
    model, V = ready(path, "cls", user_rows=users.clone()), VOCABULARY
    model.lm.get_input_embeddings().weight.data[5] += 1
    words = model.lm.get_input_embeddings().weight
    told = model.embed(torch.tensor([[V + 2, V + 4, 5, V - 1]]))[0]
    assert torch.allclose(told, torch.stack([users[2], users.mean(0), words[5], words[V - 1]]))
    row = random_rows()[0]._replace(user=(7, V + 1, 8))
    batch = plm.make_batch(model, [row])
    plm.summed_loss(model(batch), batch, "cls", False).backward()
    got = model.user_embedding.grad.abs().sum(1)
    assert got[1] > 0 and not got[[0, 2, 3]].any()


def test_a_prompt_names_a_user_by_token_word_or_number(tmp_path):
    model, tokenizer = plm.load_model("tiny", "cls", 2, CPU, torch.float32, dict(
        r=1, alpha=1, dropout=0, ids="token"), users=["a7", "b8"])
    V, asked = len(tokenizer), [plm.Annotation("hi", user, (0, 1)) for user in ("a7", "b8", "new")]
    told = {}
    for ids in ("token", "word", "number"):
        name = plm.user_namer(model, tokenizer, ids, ["a7", "b8"])
        told[ids], _ = plm.encode(tokenizer, plm.METHODS["cls_p"], dataset(), asked, name)
        assert all(tokenizer.decode(row.user).endswith("\n### Response:") for row in told[ids])
        assert all(tokenizer.decode(row.text) == " hi\n### User ID:" for row in told[ids])
    assert [row.user[0] for row in told["token"]] == [V, V + 1, V + 2]
    assert [tokenizer.decode(row.user) for row in told["number"]] == [
        f" {user}\n### Response:" for user in ("a7", "b8", "new")]
    words = [tokenizer.decode(row.user[:1]) for row in told["word"]]
    assert all(re.fullmatch(" [a-z]{4,9}", word) for word in words) and words[0] != words[1]
    first = model.lm.get_input_embeddings().weight[[row.user[0] for row in told["word"][:2]]]
    assert torch.equal(model.user_embedding.data, first)  # a token begins as that word


def test_as_many_users_as_there_are_get_words_soon_enough():
    # 20,000 annotators are not rare; to look each of them up among all others takes minutes
    tokenizer, start = tiny_tokenizer(), time.process_time()
    tokenizer.convert_ids_to_tokens = lambda ids: ["\u0120" + "".join(
        chr(97 + i // 26 ** k % 26) for k in range(4)) for i in range(3000)]
    words = plm.user_words(tokenizer, [str(i) for i in range(3100)])
    assert len(set(words.values())) == 3000 and time.process_time() - start < 0.5


# -------------------------------------------------------------------------------------- checkpoints

def test_an_index_is_followed_and_adapters_and_copies_beside_it_are_not_read(tmp_path):
    path, lm = random_model_folder(tmp_path / "whole", "gpt_neox")
    plain = plm.load_quantized(path, CPU, torch.float32)[0].state_dict()
    other = {name: torch.zeros_like(tensor) for name, tensor in lm.state_dict().items()}
    for form in ("sharded", "pickled", "copies"):
        folder = tmp_path / form
        shutil.copytree(path, folder)
        if form == "sharded":
            (folder / "model.safetensors").unlink()
            lm.save_pretrained(folder, max_shard_size="30KB")
            assert (folder / "model.safetensors.index.json").exists()
        if form == "pickled":
            (folder / "model.safetensors").unlink()
            torch.save(lm.state_dict(), folder / "pytorch_model.bin")
        else:
            torch.save(other, folder / "pytorch_model.bin")
        for file in ("adapter_model", "model-copy", "consolidated"):
            safetensors.torch.save_file(other, folder / f"{file}.safetensors")
        same = plm.load_quantized(str(folder), CPU, torch.float32)[0].state_dict()
        assert all(torch.equal(tensor, same[name]) for name, tensor in plain.items()), form
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(plm.BadInput, match="model.safetensors"):  # an adapter alone is no model
        plm.load_quantized(str(folder), CPU, torch.float32)


def test_an_untied_head_of_a_t5_is_kept(tmp_path):
    # Flan-T5's head is its own; that of a T5 of tied embeddings is not in the file.
    path, _ = random_model_folder(tmp_path, "t5")
    file = os.path.join(path, "model.safetensors")
    state = safetensors.torch.load_file(file)
    state["lm_head.weight"] = torch.randn(VOCABULARY, 64)
    safetensors.torch.save_file(state, file, {"format": "pt"})
    loaded, _ = plm.load_quantized(path, CPU, torch.float32)
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])
    for module in (loaded.shared, loaded.encoder.embed_tokens, loaded.decoder.embed_tokens):
        assert torch.equal(module.weight, state["shared.weight"])


def test_a_missing_or_quantized_weight_is_named(tmp_path):
    path, _ = random_model_folder(tmp_path, "llama")
    name = "model.layers.1.mlp.up_proj.weight"
    file = os.path.join(path, "model.safetensors")
    state = safetensors.torch.load_file(file)
    weight = state.pop(name)
    for tensor in (None, weight.to(torch.int8), weight[:64].clone()):
        safetensors.torch.save_file(state | ({name: tensor} if tensor is not None else {}), file,
                                    {"format": "pt"})
        with pytest.raises(plm.BadInput, match="up_proj|cannot load"):
            plm.load_quantized(path, CPU, torch.float32)


def changed(folder, file, drop=(), **keys):
    """Changes some keys of a JSON file of a model folder."""
    path = os.path.join(folder, file)
    with open(path, encoding="utf-8") as f:
        value = json.load(f)
    with open(path, "w", encoding="utf-8") as f:
        json.dump({k: v for k, v in (value | keys).items() if k not in drop}, f)


def tiny_copy(path):
    shutil.copytree(plm.MODELS["tiny"]["id"], path)
    return str(path)


def test_what_a_folder_says_against_it_gets_one_line(tmp_path, capsys, small_csv):
    run = ["q_1s", "--data", small_csv, "--max-eval", 6, "--out", tmp_path / "out", "--model"]
    folder = tiny_copy(tmp_path / "a")
    changed(folder, "config.json", quantization_config=dict(quant_method="gptq", bits=4))
    assert "quantization_config" in refused(capsys, *run, folder)
    folder = tiny_copy(tmp_path / "b")
    changed(folder, "config.json", max_position_embeddings=100)
    assert "reads 100 tokens" in refused(capsys, *run, folder)
    folder, _ = random_model_folder(tmp_path / "c", "mistral", 2048, sliding_window=90)
    assert "reads 90 tokens" in refused(capsys, *run, folder)
    folder = tiny_copy(tmp_path / "d")
    changed(folder, "tokenizer_config.json", drop=["eos_token"])
    assert "no end token" in refused(capsys, *run, folder)
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        folder = tiny_copy(tmp_path / file)
        with open(os.path.join(folder, file), "r+b") as f:
            f.truncate(50)
        assert f"cannot load {folder}" in refused(capsys, *run, folder)


def test_an_end_token_of_the_generation_config_ends_answers(tmp_path):
    # Llama 3, Qwen and Phi end a turn with another token than their tokenizer's
    def answer(folder):
        model, tokenizer = plm.load_model(folder, "ask", 2, CPU, torch.float32, {})
        asked = [plm.Annotation("What a day.", "u", (0, 1))]
        rows, _ = plm.encode(tokenizer, plm.METHODS["lm"], dataset(), asked, None)
        return plm.written_answers(model, tokenizer, rows, 6), tokenizer
    folder = tiny_copy(tmp_path / "a")
    (before,), tokenizer = answer(folder)
    first = tokenizer(" " + before, add_special_tokens=False).input_ids[0]
    for end in (first, [2, first]):
        changed(folder, "generation_config.json", eos_token_id=end)
        assert before and answer(folder)[0] == [""]


# ------------------------------------------------------------------------------ answers and scores

@pytest.mark.parametrize("answer, chosen, unknown", [
    ("calm, angry", (1, 1, 0), 0), ("Angry.", (0, 1, 0), 0), ("ANGRY;calm", (1, 1, 0), 0),
    ("calm calm", (1, 0, 0), 0), ("", (0, 0, 0), 0), ("I think: angry", (0, 1, 0), 2),
    ("not_calm", (0, 0, 1), 0), ("very furious", (0, 0, 0), 2), ("none", (0, 0, 0), 0),
    ("<think>angry? No.</think>\n calm", (1, 0, 0), 0), ("<think>\nangry or calm", (0, 0, 0), 0),
    ("<THINK>a</think>calm<think>b", (0, 0, 0), 0)])
def test_answers_are_read_with_forgiveness(answer, chosen, unknown):
    assert plm.parse_answer(answer, ["calm", "angry", "not_calm"]) == (chosen, unknown)


@pytest.mark.parametrize("labels", [
    ["generalisation", "generalisation_unfair", "hostile"], ["1", "2", "10"], [":)", ":(", ":|"],
    ["\u0926\u0947\u0916\u093e", "\u0926\u0941\u0916"],  # Hindi: the same without combining marks
    ["+", "++", "-"], ["\u2b50", "\u2b50\u2b50"], ["Na\u00efve", "NAIVE"], ["not X", "X"]])
@pytest.mark.parametrize("single", [True, False])
def test_answers_we_train_on_are_read_back(labels, single):
    data = dataset(labels, single, none=not single)
    plm.check_labels(data)
    for chosen in np.ndindex(*[2] * len(labels)):
        if not single or sum(chosen) == 1:
            read_back = plm.parse_answer(plm.answer_text(labels, chosen), labels, single)
            assert read_back == (chosen, 0)


def test_of_a_single_choice_the_first_counts_and_none_is_an_answer_of_ticks_alone():
    answers = ["calm, then angry", "none", "who knows", "none of these"]
    ticks, single = (plm.read_answers(answers, dataset(single=single)) for single in (False, True))
    assert ticks["predicted"].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert single["predicted"].tolist() == [[1, 0], [0, 0], [0, 0], [0, 0]]
    assert (ticks["unreadable"], single["unreadable"]) == (2, 3)
    assert ticks["unknown_words"] == 1 + 2 + 2


@pytest.mark.parametrize("labels, single, none, says", [
    (["Anger", "anger!"], False, False, "'Anger' and 'anger!'"), (["a,b", "c"], False, False, "'a,b'"),
    (["a\nb", "c"], True, False, "cannot hold"), ([" ", "c"], False, False, "' '"),
    (["none", "c"], False, True, "'none'")])
def test_labels_that_an_answer_cannot_tell_apart_are_refused(labels, single, none, says):
    with pytest.raises(plm.BadInput, match=re.escape(says)):
        plm.check_labels(dataset(labels, single, none))
    plm.check_labels(dataset(["a,b", "c", "none"], single=True))  # said alone, these are clear


def test_only_methods_that_read_answers_care_for_such_labels(tmp_path, capsys):
    path = write_csv(tmp_path / "a.csv", some_rows(), ("text", "user", "Anger", "anger"))
    run = ["--data", path, "--max-steps", 1, "--max-eval", 6, "--out", tmp_path / "out"]
    assert go("cls", *run) == 0
    assert "cls and cls_p can" in refused(capsys, "lm", *run)


def test_f1_by_hand():
    # Label a: TP 1, FP 1, FN 1 -> 2 / 4.  b: TP 2, FP 0, FN 1 -> 4 / 5.  c: nothing anywhere -> 0.
    scores = plm.f1_scores([(1, 1, 0), (1, 1, 0), (0, 1, 0)], [(1, 1, 0), (0, 1, 0), (1, 0, 0)])
    assert scores["per_label"] == pytest.approx([0.5, 0.8, 0.0])
    assert scores["f1_macro"] == pytest.approx(1.3 / 3)
    assert scores["f1_micro"] == pytest.approx(6 / 9) and scores["accuracy"] == pytest.approx(1 / 3)


def test_f1_is_scikit_learns():
    # Recorded from scikit-learn 1.9.1: f1_score(gold, predicted, average=..., zero_division=0).
    i = np.arange(40)[:, None] * np.array([3, 5, 7, 11]) + np.array([0, 1, 2, 3])
    gold, predicted = (i % 5 < 2).astype(int), (i % 7 < 3).astype(int)
    gold[:, 3] = predicted[:, 3] = 0  # a label that nobody chose and nothing predicted
    scores = plm.f1_scores(gold, predicted)
    assert scores["f1_macro"] == pytest.approx(0.40409016271085235, abs=1e-12)
    assert scores["f1_micro"] == pytest.approx(0.5578231292517006, abs=1e-12)
    assert scores["per_label"] == pytest.approx(
        [0.42424242424242425, 0.6206896551724138, 0.5714285714285714, 0.0], abs=1e-12)


def test_the_bootstrap_draws_whole_texts_and_the_same_ones_for_every_run():
    # Text a: two rows, both right; text b: one row, missed. Drawn twice: F1 is 1, 4/5 or 0.
    gold, predicted, texts = [[1], [1], [1]], [[1], [1], [0]], ["a", "a", "b"]
    draws = plm.bootstrap_f1(gold, predicted, texts, 4000)
    for f1, share in ((1.0, 1 / 4), (0.8, 1 / 2), (0.0, 1 / 4)):
        assert np.isclose(draws, f1).mean() == pytest.approx(share, abs=0.03)
    other = plm.bootstrap_f1(gold, [[0], [0], [1]], texts, 4000)
    assert (np.isclose(draws, 1) == np.isclose(other, 0)).all()
    assert plm.interval(np.arange(1001)) == pytest.approx([25, 975])


def test_listens_is_the_share_of_variance_between_readers_of_a_text():
    # Around the mean 2 the variance is (4 + 1 + 1 + 4) / 4 = 2.5, within texts it is 1/4.
    assert plm.listens([[0], [1], [3], [4]], list("aabb")) == pytest.approx((0.1, math.sqrt(2.5)))
    assert plm.listens([[0], [1], [3], [4]], list("abab")) == pytest.approx((0.9, math.sqrt(2.5)))
    assert plm.listens([[2, 0], [2, 0], [5, 1], [5, 1]], list("aabb"))[0] == 0
    assert plm.listens([[7], [7], [7]], list("aab")) == (0, 0)


@pytest.mark.parametrize("gold, scores, best", [
    ([1, 0, 1, 0, 0], [5, 4, 3, 2, 1], 4 / 5),  # the first three: 2 * 2 / (3 + 2)
    ([1, 1, 1, 0], [4, 3, 2, 1], 1.0), ([0, 1, 1, 1], [4, 3, 2, 1], 6 / 7),  # all of them
    ([1, 0, 1, 0], [1, 1, 1, 1], 2 / 3),                  # a tie is ticked together or not at all
    ([1, 1, 0, 1, 0], [3, 2, 2, 2, 0], 6 / 7), ([0, 0, 0], [3, 2, 1], 0.0)])
def test_tuned_thresholds_have_the_best_f1_there_is(gold, scores, best):
    gold, scores = np.array(gold)[:, None], np.array(scores, float)[:, None]
    threshold = plm.tuned_thresholds(gold, scores)
    assert plm.f1_scores(gold, scores > threshold)["f1_macro"] == pytest.approx(best)


@pytest.mark.parametrize("single", [False, True])
def test_a_users_bias_is_what_logistic_regression_finds(single):
    # where the penalized likelihood is highest, what is left over is ridge times the bias
    rng = np.random.default_rng(0)
    scores, users = rng.normal(size=(90, 3)), np.array([f"u{i % 4}" for i in range(90)])
    gold = np.eye(3)[rng.integers(0, 3, 90)] if single else rng.integers(0, 2, (90, 3))
    bias = plm.user_bias(gold, scores, users, single, ridge=2.0)
    for user in set(users):
        of = users == user
        p = plm.probabilities(scores[of] + bias[user], single)
        assert (gold[of] - p).sum(0) == pytest.approx(2 * bias[user], abs=1e-3)


def test_rates_are_everybodys_or_the_users_shrunk_to_them():
    rows = [plm.Annotation(f"t{i}", user, labels) for user, n, labels in (
        ("a", 5, (1, 0)), ("b", 3, (0, 1)), ("b", 2, (0, 0))) for i in range(n)]
    data = dataset(train=rows)
    asked = [plm.Annotation("x", user, (0, 0)) for user in ("a", "b", "new")]
    majority, prior = (plm.rate_scores(data, asked, known) for known in (False, True))
    assert 1 / (1 + np.exp(-majority)) == pytest.approx(np.array([[0.5, 0.3]] * 3))
    assert 1 / (1 + np.exp(-prior)) == pytest.approx(np.array(  # (5 + 2.5) / 10, 1.5 / 10, ...
        [[0.75, 0.15], [0.25, 0.45], [0.5, 0.3]]))


def test_scores_of_a_rating_and_of_users_and_of_disagreement():
    rows = [plm.Annotation(text, user, labels) for text, user, labels in (
        ("t", "a", (1, 0, 0)), ("t", "b", (0, 0, 1)), ("s", "a", (0, 1, 0)), ("s", "b", (0, 1, 0)))]
    data = dataset(["1", "2", "5"], single=True, ordered=True)
    predicted = np.array([(1, 0, 0), (1, 0, 0), (0, 1, 0), (0, 1, 0)])
    found = plm.score(data, rows, dict(predicted=predicted))
    assert found["mean_absolute_error"] == 1.0  # one of four is 4 points off
    users = found["f1_per_user"]["users"]
    assert users == pytest.approx(dict(a=2 / 3, b=1 / 3)) and found["rows_disagreed"] == 2
    assert found["f1_disagreed"] == pytest.approx(2 / 9) and found["listens"]["model"] == 0
    low, high = found["f1_macro_ci"]
    assert 0 <= low <= found["f1_macro"] <= high <= 1


# ----------------------------------------------------------------------------------- runs and files

@pytest.fixture(scope="module")
def small_csv(tmp_path_factory):
    rows = [(f"comment {i // 2} on thing {i * 7 % 50}", f"u{i % 4}", i % 2, 1 - i % 2)
            for i in range(120)]
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv", rows)


def command(*args, **env):
    """(exit status, stdout, stderr) of a program in a process of its own."""
    done = subprocess.run([sys.executable, *map(str, args)], cwd=HERE, text=True, capture_output=True,
                          env=os.environ | env, timeout=600)
    return done.returncode, done.stdout, done.stderr


def results_of(folder):
    """The bytes of what a run is there for."""
    return {name: open(os.path.join(folder, name), "rb").read() for name in
            ("predictions.csv", "adapter.safetensors") if os.path.exists(os.path.join(folder, name))}


def metrics_of(folder):
    with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as f:
        return json.load(f)


def log_of(folder):
    with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


@pytest.mark.parametrize("args, says", [
    (["cls_q"], "invalid choice: 'cls_q'"), (["cls", "--modle", "tiny"], "--model --data"),
    (["cls", "--data", "nosuch"], "sample, goemotions"), (["predict"], "needs the folder of a run"),
    (["cls", "--data", "nosuch.csv"], "nosuch.csv: no such file"), (["cls", "x"], "what is 'x'?"),
    (["cls", "--model", "./nosuch"], "no such model"), (["predict", "nosuch"], "no finished run"),
    (["cls", "--model", HERE], "config.json"), (["cls", "--dropout", "2"], "from 0 to 0.9"),
    (["cls", "--labels", "funny,nosuch"], "no column 'nosuch'; there are: text, user"),
    (["q_0s", "--model", "openai:"], "needs a name"),
    (["cls", "--label-col", "text"], "not a choice of one"),
    (["cls", "--out", os.path.join(HERE, "plm.py")], "Not a directory")])
def test_bad_input_gets_one_line_and_status_2(args, says, capsys, tmp_path):
    assert says in refused(capsys, *args, *([] if "--out" in args else ["--out", tmp_path]))


@pytest.mark.parametrize("method, model", [("cls_p", "tiny"), ("lm", "tiny_t5"), ("q_2s_p", "tiny")])
def test_a_run_leaves_its_files_and_the_same_seed_the_same_bits(tmp_path, method, model, small_csv,
                                                                capsys):
    found = []
    for out in ("a", "b"):
        args = [method, "--model", model, "--data", small_csv, "--max-steps", 4, "--out", tmp_path / out]
        if out == "b" and model == "tiny":  # another process hashes strings otherwise
            assert command("plm.py", *args)[0] == 0
        else:
            assert go(*args) == 0
            stdout, err = capsys.readouterr()
            assert err.count("\r") < 4  # a bar is for runs of more than two seconds
        folder = tmp_path / out / "small" / model / method / "seed42"
        found.append(results_of(folder))
        m = metrics_of(folder)
        assert {"method", "model", "data", "seed", "f1_macro", "f1_micro", "per_label", "rows",
                "seconds", "peak_memory_mb", "notes", "f1_macro_ci", "listens"} <= set(m)
        with open(folder / "predictions.csv", encoding="utf-8") as f:
            lines = list(csv.DictReader(f))
        gold, predicted = ([plm.parse_answer(line[c], m["labels"])[0] for line in lines]
                           for c in ("gold", "predicted"))
        assert plm.f1_scores(gold, predicted)["f1_macro"] == m["f1_macro"]
        assert f"{m['f1_macro']:.4g}" in stdout and str(folder) in stdout.replace("/b/", "/a/") + str(folder)
        left = {"lock", "run.json", "metrics.json", *found[0]}
        if method != "q_2s_p":
            log, left = log_of(folder), left | {"log.jsonl"}
            assert [line["step"] for line in log] == [1, 2, 3, 3, 4, 4] and "val_loss" in log[-1]
            assert m["tokens_computed"] <= m["tokens_unshared"] and m["rows_per_second"] > 0
        assert set(os.listdir(folder)) == left
    assert found[0] == found[1] and len(found[0]) == 1 + (method != "q_2s_p")


def test_the_same_command_shows_what_it_has_another_one_is_refused_and_fresh_starts_over(
        tmp_path, small_csv, capsys):
    run = ["cls", "--data", small_csv, "--max-steps", 2, "--max-eval", 9, "--out", tmp_path / "out"]
    folder = tmp_path / "out" / "small" / "tiny" / "cls" / "seed42"
    assert go(*run) == 0
    summary, before = capsys.readouterr().out.split("\n\n")[-1], os.stat(folder / "metrics.json")
    assert go(*run) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and out.endswith(summary)
    assert os.stat(folder / "metrics.json").st_mtime_ns == before.st_mtime_ns
    for flag, value, says in (("--lr", 0.1, "lr 0.003 there and 0.1 here"), ("--ids", "word", "ids"),
                              ("--no-share", None, "no_share")):
        assert says in refused(capsys, *run, flag, *([value] if value else []))
    other = write_csv(tmp_path / "small.csv", some_rows())  # a name is not all there is to a file
    assert "data_sha" in refused(capsys, *run, "--data", other)
    (folder / "answers.jsonl").write_text("paid for")
    (folder / "peft").mkdir()
    assert go(*run, "--lr", 0.1, "--fresh") == 0
    assert metrics_of(folder)["lr"] == 0.1 and (folder / "answers.jsonl").read_text() == "paid for"


def test_other_columns_of_the_same_file_are_another_run(tmp_path, capsys):
    rows = [(text, text[::-1], user, user[::-1], a, b) for text, user, a, b in some_rows()]
    path = write_csv(tmp_path / "a.csv", rows, ("text", "reply", "user", "worker", "a", "b"))
    run = ["prior", "--data", path, "--out", tmp_path / "out"]
    assert go(*run) == 0
    assert "worker" in refused(capsys, *run, "--user-col", "worker")
    assert "reply" in refused(capsys, *run, "--text-col", "text,reply")


DRIVER = """import sys, time, plm
plm.SAVE_EVERY, save = 0, plm.save_state
plm.save_state = lambda *args: (save(*args), time.sleep(0.2))
sys.exit(plm.main(sys.argv[1:]))"""


def test_a_killed_run_goes_on_to_the_same_bytes_and_nobody_else_takes_its_folder(
        tmp_path, small_csv, capsys):
    run = ["cls_p", "--data", small_csv, "--epochs", 4]
    folders = [tmp_path / out / "small" / "tiny" / "cls_p" / "seed42" for out in ("whole", "killed")]
    assert go(*run, "--out", tmp_path / "whole") == 0
    run = [*map(str, run), "--out", str(tmp_path / "killed")]
    child = subprocess.Popen([sys.executable, "-c", DRIVER, *run], cwd=HERE,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until, log = time.monotonic() + 300, folders[1] / "log.jsonl"
        while not log.exists() or log.read_text().count("loss") < 6:  # in the second epoch of four
            assert time.monotonic() < until and child.poll() is None
            time.sleep(0.02)
        assert "another process is at this run" in refused(capsys, *run)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert not (folders[1] / "metrics.json").exists()
    with open(log, "a") as f:
        f.write('{"step": 99, "lo')  # half a line, as a kill may leave it
    capsys.readouterr()
    assert go(*run) == 0
    assert re.search(r"resuming at step [4-9]", capsys.readouterr().out)
    assert results_of(folders[0]) == results_of(folders[1]) and log_of(folders[0]) == log_of(folders[1])
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))


def test_two_processes_train_as_one_does(tmp_path, small_csv):
    # Dropout off, since each rank draws its own. torchrun's processes find each other on loopback.
    # There are fewer rows to validate than a batch has, so that one of them has none.
    args = ["cls_p", "--data", small_csv, "--dropout", 0, "--max-steps", 4, "--out"]
    assert go(*args, tmp_path / "one") == 0
    status, out, err = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
                               "plm.py", *args, tmp_path / "two")
    assert status == 0, err
    assert out.count("f1_macro ") == 1  # rank 0 alone prints
    folders = [tmp_path / n / "small" / "tiny" / "cls_p" / "seed42" for n in ("one", "two")]
    for a, b in zip(*map(log_of, folders), strict=True):
        key = "val_loss" if "val_loss" in a else "loss"
        assert abs(a[key] - b[key]) < 1e-5
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    f1 = [metrics_of(folder)["f1_macro"] for folder in folders]
    assert f1[0] == pytest.approx(f1[1], abs=0.01)


def test_a_failed_run_can_be_mended_and_leaves_nothing_half_written(tmp_path, small_csv, capsys):
    run = ["cls", "--data", small_csv, "--max-steps", 3, "--out", tmp_path]
    assert "lower --lr" in refused(capsys, *run, "--lr", 1e18)
    folder = tmp_path / "small" / "tiny" / "cls" / "seed42"
    assert set(os.listdir(folder)) == {"lock", "run.json", "log.jsonl"}
    assert "--fresh" in refused(capsys, *run) and go(*run, "--fresh") == 0


@pytest.mark.parametrize("name, methods", [
    ("phi", plm.METHODS), ("t5", plm.METHODS), ("mistral", ["cls_p", "q_1s"]), ("gpt_neox", ["lm_p"])])
def test_the_methods_run_from_a_folder_of_random_weights(name, methods, small_csv, tmp_path, capsys):
    folder, _ = random_model_folder(tmp_path / name, name, 2048)
    for method in methods:
        assert go(method, "--model", folder, "--data", small_csv, "--max-steps", 1, "--max-eval", 6,
                  "--out", tmp_path / "out") == 0
    capsys.readouterr()
    data_script("table").print_table(str(tmp_path / "out"))
    table = capsys.readouterr().out
    assert all(f"\n{method} " in table for method in methods)


def test_the_personalized_model_beats_the_plain_one_with_a_bias_for_each_user(tmp_path):
    # The claim of the paper, for three readers of the sample: it is more than a table of users.
    with open(f"{HERE}/data/sample/annotations.csv", newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    path = write_csv(tmp_path / "a.csv", [row for row in rows if row[1] in ("96", "44", "65")], header)
    run = ["--data", path, "--epochs", 9, "--max-steps", 130, "--batch", 16, "--out", tmp_path]
    assert go("cls", *run) == go("cls_p", *run) == 0
    plain, own = (metrics_of(tmp_path / "a" / "tiny" / m / "seed42") for m in ("cls", "cls_p"))
    assert own["f1_macro"] > plain["f1_macro_user_bias"] > plain["f1_macro"]
    assert own["f1_macro"] > own["f1_macro_shuffled"] and plain["listens"]["model"] == 0


def test_controls_see_through_a_table_of_users():
    # 40 people of two tastes: who knows the user is right, with shuffled IDs half of the time
    rows = [plm.Annotation(f"t{i}", f"u{i % 40}", (i % 2, 1 - i % 2)) for i in range(800)]
    data = dataset(train=rows, val=rows[:400], test=rows[400:])

    def knows(asked):
        y = np.array([[int(a.user[1:]) % 2, 1 - int(a.user[1:]) % 2] for a in asked])
        return dict(scores=2.0 * y - 1, predicted=y)

    def deaf(asked):
        return dict(scores=np.full((len(asked), 2), 0.1), predicted=np.ones((len(asked), 2), int))

    _, found = plm.evaluate(plm.METHODS["cls_p"], data, knows)
    assert found["f1_macro"] == 1 and found["f1_macro_shuffled"] == pytest.approx(0.5, abs=0.08)
    _, found = plm.evaluate(plm.METHODS["cls"], data, deaf)
    assert found["f1_macro"] == pytest.approx(2 / 3) and found["f1_macro_user_bias"] == 1
    assert found["f1_macro_tuned"] == pytest.approx(2 / 3) and found["listens"]["model"] == 0
    _, found = plm.evaluate(plm.METHODS["majority"], data, plm.run_rates(plm.METHODS["majority"], data)[0])
    assert found["f1_macro_tuned"] == pytest.approx(2 / 3)  # to tick all is the best that it can do


# ------------------------------------------------------------ a trained run: predict, export, table

def data_script(name):
    """data/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(HERE, "data", f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method, model", [("cls_p", "tiny"), ("lm_p", "tiny_t5"), ("cls", "tiny")])
def test_predict_gives_the_runs_own_scores_to_the_bit(tmp_path, monkeypatch, capsys, method, model,
                                                      small_csv):
    seen, write_predictions = [], plm.write_predictions
    monkeypatch.setattr(plm, "write_predictions", lambda *args, **kw: (seen.append(args[3]),
                                                                 write_predictions(*args, **kw)))
    run = [method, "--model", model, "--data", small_csv, "--max-steps", 4, "--lr", 0.01]
    assert go(*run, "--out", tmp_path) == 0
    folder = tmp_path / "small" / model / method / "seed42"
    test = plm.load_data(small_csv).test
    path = write_csv(tmp_path / "new.csv", [a[:2] for a in test], ("text", "user"))
    assert go("predict", folder, "--csv", path) == 0
    key = "scores" if method.startswith("cls") else "answers"
    assert np.array_equal(seen[0][key], seen[1][key])
    capsys.readouterr()
    assert go("predict", folder, "--text", test[0].text, "--users", f"{test[0].user},nobody") == 0
    out = capsys.readouterr().out
    if method == "cls_p":
        assert "unknown to training: nobody" in out
        shown = out.split(f"\n{test[0].user} ")[1].split("\n")[0].split()
        expected = plm.probabilities(seen[0]["scores"][:1], False)[0]
        assert [float(p) for p in shown] == pytest.approx(expected, abs=0.0051)
    assert "no column 'text'" in refused(capsys, "predict", folder, "--csv", write_csv(
        tmp_path / "b.csv", [("a", "b")], ("txt", "user")))
    assert "--csv FILE" in refused(capsys, "predict", folder)


@pytest.mark.parametrize("name, method", [("llama", "lm_p"), ("llama", "cls"), ("t5", "lm_p"),
                                          ("phi", "cls_p"), ("gpt_neox", "lm_p")])
def test_peft_computes_the_same_with_the_exported_adapter(tmp_path, small_csv, name, method, capsys):
    peft = pytest.importorskip("peft")
    path, lm = random_model_folder(tmp_path / name, name, 2048)
    assert go(method, "--model", path, "--data", small_csv, "--max-steps", 3, "--lr", 0.02, "--ids",
              "number", "--out", tmp_path) == 0
    folder = str(tmp_path / "small" / name / method / "seed42")
    data_script("export").export(folder)
    m, model, tokenizer, _ = plm.load_run(folder)
    model.train(False)
    if method.startswith("cls"):  # their classifier reads the last token that is no padding: not 2
        lm = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(rounded_reference(model, lm), f"{folder}/peft").eval()
    data = plm.load_data(small_csv)
    rows, _ = plm.encode(tokenizer, plm.METHODS[method], data, data.test[:5], None)
    with torch.no_grad():
        for row in rows:
            batch = plm.make_batch(model, [row])
            ours, prompt = model(batch)[batch["of"]], torch.tensor([row.prompt])
            if method.startswith("cls"):
                out = theirs(prompt).logits
            elif name == "t5":
                start = torch.tensor([(0, *row.answer[:-1])])
                out = theirs(input_ids=prompt, decoder_input_ids=start).logits[0]
            else:
                ids = torch.tensor([row.prompt + row.answer[:-1]])
                out = theirs(ids).logits[0, len(row.prompt) - 1:]
            assert torch.allclose(out, ours, atol=1e-4 * ours.abs().max().item())


def test_what_peft_has_no_place_for_stands_beside_and_fresh_still_starts_over(tmp_path, small_csv):
    run = ["cls_p", "--data", small_csv, "--max-steps", 1, "--out", tmp_path]
    assert go(*run) == 0
    folder = str(tmp_path / "small" / "tiny" / "cls_p" / "seed42")
    data_script("export").export(folder)
    tensors = safetensors.torch.load_file(f"{folder}/peft/beside.safetensors")
    with safetensors.safe_open(f"{folder}/peft/beside.safetensors", "pt") as f:
        assert json.loads(f.metadata()["users"]) == ["u0", "u1", "u2", "u3"]
    assert tensors["user_embedding"].shape == (4, 128)
    assert go(*run, "--fresh") == 0


TEXTS = [f"text {i}" for i in range(40)]


def fake_run(out, method, right, texts=TEXTS, **more):
    """The files that the table reads, of a run that is right on `right` rows of a text each."""
    gold = np.array([(i % 2, 1 - i % 2) for i in range(len(texts))])
    predicted = np.where(np.arange(len(texts))[:, None] < right, gold, 1 - gold)
    m = dict(data="d", method=method, model="m", seed=42, labels=LABELS, rows=dict(test=len(texts)),
             **plm.f1_scores(gold, predicted), f1_macro_ci=plm.interval(
                 plm.bootstrap_f1(gold, predicted, texts))) | more
    folder = os.path.join(out, "d", "m", method, f"seed{m['seed']}")
    os.makedirs(folder)
    rows = [plm.Annotation(text, "u", tuple(y)) for text, y in zip(texts, gold.tolist())]
    plm.write_predictions(f"{folder}/predictions.csv", dataset(), rows,
                          dict(predicted=predicted, scores=np.zeros(gold.shape)))
    plm.write_json(f"{folder}/metrics.json", m)
    return folder


def test_the_table_shows_gains_on_the_same_rows_only(tmp_path, capsys):
    table = data_script("table")
    fake_run(tmp_path / "a", "cls", 20), fake_run(tmp_path / "a", "cls_p", 40)
    fake_run(tmp_path / "a", "lm", 20), fake_run(tmp_path / "a", "lm_p", 40, texts=TEXTS[:38] + ["x", "y"])
    fake_run(tmp_path / "a", "q_0s", 20), fake_run(tmp_path / "a", "q_0s_p", 21)
    assert table.main(["--out", str(tmp_path / "a")]) == 0
    line = {text.split()[0]: text for text in capsys.readouterr().out.split("\n") if text.split()}
    assert "0.500" in line["cls"] and "1.000 [1.000 1.000] +100 %*" in line["cls_p"]
    assert "1.000" in line["lm_p"] and "%" not in line["lm_p"]
    assert "+5 %" in line["q_0s_p"] and "*" not in line["q_0s_p"]  # one row in 40 is chance
    for seed, right in ((1, 20), (2, 30)):
        fake_run(tmp_path / "b", "cls", right, seed=seed), fake_run(tmp_path / "b", "cls_p", 40, seed=seed)
    assert table.main(["--out", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "0.625 +-0.177 of 2" in out and "+67 %*" in out  # the mean of +100 and +33


def test_damaged_runs_are_left_out_of_the_table_and_named(tmp_path, capsys):
    for seed, text in enumerate(["{", "[]", '{"data": "d"}', '{"f1_macro_ci": [0, 1]}']):
        folder = fake_run(tmp_path, "cls", 20, seed=seed)
        with open(os.path.join(folder, "metrics.json"), "w") as f:
            f.write(text)
    folder = fake_run(tmp_path, "cls_p", 30, seed=7)
    fake_run(tmp_path, "cls", 20, seed=7)
    with open(os.path.join(folder, "predictions.csv"), "w") as f:
        f.write("text_id,us")
    assert data_script("table").main(["--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "0.500" in out and "0.750" in out and err.count("is left out") >= 4
    assert data_script("table").main(["--out", str(tmp_path / "none")]) == 2


# --------------------------------------------------------------------------- Makefile and README

def test_every_method_is_a_target_and_readme_names_no_other():
    with open(os.path.join(HERE, "Makefile"), encoding="utf-8") as f:
        targets = set(re.findall(r"^([a-z0-9_]+):", f.read(), re.M))
    assert set(plm.METHODS) <= targets
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        readme = f.read()
    assert set(re.findall(r"(?:`|^    )make ([a-z0-9_]+)", readme, re.M)) <= targets
    for part in re.findall(r"`([a-z_]+)`", readme):  # names that look like parts of the file
        if part.endswith(("_batch", "_step", "_answers", "_attention", "_forward")):
            assert hasattr(plm, part), part


# --------------------------------------------------------------------------------------- ChatGPT
# New imports: traceback; from email.utils import formatdate. Not needed any more: socket.

KEY = "sk-test-Zx81-nobody-may-see-this"
HEAD, STALL = b"HTTP/1.1 200 OK\r\n", [6.0]


def chat_reply(message):
    """The body of an answer, in bytes."""
    choice = dict(finish_reason=message.get("finish_reason", "stop"), message=message)
    usage = dict(prompt_tokens=7, completion_tokens=2)
    return json.dumps(dict(choices=[choice], usage=usage)).encode()


class ChatHandler(BaseHTTPRequestHandler):
    """Does what server.behave(prompt, number of the request) says: "ok", the message of an answer,
    a status, (status, body, headers), or a list of raw bytes and of seconds to wait before the
    connection ends. server.refuses: parameter -> status."""

    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    log_message = lambda self, *args: None

    def reply(self, status, body, headers={}):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body, server = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.server
        with server.lock:
            server.prompts.append(prompt := body["messages"][0]["content"])
            server.seen.append((body, dict(self.headers)))
            what = server.behave(prompt, len(server.prompts))
        for name in server.refuses.keys() & body.keys():
            says = f"'{name}' is not supported. Use 'max_completion_tokens' instead."
            what = server.refuses[name], says.encode()
        self.close_connection = isinstance(what, list)
        try:
            if isinstance(what, list):
                for part in what:
                    server.quit.wait(part) if isinstance(part, float) else self.wfile.write(part)
            elif isinstance(what, int):
                self.reply(what, f"Bad key {self.headers['Authorization']}, {'x' * 999}".encode())
            else:
                ok = dict(content=f"joy {prompt}") if what == "ok" else what
                self.reply(*(what if isinstance(what, tuple) else (200, chat_reply(ok))))
        except OSError:
            self.close_connection = True  # the client has gone


@pytest.fixture
def chat_server(monkeypatch):
    """A server on a free port; the environment names it and holds a key."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
    server.daemon_threads, server.lock, server.quit = True, threading.Lock(), threading.Event()
    server.seen, server.prompts, server.refuses, server.synced = [], [], {}, []
    server.behave = lambda *_: "ok"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(plm, "BACKOFF", 0.0003)
    monkeypatch.setattr(os, "fsync", server.synced.append)
    yield server
    server.quit.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "answers.jsonl")


def some_prompts(n):
    return {f"row{i}": f"prompt {i}" for i in range(n)}


def test_the_request_and_the_name_of_its_answer(chat_server, path):
    # the paper's numbers depend on this dict; answers already paid for are found by this hash
    body = dict(model="gpt-3.5-turbo", messages=[{"role": "user", "content": "Which? ü"}],
                temperature=0, seed=7, max_tokens=5)
    plm.ask_chatgpt({"a": "Which? ü"}, path, "gpt-3.5-turbo", seed=7, limit=5)
    assert chat_server.seen[0][0] == body
    sha = "e399078e2dfc9154140939c635b633ffbdc20bec8f9806b3d7efec0b2481b8a8"
    assert json.loads(open(path).read()) == dict(
        key="a", sha=sha, answer="joy Which? ü", prompt_tokens=7, completion_tokens=2)


def test_a_third_of_the_attempts_may_fail(chat_server, path, monkeypatch, capfd):
    # networks and servers fail in all these ways, and none may cost a row or an answer twice
    bad = [429, 500, 503, (200, b""), (200, b"<html>Bad gateway"), (200, b'{"choices": []}'),
           (429, b"", {"Retry-After": 0}), (429, b"", {"Retry-After": "soon"}), [], STALL,
           [HEAD + b"Content-Length: 99\r\n\r\n{"], [HEAD + b"Content-Length: 99\r\n\r\n{", 6.0],
           [HEAD + b"Transfer-Encoding: chunked\r\n\r\n99\r\n{"]]
    monkeypatch.setattr(plm, "READ", 0.4)
    chat_server.behave = lambda prompt, number: "ok" if number % 3 else bad[number // 3 % len(bad)]
    prompts = some_prompts(80)
    answers, counts = plm.ask_chatgpt(prompts, path, "m")
    assert answers == {row: f"joy {prompt}" for row, prompt in prompts.items()}
    assert counts["requests"] == len(chat_server.prompts) == 80 + counts["retries"] >= 115
    assert counts["failed"] == [] and counts["cached"] == 0 and len(chat_server.synced) == 80
    assert all(headers["Authorization"] == f"Bearer {KEY}" for _, headers in chat_server.seen)
    chat_server.prompts.clear()
    again, second = plm.ask_chatgpt(prompts, path, "m")  # a restart asks for nothing
    assert again == answers and chat_server.prompts == []
    assert second == dict(counts, requests=0, retries=0, cached=80)
    other = plm.ask_chatgpt({"row0": "prompt 0"}, path, "m", seed=1)[1]  # is another request
    assert len(chat_server.prompts) == 1 and other["prompt_tokens"] == 7
    assert KEY not in open(path).read() + "".join(capfd.readouterr())


def test_rows_with_the_same_prompt_share_a_request(chat_server, path, monkeypatch):
    # without the user in it, thirty annotators of a text have one prompt: it is paid for once
    answers, counts = plm.ask_chatgpt(dict(a="x", b="x", c="y"), path, "m")
    assert answers == dict(a="joy x", b="joy x", c="joy y")
    assert counts["requests"] == len(chat_server.prompts) == 2 and counts["prompt_tokens"] == 14
    monkeypatch.delenv("OPENAI_API_KEY")  # who has no account can still compute the scores anew
    assert plm.ask_chatgpt(dict(a="x", b="x", c="y"), path, "m")[0] == answers


def test_kill_and_restart(chat_server, path):
    # a killed run has paid for its finished answers; the next one takes them, but no half line
    chat_server.behave = lambda prompt, number: chat_server.quit.wait(0.005) or "ok"
    prompts = some_prompts(100)
    child = os.fork()  # importing everything anew takes longer than all of these tests
    if child == 0:
        try:
            plm.ask_chatgpt(prompts, path, "m")
        finally:
            os._exit(1)
    until = time.monotonic() + 30
    while not os.path.exists(path) or open(path).read().count("\n") < 20:
        assert time.monotonic() < until
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    time.sleep(0.2)  # the server takes note of what was on its way
    whole = open(path).read().rpartition("\n")[0].split("\n")
    finished = {json.loads(line)["key"] for line in whole}
    assert 20 <= len(finished) < 100
    with open(path, "a") as f:
        f.write(whole[0][:30])
    chat_server.prompts.clear()
    answers, counts = plm.ask_chatgpt(prompts, path, "m")
    assert sorted(chat_server.prompts) == sorted(prompts[row] for row in prompts.keys() - finished)
    assert counts["cached"] == len(finished)
    assert answers == {row: f"joy {prompt}" for row, prompt in prompts.items()}
    assert len([json.loads(line) for line in open(path)]) == 100  # the half line is gone


@pytest.mark.parametrize("what, word", [
    (401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "OPENAI_BASE_URL"),
    ((302, b"", dict(Location="/v1/elsewhere")), "OPENAI_BASE_URL")])
def test_what_every_request_would_get_stops_the_run(chat_server, path, capfd, what, word):
    # a wrong key must not be tried 10,000 times, wait for stalled requests, nor be shown to anybody
    chat_server.behave = lambda prompt, n: what if n == 5 else STALL if n > 5 else "ok"
    start = time.monotonic()
    with pytest.raises(plm.BadInput, match=word) as e:
        plm.ask_chatgpt(some_prompts(50), path, "m")
    assert time.monotonic() - start < 5
    time.sleep(0.3)
    assert len(chat_server.prompts) <= 5 + 8  # nobody goes on sending
    assert KEY not in "".join((*traceback.format_exception(e.value), *capfd.readouterr()))


@pytest.mark.parametrize("name, value", [
    ("OPENAI_API_KEY", None), ("OPENAI_API_KEY", " "), ("OPENAI_API_KEY", f"{KEY}\n{KEY}"),
    ("OPENAI_API_KEY", KEY + "é"), ("OPENAI_BASE_URL", f"http://user:{KEY}@127.0.0.1/v1"),
    ("OPENAI_BASE_URL", f"http://127.0.0.1/v1?key={KEY}"), ("OPENAI_BASE_URL", "127.0.0.1:1/v1"),
    ("OPENAI_BASE_URL", "http://127.0.0.1:port/v1"), ("http_proxy", "http://")])
def test_nothing_is_sent_without_a_key_and_an_address(chat_server, path, monkeypatch, name, value):
    # said at once and without the value: a key in the wrong place is a key
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(plm.BadInput, match=name.replace("http_", "")) as e:
        plm.ask_chatgpt(some_prompts(3), path, "m")
    assert chat_server.prompts == [] and KEY not in "".join(traceback.format_exception(e.value))


def test_the_key_may_be_any_and_netrc_does_not_replace_it(chat_server, tmp_path, path, monkeypatch):
    # requests would overwrite a mere header by the entry of .netrc for the host; and with servers
    # at home the key is any word: to hide all letters "o" must not spoil the answers
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "o")
    assert plm.ask_chatgpt({"a": "x"}, path, "m")[0] == {"a": "joy x"}
    assert chat_server.seen[0][1]["Authorization"] == "Bearer o"


def test_proxies_of_the_environment_are_used(chat_server, path, monkeypatch):
    # the other way around .netrc, trust_env = False, would cut off everybody behind a proxy
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", os.environ["OPENAI_BASE_URL"].removesuffix("/v1"))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://nowhere.invalid/v1")
    assert plm.ask_chatgpt({"a": "x"}, path, "m")[0] == {"a": "joy x"}
    assert chat_server.seen[0][1]["Host"] == "nowhere.invalid"


@pytest.mark.parametrize("what", [400, 413, 422, (400, b"max_tokens 48 is too large; seed 42")])
def test_a_refused_row_fails_at_once_and_alone(chat_server, path, what):
    # the others go on, and do not lack a parameter that the server names because of this one
    chat_server.behave = lambda prompt, number: what if prompt == "prompt 1" else "ok"
    answers, counts = plm.ask_chatgpt(some_prompts(4), path, "m", concurrency=1)
    ((row, reason),) = counts["failed"]
    assert len(answers) == 3 and row == "row1" and counts["requests"] == 4
    assert reason.startswith("HTTP 4") and KEY not in reason and len(reason) <= 200
    assert all(body.keys() == chat_server.seen[0][0].keys() for body, _ in chat_server.seen)


def test_attempts_are_bounded(chat_server, path):
    # one budget for statuses, bodies and connections: 1 + RETRIES attempts, never their product
    bad = [(200, b"<html>Bad gateway"), [], 500]
    chat_server.behave = lambda prompt, number: bad[number % 3]
    _, counts = plm.ask_chatgpt({"a": "x"}, path, "m")
    assert len(chat_server.prompts) == counts["requests"] == 1 + plm.RETRIES
    assert counts["failed"] == [("a", "HTTP 200: <html>Bad gateway")]
    chat_server.behave = lambda *_: "ok"  # a failed row is no finished one
    assert plm.ask_chatgpt({"a": "x"}, path, "m")[0] == {"a": "joy x"}


@pytest.mark.parametrize("what, word", [
    ((429, b"", {"Retry-After": 4}), "in 4 s"), (STALL, "timed out")])
def test_a_request_ends_at_its_deadline(chat_server, path, monkeypatch, what, word):
    # a server may ask for any wait, and one that is silent would get 1 + RETRIES time-outs
    monkeypatch.setattr(plm, "DEADLINE", 1)
    monkeypatch.setattr(plm, "READ", 0.6)
    chat_server.behave = lambda prompt, number: what if prompt == "prompt 0" else "ok"
    start = time.monotonic()
    answers, counts = plm.ask_chatgpt(some_prompts(3), path, "m", concurrency=1)
    assert time.monotonic() - start < 5 and answers.keys() == {"row1", "row2"}
    assert counts["failed"][0][0] == "row0" and word in counts["failed"][0][1]


@pytest.mark.parametrize("asked", [lambda: 1, lambda: formatdate(time.time() + 2, usegmt=True)])
def test_a_retry_after_is_kept(chat_server, path, asked):
    # asking earlier than the server said, in seconds or as a date, is what gets an account blocked
    times = []
    chat_server.behave = lambda prompt, number: times.append(time.monotonic()) or (
        (429, b"", {"Retry-After": asked()}) if number == 1 else "ok")
    assert plm.ask_chatgpt({"a": "x"}, path, "m")[1]["retries"] == 1
    assert 0.95 < times[1] - times[0] < 5


def test_a_request_may_wait_in_the_queue_of_the_server(chat_server, path, monkeypatch):
    # some servers send blank lines meanwhile, for longer than any silence would be accepted
    monkeypatch.setattr(plm, "READ", 0.7)
    chat_server.behave = lambda prompt, number: [
        HEAD + b"\r\n", *[b"\n", 0.1] * 12, chat_reply(dict(content="joy"))]
    answers, counts = plm.ask_chatgpt({"a": "x"}, path, "m")
    assert answers == {"a": "joy"} and counts["retries"] == 0


@pytest.mark.parametrize("refuses", [
    dict(max_tokens=400), dict(temperature=400), dict(max_tokens=400, temperature=400, seed=422)])
def test_the_dialect_of_the_server_is_learned(chat_server, path, refuses):
    # today's OpenAI models refuse max_tokens; what was paid for under any dialect is found again
    chat_server.refuses = refuses
    answers, counts = plm.ask_chatgpt(some_prompts(30), path, "m", limit=5)
    assert len(answers) == 30 and counts["retries"] <= 8 * len(refuses)
    body = plm.chat_body("m", chat_server.prompts[-1], 42, 5)
    limit = {"max_completion_tokens": 5} if "max_tokens" in refuses else {}
    kept = {name: value for name, value in body.items() if name not in refuses}
    assert chat_server.seen[-1][0] == kept | limit and len(chat_server.seen) == counts["requests"]
    chat_server.refuses = {}
    assert plm.ask_chatgpt(some_prompts(30), path, "m", limit=5)[1]["requests"] == 0


@pytest.mark.parametrize("message, answer", [
    (dict(content=None), ""), (dict(content=None, refusal="I can't"), ""), (dict(), ""),
    (dict(content=[dict(type="text", text="joy, "), dict(type="text", text="sad")]), "joy, sad"),
    (dict(content=[dict(type="refusal", refusal="No joy")]), ""), (dict(content=[]), ""),
    (dict(content="half \ud83d"), "half ?"), (dict(content="jo", finish_reason="length"), "jo"),
    (dict(content="", finish_reason="length"), None), (dict(content=7), None),
    (dict(content=[7]), None), (dict(content=[dict(text=dict(value="joy"))]), None)])
def test_an_answer_of_any_form_is_taken_or_named(chat_server, path, message, answer):
    # a refusal is an answer without labels; of what is none, the user is told; nothing crashes
    chat_server.behave = lambda prompt, number: dict(message)
    answers, counts = plm.ask_chatgpt({"a": "x"}, path, "m")
    assert answers == ({} if answer is None else {"a": answer})
    assert [row for row, _ in counts["failed"]] == ["a"] * (answer is None)
    assert plm.ask_chatgpt({"a": "x"}, path, "m")[1]["cached"] == len(answers)


def test_a_server_that_answers_nobody_stops_the_run(chat_server, path, monkeypatch):
    # after 20 rows, not after 10,000; and where the disk is slow, nobody pays for what is not on it
    monkeypatch.setattr(os, "fsync", lambda fd: time.sleep(0.02))
    chat_server.behave = lambda prompt, number: "ok" if number % 2 and number < 60 else 400
    with pytest.raises(plm.BadInput, match=r"HTTP 400.* failed; .*answers.jsonl"):
        plm.ask_chatgpt(some_prompts(200), path, "m")
    assert len(plm.finished_answers(path)) == 30
    assert plm.GIVE_UP <= len(chat_server.prompts) - 60 < plm.GIVE_UP + 12


def test_ctrl_c(chat_server, path):
    # stops now, not when stalled requests have ended, and keeps what is finished
    chat_server.behave = lambda prompt, number: "ok" if number <= 5 else STALL
    # A shell starts its background jobs, and so perhaps this test, with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            plm.ask_chatgpt(some_prompts(50), path, "m")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 5 and len(plm.finished_answers(path)) == 5
    assert all(t.daemon for t in threading.enumerate() if "work" in t.name)  # nor does the process


def test_an_answers_file_with_odd_lines(path):
    # a full disk or a power cut may leave anything in it; what is no answer is asked for again
    good = dict(key="a", sha="s", answer="joy", prompt_tokens=1, completion_tokens=1)
    with open(path, "wb") as f:
        f.write(b"\0\0\0\n[1]\n{}\n3\n" + json.dumps(good).encode() + b'\n\xff\n{"key": "b", "sh')
    assert list(plm.finished_answers(path)) == ["s"] and open(path, "rb").read()[-3:] == b"\n\xff\n"
    assert plm.finished_answers(path + ".none") == {} and not os.path.exists(path + ".none")


def test_dry_run(capsys, monkeypatch):
    # what it will cost, before it costs anything: no key, no server
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    plm.dry_run(dict(a="Which?\n### Response:", b="Which?\n### Response:", c="x" * 401), "gpt", 48)
    out = capsys.readouterr().out
    assert "gpt: 2 requests for 3 rows" in out and "105 tokens" in out and "96 of answers" in out
    assert out.endswith(":\n\nWhich?\n### Response:\n")


# ------------------------------------------------------------------ preparing data: data/prepare.py

spec = importlib.util.spec_from_file_location("prepare", os.path.join(HERE, "data", "prepare.py"))
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
PARTS, EMOTIONS = ("train", "val", "test"), ["anger", "joy"]


def judged(n, user="a", part="train"):
    return [prepare.Row(f"t{i}", user, part, "", {}) for i in range(n)]


def users(rows):
    return [Counter(a.user for a in rows if a.split == part) for part in PARTS]


@pytest.mark.parametrize("seed", range(8))
def test_rules(seed):
    # busy and rare users, users missing in a part, texts judged by many
    r = random.Random(seed)
    weights = [r.paretovariate(0.8) for _ in range(30)]
    rows = [prepare.Row(f"{part} {r.randrange(n // 4)}", str(u), part, "", {})
            for part, n in zip(PARTS, (2000, 300, 300)) for u in r.choices(range(30), weights, k=n)]
    r.shuffle(rows)
    # the paper's split: each reader of the test is known from training, and nobody more is lost
    everywhere = set.intersection(*map(set, users(rows)))
    assert prepare.users_in_all(rows) == [a for a in rows if a.user in everywhere]
    # "fewer than 1 %" of the busiest user goes, whole; above 60 % of it is cut to 60 %, rounded up
    floor, cap = users(prepare.drop_rare_users(rows)), users(prepare.cut_busy_users(rows))
    for before, kept, cut in zip(users(rows), floor, cap):
        busiest = max(before.values())
        assert kept == {u: n for u, n in before.items() if n * 100 >= busiest}
        assert cut == {u: min(n, -(-busiest * 60 // 100)) for u, n in before.items()}
    for rule in prepare.RULES.values():  # nothing is invented, the order kept, the same users left
        before, rows = iter(rows), rule(rows)
        assert all(any(a is b for b in before) for a in rows)
    assert len({frozenset(part) for part in users(rows)}) == 1


def test_rules_arrive_at_the_authors_numbers_and_always_at_the_same_sample():
    for busiest, cut in ((7913, 4748), (940, 564), (1005, 603), (2382, 1430)):  # of their notebooks
        assert len(prepare.cut_busy_users(judged(busiest))) == cut
    assert len(prepare.drop_rare_users(judged(200) + judged(2, "b"))) == 202  # exactly 1 % stays
    assert len(prepare.drop_rare_users(judged(200) + judged(1, "b"))) == 200
    assert prepare.drop_rare_users([]) == prepare.cut_busy_users([]) == []
    alone = [a.text for a in prepare.cut_busy_users(judged(100))]
    assert alone[:6] == ["t0", "t1", "t2", "t3", "t5", "t7"]  # in every Python that there is
    random.seed(2)  # nor do the global state, other users and other parts change it
    rows = prepare.cut_busy_users(judged(100, "b") + judged(100) + judged(9, "a", "val"))
    assert [a.text for a in rows if a.user == "a" and a.split == "train"] == alone
    assert [a.text for a in rows if a.user == "b"] != alone


def write(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])


def small(monkeypatch, folder=None, base="http://127.0.0.1:9"):
    """goemotions in small: the row of the table and, with a folder, three CSVs and three TSVs with
    texts in two of them. Nobody listens on port 9."""
    r, row = random.Random(0), dict(prepare.DATASETS["goemotions"], labels=EMOTIONS)
    row["urls"] = {file: f"{base}/{file}" for file in row["urls"]}
    row["expected"] = {"annotations": (360,), "with a label": (1,)}
    monkeypatch.setitem(prepare.DATASETS, "goemotions", row)
    rows = [[f'text "{t}", he said', f"id{t}", str(u), "15.0", r.randrange(2), r.randrange(2)]
            for t in range(60) for u in range(6)]
    header = ["text", "id", "rater_id", "created_utc", *EMOTIONS]
    for i in range(3) if folder else ():
        write(folder / f"goemotions_{i + 1}.csv", header, rows[i::3])
    for file, a, b in (("train", 0, 40), ("dev", 39, 50), ("test", 49, 60)) if folder else ():
        lines = [f'text "{t}", he said\t1\tid{t}\n' for t in range(a, b)]
        (folder / f"{file}.tsv").write_text("".join(lines))


def run(name, folder):
    """The rows of the CSV that is written."""
    assert prepare.main([name, "--dir", str(folder)]) == 0
    return [row for _, row in plm.csv_rows(str(folder / "annotations.csv"))]


def fails(capsys, says, *args):
    """The list by hand that follows the one line of an error, mostly empty."""
    assert prepare.main([str(arg) for arg in args]) == 2
    first, *by_hand = capsys.readouterr().err.splitlines()
    assert first.startswith("prepare.py: ") and says in first
    assert all(" -> " in line for line in by_hand)
    return by_hand


def test_goemotions_becomes_a_csv_that_plm_loads(tmp_path, monkeypatch, capsys):
    # no text in two splits, texts of two splits where the authors have them, all-zero rows gone
    small(monkeypatch, tmp_path)
    rows, out = run("goemotions", tmp_path), capsys.readouterr().out
    assert "CC BY 4.0" in out and "dev.tsv, test.tsv, train.tsv" in out and "WARNING" in out
    assert list(rows[0]) == ["text", "user", "split", "time", *EMOTIONS]
    where = {row["text"]: row["split"] for row in rows}
    assert all(where[row["text"]] == row["split"] for row in rows)
    assert where['text "39", he said'] == "train" and where['text "49", he said'] == "test"
    assert all(row["time"] == "15.0" and "1" in (row["anger"], row["joy"]) for row in rows)
    data = plm.load_data(str(tmp_path / "annotations.csv"), labels=EMOTIONS)
    assert len(data.train + data.val + data.test) == len(rows) and list(data.labels) == EMOTIONS
    assert run("goemotions", tmp_path) == rows and len(os.listdir(tmp_path)) == 7


def test_damaged_originals_and_rubbish_are_refused(tmp_path, monkeypatch, capsys):
    # half of the original must never pass for the original; a saved login page is named
    small(monkeypatch, tmp_path)
    file = tmp_path / "goemotions_2.csv"
    lines = file.read_text().splitlines()
    for says, text in (("359 annotations, the original has 360; delete what", lines[:-1]),
                       ("row 1 (line 2)", [lines[0], lines[1][:-2]]),
                       ("row 1: 'joy' cannot be '2'", [lines[0], lines[1][:-1] + "2"]),
                       ("row 1: 'rater_id' cannot be ' '", [lines[0], "a,b, ,1,0,1"]),
                       ("no column 'joy'", [line.rpartition(",")[0] for line in lines])):
        file.write_text("\n".join(text))
        assert not fails(capsys, says, "goemotions", "--dir", tmp_path)
    file.write_text("\n".join(lines))
    for says, text in (("a web page and not the file", "\n<html>sign in</html>"),
                       ("nothing in it", ""), ("no column 'text' in it", "404: Not Found")):
        (tmp_path / "dev.tsv").write_text(text)
        assert not fails(capsys, f"dev.tsv: {says}", "goemotions", "--dir", tmp_path)
    assert not (tmp_path / "annotations.csv").exists()


def test_other_files_of_the_same_columns(tmp_path, monkeypatch, capsys):
    # without files of splits a text is split by its hash, one of these files is not enough, and any
    # text comes back as it was
    small(monkeypatch)
    texts = ['a "b"\nc\r\nd', "x\ry", " space ", "\U0001f600,", *(f"text {t}" for t in range(80))]
    write(tmp_path / "goemotions_part.csv", ["text", "rater_id", *EMOTIONS],
          [(t, u, "1.0", 0) for t in texts for u in range(5)] + [(t, 6, 0, 0) for t in texts])
    rows, out = run("goemotions", tmp_path), capsys.readouterr().out
    assert "a hash of the text" in out and "no counts to compare" in out and "authors" not in out
    assert list(rows[0]) == ["text", "user", "split", *EMOTIONS]
    assert all(row["split"] == plm.split_of(row["text"]) and row["anger"] == "1" for row in rows)
    assert {row["text"] for row in rows} == set(texts)
    (tmp_path / "dev.tsv").write_text("a\t1\tx\n")
    fails(capsys, "test.tsv", "goemotions", "--dir", tmp_path)
    (tmp_path / "annotations.csv").write_text("comment,_worker_id\n")  # somebody else's file
    fails(capsys, "annotations.csv: not of this script", "goemotions", "--dir", tmp_path)


def test_split_files_of_unhealthy_are_csv_with_comments(tmp_path, monkeypatch, capsys):
    # the second original form: corpus/*.csv with quoted comments of several lines
    row, texts = prepare.DATASETS["unhealthy"], [f'text {t},\n"so to say"' for t in range(30)]
    monkeypatch.setitem(row, "expected", {"annotations": (120,)})
    parts = dict(train=texts[:20], val=texts[20:25], test=texts[25:])
    write(tmp_path / "unhealthy_full.csv", ["_unit_id", "comment", "_worker_id", *row["labels"]],
          [[0, text, u, *[1] * 8] for text in texts for u in range(4)])
    (tmp_path / "corpus").mkdir()
    for part, own in parts.items():
        write(tmp_path / "corpus" / f"{part}.csv", ["id", "comment"], [[0, text] for text in own])
    rows, out = run("unhealthy", tmp_path), capsys.readouterr().out
    assert all(f"{n:>8}" in out for n in (80, 20, 48, 12)) and len(rows) == 72  # 60 % of each user
    assert list(rows[0]) == ["text", "user", "split", *row["labels"]]
    assert all(row["text"] in parts[row["split"]] for row in rows)
    (tmp_path / "corpus" / "val.csv").write_text("id\n1\n")
    fails(capsys, "val.csv: no column 'comment' in it", "unhealthy", "--dir", tmp_path)


def test_popquorn_gets_five_draws(tmp_path, monkeypatch, capsys):
    # sizes 70 : 10 : 20 of the texts, nobody new in val and test, no two draws the same, whatever
    # the order of the rows; what nobody rated is left out and counted
    monkeypatch.setitem(prepare.DATASETS["popquorn"], "expected", {"with a label": (600,)})
    header, names = ["user_id", "text", "offensiveness"], [f"draw{i}" for i in range(1, 6)]
    draws = []
    ratings = [(u, f"text {t}", f"{(t + u) % 5 + 1}.0") for t in range(60) for u in range(10)]
    for lines in (ratings + [(1, "nobody rated this", "")], ratings[::-1]):
        write(tmp_path / "raw_data.csv", header, lines)
        rows, out = run("popquorn", tmp_path), capsys.readouterr().out
        assert "no licence file" in out and "WARNING" not in out and f"{len(lines):>8,}" in out
        assert list(rows[0]) == ["text", "user", "offensiveness", *names]
        assert Counter(row["offensiveness"] for row in rows) == dict.fromkeys("12345", 120)
        draws.append([{row["text"]: row[name] for row in rows} for name in names])
    assert draws[0] == draws[1] and len({tuple(sorted(d.items())) for d in draws[0]}) == 5
    assert all(Counter(d.values()) == dict(train=42, val=6, test=12) for d in draws[0])
    val = [t for t in range(60) if draws[0][0][f"text {t}"] == "val"]
    assert val == [9, 11, 19, 27, 39, 41]  # in every Python that there is
    write(tmp_path / "raw_data.csv", header, ratings[:540] + [
        (t + 100, f"text {t}", 1) for t in range(60)])
    fails(capsys, "draw1 has users who are not in training", "popquorn", "--dir", tmp_path)


class Server(BaseHTTPRequestHandler):
    """Serves `files`; `faults` path -> list of what goes wrong with the next requests of it."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.send_error(405)

    def do_GET(self):
        self.asked[self.path] += 1
        body, fault = self.files[self.path], (self.faults.get(self.path) or [None]).pop(0)
        body = {404: b"", 503: b"", "empty": b"", "html": b"\n <!DOCTYPE html>"}.get(fault, body)
        self.send_response(fault if isinstance(fault, int) else 200)
        if fault == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        elif fault != "no length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if fault in ("break", "no length") else body)
        self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(the handler class with the small originals to serve, empty folder to download to)"""
    (tmp_path / "served").mkdir()
    handler = type("Handler", (Server,), dict(faults={}, asked=Counter()))
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    small(monkeypatch, tmp_path / "served", f"http://127.0.0.1:{http.server_address[1]}")
    handler.files = {f"/{file.name}": file.read_bytes() for file in (tmp_path / "served").iterdir()}
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(prepare, "PAUSES", (0, 0, 0))
    yield handler, tmp_path / "got"
    http.shutdown()
    http.server_close()


def test_download(server):
    # what breaks off, is busy or has chunks arrives in the end; a second call fetches nothing
    handler, folder = server
    big = "/goemotions_2.csv"
    handler.files[big] = handler.files[big].replace(b",id", b",id" + b"x" * 3000)
    handler.faults = {
        big: ["break", "no length"], "/dev.tsv": [503, 503], "/train.tsv": ["chunked"]}
    rows = run("goemotions", folder)
    assert {f"/{name}" for name in os.listdir(folder)} == {*handler.files, "/annotations.csv"}
    assert all((folder / name[1:]).read_bytes() == body for name, body in handler.files.items())
    assert handler.asked == dict.fromkeys(handler.files, 1) | {big: 3, "/dev.tsv": 3}
    handler.files = {}
    assert run("goemotions", folder) == rows


@pytest.mark.parametrize("fault, says", [
    ("html", "a web page and not the file"), ("empty", "nothing in it"), (404, "404 Not Found"),
    (503, "503 Service Unavailable"), ("break", "broke off, 3 times"), ("no length", "broke off")])
def test_wrong_answers_leave_nothing_under_the_name(server, capsys, fault, says):
    # the files that are still missing are listed with their places; a later run goes on from there
    handler, folder = server
    handler.faults["/train.tsv"] = [fault] * 3
    by_hand = fails(capsys, says, "goemotions", "--dir", folder)
    assert len(by_hand) == 3 and by_hand[0].endswith(f"/train.tsv -> {folder / 'train.tsv'}")
    assert not (folder / "train.tsv").exists()
    handler.faults.clear()
    assert run("goemotions", folder) and handler.asked["/goemotions_1.csv"] == 1


@pytest.mark.parametrize("base, says", [
    ("http://127.0.0.1:9", "ConnectionError"), ("https://no.invalid", "ProxyError"),
    ("http://silent", "no answer in 0.3 s")])
def test_no_network_a_proxy_that_refuses_a_server_that_never_answers(
        tmp_path, monkeypatch, capsys, base, says):
    # one message with every URL and its place, soon, whatever requests is waiting for
    small(monkeypatch, base=base)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    if "silent" in base:
        monkeypatch.setattr(prepare.requests, "head", lambda *a, **k: time.sleep(2))
        monkeypatch.setattr(prepare.no_answer, "__defaults__", (0.3,))
    start, folder = time.perf_counter(), tmp_path / "new"
    assert len(fails(capsys, says, "goemotions", "--dir", folder)) == 6
    assert time.perf_counter() - start < 10 and not folder.exists()


def test_bad_names_bad_places_and_ctrl_c(server, tmp_path, monkeypatch, capsys):
    fails(capsys, "invalid choice: 'sample' (choose from", "sample")
    fails(capsys, "unrecognized arguments: --data", "goemotions", "--data", "x")
    (tmp_path / "file").write_text("")
    fails(capsys, "Not a directory", "goemotions", "--dir", tmp_path / "file" / "sub")
    monkeypatch.setattr(prepare.time, "sleep", lambda _: signal.raise_signal(signal.SIGINT))
    assert prepare.main(["goemotions", "--dir", str(tmp_path / "got")]) == 130
    assert capsys.readouterr().err.endswith("\nprepare.py: stopped; complete files stay\n")
    done = subprocess.run([sys.executable, prepare.__file__, "sample"], capture_output=True)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and not done.stdout


# ---------------------------------------------------------------------- studies: data/vary.py

spec = importlib.util.spec_from_file_location("vary", os.path.join(HERE, "data", "vary.py"))
vary = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vary)
LABELS = "calm rude sad odd warm cold dry".split()


def crowd(path, seed=0):
    """The path of a CSV without a split column: 4 of 24 people read each of 200 texts."""
    r = random.Random(seed)
    rows = [(f"text {i} of {seed}", f"worker {u}", f"2024-{1 + i // 17:02}-{r.randrange(9) + 10}",
             "secret", *(int(r.random() < 0.6 - j / 14) for j in range(7)))
            for i in range(200) for u in r.sample(range(24), 4)]
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([("text", "user", "time", "city", *LABELS), *rows])
    return str(path)


def varied(source, *args):
    """dict split -> list of rows (dicts) of what vary.py makes; no text is in two splits."""
    assert vary.main([source, f"{source}.new.csv", *map(str, args)]) == 0
    parts, texts = defaultdict(list), defaultdict(set)
    for _, row in plm.csv_rows(f"{source}.new.csv"):
        parts[row["split"]].append(row)
        texts[plm.text_id(row["text"])].add(row["split"])
    assert {len(splits) for splits in texts.values()} == {1} and set(parts) == set(vary.PARTS)
    return parts


@pytest.mark.parametrize("seed", range(6))
def test_new_people_are_new_but_for_the_rows_that_were_given(tmp_path, seed):
    source, made = crowd(tmp_path / "a.csv", seed), {}
    for known in (0, 5, 15):
        made[known] = parts = varied(source, "--unseen", "--known", known, "--seed", seed)
        new = {row["user"] for row in parts["test"]}
        assert len(new) == 6 and not new & {row["user"] for row in parts["val"]}
        n = Counter(row["user"] for row in parts["train"])
        assert {n[user] for user in new} == {known} and len(n) == 18 + 6 * (known > 0)
    assert made[0]["test"] == made[5]["test"] == made[15]["test"]
    assert all(row in made[15]["train"] for row in made[5]["train"])
    rows = [{k: row[k] for k in ("text", "user", *LABELS)} for _, row in plm.csv_rows(source)]
    assert all(row.pop("split") and row in rows for part in made[15].values() for row in part)


@pytest.mark.parametrize("seed", range(4))
def test_the_later_is_later_and_randomized_response_keeps_its_rate(tmp_path, seed, capsys):
    source = crowd(tmp_path / "a.csv", seed)
    when = {(row["text"], row["user"]): row["time"] for _, row in plm.csv_rows(source)}
    parts = varied(source, "--by-time", "time")
    days = [[when[row["text"], row["user"]] for row in parts[part]] for part in vary.PARTS]
    assert max(days[0]) < min(days[1]) <= max(days[1]) < min(days[2])
    quarters = [row["quarter"] for row in parts["test"]]
    assert sorted(quarters) == [q for _, q in sorted(zip(days[2], quarters))]
    true = varied(source, "--ids", "dp", "--epsilon", "inf")
    for epsilon in (1, 3, 8):
        told = varied(source, "--ids", "dp", "--epsilon", epsilon, "--seed", seed)
        assert told["val"] == true["val"] and told["test"] == true["test"]
        pairs = [(a["user"], b["user"]) for a, b in zip(true["train"], told["train"])]
        n, keep = len(pairs), math.exp(epsilon) / (math.exp(epsilon) + 23)
        kept = sum(a == b for a, b in pairs)  # more than 4.5 sigma off once in 150,000
        assert abs(kept - n * keep) <= 1 + 4.5 * math.sqrt(n * keep * (1 - keep))
        assert {b for _, b in pairs} <= {a for a, _ in pairs}
        assert f"({1 - keep:.1%} expected)" in capsys.readouterr().out


def test_hashes_follow_the_key_words_the_seed_and_no_other_column_is_left(tmp_path, monkeypatch):
    source, made = crowd(tmp_path / "a.csv"), []
    for key in ("k" * 16, "k" * 16, "l" * 16):
        monkeypatch.setenv("PLM_KEY", key)
        made.append(varied(source, "--ids", "hash"))
    made += [varied(source, "--ids", "words", "--seed", seed) for seed in (1, 1, 2)]
    ids = [{row["user"] for rows in parts.values() for row in rows} for parts in made]
    assert made[0] == made[1] and made[3] == made[4] and {len(users) for users in ids} == {24}
    assert not ids[0] & ids[2] and ids[3] != ids[5]
    assert [*made[0]["val"][0]] == ["text", "user", "split", *LABELS]
    assert [*varied(source, "--labels", 2)["val"][0]] == ["text", "user", "split", "calm", "rude"]


@pytest.mark.parametrize("args, why", [
    ("--unseen --share 0.1", "too few users"), ("--unseen --known 99", "too few users"),
    ("--by-time hour", "no column 'hour'"), ("--by-time city", "a number or a date is needed"),
    ("--ids hash", "PLM_KEY"), ("--ids dp", "--epsilon"), ("--labels 8", "7 0/1 columns"),
    ("--labels 2 --label-col calm", "single choice"), ("--labels 1", "not a number from 2"),
    ("--unseen --labels 2", "not allowed with"), ("", "required")])
def test_what_cannot_be_done_honestly_is_refused(tmp_path, monkeypatch, capsys, args, why):
    monkeypatch.setenv("PLM_KEY", "too short")
    assert vary.main([crowd(tmp_path / "a.csv"), str(tmp_path / "b.csv"), *args.split()]) == 2
    assert why in capsys.readouterr().err and os.listdir(tmp_path) == ["a.csv"]


def commands(target, *args):
    """list of the commands, each a list, that a study consists of; none of them is run."""
    make = ["make", "-s", "-o", "V/ready", "VENV=V", "PY=echo", "PLM=echo plm.py", target, *args]
    assert subprocess.run([*make, "-n"], cwd=HERE, capture_output=True).returncode == 0
    done = subprocess.run(make, cwd=HERE, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines()]


STUDIES = "paper exp1 exp2 exp3 unseen later private architectures".split()


@pytest.mark.parametrize("target", STUDIES)
def test_a_study_consists_of_commands_that_exist(target):
    for file, *args in commands(target):
        assert os.path.exists(os.path.join(HERE, file))
        assert file != "plm.py" or plm.make_parser().parse_args(args)


@pytest.mark.parametrize("target, tables", [("unseen", 2), ("private", 6), ("exp3", 1)])
def test_a_study_runs_to_its_end(tmp_path, monkeypatch, capsys, target, tables):
    monkeypatch.setenv("PLM_KEY", "k" * 16)
    mains = {"plm.py": plm.main, "data/vary.py": vary.main,
             "data/table.py": sys.modules["table"].main}
    for file, *args in commands(target, f"DATA={crowd(tmp_path / 'a.csv')}", f"OUT={tmp_path}",
                                "COUNTS=3", "KNOWN=0 5", "ARGS=--max-steps 2 --max-eval 20"):
        assert mains[file](args) == 0
    said = capsys.readouterr().out.split("F1-macro [95 %]")[1:]
    assert len(said) == tables and all("cls_p" in table for table in said)


# ----------------------------------------------------------- the page of all runs: data/report.py
spec = importlib.util.spec_from_file_location("report", os.path.join(HERE, "data", "report.py"))
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)
NASTY = ["<script>1</script>", "\"'><img src=x onload=y>", "a & b \U0001f600", "]]>\x01\u202e"]


def report_run(out, method, right, users=NASTY, data="<b>&'", text="text {}"):
    """The metrics of a run whose ticks are right with that probability; its files are in `out`."""
    r, folder = random.Random(method), str(out / "d" / "m" / method / "seed42")
    rows = [plm.Annotation(text.format(i // 4), users[i % len(users)], (i % 2, i // 2 % 2, 1, 0))
            for i in range(4 * len(users))]
    ticks = np.array([[y if r.random() < right else 1 - y for y in a.labels] for a in rows])
    result = dict(predicted=ticks, scores=ticks - 0.5)
    data = plm.Dataset(data, NASTY, False, False, False, rows, rows, rows, {}, "")
    m = dict(method=method, model="m<i>", data=data.name, split=None, seed=42, labels=NASTY)
    m |= plm.score(data, rows, result) | dict(
        f1_disagreed=0.2468, f1_macro_shuffled=0.1234, data_sha="", rows=dict(test=len(rows)))
    os.makedirs(folder)
    plm.write_predictions(f"{folder}/predictions.csv", data, rows, result)
    plm.write_json(f"{folder}/metrics.json", m)
    plm.write_file(f"{folder}/log.jsonl", b'{"epoch": 1, "val_loss": 0.4321, "listens": 0.8765}')
    return m


def test_the_report_shows_the_numbers_of_the_runs_and_runs_nothing(tmp_path, monkeypatch):
    text = "<img src=x> said"  # a row of the sample, as far as the report knows
    there = [(1, dict(text=text))]
    monkeypatch.setattr(plm, "csv_rows", lambda path: there * os.path.exists(path))
    a, b = (report_run(tmp_path, method, 0.8, NASTY, "sample", text) for method in ("cls", "cls_p"))
    c, tags, words = report_run(tmp_path, "lm", 0.8), [], []
    assert report.main(["--out", str(tmp_path)]) == 0
    html, parser = (tmp_path / "report.html").read_text("utf-8"), HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.extend([tag, *dict(attributes)])
    parser.handle_data = words.append
    parser.feed(html)
    assert not {"script", "img", "i", "link", "src", "href", "onload"} & {*tags}
    assert not any(bad in html for bad in ("url(", "@import", "http:", "https:", "\x01", "\u202e"))
    shown, users, own = " ".join(words), *(m["f1_per_user"]["users"] for m in (a, b))
    numbers = [*a["per_label"], *b["per_label"], *users.values(), *own.values(), .1234, .2468]
    numbers += [.4321, .8765, *(x for m in (a, b, c) for x in (m["f1_macro"], *m["f1_macro_ci"]))]
    assert all(f"{x:.3f}" in shown for x in numbers)
    assert all(x in shown for x in [*NASTY[:3], "<b>&'", "m<i>", text])
    for part in html.split("<svg")[1:]:  # every chart is XML that says what it shows
        chart = ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
        assert [part.tag for part in chart[:2]] == ["title", "desc"] and chart[1].text


def test_the_picture_is_small_and_nothing_to_show_is_one_line(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--picture", str(tmp_path / "picture.svg")]
    assert report.main(argv) == 2 and capsys.readouterr().err.count("\n") == 1
    users, own = (report_run(tmp_path, method, 0.8, [f"<{i}>" * 9 for i in range(700)])[
        "f1_per_user"]["users"] for method in ("cls", "cls_p"))
    assert report.main(argv) == 0 and os.path.getsize(argv[-1]) < 60_000
    assert ElementTree.parse(argv[-1]).getroot().get("viewBox")
    gains = f"{sum(own[u] > users[u] for u in own)} of 700 users"  # not those that stay as they are
    assert gains in (tmp_path / "report.html").read_text("utf-8")


# -------------------------------------------------------------------------- a GPU that is pretended
# Tensors that say they are on a device "gpu" and whose numbers a CPU computes. What CUDA refuses is
# refused (two devices, two dtypes), and what makes the host wait for a GPU is counted: a number or a
# copy fetched from it, a copy to it that does not come from pinned memory. torch cannot forget a
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


def each_tensor(function, x):
    """x, an argument of an operation, with function(tensor) in place of every tensor in it."""
    if isinstance(x, (list, tuple)):
        return type(x)([each_tensor(function, y) for y in x])
    return function(x) if isinstance(x, torch.Tensor) else x


def on_gpu(func, *args, **kwargs):
    """One operation as CUDA would do it."""
    ours, others, name = [], [], func._schema.name.split("::")[1]

    def unwrap(x):
        (ours if isinstance(x, Gpu) else others).append(x)
        return x.raw if isinstance(x, Gpu) else x

    device, raw = kwargs.get("device"), each_tensor(unwrap, args)
    more = {key: each_tensor(unwrap, x) for key, x in kwargs.items()}
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
    out = each_tensor(Gpu, out)
    return torch.utils._python_dispatch.return_and_correct_aliasing(
        func, args, kwargs, out) if ours else out


def gpu_attention(q, k, v, attn_mask=None, is_causal=False, scale=None, **more):
    """scaled_dot_product_attention; on the GPU in steps, where CUDA would have one kernel for it."""
    if not isinstance(q, Gpu):
        return SDPA(q, k, v, attn_mask, is_causal=is_causal, scale=scale, **more)
    if {x.dtype for x in (q, k, v, attn_mask) if x is not None} - {q.dtype, torch.bool}:
        raise RuntimeError("attention: two dtypes")
    if attn_mask is not None and q.shape[1] != k.shape[1]:
        raise RuntimeError("attention: CUDA has no fast kernel for a mask and grouped heads")
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = q.float() @ k.float().transpose(2, 3) * (scale or q.shape[3] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(s.shape[2:], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        s = s.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else s + attn_mask
    return (s.softmax(-1) @ v.float()).to(q.dtype)


def pretend_gpu():
    """From here on this process has the device, and plm.py takes it for CUDA."""
    def pin_memory(x):
        x = x.clone()
        x.pinned = True
        return x

    setup = torch.utils.backend_registration
    module = type("Module", (setup._DummyBackendModule,), dict(
        get_amp_supported_dtype=lambda self: [torch.bfloat16],
        get_rng_state=lambda self, device=None: torch.zeros(1), set_rng_state=lambda *args: None))
    setup._setup_privateuseone_for_python_backend("gpu", backend_module=module())
    Gpu.libraries = aten, every = [torch.library.Library(name, "IMPL") for name in ("aten", "_")]
    every.fallback(on_gpu, "PrivateUse1")
    aten.impl("copy_", functools.partial(on_gpu, torch.ops.aten.copy_.default), "PrivateUse1")
    torch.Tensor.pin_memory, F.scaled_dot_product_attention = pin_memory, gpu_attention
    with open(plm.__file__, encoding="utf-8") as f:
        exec(compile(f.read().replace('"cuda"', '"gpu"'), plm.__file__, "exec"), vars(plm))


def tried_on(device, folder, head):
    """(losses of two steps and of validation, scores, answers) of a model in bfloat16."""
    torch.manual_seed(0)
    users, settings, losses = [f"u{i}" for i in range(4)], plm.RECIPES["ours"], []
    model, tokenizer = plm.load_model(folder, head, 3, device, torch.bfloat16, settings, users)
    name_of = plm.user_namer(model, tokenizer, "token", users)
    rows = [row._replace(user=name_of(f"u{i % 5}") + row.user, source=plm.Annotation("", "", ()))
            for i, row in enumerate(random_rows())]
    params, targets = model.trainable(), plm.n_targets(rows, head)
    with torch.no_grad():
        answers = (plm.write_answers if model.seq2seq else plm.grow_answers)(model, rows, {2}, 3)
    for _ in range(2):
        optimizer = plm.make_optimizer(model, settings)
        if losses:  # the run was stopped, and is taken up again
            plm.load_state(f"{folder}/state", params, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        WAITS.clear()
        batches = plm.micro_batches(model, rows, 6)
        result = plm.train_step(model, batches, targets, optimizer, 1.0)
        assert not losses or not WAITS, f"a step waits: {dict(WAITS)}"  # the first makes constants
        losses.append(result.tolist()[0])
        plm.save_state(f"{folder}/state", {}, params, optimizer, {})
    losses.append(plm.validate(model, rows, False, (0, [5, 6, 7]))["val_loss"])
    return losses, plm.label_scores(model, rows) if head == "cls" else np.ones(1), answers


def check_gpu(folder, head):
    """Tries a model on the pretended device. The numbers have to be the CPU's, but for rounding."""
    ours, theirs = (tried_on(device, folder, head) for device in (torch.device("gpu", 0), CPU))
    assert np.allclose(ours[0], theirs[0], rtol=0.05), f"losses {ours[0]}, on the CPU {theirs[0]}"
    assert np.linalg.norm(ours[1] - theirs[1]) < 0.2 * np.linalg.norm(theirs[1]), "scores"
    same = np.mean([a == b for a, b in zip(ours[2], theirs[2], strict=True)])
    assert same > 0.7, f"answers {ours[2]}, on the CPU {theirs[2]}"


def check_faults(folder):
    """Each of these has to be caught; the second is as plm.py was once."""
    tables, dequantize, loss = plm.tables, plm.NF4Linear.dequantize, plm.summed_loss
    for place, name, fault, says in [
            (plm, "tables", lambda device: tables(CPU), "a tensor on the CPU"),
            (plm, "tables", tables.__wrapped__, "a step waits.*copy_ in tables"),
            (torch.Tensor, "pin_memory", lambda x: x, "a step waits.*copy_ in"),
            (plm.NF4Linear, "dequantize", lambda layer: dequantize(layer).float(), "two dtypes"),
            (plm, "summed_loss", lambda *args: loss(*args) + 0 * loss(*args).item(),
             "a step waits.*_local_scalar_dense in train_step")]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, fault)
            with pytest.raises((AssertionError, RuntimeError), match=says):
                tried_on(torch.device("gpu", 0), folder, "cls")


def test_a_step_on_a_pretended_gpu(tmp_path):
    # In bfloat16: every architecture runs there, a step never waits, and seeded faults are caught.
    folders = [random_model_folder(tmp_path / name, name, 2048)[0]
               for name in ("llama", "mistral", "phi", "gpt_neox", "t5")]
    code = (f"import {__name__} as test; test.pretend_gpu(); folders = {folders}\n"
            "for folder in folders: test.check_gpu(folder, 'cls')\n"
            "test.check_gpu(folders[0], 'lm'); test.check_gpu(folders[-1], 'lm')\n"
            "test.check_faults(folders[0])")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          env=os.environ | {"TORCHDYNAMO_DISABLE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


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


def operations(model, batch):
    """What a training step on distinct tokens needs at least: 4 operations a frozen weight and
    token (none for a gradient of the weight), 12 D a layer for every token that a token sees."""
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
    assert operations(model, plm.make_batch(model, rows)) == 4 * linear + 12 * (4 * 8) * 2 * seen


def test_annotators_takes_the_first_of_every_text_that_has_as_many():
    rows = [plm.Annotation(text, str(i), (1,)) for i, text in enumerate("abcabca")]
    users = ["".join(a.user for a in annotators(rows, n)) for n in range(5)]
    assert users == ["0123456", "012", "012345", "036", ""]


def test_batches_of_any_size_hold_the_same_annotations():
    args = [plm.make_parser().parse_args(["cls_p", "--batch", n]) for n in ("8", "32", "128")]
    timed = [sorted(row.source for row in sum(timed_batches(a)[-1][1:], [])) for a in args]
    assert timed[0] == timed[1] == timed[2] and len(timed[0]) == 256


def peft_model(source, head, n_labels, device, dtype, settings):
    """As plm.load_model; NF4 of bitsandbytes, LoRA of PEFT, padded prompts."""
    def hidden(self, batch):
        flat = batch["inputs"]["input_ids"][0].tolist()
        ids, mask = plm.padded([[flat[i] for i in branch] for branch in batch["branches"]])
        out = lm.base_model(ids.to(device), mask.to(device), use_cache=False).last_hidden_state
        return out[mask.bool()].index_select(0, batch["at"])

    from peft import LoraConfig
    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    nf4 = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=dtype, **nf4)
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, device_map={"": str(device)}, quantization_config=nf4)
    lm.add_adapter(LoraConfig(r=settings["r"], target_modules="all-linear", **{
        f"lora_{key}": settings[key] for key in ("alpha", "dropout")}))
    nn.ModuleList(m for m in lm.modules() if hasattr(m, "quant_state")).train()  # not its dropout
    return type("PeftLM", (plm.PersonalizedLM,), dict(hidden=hidden))(lm, head, n_labels), None


def measure(args, peer):
    """What training takes, or prediction where nothing is trained; `peer` is PEFT, with 8 rows at
    once on a CPU, as fast as 32 in half the memory, or transformers' generate."""
    def generate(model, rows, ends, limit, share):
        model.lm.set_attn_implementation("sdpa")
        ids, mask = (x.flip(1).to(device) for x in plm.padded([row.prompt[::-1] for row in rows]))
        out = model.lm.generate(ids, attention_mask=mask, max_new_tokens=limit, do_sample=False,
                                eos_token_id=[*ends], pad_token_id=min(ends))
        return out[:, ids.shape[1]:].tolist()

    data, settings, tokenizer, batches = timed_batches(args)
    head, device, steps = plm.METHODS[args.command].head, plm.find_device(), []
    model, _ = (peft_model if peer and head != "ask" else plm.load_model)(
        tokenizer.name_or_path, head, len(data.labels), device,
        getattr(torch, args.dtype or "", None), settings)
    args.no_dense or plm.keep_dense(model)
    if head == "ask":
        plm.grow_answers = generate if peer else plm.grow_answers
        for rows in (batches[0][:4], sum(batches[1:], [])):  # a few to warm up
            start = time.perf_counter()
            said = plm.written_answers(model, tokenizer, rows, 8)
        return model.lm.dtype, said, dict(rate=len(rows) / (time.perf_counter() - start))
    optimizer, width = plm.make_optimizer(model, settings), model.lm.config.hidden_size
    micro = min(8 if peer and device.type == "cpu" else 999, settings["micro_batch"])
    for rows in batches:
        parts = plm.micro_batches(model, rows, micro, not (peer or args.no_share))
        start = time.perf_counter()
        loss, tokens = plm.train_step(model, parts, plm.n_targets(rows, head), optimizer,
                                      settings["clip"], data.single).tolist()
        steps.append((loss, len(rows), tokens, time.perf_counter() - start,
                      operations(model, plm.make_batch(model, rows))))
    memory, (_, n, tokens, seconds, needed) = plm.peak_memory_mb(), np.sum(steps[1:], 0).tolist()
    a = torch.randn(2 ** (15 if device.type == "cuda" else 12), width).to(device, model.lm.dtype)
    best = min(timeit.repeat(lambda: [a @ a[:width] for _ in range(9)][-1].sum().item(), number=1))
    return model.lm.dtype, [steps[0][0] * (head == "lm")], dict(rate=n / seconds, memory_mb=memory,
        tokens_a_row=tokens / n, mfu=needed / seconds * best / (9 * 2 * a.numel() * width))


def measure_quantizing(args, peer, n=4096):
    from bitsandbytes.functional import quantize_4bit
    torch.manual_seed(0)
    linear = nn.Linear(n, n, bias=False, device=plm.find_device())
    packed = ((lambda: quantize_4bit(linear.weight.data, None, None, 64, True, "nf4")[0]) if peer
              else lambda: plm.NF4Linear.from_linear(linear).packed)
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
           f"{plm.device_name(plm.find_device()).split(', ')[0]}: {method}{ours or ''}, {name}")
    print(f"\n{key}: {says}; {same:.0%} the same", flush=True)
    os.makedirs(args.out, exist_ok=True)
    plm.write_json(path := f"{args.out}/bench.json", (plm.read_json(path) or {}) | {key: lines})
