"""What the finished runs say, as one HTML page to read, to print or to send.

    python data/report.py                              reads out/, writes out/report.html
    python data/report.py --picture data/report.svg    ... and the picture of the README

The page has no script and asks no network for anything; what came out of a CSV is escaped. In every
chart a plain run is hollow, its personalized twin filled; colour repeats that.
"""
import argparse
import math
import os
import signal
import sys
import textwrap
from collections import defaultdict
from datetime import date
from html import escape

if __name__ == "__main__":  # Ctrl-C needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import plm  # noqa: E402
from table import (  # noqa: E402
    ORDER, NoRun, collect, read_predictions, table_cell, twins_of)

COLORS = """body{{color:{0};background:{1}}}text{{fill:{0}}}.soft{{fill:{2}}}.rule{{stroke:{3}}}
th,td,h2{{border-color:{3}}}.plain{{stroke:{2};fill:{1}}}.own{{stroke:{4};fill:{4}}}
.sheet{{fill:{1}}}"""
STYLE = """text{font:13px system-ui,sans-serif;font-variant-numeric:tabular-nums}
text.soft{font-size:12px}.head,b{font-weight:600}.own,.plain{stroke-width:1.7}path.own,path.plain
{fill:none}%s
@media screen and (prefers-color-scheme:dark){%s}""" % (
    COLORS.format("#1d1d1f", "#fff", "#5c5c61", "#dcdce0", "#0b5cad"),
    COLORS.format("#e7e7ea", "#16181b", "#b0b0b6", "#3a3d42", "#7fb8ff"))
PAGE = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Runs of plm.py</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
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


