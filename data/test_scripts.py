"""Tests of the scripts that make data and pages: prepare.py, vary.py, report.py; no network."""
import math
import os
import pathlib
import random
import signal
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
from test_plm import (  # noqa: E402, F401  (web is a fixture)
    CHUNKED, HEAD, HERE, command, fake_run, prepare, refused, reply, report, says, table, vary, web,
    write_csv)

# ------------------------------------------------------------------ preparing data: data/prepare.py

EMOTIONS = ["anger", "joy"]

def judged(n, user="a", part="train"):
    return [prepare.Row(f"t{i}", user, part, "", {}) for i in range(n)]

def users(rows):
    return [Counter(a.user for a in rows if a.split == part) for part in ("train", "val", "test")]

@pytest.mark.parametrize("seed", range(8))
def test_rules(seed):
    r, rows = random.Random(seed), []
    weights = [r.paretovariate(0.8) for _ in range(30)]  # busy and rare users, some not everywhere
    for part, n in dict(train=2000, val=300, test=300).items():
        for user, k in Counter(r.choices(range(30), weights, k=n)).items():
            rows += judged(k, str(user), part)
    r.shuffle(rows)
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
    for rare, left in ((2, 202), (1, 200)):  # exactly 1 % stays
        assert len(prepare.drop_rare_users(judged(200) + judged(rare, "b"))) == left
    assert prepare.drop_rare_users([]) == prepare.cut_busy_users([]) == []
    alone = [a.text for a in prepare.cut_busy_users(judged(100))]
    assert alone[:6] == ["t0", "t1", "t2", "t3", "t5", "t7"]  # in every Python that there is
    random.seed(2)  # nor do the global state, other users and other parts change it
    rows = prepare.cut_busy_users(judged(100, "b") + judged(100) + judged(9, "a", "val"))
    assert [a.text for a in rows if a.user == "a" and a.split == "train"] == alone
    assert [a.text for a in rows if a.user == "b"] != alone

@pytest.fixture
def small(web, tmp_path, monkeypatch):
    """A folder of goemotions in small, texts in two splits; the web serves it, but for faults."""
    folder, row, r = tmp_path / "small", prepare.DATASETS["goemotions"], random.Random(0)
    texts = [f'text "{t}", he said' for t in range(60)]
    rows = [(x, "id", u, "15.0", r.randrange(2), r.randrange(2)) for x in texts for u in range(6)]
    folder.mkdir()
    for i in range(3):
        path = folder / f"goemotions_{i + 1}.csv"
        write_csv(path, rows[i::3], "text id rater_id created_utc anger joy")
    for file, lines in dict(train=texts[:40], dev=texts[39:50], test=texts[49:]).items():
        (folder / f"{file}.tsv").write_text("".join(f"{text}\t1\tid\n" for text in lines))
    row = row | dict(labels=EMOTIONS, expected={"annotations": (360,), "with a label": (1,)},
                     urls={file: f"{web.url}/{file}" for file in row["urls"]})
    monkeypatch.setitem(prepare.DATASETS, "goemotions", row)
    monkeypatch.setattr(prepare, "PAUSES", (0, 0, 0))
    web.faults = defaultdict(list)
    web.behave = lambda path, _: web.faults[path].pop(0) if web.faults[path] else reply(
        200, (folder / path[1:]).read_bytes().decode())
    return folder

def run(folder, name="goemotions"):
    """The rows of the CSV that is written."""
    assert prepare.main([name, "--dir", str(folder)]) == 0
    return [row for _, row in plm.csv_rows(str(folder / "annotations.csv"))]

def fails(capsys, says, folder, name="goemotions", more="", files=0):
    """The list of files to save by hand that follows the line of an error, mostly empty."""
    line = f"{name} --dir {folder} {more}"
    first, *by_hand = refused(capsys, line, main=prepare.main, more_lines=files).split("\n")[:-1]
    assert says in first and all(" -> " in line for line in by_hand)
    return by_hand

