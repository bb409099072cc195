"""The table of the paper from all finished runs.

    python data/table.py [--out out ...]          (make table)

Methods in rows, models in columns, F1-macro with its 95 % interval; runs of several seeds or splits
are averaged, with their standard deviation. Behind a personalized method stands what it gains over
its plain twin in per cent, paired by seed and split, on the same rows only, and a star where every
paired interval excludes 0. Of several folders each model stands with its folder.
"""
import argparse
import csv
import glob
import json
import os
import re
import signal
import sys
from collections import defaultdict

if __name__ == "__main__":  # Ctrl-C needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]

ORDER = ["rates", "rates_p", "q_0s", "q_0s_p", "q_1s", "q_1s_p", "q_2s", "q_2s_p",
         "cls", "cls_p", "lm", "lm_p"]  # of the rows
TRIAL = ("max_eval", "max_steps")  # a run with one of these flags does not stand beside whole ones
NEEDED = ("method", "model", "data", "data_sha", "seed", "labels", "rows", "f1_macro",
          "f1_macro_ci", "f1_per_user", "per_label", "listens")


class NoRun(Exception):
    """There is nothing to make a table of."""


def finished_runs(out):
    """list of (folder, metrics) of every finished run in a folder of runs. One whose metrics.json
    cannot be used is named on stderr."""
    found = []
    pattern = os.path.join(glob.escape(out), "*", "*", "*", "seed*", "metrics.json")
    for path in sorted(glob.glob(pattern)):
        folder = os.path.dirname(path)
        try:
            with open(path, encoding="utf-8") as f:
                metrics = json.load(f)
            missing = [key for key in NEEDED if key not in metrics]
        except (ValueError, TypeError) as e:
            missing = [str(e)]
        if missing or metrics["method"] not in ORDER:
            adds = "; data/evidence.py adds it" if "f1_macro_ci" in missing else ""
            print(f"{folder} is left out: metrics.json lacks {missing[:3]}{adds}", file=sys.stderr)
        else:
            found.append((folder, metrics))
    return found


def model_column(folder):
    """The name of a run's model, as its folder has it: .../<data>/<model>/<method>/seed<S>."""
    return os.path.normpath(folder).split(os.sep)[-3]


def title_of(m):
    """What runs of one table have in common: their dataset, and the flags that made them trials."""
    flags = [f"--{key.replace('_', '-')} {m[key]}" for key in TRIAL if m.get(key)]
    return f"{m['data']} ({' '.join(flags)})" if flags else m["data"]