def safe(value, most=40):
    """The value as text for HTML and XML, cut to `most` characters."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    if len(text) > most:
        text = text[:most - 1] + "…"
    return escape(text)


# -------------------- charts

class Chart:
    """An SVG that is drawn piece by piece, in units of the data: x and y are (low, high). It is as
    wide as a phone, so that its letters are not scaled down there."""
    WIDTH = 340

    def __init__(self, x, y, height=230, left=46, top=30):
        self.x = x
        self.y = y
        self.height = height
        self.left = left
        self.top = top
        self.title = ""
        self.svg = ""
        self.says = []  # for who cannot see it

    def at(self, a, b):
        """The place of a point, "x y" in pixels."""
        across = (a - self.x[0]) / (self.x[1] - self.x[0])
        up = (b - self.y[0]) / (self.y[1] - self.y[0])
        right = self.WIDTH - 12
        bottom = self.height - 40
        px = self.left + across * (right - self.left)
        py = bottom - up * (bottom - self.top)
        return f"{px:.1f} {py:.1f}"

    def words(self, place, dx, dy, anchor, text, kind="soft"):
        self.svg += (f'<text class="{kind}" transform="translate({place})" dx="{dx}" dy="{dy}" '
                     f'text-anchor="{anchor}">{text}</text>')

    def line(self, points, kind):
        path = "L".join(self.at(a, b) for a, b in points)
        self.svg += f'<path class="{kind}" d="M{path}"/>'

    def dot(self, a, b, kind, says, r=4):
        self.svg += (f'<circle class="{kind}" transform="translate({self.at(a, b)})" r="{r}">'
                     f'<title>{says}</title></circle>')
        self.says.append(says)

    def x_axis(self, name, ticks):
        self.words(self.at(self.x[1], self.y[0]), 0, 36, "end", name)
        for v in ticks:
            self.line([(v, self.y[0]), (v, self.y[1])], "rule")
            self.words(self.at(v, self.y[0]), 0, 17, "middle", f"{v:.3g}")

    def y_axis(self, name, ticks):
        self.words("0 14", 0, 0, "start", name)
        for v in ticks:
            self.line([(self.x[0], v), (self.x[1], v)], "rule")
            self.words(self.at(self.x[0], v), -9, 4, "end", f"{v:.3g}")

    def row(self, i, name):
        self.line([(self.x[0], i), (self.x[1], i)], "rule")
        self.words(self.at(self.x[0], i), -9, 4, "end", name, "")

    def content(self):
        """What stands in the <svg>."""
        says = "; ".join(self.says[:60])
        return f"<title>{self.title}</title><desc>{says}</desc>{self.svg}"


def rows_chart(n, high, name):
    """A Chart of n rows, 0 above, and an axis from 0 to high."""
    chart = Chart((0, high), (n - 0.5, -0.5), height=22 * n + 44, left=148, top=4)
    chart.x_axis(name, np.linspace(0, high, 5))
    return chart


def kind_of(method):
    return "own" if method.endswith("_p") else "plain"


def intervals_chart(cells):
    """The Chart of F1-macro with its interval: a row a method, by model; a dot for each seed."""
    names = []
    placed = []  # (row, name of the run, metrics)
    for (model, method), runs in cells.items():
        head = f'<tspan class="head">{safe(model, 16)}</tspan>'
        if head not in names:
            names.append(head)
        for k, (_, m) in enumerate(runs.values()):
            row = len(names) + 0.6 * ((k + 0.5) / len(runs) - 0.5)
            placed.append((row, f"{method} of {safe(model)}", m))
        mean = np.mean([m["f1_macro"] for _, m in runs.values()])
        names.append(f"{method} {mean:.3f}")
    top = max(m["f1_macro_ci"][1] for _, _, m in placed)
    chart = rows_chart(len(names), math.ceil(5 * top + 0.01) / 5, "F1-macro on the test rows")
    for i, name in enumerate(names):
        chart.row(i, name)
    for row, _, m in placed:
        low, high = m["f1_macro_ci"]
        kind = kind_of(m["method"])
        chart.line([(low, row), (high, row)], kind)
        for end in (low, high):
            chart.line([(end, row - 0.2), (end, row + 0.2)], kind)
    for row, name, m in placed:
        low, high = m["f1_macro_ci"]
        says = f"{name} {m['f1_macro']:.3f} ({low:.3f} to {high:.3f})"
        chart.dot(m["f1_macro"], row, kind_of(m["method"]), says, r=3)
    _, name, best = max(placed, key=lambda x: x[2]["f1_macro"])
    chart.title = (f"F1-macro of every run with its 95 % interval; the highest is {name} "
                   f"{best['f1_macro']:.3f}")
    return chart


def users_chart(model, plain, own):
    """The Chart of F1 of each user: without the ID across, with it upwards."""
    before = plain["f1_per_user"]
    after = own["f1_per_user"]
    more = sum(after[user] > before[user] for user in before)
    less = sum(after[user] < before[user] for user in before)
    chart = Chart((0, 1), (0, 1), height=340)
    chart.x_axis(f"F1 without the ID ({plain['method']})", np.linspace(0, 1, 5))
    chart.y_axis(f"F1 with the ID ({own['method']})", np.linspace(0, 1, 5))
    chart.line([(0, 0), (1, 1)], "rule")
    every = math.ceil(len(before) / 300)  # of thousands of users some are enough, and a small file
    for user in list(before)[::every]:
        kind = "own" if after[user] > before[user] else "plain"
        says = f"{safe(user, 24)}: {before[user]:.3f} to {after[user]:.3f}"
        chart.dot(before[user], after[user], kind, says)
    chart.title = (f"{safe(model)}, seed {own['seed']}: {own['method']} predicts {more} of "
                   f"{len(before)} users ({more / len(before):.0%}) better than {plain['method']} "
                   f"and {less} worse; a dot is a user, above the line who gains")
    if every > 1:
        chart.title += f" (1 of {every} is drawn)"
    return chart


# -------------------- tables

def figure_of(title, head, rows, kind='class="wide" tabindex="0"'):
    """HTML of a table whose cells are HTML already."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = ""
    for name, *rest in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
    return (f"<figure {kind}><figcaption>{title}</figcaption><table><thead><tr>{top}</tr></thead>"
            f"<tbody>{body}</tbody></table></figure>")


