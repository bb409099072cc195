"""Tests of plm.py. Oracles are bitsandbytes' bytes, scikit-learn's numbers, transformers' own
forward pass and generate, prompts word for word; `make test` needs no network and no GPU."""

import copy
import csv
import hashlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

import plm

HERE = os.path.dirname(os.path.abspath(__file__))
CPU = torch.device("cpu")
VOCABULARY = 97


# ------------------------------------------------------------------------------- data and splits


def write_csv(path, rows, header=("text", "user", "calm", "angry")):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return str(path)


def some_rows(n=60):
    return [
        (f"comment number {i // 3} about thing {i // 3 * 7}", f"u{i % 3}", i % 2, 1 - i % 2)
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "cut, with a comma",
        'a "quoted"\nline\r\nbreak',
        "emoji \U0001f600",
        "</s> ### Response: <|endoftext|>",
        "x" * 1_000_000,
    ],
)
def test_any_text_survives_reading(tmp_path, text):
    path = write_csv(tmp_path / "a.csv", [(text, "user with\nnewline", 0, 1), *some_rows()])
    labels, annotations = plm.read_annotations(path, "text", "user")
    assert labels == ["calm", "angry"]
    assert annotations[0] == plm.Annotation(text, "user with\nnewline", (0, 1))


def test_byte_order_mark_and_crlf_are_no_part_of_the_data(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,user,calm\r\nhello,u1,1\r\n")
    assert plm.read_annotations(str(path), "text", "user") == (["calm"], [("hello", "u1", (1,))])


@pytest.mark.parametrize(
    "header, row, says",
    [
        (("txt", "user", "calm"), ("t", "u", "1"), "no column 'text'; there are: txt, user, calm"),
        (("text", "user", "calm"), ("t", "u", "2"), "row 2: label 'calm' is '2', not 0 or 1"),
        (("text", "user", "calm"), (" ", "u", "1"), "row 2: 'text' is empty"),
        (("text", "user", "calm"), ("t", "", "1"), "row 2: 'user' is empty"),
        (("text", "user", "calm"), ("t", "u"), "row 2 (line 3) does not have the 3 columns"),
        (("text", "user", "a,b"), ("t", "u", "1"), "label 'a,b'"),
        (("text", "user", "user"), ("t", "u", "1"), "columns of the same name"),
    ],
)
def test_bad_rows_are_named(tmp_path, header, row, says):
    path = write_csv(tmp_path / "a.csv", [("fine", "u", "1"), row, ("fine", "u", "1")], header)
    with pytest.raises(plm.BadInput, match=re.escape(says)):
        plm.read_annotations(path, "text", "user")


def test_files_that_are_no_csv(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,user,a\ncaf\xe9,u,1\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_text("")
    for name, says in (
        ("latin.csv", "not UTF-8"),
        ("empty.csv", "no annotations"),
        ("none.csv", "no such file"),
    ):
        with pytest.raises(plm.BadInput, match=says):
            plm.read_annotations(str(tmp_path / name), "text", "user")


def test_splits_share_no_text_and_know_every_user(tmp_path):
    rows = [(f"text {i} {'!' * (i % 3)}", f"u{i % 40}", 1, 0) for i in range(900)]
    rows += [("  TEXT 7 ", "u1", 0, 1)]  # the same text but for case and space: the same split
    data = plm.load_data(write_csv(tmp_path / "a.csv", rows))
    ids = [{plm.text_id(a.text) for a in part} for part in (data.train, data.val, data.test)]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    users = [{a.user for a in part} for part in (data.train, data.val, data.test)]
    assert users[1] <= users[0] and users[2] <= users[0]
    assert 0.6 < len(data.train) / len(rows) < 0.8


def test_a_text_in_two_official_splits_stays_in_training(tmp_path):
    for name, texts in (("train", "ab"), ("dev", "bc"), ("test", "cd")):
        (tmp_path / f"{name}.tsv").write_text("".join(f"{t}\t1\tid\n" for t in texts))
    where = plm.official_splits(str(tmp_path), plm.DATASETS["goemotions"], needed=True)
    assert where == {"a": "train", "b": "train", "c": "test", "d": "test"}


# ------------------------------------------------------------------------ the authors' preparation

SEEDS = range(8)


def made_split(seed, users=30):
    """A random split: busy and rare users, users missing in a part, texts judged by many."""
    r = random.Random(seed)
    weights = [r.paretovariate(0.8) for _ in range(users)]
    return {
        part: [
            plm.Annotation(f"{part} {r.randrange(n // 4)}", str(u), (1, r.randrange(2)))
            for u in r.choices(range(users), weights, k=n)
        ]
        for part, n in (("train", 2000), ("val", 300), ("test", 300))
    }


def in_order(some, rows):
    """Are `some` among the rows, in the rows' order?"""
    rest = iter(rows)
    return all(any(a is b for b in rest) for a in some)


@pytest.mark.parametrize("seed", SEEDS)
def test_users_in_all_three(seed):
    # the paper's split: each reader of the test is known from training, and nobody more is lost
    split = made_split(seed)
    out = plm.users_in_all(split)
    users = [{a.user for a in rows} for rows in out.values()]
    assert (
        users[0]
        == users[1]
        == users[2]
        == set.intersection(*({a.user for a in rows} for rows in split.values()))
    )
    assert all(in_order(out[p], split[p]) for p in split) and plm.users_in_all(out) == out


@pytest.mark.parametrize("seed", SEEDS)
def test_floor_drops_whole_users_and_only_rare_ones(seed):
    # "fewer than 1 %": exactly 1 % stays
    rows = made_split(seed)["train"]
    before, after = (Counter(a.user for a in x) for x in (rows, plm.drop_rare_users(rows)))
    busiest = max(before.values())
    assert after == {u: n for u, n in before.items() if n * 100 >= busiest}
    exact = [plm.Annotation("t", "a", (1,))] * 200 + [plm.Annotation("t", "b", (1,))] * 2
    assert len(plm.drop_rare_users(exact)) == 202
    assert len(plm.drop_rare_users(exact[:201])) == 200


@pytest.mark.parametrize("seed", SEEDS)
def test_cap_cuts_only_busy_users_and_keeps_the_order(seed):
    # above 60 % of the busiest one means cut to 60 %, rounded up, by dropping rows and nothing else
    rows = made_split(seed)["train"]
    out = plm.cut_busy_users(rows)
    before, after = (Counter(a.user for a in x) for x in (rows, out))
    most = -(-max(before.values()) * 60 // 100)
    assert after == {u: min(n, most) for u, n in before.items()} and in_order(out, rows)


def test_cap_arrives_at_the_authors_numbers():
    # the busiest users of the notebooks: 7,913 -> 4,748, 940 -> 564, 2,382 -> 1,430
    for busiest, cut in ((7913, 4748), (940, 564), (1005, 603), (2382, 1430)):
        assert len(plm.cut_busy_users([plm.Annotation("t", "a", (1,))] * busiest)) == cut


def test_sample_is_the_same_in_every_run_and_does_not_depend_on_others():
    # --seed, the global random state and other users must not change which rows there are
    rows = made_split(1)["train"]
    random.seed(1)
    one = plm.cut_busy_users(rows)
    random.seed(2)
    assert plm.cut_busy_users(rows) == one
    texts = [str(i) for i in range(100)]
    alone = plm.cut_busy_users([plm.Annotation(t, "a", (1,)) for t in texts])
    both = plm.cut_busy_users([plm.Annotation(t, u, (1,)) for t in texts for u in "ab"])
    assert [a.text for a in alone] == [a.text for a in both if a.user == "a"]
    assert [a.text for a in both if a.user == "b"] != [a.text for a in alone]
    assert [a.text for a in alone][:6] == PINNED  # the same in every Python that there is


PINNED = ["0", "1", "2", "3", "5", "7"]


def test_empty_lists():
    # nothing in, nothing out: load_data then says what is missing
    assert plm.drop_rare_users([]) == plm.cut_busy_users([]) == []


def test_rules_together():
    # the whole preparation on random tables: every part has the same users, nothing is invented
    for seed in SEEDS:
        split = first = made_split(seed)
        for rule in plm.AS_THE_AUTHORS.values():
            split = rule(split)
        assert len({frozenset(a.user for a in rows) for rows in split.values()}) == 1
        assert all(in_order(split[p], first[p]) for p in first)


# ------------------------------------------------------------------ files of the original forms

EMOTIONS = ["anger", "joy"]


def write_originals(folder, seed=0, texts=60, users=6):
    """goemotions in small: three CSVs, three TSVs with a text in two splits; returns the rows."""
    r, rows = random.Random(seed), []
    for t in range(texts):
        for u in range(users):
            rows.append(
                [f'text "{t}", he said', f"id{t}", str(u), "False", r.randrange(2), r.randrange(2)]
            )
    os.makedirs(folder, exist_ok=True)
    for i in range(3):
        with open(os.path.join(folder, f"goemotions_{i + 1}.csv"), "w", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(["text", "id", "rater_id", "example_very_unclear", *EMOTIONS])
            writer.writerows([["first", "x", "0", "False", 0, 1], *rows[i::3]])
    for file, chosen in (
        ("train", range(0, 40)),
        ("dev", range(39, 50)),
        ("test", range(49, texts)),
    ):
        with open(os.path.join(folder, file + ".tsv"), "w", newline="") as f:
            f.writelines(f'text "{t}", he said\t1\tid{t}\n' for t in chosen)
    return len(rows) + 3


def row_for(folder, rows, base=""):
    """The goemotions row of DATASETS for the small files."""
    row = dict(
        plm.DATASETS["goemotions"], dir=str(folder), rows=rows, expected={"with a label": (1,)}
    )
    row["urls"] = {file: f"{base}/{file}" for file in row["urls"]}
    return row


def test_load_data_of_the_original_form(tmp_path, monkeypatch):
    # no text in two splits, texts of two splits where the authors have them, all-zero rows gone
    rows = write_originals(tmp_path)
    monkeypatch.setitem(plm.DATASETS, "goemotions", row_for(tmp_path, rows))
    data = plm.load_data("goemotions")
    texts = [{a.text for a in part} for part in (data.train, data.val, data.test)]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    assert 'text "39", he said' in texts[0] and 'text "49", he said' in texts[2]
    assert data.labels == EMOTIONS and all(any(a.labels) for a in data.train)
    assert (
        data.notes["annotations"] == rows
        and data.notes["split by"] == "dev.tsv, test.tsv, train.tsv"
    )
    assert plm.load_data("goemotions") == data


def test_wrong_row_count_and_missing_split_files_are_refused(tmp_path, monkeypatch):
    # half of the original must never pass for the original
    rows = write_originals(tmp_path)
    monkeypatch.setitem(plm.DATASETS, "goemotions", row_for(tmp_path, rows + 1))
    with pytest.raises(plm.BadInput, match="the original has"):
        plm.load_data("goemotions")
    monkeypatch.setitem(plm.DATASETS, "goemotions", row_for(tmp_path, rows))
    os.remove(tmp_path / "test.tsv")
    with pytest.raises(plm.BadInput, match="test.tsv: no such file; the official split"):
        plm.load_data("goemotions")
    for file in ("train.tsv", "dev.tsv"):
        os.remove(tmp_path / file)
    with pytest.raises(plm.BadInput, match="no such file; the official split"):
        plm.load_data("goemotions")


def test_another_file_of_the_same_columns_is_split_by_hash(tmp_path):
    # --data unhealthy --data-dir elsewhere --labels ...: other labels, other name, no split files
    with open(tmp_path / "annotations.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["_unit_id", "_worker_id", "_trust", "comment", "insult", "healthy"])
        writer.writerows([t, u, 1, f"comment {t}", t % 2, 1] for t in range(80) for u in range(5))
    data = plm.load_data("unhealthy", str(tmp_path), labels=["insult", "healthy"])
    assert data.notes["split by"] == "a hash of the text" and data.labels == ["insult", "healthy"]
    assert all(plm.split_of(a.text) == "test" for a in data.test)
    with pytest.raises(plm.BadInput, match="no column 'antagonize'"):
        plm.load_data("unhealthy", str(tmp_path))


def test_split_files_of_unhealthy_are_csv_with_comments(tmp_path, monkeypatch):
    # the second original form: corpus/*.csv with quoted comments of several lines
    labels = plm.DATASETS["unhealthy"]["labels"]
    comments = [f'comment {t},\n"so to say"' for t in range(30)]
    with open(tmp_path / "unhealthy_full.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["_unit_id", "comment", "_trust", "_worker_id", *labels])
        writer.writerows([t, c, 1, u, *[1] * 8] for t, c in enumerate(comments) for u in range(4))
    os.mkdir(tmp_path / "corpus")
    for part, chosen in (
        ("train", comments[:20]),
        ("val", comments[20:25]),
        ("test", comments[25:]),
    ):
        with open(tmp_path / "corpus" / f"{part}.csv", "w", newline="") as f:
            csv.writer(f).writerows([["_unit_id", "comment"], *([0, c] for c in chosen)])
    row = dict(plm.DATASETS["unhealthy"], rows=120)
    monkeypatch.setitem(plm.DATASETS, "unhealthy", row)
    data = plm.load_data("unhealthy", str(tmp_path))
    assert data.labels == list(labels) and {a.text for a in data.test} == set(comments[25:])
    assert data.notes["in a split"] == dict(train=80, val=20, test=20, users=4)
    assert not plm.bad_content(tmp_path / "unhealthy_full.csv", "unhealthy_full.csv", row)
    assert not plm.bad_content(tmp_path / "corpus" / "val.csv", "corpus/val.csv", row)


def test_own_csv_keeps_the_simple_rule(tmp_path):
    # a user's own file loses nobody but strangers to training; odd names are names and not patterns
    path = tmp_path / "my [data].csv"
    with open(path, "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "user", "a"])
        writer.writerows([f"t{t}", "busy" if t % 9 else "rare", 1] for t in range(300))
        writer.writerows(
            [f"t{t}", "stranger", 1] for t in range(300) if plm.split_of(f"t{t}") != "train"
        )
    data = plm.load_data(str(path))
    assert len(data.train + data.val + data.test) == 300 and "busy users cut" not in data.notes
    with pytest.raises(plm.BadInput, match="no such file"):
        plm.load_data(str(tmp_path / "other.csv"))


def test_often_judged_texts_stay_and_are_counted(tmp_path):
    # control comments: judged by everybody; the authors kept them
    with open(tmp_path / "d.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["text", "user", "a"])
        writer.writerows(["control", u, 1] for u in range(21))
        writer.writerows([f"t{t}", u, 1] for t in range(60) for u in range(20))
    notes = plm.load_data(str(tmp_path / "d.csv")).notes
    if plm.split_of("control") == "train":
        assert (notes["texts judged over 20 times"], notes["annotations of these"]) == (1, 21)


# ---------------------------------------------------------------------------- the local server


# ---------------------------------------------------------------------------------------- prompts

LABELS = ["calm", "angry"]
OF_DATASET = {  # dataset -> its first two labels and the rest
    "sample": ("funny", "sarcastic", "hostile, dismissive, supportive, curious, sad"),
    "unhealthy": (
        "antagonize",
        "condescending",
        "dismissive, generalisation, generalisation_unfair, healthy, hostile, sarcastic",
    ),
    "goemotions": (
        "admiration",
        "amusement",
        "anger, annoyance, approval, caring, confusion, "
        "curiosity, desire, disappointment, disapproval, disgust, embarrassment, "
        "excitement, fear, gratitude, grief, joy, love, nervousness, optimism, pride, "
        "realization, relief, remorse, sadness, surprise, neutral",
    ),
}
PLAIN = "Which of the labels fit the text? "
TOLD = "Which of the labels would this user choose for the text? "
OTHERS, OWN = "First see how other people answered. ", "First see how this user answered before. "
COMMA = "Answer with labels from the list, separated by commas.\n### Labels: A, B, REST"
ONE = "\n### Text: hi\n### Response: A"
TWO = ONE + "\n### Text: go away\n### Response: A, B"
END, END_P = "\n### Text: well\n### Response:", "\n### Text: well\n### User ID: u2\n### Response:"
GOLDEN = {
    "cls": PLAIN + COMMA + END,
    "cls_p": TOLD + COMMA + END_P,
    "lm": PLAIN + COMMA + END,
    "lm_p": TOLD + COMMA + END_P,
    "q_0s": PLAIN + COMMA + END,
    "q_0s_p": TOLD + COMMA + END_P,
    "q_1s": PLAIN + OTHERS + COMMA + ONE + END,
    "q_1s_p": TOLD + OWN + COMMA + ONE + END_P,
    "q_2s": PLAIN + OTHERS + COMMA + TWO + END,
    "q_2s_p": TOLD + OWN + COMMA + TWO + END_P,
}


@pytest.mark.parametrize("dataset", OF_DATASET)
@pytest.mark.parametrize("name", plm.METHODS)
def test_prompts_word_for_word(name, dataset):
    a, b, rest = OF_DATASET[dataset]
    labels, method, blank = (
        [a, b, *rest.split(", ")],
        plm.METHODS[name],
        [0] * len(rest.split(", ")),
    )
    shown = [
        plm.Annotation("hi", "u2", (1, 0, *blank)),
        plm.Annotation("go away", "u2", (1, 1, *blank)),
    ]
    parts = plm.prompt_parts(method, labels, "well", "u2", shown[: method.shots])
    golden = GOLDEN[name].replace("A, B, REST", f"{a}, {b}, {rest}").replace(" A, B", f" {a}, {b}")
    assert "".join(sum(parts, [])) == golden.replace(": A\n", f": {a}\n")


def tokenizers():
    return {
        name: transformers.AutoTokenizer.from_pretrained(plm.MODELS[name]["id"])
        for name in ("tiny", "tiny_t5")
    }


@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_tokens_spell_the_prompt_and_nothing_in_a_text_ends_it(name):
    tokenizer = tokenizers()[name]
    texts = ["a plain comment", "</s> <s> <pad> ### Response: calm</s>", "word " * 3000]
    rows, counts = plm.encode(
        tokenizer,
        plm.METHODS["lm_p"],
        LABELS,
        [plm.Annotation(t, "u 2\n", (1, 1)) for t in texts],
        max_text=50,
    )
    assert counts["texts_cut"] == 1
    for row in rows:
        ids = row.prompt + row.answer[:-1]
        content = ids[ids[0] == tokenizer.bos_token_id :]
        content = [
            i
            for i in content
            if not (tokenizer.bos_token_id is None and i == tokenizer.eos_token_id)
        ]
        assert tokenizer.eos_token_id not in content and tokenizer.pad_token_id not in content
        # Only the text was cut: instruction, user and marker are whole.
        assert row.shared == rows[0].shared and row.user == rows[0].user
        assert row.answer == rows[0].answer and row.answer[-1] == tokenizer.eos_token_id
    assert (
        tokenizer.decode(rows[0].user).split() == "u 2 ### Response:".split() or name == "tiny_t5"
    )


def test_examples_end_where_there_are_no_more_distinct_ones():
    train = [plm.Annotation("a", "u1", (1, 0))] * 5 + [plm.Annotation("b", "u2", (1, 0))] * 3
    shown = plm.choose_examples(plm.METHODS["q_2s"], train)(plm.Annotation("t", "u1", (1, 0)))
    assert shown == [train[-1]]


def test_a_chat_template_goes_around_a_question_and_around_nothing_else():
    tokenizer = tokenizers()["tiny"]
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>"
        "{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
    )
    annotation = plm.Annotation("</s> hello", "u2", (1, 0))
    (row,), _ = plm.encode(tokenizer, plm.METHODS["q_0s_p"], LABELS, [annotation])
    (trained,), _ = plm.encode(tokenizer, plm.METHODS["lm_p"], LABELS, [annotation])
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
            assert all(a in train for a in shown) and asked.text not in {a.text for a in shown}
            assert {a.user == asked.user for a in shown} <= {method.personalized}
            own = seed % 9 < 7
            assert len(shown) == (method.shots if own or not method.personalized else 0)
            assert shown == plm.choose_examples(method, train)(asked)  # fixed for the row


# -------------------------------------------------------------------------------------------- NF4


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


def test_bits_a_weight():
    torch.manual_seed(0)
    layer = quantized(torch.randn(512, 512))
    size = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert abs(8 * size / 512**2 - 4.127) < 0.001


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


# ------------------------------------------------------------------------------------------- LoRA


def small_lora(dropout=0.0):
    torch.manual_seed(0)
    return plm.LoRALinear(quantized(torch.randn(24, 64)), r=2, alpha=32, dropout=dropout)


def test_lora_begins_as_nothing_and_is_w_plus_ba():
    layer, x = small_lora(), torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.lora_B)
    dense = layer.base.dequantize() + 32 / 2 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer(x), F.linear(x, dense), atol=1e-4)


def test_lora_gradients_are_autograds():
    layer, x = small_lora(), torch.randn(3, 64)
    nn.init.normal_(layer.lora_B)
    keep, layer.base.dtype = (torch.rand(x.shape) < 0.7).double(), torch.float64
    inputs = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]

    def matmul(x, A, B):
        return plm.LoRAMatmul.apply(x, layer.base, keep, A, B, 1.7)

    assert torch.autograd.gradcheck(matmul, inputs)
    x, A, B = inputs
    dense = F.linear(x, layer.base.dequantize()) + 1.7 * (x * keep) @ A.T @ B.T
    assert torch.allclose(matmul(x, A, B), dense)


def test_dropout_hits_five_percent_and_only_in_training():
    layer, x = small_lora(dropout=0.05), torch.randn(3, 64)
    nn.init.normal_(layer.lora_B)
    plm.draw_dropout(layer, positions=10_000)
    assert layer.pool.unique().tolist() == [0, 1]
    assert abs(1 - layer.pool.mean() - 13 / 256) < 0.001
    kept = [layer(x) for _ in range(2)]  # two pieces of the pool
    assert not torch.equal(*kept)
    layer.eval()
    assert torch.equal(layer(x), layer(x)) and not torch.equal(layer(x), kept[0])


def test_dropout_keeps_the_expectation():
    layer, x = small_lora(dropout=0.5), torch.randn(1, 64)
    nn.init.normal_(layer.lora_B)
    plm.draw_dropout(layer, positions=20_000)
    mean = layer(x.expand(20_000, -1)).mean(0)
    assert torch.allclose(mean, layer.eval()(x)[0], atol=0.05 * float(mean.abs().max()))


# ------------------------------------------------------- the prompt tree, the models, the batches


def random_rows(seed=1, texts=4):
    """Rows of one shared part, some texts, one to four readers of each."""
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(5, VOCABULARY - 7) for _ in range(rng.randrange(low, high)))

    shared, rows = ids(9, 10), []
    for i in range(texts):
        text = ids(3, 30) if i else (shared[0],)  # of very different lengths: several buckets
        for _ in range(rng.randrange(1, 5)):
            rows.append(
                plm.Row(
                    shared,
                    text,
                    (7, rng.randrange(5, 9), 8),
                    ids(1, 4) + (2,),
                    (rng.randrange(2), 1, 0),
                    None,
                )
            )
    return rows


ARCHITECTURES = {
    "llama": ("LlamaConfig", dict(num_key_value_heads=2)),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2)),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "phi": ("PhiConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "t5": ("T5Config", {}),
}


def random_model_folder(path, name, vocab_size=VOCABULARY):
    """A Hugging Face folder of a small random model of an architecture."""
    config, extra = ARCHITECTURES[name]
    size = (
        dict(
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
        if name == "t5"
        else dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    )
    config = getattr(transformers, config)(
        vocab_size=vocab_size, pad_token_id=2, eos_token_id=2, **size, **extra
    )
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    lm = kind.from_config(config)
    for p in lm.parameters():  # all of it random: norms and biases too
        p.data += 0.1 * torch.randn_like(p)
    lm.save_pretrained(path)
    return str(path), lm.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_dir(request, tmp_path_factory):
    path, lm = random_model_folder(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, path, lm


def ready(path, head, lora=True):
    """A PersonalizedLM from a folder, LoRA's B not zero, so that every gradient is one."""
    torch.manual_seed(1)
    lm = plm.load_quantized(path, CPU, torch.float32)
    if lora:
        plm.add_lora(lm, r=2, alpha=4, dropout=0.05)
    model = plm.PersonalizedLM(lm, head, 3)
    for name, p in model.trainable().items():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    return model.train(False)


def test_only_the_linears_of_the_backbone_are_quantized(model_dir):
    name, path, _ = model_dir
    model = ready(path, "lm")
    leaves = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, plm.LoRALinear)}
    attention = {
        "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "qwen2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "mistral": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "phi": "q_proj k_proj v_proj dense fc1 fc2",
        "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
        "t5": "q k v o wi_0 wi_1 wo",
    }
    assert leaves == set(attention[name].split())
    assert isinstance(model.lm.get_output_embeddings(), nn.Linear)
    assert set(n.split(".")[-1] for n in model.trainable()) == {"lora_A", "lora_B"}


def unquantized_reference(model, lm):
    """transformers' own model with the rounded weights of ours."""
    reference = copy.deepcopy(lm)
    layers = dict(reference.named_modules())
    for name, m in model.lm.named_modules():
        if isinstance(m, plm.NF4Linear):
            layers[name].weight.data = m.dequantize()
    return reference.eval()


def test_loaded_model_is_transformers_own_with_rounded_weights(model_dir):
    # Ours loads tensor by tensor and shares prefixes; theirs runs each prompt by itself.
    name, path, lm = model_dir
    model, rows = ready(path, "lm", lora=False), random_rows()
    reference = unquantized_reference(model, lm)
    batch = plm.make_batch(model, rows)
    ours, theirs = model(batch)[batch["of"]], []
    for row in rows:
        if name == "t5":
            out = reference(
                input_ids=torch.tensor([row.prompt]),
                decoder_input_ids=torch.tensor([(0, *row.answer[:-1])]),
            )
            theirs.append(out.logits[0])
        else:
            out = reference(torch.tensor([row.prompt + row.answer[:-1]]))
            theirs.append(out.logits[0, len(row.prompt) - 1 :])
    assert torch.allclose(ours, torch.cat(theirs), atol=2e-5)


@pytest.mark.parametrize("head", ["cls", "lm"])
def test_loss_and_every_gradient_are_equal_with_and_without_sharing(model_dir, head):
    _, path, _ = model_dir
    rows, results = random_rows(), []
    for share in (True, False):
        model = ready(path, head)
        batch = plm.make_batch(model, rows, share)
        loss = plm.summed_loss(model, batch) / plm.n_targets(rows, head)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.trainable().items()}, batch["tokens"]))
    (loss, grads, tokens), (plain_loss, plain_grads, plain_tokens) = results
    assert abs(loss - plain_loss) < 1e-5 and tokens <= plain_tokens
    assert plain_tokens == sum(plm.tokens_alone(row, model) for row in rows)
    for name in plain_grads:
        assert grads[name].abs().max() > 0, f"{name} gets no gradient"
        assert (grads[name] - plain_grads[name]).abs().max() < 1e-5, name


