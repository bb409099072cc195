"""The table of the paper from all finished runs.

    python data/table.py [--out out ...]          (make table)

Methods in rows, models in columns, F1-macro with its 95 % interval; runs of several seeds or splits
are averaged, with their standard deviation. Behind a personalized method stands what it gains over
its plain twin in per cent, paired by seed and split, on the same rows only, and a star where every
paired interval excludes 0. Of several folders each model stands with its folder.
"""
import argparse
import glob
import os
import sys
from collections import defaultdict

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import plm  # noqa: E402


def fits(value, like):
    """Is a value out of a file of the same form as `like`?"""
    if isinstance(like, dict):
        return isinstance(value, dict) and all(fits(value.get(k), x) for k, x in like.items())
    if isinstance(like, list):
        return isinstance(value, list) and all(fits(x, like[0]) for x in value)
    return isinstance(value, (int, float) if type(like) in (int, float) else type(like))


TRIAL = "max_eval", "max_steps"  # a run with one of them is not set beside whole ones
METRICS = dict(  # the form of what tables and the report read of metrics.json
    method="", model="", data="", data_sha="", seed=0, labels=[""], f1_macro=0.0,
    f1_macro_ci=[0.0], per_label=[0.0], f1_per_user=dict(users={}), spread=0.0,
    rows=dict(train=0, val=0, test=0), listens=dict(model=0.0, people=0.0))


def finished_runs(out):
    """Yields (folder, metrics) of every finished run; what cannot be read is named on stderr."""
    pattern = os.path.join(glob.escape(out), "*", "*", "*", "seed*", "metrics.json")
    for folder in map(os.path.dirname, sorted(glob.glob(pattern))):
        try:
            m = plm.read_json(f"{folder}/metrics.json")
            odd = [key for key, form in METRICS.items() if not fits(m.get(key), form)]
            plm.check(not odd and m["method"] in plm.METHODS, f"metrics.json: damaged {odd[:3]}")
            low, high = m["f1_macro_ci"]
            plm.check(0 <= low <= high <= 1 and 0 <= m["f1_macro"] <= 1 <= m["rows"]["test"]
                      and all(fits(m.get(key, 0), 0) for key in TRIAL)
                      and fits(m.get("split") or "", ""), "no F1")
            yield folder, m
        except (OSError, plm.BadInput, ValueError) as e:
            print(f"table.py: {folder} is left out ({e})", file=sys.stderr)


def table_of(m):
    """(dataset of a run, the flags that made it a trial): what stands in one table."""
    flags = [f"--{key.replace('_', '-')} {m[key]}" for key in TRIAL if m.get(key)]
    return m["data"], f" ({' '.join(flags)})" if flags else ""


def read_predictions(folder, labels):
    """(gold (R, L), predicted (R, L), (text id, user) of each row) of a run's predictions.csv."""
    def ticks(cell):
        names = [cell] if cell in labels else cell.split(", ")
        return [int(label in names) for label in labels]

    needed = "text_id", "user", "gold", "predicted"
    rows = [row for _, row in plm.csv_rows(f"{folder}/predictions.csv", needed)]
    gold, predicted = (np.array([ticks(r[key]) for r in rows]) for key in ("gold", "predicted"))
    return gold, predicted, [(r["text_id"], r["user"]) for r in rows]


def gain(plain, personal):
    """(gain in per cent of a personalized run over its plain twin, does the paired interval exclude
    0?) of two (folder, metrics); None if they were not scored on the same rows, or plain is 0."""
    (a, m), (b, n) = plain, personal
    try:
        gold, first, rows = read_predictions(a, m["labels"])
        gold_too, second, rows_too = read_predictions(b, n["labels"])
    except plm.BadInput as e:
        print(f"table.py: no gain of {b} over {a} ({e})", file=sys.stderr)
        return None
    if rows != rows_too or m["labels"] != n["labels"] or (gold != gold_too).any() \
            or not m["f1_macro"]:  # of nothing there is no per cent
        return None
    texts = [text for text, _ in rows]
    draws = plm.bootstrap_f1(gold, second, texts) - plm.bootstrap_f1(gold, first, texts)
    low, high = np.percentile(draws, [2.5, 97.5])
    return 100 * (n["f1_macro"] / m["f1_macro"] - 1), not low <= 0 <= high


def table_cell(runs, twins):
    """One cell of the table: F1-macro of a run with its interval (of several: mean and standard
    deviation), and the gain over the plain twins, * where every paired interval excludes 0."""
    f1 = [m["f1_macro"] for _, m in runs.values()]
    low, high = next(iter(runs.values()))[1]["f1_macro_ci"]
    spread = f"[{low:.3f} {high:.3f}]"
    if len(f1) > 1:
        spread = f"+-{np.std(f1, ddof=1):.3f} of {len(f1)}"
    gains = [gain(twins[key], runs[key]) for key in runs if key in twins]
    if not gains or None in gains:
        return f"{np.mean(f1):.3f} {spread}"
    percent, sure = zip(*gains)
    return f"{np.mean(f1):.3f} {spread} {np.mean(percent):+.0f} %" + "*" * all(sure)


def print_table(*outs):
    """F1-macro of every finished run: methods in rows, models in columns (of several folders: each
    with its folder), a table a dataset, one for its trials. Runs of several seeds and splits are
    averaged; gains are paired by both."""
    cells = defaultdict(dict)
    for out in outs:
        for folder, m in finished_runs(out):
            column = plm.model_name(m["model"]) + f" {os.path.basename(out)}" * (len(outs) > 1)
            key = table_of(m), m["method"], column
            cells[key][m.get("split"), m.get("seed")] = folder, m
    plm.check(cells, f"{', '.join(outs)}: no finished run; make one with: python plm.py cls_p")
    for data in sorted({data for data, *_ in cells}):
        models = sorted({model for d, _, model in cells if d == data})
        text = {}
        for (d, method, model), runs in cells.items():
            if d == data:
                twin = method.removesuffix("_p") if method.endswith("_p") else None
                text[method, model] = table_cell(runs, cells.get((d, twin, model), {}))
        width = max(map(len, [*text.values(), *models])) + 2
        print(f"\n{''.join(data)}: F1-macro [95 %], gain over the plain twin, * where it is more "
              "than chance")
        for method in ("", *plm.METHODS):
            cell = {model: text.get((method, model), "" if method else model) for model in models}
            if any(cell.values()):
                print(f"{method:9}" + "".join(f"{cell[model]:>{width}}" for model in models))


def main(argv=None):
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=["out"], nargs="+", help="folder of all runs (out)")
    parser.add_argument("--says", default="", help="a sentence below the tables")
    try:
        args = parser.parse_args(argv)
        print_table(*args.out)
        print(f"\n{args.says}" * bool(args.says))
    except plm.BadInput as e:
        print(f"table.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
