"""How good is a run as the LeWiDi shared tasks measure it, and beside what?

    python data/lewidi.py RUN                   (make lewidi RUN=out/par/smollm2/cls_p/seed42)
    python data/lewidi.py RUN --csv my.csv --test Paraphrase_test.json

The perspectivist score is the error rate of MP and VariErrNLI, and the mean absolute distance over
the number of points of the scale (11 for Par, 6 for CSC): the mean over an item's annotators, then
over items. The soft score compares an item's shares of labels: Manhattan distance, of ratings
Wasserstein distance. Lower is better. Beside the run stand constants, which need no model.

--csv is the file that the run was trained on (data/NAME/annotations.csv), --test the task's own
test file (data/NAME/test.json). With the latter RUN/lewidi gets the submission, res.zip.
"""
import argparse
import csv
import glob
import json
import os
import sys
import zipfile
from collections import defaultdict, namedtuple

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import plm  # noqa: E402
from evidence import median_labels  # noqa: E402
from formats import lewidi_answers, lewidi_text  # noqa: E402

# A task's dataset: its scale in the soft submission, and what a distance is divided by.
SCALES = {"Paraphrase": (-5, 5, 11), "CSC": (0, 6, 6)}
TASKS = {"par": "Paraphrase", "varierrnli": "VariErrNLI", "csc": "CSC", "mp": "MP"}

# kind: "rating", "choice" or "ticks" (any number of labels). points (L): where the labels stand on
# the scale. most: what a distance is divided by.
Task = namedtuple("Task", "name kind labels points most")
# An item of the task: gold (n, L) of 0 and 1 of its n users; soft (L) its shares of labels.
Item = namedtuple("Item", "id text_id users gold soft")


def task_of(config, test):
    """The Task of a run's dataset."""
    name = TASKS.get(config["data"], config["data"])
    if test and os.path.basename(test) != "test.json":
        name = os.path.basename(test).removesuffix(".json").removesuffix("_test")
    kind = "choice" if config["single"] else "ticks"
    points = np.arange(len(config["labels"]))
    most = 1
    if config["ordered"]:
        kind = "rating"
        points = np.array(config["labels"], float)
        most = SCALES.get(name, (0, 0, points[-1] - points[0] + 1))[2]
    return Task(name, kind, config["labels"], points, most)


# -------------------- the scores of the task

def perspectivist(task, gold, predicted):
    """The error of one item, gold and predicted (n, L) of 0 and 1."""
    if task.kind == "ticks":
        return float(np.abs(gold - predicted).mean())
    if task.kind == "choice":
        return float((gold != predicted).any(1).mean())
    distance = np.abs(gold @ task.points - predicted @ task.points)
    return float(distance.mean() / task.most)


def soft_distance(task, target, predicted):
    """The distance of one item's shares of labels, target and predicted (L)."""
    off = np.abs(target - predicted)
    if task.kind == "ticks":  # each label's shares of no and yes
        return float(2 * off.mean())
    if task.kind == "choice":
        return float(off.sum())
    moved = np.abs(np.cumsum(target - predicted))[:-1]  # from each point on to the next
    return float(moved @ np.diff(task.points))


def scores(task, items, predicted, soft=None):
    """(perspectivist score, soft score) of predictions: a list of (n, L), one an item, and of
    shares of labels (L), which are those of the predictions if None."""
    soft = soft or [labels.mean(0) for labels in predicted]
    errors = []
    distances = []
    for item, labels, shares in zip(items, predicted, soft):
        errors.append(perspectivist(task, item.gold, labels))
        distances.append(soft_distance(task, item.soft, shares))
    return float(np.mean(errors)), float(np.mean(distances))


# -------------------- what was given and what was predicted

def labels_in(cell, config):
    """(L) of 0 and 1: the labels that a cell of predictions.csv names."""
    named = [cell] if config["single"] else cell.split(", ")
    return np.array([int(label in named) for label in config["labels"]])