def test_the_tree_computes_every_distinct_prefix_once():
    rows = random_rows(texts=6)
    for head in ("cls", "lm"):
        answer = (lambda row: row.answer[:-1]) if head == "lm" else (lambda row: ())
        prefixes = {
            (row.shared + row.text + row.user + answer(row))[:n]
            for row in rows
            for n in range(1, len(row.prompt + answer(row)) + 1)
        }
        assert plm.tree_batch(rows, head, CPU)["tokens"] == len(prefixes)
        plain = sum(len(row.prompt + answer(row)) for row in rows)
        assert plm.tree_batch(rows, head, CPU, share=False)["tokens"] == plain


def test_pieces_of_a_batch_give_the_whole_gradient(model_dir):
    # 32 rows at once or 5 at a time: the mean is over the targets of the step, not of the piece.
    _, path, _ = model_dir
    rows, grads = random_rows(), []
    for micro in (0, 5):
        model = ready(path, "lm")
        optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
        before = {n: p.detach().clone() for n, p in model.trainable().items()}
        for layer in (m for m in model.modules() if isinstance(m, plm.LoRALinear)):
            layer.dropout = 0.0
        plm.train_step(model, rows, optimizer, clip=1e9, micro=micro)
        grads.append({n: before[n] - p.detach() for n, p in model.trainable().items()})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-5) for n in grads[0])