def main_table(cells):
    """HTML of F1-macro of methods by models, in the words of data/table.py."""
    models = list(dict.fromkeys(model for model, _ in cells))
    rows = []
    for method in ORDER:
        row = []
        for model in models:
            runs = cells.get((model, method))
            text = table_cell(runs, twins_of(cells, model, method)) if runs else ""
            f1, _, rest = text.partition(" ")
            row.append(f"<b>{f1}</b><small>{rest.replace('+-', '±')}</small>")
        if any((model, method) in cells for model in models):
            rows.append([method, *row])
    return figure_of("F1-macro with its 95 % interval (of several seeds: mean and standard "
                     "deviation) and the gain over the plain twin, * where the paired interval "
                     "excludes 0.", ["method", *map(safe, models)], rows)


def labels_table(cells):
    """HTML of F1 of each label, of the first run of each method."""
    names = []
    columns = []
    for (model, method), runs in cells.items():
        _, m = list(runs.values())[0]
        names.append(f"{method}<small>{safe(model)}</small>")
        columns.append([f"{f1:.3f}" for f1 in m["per_label"]])
    rows = [[safe(label), *scores] for label, *scores in zip(m["labels"], *columns)]
    return figure_of("F1 of each label, by the first seed.", ["label", *names], rows)


CONTROLS = {  # key of the metrics -> head of its column
    "f1_macro": "F1-macro", "f1_macro_tuned": "rule tuned", "f1_macro_nobody": "read for nobody",
    "f1_macro_user_bias": "... and a bias for each user",
    "f1_macro_plus_bias": "read for the user, and a bias", "f1_macro_shuffled": "IDs shuffled",
    "f1_disagreed": "texts read differently", "model": "listens: model",
    "people": "listens: people",
}


def controls_table(cells):
    """HTML of what the runs are to be compared with."""
    rows = []
    for (model, method), runs in cells.items():
        for (split, seed), (_, m) in runs.items():
            known = m | m["listens"]
            numbers = [f"{known[key]:.3f}" if key in known else "–" for key in CONTROLS]
            name = f"{method}<small>{safe(model)} {safe(split or '')} {seed}</small>"
            rows.append([name, *numbers])
    return "<h3>Controls</h3>" + figure_of(
        "A bias for each user, on top of the reading for nobody, is the table that a personalized "
        "run has to beat; with a bias on top of its own reading, too, either side has one. What "
        "stays of its gain with shuffled user IDs is not the reader's. Listens is the share of the "
        "variance that lies between readers of one text.",
        ["run, seed", *CONTROLS.values()], rows)


def texts_of(data):
    """dict text_id -> text of a dataset that lies in data/; empty for others."""
    path = f"{HERE}/{data}/annotations.csv"
    if not os.path.exists(path):
        return {}
    return {plm.text_id(row["text"]): row["text"] for row in plm.read_csv(path, "text")}


def readers(cells):
    """HTML of the three test texts that people read most differently, and what the best run, a
    personalized one if there is any, predicts for each reader."""
    runs = [run for runs in cells.values() for run in runs.values()]
    folder, m = max(runs, key=lambda run: (run[1]["method"].endswith("_p"), run[1]["f1_macro"]))
    gold, predicted, rows = read_predictions(folder, m["labels"])
    rows_of = defaultdict(list)
    for i, (name, _) in enumerate(rows):
        rows_of[name].append(i)
    apart = {name: gold[own].var(0).sum() for name, own in rows_of.items()}
    names = sorted(apart, key=lambda name: (-apart[name], -len(rows_of[name]), name))
    texts = texts_of(m["data"])
    html = ""
    for name in names[:3]:
        lines = []
        for i in rows_of[name][:12]:
            line = [safe(rows[i][1])]
            for ticks in (gold[i], predicted[i]):
                chosen = [label for label, y in zip(m["labels"], ticks) if y]
                line.append(safe(", ".join(chosen) or "none", 200))
            lines.append(line)
        title = f"{len(rows_of[name])} readers of text {name}"
        if name in texts:
            title = f"<blockquote>{safe(texts[name], 400)}</blockquote>{title}"
        html += figure_of(title, ["reader", "chose", "predicted"], lines, "")
    return (f"<h3>The texts that people read most differently, and what {m['method']} of "
            f"{safe(plm.model_name(m['model']))} predicts for each reader</h3>{html}")


