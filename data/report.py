"""What the finished runs say, as one HTML page to read, to print or to send.

    python data/report.py                              reads out/, writes out/report.html
    python data/report.py --picture data/report.svg    ... and the picture of the README

The page has no script and asks no network for anything; what came out of a CSV is escaped. In every
chart a plain run is hollow and dashed, its personalized twin filled and solid; colour repeats that.
"""
import argparse
import json
import os
import re
import sys
import textwrap
from collections import defaultdict
from contextlib import suppress
from datetime import date
from html import escape
from math import ceil, floor

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import plm  # noqa: E402
from table import fits, finished_runs, read_predictions, table_cell, table_of  # noqa: E402

W = 340  # every chart is as wide as a phone, so that its letters are not scaled down there
COLORS = """body{{color:{0};background:{1}}}text{{fill:{0}}}.soft{{fill:{2}}}.rule{{stroke:{3}}}
th,td,h2{{border-color:{3}}}.plain{{stroke:{2};fill:{1}}}.own{{stroke:{4};fill:{4}}}
.sheet{{fill:{1}}}"""
STYLE = """text{font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums}
text.soft{font-size:12px}.head,b{font-weight:600}.own,.plain{stroke-width:1.7}path.own,path.plain
{fill:none}.plain.line{stroke-dasharray:5 4}%s
@media screen and (prefers-color-scheme:dark){%s}""" % (
    COLORS.format("#1d1d1f", "#fff", "#5c5c61", "#dcdce0", "#0b5cad"),
    COLORS.format("#e7e7ea", "#16181b", "#b0b0b6", "#3a3d42", "#7fb8ff"))
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Runs of plm.py</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';style-src 'unsafe-inline'">
<style>body{margin:auto;padding:1rem 1rem 4rem;max-width:71rem;font:1rem/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}h1,h2{line-height:1.25}
section{display:flex;flex-wrap:wrap;gap:1.75rem 2.5rem}section>*{margin:0}
h2,h3,section>p{flex-basis:100%%}h2{border-top:1px solid;margin-top:3rem;padding-top:1rem}
p,figcaption{max-width:44rem}figcaption{padding-bottom:.6rem}blockquote{margin:0 0 .4rem}
figure{width:21rem;max-width:100%%}table{border-collapse:collapse;table-layout:fixed;width:100%%}
.wide{width:auto;overflow-x:auto;overflow-wrap:normal}.wide table{table-layout:auto;width:auto}
th,td{padding:.35rem 1.2rem .35rem 0;border-bottom:1px solid;text-align:left;font-weight:400;
vertical-align:top}thead th{vertical-align:bottom;font-size:.875rem}
small{display:block;white-space:nowrap}@media print{html{font-size:10pt}.wide{overflow:visible}
figure,tr{break-inside:avoid}h2,h3{break-after:avoid}}%s</style></head><body>
<h1>Personalized Large Language Models: what the runs say</h1>%s</body></html>
"""
UNFIT = re.compile("[^\t\n\r -~\xa0-\u2029\u202f-\u2065\u206a-\ud7ff\ue000-\ufffd"
                   "\U00010000-\U0010ffff]")  # control characters, and those that turn text around


def safe(value, most=40):
    """The value as text for HTML and XML, cut to `most` characters."""
    text = UNFIT.sub("\ufffd", str(value))
    return escape(text if len(text) <= most else text[:most - 1] + "…")


def plot(title, x, y, dots, lines, height=230):
    """(title, height, SVG) of a chart. x: (low, high, label); y: the same, or a list of row names;
    dots: (x, y, personalized?, what it says); lines: (personalized?, points)."""
    kind, left, top, rows = {None: "rule", False: "plain", True: "own"}, 46, 30, None
    if isinstance(y, list):
        left, top, height, rows = 148, 4, 22 * len(y) + 44, list(enumerate(y))
        y = len(y) - .5, -.5, ""

    def at(a, b):
        return (f"{left + (a - x[0]) * (W - 12 - left) / (x[1] - x[0]):.1f} "
                f"{top + (b - y[1]) * (height - 40 - top) / (y[0] - y[1]):.1f}")

    def words(place, dx, dy, anchor, text, soft="soft"):
        return (f'<text class="{soft}" transform="translate({place})" dx="{dx}" dy="{dy}" '
                f'text-anchor="{anchor}">{text}</text>')

    svg = words("0 14", 0, 0, "start", y[2]) + words(at(x[1], y[0]), 0, 36, "end", x[2])
    for v in np.linspace(*x[:2], 5) if x[0] == 0 else sorted({*map(round, np.linspace(*x[:2], 7))}):
        svg += f'<path class="rule" d="M{at(v, y[0])}L{at(v, y[1])}"/>'
        svg += words(at(v, y[0]), 0, 17, "middle", f"{v:.3g}")
    for v, name in rows or [(v, f"{v:.3g}") for v in np.linspace(*y[:2], 5)]:
        svg += f'<path class="rule" d="M{at(x[0], v)}L{at(x[1], v)}"/>'
        svg += words(at(x[0], v), -9, 4, "end", name, "" if rows else "soft")
    for own, points in lines:
        svg += f'<path class="{kind[own]}{" line" * (not rows)}" d="M'
        svg += "L".join(at(*p) for p in points) + '"/>'
    for a, b, own, says in dots:
        svg += (f'<circle class="{kind[own]}" transform="translate({at(a, b)})" '
                f'r="{3 if rows else 4}"><title>{says}</title></circle>')
    says = "; ".join(says for *_, says in dots[:60])
    return title, height, f"<title>{title}</title><desc>{says}</desc>{svg}"


def intervals_chart(cells):
    """The chart of F1-macro with its interval: a row a method, by model; a dot for each seed."""
    names, dots, lines = [], [], []
    for (model, method), runs in cells.items():
        head = f'<tspan class="head">{safe(model, 16)}</tspan>'
        names += [head] * (head not in names)
        for k, (_, m) in enumerate(runs.values()):
            f1, (low, high) = m["f1_macro"], m["f1_macro_ci"]
            y = len(names) + .6 * ((k + .5) / len(runs) - .5)
            says, own = f"{f1:.3f} ({low:.3f} to {high:.3f})", plm.METHODS[method].personalized
            dots.append((f1, y, own, f"{method} of {safe(model)} {says}"))
            lines.append((own, [(low, y - .2), (low, y + .2), (low, y), (high, y),
                                (high, y - .2), (high, y + .2)]))
        names.append(f"{method} {np.mean([m['f1_macro'] for _, m in runs.values()]):.3f}")
    top = ceil(5 * max(points[-1][0] for _, points in lines) + .01) / 5
    return plot(f"F1-macro of every run with its 95 % interval; the highest is {max(dots)[3]}",
                (0, top, "F1-macro on the test rows"), names, dots, lines)


def pair_charts(model, a, b):
    """list of charts: F1 of each user, and of each label, of a plain and a personalized run."""
    users, labels = b["f1_per_user"]["users"], [*zip(a["labels"], a["per_label"], b["per_label"])]
    model = f"{safe(model)}, seed {safe(a['seed'])}"
    dots = [(p, users[user], users[user] > p, f"{safe(user, 24)}: {p:.3f} to {users[user]:.3f}")
            for user, p in a["f1_per_user"]["users"].items()]
    more, less = (sum(sign * (q - p) > 0 for p, q, *_ in dots) for sign in (1, -1))
    every = ceil(len(dots) / 300)  # of thousands of users some are enough to see, and a small file
    return [
        plot(f"{model}: {b['method']} predicts {more} of {len(dots)} users "
             f"({more / len(dots):.0%}) better than {a['method']} and {less} worse; a dot is a "
             "user, above the line who gains" + f" (1 of {every} is drawn)" * (every > 1),
             (0, 1, f"F1 without the ID ({a['method']})"),
             (0, 1, f"F1 with the ID ({b['method']})"), dots[::every],
             [(None, [(0, 0), (1, 1)])], 340),
        plot(f"{model}: F1 is higher with {b['method']} (filled) than with {a['method']} (hollow) "
             f"for {sum(q > p for _, p, q in labels)} of {len(labels)} labels",
             (0, 1, "F1 of a label"),
             [f"\u2068{safe(name, 12)}\u2069 {q - p:+.2f}" for name, p, q in labels],
             [(f1[own], i, own, f"{safe(name)} {('without', 'with')[own]} the ID {f1[own]:.3f}")
              for i, (name, *f1) in enumerate(labels) for own in (False, True)],
             [(True, [(p, i), (q, i)]) for i, (_, p, q) in enumerate(labels)])]


def curve_charts(model, runs):
    """list of charts: validation loss and `listens` by epoch of runs that were trained."""
    charts, logs, seeds = [], {}, "/".join(sorted({str(m["seed"]) for _, m in runs}))
    for folder, m in runs:
        with suppress(OSError, ValueError), open(f"{folder}/log.jsonl", encoding="utf-8") as f:
            logs[m["method"]] = [e for e in map(json.loads, f) if fits(
                e, dict(epoch=0, val_loss=0.0, listens=0.0))]
    for key, what in {"val_loss": "validation loss", "listens": "listens (variance between "
                      "readers)"}.items() if any(logs.values()) else ():
        dots = [(e["epoch"], e[key], plm.METHODS[method].personalized,
                 f"{method}, epoch {e['epoch']}: {e[key]:.3f}")
                for method, log in logs.items() for e in log]
        lines = [(own, [d[:2] for d in dots if d[2] == own]) for own in {d[2] for d in dots}]
        ends = ", ".join(f"{method} {log[-1][key]:.3f}" for method, log in logs.items() if log)
        low = floor(100 * min(d[1] for d in dots)) / 100 * (key == "val_loss")
        high = low + .04 * ceil((max(d[1] for d in dots) - low) / .04 + .1)  # four round steps
        charts.append(plot(
            f"{safe(model)}, seed {safe(seeds)}: {what} by epoch; in the end {ends}",
            (1, max(2, max(dots)[0]), "epoch"), (low, high, what), dots, lines))
    return charts


def figure_of(title, head, rows, kind='class="wide" tabindex="0"'):
    """HTML of a table whose cells are HTML already."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    rows = "".join(f'<tr><th scope="row">{name}</th><td>{"</td><td>".join(rest)}</td></tr>'
                   for name, *rest in rows)
    return (f"<figure {kind}><figcaption>{title}</figcaption><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table></figure>")


