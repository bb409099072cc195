"""Make another CSV of one that plm.py reads. A study is such a CSV and needs no code in plm.py.

    python data/vary.py DATA OUT.csv --unseen --known 5      new people: training has 5 rows of each
    python data/vary.py DATA OUT.csv --adapt --known 5       ... these rows and the tests' alone
    python data/vary.py DATA OUT.csv --by-time               train on the earlier, test on the later
    python data/vary.py DATA OUT.csv --ids hash|words|dp     other user IDs
    python data/vary.py DATA OUT.csv --labels 4              only the four most frequent labels
    python data/vary.py OUT.csv --quarters                   F1 of its runs by quarter of the test

DATA is a CSV, or NAME of data/NAME/annotations.csv. OUT.csv has the columns text, user, split, the
labels, and for --by-time time. Others stay away, since they might tell what an ID is to hide.
"""
import argparse
import csv
import hashlib
import hmac
import io
import math
import os
import random
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from datetime import datetime, timezone
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import plm  # noqa: E402
from plm import PARTS, BadInput, check, number, text_id  # noqa: E402
from table import finished_runs, read_predictions  # noqa: E402


class Row(NamedTuple):
    text: str
    user: str
    split: str
    time: str     # "" if the CSV has none
    labels: dict  # column -> cell


def read(data, split_col):
    """list of Row of all annotations; `split` is "" where one is in no part of the split."""
    path = plm.csv_of(data)
    found, _, split_col = plm.read_annotations(path, split_col)
    cells = plm.read_csv(path)
    columns = plm.label_columns(cells, split_col)
    rows = []
    for row, (a, part) in zip(cells, found):
        labels = {column: row[column] for column in columns}
        rows.append(Row(a.text, a.user, part, row.get("time", ""), labels))
    if split_col is None:  # as plm.py: without a split of its own nobody new is tested
        known = {a.user for a in rows if a.split == "train"}
        rows = [a if a.user in known else a._replace(split="") for a in rows]
    return rows


def in_one_split(rows):
    """The rows that are in a split; of a text in two of them, those of the later one stay."""
    split_of = {}
    for part in PARTS:
        for a in rows:
            if a.split == part:
                split_of[text_id(a.text)] = part
    kept = [a for a in rows if a.split and a.split == split_of[text_id(a.text)]]
    kept.sort(key=lambda a: PARTS.index(a.split))
    print(f"{len(rows):,} rows were read, {len(rows) - len(kept):,} of them are left out: in no "
          "split, or of a text that is in a later split, too")
    return kept


# -------------------- the variations: a function of rows that returns other rows

def choose_new_people(rows, args):
    """(set of users who play new people, set of the places of the training rows they give)."""
    n = Counter((a.user, a.split) for a in rows)
    users = sorted({a.user for a in rows})
    most = max(args.known, 15)  # whatever `known` is (up to 15), the same people are new
    able = [user for user in users if n[user, "train"] >= most and n[user, "test"]]
    size = round(args.share * len(users))
    enough = 5 <= size <= len(users) - 5 and size <= len(able)
    check(enough, f"too few users: {size} of {len(users)} would be new, 5 or more have to be, and "
                  f"5 or more known; {len(able)} have {most} training rows and a test row")
    new = random.Random(args.seed).sample(able, size)
    given = set()
    for user in new:  # 5 known rows are 5 of the 15
        own = [i for i, a in enumerate(rows) if a.user == user and a.split == "train"]
        shuffled = random.Random(f"{args.seed} {user}").sample(own, len(own))
        given.update(shuffled[:args.known])
    print(f"{size} of {len(users)} users are new people; training has {args.known} rows of each")
    return set(new), given


def unseen(rows, args):
    """The rows with some users as new people: they alone are tested, and training has `known` rows
    of each. Texts keep their splits, so the test rows are the same whatever `known` is."""
    rows = in_one_split(rows)
    new, given = choose_new_people(rows, args)
    kept = []
    for i, a in enumerate(rows):
        is_new = a.user in new
        if is_new == (a.split == "test") or i in given:
            kept.append(a)
    print(f"{len(rows) - len(kept):,} rows are left out: other rows of new people, and test rows "
          "of the others")
    return kept


