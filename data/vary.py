"""Make another CSV from one that plm.py reads; a study is such a CSV and needs no code in plm.py.

    python data/vary.py DATA OUT.csv --unseen --known 5      new people: 5 rows of each in training
    python data/vary.py DATA OUT.csv --by-time time          train on the earlier, test on the later
    python data/vary.py DATA OUT.csv --ids hash|words|dp     other user IDs
    python data/vary.py DATA OUT.csv --labels 4              the four most frequent labels only
    python data/vary.py OUT.csv --quarters                   F1 of its runs by quarter of the test

DATA is a CSV, or the name of one in plm.py. OUT.csv has the columns text, user, split, (quarter)
and the labels. Other columns stay away, since they might tell what an ID is to hide.
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
from collections import Counter, namedtuple
from datetime import datetime, timezone

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import plm  # noqa: E402
from plm import BadInput, number, text_id  # noqa: E402
from table import finished_runs, read_predictions  # noqa: E402

PARTS = ("train", "val", "test")
Row = namedtuple("Row", "text user split time labels")  # labels: dict column -> cell


def read(args):
    """list of Row of what plm.py would read. Of a text in two splits the rows of one stay."""
    text = args.text_col or plm.DATASETS.get(args.data, {}).get("text", "text")
    text += f",{args.by_time}" if args.by_time else ""  # the time rides at the end of the text
    data = plm.load_data(args.data, 0, args.skip_missing, text=text, user=args.user_col,
                         split=args.split_col, label=args.label_col, labels=args.label_cols)
    names = [data.notes["columns taken as labels"]] if data.single else data.labels
    values, rows = "01" if data.labels[0] == f"not {names[0]}" else data.labels, []
    for split in PARTS:
        for a in getattr(data, split):
            text, _, time = a.text.rpartition("\n") if args.by_time else (a.text, "", "")
            cells = [values[a.labels.index(1)]] if data.single else a.labels
            rows.append(Row(text, a.user, split, time, dict(zip(names, cells))))
    if args.by_time:  # in which the splits are made anew
        print(f"{len(rows):,} of {data.notes['rows read']:,} rows are in a split, by a known user")
        return rows
    plm.print_data(data)
    last = {text_id(a.text): a.split for a in rows}  # test before val before train
    kept = [a for a in rows if a.split == last[text_id(a.text)]]
    print(f"left out: {len(rows) - len(kept):,} rows of texts that are in a later split too")
    return kept


# -------------------- the variations: a function of rows that returns other rows

def unseen(rows, args):
    """The rows with a share of the users as test users, of whom training has `known` rows each. The
    texts keep their splits, so whatever `known` is (up to 15), the test rows are the same."""
    n, most = Counter((a.user, a.split) for a in rows), max(args.known, 15)
    users = sorted({a.user for a in rows})
    able = [u for u in users if n[u, "train"] >= most and n[u, "test"]]
    if min(size := round(args.share * len(users)), len(users) - size) < 5 or size > len(able):
        raise BadInput(f"too few users: {size} of {len(users)} would be new, 5 or more have to be, "
                       f"and 5 or more known; {len(able)} have {most} training rows and a test row")
    new, given = set(random.Random(args.seed).sample(able, size)), set()
    for user in new:  # 5 known rows are 5 of the 15
        own = [i for i, a in enumerate(rows) if (a.user, a.split) == (user, "train")]
        given |= set(random.Random(f"{args.seed} {user}").sample(own, len(own))[:args.known])
    kept = [a for i, a in enumerate(rows) if i in given or (a.user in new) == (a.split == "test")]
    lost = Counter((a.user in new, a.split) for a in rows)
    print(f"{size} new people of {len(users)}, {args.known} training rows of each; left out: "
          f"{lost[True, 'train'] - len(given):,} train, {lost[True, 'val']:,} val rows of these, "
          f"{lost[False, 'test']:,} test rows of others")
    return kept


def seconds(cell):
    """A time as a number, of a number or of a date. ValueError if it is neither."""
    try:
        return float(cell)
    except ValueError:
        date = datetime.fromisoformat(cell.strip())
        return date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()


def by_time(rows, args):
    """The rows in new splits: the earlier 70 % to train, then 15 % val, 15 % test; `time` is the
    quarter of the test. A text is in the split of its first row and its later rows are left out,
    so training has neither a test text nor a row later than a test row."""
    try:
        times = [seconds(a.time) for a in rows]
    except ValueError as e:
        raise BadInput(f"column {args.by_time!r}: {e}; a number or a date is needed") from None
    cuts, first = [sorted(times)[int(s * len(times))] for s in (0.70, 0.85)], {}
    part = {t: PARTS[bisect_right(cuts, t)] for t in times}
    for a, t in zip(rows, times):
        first[text_id(a.text)] = min(t, first.get(text_id(a.text), t))
    kept = [(t, a) for a, t in zip(rows, times) if part[t] == part[first[text_id(a.text)]]]
    late = sorted(t for t, _ in kept if part[t] == "test")
    kept = [a._replace(split=part[t], time=str(1 + 4 * bisect_left(late, t) // len(late))
                       if part[t] == "test" else "") for t, a in kept]
    n = Counter(a.time or a.split for a in kept)
    if not all(n[name] for name in ("train", "val", *"1234")):
        raise BadInput(f"column {args.by_time!r} has too few different times")
    print(f"left out: {len(rows) - len(kept):,} rows of texts from an earlier split; test rows by "
          f"quarter: {', '.join(str(n[q]) for q in '1234')}")
    return kept


def renamed(rows, args):
    """The rows with other user IDs: 16 hex digits of HMAC-SHA256, or words of three syllables."""
    users, key = sorted({a.user for a in rows}), os.environ.get("PLM_KEY", "").encode()
    if args.ids == "hash" and len(key) < 16:
        raise BadInput("--ids hash needs a secret key of 16 characters or more in the environment: "
                       "export PLM_KEY=$(openssl rand -hex 32)")
    if args.ids == "hash":
        new = {u: hmac.new(key, u.encode(), hashlib.sha256).hexdigest()[:16] for u in users}
        says = "without the key nobody gets back to an ID or can test a guess. Not: with it one can"
    else:
        syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
        words = [x + y + z for x in syllables for y in syllables for z in syllables]
        new = dict(zip(users, random.Random(args.seed).sample(words, len(users))))
        says = "a word says nothing of its ID. Not: --seed and all the IDs give the same words"
    print(f"{args.ids} protects: {says}; the rows of a person stay together, and texts and answers "
          "may tell who it is")
    return [a._replace(user=new[a.user]) for a in rows]


def responded(rows, args):
    """The rows with k-ary randomized response in training: of k users a row keeps its own with
    probability e^epsilon / (e^epsilon + k - 1) and else gets one of the others at random."""
    if not (e := args.epsilon):
        raise BadInput("--ids dp needs --epsilon, as in --epsilon 3 (inf changes nothing)")
    n, rng = Counter(a.user for a in rows if a.split == "train"), random.Random(args.seed)
    keep = 1 / (1 + (len(n) - 1) * math.exp(-e))
    told = [a if a.split != "train" or rng.random() < keep else a._replace(
        user=rng.choice([u for u in n if u != a.user])) for a in rows]
    print(f"{sum(a != b for a, b in zip(rows, told)):,} of {n.total():,} training rows got another "
          f"of {len(n)} IDs ({1 - keep:.1%} expected)")
    print(f"dp protects: the ID of one training row, epsilon {e:g}; of a person with n rows (up to "
          f"{max(n.values())}), n times that. Not: texts and answers, rows of validation and test; "
          "whoever has --seed can undo it")
    return told


def frequent_labels(rows, args):
    """The rows with the labels that are most frequent in training. A row that has none of them now
    stays: it is an answer."""
    often = Counter({x: sum(a.labels[x] == 1 for a in rows if a.split == "train")
                     for x in rows[0].labels})
    if args.labels > len(often):
        raise BadInput(f"--labels {args.labels}: there are {len(often)} 0/1 columns of labels"
                       if len(often) > 1 else f"--labels: {min(often)!r} is a single choice")
    kept = dict(often.most_common(args.labels))
    print("labels, times chosen in training:", ", ".join(f"{x} {n:,}" for x, n in kept.items()))
    return [a._replace(labels={x: v for x, v in a.labels.items() if x in kept}) for a in rows]


# -------------------- from file to file

def write(path, rows):
    """None; writes the CSV and prints what is in it."""
    lines, quarter = io.StringIO(newline=""), ["quarter"] * any(a.time for a in rows)
    csv.writer(lines).writerows([("text", "user", "split", *quarter, *rows[0].labels)] + [
        (*a[:3], *[a.time] * len(quarter), *a.labels.values()) for a in rows])
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    plm.write_file(path, lines.getvalue().encode())
    n, known = Counter(a.split for a in rows), {a.user for a in rows if a.split == "train"}
    strange = sum(a.split == "test" and a.user not in known for a in rows)
    print(f"{path}: {n['train']:,} rows to train, {n['val']:,} to validate, {n['test']:,} to test "
          f"({strange:,} of users unknown to training)")


def quarters(path):
    """None; prints F1-macro by quarter of the test for the finished runs beside a CSV."""
    when = {(text_id(a["text"]), a["user"]): a.get("quarter") for _, a in plm.csv_rows(path)}
    for folder, m in finished_runs(os.path.dirname(path) or "."):
        if m["data"] == os.path.splitext(os.path.basename(path))[0]:
            gold, said, rows = read_predictions(folder, m["labels"])
            of = [[i for i, row in enumerate(rows) if when[row] == q] for q in "1234"]
            f1 = [plm.f1_scores(gold[ids], said[ids])["f1_macro"] for ids in of]
            print(f"{m['method']:9}seed {m['seed']}, by quarter:", *(f"{x:.3f}" for x in f1))


def main(argv=None):
    """Runs the command; returns the exit status."""
    p = argparse.ArgumentParser("vary.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: plm.check(False, message)
    p.add_argument("data", metavar="DATA")
    p.add_argument("out", metavar="OUT.csv", nargs="?", default="")
    one = p.add_mutually_exclusive_group(required=True)
    one.add_argument("--unseen", action="store_true")
    one.add_argument("--by-time", metavar="COL", help="the column of the time")
    one.add_argument("--ids", choices=["hash", "words", "dp"])
    one.add_argument("--labels", type=number(int, 2), metavar="N")
    one.add_argument("--quarters", action="store_true")
    p.add_argument("--known", type=number(int, 0), default=0, metavar="K", help="of --unseen (0)")
    p.add_argument("--share", type=number(float, 0, 1), default=0.25, help="of new people (0.25)")
    p.add_argument("--epsilon", type=number(float, 1e-3, math.inf), metavar="X", help="of --ids dp")
    p.add_argument("--label-cols", type=plm.LIST, metavar="A,B,C", help="0/1 columns of labels")
    for name in ("text-col", "user-col", "split-col", "label-col", "skip-missing", "seed"):
        p.add_argument(f"--{name}", **dict(plm.FLAGS)[f"--{name}"])
    try:
        args = p.parse_args(argv)
        if args.quarters:
            return quarters(args.data) or 0
        name = os.path.basename(args.out)
        if not name.endswith(".csv") or name in (os.path.basename(args.data), "annotations.csv"):
            raise BadInput("the new CSV needs a name of its own: data/vary.py DATA out/new.csv ...")
        vary = (unseen if args.unseen else frequent_labels if args.labels else by_time
                if not args.ids else responded if args.ids == "dp" else renamed)
        write(args.out, vary(read(args), args))
    except (BadInput, OSError) as e:
        print(f"vary.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