# -------------------- the page and the picture

def twin_runs(cells):
    """list of (model, plain metrics, personalized metrics), of the first seed that both have."""
    found = []
    for (model, method), runs in cells.items():
        twins = twins_of(cells, model, method)
        both = [key for key in runs if key in twins]
        if both:
            _, plain = twins[both[0]]
            _, own = runs[both[0]]
            if plain["f1_per_user"].keys() == own["f1_per_user"].keys():
                found.append((model, plain, own))
    return found


def dataset(title, cells):
    """HTML of all runs on a dataset."""
    charts = [intervals_chart(cells)]
    for model, plain, own in twin_runs(cells):
        charts.append(users_chart(model, plain, own))
    figures = ""
    for chart in charts:
        figures += (f'<figure><figcaption>{chart.title}.</figcaption><svg role="img" viewBox="0 0 '
                    f'{Chart.WIDTH} {chart.height}">{chart.content()}</svg></figure>')
    _, m = list(list(cells.values())[0].values())[0]
    sizes = ", ".join(f"{n:,} rows for {part}" for part, n in m["rows"].items() if part)
    return (f"<section><h2>{safe(title, 99)}</h2><p>{sizes}; {len(m['f1_per_user'])} users in the "
            f"test; {len(m['labels'])} labels: {', '.join(map(safe, m['labels']))}.</p>"
            f"{main_table(cells)}{figures}{labels_table(cells)}{controls_table(cells)}"
            f"{readers(cells)}</section>")


def picture(tables):
    """The SVG of the README: intervals and the best pair's users, of the dataset with most runs."""
    cells = max(tables.values(), key=len)
    pairs = twin_runs(cells)
    if not pairs:
        raise NoRun("the picture needs a method and its personalized twin")
    best = max(pairs, key=lambda pair: pair[2]["f1_macro"])
    charts = [intervals_chart(cells), users_chart(*best)]
    parts = ""
    for i, chart in enumerate(charts):
        head = ""
        for k, line in enumerate(textwrap.wrap(chart.title, 48, break_on_hyphens=False)):
            head += f'<text class="head" y="{17 * k - 60}">{line}</text>'
        parts += f'<g transform="translate({24 + 388 * i} 92)">{chart.content()}{head}</g>'
    height = max(chart.height for chart in charts) + 108
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 776 {height}" width="776" '
            f'role="img"><title>F1 of runs and users</title><style>{STYLE}</style>'
            f'<rect class="sheet" rx="8" width="100%" height="100%"/>{parts}</svg>\n')


def page(tables, out):
    """The HTML of all runs."""
    runs = 0
    html = ""
    for title, cells in tables.items():
        runs += sum(len(own) for own in cells.values())
        html += dataset(title, cells)
    intro = (f"<p>{date.today():%d %B %Y}. {runs} finished runs were read from {safe(out, 99)}. "
             "In the charts a plain method, which is not told who reads, is hollow (○); its twin "
             "(_p), told the user ID, is filled (●).</p>")
    return PAGE % (STYLE, intro + html)


def main(argv=None):
    """Writes the files; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", default="out", metavar="DIR", help="folder of all runs (out)")
    parser.add_argument("--to", metavar="FILE", help="the page (DIR/report.html)")
    parser.add_argument("--picture", metavar="FILE", help="also an SVG for the README")
    args = parser.parse_args(argv)
    try:
        tables = collect([args.out])
        files = {args.to or os.path.join(args.out, "report.html"): page(tables, args.out)}
        if args.picture:
            files[args.picture] = picture(tables)
        for path, content in files.items():
            plm.write_file(path, content.encode())
            print(path)
    except (NoRun, plm.BadInput, OSError) as e:
        print(f"report.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(main())
