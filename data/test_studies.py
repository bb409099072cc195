"""Tests of the studies and of what is read out of finished runs: vary, study, table, report."""
import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import evidence  # noqa: E402
import plm  # noqa: E402
import readers  # noqa: E402
import report  # noqa: E402
import study  # noqa: E402
import table  # noqa: E402
import vary  # noqa: E402

LABELS = ["calm", "rude", "sad", "odd", "warm", "cold", "dry"]
KEY = "k" * 16


def write_csv(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(columns)
        writer.writerows(rows)
    return str(path)


def crowd(path, seed=0):
    """The path of a CSV without a split column: 4 of 24 people read each of 200 texts."""
    rng = random.Random(seed)
    rows = []
    for i in range(200):
        for user in rng.sample(range(24), 4):
            day = f"2024-{1 + i // 17:02}-{rng.randrange(9) + 10}"
            labels = [int(rng.random() < 0.6 - j / 14) for j in range(7)]
            rows.append((f"text {i} of {seed}", f"worker {user}", day, *labels))
    return write_csv(path, ["text", "user", "time", *LABELS], rows)


def varied(source, line):
    """dict part -> list of rows of what vary.py makes; no text is in two parts."""
    out = f"{source}.new.csv"
    assert vary.main([source, out, *line.split()]) == 0
    parts = {part: [] for part in plm.PARTS}
    part_of = {}
    for row in plm.read_csv(out):
        parts[row["split"]].append(row)
        assert part_of.setdefault(row["text"], row["split"]) == row["split"]
    return parts


# -------------------- data/vary.py

@pytest.mark.parametrize("seed", range(4))
def test_new_people_are_new_but_for_the_rows_that_are_given(tmp_path, seed):
    source = crowd(tmp_path / "a.csv", seed)
    made = {}
    for known in (0, 5, 15):
        parts = varied(source, f"--unseen --known {known} --seed {seed}")
        made[known] = parts
        new = {row["user"] for row in parts["test"]}
        assert len(new) == 6
        assert not new & {row["user"] for row in parts["val"]}
        rows_of = Counter(row["user"] for row in parts["train"])
        assert {rows_of[user] for user in new} == {known}
    assert made[0]["test"] == made[5]["test"] == made[15]["test"]
    assert all(row in made[15]["train"] for row in made[5]["train"])


def test_to_adapt_there_are_the_given_rows_of_new_people_and_their_tests(tmp_path):
    source = crowd(tmp_path / "a.csv")
    whole = varied(source, "--unseen --known 5")
    own = varied(source, "--adapt --known 5")
    new = {row["user"] for row in whole["test"]}
    assert own["test"] == whole["test"]
    assert own["train"] == [row for row in whole["train"] if row["user"] in new]
    assert not own["val"]


def test_every_row_comes_from_the_source(tmp_path):
    source = crowd(tmp_path / "a.csv")
    there = plm.read_csv(source)
    for row in there:
        del row["time"]
    for rows in varied(source, "--unseen --known 5").values():
        for row in rows:
            del row["split"]
            assert row in there


def test_the_later_is_later(tmp_path):
    parts = varied(crowd(tmp_path / "a.csv"), "--by-time")
    train = [row["time"] for row in parts["train"]]
    val = [row["time"] for row in parts["val"]]
    test = [row["time"] for row in parts["test"]]
    assert max(train) < min(val)
    assert max(val) < min(test)


def test_quarters_of_the_test_period_follow_its_days():
    days = ["2024-01-0%d" % day for day in range(1, 9)]
    rows = [vary.Row("", "", "test", day, {}) for day in days]
    rows.append(vary.Row("", "", "train", "2023-12-31", {}))
    assert vary.quarters_of(rows) == [1, 1, 2, 2, 3, 3, 4, 4, 0]


def test_a_time_is_a_number_or_a_date():
    assert vary.seconds("12.5") == 12.5
    assert vary.seconds("1970-01-02") == 86400
    with pytest.raises(plm.BadInput, match="no number and no date"):
        vary.seconds("yesterday")


@pytest.mark.parametrize("epsilon", [1, 3, 8])
def test_randomized_response_keeps_its_rate_and_leaves_the_test_alone(tmp_path, epsilon):
    source = crowd(tmp_path / "a.csv")
    true = varied(source, "--ids dp --epsilon inf")
    told = varied(source, f"--ids dp --epsilon {epsilon}")
    assert told["val"] == true["val"]
    assert told["test"] == true["test"]
    n = len(true["train"])
    kept = sum(a["user"] == b["user"] for a, b in zip(true["train"], told["train"]))
    rate = math.exp(epsilon) / (math.exp(epsilon) + 23)
    assert abs(kept - n * rate) <= 1 + 4.5 * math.sqrt(n * rate * (1 - rate))


def users_in(parts):
    return {row["user"] for rows in parts.values() for row in rows}


def test_hashes_follow_the_key_and_words_the_seed(tmp_path, monkeypatch):
    source = crowd(tmp_path / "a.csv")
    hashes = []
    for key in (KEY, KEY, "l" * 16):
        monkeypatch.setenv("PLM_KEY", key)
        hashes.append(users_in(varied(source, "--ids hash")))
    words = [users_in(varied(source, f"--ids words --seed {seed}")) for seed in (1, 1, 2)]
    for first, again, other in (hashes, words):
        assert len(first) == 24
        assert first == again
        assert first != other


def test_no_other_column_is_left_that_could_tell_who_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PLM_KEY", KEY)
    source = crowd(tmp_path / "a.csv")
    assert list(varied(source, "--ids hash")["val"][0]) == ["text", "user", "split", *LABELS]


def test_the_most_frequent_labels_are_kept(tmp_path):
    parts = varied(crowd(tmp_path / "a.csv"), "--labels 2")
    assert list(parts["val"][0]) == ["text", "user", "split", "calm", "rude"]


@pytest.mark.parametrize("line, why", [
    ("--unseen --share 0.1", "too few users"), ("--unseen --known 99", "too few users"),
    ("--adapt", "--known 1 or more"), ("--ids hash", "PLM_KEY"), ("--ids dp", "--epsilon"),
    ("--labels 8", "there are 7"), ("--labels 1", "not a number from"), ("", "required"),
    ("--unseen --labels 2", "not allowed"),
    ("--by-time --split-col day", "needs exactly one column 'day'")])
def test_what_cannot_be_done_honestly_is_refused(tmp_path, monkeypatch, capsys, line, why):
    monkeypatch.setenv("PLM_KEY", "too short")
    source = crowd(tmp_path / "a.csv")
    assert vary.main([source, str(tmp_path / "b.csv"), *line.split()]) == 2
    assert why in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["a.csv"]


def test_a_single_choice_has_no_fewer_labels(tmp_path, capsys):
    rows = [(f"text {i}", f"u{i % 9}", 1 + i % 3) for i in range(90)]
    source = write_csv(tmp_path / "a.csv", ["text", "user", "rating"], rows)
    assert vary.main([source, str(tmp_path / "b.csv"), "--labels", "2"]) == 2
    assert "single choice" in capsys.readouterr().err


# -------------------- data/study.py

def planned(line):
    """(list of commands that make CSVs, list of jobs, folders of runs) of a study."""
    args = study.parse(line.split())
    return study.csv_commands(study.STUDIES[args.study], args), *study.jobs(
        study.STUDIES[args.study], args)


@pytest.mark.parametrize("name", study.STUDIES)
def test_a_study_has_commands_that_exist(name):
    csvs, jobs, _ = planned(f"{name} --seeds 1 2 -- --max-steps 3")
    parsers = {"readers.py": readers.make_parser(), "evidence.py": plm.make_parser()}
    for _, script, *argv in csvs:
        assert script.endswith("vary.py")
        vary.make_parser().parse_args(argv)
    for job in jobs:
        for _, script, *argv in job:
            parsers[os.path.basename(script)].parse_args(argv)


@pytest.mark.parametrize("name", study.STUDIES)
def test_no_two_jobs_of_a_study_want_the_same_folder(name):
    _, jobs, _ = planned(f"{name} --seeds 1 2 --model tiny tiny_t5")
    wanted = []
    for job in jobs:
        args = plm.make_parser().parse_args(job[0][2:])
        model = "baseline" if args.command in study.BASELINES else args.model
        wanted.append((args.out, args.data, model, args.command, args.seed))
    assert len(set(wanted)) == len(wanted)


def test_every_csv_of_a_study_is_made_before_it_is_read():
    csvs, jobs, _ = planned("unseen --data a.csv --split-col fold1")
    made = {command[3] for command in csvs}
    read = set()
    for job in jobs:
        for command in job:
            at = command.index("--csv" if "adapt" in command else "--data")
            read.add(command[at + 1])
    assert read == made
    assert all(command[-2:] == ["--split-col", "fold1"] for command in csvs)


def test_make_has_a_target_for_every_method_and_study():
    done = subprocess.run(["make"], cwd=os.path.dirname(HERE), capture_output=True, text=True)
    targets = {line.split()[0] for line in done.stdout.splitlines()}
    assert targets >= {*plm.METHODS, "predict", "adapt", *study.STUDIES}
    assert [*table.ORDER] == [*plm.METHODS]


def test_values_and_flags_of_plm_reach_the_commands():
    csvs, jobs, _ = planned("exp3 --values 2 5 --epochs 3")
    assert [command[-1] for command in csvs] == ["2", "5"]
    assert all("--epochs 3" in " ".join(job[0]) for job in jobs)
    with pytest.raises(SystemExit):
        study.parse(["paper", "--values", "2"])


def test_unseen_ends_with_a_table_of_all_three_ways(tmp_path, monkeypatch, capsys):
    mains = {"readers.py": readers.main, "vary.py": vary.main, "table.py": table.main,
             "evidence.py": evidence.main}

    def here(command, quiet=False):
        assert mains[os.path.basename(command[1])](command[2:]) == 0

    monkeypatch.setattr(study, "run", here)
    line = (f"unseen --data {crowd(tmp_path / 'a.csv')} --values 0 5 --out {tmp_path} "
            "-- --max-steps 2 --max-eval 20")
    assert study.main(line.split()) == 0
    out = capsys.readouterr().out
    _, known_0, known_5 = out.split("F1-macro [95 %]")
    assert "tiny adapted" not in known_0
    assert "tiny adapted" in known_5
    ours = known_5[known_5.index("cls_p"):].splitlines()[0]
    assert ours.count("[") == 2  # adapted, and trained anew
    assert study.STUDIES["unseen"].says in out


def test_print_makes_the_csvs_and_prints_a_command_a_line(tmp_path, capfd):
    source = crowd(tmp_path / "a.csv")
    line = f"exp3 --values 2 --data {source} --out {tmp_path} --print"
    assert study.main(line.split()) == 0
    lines = capfd.readouterr().out.splitlines()
    made = tmp_path / "exp3" / "a_labels_2.csv"
    assert made.exists()
    assert len(lines) == 2
    assert all(line.count(f"--data {made}") == 1 for line in lines)


def stand_in(tmp_path, script):
    """A process that runs a study whose every command is a script of ours."""
    path = tmp_path / "evidence.py"
    path.write_text(script)
    code = f"""
import signal, study, sys
study.EVIDENCE = {str(path)!r}
study.load_torch = lambda: None
signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as study.py's command line has it
sys.exit(study.main(["exp1"]))
"""
    return subprocess.Popen([sys.executable, "-c", code], cwd=HERE, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_ends_a_study_in_one_line(tmp_path):
    flag = tmp_path / "started"
    process = stand_in(tmp_path, f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    open({str(flag)!r}, "w").close()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # it needs a moment to end well
    sys.exit(130)
""")
    for _ in range(600):
        if flag.exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == "study.py: stopped; the study goes on by the same command\n"
    assert "[2 of 2]" not in out


def test_a_lost_connection_is_an_error_to_a_run_and_no_end(tmp_path):
    process = stand_in(tmp_path, """
import socket, sys
ours, theirs = socket.socketpair()
theirs.close()
try:
    ours.send(b"x")
except BrokenPipeError:
    sys.exit(7)
""")
    process.communicate(timeout=30)
    assert process.returncode == 7


def test_a_failed_command_ends_a_study_and_is_named(tmp_path):
    process = stand_in(tmp_path, "import sys; sys.exit(2)")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "since this failed:" in err
    assert " q_0s " in err


# -------------------- data/table.py

def fake_run(out, method, right, seed=1, **more):
    """The folder of a run on 40 texts by 4 users, of which a share of the rows is right."""
    rng = random.Random(f"{method} {seed}")
    folder = out / more.get("data", "d") / "m" / method / f"seed{seed}"
    os.makedirs(folder)
    names = more.get("labels", ["a", "b"])
    users = more.pop("users", ["ann", "bob", "cy", "dee"])
    rows = []
    for i in range(160):
        gold = names[(i + i // 4) % 2]
        wrong = names[(i + i // 4 + 1) % 2]
        rows.append((f"{i // 4:016}", users[i % 4], gold, gold if rng.random() < right else wrong))
    write_csv(folder / "predictions.csv", ["text_id", "user", "gold", "predicted"], rows)
    f1 = sum(gold == said for *_, gold, said in rows) / len(rows)
    metrics = dict(
        method=method, model="m", data="d", data_sha="0", seed=seed, labels=names, f1_macro=f1,
        f1_macro_ci=[f1 - 0.05, min(f1 + 0.05, 1)], per_label=[f1, f1 / 2],
        f1_per_user={user: f1 - 0.01 * k for k, user in enumerate(users)},
        listens=dict(model=0.25, people=0.5), rows=dict(train=9, val=9, test=160))
    metrics |= more
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return metrics


def printed(capsys, *outs):
    """The lines of the table, without double spaces."""
    assert table.main(["--out", *map(str, outs)]) == 0
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_a_gain_has_a_star_where_it_is_more_than_chance(tmp_path, capsys):
    plain = fake_run(tmp_path, "cls", 0.6)["f1_macro"]
    own = fake_run(tmp_path, "cls_p", 0.95)["f1_macro"]
    fake_run(tmp_path, "lm", 0.7)
    fake_run(tmp_path, "lm_p", 0.7)
    lines = printed(capsys, tmp_path)
    low, high = own - 0.05, min(own + 0.05, 1)
    assert f"cls_p {own:.3f} [{low:.3f} {high:.3f}] {100 * (own / plain - 1):+.0f} %*" in lines
    assert not lines[-1].endswith("*")  # of lm_p


def test_seeds_are_averaged_and_trials_stand_apart(tmp_path, capsys):
    f1 = [fake_run(tmp_path, "cls", 0.7, seed)["f1_macro"] for seed in (1, 2, 3)]
    fake_run(tmp_path, "lm", 0.5, max_steps=3)
    lines = printed(capsys, tmp_path)
    assert f"cls {np.mean(f1):.3f} +-{np.std(f1, ddof=1):.3f} of 3" in lines
    assert any(line.startswith("d (--max-steps 3): ") for line in lines)


def test_rows_that_differ_have_no_gain(tmp_path, capsys):
    fake_run(tmp_path, "cls", 0.6)
    fake_run(tmp_path, "cls_p", 0.9, users=["ann", "bob", "cy", "eve"])
    assert printed(capsys, tmp_path)[-1].endswith("]")


def test_folders_stand_beside_each_other(tmp_path, capsys):
    fake_run(tmp_path / "x", "cls", 0.6)
    fake_run(tmp_path / "y", "cls", 0.9)
    lines = printed(capsys, tmp_path / "x", tmp_path / "y")
    assert "m x m y" in lines


def test_what_is_no_finished_run_is_named_and_left_out(tmp_path, capsys):
    fake_run(tmp_path, "cls", 0.6)
    fake_run(tmp_path, "old", 0.6)
    fake_run(tmp_path, "lm", 0.6)
    (tmp_path / "d/m/lm/seed1/metrics.json").write_text("{")
    assert table.main(["--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert err.count("is left out") == 2
    assert "lm" not in out
    assert table.main(["--out", str(tmp_path / "nothing")]) == 2


def test_the_table_needs_no_torch():
    code = "import sys, table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0


# -------------------- data/report.py

NASTY = ["<script>1</script>", "\"'><img src=x onload=y>", "a & b \U0001f600", "]]>\x01\u202e"]


class Page(HTMLParser):
    """The tags and the text of a page."""
    def __init__(self, html):
        super().__init__()
        self.tags = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.update([tag, *dict(attributes)])

    def handle_data(self, data):
        self.text += data


def test_the_report_shows_the_numbers_and_runs_nothing(tmp_path):
    runs = [fake_run(tmp_path, method, 0.8, users=NASTY, labels=NASTY[:2], f1_disagreed=0.2468,
                     f1_macro_shuffled=0.1234) for method in ("cls", "cls_p", "lm")]
    assert report.main(["--out", str(tmp_path)]) == 0
    html = (tmp_path / "report.html").read_text("utf-8")
    page = Page(html)
    assert not {"script", "img", "link", "src", "href", "onload"} & page.tags
    assert "\x01" not in html
    assert "http" not in html
    numbers = [0.1234, 0.2468, *runs[0]["f1_per_user"].values()]
    for m in runs:
        numbers += [m["f1_macro"], *m["f1_macro_ci"], *m["per_label"]]
    assert all(f"{x:.3f}" in page.text for x in numbers)
    assert all(name in page.text for name in NASTY[:3])


def test_every_chart_is_xml_that_says_what_it_shows(tmp_path):
    fake_run(tmp_path, "cls", 0.7, users=NASTY)
    fake_run(tmp_path, "cls_p", 0.8, users=NASTY)
    report.main(["--out", str(tmp_path), "--picture", str(tmp_path / "p.svg")])
    html = (tmp_path / "report.html").read_text("utf-8")
    charts = html.split("<svg")[1:]
    assert len(charts) == 2
    for part in charts:
        chart = ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
        assert [x.tag for x in chart[:2]] == ["title", "desc"]
        assert chart[1].text
    assert ElementTree.parse(tmp_path / "p.svg").getroot().get("viewBox")


def test_the_picture_of_many_users_is_small(tmp_path):
    names = [f"user {i}" for i in range(3000)]
    before = {name: (3 * i % 97) / 97 for i, name in enumerate(names)}
    after = {name: (5 * i % 97) / 97 for i, name in enumerate(names)}
    fake_run(tmp_path, "cls", 0.7, f1_per_user=before)
    fake_run(tmp_path, "cls_p", 0.8, f1_per_user=after)
    picture = str(tmp_path / "p.svg")
    assert report.main(["--out", str(tmp_path), "--picture", picture]) == 0
    assert os.path.getsize(picture) < 60_000
    more = sum(after[name] > before[name] for name in names)
    assert f"{more} of 3000 users" in (tmp_path / "report.html").read_text("utf-8")


def test_nothing_to_show_is_one_line(tmp_path, capsys):
    assert report.main(["--out", str(tmp_path)]) == 2
    assert "no finished run" in capsys.readouterr().err
