"""Tests of the scripts that make studies and pages: vary.py, report.py; no network."""
import math
import os
import pathlib
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

sys.path.insert(0, f"{pathlib.Path(__file__).resolve().parent.parent}")
import plm  # noqa: E402
from test_plm import HERE, fake_run, refused, report, table, vary, write_csv  # noqa: E402

# ---------------------------------------------------------------------- studies: data/vary.py

LABELS = "calm rude sad odd warm cold dry".split()

def crowd(path, seed=0):
    """The path of a CSV without a split column: 4 of 24 people read each of 200 texts."""
    r = random.Random(seed)
    rows = [(f"text {i} of {seed}", f"worker {u}", f"2024-{1 + i // 17:02}-{r.randrange(9) + 10}",
             "secret", *(int(r.random() < 0.6 - j / 14) for j in range(7)))
            for i in range(200) for u in r.sample(range(24), 4)]
    return write_csv(path, rows, "text user time city " + " ".join(LABELS))

def varied(source, line):
    """dict split -> list of rows (dicts) of what vary.py makes; no text is in two splits."""
    assert vary.main([source, f"{source}.new.csv", *line.split()]) == 0
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
        made[known] = parts = varied(source, f"--unseen --known {known} --seed {seed}")
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
    parts = varied(source, "--by-time time")
    days = [[when[row["text"], row["user"]] for row in parts[part]] for part in vary.PARTS]
    assert max(days[0]) < min(days[1]) <= max(days[1]) < min(days[2])
    quarters = [row["quarter"] for row in parts["test"]]
    assert sorted(quarters) == [q for _, q in sorted(zip(days[2], quarters))]
    true = varied(source, "--ids dp --epsilon inf")
    for epsilon in (1, 3, 8):
        told = varied(source, f"--ids dp --epsilon {epsilon} --seed {seed}")
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
        made.append(varied(source, "--ids hash"))
    made += [varied(source, f"--ids words --seed {seed}") for seed in (1, 1, 2)]
    ids = [{row["user"] for rows in parts.values() for row in rows} for parts in made]
    assert made[0] == made[1] and made[3] == made[4] and {len(users) for users in ids} == {24}
    assert not ids[0] & ids[2] and ids[3] != ids[5]
    assert [*made[0]["val"][0]] == ["text", "user", "split", *LABELS]
    assert [*varied(source, "--labels 2")["val"][0]] == ["text", "user", "split", "calm", "rude"]

def test_what_cannot_be_done_honestly_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PLM_KEY", "too short")
    source, out = crowd(tmp_path / "a.csv"), str(tmp_path / "b.csv")
    wrong = {"--unseen --share 0.1": "too few users", "--unseen --known 99": "too few users"}
    wrong |= {"--by-time hour": "no column 'hour'", "--by-time city": "a number or a date is"}
    wrong |= {"--ids hash": "PLM_KEY", "--ids dp": "--epsilon", "--labels 8": "7 0/1 columns"}
    wrong |= {"--labels 2 --label-col calm": "single choice", "--labels 1": "not a number from"}
    for args, why in (wrong | {"--unseen --labels 2": "not allowed", "": "required"}).items():
        assert why in refused(capsys, f"{source} {out} {args}", main=vary.main)
        assert os.listdir(tmp_path) == ["a.csv"]

def commands(target, *args):
    """list of the commands, each a list, that a study consists of; none of them is run."""
    make = ["make", "-s", "-o", "V/ready", "VENV=V", "PY=echo", "PLM=echo plm.py", target, *args]
    assert subprocess.run([*make, "-n"], cwd=HERE, capture_output=True).returncode == 0
    done = subprocess.run(make, cwd=HERE, capture_output=True, text=True, check=True)
    return [line.split(" --says")[0].split() for line in done.stdout.splitlines()]

@pytest.mark.parametrize(
    "target", "paper exp1 exp2 exp3 unseen later private full architectures".split())