def test_greedy_decoding_over_the_tree_is_transformers_generate(model_dir):
    _, path, lm = model_dir
    model, rows = ready(path, "lm", lora=False), random_rows(seed=3)
    reference = unquantized_reference(model, lm)
    write = plm.write_answers if model.seq2seq else plm.grow_answers
    with torch.no_grad():
        ours, plain = write(model, rows, 2, 9), write(model, rows, 2, 9, share=False)
    for row, answer in zip(rows, ours):
        ids = torch.tensor([row.prompt])
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=2,
            eos_token_id=2,
        )[0].tolist()
        out = out[1:] if model.seq2seq else out[len(row.prompt) :]
        assert answer == (out[: out.index(2)] if 2 in out else out)
    assert ours == plain


def test_frozen_bytes_stay_and_everything_trained_moves(model_dir):
    _, path, _ = model_dir
    model, rows = ready(path, "cls"), random_rows()
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    frozen |= {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.trainable().items()}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    plm.train_step(model, rows, optimizer, clip=1.0)
    now = dict(model.named_buffers()) | dict(model.named_parameters())
    assert all(torch.equal(now[n], t) for n, t in frozen.items())
    assert all(not torch.equal(now[n], t) for n, t in trained.items())


def test_masks_and_pooling_go_by_length_when_pad_is_eos_and_ends_inside(model_dir):
    # 2 is pad and eos of these models; texts that contain it must change nothing but themselves.
    _, path, _ = model_dir
    model, rows = ready(path, "cls"), random_rows()
    rows[3] = rows[3]._replace(text=(2, 2, 9, 2))
    batch = plm.make_batch(model, rows)
    together = model(batch)[batch["of"]]
    for row, scores in zip(rows, together):
        alone = plm.make_batch(model, [row])
        assert torch.allclose(model(alone)[alone["of"]][0], scores, atol=1e-5)