def in_order(name):
    """What titles and columns are sorted by: 5 comes before 15."""
    return [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def labels_in(cell, labels):
    """(L) of bools: the labels that a cell like "a, c" names, in order; commas may be in them."""
    if cell in labels:
        return [label == cell for label in labels]
    ticks = []
    rest = f"{cell}, "
    for label in labels:
        ticks.append(rest.startswith(f"{label}, "))
        if ticks[-1]:
            rest = rest[len(label) + 2:]
    return ticks


def read_predictions(folder, labels):
    """(gold (R, L), predicted (R, L), (text id, user) of each row) of a run's predictions.csv."""
    gold = []
    predicted = []
    rows = []
    csv.field_size_limit(1 << 30)
    path = f"{folder}/predictions.csv"
    with open(path, newline="", encoding="utf-8", errors="replace") as f:
        reader = csv.DictReader(f, restval="")
        missing = {"text_id", "user", "gold", "predicted"} - set(reader.fieldnames or ())
        if missing:
            raise NoRun(f"{path} lacks {', '.join(sorted(missing))}: data/evidence.py "
                        "--fresh makes the run anew")
        for row in reader:
            rows.append((row["text_id"], row["user"]))
            gold.append(labels_in(row["gold"], labels))
            predicted.append(labels_in(row["predicted"], labels))
    return np.array(gold), np.array(predicted), rows


def gain(plain_run, personal_run):
    """(gain in per cent of a personalized run over its plain twin, does the paired interval exclude
    0?) of two (folder, metrics); None if they were not scored on the same rows, or plain is 0."""
    labels = plain_run[1]["labels"]
    f1 = plain_run[1]["f1_macro"]
    if labels != personal_run[1]["labels"] or f1 == 0:
        return None
    gold, plain, rows = read_predictions(plain_run[0], labels)
    own_gold, personal, own_rows = read_predictions(personal_run[0], labels)
    if rows != own_rows or (gold != own_gold).any():
        return None
    import evidence  # with plm: four seconds, which a table without gains does not need
    texts = [text for text, _ in rows]
    low, high = evidence.interval_of_gain(gold, plain, personal, texts)
    return 100 * (personal_run[1]["f1_macro"] / f1 - 1), low > 0 or high < 0


def table_cell(runs, twins):
    """One cell of the table, of dicts (split, seed) -> (folder, metrics): F1-macro of a run with
    its interval (of several: mean and standard deviation), and the gain over the plain twins, *
    where every paired interval excludes 0."""
    f1 = [m["f1_macro"] for _, m in runs.values()]
    if len(f1) > 1:
        spread = f"+-{np.std(f1, ddof=1):.3f} of {len(f1)}"
    else:
        _, metrics = list(runs.values())[0]
        low, high = metrics["f1_macro_ci"]
        spread = f"[{low:.3f} {high:.3f}]"
    gains = [gain(twins[key], runs[key]) for key in runs if key in twins]
    if not gains or None in gains:
        return f"{np.mean(f1):.3f} {spread}"
    percent = np.mean([more for more, _ in gains])
    star = "*" if all(sure for _, sure in gains) else ""
    return f"{np.mean(f1):.3f} {spread} {percent:+.0f} %{star}"


def collect(outs):
    """dict title -> dict (model, method) -> dict (split, seed) -> (folder, metrics)."""
    tables = defaultdict(lambda: defaultdict(dict))
    for out in outs:
        for folder, m in finished_runs(out):
            column = model_column(folder)
            if len(outs) > 1:
                column += f" {os.path.basename(os.path.normpath(out))}"
            tables[title_of(m)][column, m["method"]][m.get("split"), m["seed"]] = (folder, m)
    if not tables:
        raise NoRun(f"{', '.join(outs)}: no finished run; make one with: make cls_p")
    in_rows = {}
    for title in sorted(tables, key=in_order):
        cells = tables[title].items()
        in_rows[title] = dict(sorted(
            cells, key=lambda x: (in_order(x[0][0]), ORDER.index(x[0][1]))))
    return in_rows


def twins_of(cells, model, method):
    """The runs of the plain twin of a personalized method, by the same model; {} without any."""
    if not method.endswith("_p"):
        return {}
    return cells.get((model, method.removesuffix("_p")), {})


def print_table(title, cells):
    """Prints F1-macro of methods (rows) by models (columns) on one dataset."""
    models = list(dict.fromkeys(model for model, _ in cells))
    text = {}
    for (model, method), runs in cells.items():
        text[model, method] = table_cell(runs, twins_of(cells, model, method))
    width = 2 + max(len(x) for x in (*text.values(), *models))
    print(f"\n{title}: F1-macro [95 %], gain over the plain twin, * where it is more than chance")
    print(" " * 9 + "".join(f"{model:>{width}}" for model in models))
    for method in ORDER:
        row = [text.get((model, method), "") for model in models]
        if any(row):
            print(f"{method:9}" + "".join(f"{cell:>{width}}" for cell in row))


def main(argv=None):
    """Prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=["out"], nargs="+", metavar="DIR",
                        help="folders of runs (out)")
    args = parser.parse_args(argv)
    try:
        for title, cells in collect(args.out).items():
            print_table(title, cells)
    except (NoRun, OSError) as e:
        print(f"table.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(main())
