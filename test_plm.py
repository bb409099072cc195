"""Tests of plm.py, in the order of its sections. They show that the file is true: by oracles
(transformers' own forward pass and `generate`, the bytes of bitsandbytes, numbers of scikit-learn,
PEFT where it is installed, prompts word for word), by properties, and by runs of the commands. They
need no network and no GPU. The scripts in data/ have tests of their own."""
import ast
import contextlib
import copy
import csv
import errno
import fcntl
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import requests
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import plm

HERE = pathlib.Path(__file__).resolve().parent
sys.path.append(str(HERE / "data"))
import evidence  # noqa: E402
import readers  # noqa: E402

CPU = torch.device("cpu")
MOODS = ["calm", "angry"]


def go(line, *more):
    """The exit status of a command, in this process: importing torch takes seconds."""
    return plm.main([*line.split(), *more])


def refused(capsys, line, *more, program=plm):
    """The one line that a refused command leaves (behind a bar, where it took long)."""
    capsys.readouterr()
    assert program.main([*line.split(), *more]) == 2
    err = capsys.readouterr().err.split("\r")[-1].lstrip()
    assert err.startswith(f"{program.__name__}.py: ")
    assert err.count("\n") == 1
    return err


def write_csv(path, rows, header="text user calm angry"):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header.split(), *rows])
    return str(path)


def some_rows(n=120, users=("u0", "u1", "u2")):
    """Every text is read by three people, who disagree."""
    rows = []
    for i in range(n):
        text = f"comment number {i // 3} about thing {i // 3 * 7}"
        rows.append((text, users[i % 3], i % 2, 1 - i % 2))
    return rows


@pytest.fixture(scope="session")
def small_csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv", some_rows())


def dataset(labels=MOODS, single=False, none=False, ordered=False, train=()):
    parts = dict(train=list(train), val=[], test=[])
    return plm.Dataset("d", list(labels), single, ordered, none, parts, {}, "")


def configured(line, data=None):
    """The configuration that a command would have."""
    args = plm.make_parser().parse_args(line.split())
    return plm.make_config(args, data or dataset())


# 2. Annotations and splits ------------------------------------------------------------------------

@pytest.mark.parametrize("text", [
    "cut, with a comma", 'a "quoted"\nline\r\nbreak', "\U0001f600", "x" * 1_000_000,
    "</s> ### Response: <|endoftext|>"])
def test_any_text_survives_reading(tmp_path, text):
    rows = [(text, "with\nnewline", 0, 1), *some_rows()]
    found, what, _ = plm.read_annotations(write_csv(tmp_path / "a.csv", rows), None)
    annotation, part = found[0]
    assert what == dict(labels=MOODS, single=False, ordered=False)
    assert annotation == plm.Annotation(text, "with\nnewline", (0, 1))


def test_byte_order_mark_and_line_ends_are_no_part_of_the_data(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufefftext,user,calm\r\n"a, b",u,1\r\nc,u,0\r\n'.encode())
    found, what, _ = plm.read_annotations(tmp_path / "a.csv", None)
    assert [a for a, part in found] == [("a, b", "u", (0, 1)), ("c", "u", (1, 0))]


@pytest.mark.parametrize("content, says", [
    ("txt,user,a,b\nt,u,1,1", "needs exactly one column 'text', not txt, user, a, b"),
    ("text,user,user,b\nt,u,1,1", "needs exactly one column 'user'"),
    ("text,user,a,a\nt,u,1,0", "needs exactly one column 'a'"),
    ("text,user,a,b\nt,u,1,1\nt,u,2,1\nt,u,1,1", "row 2: 'a' is '2', not 0 or 1"),
    ("text,user,a,b\nt,u,1,1\n ,u,1,1", "row 2: 'text' is ' ', not a text"),
    ("text,user,a,b\nt,u,1,1\nt,u,,1", "row 2: 'a' is '', not 0 or 1"),
    ("text,user,a\nt,u,1\n\nt,u,", "row 2: 'a' is '', not one choice"),
    ("text,user,a\nt,u,1\nt, u,0", "row 2: 'user' is ' u', not a user ID"),
    ("text,user,a,b\nt,u,1,1\nt,u,1", "row 2: 'b' is '', not 0 or 1"),
    ("text,user,a,b\nt,u,1,1\nt,u,1,1,1", "row 2 has more cells than the header"),
    ("text,user,a, b\nt,u,1,1", "a column of labels is called ' b'"),
    ("text,user,a,\nt,u,1,1", "a column of labels is called ''"),
    ("", "no annotations"),
    ("text,user,a\n", "no annotations"),
    ("text,user\nt,u", "no column of labels"),
    ("text,user,a\ncaf\xe9,u,1\n", "UTF-8"),
    ("text,user,a\nt,3.91E+16,1", "row 1: 'user' is '3.91E+16', not a user ID"),
    ("text,user,mood\nt,u,joy#fear\nt,u,joy", "row 1: 'mood' is 'joy#fear', not one choice"),
    ("text,user,mood\nt,u,joy\nt,u,\"[\"\"joy\"\"]\"", "row 2: 'mood'"),
    ("text,user,a,split\nt,u,1,train\nt,u,1,dev", "row 2: 'split' is 'dev', not train")])
def test_a_file_of_another_form_is_refused_with_the_command_that_makes_it(tmp_path, content, says):
    path = tmp_path / "a.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(plm.BadInput) as e:
        plm.load_data(str(path))
    assert says in str(e.value)
    assert f"make data FILE={path}" in str(e.value)


@pytest.mark.parametrize("cells, labels, ordered, chosen", [
    ("0 1 1", "not X,X", False, "011"), ("3 1 10", "1,3,10", True, "102"),
    ("1 -1 0", "-1,0,1", True, "201"), ("1.5 2 1.5", "1.5,2", True, "010"),
    ("joy fear joy", "fear,joy", False, "101"), ("nan 1 nan", "1,nan", False, "101"),
    ("1 1e999 1", "1,1e999", False, "010")])  # as a number it would be infinite
def test_one_column_names_the_single_choice(tmp_path, cells, labels, ordered, chosen):
    rows = [(f"t{i}", "u", cell) for i, cell in enumerate(cells.split())]
    path = write_csv(tmp_path / "a.csv", rows, "text user X")
    found, what, _ = plm.read_annotations(path, None)
    assert what == dict(labels=labels.split(","), single=True, ordered=ordered)
    assert "".join(str(a.labels.index(1)) for a, part in found) == chosen


def test_one_value_is_no_choice(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("t", "u", "joy"), ("s", "u", "joy")], "text user mood")
    with pytest.raises(plm.BadInput, match="every row chooses 'joy'"):
        plm.load_data(path)


def test_a_long_cell_is_not_told_in_full(tmp_path):
    path = write_csv(tmp_path / "a.csv", [("t", "u", 1, "x" * 5000)])
    with pytest.raises(plm.BadInput) as e:
        plm.load_data(path)
    assert "'angry' is 'xxx" in str(e.value) and "not 0 or 1" in str(e.value)
    assert len(str(e.value)) < 500


def test_a_slash_behind_a_dataset_is_no_part_of_its_name():
    assert plm.load_data("sample/").name == "sample"


def test_texts_of_any_number_of_classes_are_no_choice(tmp_path):
    rows = [("t", "u", f"answer {i}") for i in range(101)]
    with pytest.raises(plm.BadInput, match="'X' holds 101 values, more than 100"):
        plm.load_data(write_csv(tmp_path / "a.csv", rows, "text user X"))


def test_a_split_column_is_followed_to_the_letter_and_what_is_odd_is_counted(tmp_path):
    rows = []
    for i, part in enumerate(["train", "train", "val", "test", "", "test"]):
        rows.append((f"t{i}", f"u{i % 4}", i % 2, 1, part, "train", "2020"))
    path = write_csv(tmp_path / "a.csv", rows, "text user a b draw other time")
    data = plm.load_data(path, "draw")
    texts = {part: [a.text for a in found] for part, found in data.parts.items()}
    assert data.labels == ["a", "b"]  # neither the other split nor the time is a label
    assert texts == dict(train=["t0", "t1"], val=["t2"], test=["t3", "t5"])
    assert data.notes == {"rows read": 6, "split by": "draw", "rows left out": 1,
                          "rows of users unknown to training": 2}


def test_a_column_named_split_is_taken_without_a_flag(tmp_path):
    parts = ["train", "val", "test"]
    rows = [(f"t{i}", "u", i % 2, 1, parts[i % 3]) for i in range(9)]
    data = plm.load_data(write_csv(tmp_path / "a.csv", rows, "text user a b split"))
    assert [a.text for a in data.parts["test"]] == ["t2", "t5", "t8"]


def test_hashed_splits_share_no_text_and_know_every_user(tmp_path):
    rows = [(f"text {i} {'!' * (i % 3)}", f"u{i % 40}", i % 2, i % 7 % 2) for i in range(900)]
    rows.append(("  TEXT 7 !", "u7", 0, 1))  # the same text but for case and space
    rows += [(f"text {i}", f"new {i}", 0, 1) for i in range(900, 960)]
    data = plm.load_data(write_csv(tmp_path / "a.csv", rows))
    known = {a.user for a in data.parts["train"]}
    seen = []
    for part in data.parts.values():
        seen += {plm.text_id(a.text) for a in part}
        assert {a.user for a in part} <= known
    assert len(set(seen)) == len(seen)
    assert 0.6 < len(data.parts["train"]) / len(rows) < 0.8
    assert data.notes["rows left out"] == len(rows) - sum(map(len, data.parts.values()))


def test_readers_whom_training_does_not_know_are_counted_when_nobody_is_left(tmp_path):
    rows = [(text, f"{user} {i}", a, b) for i, (text, user, a, b) in enumerate(some_rows(60))]
    says = r"no row for val; .*rows of users unknown to training': [1-9]"
    with pytest.raises(plm.BadInput, match=says):
        plm.load_data(write_csv(tmp_path / "a.csv", rows))


def test_max_eval_takes_whole_random_texts_over_all_users(tmp_path):
    # The first rows of a file that is sorted by user would all be those of one.
    rows = [(f"u{u}", f"text {t}", u % 2, t % 2) for u in range(4) for t in range(200)]
    path = write_csv(tmp_path / "a.csv", rows, "user text a b")
    whole = plm.load_data(path).parts
    some = plm.load_data(path, max_eval=20).parts
    chosen = {a.text for a in some["test"]}
    first = list(dict.fromkeys(a.text for a in whole["test"]))[:5]
    assert some["train"] == whole["train"]
    assert len(some["val"]) == len(some["test"]) == 20
    assert some["test"] == [a for a in whole["test"] if a.text in chosen]
    assert len(chosen) == 5 and chosen != set(first)
    assert plm.load_data(path, max_eval=20).parts == some


def test_rows_in_which_nothing_is_chosen_stay(tmp_path):
    rows = [(text, user, calm, 0) for text, user, calm, angry in some_rows()]
    data = plm.load_data(write_csv(tmp_path / "a.csv", rows))
    assert data.none
    assert sum(map(len, data.parts.values())) == len(rows)
    assert not plm.load_data(write_csv(tmp_path / "b.csv", some_rows())).none


@pytest.mark.parametrize("users, choices, says", [
    ("ab", ["1", "2", "1.0"], "'stars' spells a value in two ways"),
    ("ab", ["good", "bad", "good "], "row 3: 'stars' is 'good ', not one choice"),
    (["a", "a "], ["good", "bad"], "row 3: 'user' is 'a ', not a user ID")])
def test_one_value_or_user_in_two_spellings_is_refused(tmp_path, capsys, users, choices, says):
    rows = [(f"text {i}", user, choice) for user in users for i, choice in enumerate(choices)]
    path = write_csv(tmp_path / "a.csv", rows, "text user stars")
    assert says in refused(capsys, f"cls --data {path}")


# 3. Prompts ---------------------------------------------------------------------------------------

ASKED = "Answer with labels from the list, separated by commas.\n### Labels: A, B, C"
ASK = f"Which of the labels fit the text? {ASKED}"
ASK_P = f"Which of the labels would this user choose for the text? {ASKED}"
ASK_SHOWN = f"Which of the labels fit the text? First see how other people answered. {ASKED}"
ASK_SHOWN_P = ("Which of the labels would this user choose for the text? "
               f"First see how this user answered before. {ASKED}")
PLAIN = f"""{ASK}
### Text: well
### Response:"""
SHOWN = f"""{ASK_SHOWN}
### Text: hi
### Response: A
### Text: well
### Response:"""
SHOWN_2 = f"""{ASK_SHOWN}
### Text: hi
### Response: A
### Text: go away
### Response: A, C
### Text: well
### Response:"""
PROMPTS = dict(cls=PLAIN, lm=PLAIN, q_0s=PLAIN, q_1s=SHOWN, q_2s=SHOWN_2)
PROMPTS_TREE = PROMPTS | dict(
    cls_p=f"""{ASK_P}
### Text: well
### User ID: u2""",
    lm_p=f"""{ASK_P}
### Text: well
### User ID: u2:""",
    q_0s_p=f"""{ASK_P}
### Text: well
### User ID: u2
### Response:""",
    q_1s_p=f"""{ASK_SHOWN_P}
### Text: hi
### Response: A
### Text: well
### User ID: u2
### Response:""",
    q_2s_p=f"""{ASK_SHOWN_P}
### Text: hi
### Response: A
### Text: go away
### Response: A, C
### Text: well
### User ID: u2
### Response:""")
PAPER = f"""{ASK_P}
### User ID: u2
### Text: well
### Response:"""
PROMPTS_PAPER = PROMPTS | dict(
    cls_p=PAPER, lm_p=PAPER, q_0s_p=PAPER,
    q_1s_p=f"""{ASK_SHOWN_P}
### User ID: u2
### Text: hi
### Response: A
### Text: well
### Response:""",
    q_2s_p=f"""{ASK_SHOWN_P}
### User ID: u2
### Text: hi
### Response: A
### Text: go away
### Response: A, C
### Text: well
### Response:""")
GOLDEN = [("tree", name, prompt) for name, prompt in PROMPTS_TREE.items()]
GOLDEN += [("paper", name, prompt) for name, prompt in PROMPTS_PAPER.items()]


def whole_prompt(config, text, user, examples=()):
    return "".join(string for kind, string in plm.prompt_pieces(config, text, user, examples))


@pytest.mark.parametrize("style, name, golden", GOLDEN)
def test_prompts_word_for_word(style, name, golden):
    config = configured(f"{name} --prompt {style}", dataset("ABC"))
    shown = [plm.Annotation("hi", "u2", (1, 0, 0)), plm.Annotation("go away", "u2", (1, 0, 1))]
    examples = shown[:plm.METHODS[name].shots]
    assert whole_prompt(config, "well", "u2", examples) == golden


def test_every_method_that_has_a_model_has_a_golden_prompt():
    asked = {name for name, method in plm.METHODS.items() if method.head != "rates"}
    assert asked == set(PROMPTS_TREE) == set(PROMPTS_PAPER)


@pytest.mark.parametrize("single, none, how", [
    (False, False, "Answer with labels from the list, separated by commas."),
    (False, True, "Answer with labels from the list, separated by commas, or with none."),
    (True, False, "Answer with one label from the list.")])