def adapt(rows, args):
    """The `known` training rows of each new person, and their test rows."""
    rows = in_one_split(rows)
    new, given = choose_new_people(rows, args)
    check(args.known > 0, "--adapt needs --known 1 or more: rows to learn from")
    kept = []
    for i, a in enumerate(rows):
        if i in given or a.user in new and a.split == "test":
            kept.append(a)
    return kept


def seconds(cell):
    """A time as a number, of a number or of a date."""
    try:
        return float(cell)
    except ValueError:
        pass
    try:
        date = datetime.fromisoformat(cell.strip())
    except ValueError:
        raise BadInput(f"column time: {cell!r} is no number and no date") from None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return date.timestamp()


def by_time(rows, args):
    """The rows in new splits: the earlier 70 % to train, then 15 % val, 15 % test. A text is in the
    split of its first row and its later rows are left out, so that training has neither a test text
    nor a row later than a test row."""
    times = [seconds(a.time) for a in rows]
    in_order = sorted(times)
    cuts = [in_order[int(share * len(rows))] for share in (0.70, 0.85)]
    parts = [PARTS[bisect_right(cuts, t)] for t in times]
    first = {}  # text -> its earliest part
    for a, part in zip(rows, parts):
        before = first.get(text_id(a.text), part)
        first[text_id(a.text)] = min(part, before, key=PARTS.index)
    kept = []
    for a, part in zip(rows, parts):
        if part == first[text_id(a.text)]:
            kept.append(a._replace(split=part))
    enough = {a.split for a in kept} == {*PARTS} and len(set(quarters_of(kept))) == 5
    check(enough, "column time has too few different times")
    print(f"{len(rows) - len(kept):,} rows are left out, of texts from an earlier split")
    return kept