def main_table(cells):
    """HTML of F1-macro of methods by models, in the words of data/table.py."""
    models, rows = list(dict.fromkeys(model for model, _ in cells)), []
    for method in sorted({method for _, method in cells}, key=list(plm.METHODS).index):
        rows.append([method])
        for model in models:
            runs, plain = cells.get((model, method), {}), method.removesuffix("_p")
            twin = cells.get((model, plain), {}) if plain != method else {}
            f1, _, rest = (table_cell(runs, twin) if runs else "").partition(" ")
            rest = re.sub(r" (?=[+-]\d)", "<br>", rest).replace("+-", "±").replace("-", "−")
            rows[-1].append(f"<b>{f1}</b><small>{rest}</small>")
    return figure_of("F1-macro with its 95 % interval (of several seeds: mean and standard "
                     "deviation) and the gain over the plain twin, * where the paired interval "
                     "excludes 0.", ["method", *map(safe, models)], rows)


def controls_table(cells):
    """HTML of what the runs are to be compared with."""
    columns = {"f1_macro": "F1-macro", "f1_macro_tuned": "thresholds tuned",
               "f1_macro_user_bias": "bias for each user", "f1_macro_shuffled": "IDs shuffled",
               "f1_disagreed": "texts read differently", "model": "listens: model",
               "people": "listens: people"}
    rows = [[f"{method}<small>{safe(model)} {safe(m['split'] or '')} {safe(m['seed'])}</small>"]
            + ["–" if x is None else f"{x:.3f}" for x in map((m | m["listens"]).get, columns)]
            for (model, method), runs in cells.items() for _, m in runs.values()]
    return "<h3>Controls</h3>" + figure_of(
        "A personalized run has to beat its plain twin with a bias for each user, or it has learned"
        " a table; with shuffled user IDs its gain has to vanish. Listens: the share of the "
        "variance that lies between readers of one text.", ["run, seed", *columns.values()], rows)