def test_an_instruction_says_what_may_be_answered(single, none, how):
    config = configured("lm", dataset("ABC", single, none))
    expected = f"Which of the labels fit the text? {how}\n### Labels: A, B, C"
    assert plm.instruction(config) == expected


@pytest.mark.parametrize("chosen, answer", [
    ((1, 0, 1), " A, C"), ((0, 1, 0), " B"), ((0, 0, 0), " none")])
def test_an_answer_names_the_chosen_labels_in_order(chosen, answer):
    assert plm.answer_text("ABC", chosen) == answer


def tiny_tokenizer(name="tiny"):
    return transformers.AutoTokenizer.from_pretrained(plm.MODELS[name])


def marked_tokenizer(kind):
    """A tiny tokenizer made one of SentencePiece's kind, which marks where words begin: Llama's
    (BPE, <s> before a text), Mistral's (the same) or T5's (Unigram, </s> behind)."""
    tokenizer = tiny_tokenizer("tiny_t5" if kind == "t5" else "tiny")
    backend = tokenizer.backend_tokenizer
    tokens = tokenizer.convert_ids_to_tokens(range(2048))
    scheme = "first" if kind == "llama" else "always"
    backend.normalizer = tokenizers.normalizers.Replace("\n", "\u010a")  # as their words have it
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("\u0120", scheme)
    if kind == "t5":
        scores = [(token, -5 if len(token) > 1 else -9) for token in tokens]
        backend.model = tokenizers.models.Unigram(scores, 2)
    return tokenizer


@pytest.mark.parametrize("kind", ["tiny", "tiny_t5", "llama", "t5", "mistral"])
@pytest.mark.parametrize("line", ["cls", "cls_p", "lm_p", "q_2s_p", "lm_p --recipe paper"])
def test_the_tokens_of_a_prompt_are_those_of_the_whole_string(kind, line):
    # Pieces are tokenized by themselves, and a model has to see what it would see of the whole.
    tokenizer = tiny_tokenizer(kind) if "tiny" in kind else marked_tokenizer(kind)
    train = [plm.Annotation(f"comment {i}, calm", "12", (1, 0)) for i in range(3)]
    config = configured(f"{line} --ids number", dataset(train=train))
    asked = plm.Annotation("and a comment on Text, which is: angry?", "12", (1, 1))
    rows, counts = plm.encode_rows(tokenizer, config, [asked], train, {})
    examples = plm.example_chooser(config, train)(asked)
    prompt = whole_prompt(config, asked.text, "12", examples)
    assert list(rows[0].prompt) == tokenizer(prompt).input_ids
    if tokenizer.bos_token_id is not None:
        both = rows[0].prompt + rows[0].answer[:-1]
        assert list(both) == tokenizer(prompt + " calm, angry").input_ids
    else:  # the decoder of a T5 writes a text of its own
        own = "calm, angry" if kind == "t5" else " calm, angry"
        assert list(rows[0].answer) == tokenizer(own).input_ids


@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_special_tokens_inside_a_text_or_user_are_letters(name):
    tokenizer = tiny_tokenizer(name)
    config = configured("lm_p --ids number")
    text = "</s> <s> <pad> ### Response: calm</s>"
    rows, _ = plm.encode_rows(tokenizer, config, [plm.Annotation(text, "u</s>2\n", (1, 1))], [], {})
    prompt = rows[0].prompt
    inside = prompt[1:] if name == "tiny" else prompt[:-1]  # <s> stands before it, </s> behind
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert not special.intersection(inside)
    assert rows[0].answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(rows[0].answer[:-1]) == " calm, angry"


def test_long_texts_are_cut_and_counted_and_nothing_else_is():
    tokenizer = tiny_tokenizer()
    config = configured("lm_p --ids number --max-text 50")
    asked = [plm.Annotation("word " * n, "u2", (1, 1)) for n in (10, 3000, 3000, 4000)]
    rows, counts = plm.encode_rows(tokenizer, config, asked, [], {})
    end = tokenizer("\n### User ID: u2:", add_special_tokens=False).input_ids
    assert counts["texts_cut"] == 2  # texts, of which one has two rows
    assert len(rows[1].prompt) == len(rows[3].prompt)
    for row in rows:
        assert list(row.prompt[-len(end):]) == end


TEMPLATE = ("{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
            "{% if add_generation_prompt %}bot:{% endif %}")


def asked_with(template, line="q_0s_p"):
    """(ids, text) of a prompt of a model with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    config = configured(f"{line} --ids number")
    asked = [plm.Annotation("</s> hello", "u2", (1, 0))]
    rows, _ = plm.encode_rows(tokenizer, config, asked, [], {})
    return rows[0].prompt, tokenizer.decode(rows[0].prompt)


def test_a_chat_template_goes_around_a_question():
    ids, text = asked_with(TEMPLATE)
    assert text.replace(" ", "").startswith("<s>user:")
    assert text.endswith("bot:")
    assert ids.count(tiny_tokenizer().eos_token_id) == 1  # the template's; not the text's


def test_a_chat_template_goes_around_nothing_that_is_trained():
    assert asked_with(TEMPLATE, "lm_p") == asked_with(None, "lm_p")


@pytest.mark.parametrize("template", [
    "{{ raise_exception('a system message comes first') }}",
    "{% for m in messages %}{{ m['content'] }} {{ m['content'] }}{% endfor %}",
    "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}"])
def test_a_chat_template_that_takes_no_plain_question_is_left_out_with_a_word(capsys, template):
    plain = asked_with(None)
    assert asked_with(template) == plain
    assert "takes no plain question" in capsys.readouterr().out


EXAMPLES = [plm.Annotation(f"train {i}", f"u{i % 7}", (1, 0)) for i in range(60)]


@pytest.mark.parametrize("name", ["q_1s", "q_2s", "q_1s_p", "q_2s_p"])
def test_examples_come_from_the_right_people(name):
    method = plm.METHODS[name]
    choose = plm.example_chooser(configured(name), EXAMPLES)
    for i in range(20):
        asked = plm.Annotation(f"test {i}", f"u{i % 9}", (0, 1))
        shown = choose(asked)
        has_own = i % 9 < 7  # u7 and u8 are not in training
        assert len(shown) == (0 if method.personalized and not has_own else method.shots)
        assert len(set(shown)) == len(shown)
        assert all((a.user == asked.user) == method.personalized for a in shown)
        assert shown == choose(asked)  # they are the row's, whatever came before


@pytest.mark.parametrize("name", ["q_2s", "q_2s_p"])
def test_an_example_is_never_the_text_that_is_asked(name):
    # A split column may leave a text in training, too: its answers would tell the answer.
    same = [a._replace(text=" TEST") for a in EXAMPLES[:50]] + EXAMPLES[50:]
    choose = plm.example_chooser(configured(name), same)
    for i in range(7):
        shown = choose(plm.Annotation("test", f"u{i}", (0, 1)))
        assert " TEST" not in [a.text for a in shown]


def test_rows_that_have_fewer_examples_are_counted():
    train = [plm.Annotation("a", "u1", (1, 0))] * 5
    asked = [plm.Annotation("t", user, (1, 0)) for user in ("u1", "u2")]
    rows, counts = plm.encode_rows(tiny_tokenizer(), configured("q_2s_p"), asked, train, {})
    assert counts["too_few_examples"] == 2  # an annotation that stands there five times is one


def test_a_user_is_a_token_behind_the_vocabulary_and_a_stranger_is_nobody():
    tokenizer = tiny_tokenizer()
    config = configured("cls_p")
    names = plm.ids_of_users(config, ["a7", "b8"], 2048)
    asked = [plm.Annotation("hi", user, (0, 1)) for user in ("a7", "b8", "new", "newer")]
    rows, _ = plm.encode_rows(tokenizer, config, asked, [], names)
    assert names == {"a7": 2048, "b8": 2049, plm.NOBODY: 2050}
    assert [row.prompt[row.reader_at] for row in rows] == [2048, 2049, 2050, 2050]
    for row in rows:
        assert row.prompt[:row.reader_at] == rows[0].prompt[:row.reader_at]
        assert row.nobody == rows[2].prompt


def test_a_user_of_the_paper_is_a_number():
    tokenizer = tiny_tokenizer()
    config = configured("cls_p --recipe paper")
    names = plm.ids_of_users(config, ["17"], 2048)
    rows, _ = plm.encode_rows(tokenizer, config, [plm.Annotation("hi", "17", (0, 1))], [], names)
    assert names == {}
    assert rows[0].nobody == ()
    assert "### User ID: 17\n" in tokenizer.decode(rows[0].prompt)


def dataset_of(labels, rows, single=False):
    """A dataset with rows that choose these labels, as "01 11"."""
    train = [plm.Annotation("t", "u", tuple(map(int, row))) for row in rows.split()]
    return dataset(labels, single, train=train)


@pytest.mark.parametrize("labels, rows", [
    (["Anger", "anger!"], "11"), (["None"], "1 0"), (["fear", "joy", "fear joy"], "110"),
    (["a", "b", "a, b"], "100 110")])
def test_labels_that_an_answer_cannot_tell_apart_are_refused(labels, rows):
    data = dataset_of(labels, rows)
    with pytest.raises(plm.BadInput, match="could mean other labels"):
        plm.check_answers(data)


def test_labels_that_an_answer_tells_apart_are_taken():
    plm.check_answers(dataset_of(["a,b", "c", "d"], "100 010 001", single=True))
    plm.check_answers(dataset_of(["a,b", "c"], "11 10 01 00"))


@pytest.mark.parametrize("single", [False, True])
def test_a_label_that_reads_like_no_label_is_for_classifiers_alone(single):
    data = dataset_of(["none", "sad"], "10 01", single)
    for method in ("lm", "lm_p", "q_0s", "q_2s_p"):
        with pytest.raises(plm.BadInput, match="a label is called 'none', which is the answer"):
            configured(method, data)
    for method in ("cls", "cls_p", "rates"):
        assert configured(method, data)["labels"] == ["none", "sad"]


def test_the_room_for_an_answer_is_that_of_the_longest_in_the_data():
    labels = [f"a rather long label, number {i}" for i in range(20)]
    chosen = (1,) * 20
    data = dataset(labels, train=[plm.Annotation("t", "u", chosen)])
    answer = plm.answer_text(labels, chosen)
    for name in ("tiny", "tiny_t5"):
        assert plm.answer_room(data) > len(plm.tokenize(tiny_tokenizer(name), answer)) / 2
    assert plm.answer_room(dataset()) == 32


@pytest.mark.parametrize("labels, place", [(["calm", "angry"], 0), (["is_calm", "is_angry"], 1)])
def test_labels_are_told_apart_at_the_first_token_that_differs(labels, place):
    tokenizer = tiny_tokenizer()
    found, tokens = plm.label_tokens(tokenizer, configured("lm", dataset(labels, single=True)))
    answers = [plm.tokenize(tokenizer, f" {label}") for label in labels]
    assert found >= place
    assert tokens == [answer[found] for answer in answers]
    assert answers[0][:found] == answers[1][:found]


def test_that_labels_begin_with_the_same_token_is_said(capsys):
    labels = ["very calm", "very angry", "neither"]
    config = configured("lm", dataset(labels, single=True))
    _, tokens = plm.label_tokens(tiny_tokenizer(), config)
    assert tokens[0] == tokens[1]  # and so have the same score
    assert "scores do not" in capsys.readouterr().out


# 4. NF4 and 5. LoRA -------------------------------------------------------------------------------

def quantized(weight):
    return plm.NF4Linear(SimpleNamespace(weight=weight, bias=None))


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    # QLoRA, appendix E: 8 quantiles above 0 and 7 below, equally spaced in probability.
    edge = 0.9677083
    above = torch.special.ndtri(torch.tensor(np.linspace(edge, 0.5, 9)))
    below = torch.special.ndtri(torch.tensor(np.linspace(edge, 0.5, 8)))
    values = torch.cat([-below, above[:-1].flip(0)]) / above[0]
    assert torch.allclose(values, plm.NF4.double(), atol=2e-7)


def test_the_dynamic_map_has_256_values_in_order():
    code = plm.dynamic_map()
    assert len(code) == 256
    assert torch.equal(code, code.unique())
    assert code[127] == 0 and code[-1] == 1


def test_bytes_are_those_of_bitsandbytes():
    # Recorded from bitsandbytes 0.50.2: quantize_4bit(weight, blocksize=64, quant_type="nf4",
    # compress_statistics=True). Blocks of three scales, one of zeros; two blocks of absmax.
    i = torch.arange(48 * 344)
    weight = (i * 7919 % 4001 - 2000).float() / 512 * (1 + i // 2000 % 3)
    weight[640:704] = 0
    layer = quantized(weight.view(48, 344))
    recorded = {"91bd7823b50d": layer.packed, "4f1f920137ea": layer.absmax_code,
                "7c7d88e2f2e5": layer.absmax_scale, "35ee6bb71a0e": layer.absmax_offset,
                "24320ad4b8d4": layer.dequantize()}
    for sha, stored in recorded.items():
        assert hashlib.sha256(stored.numpy().tobytes()).hexdigest()[:12] == sha
    assert layer.packed[:4].tolist() == [0x0F, 0xFF, 0xEE, 0xEE]  # first weight in the high half


def normal_weight():
    torch.manual_seed(0)
    return torch.randn(1024, 1024)


def test_the_mean_error_is_what_bitsandbytes_publishes():
    # Its tests list, for blocks of 64 of N(0, 1): mean 0.072798, std 0.000074 over 200 samples.
    weight = normal_weight()
    error = (quantized(weight).dequantize() - weight).abs().mean()
    assert abs(error - 0.0728) < 7 * 0.000074 + 0.0001  # double quantization adds 0.0001


def test_no_weight_is_further_off_than_half_the_widest_gap():
    weight = normal_weight()
    layer = quantized(weight)
    absmax = weight.view(-1, 64).abs().amax(1)
    largest = (layer.dequantize() - weight).abs().view(-1, 64).amax(1)
    assert (largest <= 0.152 * absmax + (layer.absmax() - absmax).abs()).all()


def test_a_weight_takes_4_127_bits():
    stored = sum(buffer.nbytes for buffer in quantized(normal_weight()).buffers())
    assert 8 * stored / 1024 ** 2 == pytest.approx(4.127, abs=0.001)


@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 129), (2, 131_072 + 64)])
def test_odd_sizes_and_zeros(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    off = (quantized(weight).dequantize() - weight).abs().max()
    assert off < 0.16 * weight.abs().max()
    assert torch.equal(quantized(0 * weight).dequantize(), 0 * weight)


def test_nf4_matmul_is_the_dense_one_with_its_gradient():
    torch.manual_seed(0)
    layer = quantized(torch.randn(96, 128))
    x = torch.randn(5, 128, requires_grad=True)
    y = layer(x)
    dense = F.linear(x, layer.dequantize())
    ours = torch.autograd.grad(y.square().sum(), x)[0]
    theirs = torch.autograd.grad(dense.square().sum(), x)[0]
    assert torch.equal(y, dense)
    assert torch.allclose(ours, theirs)


def test_nf4_matmul_keeps_no_dense_weight_for_the_backward_pass():
    layer = quantized(torch.randn(96, 128))
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(5, 128, requires_grad=True))
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= 96 * 128]


def test_a_dense_copy_is_of_the_rounded_weights():
    layer = quantized(torch.randn(96, 128))
    x = torch.randn(5, 128)
    packed = layer(x)
    layer.dense = layer.dequantize()
    assert torch.equal(layer(x), packed)


def small_lora(dropout):
    """(layer of rank 2 whose B is not zero, in training; inputs)"""
    torch.manual_seed(0)
    layer = plm.LoRALinear(quantized(torch.randn(24, 64)), 2, 32, dropout)
    nn.init.normal_(layer.lora_B)
    return layer, torch.randn(3, 64)


def test_lora_begins_as_nothing():
    layer = plm.LoRALinear(quantized(torch.randn(24, 64)), 2, 32, 0.5)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base(x))


def test_lora_is_w_plus_ba_with_autograds_gradients():
    layer, x = small_lora(dropout=0.0)
    x.requires_grad_()
    leaves = [x, layer.lora_A, layer.lora_B]
    W = layer.base.dequantize() + 32 / 2 * layer.lora_B @ layer.lora_A
    dense = F.linear(x, W)
    ours = torch.autograd.grad(layer(x).sin().sum(), leaves)
    theirs = torch.autograd.grad(dense.sin().sum(), leaves)
    assert torch.allclose(layer(x), dense, atol=1e-4)
    for a, b in zip(ours, theirs):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
        assert a.abs().max() > 0


def test_dropout_keeps_the_mean_of_lora_and_leaves_the_base_alone():
    layer, x = small_lora(dropout=0.3)
    many = layer(x[:1].expand(40_000, -1))
    own = layer.eval()(x[:1])[0]
    assert many.std(0).min() > 0
    assert torch.allclose(many.mean(0), own, atol=0.02 * own.abs().max().item())
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), layer.base(x))


# 6. The prompt tree -------------------------------------------------------------------------------

TEXT, WELL, NICE, USER_17, USER_44 = range(5)
DRAWN = [(TEXT, WELL, USER_17), (TEXT, WELL, USER_44), (TEXT, NICE, USER_17)]


def test_the_tree_is_the_one_that_section_6_draws():
    input_ids, positions, parents, branches = plm.prompt_tree(DRAWN)
    assert input_ids == [TEXT, WELL, USER_17, USER_44, NICE, USER_17]
    assert parents == [-1, 0, 1, 1, 0, 4]
    assert positions == [0, 1, 2, 2, 1, 2]
    assert branches == [[0, 1, 2], [0, 1, 3], [0, 4, 5]]


def test_the_mask_is_the_one_that_section_6_draws():
    drawn = ["x     ",
             "xx    ",
             "xxx   ",
             "xx x  ",
             "x   x ",
             "x   xx"]
    sees = plm.tree_mask([-1, 0, 1, 1, 0, 4])
    shown = np.where(sees, "x", " ")
    assert ["".join(line) for line in shown] == drawn


def test_the_mask_is_added_as_0_or_minus_infinity():
    mask = plm.additive_mask(torch.tensor([[True, False], [True, True]]), torch.bfloat16)
    assert mask.shape == (1, 1, 2, 2)
    assert mask.dtype == torch.bfloat16
    assert mask[0, 0].tolist() == [[0, -math.inf], [0, 0]]


def test_a_block_looks_at_what_its_nodes_see(monkeypatch):
    monkeypatch.setattr(plm, "BLOCK", 2)
    sees = plm.tree_mask([-1, 0, 1, 1, 0, 4])  # of the tree in the comment
    assert [seen.tolist() for seen in plm.tree_blocks(sees)] == [[0, 1], [0, 1, 2, 3], [0, 4, 5]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_by_blocks_is_attention_over_the_whole_mask(monkeypatch, kv_heads):
    monkeypatch.setattr(plm, "BLOCK", 3)
    sees = plm.tree_mask([-1, 0, 1, 1, 3, 1, 5, 2])
    mask = plm.additive_mask(sees, torch.float32)
    query = torch.randn(1, 4, 8, 6)
    key, value = torch.randn(2, 1, kv_heads, 8, 6)
    blocks = plm.tree_blocks(sees)
    assert [len(seen) for seen in blocks] == [3, 5, 6]
    found, _ = plm.tree_attention(None, query, key, value, mask, 0.3, blocks)
    repeated = [x.repeat_interleave(4 // kv_heads, dim=1) for x in (key, value)]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    assert torch.allclose(found, theirs, atol=1e-6)


def test_without_sharing_every_path_has_its_own_nodes():
    input_ids, positions, parents, branches = plm.prompt_tree(DRAWN, share=False)
    assert input_ids == [*DRAWN[0], *DRAWN[1], *DRAWN[2]]
    assert positions == [0, 1, 2] * 3
    assert branches == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    sees = plm.tree_mask(parents)
    assert torch.equal(sees, torch.block_diag(*[torch.ones(3, 3).tril()] * 3).bool())


def random_rows(seed=1, texts=4):
    """Rows that share an instruction; some texts, with one to four readers of each."""
    rng = random.Random(seed)

    def ids(least, most):
        return tuple(rng.randrange(5, 90) for _ in range(rng.randint(least, most)))

    instruction = ids(9, 9)
    rows = []
    for i in range(texts):
        text = ids(3, 29)
        if i == 1:
            text = (2, 2, 9, 2)  # the end and padding token changes nothing but itself
        for _ in range(rng.randint(1, 4)):
            user = rng.randrange(5, 9)
            prompt = instruction + text + (7, user, 8)
            labels = (rng.randrange(2), 1, 0)
            rows.append(plm.Row(prompt, len(prompt) - 2, (), ids(1, 3) + (2,), labels,
                                plm.Annotation(f"text {i}", str(user), labels)))
    return rows


def test_every_distinct_prefix_is_one_node():
    paths = [row.prompt + row.answer for row in random_rows()]
    prefixes = set()
    for path in paths:
        prefixes |= {path[:n] for n in range(1, len(path) + 1)}
    input_ids, positions, parents, branches = plm.prompt_tree(paths)
    assert len(input_ids) == len(prefixes)
    for path, branch in zip(paths, branches):
        assert [input_ids[node] for node in branch] == list(path)
        assert [positions[node] for node in branch] == list(range(len(path)))


# 7. The model and its two heads -------------------------------------------------------------------

SUPPORTED = "llama mistral qwen2 qwen3 phi gpt_neox gpt2 gemma olmo2 smollm3 t5".split()
TRAINED = [name for name in SUPPORTED if name != "gpt2"]  # its layers are no nn.Linear
REFUSED = "gpt_oss mixtral lfm2 bert granite bloom gemma2".split()
VOCABULARY = 2304  # the tokenizer of qwen2 adds some tokens to the 2048 of the tiny one
SPECIAL = {  # what the configuration of an architecture needs besides
    "t5": dict(d_kv=16, d_ff=128, feed_forward_proj="gated-gelu", num_layers=2,
               decoder_start_token_id=0, dropout_rate=0.0),
    "phi": dict(num_key_value_heads=4),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "granite": dict(logits_scaling=8.0),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "gpt_oss": dict(num_local_experts=4),
    "mixtral": dict(num_local_experts=4),
}


def random_model(path, name, **more):
    """(folder, transformers' model) of a small random model of an architecture. The folder has a
    tiny tokenizer."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16,
                 num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
                 pad_token_id=2, eos_token_id=2, bos_token_id=1)
    settings = sizes | SPECIAL.get(name, {}) | more
    config = transformers.AutoConfig.for_model(name, **settings)
    torch.manual_seed(0)
    if name == "t5":
        lm = transformers.AutoModelForSeq2SeqLM.from_config(config)
    else:
        lm = transformers.AutoModelForCausalLM.from_config(config)
    for p in lm.parameters():  # all of it is random: norms and biases too
        p.data += 0.1 * torch.randn_like(p)
    lm.save_pretrained(path)
    tokenizer = plm.MODELS["tiny_t5" if name == "t5" else "tiny"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"{tokenizer}/{file}", path)
    return str(path), lm.eval()