def quarters_of(rows):
    """list: the quarter of the test period, 1 to 4, in which each row falls; 0 if it is no test."""
    tested = sorted(seconds(a.time) for a in rows if a.split == "test")
    found = []
    for a in rows:
        earlier = bisect_left(tested, seconds(a.time))
        found.append(1 + 4 * earlier // len(tested) if a.split == "test" else 0)
    return found


def renamed(rows, args):
    """The rows with other user IDs: 16 hex digits of HMAC-SHA256, or words of three syllables."""
    users = sorted({a.user for a in rows})
    key = os.environ.get("PLM_KEY", "").encode()
    if args.ids == "hash":
        check(len(key) >= 16, "--ids hash needs a secret key of 16 characters or more in the "
                              "environment: export PLM_KEY=$(openssl rand -hex 32)")
        new = {}
        for user in users:
            new[user] = hmac.new(key, user.encode(), hashlib.sha256).hexdigest()[:16]
        print("Without the key nobody gets back to an ID or can test a guess; with it one can.")
    else:
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        words = []
        for start in syllables:
            for middle in syllables:
                words += [start + middle + end for end in syllables]
        new = dict(zip(users, random.Random(args.seed).sample(words, len(users))))
        print("A word says nothing of its ID; but --seed and all the IDs give the same words.")
    print("The rows of a person stay together, and texts and answers may tell who it is.")
    return [a._replace(user=new[a.user]) for a in in_one_split(rows)]


def responded(rows, args):
    """The rows with k-ary randomized response in training: of k users a row keeps its own with
    probability e^epsilon / (e^epsilon + k - 1) and else gets one of the others at random."""
    epsilon = args.epsilon
    check(epsilon, "--ids dp needs --epsilon, as in --epsilon 3 (inf changes nothing)")
    rows = in_one_split(rows)
    n = Counter(a.user for a in rows if a.split == "train")
    rng = random.Random(args.seed)
    keep = 1 / (1 + (len(n) - 1) * math.exp(-epsilon))
    told = []
    for a in rows:
        if a.split == "train" and rng.random() >= keep:
            others = [user for user in n if user != a.user]
            a = a._replace(user=rng.choice(others))
        told.append(a)
    changed = sum(a != b for a, b in zip(rows, told))
    print(f"{changed:,} of {n.total():,} training rows got another of {len(n)} IDs "
          f"({1 - keep:.1%} expected)")
    print(f"This protects the ID of one training row with epsilon {epsilon:g}; of a person with n "
          f"rows (up to {max(n.values())}) with n times that. It does not protect texts, answers, "
          "and rows of validation and test; and whoever has --seed can undo it.")
    return told


def frequent_labels(rows, args):
    """The rows with the labels that are most frequent in training. A row that has none of them now
    stays: it is an answer."""
    rows = in_one_split(rows)
    often = {}
    for column in rows[0].labels:
        often[column] = sum(a.labels[column] == "1" for a in rows if a.split == "train")
    check(len(often) > 1, f"--labels: {min(often)!r} is a single choice")
    check(args.labels <= len(often), f"--labels {args.labels}: there are {len(often)} of them")
    kept = sorted(often, key=often.get, reverse=True)[:args.labels]
    print("labels, times chosen in training:", ", ".join(f"{x} {often[x]:,}" for x in kept))
    found = []
    for a in rows:
        labels = {column: cell for column, cell in a.labels.items() if column in kept}
        found.append(a._replace(labels=labels))
    return found


# -------------------- from file to file

def write(path, rows, with_time):
    """Writes the CSV and prints what is in it."""
    time = ["time"] if with_time else []
    lines = io.StringIO(newline="")
    writer = csv.writer(lines)
    writer.writerow(["text", "user", "split", *time, *rows[0].labels])
    for a in rows:
        cells = [a.time] if with_time else []
        writer.writerow([a.text, a.user, a.split, *cells, *a.labels.values()])
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    plm.write_file(path, lines.getvalue().encode())
    n = Counter(a.split for a in rows)
    known = {a.user for a in rows if a.split == "train"}
    strange = sum(a.split == "test" and a.user not in known for a in rows)
    print(f"{path}: {n['train']:,} rows to train, {n['val']:,} to validate, {n['test']:,} to test "
          f"({strange:,} of users unknown to training)")


def print_quarters(path):
    """Prints F1-macro by quarter of the test period for the finished runs beside a CSV."""
    rows = read(path, None)
    quarter_of = {}
    for a, quarter in zip(rows, quarters_of(rows)):
        quarter_of[text_id(a.text), a.user] = quarter
    name = os.path.splitext(os.path.basename(path))[0]
    print("\nF1-macro by quarter of the test period")
    for folder, m in finished_runs(os.path.dirname(path) or "."):
        if m["data"] == name:
            gold, predicted, asked = read_predictions(folder, m["labels"])
            when = [quarter_of[row] for row in asked]
            scores = []
            for quarter in (1, 2, 3, 4):
                own = [q == quarter for q in when]
                scores.append(plm.f1_scores(gold[own], predicted[own])["f1_macro"])
            says = "  ".join(f"{f1:.3f}" for f1 in scores)
            print(f"{m['method']:9}{plm.model_name(m['model'])}, seed {m['seed']}:  {says}")


def make_parser():
    """The argparse parser."""
    parser = plm.Parser("vary.py", description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("out", metavar="OUT.csv", nargs="?", default="")
    what = parser.add_mutually_exclusive_group(required=True)
    for flag in ("--unseen", "--adapt", "--by-time", "--quarters"):
        what.add_argument(flag, action="store_true")
    what.add_argument("--ids", choices=["hash", "words", "dp"])
    what.add_argument("--labels", type=number(int, 2), metavar="N")
    parser.add_argument("--known", type=number(int, 0), default=0, metavar="K",
                        help="of --unseen and --adapt: training rows of each new person (0)")
    parser.add_argument("--share", type=number(float, 0, 1), default=0.25,
                        help="of new people among all (0.25)")
    parser.add_argument("--epsilon", type=number(float, 1e-3, math.inf), help="of --ids dp")
    parser.add_argument("--split-col", metavar="COL", help="column that says train, val or test")
    parser.add_argument("--seed", type=int, default=42, help="of what is random (42)")
    return parser


def variation(args):
    """The function of rows that the flags ask for."""
    if args.ids:
        return responded if args.ids == "dp" else renamed
    if args.labels:
        return frequent_labels
    if args.by_time:
        return by_time
    return adapt if args.adapt else unseen


def main(argv=None):
    """Runs the command; returns the exit status."""
    try:
        args = make_parser().parse_args(argv)
        if args.quarters:
            print_quarters(args.data)
            return 0
        name = os.path.basename(args.out)
        own = name.endswith(".csv") and name not in (os.path.basename(args.data), "annotations.csv")
        check(own, "the new CSV needs a name of its own: data/vary.py DATA out/new.csv ...")
        rows = read(args.data, args.split_col)
        check(not args.by_time or rows[0].time, f"{args.data} has no column time")
        write(args.out, variation(args)(rows, args), with_time=args.by_time)
    except (BadInput, OSError) as e:
        print(f"vary.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