def test_goemotions_is_downloaded_and_becomes_a_csv_that_plm_loads(small, web, tmp_path, capsys):
    # what breaks off, is busy or has chunks arrives; what is still missing is listed with its place
    big, dev, folder = small / "goemotions_2.csv", (small / "dev.tsv").read_bytes(), tmp_path / "x"
    big.write_bytes(whole := big.read_bytes().replace(b",id", b",id" + b"x" * 3000))
    size, half = HEAD + b"Content-Length: %d\r\n\r\n" % len(whole), whole[:200_000]
    web.faults["/goemotions_2.csv"] = [[size, half], [HEAD, b"\r\n", half]]
    web.faults["/dev.tsv"] = [[CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(dev), dev)]]
    web.faults["/test.tsv"] = [503, 503]
    wrong = {s: reply(s) for s in ("404 Not Found", "503 Service Unavailable")}
    wrong |= {"nothing in it": reply(200), "a web page and not": reply(200, "\n <!DOCTYPE html>")}
    wrong |= {"broke off, 3 times": [size, b"{"], "broke off": [HEAD, b"\r\n{"]}
    for says, fault in wrong.items():
        web.faults["/train.tsv"] = [fault] * 3
        by_hand = fails(capsys, says, folder, files=3)
        assert by_hand[0].endswith(f"/train.tsv -> {folder / 'train.tsv'}")
        assert not (folder / "train.tsv").exists()
    web.faults["/train.tsv"] = []
    rows, out = run(folder), capsys.readouterr().out
    assert {*os.listdir(folder)} == {*os.listdir(small), "annotations.csv"}
    assert all((folder / file.name).read_bytes() == file.read_bytes() for file in small.iterdir())
    asked = Counter(path for path, *_ in web.seen)
    assert [*asked.values()] == [1, 3, 1, 4 * 3 + 2 + 1, 1, 3]  # in the order of the table's row
    assert run(folder) == rows and len(web.seen) == asked.total()  # nothing is fetched again
    # no text in two splits, texts of two splits where the authors have them, all-zero rows gone
    assert "CC BY 4.0" in out and "dev.tsv, test.tsv, train.tsv" in out and "WARNING" in out
    assert list(rows[0]) == ["text", "user", "split", "time", *EMOTIONS]
    where = {row["text"]: row["split"] for row in rows}
    assert all(where[row["text"]] == row["split"] for row in rows)
    assert where['text "39", he said'] == "train" and where['text "49", he said'] == "test"
    assert all(row["time"] == "15.0" and "1" in (row["anger"], row["joy"]) for row in rows)
    data = plm.load_data(str(folder / "annotations.csv"), labels=EMOTIONS)
    assert len(data.train + data.val + data.test) == len(rows) and list(data.labels) == EMOTIONS