@pytest.fixture(scope="session", params=SUPPORTED)
def architecture(request, tmp_path_factory):
    """(folder, transformers' model) of every supported architecture."""
    return random_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture
def small_blocks(monkeypatch):
    """Attention by blocks so small that a test's tree has several of them."""
    monkeypatch.setattr(plm, "BLOCK", 16)


def quantized_lm(path):
    lm, tokenizer = plm.load_pretrained(path)
    return plm.freeze(lm, CPU)


def plain_model(path, head="lm", user_rows=()):
    """A model without LoRA; user_rows (U, D): the embeddings of its users."""
    model = plm.PersonalizedLM(quantized_lm(path), head, 3, len(user_rows)).train(False)
    if len(user_rows):
        model.user_embedding.data = user_rows
    return model


def lora_model(path, head, user_rows=()):
    """A model with LoRA whose B is not zero, so that all gradients are there."""
    torch.manual_seed(1)
    model = plain_model(path, head, user_rows)
    plm.add_lora(model.lm, r=2, alpha=4, dropout=0.0)
    for layer in model.modules():
        if isinstance(layer, plm.LoRALinear):
            nn.init.normal_(layer.lora_B, std=0.1)
    return model


def rounded_reference(model, lm):
    """A copy of transformers' own model with the rounded weights of ours."""
    reference = copy.deepcopy(lm)
    for path, layer in model.lm.named_modules():
        if isinstance(layer, plm.NF4Linear):
            reference.get_submodule(path.removesuffix(".base")).weight.data = layer.dequantize()
    return reference.eval()


def their_output(lm, row):
    """What transformers' own model returns for a row by itself: a prompt and its answer."""
    answer = row.answer[:-1]
    if lm.config.is_encoder_decoder:
        inputs = dict(input_ids=torch.tensor([row.prompt]),
                      decoder_input_ids=torch.tensor([(0, *answer)]))
    else:
        inputs = dict(input_ids=torch.tensor([row.prompt + answer]))
    return lm(**inputs, use_cache=False, output_hidden_states=True)


def their_logits(lm, row):
    """(tokens of the answer, V)"""
    return their_output(lm, row).logits[0, -len(row.answer):]


def their_state(lm, row):
    """(1, D) the state that a classification head reads."""
    out = their_output(lm, row._replace(answer=(2,)))
    states = out.get("decoder_hidden_states") or out["hidden_states"]
    return states[-1][:, -1]


def test_the_linear_layers_of_the_backbone_are_quantized_and_no_head_is(architecture):
    path, lm = architecture
    ours = quantized_lm(path)
    linear = {name for name, m in lm.named_modules() if isinstance(m, nn.Linear)}
    packed = {name for name, m in ours.named_modules() if isinstance(m, plm.NF4Linear)}
    dense = {name for name, m in ours.named_modules() if isinstance(m, nn.Linear)}
    assert len(dense) == 1
    assert packed | dense == linear
    assert ours.get_submodule(*dense) is ours.get_output_embeddings()


