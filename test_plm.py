"""Tests of plm.py, in the order of its sections. They show that the file is true: by oracles
(transformers' own forward pass and `generate`, the bytes of bitsandbytes, numbers of scikit-learn,
PEFT where it is installed, prompts word for word), by properties, and by runs of the commands. They
need no network and no GPU. The scripts in data/ have tests of their own."""
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
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

import plm

HERE = pathlib.Path(__file__).resolve().parent
CPU = torch.device("cpu")
MOODS = ["calm", "angry"]


def go(line, *more):
    """The exit status of a command, in this process: importing torch takes seconds."""
    return plm.main([*line.split(), *more])


def refused(capsys, line, *more):
    """The one line that a refused command leaves (behind a bar, where it took long)."""
    capsys.readouterr()
    assert go(line, *more) == 2
    err = capsys.readouterr().err.split("\r")[-1].lstrip()
    assert err.startswith("plm.py: ")
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
    read = plm.read_csv(write_csv(tmp_path / "a.csv", rows))
    found, what = plm.read_annotations(read, None)
    annotation, part = found[0]
    assert what == dict(labels=MOODS, single=False, ordered=False)
    assert annotation == plm.Annotation(text, "with\nnewline", (0, 1))


def test_byte_order_mark_and_line_ends_are_no_part_of_the_data(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufefftext,user,calm\r\n"a, b",u,1\r\nc,u,0\r\n'.encode())
    found, what = plm.read_annotations(plm.read_csv(tmp_path / "a.csv", "text"), None)
    assert [a for a, part in found] == [("a, b", "u", (0, 1)), ("c", "u", (1, 0))]


@pytest.mark.parametrize("content, says", [
    ("txt,user,a,b\nt,u,1,1", "not one column 'text' in txt, user, a, b"),
    ("text,user,user,b\nt,u,1,1", "not one column 'user'"),
    ("text,user,a,b\nt,u,1,1\nt,u,2,1\nt,u,1,1", "row 2: label ['a'] is not 0 or 1"),
    ("text,user,a,b\nt,u,1,1\n ,u,1,1", "row 2: no 'text'"),
    ("text,user,a,b\nt,u,1,1\nt,u,,1", "row 2: no 'a'"),
    ("text,user,a,b\nt,u,1,1\nt,u,1", "row 2 has not 4 cells"),
    ("text,user,a,b\nt,u,1,1,1", "row 1 has not 4 cells"),
    ("", "no annotations"),
    ("text,user,a\n", "no annotations"),
    ("text,user\nt,u", "no column of labels"),
    ("text,user,a\ncaf\xe9,u,1\n", "UTF-8"),
    ("text,user,a\nt,3.91E+16,1", "row 1: a spreadsheet made 3.91E+16 of a user ID"),
    ("text,user,mood\nt,u,joy#fear\nt,u,joy", "lists in a cell"),
    ("text,user,mood\nt,u,\"[\"\"joy\"\"]\"\nt,u,joy", "lists in a cell"),
    ("text,user,a,split\nt,u,1,train\nt,u,1,dev", "row 2: 'dev' is not train, val or test")])
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
    ("joy fear joy", "fear,joy", False, "101"), ("nan 1 nan", "1,nan", False, "101")])
def test_one_column_names_the_single_choice(tmp_path, cells, labels, ordered, chosen):
    rows = [(f"t{i}", "u", cell) for i, cell in enumerate(cells.split())]
    read = plm.read_csv(write_csv(tmp_path / "a.csv", rows, "text user X"))
    found, what = plm.read_annotations(read, None)
    assert what == dict(labels=labels.split(","), single=True, ordered=ordered)
    assert "".join(str(a.labels.index(1)) for a, part in found) == chosen


def test_texts_of_any_number_of_classes_are_no_choice(tmp_path):
    rows = [("t", "u", f"answer {i}") for i in range(101)]
    with pytest.raises(plm.BadInput, match="has 101 values: no choice of one"):
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
    assert data.notes == {
        "rows read": 6, "split by": "draw", "rows left out": 1,
        "val rows of users unknown to training": 1, "test rows of users unknown to training": 1}


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
    says = r"no row for val; .*val rows of users unknown to training': [1-9]"
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
    rows, counts = plm.encode(tokenizer, config, [asked], train, {})
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
    rows, _ = plm.encode(tokenizer, config, [plm.Annotation(text, "u</s>2\n", (1, 1))], [], {})
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
    rows, counts = plm.encode(tokenizer, config, asked, [], {})
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
    rows, _ = plm.encode(tokenizer, config, [plm.Annotation("</s> hello", "u2", (1, 0))], [], {})
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
    rows, counts = plm.encode(tiny_tokenizer(), configured("q_2s_p"), asked, train, {})
    assert counts["too_few_examples"] == 2  # an annotation that stands there five times is one


def test_a_user_is_a_token_behind_the_vocabulary_and_a_stranger_is_nobody():
    tokenizer = tiny_tokenizer()
    config = configured("cls_p")
    names = plm.name_users(config, ["a7", "b8"], 2048)
    asked = [plm.Annotation("hi", user, (0, 1)) for user in ("a7", "b8", "new", "newer")]
    rows, _ = plm.encode(tokenizer, config, asked, [], names)
    assert names == {"a7": 2048, "b8": 2049, plm.NOBODY: 2050}
    assert [row.prompt[row.reader_at] for row in rows] == [2048, 2049, 2050, 2050]
    for row in rows:
        assert row.prompt[:row.reader_at] == rows[0].prompt[:row.reader_at]
        assert row.nobody == rows[2].prompt


def test_a_user_of_the_paper_is_a_number():
    tokenizer = tiny_tokenizer()
    config = configured("cls_p --recipe paper")
    names = plm.name_users(config, ["17"], 2048)
    rows, _ = plm.encode(tokenizer, config, [plm.Annotation("hi", "17", (0, 1))], [], names)
    assert names == {}
    assert rows[0].nobody == ()
    assert "### User ID: 17\n" in tokenizer.decode(rows[0].prompt)


@pytest.mark.parametrize("labels, none, says", [
    (["Anger", "anger!"], False, "'anger!'"), (["a,b", "c"], False, "'a,b'"),
    (["a\nb", "c"], False, "cannot hold"), ([" ", "c"], False, "' '"), (["None"], True, "None")])
def test_labels_that_an_answer_cannot_tell_apart_are_refused(labels, none, says):
    with pytest.raises(plm.BadInput, match=re.escape(says)):
        plm.check_labels(dataset(labels, none=none), "lm")


def test_labels_that_are_clear_when_said_alone_or_never_said_are_taken():
    plm.check_labels(dataset(["a,b", "c", "none"], single=True), "ask")
    plm.check_labels(dataset(["Anger", "anger"]), "cls")


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