def test_no_network_bad_names_bad_places_and_ctrl_c(small, tmp_path, monkeypatch, capsys):
    # all files are listed, soon: nobody is there, a proxy refuses, a server never answers
    with monkeypatch.context() as m:
        m.setattr(prepare, "PAUSES", map(signal.default_int_handler, [2], [None]))
        assert prepare.main(["goemotions", "--dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("\nprepare.py: stopped; complete files stay\n")
    fails(capsys, "Not a directory", small / "dev.tsv" / "sub")
    urls, start = prepare.DATASETS["goemotions"]["urls"], time.monotonic()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    nobody, proxy = ("http://127.0.0.1:9", "ConnectionError"), ("https://no.invalid", "ProxyError")
    for base, says in (nobody, proxy, ("http://silent", "no answer in 0.3 s")):
        if "silent" in base:
            monkeypatch.setattr(prepare.requests, "head", lambda *a, **k: time.sleep(2))
            monkeypatch.setattr(prepare.no_answer, "__defaults__", (0.3,))
        urls.update((file, f"{base}/{file}") for file in urls)
        fails(capsys, says, tmp_path / "new", files=6)
    assert time.monotonic() - start < 10 and not (tmp_path / "new").exists()
    fails(capsys, "unrecognized arguments: --data", tmp_path, more="--data x")
    status, out, err = command(prepare.__file__, "sample")
    assert (status, err.count("\n"), out) == (2, 1, "") and "invalid choice: 'sample'" in err

def test_damaged_originals_and_rubbish_are_refused(small, capsys):
    # half of the original must never pass for the original; a saved login page is named
    header, first, *_ = lines = (small / "goemotions_2.csv").read_text().splitlines()
    damage = {"359 annotations, the original has 360; delete what": lines[:-1],
              "row 1 (line 2)": [header, first[:-2]], "no column 'joy'": [header[:-4], first[:-2]],
              "row 1: 'joy' cannot be '2'": [header, first[:-1] + "2"],
              "row 1: 'rater_id' cannot be ' '": [header, "a,b, ,1,0,1"],
              "dev.tsv: a web page and not the file": ["", "<html>sign in</html>"],
              "dev.tsv: nothing in it": [], "dev.tsv: no column 'text' in it": ["404: Not Found"]}
    for says, lines in damage.items():
        file = small / ("dev.tsv" if "dev.tsv" in says else "goemotions_2.csv")
        before = file.read_bytes()
        file.write_text("\n".join(lines))
        fails(capsys, says, small)
        file.write_bytes(before)
    assert not (small / "annotations.csv").exists()

def test_any_file_of_the_same_columns_is_split_by_its_texts(small, tmp_path, capsys):
    # any text comes back as it was; one of the files of splits, or somebody else's CSV, is refused
    texts = ['a "b"\nc\r\nd', "x\ry", " space ", "\U0001f600,", *(f"text {t}" for t in range(80))]
    rows = [(x, u, "1.0" if u < 5 else 0, 0) for x in texts for u in range(6)]
    write_csv(tmp_path / "goemotions_part.csv", rows, "text rater_id anger joy")
    rows, out = run(tmp_path), capsys.readouterr().out
    assert "a hash of the text" in out and "no counts to compare" in out and "authors" not in out
    assert list(rows[0]) == ["text", "user", "split", *EMOTIONS]
    assert all(row["split"] == plm.split_of(row["text"]) and row["anger"] == "1" for row in rows)
    assert {row["text"] for row in rows} == set(texts)
    (tmp_path / "dev.tsv").write_text("a\t1\tx\n")
    fails(capsys, "test.tsv", tmp_path)
    (tmp_path / "annotations.csv").write_text("comment,_worker_id\n")
    fails(capsys, "annotations.csv: not of this script", tmp_path)

def test_unhealthy_has_csvs_of_splits_with_comments_of_several_lines(tmp_path, monkeypatch, capsys):
    row, texts = prepare.DATASETS["unhealthy"], [f'text {t},\n"so to say"' for t in range(30)]
    monkeypatch.setitem(row, "expected", {"annotations": (120,)})
    header = " ".join(["_unit_id comment _worker_id", *row["labels"]])
    rows = [(0, text, user, *[1] * 8) for text in texts for user in range(4)]
    write_csv(tmp_path / "unhealthy_full.csv", rows, header)
    (tmp_path / "corpus").mkdir()
    parts = dict(train=texts[:20], val=texts[20:25], test=texts[25:])
    for part, own in parts.items():
        write_csv(tmp_path / f"corpus/{part}.csv", enumerate(own), "id comment")
    rows, out = run(tmp_path, "unhealthy"), capsys.readouterr().out
    assert all(f"{n:>8}" in out for n in (80, 20, 48, 12)) and len(rows) == 72  # 60 % of each user
    assert list(rows[0]) == ["text", "user", "split", *row["labels"]]
    assert all(row["text"] in parts[row["split"]] for row in rows)
    (tmp_path / "corpus/val.csv").write_text("id\n1\n")
    fails(capsys, "val.csv: no column 'comment' in it", tmp_path, "unhealthy")

def test_popquorn_gets_five_draws_whatever_the_order_of_the_rows(tmp_path, monkeypatch, capsys):
    # sizes 70 : 10 : 20 of the texts, nobody new in val and test; what nobody rated is left out
    monkeypatch.setitem(prepare.DATASETS["popquorn"], "expected", {"with a label": (600,)})
    header, names, draws = "user_id text offensiveness", [f"draw{i}" for i in range(1, 6)], []
    ratings = [(u, f"text {t}", f"{(t + u) % 5 + 1}.0") for t in range(60) for u in range(10)]
    for lines in (ratings + [(1, "nobody rated this", "")], ratings[::-1]):
        write_csv(tmp_path / "raw_data.csv", lines, header)
        rows, out = run(tmp_path, "popquorn"), capsys.readouterr().out
        assert "no licence file" in out and "WARNING" not in out and f"{len(lines):>8,}" in out
        assert list(rows[0]) == ["text", "user", "offensiveness", *names]
        assert Counter(row["offensiveness"] for row in rows) == dict.fromkeys("12345", 120)
        draws.append([{row["text"]: row[name] for row in rows} for name in names])
    assert draws[0] == draws[1] and len({tuple(sorted(d.items())) for d in draws[0]}) == 5
    assert all(Counter(d.values()) == dict(train=42, val=6, test=12) for d in draws[0])
    val = [t for t in range(60) if draws[0][0][f"text {t}"] == "val"]
    assert val == [9, 11, 19, 27, 39, 41]  # in every Python that there is
    rare = ratings[:540] + [(t + 100, f"text {t}", 1) for t in range(60)]
    write_csv(tmp_path / "raw_data.csv", rare, header)
    fails(capsys, "draw1 has users who are not in training", tmp_path, "popquorn")

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