@torch.no_grad()
@pytest.mark.parametrize("share", [True, False])
def test_logits_are_those_of_transformers_of_each_prompt_alone(
        small_blocks, architecture, share):
    path, lm = architecture
    model = plain_model(path)
    model.share = share
    reference = rounded_reference(model, lm)
    rows = random_rows()
    theirs = torch.cat([their_logits(reference, row) for row in rows])
    assert torch.allclose(model(plm.make_batch(model, rows)), theirs, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("share", [True, False])
def test_states_are_those_of_transformers_of_each_prompt_alone(
        small_blocks, architecture, share):
    path, lm = architecture
    model = plain_model(path, "cls")
    model.share = share
    reference = rounded_reference(model, lm)
    rows = random_rows()
    theirs = torch.cat([their_state(reference, row) for row in rows])
    assert torch.allclose(model.hidden(plm.make_batch(model, rows)), theirs, atol=2e-5)


def until_end(ids):
    return ids[:ids.index(2)] if 2 in ids else ids


@torch.no_grad()
def test_greedy_answers_are_those_of_generate_one_by_one(small_blocks, architecture):
    path, lm = architecture
    model = plain_model(path)
    reference = rounded_reference(model, lm)
    prompts = [row.prompt for row in random_rows()]
    write = plm.write_with_encoder_decoder if model.seq2seq else plm.write_with_decoder
    ours = write(model, prompts, [2], 9)
    for prompt, answer in zip(prompts, ours):
        ids = torch.tensor([prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9,
                                 do_sample=False, pad_token_id=2, eos_token_id=2)[0].tolist()
        theirs = out[1:] if model.seq2seq else out[len(prompt):]
        assert until_end(answer) == until_end(theirs)


def our_step(model, rows, size):
    """(loss, dict name -> gradient) of a training step in micro-batches of `size` rows. SGD moves
    parameters by their gradient."""
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    batches = [plm.make_batch(model, rows[i:i + size]) for i in range(0, len(rows), size)]
    group = dict(params=list(model.trainable().values()), times=1.0)
    optimizer = torch.optim.SGD([group], lr=1.0)
    loss = plm.train_step(model, batches, optimizer, 1.0, dict(single=False, clip=1e9))
    moved = {name: before[name] - p.detach() for name, p in model.trainable().items()}
    model.load_state_dict(before, strict=False)
    return loss, moved


def their_step(model, rows):
    """(loss, dict name -> gradient) with transformers' own forward pass of each prompt alone."""
    ours = model.lm.config._attn_implementation
    model.lm.set_attn_implementation("eager")
    losses = []
    for row in rows:
        if model.head == "cls":
            labels = torch.tensor([row.labels]).float()
            out = model.score(their_state(model.lm, row))
            losses.append(F.binary_cross_entropy_with_logits(out, labels)[None])
        else:
            logits = their_logits(model.lm, row)
            losses.append(F.cross_entropy(logits, torch.tensor(row.answer), reduction="none"))
    loss = torch.cat(losses).mean()
    gradients = torch.autograd.grad(loss, list(model.trainable().values()))
    model.lm.set_attn_implementation(ours)
    return loss, dict(zip(model.trainable(), gradients))


@pytest.mark.parametrize("architecture", TRAINED, indirect=True)
@pytest.mark.parametrize("head", ["cls", "lm"])
def test_a_step_is_the_same_shared_unshared_in_pieces_and_by_transformers(
        small_blocks, architecture, head):
    path, _ = architecture
    model = lora_model(path, head)
    rows = random_rows()
    expected, gradients = their_step(model, rows)
    for share, size in ((True, 99), (False, 99), (True, 5)):
        model.share = share
        loss, moved = our_step(model, rows, size)
        assert abs(loss - expected) < 1e-5
        for name, gradient in gradients.items():
            assert (moved[name] - gradient).abs().max() < 1e-5, (share, size, name)


@pytest.mark.parametrize("architecture", TRAINED, indirect=True)
def test_a_step_changes_what_is_trained_and_nothing_else(architecture):
    path, _ = architecture
    model = lora_model(path, "cls", torch.zeros(3, 64))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    row = random_rows()[0]
    rows = [row._replace(prompt=(*row.prompt, model.V + i)) for i in range(3)]
    batches = [plm.make_batch(model, rows)]
    config = plm.RECIPES["ours"] | dict(single=False)
    plm.train_step(model, batches, plm.make_optimizer(model, config), 0.01, config)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    if model.seq2seq:  # a step of a decoder's only token leaves its attention's rates as they are
        assert {"score.weight", "user_embedding"} <= changed <= set(model.trainable())
    else:
        assert changed == set(model.trainable())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_we_would_compute_otherwise_than_transformers_is_refused_by_name(
        tmp_path, name, dtype):
    # Experts, a state beside attention, both directions, scaled or capped logits, biased attention.
    path, lm = random_model(tmp_path, name)
    says = {"gpt_oss": "num_local_experts", "mixtral": "num_local_experts"}
    with pytest.raises(plm.BadInput, match=says.get(name, type(lm).__name__)):
        plm.load_model(configured(f"cls --model {path} --dtype {dtype}"))


@pytest.mark.parametrize("line", ["q_0s", "lm --tune full"])
def test_what_we_compute_as_transformers_is_taken(architecture, line):
    path, lm = architecture
    model, tokenizer, base_sha = plm.load_model(configured(f"{line} --model {path}"))
    assert isinstance(model.lm, type(lm))


def test_a_model_without_linear_layers_is_asked_and_not_trained(tmp_path):
    path, lm = random_model(tmp_path, "gpt2")
    with pytest.raises(plm.BadInput, match="GPT2LMHeadModel has no linear layer for LoRA"):
        plm.load_model(configured(f"cls --model {path}"))


def test_a_model_that_reads_no_prompt_is_refused(tmp_path):
    path, lm = random_model(tmp_path, "llama")
    lm.get_input_embeddings().weight.data[:] = 1
    lm.save_pretrained(path)
    with pytest.raises(plm.BadInput, match="LlamaForCausalLM .* reads no prompt"):
        plm.load_model(configured(f"cls --model {path}"))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_users_token_is_a_row_of_its_own_and_nobodys_the_mean_of_all_words(tmp_path, name):
    path, _ = random_model(tmp_path, name)
    users = torch.randn(4, 64)
    model = lora_model(path, "cls", users)
    V = model.V
    words = model.lm.get_input_embeddings().weight
    told = model.embed(torch.tensor([V + 2, V + 4, 5, V - 1]))
    assert torch.equal(told, torch.stack([users[2], words.mean(0), words[5], words[V - 1]]))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_row_trains_the_token_of_its_own_user_alone(tmp_path, name):
    path, _ = random_model(tmp_path, name)
    model = lora_model(path, "cls", torch.randn(4, 64))
    row = random_rows()[0]
    batch = plm.make_batch(model, [row._replace(prompt=(*row.prompt, model.V + 1))])
    plm.summed_loss(model(batch), batch, "cls", False).backward()
    assert model.user_embedding.grad.any(1).tolist() == [False, True, False, False]


def test_users_begin_as_nobody():
    model, tokenizer, _ = plm.load_model(configured("cls_p"), ["a", "b"])
    mean = model.lm.get_input_embeddings().weight.mean(0)
    torch.testing.assert_close(model.user_embedding.detach(), torch.stack([mean, mean]))


def test_what_is_trained_stays_float32_and_scores_are_float32_in_bfloat16():
    model, tokenizer, _ = plm.load_model(configured("cls_p --dtype bfloat16"), ["a", "b"])
    assert model.lm.dtype == torch.bfloat16
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    layer = next(m for m in model.modules() if isinstance(m, plm.NF4Linear))
    assert layer.absmax_scale.dtype == torch.float32
    assert model(plm.make_batch(model, random_rows())).dtype == torch.float32


def test_weights_are_rounded_once_from_what_is_stored():
    # Loading in bfloat16 and then quantizing would round twice.
    lm, _ = plm.load_pretrained("tiny")
    stored = lm.base_model.layers[0].mlp.up_proj.weight.clone()
    model, _, _ = plm.load_model(configured("cls --dtype bfloat16"))
    packed, absmax = plm.quantize_nf4(stored)
    layer = model.lm.base_model.layers[0].mlp.up_proj.base
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.dense, layer.dequantize(torch.bfloat16))


def test_without_quantization_the_weights_are_those_that_are_stored():
    lm, _ = plm.load_pretrained("tiny")
    model, _, _ = plm.load_model(configured("cls --no-quant --dtype float32"))
    layer = model.lm.base_model.layers[0].mlp.up_proj.base
    assert torch.equal(layer.dequantize(), lm.base_model.layers[0].mlp.up_proj.weight)


def test_all_weights_can_be_trained_and_none_is_quantized_then():
    model, _, _ = plm.load_model(configured("cls --tune full"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert not [m for m in model.modules() if isinstance(m, plm.NF4Linear)]
    assert frozen == {"lm.model.embed_tokens.weight"}  # tied: it is the head of the LM


@pytest.mark.parametrize("form", ["sharded", "pickled", "beside copies"])
def test_an_index_is_followed_and_copies_beside_it_are_not_read(tmp_path, form):
    path, lm = random_model(tmp_path, "gpt_neox")
    plain = quantized_lm(path).state_dict()
    zeros = {name: torch.zeros_like(tensor) for name, tensor in lm.state_dict().items()}
    for file in ("model-copy", "consolidated"):
        (tmp_path / f"{file}.safetensors").write_bytes(plm.safetensors_bytes(zeros))
    torch.save(lm.state_dict() if form == "pickled" else zeros, tmp_path / "pytorch_model.bin")
    if form != "beside copies":
        os.remove(tmp_path / "model.safetensors")
    if form == "sharded":
        lm.save_pretrained(path, max_shard_size="30KB")
        assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = quantized_lm(path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in plain.items())


def t5_tensors(path):
    """dict name -> tensor of a folder of a T5 whose head is its own, as flan-t5's."""
    _, lm = random_model(path, "t5")
    tensors = {name: p.detach().clone() for name, p in lm.named_parameters()}
    tensors["lm_head.weight"] = torch.randn(VOCABULARY, 64)
    write_tensors(path, tensors)
    return tensors


def write_tensors(path, tensors):
    content = plm.safetensors_bytes(tensors, {"format": "pt"})
    (path / "model.safetensors").write_bytes(content)


def test_an_untied_head_of_a_t5_is_kept(tmp_path):
    tensors = t5_tensors(tmp_path)
    lm = quantized_lm(str(tmp_path))
    assert torch.equal(lm.lm_head.weight, tensors["lm_head.weight"])
    for module in (lm.shared, lm.encoder.embed_tokens, lm.decoder.embed_tokens):
        assert torch.equal(module.weight, tensors["shared.weight"])


@pytest.mark.parametrize("fault", ["missing", "scaled integers", "too small"])
def test_a_missing_or_quantized_weight_is_named(tmp_path, fault):
    tensors = t5_tensors(tmp_path)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    weight = tensors.pop(name)
    if fault == "scaled integers":
        tensors[name] = (weight * 50).to(torch.int8)
        tensors[f"{name}_scale"] = torch.tensor(0.02)
    if fault == "too small":
        tensors[name] = weight[:9].clone()
    write_tensors(tmp_path, tensors)
    with pytest.raises(plm.BadInput, match=name.removesuffix(".weight")):
        plm.load_pretrained(str(tmp_path))


def tiny_copy(path, file="config.json", name="tiny", **keys):
    """A folder of a tiny model with some keys of one of its JSON files changed."""
    shutil.copytree(plm.MODELS[name], path)
    content = json.loads((path / file).read_text("utf-8"))
    (path / file).write_text(json.dumps(content | keys), "utf-8")
    return str(path)


@pytest.mark.parametrize("file, keys, says", [
    ("config.json", dict(quantization_config=dict(bits=4)), "correctly quantized"),
    ("config.json", dict(max_position_embeddings=100), "reads 100 tokens"),
    ("config.json", dict(num_experts=4), "num_experts"),
    ("config.json", dict(model_type="nosuch"), "cannot be used")])
def test_what_a_folder_says_against_it_gets_one_line(tmp_path, capsys, small_csv, file, keys, says):
    folder = tiny_copy(tmp_path / "model", file, **keys)
    run = f"q_1s --data {small_csv} --max-eval 6 --out {tmp_path}/out --model {folder}"
    assert says in refused(capsys, run)


def test_a_sliding_window_is_the_room_of_a_prompt(tmp_path, capsys, small_csv):
    folder, _ = random_model(tmp_path / "m", "mistral", sliding_window=90)
    run = f"q_1s --data {small_csv} --max-eval 6 --out {tmp_path}/out --model {folder}"
    assert "reads 90 tokens" in refused(capsys, run)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_broken_file_of_a_model_gets_one_line(tmp_path, capsys, file):
    folder = tiny_copy(tmp_path / "model")
    os.truncate(f"{folder}/{file}", 50)
    says = refused(capsys, f"q_0s --model {folder} --out {tmp_path}/out")
    assert f"--model {folder} cannot be used" in says


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    folder = tiny_copy(tmp_path / "model")
    (tmp_path / "model" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(plm.BadInput, match="an adapter lies beside the weights; merge it"):
        plm.load_pretrained(folder)


def loaded_tiny(folder, line="q_0s"):
    return plm.load_model(configured(f"{line} --model {folder}"))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path):
    # Their ids would be those of users.
    folder = tiny_copy(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(plm.BadInput, match="has a token 2048, its embeddings end at 2047"):
        loaded_tiny(folder)


def test_the_end_token_of_config_json_is_used_where_a_tokenizer_names_none(tmp_path):
    folder = tiny_copy(tmp_path / "model", "tokenizer_config.json", eos_token=None)
    os.remove(f"{folder}/generation_config.json")
    model, tokenizer, _ = loaded_tiny(folder)
    assert tokenizer.eos_token_id == 2
    assert model.lm.generation_config.eos_token_id == [2]


def test_a_model_without_any_end_token_is_refused(tmp_path):
    folder = tiny_copy(tmp_path / "model", "tokenizer_config.json", eos_token=None)
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "model" / file).read_text("utf-8"))
        (tmp_path / "model" / file).write_text(json.dumps(content | dict(eos_token_id=None)))
    with pytest.raises(plm.BadInput, match="no end token"):
        loaded_tiny(folder)


def test_a_fingerprint_knows_weights_and_tokenizer(tmp_path):
    lm, tokenizer = plm.load_pretrained("tiny")
    sha = plm.fingerprint(lm, tokenizer)
    assert plm.fingerprint(*plm.load_pretrained(tiny_copy(tmp_path / "a"))) == sha
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    assert plm.fingerprint(lm, other) != sha
    lm.base_model.layers[3].mlp.up_proj.weight.data += 0.001
    assert plm.fingerprint(lm, tokenizer) != sha


# 8. Batches ---------------------------------------------------------------------------------------

def numbered_rows(n):
    """n rows, three to a text."""
    rows = []
    for i in range(n):
        annotation = plm.Annotation(f"text {i // 3}", f"u{i}", (1,))
        rows.append(plm.Row((1, i // 3, i), 2, (1, i // 3, n), (2,), (1,), annotation))
    return rows


def test_steps_hold_every_row_once_and_keep_texts_together():
    rows = numbered_rows(1000)
    steps = plm.shuffled_steps(rows, 32, random.Random(5))
    flat = sum(steps, [])
    texts = [row.annotation.text for row in flat]
    runs = [text for i, text in enumerate(texts) if i == 0 or texts[i - 1] != text]
    assert sorted(flat) == sorted(rows) and flat != rows
    assert [len(step) for step in steps].count(32) == 31
    assert len(runs) == len(set(texts))


def test_the_order_of_steps_is_the_seeds():
    rows = numbered_rows(100)
    first = plm.shuffled_steps(rows, 32, random.Random(5))
    assert plm.shuffled_steps(rows, 32, random.Random(5)) == first
    assert plm.shuffled_steps(rows, 32, random.Random(6)) != first


@pytest.mark.parametrize("head", ["cls", "lm"])
@pytest.mark.parametrize("share", [True, False])
def test_micro_batches_are_bounded_by_their_nodes(head, share):
    model = SimpleNamespace(share=share, seq2seq=False, head=head)
    rows = random_rows(texts=20)
    chunks = plm.micro_batches(model, rows, 100)
    assert sum(chunks, []) == rows
    for chunk in chunks:
        nodes = plm.prompt_tree([plm.path_of(row, head) for row in chunk], share)[0]
        assert 0 < len(nodes) <= 100
    assert [len(chunk) for chunk in plm.micro_batches(model, rows, 1)] == [1] * len(rows)
    assert plm.micro_batches(model, rows, 10 ** 9) == [rows]


def test_padding_counts_where_rows_are_padded():
    model = SimpleNamespace(share=True, seq2seq=True, head="cls")
    rows = []
    for i, row in enumerate(random_rows(texts=9)):
        rows.append(row._replace(prompt=row.prompt * (1 + i % 5)))
    chunks = plm.micro_batches(model, rows, 300)
    assert sum(chunks, []) == rows
    assert len(chunks) > 3
    sizes = [len(chunk) * max(len(row.prompt) for row in chunk) for chunk in chunks]
    assert max(sizes) <= 300
    for chunk, following in zip(chunks, chunks[1:]):  # no list ends without need
        more = [*chunk, following[0]]
        assert len(more) * max(len(row.prompt) for row in more) > 300


def test_padding_goes_by_lengths_and_not_by_the_padding_token():
    ids, mask = plm.padded([(0, 7, 0), (5,)])
    assert ids.tolist() == [[0, 7, 0], [5, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_the_tokens_of_a_batch_are_the_nodes_of_its_tree():
    rows = random_rows()
    model = SimpleNamespace(share=True)
    whole = plm.tree_batch(model, rows, "lm")
    paths = [row.prompt + row.answer[:-1] for row in rows]
    assert len(whole["input_ids"]) == len(plm.prompt_tree(paths)[0])
    model.share = False
    assert len(plm.tree_batch(model, rows, "lm")["input_ids"]) == sum(map(len, paths))


# 9. Scores ----------------------------------------------------------------------------------------

def test_f1_by_hand():
    # Label a: TP 1, FP 1, FN 1 -> 2 / 4.  b: TP 2, FP 0, FN 1 -> 4 / 5.  c: nothing anywhere -> 0.
    found = plm.f1_scores([(1, 1, 0), (1, 1, 0), (0, 1, 0)], [(1, 1, 0), (0, 1, 0), (1, 0, 0)])
    assert found["per_label"] == pytest.approx([0.5, 0.8, 0.0])
    assert found["f1_macro"] == pytest.approx(1.3 / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)


def test_f1_as_scikit_learn_has_it():
    # Recorded from scikit-learn 1.9.1: f1_score(gold, predicted, average=..., zero_division=0).
    i = np.arange(40)[:, None] * np.array([3, 5, 7, 11]) + np.array([0, 1, 2, 3])
    gold = (i % 5 < 2).astype(int)
    predicted = (i % 7 < 3).astype(int)
    gold[:, 3] = 0  # a label that nobody chose ...
    predicted[:, 3] = 0  # ... and nothing predicted
    found = plm.f1_scores(gold, predicted)
    assert found["per_label"] == pytest.approx(
        [0.42424242424242425, 0.6206896551724138, 0.5714285714285714, 0.0], abs=1e-12)
    assert found["f1_macro"] == pytest.approx(0.40409016271085235, abs=1e-12)


@pytest.mark.parametrize("single", [False, True])
def test_probabilities_and_loss_are_those_of_torch(single):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20, 3))
    gold = np.eye(3, dtype=int)[rng.integers(0, 3, 20)]
    out = torch.tensor(scores)
    if single:
        p = out.softmax(1)
        loss = F.cross_entropy(out, torch.tensor(gold).argmax(1))
    else:
        p = out.sigmoid()
        loss = F.binary_cross_entropy_with_logits(out, torch.tensor(gold).double())
    assert plm.probabilities(scores, single) == pytest.approx(p.numpy())
    assert plm.mean_loss(gold, scores, single) == pytest.approx(loss.item())


def test_rates_are_everybodys_or_the_users_shrunk_to_them():
    rows = [plm.Annotation("t", "a", (1, 0))] * 5
    rows += [plm.Annotation("t", "b", (0, 1))] * 3 + [plm.Annotation("t", "b", (0, 0))] * 2
    data = dataset(train=rows)
    asked = [plm.Annotation("x", user, (0, 0)) for user in ("a", "b", "new")]
    expected = dict(rates=[[0.5, 0.3]] * 3, rates_p=[[0.75, 0.15], [0.25, 0.45], [0.5, 0.3]])
    for method, rates in expected.items():
        found = plm.predict_rates(data, configured(method, data), asked)
        p = plm.probabilities(found["scores"], False)
        assert p == pytest.approx(np.array(rates))  # 0.75 = (5 + 5 * 0.5) / (5 + 5)


def test_what_is_wrong_with_answers_stands_beside_their_scores():
    config = configured("lm", dataset("ABC"))
    rows = [plm.Annotation("t", user, (1, 0, 0)) for user in "ab"]
    replies = [dict(answer="huh, what?", cut=True), dict(answer="A", cut=False)]
    found = plm.measure(config, rows, plm.read_answers(replies, config))
    assert found["cut"] == found["unreadable"] == 1
    assert found["unknown_words"] == 0  # an answer that was cut off says nothing


def test_labels_without_a_test_row_are_counted():
    config = configured("cls", dataset("ABC"))
    rows = [plm.Annotation("t", "u", (1, 0, 0))]
    found = plm.measure(config, rows, dict(predicted=np.array([(1, 0, 0)])))
    assert found["labels_without_test_row"] == 2
    assert found["f1_macro"] == pytest.approx(1 / 3)


# 10. Training -------------------------------------------------------------------------------------

def test_learning_rate_climbs_then_falls_to_nearly_nothing():
    rates = [plm.learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] < 0.001


def test_the_plan_of_a_run_has_every_row_once_in_an_epoch():
    config = configured("cls --epochs 3 --batch 8")
    plan = plm.plan_steps(numbered_rows(20), config)
    assert [(epoch, len(rows)) for epoch, rows in plan] == [
        (1, 8), (1, 8), (1, 4), (2, 8), (2, 8), (2, 4), (3, 8), (3, 8), (3, 4)]
    first = sum([rows for epoch, rows in plan if epoch == 1], [])
    second = sum([rows for epoch, rows in plan if epoch == 2], [])
    assert sorted(first) == sorted(second) == numbered_rows(20)
    assert first != second


def test_a_run_of_few_steps_has_no_more():
    config = configured("cls --epochs 3 --batch 8 --max-steps 4")
    plan = plm.plan_steps(numbered_rows(20), config)
    assert [epoch for epoch, _ in plan] == [1, 1, 1, 2]


def test_users_learn_at_a_rate_that_fits_the_size_of_the_embeddings():
    model, _, _ = plm.load_model(configured("cls_p"), ["a"])
    config = configured("cls_p --lr 0.01")
    words = model.lm.get_input_embeddings().weight
    times = [group["times"] for group in plm.make_optimizer(model, config).param_groups]
    words.data *= 3
    larger = [group["times"] for group in plm.make_optimizer(model, config).param_groups]
    assert times[:2] == larger[:2] == [1.0, config["head_lr"]]
    rms = words.square().mean().sqrt().item() / 3
    assert times[2] == pytest.approx(config["user_lr"] * rms, rel=1e-4)
    assert larger[2] == pytest.approx(3 * times[2])


def test_rows_are_read_for_nobody_with_the_labels_of_their_readers():
    rows = numbered_rows(7)
    found = plm.for_nobody(rows)
    assert [row.weight for row in found] == [plm.NOBODY_WEIGHT] * 7
    assert [row.prompt for row in found] == [row.nobody for row in rows]
    assert [row.labels for row in found] == [row.labels for row in rows]


def with_nobody(model, rows):
    """The rows with a reader who has a token, and nobody's beside."""
    found = []
    for row in rows:
        told = row.prompt[:row.reader_at] + (model.V,)
        nobody = row.prompt[:row.reader_at] + (model.V + len(model.user_embedding),)
        found.append(row._replace(prompt=told, nobody=nobody))
    return found


@pytest.mark.parametrize("max_nodes", [640, 30])
def test_a_step_reads_every_text_once_more_for_nobody(tmp_path, max_nodes):
    path, _ = random_model(tmp_path, "llama")
    model = lora_model(path, "cls", torch.randn(1, 64))
    rows = with_nobody(model, random_rows())
    config = configured("cls_p")
    model.max_nodes = max_nodes
    batches = plm.prepare_step(model, rows, config)
    optimizer = plm.make_optimizer(model, config)
    expected = 0.0
    with torch.no_grad():
        for row in rows:
            for prompt, weight in ((row.prompt, 1), (row.nobody, plm.NOBODY_WEIGHT)):
                batch = plm.make_batch(model, [row._replace(prompt=prompt)])
                loss = plm.summed_loss(model(batch), batch, "cls", False)
                expected += loss.item() * weight
    expected /= len(rows) * (1 + plm.NOBODY_WEIGHT)
    loss = plm.train_step(model, batches, optimizer, 0.0, config)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_labels_are_read_in_the_order_of_the_rows(tmp_path):
    path, _ = random_model(tmp_path, "llama")
    model = lora_model(path, "cls")
    rows = random_rows()
    config = configured("cls", dataset("ABC"))
    model.max_nodes = 30
    loss, scores = plm.read_labels(model, rows, config, "test")
    for row, line in zip(rows, scores):
        batch = plm.make_batch(model, [row])
        assert line == pytest.approx(model(batch)[0].numpy(), abs=1e-5)
    gold = np.array([row.labels for row in rows])
    assert loss == pytest.approx(plm.mean_loss(gold, scores.astype(float), False), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_scores_of_an_lm_are_the_logits_with_which_labels_begin_to_differ(tmp_path, name):
    path, lm = random_model(tmp_path, name)
    model = plain_model(path)
    model.label_tokens = (1, [21, 22, 23, 24])  # of A, B, C and none
    rows = [row._replace(answer=(20, 21 + i % 3, 2)) for i, row in enumerate(random_rows())]
    config = configured("lm", dataset("ABC", single=True))
    model.max_nodes = 30
    _, scores = plm.read_labels(model, rows, config, "test")
    reference = rounded_reference(model, lm)
    for row, line in zip(rows, scores):
        assert line == pytest.approx(their_logits(reference, row)[1, 21:24].numpy(), abs=2e-5)


def miniature_rows(told):
    """Eight texts, each read by two users with opposite labels; is the prompt told the user?"""
    rows = []
    for i in range(8):
        for user in (0, 1):
            reader = 50 + user if told else 9
            labels = (user, 1 - user)
            annotation = plm.Annotation(f"text {i}", f"u{user}", labels)
            prompt = (1, 3, 5, 20 + i, 30 + i, reader, 9)
            rows.append(plm.Row(prompt, 5, (), (60 + user, 2), labels, annotation))
    return rows


@pytest.mark.parametrize("head, single", [("cls", False), ("cls", True), ("lm", False)])
@pytest.mark.parametrize("told", [True, False])
def test_the_paper_in_miniature(tmp_path, head, single, told):
    # Who is told the user can be right about both users, nobody else can.
    path, _ = random_model(tmp_path, "llama")
    model = lora_model(path, head)
    if head == "cls":
        model.score = nn.Linear(64, 2, bias=False)
    rows = miniature_rows(told)
    config = plm.RECIPES["ours"] | dict(single=single, nobody=False)
    optimizer = plm.make_optimizer(model, config)
    for _ in range(40):
        plm.train_step(model, plm.prepare_step(model, rows, config), optimizer, 1e-2, config)
    with torch.no_grad():
        if head == "cls":
            out = model(plm.make_batch(model.train(False), rows)).numpy()
            predicted = plm.chosen_labels(out, single)
        else:
            prompts = [row.prompt for row in rows]
            answers = plm.write_with_decoder(model.train(False), prompts, [2], 3)
            predicted = [(ids[:2] == [61, 2], ids[:2] == [60, 2]) for ids in answers]
    f1 = plm.f1_scores([row.labels for row in rows], predicted)["f1_macro"]
    if told:
        assert f1 == 1
    else:
        assert f1 <= 2 / 3 + 1e-6  # both labels ticked always


def test_a_saved_state_brings_back_parameters_moments_and_the_best_epoch(tmp_path):
    path, _ = random_model(tmp_path, "llama")
    config = configured("cls")
    rows = random_rows()
    saved = f"{tmp_path}/state"
    model = lora_model(path, "cls")
    optimizer = plm.make_optimizer(model, config)
    plm.train_step(model, plm.prepare_step(model, rows, config), optimizer, 0.01, config)
    best = {name: torch.full_like(p, 7) for name, p in model.trainable().items()}
    plm.save_state(saved, dict(step=3), model, optimizer, best)
    other = lora_model(path, "cls")
    other_optimizer = plm.make_optimizer(other, config)
    state, other_best = plm.load_state(saved, other, other_optimizer)
    assert state == dict(step=3)
    assert all(torch.equal(best[name], p) for name, p in other_best.items())
    for _ in range(2):
        loss = plm.train_step(model, plm.prepare_step(model, rows, config), optimizer, 0.01, config)
        again = plm.train_step(other, plm.prepare_step(other, rows, config), other_optimizer, 0.01,
                               config)
        assert torch.equal(loss, again)


# 11. Prediction -----------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, chosen, unknown", [
    ("calm, angry", (1, 1, 0), 0), ("Angry.", (0, 1, 0), 0), ("ANGRY;calm", (1, 1, 0), 0),
    ("calm calm", (1, 0, 0), 0), ("", (0, 0, 0), 0), ("I think: angry", (0, 1, 0), 2),
    ("not_calm", (0, 0, 1), 0), ("very furious", (0, 0, 0), 2), ("none", (0, 0, 0), 0)])
def test_answers_are_read_with_forgiveness(answer, chosen, unknown):
    assert plm.parse_answer(answer, ["calm", "angry", "not_calm"]) == (chosen, unknown)


@pytest.mark.parametrize("answer, label", [
    ("joy, not :)", "joy"), (":( :)", ":("), ("calm? :)", ":)"), ("not :( but joy", ":(")])
def test_of_a_single_choice_the_first_label_in_an_answer_is_taken(answer, label):
    labels = ["joy", ":)", ":("]
    chosen, unknown = plm.parse_answer(answer, labels, single=True)
    assert chosen == tuple(int(x == label) for x in labels)


@pytest.mark.parametrize("labels", [
    ["generalisation", "generalisation_unfair", "hostile"], ["1", "2", "10"], [":)", ":(", ":|"],
    ["\u0926\u0947\u0916\u093e", "\u0926\u0941\u0916"],  # Hindi: the same without combining marks
    ["+", "++", "-"], ["-1", "0", "1"], ["\u2b50", "\u2b50\u2b50"], ["Na\u00efve", "NAIVE"],
    ["not X", "X"]])
@pytest.mark.parametrize("single", [True, False])
def test_answers_that_are_trained_on_are_read_back(labels, single):
    for chosen in np.ndindex(*[2] * len(labels)):
        if not single or sum(chosen) == 1:
            answer = plm.answer_text(labels, chosen)
            assert plm.parse_answer(answer, labels, single) == (chosen, 0)


@pytest.mark.parametrize("answer, cut, in_thought, said", [
    ("calm", False, False, "calm"),
    ("calm, ang", True, False, ""),                         # who knows how it went on
    ("calm\n### Text: and", True, False, "calm"),             # it was at its end long before
    ("### Labels: calm, angry\n### Text: and", True, False, ""),  # it went on with the prompt
    ("<think>angry? No.</think> calm", False, False, "calm"),
    ("<think>angry or calm", False, False, ""),
    ("<think>a</think>calm<think>b", False, False, ""),
    ("angry? No.</think> calm", False, True, "calm"),         # the template opened the thought
    ("angry? No", False, True, "")])
def test_the_final_words_of_a_reply(answer, cut, in_thought, said):
    assert plm.final_words(dict(answer=answer, cut=cut), in_thought) == said


def read(answers, single, cut=False):
    replies = [dict(answer=answer, cut=cut) for answer in answers]
    return plm.read_answers(replies, configured("q_0s", dataset(single=single)))


def test_none_is_an_answer_where_several_labels_may_be_chosen():
    found = read(["calm, then angry", "none", "who knows", "none of these"], single=False)
    assert found["predicted"].tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]
    assert found["unreadable"] == 2
    assert found["unknown_words"] == 5


def test_none_is_no_answer_where_one_label_is_to_be_chosen():
    found = read(["calm, then angry", "none", "who knows"], single=True)
    assert found["predicted"].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert found["unreadable"] == 2


def test_answers_that_were_cut_off_are_counted_and_not_read():
    found = read(["calm, angr", "calm"], single=False, cut=True)
    assert found["predicted"].tolist() == [[0, 0], [0, 0]]
    assert found["cut"] == found["unreadable"] == 2


def written(folder, line="lm", room=6, asked=("What a day.",)):
    """The answers of an untrained model in a folder."""
    config = configured(f"{line} --model {folder}") | dict(answer_room=room)
    model, tokenizer, _ = plm.load_model(config)
    annotations = [plm.Annotation(text, "u", (0, 1)) for text in asked]
    rows, _ = plm.encode_rows(tokenizer, config, annotations, [], {})
    return plm.write_answers(model, tokenizer, rows, config)


@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_decoding_takes_nothing_else_from_generation_config_json(tmp_path, name):
    plain = written(tiny_copy(tmp_path / "a", name=name))
    folder = tiny_copy(
        tmp_path / "b", "generation_config.json", name, num_beams=4, repetition_penalty=9.0,
        no_repeat_ngram_size=1, min_new_tokens=5, max_length=3, do_sample=True, temperature=9.0,
        forced_eos_token_id=2, suppress_tokens=list(range(500, 2000)), bad_words_ids=[[5]])
    assert written(folder) == plain


def test_an_end_token_of_generation_config_json_ends_answers(tmp_path):
    # Llama 3, Qwen and Phi end a turn with another token than their tokenizer's.
    (plain,) = written(tiny_copy(tmp_path / "a"))
    first = plm.tokenize(tiny_tokenizer(), " " + plain["answer"])[0]
    for name, end in (("b", first), ("c", [2, first])):
        folder = tiny_copy(tmp_path / name, "generation_config.json", eos_token_id=end)
        assert written(folder) == [dict(answer="", cut=False)]
    assert plain["answer"]


def test_an_answer_that_fills_its_room_without_an_end_is_cut(monkeypatch):
    def endless(model, prompts, ends, limit):
        return [[100] * limit] * len(prompts)

    monkeypatch.setattr(plm, "write_with_decoder", endless)
    (reply,) = written("tiny")
    assert reply["cut"]


def test_equal_prompts_are_answered_once(monkeypatch):
    asked = []
    write = plm.write_with_decoder

    def spy(model, prompts, ends, limit):
        asked.extend(prompts)
        return write(model, prompts, ends, limit)

    monkeypatch.setattr(plm, "write_with_decoder", spy)
    replies = written("tiny", asked=["What a day.", "No.", "What a day."])
    assert len(asked) == 2
    assert replies[0] == replies[2]


@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_an_answer_has_room_for_all_labels_of_the_data(monkeypatch, name):
    labels = [f"unsinnig {i * 7919}" for i in range(12)]
    chosen = plm.Annotation("t", "u", (1,) * 12)
    data = dataset(labels, train=[chosen])
    limits = []

    def spy(model, prompts, ends, limit):
        limits.append(limit)
        return [[2]] * len(prompts)

    for write in ("write_with_decoder", "write_with_encoder_decoder"):
        monkeypatch.setattr(plm, write, spy)
    config = configured(f"q_0s --model {name}", data)
    model, tokenizer, _ = plm.load_model(config)
    rows, _ = plm.encode_rows(tokenizer, config, [chosen._replace(labels=(1,) + (0,) * 11)], [], {})
    plm.write_answers(model, tokenizer, rows, config)
    assert limits[0] >= len(plm.tokenize(tokenizer, plm.answer_text(labels, chosen.labels))) + 1


def test_an_lm_of_a_single_choice_has_scores_beside_its_answers():
    config = configured("lm", dataset(single=True))
    model, tokenizer, _ = plm.load_model(config)
    rows, _ = plm.encode_rows(tokenizer, config, [plm.Annotation("hi", "u", (0, 1))], [], {})
    found = plm.predict(model, tokenizer, rows, config)
    assert found["scores"].shape == (1, 2)
    assert len(found["answers"]) == 1


def test_labels_that_a_tokenizer_cannot_tell_apart_are_refused(tmp_path):
    folder, _ = random_model(tmp_path, "t5")
    marked_tokenizer("t5").save_pretrained(folder)  # both labels are unknown to it
    data = dataset(["\u597d", "\u574f"], single=True)
    with pytest.raises(plm.BadInput, match="the same tokens for two labels"):
        plm.load_model(configured(f"lm --model {folder}", data))
    plm.load_model(configured(f"cls --model {folder}", data))


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="PEFT is not installed")
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "phi", "t5"])
def test_peft_computes_the_same_with_our_lora(tmp_path, name):
    import peft
    path, lm = random_model(tmp_path, name)
    model = lora_model(path, "lm")
    layers = {p: m for p, m in model.lm.named_modules() if isinstance(m, plm.LoRALinear)}
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(layers))
    theirs = peft.get_peft_model(rounded_reference(model, lm), settings).eval()
    for layer_path, layer in layers.items():
        twin = theirs.base_model.model.get_submodule(layer_path)
        twin.lora_A["default"].weight.data = layer.lora_A.data
        twin.lora_B["default"].weight.data = layer.lora_B.data
    for row in random_rows():
        ours = model(plm.make_batch(model, [row]))
        assert torch.allclose(ours, their_logits(theirs, row), atol=5e-5)