def test_batches_hold_every_row_once_and_keep_texts_together():
    rows = [
        plm.Row((1,), (i // 3,) * (1 + i % 17 // 3), (i,), (2,), (1,), None) for i in range(1000)
    ]
    for rng in (None, random.Random(0)):
        batches = plm.in_batches(rows, 32, rng)
        assert sorted(row.user for b in batches for row in b) == sorted(row.user for row in rows)
        assert [len(b) for b in batches].count(32) == 31
    assert plm.in_batches(rows, 32, random.Random(0)) == plm.in_batches(rows, 32, random.Random(0))


# ------------------------------------------------------------------------- training and the paper


def test_learning_rate_climbs_then_falls_to_nearly_nothing():
    rates = [plm.learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.001


def miniature(head, personalized, tmp_path):
    """F1 after training on texts that two users label in opposite ways."""
    path, _ = random_model_folder(tmp_path, "llama")
    model = ready(path, head)
    rows = []
    for i in range(8):
        for user in (0, 1):
            chosen = (user, 1 - user)
            ids = (50 + user, 9) if personalized else (9,)
            rows.append(plm.Row((1, 3, 5), (20 + i, 30 + i), ids, (60 + user, 2), chosen, None))
    model = plm.PersonalizedLM(model.lm, head, 2)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        plm.train_step(model, rows, optimizer, clip=1.0)
    if head == "cls":
        predicted = plm.label_scores(model, rows) > 0
    else:
        with torch.no_grad():
            answers = plm.grow_answers(model.train(False), rows, 2, 3)
        predicted = [(answer == [61], answer == [60]) for answer in answers]
    return plm.f1_scores([row.labels for row in rows], predicted)["f1_macro"]


@pytest.mark.parametrize("head", ["cls", "lm"])
def test_the_paper_in_miniature(head, tmp_path):
    # Same text, two users, opposite labels: who is told the user can be right, nobody else can.
    # Without the user the best is to tick both labels always: F1 = 2 / 3.
    assert miniature(head, True, tmp_path / "p") == 1.0
    assert miniature(head, False, tmp_path / "plain") <= 2 / 3 + 1e-6


def test_pieces_keep_the_rows_in_order_and_to_the_budget():
    rows = random_rows(texts=12)
    for head in ("cls", "lm"):
        for share in (True, False):
            tokens = [plm.tree_batch([row], head, CPU)["tokens"] for row in rows]
            for budget in (1, max(tokens), 2 * max(tokens), 10_000):
                parts = plm.pieces(rows, head, budget, share=share)
                assert sum(parts, []) == rows
                if budget == 10_000:
                    assert len(parts) == 1
                if budget > max(tokens):
                    assert all(
                        plm.tree_batch(p, head, CPU, share)["tokens"] < 2 * budget for p in parts
                    )
    assert [len(p) for p in plm.pieces(rows[:7], "cls", 0, micro=3)] == [3, 3, 1]


def test_checkpointing_keeps_less_and_changes_nothing(tmp_path):
    path, _ = random_model_folder(tmp_path, "llama")
    found = []
    for checkpoint in (False, True):
        model = ready(path, "cls")
        if checkpoint:
            model.lm.gradient_checkpointing_enable(dict(use_reentrant=False))
        size = plm.bytes_per_token(model, random_rows())
        torch.manual_seed(5)  # of dropout, which is drawn again in the same way
        batch = plm.make_batch(model.train(True), random_rows())
        plm.summed_loss(model, batch).backward()
        found.append((size, [p.grad for p in model.trainable().values()]))
    assert found[1][0] < found[0][0] / 3
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][1], found[1][1]))


@pytest.fixture(scope="module")
def small_csv(tmp_path_factory):
    rows = [
        (f"comment {i // 2} on thing {i * 7 % 50}", f"u{i % 4}", i % 2, 1 - i % 2)
        for i in range(120)
    ]
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv", rows)