def readers(cells):
    """HTML of the three test texts that people read most differently, as the best personalized run
    (without one: the best) reads them for each."""
    folder, m = max((run for runs in cells.values() for run in runs.values()), key=lambda run: (
        run[1]["method"].endswith("_p"), run[1]["f1_macro"]))
    try:
        (gold, predicted, rows), of = read_predictions(folder, m["labels"]), defaultdict(list)
    except plm.BadInput as e:
        print(f"report.py: no texts are shown ({e})", file=sys.stderr)
        return ""
    for i, (name, _) in enumerate(rows):
        of[name].append(i)
    apart = {name: gold[i].var(0).sum() for name, i in of.items() if gold[i].var(0).any()}
    chosen = sorted(apart, key=lambda name: (-apart[name], -len(of[name]), name))[:3]
    columns = plm.DATASETS.get(m["data"], {}).get("text", "text").split(",")
    try:  # predictions.csv has no texts; the CSV of a dataset has them, another one is out of reach
        path = f"{HERE}/{m['data']}/annotations.csv"
        there = plm.csv_rows(path) if m["data"] in plm.DATASETS else []
    except (plm.BadInput, OSError):
        there = []
    texts = ("\n".join(row.get(column, "") for column in columns) for _, row in there)
    known = {name: safe(text, 400) for text in texts if (name := plm.text_id(text)) in chosen}
    html = "".join(figure_of(
        f"<blockquote>{known.get(name, '')}</blockquote>Text {safe(name)}, {len(of[name])} readers",
        ["reader", "chose", "predicted"], [[safe(rows[i][1]), *(
            safe(plm.answer_text(m["labels"], ticked[i]), 200) for ticked in (gold, predicted))]
            for i in of[name][:12]], "") for name in chosen)
    return (f"<h3>The texts that people read most differently, and what {m['method']} of "
            f"{safe(plm.model_name(m['model']))} predicts for each reader</h3>{html}") * bool(html)