# 12. ChatGPT --------------------------------------------------------------------------------------
KEY = "sk-test-Zx81-nobody-may-see-this"


def answer(content, finish="stop", **message):
    """The body of a reply in the protocol."""
    choice = dict(finish_reason=finish, message=dict(message, content=content))
    usage = dict(prompt_tokens=7, completion_tokens=2)
    return json.dumps(dict(model="m-2026", choices=[choice], usage=usage))


class Handler(BaseHTTPRequestHandler):
    """Answers "joy PROMPT", or what server.behave(prompt, number of the request) says: a status, a
    (status, body, headers), or None to close the connection."""
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet

    def log_message(self, *args):
        """Says nothing."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with self.server.lock:
            self.server.seen.append((prompt, body, self.headers))
            number = len(self.server.seen)
        reply = self.server.behave(prompt, number)
        if reply == "ok":
            reply = (200, answer(f"joy {prompt}"), {})
        if isinstance(reply, int):
            reply = (reply, f"no, {self.headers['Authorization']}", {})
        if reply is None:
            self.close_connection = True
            return
        status, text, headers = reply
        with contextlib.suppress(OSError):  # the client may have gone
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())


class Web(ThreadingHTTPServer):
    """A server that remembers what it was asked."""
    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.seen = []
        self.pauses = []  # that plm.py made
        self.behave = lambda prompt, number: "ok"
        self.address = f"http://127.0.0.1:{self.server_port}/v1"
        self.path = str(folder / "answers.jsonl")

    def ask(self, prompts, model="m", seed=42, limit=5):
        """What ask_chat returns: (replies, facts)."""
        return plm.ask_chat([str(x) for x in prompts], self.path, model, seed, limit)

    def refusal(self, prompts):
        """The message that asking ends with."""
        with pytest.raises(plm.BadInput) as e:
            self.ask(prompts)
        assert KEY not in "".join(traceback.format_exception(e.value))
        return str(e.value)

    def prompts(self):
        """The prompts of all requests."""
        return [prompt for prompt, body, headers in self.seen]

    def pause(self, seconds):
        """A sleep that takes a thousandth of the time."""
        self.pauses.append(seconds)
        time.sleep(seconds / 1000)


@pytest.fixture
def web(monkeypatch, tmp_path):
    """A server that the environment names, with a key; a second's pause takes a millisecond."""
    with Web(tmp_path) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.address)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(plm, "time", SimpleNamespace(sleep=server.pause))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_the_request_is_the_one_of_the_protocol(web):
    web.ask(["Which? ü"], model="gpt-3.5-turbo", seed=7, limit=5)
    prompt, body, headers = web.seen[0]
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == dict(model="gpt-3.5-turbo", messages=[dict(role="user", content="Which? ü")],
                        temperature=0, seed=7, max_tokens=5)