def test_a_study_has_commands_that_exist_and_run_to_its_end(tmp_path, monkeypatch, capsys, target):
    for file, *args in commands(target):
        assert (HERE / file).exists()
        assert file != "plm.py" or plm.make_parser().parse_args(args)
    tables = dict(unseen=2, private=6, exp3=1).get(target, 0)
    monkeypatch.setenv("PLM_KEY", "k" * 16)
    mains = {"plm.py": plm.main, "data/vary.py": vary.main, "data/table.py": table.main}
    more = [f"DATA={crowd(tmp_path / 'a.csv')}", f"OUT={tmp_path}", "COUNTS=3", "KNOWN=0 5"]
    for file, *args in commands(target, *more, "ARGS=--max-steps 2 --max-eval 20") * bool(tables):
        assert mains[file](args) == 0
    said = capsys.readouterr().out.split("F1-macro [95 %]")[1:]
    assert len(said) == tables and all("cls_p" in text for text in said)

# ----------------------------------------------------------- the page of all runs: data/report.py

NASTY = ["<script>1</script>", "\"'><img src=x onload=y>", "a & b \U0001f600", "]]>\x01\u202e"]

def report_run(out, method, users=NASTY, data="<b>&'", text="text {}"):
    """The metrics of a run whose ticks are mostly right; its files are in `out`."""
    r, rows = random.Random(method), [
        plm.Annotation(text.format(i // 4), users[i % len(users)], (i % 2, i // 2 % 2, 1, 0))
        for i in range(4 * len(users))]
    ticks = np.array([[y if r.random() < 0.8 else 1 - y for y in a.labels] for a in rows])
    folder, m = fake_run(out, method, rows, ticks, labels=NASTY, data=data, model="m<i>",
                         split=None, f1_disagreed=0.2468, f1_macro_shuffled=0.1234)
    plm.write_file(f"{folder}/log.jsonl", b'{"epoch": 1, "val_loss": 0.4321, "listens": 0.8765}')
    return m

def test_the_report_shows_the_numbers_of_the_runs_and_runs_nothing(tmp_path, monkeypatch):
    text = "<img src=x> said"  # of a row of the sample, as far as the report knows
    real, there = plm.csv_rows, [(1, dict(text=text))]
    monkeypatch.setattr(plm, "csv_rows", lambda path, *x: there * os.path.exists(path)
                        if path.endswith("annotations.csv") else real(path, *x))
    a, b = (report_run(tmp_path, x, NASTY, "sample", text) for x in ("cls", "cls_p"))
    c, tags, words = report_run(tmp_path, "lm"), [], []
    assert report.main(["--out", str(tmp_path)]) == 0
    html, parser = (tmp_path / "report.html").read_text("utf-8"), HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.extend([tag, *dict(attributes)])
    parser.handle_data = words.append
    parser.feed(html)
    assert not {"script", "img", "i", "link", "src", "href", "onload"} & {*tags}
    assert not any(bad in html for bad in ("url(", "@import", "http:", "https:", "\x01", "\u202e"))
    shown, users, own = " ".join(words), *(m["f1_per_user"]["users"] for m in (a, b))
    numbers = [*a["per_label"], *b["per_label"], *users.values(), *own.values(), 0.1234, 0.2468]
    numbers += [0.4321, 0.8765] + [x for m in (a, b, c) for x in (m["f1_macro"], *m["f1_macro_ci"])]
    assert all(f"{x:.3f}" in shown for x in numbers)
    assert all(x in shown for x in [*NASTY[:3], "<b>&'", "m<i>", text])
    for part in html.split("<svg")[1:]:  # every chart is XML that says what it shows
        chart = ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
        assert [part.tag for part in chart[:2]] == ["title", "desc"] and chart[1].text

def test_the_picture_is_small_and_nothing_to_show_is_one_line(tmp_path, capsys):
    argv = ["--out", str(tmp_path), "--picture", str(tmp_path / "picture.svg")]
    assert "no finished run" in refused(capsys, " ".join(argv), main=report.main)
    runs = [report_run(tmp_path, x, [f"<{i}>" * 9 for i in range(700)]) for x in ("cls", "cls_p")]
    users, own = (m["f1_per_user"]["users"] for m in runs)
    assert report.main(argv) == 0 and os.path.getsize(argv[-1]) < 60_000
    assert ElementTree.parse(argv[-1]).getroot().get("viewBox")
    gains = f"{sum(own[u] > users[u] for u in own)} of 700 users"  # not those that stay as they are
    assert gains in (tmp_path / "report.html").read_text("utf-8")