def read_predictions(folder, config):
    """dict (text id, user) -> dict(gold, predicted: (L) of 0 and 1; scores (L) or None)."""
    found = {}
    with open(f"{folder}/predictions.csv", newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            read = None
            if f"score:{config['labels'][0]}" in row:
                read = np.array([float(row[f"score:{label}"]) for label in config["labels"]])
            found[row["text_id"], row["user"]] = dict(
                gold=labels_in(row["gold"], config), scores=read,
                predicted=labels_in(row["predicted"], config))
    return found


def items_of_rows(found):
    """list of Item of the run's own test rows, where there is no file of the task."""
    users = defaultdict(list)
    for text, user in found:
        users[text].append(user)
    items = []
    for text, own in users.items():
        gold = np.array([found[text, user]["gold"] for user in own])
        items.append(Item(text, text, own, gold, gold.mean(0)))
    return items


def official_soft(given, config):
    """(L) the shares of labels in a file of the task. Keys may be "0.0" or "0"; a choice of 0 and 1
    and each of several labels have the shares of no and yes."""
    shares = []
    for i, label in enumerate(config["labels"]):
        if config["ordered"]:
            shares.append(sum(p for key, p in given.items() if float(key) == float(label)))
        elif config["single"]:
            shares.append(sum(p for key, p in given.items() if float(key) == i))
        else:
            shares.append(sum(p for key, p in given[label].items() if float(key) == 1))
    return np.array(shares)


def items_of_task(path, task, found, config):
    """list of Item of the test file of a task; BadInput if the run has not read all of it."""
    with open(path, encoding="utf-8") as f:
        given = json.load(f)
    items = []
    missing = 0
    for name, record in given.items():
        text = plm.text_id(lewidi_text(record))
        users = [user for user, _ in lewidi_answers(f"{path}: {name}", record)]
        missing += sum((text, user) not in found for user in users)
        if not missing:
            gold = np.array([found[text, user]["gold"] for user in users])
            soft = gold.mean(0)
            if task.name in TASKS.values():  # the tasks of 2023 have shares of other labels
                soft = official_soft(record["soft_label"], config)
            items.append(Item(name, text, users, gold, soft))
    plm.check(not missing, f"{path}: the run has no prediction for {missing} of its annotations "
                           "(it was trained on another file, or with --max-eval)")
    return items


# -------------------- constants

def one_label(config, index):
    """(L) with one label chosen."""
    return np.eye(len(config["labels"]), dtype=int)[index]


def own_mode(task, rows):
    """(L) what is chosen most often in rows (n, L)."""
    if task.kind == "ticks":
        return (rows.mean(0) > 0.5).astype(int)
    return np.eye(len(task.labels), dtype=int)[rows.sum(0).argmax()]


def own_median(task, rows):
    """(L) the median rating of rows (n, L); of an even number the lower one."""
    below = np.cumsum(rows.mean(0))
    return np.eye(len(task.labels), dtype=int)[int((below < 0.5 - 1e-9).sum())]


def nearest_mean(task, rows):
    """(L) the rating nearest to the mean of rows (n, L); of no ratings, what most chose."""
    if task.kind != "rating":
        return own_mode(task, rows)
    mean = round(float((rows @ task.points).mean()))
    return np.eye(len(task.labels), dtype=int)[int(np.abs(task.points - mean).argmin())]


def of_users(task, items, train, rule):
    """list of (n, L): for each user what the rule makes of the user's training rows, for a new user
    of all."""
    own = defaultdict(list)
    for a in train:
        own[a.user].append(a.labels)
    everybody = rule(task, plm.gold_labels(train))
    constant = {user: rule(task, np.array(rows)) for user, rows in own.items()}
    found = []
    for item in items:
        rows = [constant.get(user, everybody) for user in item.users]
        found.append(np.array(rows))
    return found


def of_others(task, items, instead):
    """list of (n, L): the mean of what the item's other users chose; `instead` if it has none."""
    found = []
    for item, fallback in zip(items, instead):
        if len(item.users) == 1:
            found.append(fallback)
            continue
        rows = []
        for i in range(len(item.users)):
            rows.append(nearest_mean(task, np.delete(item.gold, i, axis=0)))
        found.append(np.array(rows))
    return found


def constants(task, items, train):
    """dict name -> list of (n, L) that no model made."""
    mode = of_users(task, items, train, own_mode)
    found = {"each reader's mode": mode}
    if task.kind == "rating":
        found["each reader's median"] = of_users(task, items, train, own_median)
    overall = own_mode(task, plm.gold_labels(train))
    found["everybody's mode"] = [np.tile(overall, (len(item.users), 1)) for item in items]
    if task.kind != "rating":  # no label; of a choice of 0 and 1, "not X"
        nothing = np.zeros(len(task.labels), int)
        if task.kind == "choice":
            nothing[0] = 1
        found["predict nothing"] = [np.tile(nothing, (len(item.users), 1)) for item in items]
    found["the others' mean (not fair)"] = of_others(task, items, mode)
    return found


# -------------------- what the run says

def of_run(config, items, found, fallback):
    """(dict name -> list of (n, L), list of the items' mean probabilities (L) or None, number
    of answers without a label)."""
    ways = defaultdict(list)
    shares = []
    silent = 0
    for item in items:
        rows = [found[item.text_id, user] for user in item.users]
        predicted = np.array([row["predicted"] for row in rows])
        said = predicted.any(1) if config["single"] else np.ones(len(rows), bool)
        silent += int((~said).sum())
        ways["as predicted"].append(np.where(said[:, None], predicted, fallback))
        if rows[0]["scores"] is None:
            continue
        read = np.array([row["scores"] for row in rows])
        shares.append(plm.probabilities(read, config["single"]).mean(0))
        if config["single"]:
            ways["highest score"].append(plm.chosen_labels(read, True))
        if config["ordered"]:
            ways["median of the scores"].append(median_labels(read))
    return dict(ways), shares or None, silent


# -------------------- the submission

def answer_cell(task, labels):
    """What *_pe.tsv says of an item: a list of the readers' labels; of ticks one for each label."""
    if task.kind == "ticks":
        return labels.T.tolist()
    return [int(x) for x in labels @ task.points]


def soft_cell(task, shares):
    """What *_soft.tsv says of one item: the shares of labels on the whole scale."""
    shares = np.round(shares, 5)
    if task.kind == "ticks":
        return [[round(1 - p, 5), p] for p in shares.tolist()]
    if task.name not in SCALES:
        return shares.tolist()
    least, last, _ = SCALES[task.name]
    of_point = dict(zip(task.points.astype(int).tolist(), shares.tolist()))
    return [of_point.get(point, 0.0) for point in range(least, last + 1)]


def write_submission(folder, task, items, labels, shares):
    """Writes NAME_test_pe.tsv and NAME_test_soft.tsv, and both as res.zip."""
    os.makedirs(folder, exist_ok=True)
    pe = ""
    soft = ""
    for item, own, p in zip(items, labels, shares):
        pe += f"{item.id}\t{answer_cell(task, own)}\n"
        soft += f"{item.id}\t{soft_cell(task, p)}\n"
    with zipfile.ZipFile(f"{folder}/res.zip", "w", zipfile.ZIP_DEFLATED) as res:
        for name, text in (("pe", pe), ("soft", soft)):
            file = f"{task.name}_test_{name}.tsv"
            plm.write_file(f"{folder}/{file}", text.encode())
            res.writestr(file, text)
    print(f"files: {folder}/res.zip, {task.name}_test_pe.tsv, {task.name}_test_soft.tsv")


def print_scores(task, items, lines):
    """A table: perspectivist and soft score of each way to predict."""
    n = sum(len(item.users) for item in items)
    print(f"{task.name}, {task.kind}: {len(items):,} items, {n:,} judgements; lower is better")
    print(f"{'':32}{'perspectivist':>14}{'soft label':>12}")
    for name, (error, distance) in lines.items():
        print(f"{name:32}{error:14.4f}{distance:12.4f}")


def evaluate(folder, path, test):
    """Prints the scores of a run and of the constants, and writes them and the submission."""
    config = plm.read_json(f"{folder}/metrics.json")
    plm.check(config, f"{folder}: no finished run (metrics.json)")
    home = f"{HERE}/{config['data']}"
    known = sorted(glob.glob(f"{home}/*test.json"))
    if not test and known:
        test = known[0]
    named = os.path.isfile(f"{home}/annotations.csv")
    plm.check(path or named, f"{folder} was trained on a file that is not in data/: "
                             "--csv FILE names it")
    data = plm.load_data(path or config["data"], config["split"])
    plm.check(data.sha == config["data_sha"], f"{path or config['data']} is not the file that "
                                              f"{folder} was trained on")
    task = task_of(config, test)
    found = read_predictions(folder, config)
    items = items_of_task(test, task, found, config) if test else items_of_rows(found)
    train = data.parts["train"]
    ways, shares, silent = of_run(config, items, found, own_mode(task, plm.gold_labels(train)))
    lines = {}
    for name, labels in ways.items():
        lines[f"{config['method']}, {name}"] = scores(task, items, labels, shares)
    for name, labels in constants(task, items, train).items():
        lines[name] = scores(task, items, labels)
    print_scores(task, items, lines)
    if silent:
        print(f"{silent} answers without a label count as everybody's mode")
    os.makedirs(f"{folder}/lewidi", exist_ok=True)
    plm.write_file(f"{folder}/lewidi/scores.json", lines)
    if test:
        best = list(ways.values())[-1]
        write_submission(f"{folder}/lewidi", task, items, best,
                         shares or [labels.mean(0) for labels in best])


def main(argv=None):
    """Scores one run; returns the exit status."""
    parser = argparse.ArgumentParser("lewidi.py", description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--csv", metavar="FILE", help="what the run was trained on")
    parser.add_argument("--test", metavar="JSON", help="the task's own test file")
    args = parser.parse_args(argv)
    try:
        evaluate(args.run, args.csv, args.test)
    except (plm.BadInput, OSError) as e:
        print(f"lewidi.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