def test_rows_with_equal_prompts_share_a_request(web):
    replies, facts = web.ask(["x", "y", "x"])
    assert [reply["answer"] for reply in replies] == ["joy x", "joy y", "joy x"]
    assert sorted(web.prompts()) == ["x", "y"]
    assert facts == dict(answered_by=["m-2026"], left_out=[])


def test_the_file_has_what_an_answer_cost(web):
    web.ask(["x"])
    with open(web.path) as f:
        assert json.loads(f.read())["usage"] == dict(prompt_tokens=7, completion_tokens=2)


def test_a_netrc_does_not_replace_the_key(web, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    web.ask(["x"])
    assert web.seen[0][2]["Authorization"] == f"Bearer {KEY}"


def test_an_answer_is_on_the_disk_before_the_next_is_heard(web, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda fd: sizes.append(os.fstat(fd).st_size))
    web.ask(range(30))
    assert len(set(sizes)) == 30


def test_the_same_command_asks_for_nothing_and_needs_no_key(web, monkeypatch):
    first = web.ask(range(5))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert web.ask(range(5)) == first
    assert len(web.seen) == 5


def test_without_a_key_it_says_what_it_would_send(web, monkeypatch, capsys):
    web.ask(["a", "b"])
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "set OPENAI_API_KEY" in web.refusal(["a", "b", "c" * 400, "c" * 400])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == f"m at {web.address}: 1 requests, about 100 tokens; 2 answers are there"


@pytest.mark.parametrize("change", [dict(model="other"), dict(seed=1), dict(limit=6)])
def test_the_answers_to_other_requests_are_not_used(web, change):
    web.ask([0])
    web.ask([0], **change)
    assert len(web.seen) == 2


def test_the_answers_of_another_server_are_not_used(web, monkeypatch):
    web.ask([0])
    monkeypatch.setenv("OPENAI_BASE_URL", web.address.replace("127.0.0.1", "localhost"))
    web.ask([0])
    assert len(web.seen) == 2


def test_half_a_line_of_a_killed_run_is_cut_off(web):
    web.ask(range(3))
    with open(web.path, "a") as f:
        f.write('{"sha": "12')
    replies, facts = web.ask(range(4))
    assert [reply["answer"] for reply in replies] == ["joy 0", "joy 1", "joy 2", "joy 3"]
    assert web.ask(range(4)) == (replies, facts)
    assert len(web.seen) == 4


def test_a_line_that_is_no_answer_is_passed_over(web):
    with open(web.path, "w") as f:
        f.write('{"sent": "12"}\n')
    assert web.ask([0])[0][0]["answer"] == "joy 0"


def test_a_killed_run_goes_on_where_it_was(web):
    code = (f"import sys, {plm.__name__} as plm\n"
            "plm.ask_chat([str(i) for i in range(60)], sys.argv[1], 'm', 42, 5)")
    run = subprocess.Popen([sys.executable, "-c", code, web.path], cwd=HERE)
    web.behave = lambda prompt, number: time.sleep(0.02) or "ok"
    while len(web.seen) < 30:
        time.sleep(0.01)
    run.kill()
    run.wait()
    with open(web.path) as f:
        kept = [json.loads(line) for line in f.read().split("\n")[:-1]]
    assert 20 <= len(kept) < 60
    web.seen.clear()
    replies, facts = web.ask(range(60))
    assert [reply["answer"] for reply in replies] == [f"joy {i}" for i in range(60)]
    assert len(web.seen) == 60 - len(kept)


@pytest.mark.parametrize("bad", [
    429, 500, 503, None, (200, "", {}), (200, "<html>Bad gateway", {}), (200, "[]", {}),
    (200, '{"error": "overloaded"}', {}), (200, '{"choices": []}', {}),
    (429, "", {"Retry-After": "soon"}), (503, "", {"Retry-After": "0.002"})])
def test_every_other_attempt_may_fail(web, bad):
    web.behave = lambda prompt, number: "ok" if number % 2 == 0 else bad
    replies, facts = web.ask(range(10))
    assert [reply["answer"] for reply in replies] == [f"joy {i}" for i in range(10)]
    assert len(web.seen) == 20


def test_a_row_that_always_fails_costs_no_other_row(web):
    web.behave = lambda prompt, number: 500 if prompt == "0" else "ok"
    assert "HTTP 500" in web.refusal(range(5))
    assert set(web.prompts()) == {"0", "1", "2", "3", "4"}
    assert web.pauses[-9:] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert web.prompts().count("0") <= 12
    web.behave = lambda prompt, number: "ok"
    web.seen.clear()
    web.ask(range(5))
    assert web.prompts() == ["0"]


@pytest.mark.parametrize("value, seconds", [
    ("20", 20), ("20.5", 20.5), ("0.417727", 1), ("soon", 1), ("", 1), ("-7", 1),
    ("Fri, 31 Dec 2100 23:59:59 GMT", 1)])
def test_a_pause_takes_as_long_as_the_server_says_if_it_says_a_number(web, value, seconds):
    limit = (429, "too many", {"Retry-After": value})
    web.behave = lambda prompt, number: limit if number == 1 else "ok"
    web.ask([0])
    assert web.pauses == [seconds]


def test_nothing_is_sent_in_a_pause(web):
    times = []
    limit = (429, "too many", {"Retry-After": "300"})
    web.behave = lambda prompt, number: times.append(time.monotonic()) or (
        limit if number == 4 else "ok")
    web.ask(range(9))
    assert min(times[6:]) - max(times[:6]) >= 0.3  # number 4 is in the third round


@pytest.mark.parametrize("status", [302, 401, 402, 403, 404])
def test_what_every_request_would_get_ends_the_run(web, status):
    web.behave = lambda prompt, number: status
    message = web.refusal(range(50))
    assert message.startswith(f"HTTP {status}: no, Bearer [key]; check OPENAI_API_KEY")
    assert len(web.seen) == 1


def test_the_key_does_not_follow_a_redirect(web):
    web.behave = lambda prompt, number: (307, "moved", {"Location": f"{web.address}/elsewhere"})
    assert web.refusal([0]).startswith("HTTP 307: moved; check OPENAI_API_KEY")
    assert len(web.seen) == 1


@pytest.mark.parametrize("error", [
    "You exceeded your current quota (insufficient_quota)", "billing_hard_limit_reached"])
def test_an_account_without_money_is_asked_once(web, error):
    web.behave = lambda prompt, number: (429, error, {})
    assert error in web.refusal(range(50))
    assert len(web.seen) == 1


def test_a_limit_per_minute_that_speaks_of_billing_is_waited_for(web):
    limit = (429, "check your billing details.\nPlease retry in 9.5s.", {})
    web.behave = lambda prompt, number: limit if number == 1 else "ok"
    web.ask(range(3))
    assert len(web.seen) == 4


def test_a_server_that_wants_a_pause_of_hours_is_asked_later(web):
    web.behave = lambda prompt, number: (429, "200 a day", {"Retry-After": "25920"})
    message = web.refusal(range(50))
    assert message == "HTTP 429: 200 a day; later, the same command asks for the rest"
    assert len(web.seen) == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_row_fails_alone(web, status):
    web.behave = lambda prompt, number: status if prompt == "1" else "ok"
    why = f"HTTP {status}: no, Bearer [key]"
    assert web.refusal(range(4)).startswith(
        f"refused: test row 2: {why}; if it is too long, lower --max-text")
    assert sorted(web.prompts()) == ["0", "1", "2", "3"]


def test_a_refused_first_row_fails_alone(web):
    web.behave = lambda prompt, number: 400 if prompt in ("0", "2") else "ok"
    message = web.refusal(range(4))
    assert "test row 1: HTTP 400" in message
    assert "test row 3: HTTP 400" in message
    assert sorted(web.prompts()) == ["0", "1", "2", "3"]


def test_a_refused_prompt_may_be_too_long(web):
    error = (400, "request (484 tokens) exceeds the available context size", {})
    web.behave = lambda prompt, number: error if prompt == "1" else "ok"
    assert web.refusal(range(4)).endswith("context size; if it is too long, lower --max-text")


def test_a_silence_is_a_failure(web, monkeypatch):
    monkeypatch.setattr(plm, "TIMEOUT", (10, 0.2))
    web.behave = lambda prompt, number: time.sleep(0.5 if number == 1 else 0) or "ok"
    web.ask(range(3))
    assert len(web.seen) == 4
    assert web.pauses == [1]


def test_a_server_that_refuses_all_rows_is_not_asked_for_all(web):
    web.behave = lambda prompt, number: 400 if number > 3 else "ok"
    web.refusal(range(100))
    assert plm.MOST_REFUSED <= len(web.seen) - 3 < plm.MOST_REFUSED + plm.AT_ONCE


def test_a_model_that_no_row_gets_is_asked_one_by_one_and_seldom(web):
    web.behave = lambda prompt, number: (400, "no such model", {})
    assert "HTTP 400: no such model" in web.refusal(range(100))
    assert len(web.seen) == plm.MOST_REFUSED


@pytest.mark.parametrize("bad", [None, 500])
def test_a_server_that_never_answers_is_given_up(web, bad):
    web.behave = lambda prompt, number: bad
    message = web.refusal(range(50))
    assert message.endswith("; later, the same command asks for the rest")
    assert web.pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert len(web.seen) == 10


def test_a_pause_says_what_went_wrong(web, capsys):
    web.behave = lambda prompt, number: 503 if number == 1 else "ok"
    web.ask([0])
    assert "HTTP 503: no, Bearer [key]; again in 1 s" in capsys.readouterr().out


def test_nobody_listens(web, monkeypatch):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{s.getsockname()[1]}/v1")
        assert "Connection refused" in web.refusal([0])


@pytest.mark.parametrize("names", [["max_tokens"], ["temperature"], ["temperature", "seed"]])
def test_parameters_that_the_server_refuses_are_renamed_or_left_out(web, names):
    def behave(prompt, number):
        for name in names:
            if name in web.seen[-1][1]:
                return (400, f"Unsupported parameter: '{name}'", {})
        return "ok"

    web.behave = behave
    facts = web.ask(range(10))[1]
    assert facts["left_out"] == sorted(set(names) - {"max_tokens"})
    assert len(web.seen) == 10 + len(names)
    body = web.seen[-1][1]
    assert ("max_completion_tokens" in body) == ("max_tokens" in names)
    assert not set(names) & set(body)


def test_a_server_that_has_answered_knows_the_parameters(web):
    web.behave = lambda prompt, number: (400, "max_tokens, seed", {}) if number == 2 else "ok"
    web.refusal(range(5))
    assert all(body.keys() == web.seen[0][1].keys() for prompt, body, headers in web.seen)
    assert len(web.seen) == 5


def test_a_fast_server_gets_eight_requests_at_once(web):
    now = [0]
    seen = []

    def behave(prompt, number):
        with web.lock:
            now[0] += 1
            seen.append(now[0])
        time.sleep(0.1)
        with web.lock:
            now[0] -= 1
        return "ok"

    web.behave = behave
    web.ask(range(60))
    assert seen[0] == 1
    assert max(seen) == plm.AT_ONCE


def test_a_server_that_takes_two_at_once_is_seldom_asked_for_three(web):
    now = [0]

    def behave(prompt, number):
        with web.lock:
            now[0] += 1
            full = now[0] > 2
        time.sleep(0.001 if full else 0.03)
        with web.lock:
            now[0] -= 1
        return 429 if full else "ok"

    web.behave = behave
    web.ask(range(100))
    assert 1 <= len(web.seen) - 100 <= 25


def test_a_slow_server_that_computes_one_by_one_answers_all(web, monkeypatch):
    # It is slow for a while: at eight at once, most would time out again and again.
    monkeypatch.setattr(plm, "TIMEOUT", (10, 0.5))
    computing = threading.Lock()

    def behave(prompt, number):
        with computing:  # also for those who have gone
            time.sleep(0.2 if number > 20 else 0.001)
        return "ok"

    web.behave = behave
    replies, facts = web.ask(range(40))
    assert len(replies) == 40
    assert 40 < len(web.seen) <= 55


def test_ctrl_c_ends_at_once_and_nobody_keeps_sending(web):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it

    def behave(prompt, number):
        if number == 12:
            time.sleep(0.3)  # until all requests of the round are on their way
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(3 if number > 10 else 0)
        return "ok"

    web.behave = behave
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        web.ask(range(100))
    assert time.monotonic() - start < 2
    others = set(threading.enumerate()) - {threading.main_thread()}
    assert all(t.daemon for t in others)  # so the process ends, too
    time.sleep(0.3)  # what is on its way arrives
    sent = len(web.seen)
    time.sleep(3)  # what is answered brings no more
    assert len(web.seen) == sent


@pytest.mark.parametrize("body, text", [
    (answer(None), ""), (answer(None, refusal="I can't"), ""), (answer(" joy\n"), "joy"),
    (answer("half \ud83d"), "half \ud83d"),
    ('{"choices": [{"message": {"content": "joy"}}], "usage": null}', "joy")])
def test_an_answer_of_any_form_is_read(web, body, text):
    web.behave = lambda prompt, number: (200, body, {})
    assert web.ask([0])[0][0]["answer"] == text


@pytest.mark.parametrize("text", ["", "joy, sa"])
def test_an_answer_that_the_limit_cut_says_so(web, text):
    web.behave = lambda prompt, number: (200, answer(text, "length"), {})
    reply = web.ask([0])[0][0]
    assert (reply["answer"], reply["cut"]) == (text, True)


def test_the_key_is_in_no_file_and_no_line(web, capfd):
    web.behave = lambda prompt, number: 503 if number % 2 else "ok"
    web.ask(range(5))
    with open(web.path) as f:
        assert KEY not in f.read() + "".join(capfd.readouterr())


@pytest.mark.parametrize("value", [
    f"http://me:{KEY}@h/v1", f"http://h/v1?key={KEY}", "h:1/v1", "http://h:port/v1"])
def test_an_address_with_a_key_is_refused_without_showing_it(web, monkeypatch, value):
    monkeypatch.setenv("OPENAI_BASE_URL", value)
    assert "OPENAI_BASE_URL has to be like https://api.openai.com/v1" in web.refusal([0])


def test_a_mistake_of_ours_ends_the_run_with_its_traceback(web, monkeypatch):
    monkeypatch.setattr(requests, "post", lambda *args, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        web.ask([0])


TINY = HERE / "data/models/tiny"


def test_transformers_serve_answers(web, monkeypatch, tmp_path):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers[serving] is not installed")
    shutil.copytree(TINY, tmp_path / "tiny")
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    (tmp_path / "tiny" / "chat_template.jinja").write_text(template)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(plm, "time", time)  # it needs seconds to start
    model = str(tmp_path / "tiny")
    code = "from transformers.cli.transformers import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "serve", model, "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        replies, facts = web.ask(["How are you?", "Is it funny?"], model=model)
    finally:
        server.kill()
        server.wait()
    assert all(reply["answer"] for reply in replies)
    assert all(reply["usage"]["completion_tokens"] > 0 for reply in replies)


# 13. One experiment from end to end ---------------------------------------------------------------

def finished(out, line):
    """The folder of a run that a command makes, the only one in `out`."""
    assert go(f"{line} --out {out}") == 0
    (folder,) = pathlib.Path(out).glob("*/*/*/seed*")
    return folder


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def csv_lines(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def same_files(a, b):
    for file in ("predictions.csv", "adapter.safetensors", "log.jsonl"):
        if (a / file).exists() or (b / file).exists():
            assert (a / file).read_bytes() == (b / file).read_bytes(), file


RUNS = [("cls_p", "tiny"), ("lm", "tiny_t5"), ("q_2s_p", "tiny")]
IN_ONE_PROCESS = "import plm, sys; sys.exit(max(plm.main(line.split()) for line in sys.argv[1:]))"


@pytest.fixture(scope="session")
def elsewhere(small_csv, tmp_path_factory):
    """(folder of three runs in another process, which hashes strings otherwise; what it prints)"""
    out = tmp_path_factory.mktemp("elsewhere")
    lines = [f"{method} --model {model} --data {small_csv} --max-steps 4 --out {out} --no-dense"
             for method, model in RUNS]
    child = subprocess.run([sys.executable, "-c", IN_ONE_PROCESS, *lines], cwd=HERE, text=True,
                           capture_output=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]
    assert child.stderr.count("\r") < 30  # a bar moves every ten seconds in a file
    return out, child.stdout


@pytest.mark.parametrize("method, model", RUNS)
def test_a_seed_gives_the_same_bytes_in_any_process_with_and_without_dense_copies(
        tmp_path, small_csv, elsewhere, method, model):
    run = f"{method} --model {model} --data {small_csv} --max-steps 4"
    same_files(finished(tmp_path, run), elsewhere[0] / "small" / model / method / "seed42")


@pytest.mark.parametrize("method, model", RUNS)
def test_a_run_leaves_its_files_and_nothing_else(elsewhere, method, model):
    folder = elsewhere[0] / "small" / model / method / "seed42"
    trained = {"adapter.safetensors", "log.jsonl"} if method != "q_2s_p" else set()
    always = {"lock", "run.json", "metrics.json", "predictions.csv"}
    assert set(os.listdir(folder)) == always | trained


def test_the_score_of_a_run_is_that_of_its_predictions(elsewhere):
    folder = elsewhere[0] / "small/tiny/cls_p/seed42"
    m = metrics_of(folder)
    lines = csv_lines(folder / "predictions.csv")
    gold = [plm.parse_answer(line["gold"], MOODS)[0] for line in lines]
    predicted = [plm.parse_answer(line["predicted"], MOODS)[0] for line in lines]
    assert plm.f1_scores(gold, predicted)["f1_macro"] == m["f1_macro"]
    assert len(lines) == m["rows"]["test"]
    assert f"{m['f1_macro']:.4g}" in elsewhere[1] and str(folder) in elsewhere[1]


def test_the_predictions_of_a_classifier_follow_its_scores(elsewhere):
    for line in csv_lines(elsewhere[0] / "small/tiny/cls_p/seed42/predictions.csv"):
        above = [mood for mood in MOODS if float(line[f"score:{mood}"]) > 0]
        assert line["predicted"] == (", ".join(above) or "none")


def test_the_log_has_a_line_a_step_and_one_a_validation(elsewhere):
    folder = elsewhere[0] / "small/tiny/cls_p/seed42"
    log = log_of(folder)
    assert [line["step"] for line in log] == [1, 2, 3, 3, 4, 4]
    assert ["val_loss" in line for line in log] == [False, False, False, True, False, True]
    assert metrics_of(folder)["val_loss"] == min(log[3]["val_loss"], log[5]["val_loss"])


def test_the_metrics_say_what_was_run(elsewhere, small_csv):
    m = metrics_of(elsewhere[0] / "small/tiny/cls_p/seed42")
    expected = dict(method="cls_p", head="cls", personalized=True, shots=0, data="small",
                    model="tiny", seed=42, labels=MOODS, single=False, ordered=False, none=False,
                    nobody=True, computed_in="float32", lr=3e-3)
    assert {key: m[key] for key in expected} == expected
    for key in ("f1_macro", "per_label", "test_loss", "base_sha", "rows_per_second"):
        assert key in m


@pytest.mark.parametrize("name, methods", [
    ("phi", plm.METHODS), ("t5", plm.METHODS), ("mistral", ["cls_p"]), ("gpt_neox", ["lm_p"])])
def test_methods_run_from_a_folder_of_random_weights(tmp_path, small_csv, name, methods):
    path, _ = random_model(tmp_path / name, name)
    run = f"--model {path} --data {small_csv} --max-steps 1 --max-eval 6 --out {tmp_path}/out"
    for method in methods:
        assert go(f"{method} {run}") == 0
        assert evidence.main(f"{method} {run}".split()) == 0


def test_a_choice_and_a_rating_run_with_every_head(tmp_path):
    rows = [(text, user, 1 + calm + len(text) % 2) for text, user, calm, _ in some_rows()]
    path = write_csv(tmp_path / "a.csv", rows, "text user stars")
    for method in ("cls_p", "lm_p", "q_1s", "rates_p"):
        run = f"{method} --data {path} --max-steps 1 --max-eval 9"
        folder = finished(tmp_path / method, run)
        assert evidence.main(f"{run} --out {tmp_path}/{method}".split()) == 0
        m = metrics_of(folder)
        assert m["single"] and m["ordered"]
        assert "mean_absolute_error" in m
        assert ("f1_macro_tuned" in m) == (method != "q_1s")


def test_where_readers_do_not_differ_a_stranger_reads_as_the_plain_model(tmp_path):
    rows = []
    for i in range(90):
        text = f"What {('a lovely', 'an awful')[i % 2]} day it was, number {i}"
        for reader in range(3):
            rows.append((text, f"u{(i + reader) % 6}", 1 - i % 2, i % 2))
    path = write_csv(tmp_path / "agreed.csv", rows)
    strangers = [a._replace(user="new") for a in plm.load_data(path).parts["test"]]
    read = {}
    for method in ("cls", "cls_p"):
        folder = finished(tmp_path / method, f"{method} --data {path} --epochs 3")
        config, model, tokenizer, users = plm.load_run(folder)
        names = plm.ids_of_users(config, users, model.V)
        encoded, _ = plm.encode_rows(tokenizer, config, strangers, [], names)
        scores = plm.predict(model, tokenizer, encoded, config)["scores"]
        read[method] = plm.probabilities(scores, False)
    assert read["cls_p"] == pytest.approx(read["cls"], abs=0.02)
    assert plm.f1_scores(plm.gold_labels(strangers), read["cls_p"] > 0.5)["f1_macro"] == 1


@pytest.fixture
def short_run(tmp_path):
    """A run's command line without flags of its own, and its folder."""
    path = write_csv(tmp_path / "small.csv", some_rows(60))
    line = f"cls --data {path} --max-steps 2 --max-eval 9 --out {tmp_path}"
    return line, tmp_path / "small/tiny/cls/seed42"


def test_a_finished_run_is_shown_and_not_run_again(capsys, short_run):
    line, folder = short_run
    assert go(line) == 0
    summary = capsys.readouterr().out.split("\n\n")[-1]
    written = os.stat(folder / "metrics.json").st_mtime_ns
    (folder / plm.STATE).touch()  # as if it had been stopped behind metrics.json
    assert go(line) == 0
    assert not (folder / plm.STATE).exists()
    out = capsys.readouterr().out
    assert "is finished" in out and out.endswith(summary)
    assert os.stat(folder / "metrics.json").st_mtime_ns == written


def test_the_folder_of_another_configuration_is_not_overwritten(capsys, short_run):
    line, _ = short_run
    assert go(line) == 0
    for flag, says in (("--lr 0.1", "lr 0.003 there, 0.1 here"), ("--no-share", "share"),
                       ("--no-dense", "no_dense"), ("--ids number", "ids")):
        assert says in refused(capsys, f"{line} {flag}")


def test_the_folder_of_other_data_of_the_same_name_is_not_overwritten(tmp_path, capsys, short_run):
    line, _ = short_run
    assert go(line) == 0
    write_csv(tmp_path / "small.csv", some_rows(57))
    assert "data_sha" in refused(capsys, line)


def test_a_fresh_start_that_is_stopped_leaves_no_finished_run(monkeypatch, tmp_path, small_csv):
    line = f"rates --data {small_csv} --out {tmp_path}"
    folder = finished(tmp_path, f"rates --data {small_csv}")
    remove = os.remove

    def stopped(file):
        remove(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "remove", stopped)
    assert go(f"{line} --fresh") == 130
    assert (folder / "predictions.csv").exists()
    assert not (folder / "metrics.json").exists()


def test_fresh_removes_an_old_export_and_keeps_answers_that_were_paid_for(short_run):
    line, folder = short_run
    assert go(line) == 0
    (folder / "peft").mkdir()
    (folder / "peft" / "adapter_config.json").write_text("{}")
    (folder / "answers.jsonl").write_text("paid for")
    assert go(f"{line} --fresh --lr 0.1") == 0
    assert not (folder / "peft").exists()
    assert (folder / "answers.jsonl").read_text() == "paid for"
    assert metrics_of(folder)["lr"] == 0.1


def test_a_loss_that_is_not_finite_stops_a_run_and_leaves_nothing_that_counts(capsys, short_run):
    line, folder = short_run
    assert "lower --lr" in refused(capsys, f"{line} --lr 1e18")
    assert set(os.listdir(folder)) == {"lock", "run.json", "log.jsonl"}
    assert go(line) == 0  # so the advice can be followed without --fresh


def test_a_file_system_without_locks_is_no_obstacle(monkeypatch, capsys, short_run):
    def flock(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert go(short_run[0]) == 0
    assert "this file system has no locks" in capsys.readouterr().out


def test_a_name_mistyped_in_our_own_code_gives_its_traceback(monkeypatch, short_run):
    def embed(model, input_ids):
        return model.lm.get_imput_embeddings()(input_ids)

    monkeypatch.setattr(plm.PersonalizedLM, "embed", embed)
    with pytest.raises(AttributeError, match="get_imput_embeddings"):
        go(short_run[0])


def stop_at(monkeypatch, step):
    """Lets the user press Ctrl-C in a step of training; states are saved after every step."""
    calls = []
    train_step = plm.train_step

    def stopped(*args):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(plm, "SAVE_EVERY", -1)
    monkeypatch.setattr(plm, "train_step", stopped)


@pytest.mark.parametrize("line", ["cls_p", "lm_p --model tiny_t5"])
def test_ctrl_c_is_status_130_and_the_run_goes_on_to_the_same_bytes(
        tmp_path, monkeypatch, capsys, small_csv, line):
    run = f"{line} --data {small_csv} --epochs 2"
    whole = finished(tmp_path / "whole", run)
    stop_at(monkeypatch, 5)
    capsys.readouterr()
    assert go(f"{run} --out {tmp_path}/stopped") == 130
    assert capsys.readouterr().err.endswith("plm.py: stopped; the same command goes on\n")
    monkeypatch.undo()
    stopped = finished(tmp_path / "stopped", run)
    assert "resuming at step 4" in capsys.readouterr().out
    same_files(whole, stopped)
    assert sorted(os.listdir(whole)) == sorted(os.listdir(stopped))


DRIVER = """import sys, time, plm
plm.SAVE_EVERY = -1
save = plm.save_state
def slowly(*args):
    save(*args)
    time.sleep(0.2)
plm.save_state = slowly
sys.exit(plm.main(sys.argv[1:]))"""


def test_a_killed_run_keeps_its_folder_and_goes_on_to_the_same_bytes(tmp_path, small_csv, capsys):
    run = f"cls_p --data {small_csv} --epochs 4"
    whole = finished(tmp_path / "whole", run)
    killed = tmp_path / "killed/small/tiny/cls_p/seed42"
    log = killed / "log.jsonl"
    run += f" --out {tmp_path}/killed"
    child = subprocess.Popen([sys.executable, "-c", DRIVER, *run.split()], cwd=HERE,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 200
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
    same_files(whole, killed)
    assert sorted(os.listdir(whole)) == sorted(os.listdir(killed))


def other_weights(folder):
    """Changes a model under its name."""
    lm, tokenizer = plm.load_pretrained(folder)
    lm.base_model.layers[3].mlp.up_proj.weight.data += 0.001
    lm.save_pretrained(folder)


def test_a_model_that_changed_under_its_name_is_not_trained_on(
        tmp_path, monkeypatch, capsys, small_csv):
    folder = tiny_copy(tmp_path / "model")
    run = f"cls --model {folder} --data {small_csv} --max-steps 4 --out {tmp_path}/out"
    stop_at(monkeypatch, 3)
    assert go(run) == 130
    monkeypatch.undo()
    other_weights(folder)
    assert "begun with other weights or another tokenizer: --fresh" in refused(capsys, run)


def test_a_run_is_not_read_with_another_base_model(tmp_path, small_csv):
    model = tiny_copy(tmp_path / "model")
    run = f"cls_p --model {model} --data {small_csv} --max-steps 1 --max-eval 6"
    folder = finished(tmp_path / "out", run)
    other_weights(model)
    with pytest.raises(plm.BadInput, match="other weights or another tokenizer than"):
        plm.load_run(folder)


@pytest.mark.parametrize("content, status", [("{}", 0), ("[]", 0), ("null", 2), ("{", 2)])
def test_metrics_that_are_none_are_no_finished_run(capsys, tmp_path, small_csv, content, status):
    run = f"rates --data {small_csv}"
    folder = finished(tmp_path, run)
    (folder / "metrics.json").write_text(content)
    assert go(f"{run} --out {tmp_path}") == status
    assert ("metrics.json is damaged" in capsys.readouterr().err) == (status == 2)
    assert status == 2 or "f1_macro" in metrics_of(folder)


def test_what_is_missing_or_damaged_of_a_run_is_named(tmp_path, elsewhere):
    with pytest.raises(plm.BadInput, match="nosuch: no finished run"):
        plm.load_run(f"{tmp_path}/nosuch")
    with pytest.raises(plm.BadInput, match="nothing was trained here"):
        plm.load_run(elsewhere[0] / "small/tiny/q_2s_p/seed42")
    folder = tmp_path / "run"
    shutil.copytree(elsewhere[0] / "small/tiny/cls_p/seed42", folder)
    os.truncate(folder / "adapter.safetensors", 5000)
    with pytest.raises(plm.BadInput, match=f"{folder}/adapter.safetensors is damaged"):
        plm.load_run(folder)
    os.truncate(folder / "metrics.json", 50)
    with pytest.raises(plm.BadInput, match=f"{folder}/metrics.json is damaged"):
        plm.load_run(folder)


# 14. The command line -----------------------------------------------------------------------------

@pytest.mark.parametrize("line, says", [
    ("cls_q", "invalid choice: 'cls_q'"), ("cls --modle tiny", "--modle tiny (see --help)"),
    ("cls --data nosuch", "make data DATA=nosuch"), ("cls --data nosuch.csv", "no CSV, nor in"),
    ("cls --split-col nosuch", "needs exactly one column 'nosuch'"),
    ("cls --dropout 2", "from 0 to 0.9"),
    ("cls --model ./nosuch", "./nosuch: no folder"), (f"cls --model {HERE}", "cannot be used"),
    ("cls --dropout x", "--dropout: invalid float value: 'x'"), ("cls --seed -1", "from 0"),
    ("cls_p --ids word", "invalid choice: 'word'"), ("q_0s --model openai:", "needs a name"),
    ("cls --model chatgpt", "can only be asked"), (f"cls --out {HERE}/plm.py", "Not a directory"),
    ("cls --tune full --r 4", "leave out --r"), ("cls --tune full --dropout 0", "--dropout"),
    ("cls --tune full --no-quant", "--no-quant"), ("cls --tune full --no-dense", "--no-dense"),
    ("cls --tune full --dtype bfloat16", "trains in float32"),
    ("cls x", "unrecognized arguments: x"), ("", "required: command")])
def test_bad_input_gets_one_line_and_status_2(capsys, tmp_path, line, says):
    if "--out" not in line:
        line += f" --out {tmp_path}"
    assert says in refused(capsys, line)


def test_too_little_memory_is_said_with_what_helps(monkeypatch, capsys):
    def run(args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    monkeypatch.setattr(plm, "run", run)
    assert "out of memory: try --max-nodes 256" in refused(capsys, "cls")


def test_a_full_disk_is_said_in_a_line(monkeypatch, capsys):
    def run(args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plm, "run", run)
    assert "No space left on device" in refused(capsys, "cls")


def test_an_error_of_ours_is_no_error_of_the_users(monkeypatch):
    def run(args):
        raise RuntimeError("shapes (3, 4) and (5, 6) do not fit")

    monkeypatch.setattr(plm, "run", run)
    with pytest.raises(RuntimeError, match="do not fit"):
        go("cls")


def test_a_flag_overrules_what_was_tuned_and_that_the_recipe():
    assert configured("cls")["lr"] == plm.TUNED["tiny"]["lr"]
    assert configured("cls --lr 0.5")["lr"] == 0.5
    assert configured("cls --recipe paper")["lr"] == plm.RECIPES["paper"]["lr"]
    assert configured("cls --model ./x")["lr"] == plm.RECIPES["ours"]["lr"]


@pytest.mark.parametrize("line, name", [
    ("cls --model ./models/x/", "d/x/cls/seed42"), ("rates", "d/baseline/rates/seed42"),
    ("q_0s --split-col draw1", "d.draw1/tiny/q_0s/seed42")])
def test_a_run_has_a_folder_of_its_own(line, name):
    assert plm.folder_of(configured(line), "out") == f"out/{name}"


# A GPU that is pretended --------------------------------------------------------------------------
# torch can follow a computation on a device that is not there by shapes, dtypes and devices alone
# ("fake" tensors). What CUDA refuses is refused: tensors of two devices, and here two dtypes in a
# product. So is what makes the host wait for a GPU: numbers that are fetched from it. torch cannot
# forget a device again, so this happens in a process of its own.

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "native_layer_norm"}


class LikeCUDA(TorchDispatchMode):
    """Refuses what CUDA refuses and fake tensors do not, and copies from the GPU."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor)}
        if name in PRODUCTS and len(dtypes) > 1:
            raise RuntimeError(f"two dtypes in {name}: {dtypes}")
        if name == "_to_copy" and kwargs.get("device") == CPU and args[0].device != CPU:
            raise RuntimeError("the host waits for a copy")
        return func(*args, **kwargs)


def pretend_gpu():
    """(a device that is not there, a context in which it computes)"""
    registration = torch.utils.backend_registration
    module = type("Gpu", (registration._DummyBackendModule,), {})()
    registration._setup_privateuseone_for_python_backend("gpu", backend_module=module)
    plm.MAX_NODES["gpu"] = plm.MAX_NODES["cuda"]
    return torch.device("gpu", 0), FakeTensorMode(allow_non_fake_inputs=True)


def move(module, device, mode):
    """Moves a module with real tensors to a device that is not there."""
    for layer in module.modules():
        for name, p in layer._parameters.items():
            if p is not None:
                fake = mode.from_tensor(p.detach()).to(device)
                layer._parameters[name] = nn.Parameter(fake)
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = mode.from_tensor(buffer).to(device)


def gpu_model(device, mode, line):
    """A model in bfloat16 on the device; what fetches numbers while it is loaded is left out."""
    config = configured(f"{line} --dtype bfloat16 --no-dense", dataset("ABC"))
    tokenizer = tiny_tokenizer(config["model"])
    settings = transformers.AutoConfig.from_pretrained(plm.MODELS[config["model"]])
    settings.num_hidden_layers = 1  # all are alike, and to pretend takes its time
    settings.num_decoder_layers = 1
    auto = transformers.AutoModelForCausalLM
    if settings.is_encoder_decoder:
        auto = transformers.AutoModelForSeq2SeqLM
    with unset_fake_temporarily():
        lm = auto.from_config(settings, attn_implementation="sdpa")
    move(lm, device, mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "to", lambda module, device: module)  # where it is already
        patch.setattr(plm, "find_device", lambda: device)
        patch.setattr(plm, "load_pretrained", lambda name: (lm, tokenizer))
        patch.setattr(plm, "fingerprint", lambda lm, tokenizer: "")
        patch.setattr(plm, "check_forward", lambda model: None)
        model, _, _ = plm.load_model(config, ["u0", "u1", "u2"])
    return model, config


def gpu_batches(device, mode, model, config):
    """The batches of a step: made on the CPU, then copied from pinned memory."""
    rows = with_nobody(model, random_rows())
    pinned = []

    def pin_memory(tensor):
        pinned.append(tensor)
        return tensor

    with pytest.MonkeyPatch.context() as patch, unset_fake_temporarily():
        patch.setattr(plm, "to_device", lambda batch, device: batch)
        model.max_nodes = 120 if model.seq2seq else 60  # a few batches of either
        made = plm.prepare_step(model, rows, config)
    assert len(made) > 1
    batches = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        for batch in made:
            for name, x in batch.items():
                batch[name] = mode.from_tensor(x)
            batches.append(plm.to_device(batch, device))
    assert len(pinned) == len(made) * len(made[0])
    return batches


def gpu_step(device, mode, line):
    """One step of training."""
    model, config = gpu_model(device, mode, line)
    batches = gpu_batches(device, mode, model, config)
    group = dict(params=list(model.trainable().values()), times=1.0)
    optimizer = torch.optim.SGD([group], lr=1.0)
    loss = plm.train_step(model, batches, optimizer, 0.01, config)
    assert loss.device == device
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}


def check_gpu():
    """Steps of both kinds of model run on the pretended GPU, and seeded faults are caught."""
    device, mode = pretend_gpu()
    codebook = plm.codebook.__wrapped__
    dequantize = plm.NF4Linear.dequantize
    summed_loss = plm.summed_loss
    faults = [
        (plm, "codebook", lambda code, device: codebook(code, CPU), "two devices"),
        (plm.NF4Linear, "dequantize", lambda layer, dtype: dequantize(layer), "two dtypes"),
        (plm, "summed_loss", lambda *x: summed_loss(*x) * summed_loss(*x).item(), "_local_scalar"),
        (plm, "summed_loss", lambda *x: summed_loss(*x).cpu(), "waits for a copy")]
    plm.NF4 = mode.from_tensor(plm.NF4)
    with mode, LikeCUDA():
        for line in ("cls_p", "lm_p", "cls_p --model tiny_t5", "lm_p --model tiny_t5"):
            gpu_step(device, mode, line)
        for place, name, fault, says in faults:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(place, name, fault)
                with pytest.raises(Exception, match=says):
                    gpu_step(device, mode, "cls_p")


def test_a_step_on_a_pretended_gpu():
    code = "import test_plm; test_plm.check_gpu(); print('all of it ran', flush=True)"
    child = subprocess.run([sys.executable, "-c", code], cwd=HERE, text=True, capture_output=True,
                           timeout=300)
    assert "all of it ran" in child.stdout, child.stderr[-3000:]


# The files around plm.py --------------------------------------------------------------------------

def test_plm_is_written_plainly():
    source = (HERE / "plm.py").read_text("utf-8")
    tree = ast.parse(source)
    nodes = [x for x in ast.walk(tree) if not isinstance(x, ast.expr_context)]
    prose = set()  # lines of docstrings
    n = len(nodes)
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, node.name
            if ast.get_docstring(node):
                prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
                n -= 2
    lines = source.splitlines()
    code = [i for i, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"]
    assert n / len(set(code) - prose) <= 8.3
    assert not [node for node in nodes if isinstance(node, ast.NamedExpr)]
    assert max(map(len, lines)) <= 100


def test_every_command_is_a_target_and_readme_names_no_other():
    targets = set(re.findall(r"^([a-z0-9_]+):", (HERE / "Makefile").read_text("utf-8"), re.M))
    readme = (HERE / "README.md").read_text("utf-8")
    named = set(re.findall(r"(?:`|^    )make ([a-z0-9_]+)", readme, re.M))
    assert {*plm.METHODS} <= targets
    assert named <= targets


def test_what_readme_names_of_the_code_is_there():
    readme = (HERE / "README.md").read_text("utf-8")
    chapter = readme.partition("## Reading plm.py")[2].partition("## ")[0]
    names = re.findall(r"`([A-Za-z_][\w.]*)`", chapter)
    names = [name.removeprefix("LoRALinear.") for name in names if "/" not in name]
    assert len(names) > 15
    for name in names:
        there = [hasattr(place, name) for place in (plm, plm.PersonalizedLM, readers)]
        assert any(there) or name.endswith((".py", ".json")), name