@pytest.mark.parametrize("name", ["phi", "mistral", "gpt_neox", "t5"])
def test_ten_methods_of_the_papers_architectures_run_from_a_folder(
    name, small_csv, tmp_path, capsys
):
    # Random weights, the real tokenizer: every code path from the checkpoint to the table.
    folder, _ = random_model_folder(tmp_path / name, name, vocab_size=2048)
    source = plm.MODELS["tiny_t5" if name == "t5" else "tiny"]["id"]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(source, file), folder)
    for method in plm.METHODS:
        assert (
            plm.main(
                [
                    method,
                    "--model",
                    folder,
                    "--data",
                    small_csv,
                    "--max-steps",
                    "1",
                    "--max-eval",
                    "6",
                    "--out",
                    str(tmp_path / "out"),
                ]
            )
            == 0
        )
    out = capsys.readouterr().out
    names = {
        "phi": "dense, fc1, fc2, k_proj, q_proj, v_proj",
        "t5": "k, o, q, v, wi_0, wi_1, wo",
        "mistral": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        "gpt_neox": "dense, dense_4h_to_h, dense_h_to_4h, query_key_value",
    }
    assert out.count(f"of NF4 ({names[name]})") == 10
    assert plm.main(["table", "--out", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{method} " in table for method in plm.METHODS)


def test_a_sharded_or_pickled_checkpoint_is_the_same_model(tmp_path):
    path, lm = random_model_folder(tmp_path / "whole", "gpt_neox")
    for form in ("sharded", "pickled"):
        folder = tmp_path / form
        lm.save_pretrained(folder, max_shard_size="30KB")
        if form == "pickled":
            state = {name: tensor for name, tensor in plm.checkpoint_tensors(folder)}
            for file in folder.glob("*.safetensors*"):
                file.unlink()
            torch.save(state, folder / "pytorch_model-00001-of-00001.bin")
        same = plm.load_quantized(str(folder), CPU, torch.float32).state_dict()
        for name, tensor in plm.load_quantized(path, CPU, torch.float32).state_dict().items():
            assert torch.equal(tensor, same[name])


def test_an_untied_head_of_a_t5_is_kept(tmp_path):
    # transformers 5 ties a T5's embeddings whatever its config says; Flan-T5's head is its own.
    path, lm = random_model_folder(tmp_path, "t5")
    state = dict(plm.checkpoint_tensors(path))
    state["lm_head.weight"] = torch.randn(VOCABULARY, 64)
    safetensors.torch.save_file(state, os.path.join(path, "model.safetensors"))
    loaded = plm.load_quantized(path, CPU, torch.float32)
    assert torch.equal(loaded.lm_head.weight, state["lm_head.weight"])
    for module in (loaded.shared, loaded.encoder.embed_tokens, loaded.decoder.embed_tokens):
        assert torch.equal(module.weight, state["shared.weight"])


# ----------------------------------------------------------------------------- answers and scores


@pytest.mark.parametrize(
    "answer, chosen, unknown",
    [
        ("calm, angry", (1, 1, 0), 0),
        ("Angry.", (0, 1, 0), 0),
        ("ANGRY;calm", (1, 1, 0), 0),
        ("calm calm", (1, 0, 0), 0),
        ("", (0, 0, 0), 0),
        ("I think: angry", (0, 1, 0), 2),
        ("not_calm", (0, 0, 1), 0),
        ("very furious", (0, 0, 0), 2),
    ],
)
def test_answers_are_read_with_forgiveness(answer, chosen, unknown):
    assert plm.parse_answer(answer, ["calm", "angry", "not_calm"]) == (chosen, unknown)


def test_answers_we_train_on_are_read_back():
    labels = ["generalisation", "generalisation_unfair", "hostile"]
    for chosen in ((1, 0, 1), (0, 1, 0), (1, 1, 1)):
        assert plm.parse_answer(plm.answer_text(labels, chosen), labels) == (chosen, 0)


def test_f1_by_hand():
    # Label a: TP 1, FP 1, FN 1 -> 2 / 4.  b: TP 2, FP 0, FN 1 -> 4 / 5.  c: nothing anywhere -> 0.
    gold = [(1, 1, 0), (1, 1, 0), (0, 1, 0)]
    predicted = [(1, 1, 0), (0, 1, 0), (1, 0, 0)]
    scores = plm.f1_scores(gold, predicted)
    assert scores["per_label"] == pytest.approx([0.5, 0.8, 0.0])
    assert scores["f1_macro"] == pytest.approx(1.3 / 3)
    assert scores["f1_micro"] == pytest.approx(6 / 9)


def test_f1_is_scikit_learns():
    # Recorded from scikit-learn 1.9.1: f1_score(gold, predicted, average=..., zero_division=0).
    i = np.arange(40)[:, None] * np.array([3, 5, 7, 11]) + np.array([0, 1, 2, 3])
    gold, predicted = (i % 5 < 2).astype(int), (i % 7 < 3).astype(int)
    gold[:, 3] = predicted[:, 3] = 0  # a label that nobody chose and nothing predicted
    scores = plm.f1_scores(gold, predicted)
    assert scores["f1_macro"] == pytest.approx(0.40409016271085235, abs=1e-12)
    assert scores["f1_micro"] == pytest.approx(0.5578231292517006, abs=1e-12)
    assert scores["per_label"] == pytest.approx(
        [0.42424242424242425, 0.6206896551724138, 0.5714285714285714, 0.0], abs=1e-12
    )


# --------------------------------------------------------------------------------------- ChatGPT

KEY = "sk-test-Zx81-nobody-may-see-this"


class ChatHandler(BaseHTTPRequestHandler):
    """Does what server.behave(prompt, number of the request) says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body, kind="application/json", length=None, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": length or len(body),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt, server = body["messages"][0]["content"], self.server
        with server.lock:
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.prompts.append(prompt)
            number = len(server.prompts)
        try:
            self.act(server.behave(prompt, number), prompt)
        except OSError:
            self.close_connection = True  # the client has gone

    def act(self, what, prompt):
        answer = dict(
            choices=[dict(message=dict(role="assistant", content=f"joy {prompt}"))],
            usage=dict(prompt_tokens=7, completion_tokens=2),
        )
        whole = json.dumps(answer).encode()
        if what == "ok":
            self.reply(200, answer)
        elif what == "429":
            self.reply(429, dict(error=dict(message="slow down")), Retry_After=0)
        elif what == "429 hour":
            self.reply(429, dict(error=dict(message="slow down")), Retry_After=3600)
        elif what == "429 odd":
            self.reply(429, dict(error=dict(message="slow down")), Retry_After="soon")
        elif what == "html":
            self.reply(200, b"<html>Bad gateway</html>", "text/html")
        elif what == "no choices":
            self.reply(200, dict(choices=[]))
        elif what == "null":
            self.reply(200, dict(choices=[dict(message=dict(content=None))]))
        elif what == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif what == "stall":
            self.server.quit.wait(6)
        elif what == "stalled body":
            self.reply(200, whole[:20], length=len(whole))
            self.server.quit.wait(6)
        elif what == "truncated":
            self.reply(200, whole[:20], length=len(whole))
            self.close_connection = True
        elif what == "truncated chunks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n" % (20, whole[:20]))
            self.close_connection = True
        elif what in ("dribble", "dribbled headers"):
            if what == "dribble":
                self.reply(200, b"", length=10000)
            else:
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            for _ in range(100):
                self.wfile.write(b"x")
                self.wfile.flush()
                if self.server.quit.wait(0.1):
                    break
            self.close_connection = True
        elif what == "redirect":
            self.reply(302, b"", Location="/v1/elsewhere")
        else:
            self.reply(
                int(what),
                dict(error=dict(message=f"Bad key {self.headers['Authorization']}, " + "x" * 999)),
            )


@pytest.fixture
def chat_server(monkeypatch):
    """A server on a free port; the environment names it and holds a key."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), ChatHandler)
    server.daemon_threads, server.lock, server.quit = True, threading.Lock(), threading.Event()
    server.bodies, server.headers, server.prompts = [], [], []
    server.behave = lambda prompt, number: "ok"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(plm, "BACKOFF", 0.001)
    yield server
    server.quit.set()
    server.shutdown()
    server.server_close()


def some_prompts(n):
    return {f"row{i}": f"prompt {i}" for i in range(n)}


def test_the_body_of_a_request(chat_server, tmp_path):
    # what the paper's numbers depend on, and what is paid for, is this dict as the server has it
    body = dict(
        model="gpt-3.5-turbo",
        messages=[{"role": "user", "content": "Which? ü"}],
        temperature=0,
        seed=7,
        max_tokens=5,
    )
    assert plm.chat_body("gpt-3.5-turbo", "Which? ü", 7, 5) == body
    plm.ask_chatgpt({"a": "Which? ü"}, str(tmp_path / "a.jsonl"), "gpt-3.5-turbo", seed=7, limit=5)
    assert chat_server.bodies == [body]


BAD = [
    "429",
    "500",
    "drop",
    "html",
    "no choices",
    "stall",
    "null",
    "truncated",
    "503",
    "429 odd",
    "truncated chunks",
    "dribble",
    "stalled body",
]


def test_every_row_is_answered_when_a_third_of_the_attempts_fail(
    chat_server, tmp_path, monkeypatch, capfd
):
    # networks and servers fail in all these ways, and none may cost a row or an answer twice
    monkeypatch.setattr(plm, "READ", 0.4)
    chat_server.behave = lambda prompt, number: "ok" if number % 3 else BAD[number // 3 % len(BAD)]
    path, prompts = tmp_path / "answers.jsonl", some_prompts(80)
    answers, counts = plm.ask_chatgpt(prompts, str(path), "m")
    assert answers == {row: f"joy {prompt}" for row, prompt in prompts.items()}
    assert (
        counts["requests"] == len(chat_server.prompts) == 80 + counts["retries"]
        and counts["retries"] >= 35
    )
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (7 * 80, 2 * 80)
    assert counts["failed"] == [] and counts["cached"] == 0
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in chat_server.headers)
    chat_server.prompts.clear()
    again, second = plm.ask_chatgpt(prompts, str(path), "m")  # a restart asks for nothing
    assert again == answers and chat_server.prompts == []
    assert second == dict(counts, requests=0, retries=0, cached=80)
    plm.ask_chatgpt(
        {"row0": "prompt 0"}, str(path), "m", seed=1
    )  # but another seed is another request
    assert len(chat_server.prompts) == 1
    out, err = capfd.readouterr()
    assert KEY not in path.read_text() + out + err


def test_rows_with_the_same_prompt_share_a_request(chat_server, tmp_path):
    # without the user in it, thirty annotators of a text have one prompt: it is paid for once
    answers, counts = plm.ask_chatgpt(dict(a="x", b="x", c="y"), str(tmp_path / "a.jsonl"), "m")
    assert answers == dict(a="joy x", b="joy x", c="joy y")
    assert counts["requests"] == len(chat_server.prompts) == 2 and counts["prompt_tokens"] == 14


def test_kill_and_restart(chat_server, tmp_path):
    # a killed run has paid for its finished answers; the next one takes them, but no half line
    chat_server.behave = lambda prompt, number: chat_server.quit.wait(0.05) or "ok"
    path, prompts = tmp_path / "answers.jsonl", some_prompts(200)
    child = os.fork()  # importing everything anew takes longer than all of these tests
    if child == 0:
        try:
            plm.ask_chatgpt(prompts, str(path), "m")
        finally:
            os._exit(1)
    until = time.monotonic() + 30
    while not path.exists() or path.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < until and os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    time.sleep(0.2)  # the server takes note of what was on its way
    whole = path.read_bytes().rpartition(b"\n")[0].decode().split("\n")
    finished = {json.loads(line)["key"] for line in whole}
    assert 20 <= len(finished) < 200
    with open(path, "a") as f:
        f.write(whole[0][:30])
    chat_server.prompts.clear()
    answers, counts = plm.ask_chatgpt(prompts, str(path), "m")
    assert sorted(chat_server.prompts) == sorted(
        prompts[row] for row in prompts if row not in finished
    )
    assert counts["cached"] == len(finished) and counts["failed"] == []
    assert answers == {row: f"joy {prompt}" for row, prompt in prompts.items()}
    lines = [json.loads(line) for line in path.read_text().splitlines()]  # the half line is gone
    assert len(lines) == 200 and set(lines[0]) == {
        "key",
        "sha",
        "answer",
        "prompt_tokens",
        "completion_tokens",
    }


@pytest.mark.parametrize(
    "status, word",
    [
        ("401", "OPENAI_API_KEY"),
        ("403", "OPENAI_API_KEY"),
        ("404", "OPENAI_BASE_URL"),
        ("redirect", "OPENAI_BASE_URL"),
    ],
)
def test_what_every_request_would_get_stops_the_run(chat_server, tmp_path, capfd, status, word):
    # a wrong key must not be tried 10,000 times, wait for stalled requests, nor be shown to anybody
    chat_server.behave = lambda prompt, number: (
        status if number == 5 else "stall" if number > 5 else "ok"
    )
    start, path = time.monotonic(), tmp_path / "answers.jsonl"
    with pytest.raises(plm.BadInput, match=word) as e:
        plm.ask_chatgpt(some_prompts(500), str(path), "m")
    assert time.monotonic() - start < 3
    time.sleep(0.3)
    assert len(chat_server.prompts) <= 5 + 8  # nobody goes on sending
    assert KEY not in str(e.getrepr(showlocals=False)) + path.read_text() + "".join(
        capfd.readouterr()
    )


def test_threads_in_a_wait_stop_too(chat_server, tmp_path, monkeypatch):
    # a thread between two attempts must not send the next one after the run was stopped
    monkeypatch.setattr(plm, "BACKOFF", 0.4)
    chat_server.behave = lambda prompt, number: (
        chat_server.quit.wait(0.2) and "ok" or "401" if number == 8 else "500"
    )
    with pytest.raises(plm.BadInput):
        plm.ask_chatgpt(some_prompts(8), str(tmp_path / "a.jsonl"), "m")
    time.sleep(0.2)  # the server takes note of what was on its way
    sent = len(chat_server.prompts)
    time.sleep(1.2)
    assert len(chat_server.prompts) == sent


@pytest.mark.parametrize(
    "name, value, word",
    [
        ("OPENAI_API_KEY", None, "OPENAI_API_KEY"),
        ("OPENAI_API_KEY", " ", "OPENAI_API_KEY"),
        ("OPENAI_API_KEY", f"{KEY}\n{KEY}", "OPENAI_API_KEY"),
        ("OPENAI_API_KEY", KEY + "é", "OPENAI_API_KEY"),
        ("OPENAI_BASE_URL", f"http://user:{KEY}@127.0.0.1/v1", "OPENAI_BASE_URL"),
        ("OPENAI_BASE_URL", f"http://127.0.0.1/v1?key={KEY}", "OPENAI_BASE_URL"),
        ("OPENAI_BASE_URL", "127.0.0.1:1/v1", "OPENAI_BASE_URL"),
        ("OPENAI_BASE_URL", "http://127.0.0.1:port/v1", "OPENAI_BASE_URL"),
    ],
)
def test_nothing_is_sent_without_a_key_and_an_address(
    chat_server, tmp_path, monkeypatch, name, value, word
):
    # said before anything is sent, and without the value: a key in the wrong place is a key
    monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(plm.BadInput, match=word) as e:
        plm.ask_chatgpt(some_prompts(3), str(tmp_path / "a.jsonl"), "m")
    assert (
        chat_server.prompts == []
        and KEY not in str(e.getrepr(showlocals=False))
        and os.listdir(tmp_path) == []
    )


def test_a_finished_run_needs_no_key(chat_server, tmp_path, monkeypatch):
    # scores can be computed anew from the answers file by somebody who has no account
    plm.ask_chatgpt(some_prompts(3), str(tmp_path / "a.jsonl"), "m")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert len(plm.ask_chatgpt(some_prompts(3), str(tmp_path / "a.jsonl"), "m")[0]) == 3


def test_netrc_does_not_replace_the_key(chat_server, tmp_path, monkeypatch):
    # requests would overwrite a mere Authorization header by the entry of .netrc for the host
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    plm.ask_chatgpt({"a": "x"}, str(tmp_path / "a.jsonl"), "m")
    assert chat_server.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_proxies_of_the_environment_are_used(chat_server, tmp_path, monkeypatch):
    # the other way around .netrc, trust_env = False, would cut off everybody behind a proxy
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", os.environ["OPENAI_BASE_URL"].removesuffix("/v1"))
    monkeypatch.setenv("OPENAI_BASE_URL", "http://nowhere.invalid/v1")
    assert plm.ask_chatgpt({"a": "x"}, str(tmp_path / "a.jsonl"), "m")[0] == {"a": "joy x"}
    assert chat_server.headers[0]["Host"] == "nowhere.invalid"


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_refused_row_fails_at_once_and_alone(chat_server, tmp_path, status):
    # the same request would be refused again; the others go on; no message may hold the key
    chat_server.behave = lambda prompt, number: status if prompt == "prompt 1" else "ok"
    answers, counts = plm.ask_chatgpt(some_prompts(4), str(tmp_path / "a.jsonl"), "m")
    ((row, reason),) = counts["failed"]
    assert (
        set(answers) == {"row0", "row2", "row3"} and row == "row1" and len(chat_server.prompts) == 4
    )
    assert reason.startswith(f"HTTP {status}: ") and "Bad key Bearer [key]" in reason
    assert KEY not in reason and len(reason) <= 200


@pytest.mark.parametrize(
    "what, word", [("500", "HTTP 500"), ("html", "no answer in the body"), ("drop", "abort")]
)
def test_attempts_are_bounded(chat_server, tmp_path, what, word):
    # one budget for what Retry sees and what it does not: 1 + RETRIES attempts, never their product
    chat_server.behave = lambda prompt, number: (
        what if number % 2 else "html" if what == "html" else "500"
    )
    _, counts = plm.ask_chatgpt({"a": "x"}, str(tmp_path / "a.jsonl"), "m")
    assert (
        len(chat_server.prompts) == counts["requests"] == 1 + plm.RETRIES
        and counts["retries"] == plm.RETRIES
    )
    assert counts["failed"][0][0] == "a" and word in counts["failed"][0][1]
    chat_server.behave = lambda prompt, number: "ok"  # a failed row is no finished one
    assert plm.ask_chatgpt({"a": "x"}, str(tmp_path / "a.jsonl"), "m")[0] == {"a": "joy x"}


@pytest.mark.parametrize(
    "what, word",
    [
        ("429 hour", "3600 s"),
        ("dribble", ""),
        ("stall", ""),
        ("dribbled headers", "no answer within"),
    ],
)
def test_a_request_ends_at_its_deadline(chat_server, tmp_path, monkeypatch, what, word):
    # a time-out of a socket starts anew with each byte, and a server may ask for any wait
    monkeypatch.setattr(plm, "DEADLINE", 0.7)
    monkeypatch.setattr(plm, "READ", 0.3)
    chat_server.behave = lambda prompt, number: what if prompt == "prompt 0" else "ok"
    start = time.monotonic()
    answers, counts = plm.ask_chatgpt(
        some_prompts(3), str(tmp_path / "a.jsonl"), "m", concurrency=1
    )
    assert time.monotonic() - start < 2.2 and set(answers) == {"row1", "row2"}
    assert counts["failed"][0][0] == "row0" and word in counts["failed"][0][1]


@pytest.mark.parametrize("what", ["dribble", "stalled body"])
def test_a_slow_body_is_given_up_and_asked_for_again(chat_server, tmp_path, monkeypatch, what):
    # one bad connection must not cost a request all of its time
    monkeypatch.setattr(plm, "READ", 0.3)
    chat_server.behave = lambda prompt, number: what if number == 1 else "ok"
    start = time.monotonic()
    answers, counts = plm.ask_chatgpt({"a": "x"}, str(tmp_path / "a.jsonl"), "m")
    assert answers == {"a": "joy x"} and counts["retries"] == 1 and time.monotonic() - start < 3


def test_a_retry_after_is_kept(chat_server, tmp_path):
    # asking earlier than the server said is what gets an account blocked
    times = []
    act, ChatHandler.act = (
        ChatHandler.act,
        lambda self, what, prompt: (
            times.append(time.monotonic()),
            self.reply(429, {}, Retry_After=1) if len(times) == 1 else act(self, "ok", prompt),
        ),
    )
    try:
        _, counts = plm.ask_chatgpt({"a": "x"}, str(tmp_path / "a.jsonl"), "m")
    finally:
        ChatHandler.act = act
    assert counts["retries"] == 1 and 0.95 < times[1] - times[0] < 3


def test_a_server_that_answers_nobody_stops_the_run(chat_server, tmp_path, monkeypatch):
    # 10,000 rows that all fail after their waits would take days to say that the quota is used up
    chat_server.behave = lambda prompt, number: "400"
    with pytest.raises(plm.BadInput, match="HTTP 400"):
        plm.ask_chatgpt(some_prompts(200), str(tmp_path / "a.jsonl"), "m")
    assert len(chat_server.prompts) < plm.GIVE_UP + 10


def test_ctrl_c(chat_server, tmp_path):
    # stops now, not when stalled requests have ended, and keeps what is finished
    chat_server.behave = lambda prompt, number: "ok" if number <= 5 else "stall"
    # A shell starts its background jobs, and so perhaps this test, with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    start, path = time.monotonic(), tmp_path / "a.jsonl"
    try:
        with pytest.raises(KeyboardInterrupt):
            plm.ask_chatgpt(some_prompts(50), str(path), "m")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - start < 4 and len(path.read_text().splitlines()) == 5
    asking = [t for t in threading.enumerate() if "work" in t.name]
    assert asking and all(t.daemon for t in asking)  # they do not keep the process


def test_an_answers_file_with_odd_lines(tmp_path):
    # a full disk or a power cut may leave anything in it; what is no answer is asked for again
    good = dict(key="a", sha="s", answer="joy", prompt_tokens=1, completion_tokens=1)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\0\0\0\n[1]\n{}\n3\n" + json.dumps(good).encode() + b"\n\xff\n" + b'{"key": "b", "sh'
    )
    assert list(plm.finished_answers(str(path))) == ["s"]
    assert path.read_bytes().endswith(b"\xff\n")


def test_dry_run(capsys, monkeypatch):
    # what it will cost, before it costs anything: no key, no server
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    plm.dry_run(
        dict(a="Which?\n### Response:", b="Which?\n### Response:", c="x" * 401), "gpt-3.5-turbo", 48
    )
    out = capsys.readouterr().out
    assert (
        "2 requests for 3 rows" in out and "about 105 tokens" in out and "96 of answers (48" in out
    )
    assert out.endswith("Which?\n### Response:\n")


# -------------------------------------------------------------------------------------- commands


def plm_command(*args, cwd=HERE, **env):
    """(exit status, stdout, stderr) of a run of plm.py."""
    done = subprocess.run(
        [sys.executable, os.path.join(HERE, "plm.py"), *args],
        cwd=cwd,
        text=True,
        capture_output=True,
        env=os.environ | env,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "args, says",
    [
        (["cls_q"], "invalid choice: 'cls_q'"),
        (["cls", "--modle", "tiny"], "--model --data"),
        (["cls", "--data", "nosuch"], "sample, goemotions"),
        (["cls", "--data", "nosuch.csv"], "nosuch.csv: no such file"),
        (["cls", "--model", "./nosuch"], "no such model"),
        (["cls", "--model", HERE], "no config.json"),
        (["cls", "--labels", "funny,nosuch"], "no column 'nosuch'; there are: text, user"),
        (["table", "--out", "nosuch"], "no finished run"),
        (["cls", "--dropout", "2"], "2 is not a number from 0 to 0.9"),
        (["q_0s", "--model", "openai:"], "needs a name"),
        (["cls", "--out", os.path.join(HERE, "plm.py")], "Not a directory"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(args, says, capsys):
    assert plm.main(args) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_the_exit_status_reaches_the_shell():
    status, out, err = plm_command("cls", "--data", "nosuch.csv")
    assert status == 2 and not out and err == "plm.py: nosuch.csv: no such file\n"


def files_of(folder):
    return {
        name: digest_file(os.path.join(folder, name))
        for name in sorted(os.listdir(folder))
        if name in ("predictions.csv", "adapter.safetensors")
    }


def digest_file(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


@pytest.mark.parametrize(
    "method, model", [("cls_p", "tiny"), ("lm", "tiny_t5"), ("q_2s_p", "tiny")]
)
def test_a_run_leaves_its_files_and_the_same_seed_the_same_bits(tmp_path, method, model):
    found = []
    for out in ("a", "b"):
        status, stdout, err = plm_command(
            method,
            "--model",
            model,
            "--max-steps",
            "4",
            "--max-eval",
            "40",
            "--out",
            str(tmp_path / out),
        )
        assert status == 0, err
        folder = tmp_path / out / "sample" / model / method / "seed42"
        found.append(files_of(folder))
        metrics = json.loads((folder / "metrics.json").read_text())
        assert {
            "method",
            "model",
            "data",
            "seed",
            "f1_macro",
            "f1_micro",
            "per_label",
            "rows",
            "seconds",
            "peak_memory_mb",
            "config",
        } <= set(metrics)
        with open(folder / "predictions.csv", encoding="utf-8") as f:
            lines = list(csv.DictReader(f))
        gold, predicted = (
            [plm.parse_answer(line[c], metrics["labels"])[0] for line in lines]
            for c in ("gold", "predicted")
        )
        assert plm.f1_scores(gold, predicted)["f1_macro"] == metrics["f1_macro"]
        assert f"{metrics['f1_macro']:.4f}" in stdout and str(folder) in stdout
        if method != "q_2s_p":
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            assert [line["step"] for line in log] == [1, 2, 3, 4, 4] and "val_loss" in log[-1]
            assert metrics["tokens_computed"] <= metrics["tokens_unshared"]
            assert metrics["rows_per_second"] > 0
    assert found[0] == found[1] and found[0]
    status, stdout, _ = plm_command("table", "--out", str(tmp_path / "a"))
    assert status == 0 and f"{metrics['f1_macro']:.4f}" in stdout and "sample" in stdout


def test_two_processes_train_as_one_does(tmp_path):
    # Dropout off, since each rank draws its own. torchrun's processes find each other on loopback.
    args = ["cls_p", "--dropout", "0", "--max-steps", "6", "--max-eval", "100", "--out"]
    assert plm_command(*args, str(tmp_path / "one"), OMP_NUM_THREADS="1")[0] == 0
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            os.path.join(HERE, "plm.py"),
            *args,
            str(tmp_path / "two"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(OMP_NUM_THREADS="1"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("F1-macro") == 1  # rank 0 alone prints
    folders = [tmp_path / n / "sample" / "tiny" / "cls_p" / "seed42" for n in ("one", "two")]
    one, two = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in folders
    )
    for a, b in zip(one, two, strict=True):
        key = "val_loss" if "val_loss" in a else "loss"
        assert abs(a[key] - b[key]) < 1e-5
    assert sorted(os.listdir(folders[0])) == sorted(os.listdir(folders[1]))
    f1 = [json.loads((folder / "metrics.json").read_text())["f1_macro"] for folder in folders]
    assert f1[0] == pytest.approx(f1[1], abs=0.01)


def test_a_damaged_file_is_left_out_of_the_table_and_named(tmp_path, capsys):
    for seed, text in enumerate(["{", "[]", '{"data": "d"}', ""]):
        folder = tmp_path / "d" / "m" / "cls" / f"seed{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(text)
    good = dict(data="d", method="cls", model="m", f1_macro=0.25)
    (tmp_path / "d" / "m" / "cls" / "seed3" / "metrics.json").write_text(json.dumps(good))
    assert plm.main(["table", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "0.2500" in out and err.count("is left out") == 3


def test_a_run_never_takes_the_folder_of_another(tmp_path, capsys):
    rows = some_rows()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "same.csv", rows)
    args = ["q_0s", "--max-eval", "5", "--out", str(tmp_path / "out"), "--data"]
    assert plm.main([*args, str(tmp_path / "one" / "same.csv")]) == 0
    assert plm.main([*args, str(tmp_path / "two" / "same.csv")]) == 2
    assert "another folder with --out" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_model_folder_gets_one_line(tmp_path, damage, capsys):
    folder = tmp_path / "model"
    shutil.copytree(plm.MODELS["tiny"]["id"], folder)
    (folder / damage).write_bytes((folder / damage).read_bytes()[:50])
    assert plm.main(["q_0s", "--model", str(folder), "--out", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"cannot load {folder}" in err


def test_models_whose_attention_is_not_replaced_are_refused(tmp_path):
    config = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    lm = plm.load_quantized(str(tmp_path), CPU, torch.float32)
    model = plm.PersonalizedLM(lm, "lm", 3)
    with pytest.raises(plm.BadInput, match="attention"):
        model(plm.make_batch(model, random_rows()))


def test_a_failed_run_leaves_the_files_of_an_earlier_one(tmp_path, capsys):
    args = ["cls", "--max-steps", "2", "--max-eval", "20", "--out", str(tmp_path)]
    assert plm.main(args) == 0
    folder = tmp_path / "sample" / "tiny" / "cls" / "seed42"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"log.jsonl", "predictions.csv", "adapter.safetensors", "metrics.json"}
    assert plm.main([*args, "--lr", "1e18"]) == 2  # the loss will not be finite
    assert "lower --lr" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == ["seed42"]  # and nothing half-written beside it


def test_every_target_of_the_makefile_is_a_command_and_readme_names_no_other():
    with open(os.path.join(HERE, "Makefile"), encoding="utf-8") as f:
        makefile = f.read()
    targets = set(re.findall(r"^([a-z0-9_]+):", makefile, re.M))
    assert set(plm.METHODS) <= targets
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as f:
        named = set(re.findall(r"`make ([a-z0-9_]+)", f.read()))
    assert named <= targets


# ------------------------------------------------------------------------------ the original files


class Server(BaseHTTPRequestHandler):
    """Serves `files`; `faults` path -> list of what goes wrong with the next requests of it."""

    protocol_version, files, faults, sent, etag = "HTTP/1.1", {}, {}, Counter(), '"v1"'

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        body, faults = self.files.get(self.path), self.faults.get(self.path, [])
        fault = faults.pop(0) if faults else None
        if body is None or fault in (404, 503):
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "html":
            body = b"<!DOCTYPE html><html>Please sign in</html>"
        start = 0
        if (
            "Range" in self.headers
            and self.headers["If-Range"] == self.etag
            and fault != "no ranges"
        ):
            start = int(self.headers["Range"][6:-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", self.etag)
        if fault != "no length":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + (len(body) - start) // 2 if fault in ("break", "no length") else len(body)
        self.wfile.write(body[start:end])
        self.sent[self.path] += end - start
        self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(the handler class with the small originals to serve, empty folder to download to)"""
    rows = write_originals(tmp_path / "served")
    handler = type(
        "Handler",
        (Server,),
        dict(
            faults={},
            sent=Counter(),
            files={f"/{file.name}": file.read_bytes() for file in (tmp_path / "served").iterdir()},
        ),
    )
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    row = row_for(tmp_path / "got", rows, f"http://127.0.0.1:{http.server_address[1]}")
    monkeypatch.setitem(plm.DATASETS, "goemotions", row)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield handler, tmp_path / "got"
    http.shutdown()
    http.server_close()


def names(folder):
    return sorted(os.listdir(folder)) if os.path.exists(folder) else []


def same(handler, folder):
    """Is each file in the folder byte for byte what is served?"""
    return all((folder / name).read_bytes() == handler.files[f"/{name}"] for name in names(folder))


def test_download_prepare_print(server, capsys):
    # the whole command; a second call fetches nothing; a difference from expected counts is said
    handler, folder = server
    plm.make_data("goemotions")
    out = capsys.readouterr().out
    assert "CC BY 4.0" in out and "the authors" in out and "WARNING" in out
    assert len(names(folder)) == 6 and same(handler, folder)
    sent = dict(handler.sent)
    plm.make_data("goemotions")
    assert dict(handler.sent) == sent


def test_break_off_is_resumed_and_no_byte_comes_twice(server):
    # two breaks in the middle: the three answers are as long as the file and two unfinished blocks
    handler, folder = server
    handler.files["/goemotions_2.csv"] *= 100
    handler.faults["/goemotions_2.csv"] = ["break", "break"]
    plm.download_data("goemotions", str(folder))
    assert len(names(folder)) == 6 and same(handler, folder)
    assert handler.sent["/goemotions_2.csv"] < len(handler.files["/goemotions_2.csv"]) + 2 * 8192


def test_truncated_every_time_is_never_under_its_name_and_a_later_run_goes_on(server):
    # the part stays for the next run, which fetches only what is missing
    handler, folder = server
    handler.files["/goemotions_1.csv"] *= 1000
    handler.faults["/goemotions_1.csv"] = ["break"] * 5
    with pytest.raises(plm.BadInput, match="broke off 5 times"):
        plm.download_data("goemotions", str(folder))
    assert names(folder) == ["goemotions_1.csv.part", "goemotions_1.csv.part.version"]
    with pytest.raises(plm.BadInput, match="no such file"):
        plm.load_data("goemotions")
    plm.download_data("goemotions", str(folder))
    assert len(names(folder)) == 6 and same(handler, folder)
    assert handler.sent["/goemotions_1.csv"] < len(handler.files["/goemotions_1.csv"]) + 5 * 8192


@pytest.mark.parametrize("change", ["other version", "no ranges"])
def test_part_of_another_version_is_not_continued(server, change):
    # half of the old file and half of the new one would be a file that never was
    handler, folder = server
    handler.files["/goemotions_1.csv"] *= 100
    handler.faults["/goemotions_1.csv"] = ["break"] * 5
    with pytest.raises(plm.BadInput):
        plm.download_data("goemotions", str(folder))
    if change == "other version":
        handler.etag = '"v2"'
        handler.files["/goemotions_1.csv"] = handler.files["/goemotions_1.csv"].replace(
            b"he", b"SHE"
        )
    else:
        handler.faults["/goemotions_1.csv"] = ["no ranges"]
    plm.download_data("goemotions", str(folder))
    assert len(names(folder)) == 6 and same(handler, folder)


@pytest.mark.parametrize(
    "fault, says",
    [("html", "a web page and not the file"), (404, "404"), ("no length", "broke off")],
)
def test_wrong_answers_leave_nothing_under_the_name(server, fault, says):
    # an error page with status 200, a missing file, a body that stops without having named a length
    handler, folder = server
    handler.faults["/train.tsv"] = [fault] * 5
    with pytest.raises(plm.BadInput, match=says) as e:
        plm.download_data("goemotions", str(folder))
    text = str(e.value)
    assert (
        "By hand" in text
        and f"-> {folder / 'train.tsv'}" in text
        and "goemotions_1.csv" not in text
    )
    assert not os.path.exists(folder / "train.tsv")


def test_busy_server_is_asked_again(server):
    # 503 twice: waited for and not reported
    handler, folder = server
    handler.faults["/dev.tsv"] = [503, 503]
    plm.download_data("goemotions", str(folder))
    assert len(names(folder)) == 6


def test_rubbish_put_there_by_hand_is_named(server):
    # a saved login page under the right name
    handler, folder = server
    os.makedirs(folder)
    (folder / "dev.tsv").write_text("<html>sign in</html>")
    with pytest.raises(plm.BadInput, match="dev.tsv: a web page and not the file; delete it"):
        plm.download_data("goemotions", str(folder))


@pytest.mark.parametrize("proxy", [False, True])
def test_no_network_or_a_proxy_that_refuses(tmp_path, monkeypatch, proxy):
    # one message with every URL and its place, soon, and nothing left behind
    if proxy:
        http = ThreadingHTTPServer(("127.0.0.1", 0), type("Refuse", (Server,), {}))
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{http.server_address[1]}")
    else:  # nobody listens on port 9
        row = plm.DATASETS["goemotions"]
        monkeypatch.setitem(
            plm.DATASETS,
            "goemotions",
            dict(row, urls={file: f"http://127.0.0.1:9/{file}" for file in row["urls"]}),
        )
    start = time.perf_counter()
    with pytest.raises(plm.BadInput, match="the proxy refuses" if proxy else "no connection") as e:
        plm.make_data("goemotions", str(tmp_path / "new"))
    assert str(e.value).count(" -> ") == 6 and time.perf_counter() - start < 10
    assert not os.path.exists(tmp_path / "new")
    if proxy:
        http.shutdown()
        http.server_close()


def test_server_that_never_answers(monkeypatch):
    # a firewall that drops everything: the deadline holds, whatever requests is waiting for
    monkeypatch.setattr(plm.requests, "head", lambda *a, **k: time.sleep(3))
    start = time.perf_counter()
    assert plm.no_answer("http://127.0.0.1:9", seconds=0.3) == "no answer in 0.3 s"
    assert time.perf_counter() - start < 1


def test_bad_names_and_places(server, tmp_path):
    # one line each
    handler, folder = server
    with pytest.raises(plm.BadInput, match="nothing to download; there are: goemotions, unhealthy"):
        plm.make_data("sample")
    (tmp_path / "file").write_text("")
    with pytest.raises(plm.BadInput, match="--data-dir DIR"):
        plm.make_data("goemotions", str(tmp_path / "file" / "sub"))


# --------------------------------------------------------------------------------------- the bench


def test_annotators_takes_the_first_of_every_text_that_has_as_many():
    rows = [plm.Annotation(text, str(i), (1,)) for i, text in enumerate("abcabca")]
    rng = random.Random(0)
    assert {a.user for a in plm.annotators(rows, 2, rng)} == set("031425")
    assert [a.user for a in plm.annotators(rows, 3, rng)] == ["0", "3", "6"]
    assert set(plm.annotators(rows, 0, rng)) == set(rows)


def test_operations_are_counted_as_on_paper(tmp_path):
    path, _ = random_model_folder(tmp_path, "llama")
    model = ready(path, "lm")
    batch = plm.make_batch(model, random_rows())
    with plm.counted_operations(model) as count:
        model(batch)
    config, inputs = model.lm.config, batch["inputs"]
    linear = 4 * batch["tokens"] * plm.parameter_counts(model)["quantized"]
    head = 4 * len(batch["at"]) * config.vocab_size * config.hidden_size
    seen = sum(position + 1 for position in inputs["position_ids"][0].tolist())
    width = config.num_attention_heads * model.lm.base_model.layers[0].self_attn.head_dim
    attention = 12 * width * config.num_hidden_layers * seen
    assert count["operations"] == linear + head + attention


def test_bench_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plm, "BENCH", [("cls_p", 8, 3), ("cls_p", 16, 99)])
    assert plm.main(["bench", "--max-steps", "2", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "sample" / "tiny" / "bench.json", encoding="utf-8") as f:
        (line,) = json.load(f)
    assert line["steps"] == 2 and line["annotators"] == 3 and 0 < line["share_of_floor"] < 1
    printed = capsys.readouterr().out
    assert f"{line['rows_per_second']:8.2f}" in printed and "no text has as many" in printed


def test_bench_trains_the_same_annotations_in_steps_of_any_size():
    args = plm.make_parser().parse_args(["bench"])
    data, tokenizer = plm.load_data("sample"), tokenizers()["tiny"]
    parts = {
        size: plm.bench_rows(args, plm.METHODS["cls_p"], tokenizer, data, size, 0)
        for size in (8, 32, 128)
    }
    timed = {
        size: sorted((r.text, r.prompt) for part in some[1:] for r in part)
        for size, some in parts.items()
    }
    assert timed[8] == timed[32] == timed[128] and len(timed[8]) == plm.BENCH_ROWS
    assert all(some[0] == some[1] for some in parts.values())


# ------------------------------------------------------------------- how fast, beside other stacks
# No tests but measurements, for `make bench`: left out of `make test`, and nothing in them depends
# on a time. Needs `pip install peft bitsandbytes`; the model has to be a decoder.

bench = pytest.mark.skipif("BENCH" not in os.environ, reason="a measurement: make bench")


def on_gpu():
    return torch.cuda.is_available()


def bench_args():
    return plm.make_parser().parse_args(["bench", *shlex.split(os.environ["BENCH"])])


def in_nf4_and_peft(folder, settings):
    """The stack that a user would pick: transformers' model, its linear layers by bitsandbytes with
    double quantization, LoRA by PEFT. bfloat16 on a GPU, float32 on a CPU."""
    import peft

    dtype = torch.bfloat16 if on_gpu() else torch.float32
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=nf4, dtype=dtype, device_map={"": "cuda" if on_gpu() else "cpu"}
    )
    lora = peft.LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(lm, lora)


def padded_loss(model, score, rows, head):
    """The loss that plm.summed_loss returns, of prompts that are padded and computed in full."""
    ids = [r.prompt + r.answer[:-1] * (head == "lm") for r in rows]
    input_ids, mask = plm.padded(ids, model.device)
    body = model.get_base_model().base_model
    hidden = body(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    if head == "cls":
        last = hidden[torch.arange(len(rows)), mask.sum(1) - 1].float()
        target = torch.tensor([r.labels for r in rows], device=model.device)
        return F.binary_cross_entropy_with_logits(score(last), target.float(), reduction="sum")
    at = [(i, len(r.prompt) - 1 + j) for i, r in enumerate(rows) for j in range(len(r.answer))]
    target = torch.tensor([token for r in rows for token in r.answer], device=model.device)
    logits = model.get_base_model().get_output_embeddings()(hidden[tuple(zip(*at))])
    return F.cross_entropy(logits.float(), target, reduction="sum")


def peft_line(args, method, batch, micro=8):
    """dict of what plm.bench_line measures, of PEFT and bitsandbytes on the very same prompts:
    padded to the longest of `micro` rows, which are of about one length."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, settings = plm.METHODS[method], plm.settings_of(args)
    data = plm.load_data(args.data, args.data_dir, args.text_col, args.user_col, args.labels)
    folder = plm.model_folder(args.model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(args.seed)
    model = in_nf4_and_peft(folder, settings).train()
    score = nn.Linear(model.config.hidden_size, len(data.labels), bias=False, device=model.device)
    params = [p for p in model.parameters() if p.requires_grad]
    params += score.parameters() if kind.head == "cls" else []
    optimizer = torch.optim.AdamW(params, lr=settings["lr"], weight_decay=0.0)
    parts, seconds = plm.bench_rows(args, kind, tokenizer, data, batch, 0), 0
    losses = [0.0] * len(parts)
    for i, part in enumerate(parts):
        start, part = time.perf_counter(), sorted(part, key=lambda r: len(r.prompt))
        for at in range(0, len(part), micro):
            loss = padded_loss(model, score, part[at : at + micro], kind.head)
            loss = loss / plm.n_targets(part, kind.head)
            loss.backward()
            losses[i] += float(loss.detach())  # waits for a GPU
        nn.utils.clip_grad_norm_(params, settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - start if i else 0
    rows = sum(map(len, parts[1:]))
    memory = plm.peak_memory_mb(torch.device("cuda" if on_gpu() else "cpu"))
    return dict(rows_per_second=rows / seconds, peak_memory_mb=memory, first_loss=losses[0])


@bench
@pytest.mark.parametrize("method", ["cls", "cls_p", "lm", "lm_p"])
def test_bench_training_beside_peft(method):
    pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    args, batch = bench_args(), plm.TRAINING["batch"]
    case = args, method, batch, 0
    before = plm.in_own_process(plm.bench_line, *case)
    peft = plm.in_own_process(peft_line, *case[:3])
    after = plm.in_own_process(plm.bench_line, *case)  # the machine may be busier now than then
    if method.startswith("lm"):  # a head for classification begins at random
        assert abs(before["first_loss"] / peft["first_loss"] - 1) < 1e-3
    rates = [line["rows_per_second"] for line in (before, peft, after)]
    memory = before["peak_memory_mb"], peft["peak_memory_mb"]
    print(
        f"\n{method}: {rates[0]:.2f} and {rates[2]:.2f} rows/s in {memory[0]:,} MB, PEFT "
        f"{rates[1]:.2f} in {memory[1]:,} MB: {(rates[0] + rates[2]) / 2 / rates[1]:.1f} times as "
        f"fast, {memory[0] / memory[1]:.2f} of the memory; {before['share_of_floor']:.0%} and "
        f"{after['share_of_floor']:.0%} of the floor"
    )


def rounded_model(folder, model):
    """transformers' own model with the weights that `model` has in NF4."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=model.lm.dtype)
    for name, layer in model.lm.named_modules():
        if isinstance(layer, plm.NF4Linear):
            lm.get_submodule(name).weight.data = layer.dequantize()
    return lm.to(model.device).eval()


@bench
def test_bench_prediction_beside_generate(tokens=8, size=64):
    # As many new tokens as a trained model's answers have; both stop early where all have ended.
    args, kind = bench_args(), plm.METHODS["lm_p"]
    data = plm.load_data(args.data, args.data_dir, args.text_col, args.user_col, args.labels)
    device = torch.device("cuda" if on_gpu() else "cpu")
    model, tokenizer = plm.load_model(args.model, "ask", len(data.labels), device)
    plm.keep_dense(model)
    rows, _ = plm.encode(tokenizer, kind, data.labels, data.test[:128], args.max_text)
    theirs, end = rounded_model(plm.model_folder(args.model), model), tokenizer.eos_token_id

    def grow(part):
        return plm.grow_answers(model, part, end, tokens)

    def generate(part):
        width = max(len(r.prompt) for r in part)
        ids = torch.tensor([[end] * (width - len(r.prompt)) + list(r.prompt) for r in part])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in part])
        out = theirs.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )[:, width:].tolist()
        return [o[: o.index(end)] if end in o else o for o in out]

    found, rates = [], []
    for function in (grow, generate, grow, generate):
        start = time.perf_counter()
        found.append(plm.for_each_batch(model, rows, function, size))
        rates.append(len(rows) / (time.perf_counter() - start))
    same = sum(a == b for a, b in zip(found[0], found[1])) / len(rows)
    print(
        f"\nprediction: {rates[0]:.2f} and {rates[2]:.2f} rows/s, generate {rates[1]:.2f} and "
        f"{rates[3]:.2f}: {(rates[0] + rates[2]) / (rates[1] + rates[3]):.1f} times as fast; "
        f"{same:.0%} of the answers are the same"
    )


@bench
def test_bench_quantizing_beside_bitsandbytes(n=4096, repeats=5):
    functional = pytest.importorskip("bitsandbytes").functional
    linear, best = nn.Linear(n, n, bias=False), [math.inf, math.inf]

    def theirs():
        return functional.quantize_4bit(
            linear.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True
        )[0]

    for _ in range(repeats):
        for i, function in enumerate((lambda: plm.NF4Linear.from_linear(linear).packed, theirs)):
            start = time.perf_counter()
            packed = function()
            best[i] = min(best[i], time.perf_counter() - start)
    assert torch.equal(plm.NF4Linear.from_linear(linear).packed.view(-1), packed.view(-1))
    print(
        f"\nquantizing {n} x {n}: {best[0]:.3f} s, bitsandbytes {best[1]:.3f} s: "
        f"{best[1] / best[0]:.1f} times as fast"
    )