def twins(cells):
    """Yields (model, plain metrics, personalized metrics), of the first seed that both have."""
    for (model, method), runs in cells.items():
        own = cells.get((model, f"{method}_p"), {})
        for a, b in [(runs[key][1], own[key][1]) for key in runs if key in own][:1]:
            if all(a[key] == b[key] for key in ("data_sha", "labels", "rows")):
                yield model, a, b


def dataset(name, cells):
    """HTML of all runs on a dataset."""
    charts, m = [intervals_chart(cells)], next(iter(next(iter(cells.values())).values()))[1]
    for model in dict.fromkeys(model for model, _ in cells):
        charts += [c for pair in twins(cells) if pair[0] == model for c in pair_charts(*pair)]
        for head in ("cls", "lm"):
            group = [runs for (other, method), runs in cells.items()
                     if other == model and plm.METHODS[method].head == head]
            key = next((k for runs in group for k in runs if all(k in r for r in group)), None)
            charts += curve_charts(model, [r.get(key, next(iter(r.values()))) for r in group])
    html = "".join(f'<figure><figcaption>{title}.</figcaption><svg role="img" viewBox="0 0 {W} '
                   f'{height}">{svg}</svg></figure>' for title, height, svg in charts)
    sizes = ", ".join(f"{n:,} rows for {safe(part)}" for part, n in m["rows"].items())
    return (f"<section><h2>{safe(''.join(name), 99)}</h2>"
            f"<p>{sizes}; {len(m['f1_per_user']['users'])} users in the test; {len(m['labels'])} "
            f"labels: {', '.join(map(safe, m['labels']))}.</p>{main_table(cells)}{html}"
            f"{controls_table(cells)}{readers(cells)}</section>")


def picture(found):
    """The SVG of the README: intervals and the best pair's users, of the dataset with most runs."""
    cells = max(found.values(), key=len)
    best = max(twins(cells), key=lambda pair: pair[2]["f1_macro"], default=None)
    if not best:
        raise plm.BadInput("the picture needs a method and its personalized twin")
    charts, parts = [intervals_chart(cells), pair_charts(*best)[0]], ""
    for i, (title, _, svg) in enumerate(charts):
        rows = textwrap.wrap(title, 48, break_long_words=False, break_on_hyphens=False)
        parts += f'<g transform="translate({24 + 388 * i} 92)">{svg}' + "".join(
            f'<text class="head" y="{17 * k - 60}">{row}</text>' for k, row in enumerate(rows))
        parts += "</g>"
    height = max(height for _, height, _ in charts) + 108  # on a sheet: no page behind it matters
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 776 {height}" width="776" '
            f'role="img"><title>F1 of runs and users</title><style>{STYLE}</style>'
            f'<rect class="sheet" rx="8" width="100%" height="100%"/>{parts}</svg>\n')


def main(argv=None):
    """Writes the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out", metavar="DIR", help="folder of all runs (out)")
    parser.add_argument("--to", metavar="FILE", help="the page (DIR/report.html)")
    parser.add_argument("--picture", metavar="FILE", help="also an SVG for the README")
    args, found = parser.parse_args(argv), defaultdict(lambda: defaultdict(dict))
    order = {method: i for i, method in enumerate(plm.METHODS)}
    try:
        runs = [run for run in finished_runs(args.out) if run[1]["method"] in order]
        for folder, m in sorted(runs, key=lambda run: order[run[1]["method"]]):
            cells = found[table_of(m)]
            cells[plm.model_name(m["model"]), m["method"]][m["split"], m["seed"]] = folder, m
        found = {name: dict(sorted(found[name].items(), key=lambda cell: cell[0][0]))
                 for name in sorted(found)}
        if not found:
            raise plm.BadInput(f"{args.out}: no finished run in it; make one: python plm.py cls_p")
        html = (f"<p>{date.today():%d %B %Y}. {len(runs)} finished runs were read from "
                f"{safe(args.out, 99)}. In the charts a plain method, which is not told who reads, "
                "is hollow (○) and dashed; its twin (_p), told the user ID, filled (●) and solid."
                "</p>" + "".join(dataset(name, cells) for name, cells in found.items()))
        files = {args.to or os.path.join(args.out, "report.html"): PAGE % (STYLE, html)}
        files |= {args.picture: picture(found)} if args.picture else {}
        for path, content in files.items():
            plm.write_file(path, content.encode())
            print(path)
    except (plm.BadInput, OSError, KeyError, TypeError, ValueError) as e:
        print(f"report.py: {type(e).__name__}: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
