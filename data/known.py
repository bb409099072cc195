"""The datasets that are known by name: where they are, and what the paper's authors did to them.

GoEmotions and Unhealthy Conversations are prepared as the authors of arXiv 2402.09269 did it, and
their counts are printed beside those found here. Other files NAME_*.csv of the same columns are
prepared by the same rules, without counts to compare with. The datasets of the LeWiDi tasks are
only downloaded here; formats.py reads them.
"""
import csv
import glob
import math
import os
import random
import re
import sys
import threading
import time
from collections import Counter, defaultdict, namedtuple

import requests

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
from formats import read_file  # noqa: E402
from plm import BadInput, check, progress, split_of, text_id  # noqa: E402

# For AS_THE_PAPER. values: what a label may be; 0 and nothing chose nothing. splits: the files that say which text is
# in which split, the strongest last, and form: how they are written. draws: how many random splits
# there are instead. expected: what the authors' notebooks printed after each rule, as (train, val,
# test, users); the count of the stage `whole` tells a damaged original. Unhealthy may be off by
# `tolerance`: the authors' sample had no seed and took identical rows along, so that two runs of
# their own notebook ended with 168,503 and 168,506 training annotations.
GITHUB = "https://raw.githubusercontent.com"
GOEMOTIONS_RAW = "https://storage.googleapis.com/gresearch/goemotions/data/full_dataset"
GOEMOTIONS_SPLITS = f"{GITHUB}/google-research/google-research/master/goemotions/data"
UNHEALTHY = f"{GITHUB}/conversationai/unhealthy-conversations/main"
POPQUORN = f"{GITHUB}/Jiaxin-Pei/Potato-Prolific-Dataset/main/dataset/offensiveness"
LEWIDI = f"{GITHUB}/Le-Wi-Di/le-wi-di.github.io/main"

AS_THE_PAPER = {
    "goemotions": dict(
        text="text", user="rater_id", time="created_utc", values=("0", "1"),
        labels="admiration amusement anger annoyance approval caring confusion curiosity desire "
               "disappointment disapproval disgust embarrassment excitement fear gratitude grief "
               "joy love nervousness optimism pride realization relief remorse sadness surprise "
               "neutral".split(),
        splits=dict(val="dev.tsv", test="test.tsv", train="train.tsv"),
        form=dict(fieldnames=("text", "labels", "id"), delimiter="\t", quoting=csv.QUOTE_NONE),
        urls={f"goemotions_{i}.csv": f"{GOEMOTIONS_RAW}/goemotions_{i}.csv" for i in (1, 2, 3)} | {
            f"{part}.tsv": f"{GOEMOTIONS_SPLITS}/{part}.tsv" for part in ("train", "dev", "test")},
        license="CC BY 4.0 (Demszky et al. 2020)",
        whole="annotations", tolerance=0, expected={
            "annotations": (211_225,), "with a label": (207_814,),
            "in a split": (153_797, 19_049, 19_123, 82),
            "of users in all three": (153_796, 19_049, 19_123, 81),
            "rare users dropped": (153_390, 19_017, 19_063),
            "busy users cut": (146_659, 18_199, 18_244),
            "of users in all three again": (146_574, 18_160, 18_233, 72)}),
    "unhealthy": dict(
        text="comment", user="_worker_id", values=("0", "1"), form={},
        labels="antagonize condescending dismissive generalisation generalisation_unfair healthy "
               "hostile sarcastic".split(),
        splits=dict(val="corpus/val.csv", test="corpus/test.csv", train="corpus/train.csv"),
        urls={file: f"{UNHEALTHY}/{file}" for file in (
            "unhealthy_full.csv", "corpus/train.csv", "corpus/val.csv", "corpus/test.csv")},
        license="CC BY-NC-SA 4.0, not for commercial use (Price et al. 2020)",
        whole="annotations", tolerance=0.001, expected={
            "annotations": (227_975,), "with a label": (215_265,),
            "in a split": (172_550, 20_893, 21_822, 588),
            "of users in all three": (171_873, 20_847, 21_765, 510),
            "rare users dropped": (171_058, 20_770, 21_679),
            "of users in all three again": (168_503, 20_352, 21_289, 427)}),
    "popquorn": dict(  # how offensive, from 1 to 5; splits of the sizes in arXiv 2502.20897
        text="text", user="user_id", values=("", *"12345"), labels=["offensiveness"], draws=5,
        urls={"raw_data.csv": f"{POPQUORN}/raw_data.csv"},
        license="none is named, the repository has no licence file (Pei and Jurgens 2023)",
        whole="with a label", tolerance=0, expected={
            "with a label": (13_036,), "texts": (1_500,), "users": (262,)}),
}

NO_LICENCE = "none is named, the repository has no licence file"


def lewidi(path, counts, license):
    """The row of a dataset of LeWiDi; counts: annotations in train, dev and test, if known."""
    urls = {f"{part}.json": f"{LEWIDI}/{path}_{part}.json" for part in ("train", "dev", "test")}
    return dict(urls=urls, license=license, expected=dict(zip(("train", "val", "test"), counts)))


LEWIDI_SETS = {
    "par": lewidi("LeWiDi_3-2025/Paraphrase/Paraphrase", (1_600, 200, 200), NO_LICENCE),
    "varierrnli": lewidi("LeWiDi_3-2025/VariErrNLI/VariErrNLI", (1_443, 181, 192),
                         f"{NO_LICENCE} (Weber-Genzel et al. 2024)"),
    "csc": lewidi("LeWiDi_3-2025/CSC/CSC", (None, 3_186, 3_224),
                  f"{NO_LICENCE} (Jang and Frassinelli 2024)"),
    "mp": lewidi("LeWiDi_3-2025/MP/MP", (None, 15_178, 18_693),
                 f"{NO_LICENCE} (Casola et al. 2024)"),
    "convabuse": lewidi("LeWiDi_2-2023/ConvAbuse_dataset/ConvAbuse", (7_144, 2_414, 2_610),
                        "CC BY 4.0 (Cercas Curry et al. 2021)"),
    "md_agreement": lewidi("LeWiDi_2-2023/MD-Agreement_dataset/MD-Agreement",
                           (32_960, 5_520, 15_285), f"{NO_LICENCE} (Leonardelli et al. 2021)"),
    "hs_brexit": lewidi("LeWiDi_2-2023/HS-Brexit_dataset/HS-Brexit", (4_704, 1_008, 1_008),
                        f"{NO_LICENCE} (Akhtar et al. 2021)"),
    "armis": lewidi("LeWiDi_2-2023/ArMIS_dataset/ArMIS", (1_971, 423, 435),
                    f"{NO_LICENCE} (Almanea and Poesio 2022)"),
}

DATASETS = AS_THE_PAPER | LEWIDI_SETS

# split, time: "" where there is none. draws, labels: dicts of further columns.
Row = namedtuple("Row", "text user split time draws labels")


# -------------------- the splits. A rule takes rows and returns those that are left, in order.

def users_in_all(rows):
    """The rows of the users that are in all three parts."""
    parts = [{a.user for a in rows if a.split == part} for part in ("train", "val", "test")]
    everywhere = set.intersection(*parts)
    return [a for a in rows if a.user in everywhere]


def by_user(rows):
    """(dict part, user -> indices of the rows, dict part -> its busiest user's number of rows)"""
    own = defaultdict(list)
    most = Counter()
    for i, a in enumerate(rows):
        own[a.split, a.user].append(i)
        most[a.split] = max(most[a.split], len(own[a.split, a.user]))
    return own, most


def drop_rare_users(rows, share=0.01):
    """The rows of the users with at least `share` of the number that a part's busiest one has."""
    own, most = by_user(rows)
    return [a for a in rows if len(own[a.split, a.user]) >= share * most[a.split]]


def cut_busy_users(rows, share=0.60):
    """The rows; of users above `share` of a part's busiest one only a sample of that size."""
    own, most = by_user(rows)
    kept = set()
    for (part, user), ids in own.items():  # seeded by the user: nobody else changes the sample
        n = math.ceil(share * most[part])
        kept.update(ids if len(ids) <= n else random.Random(user).sample(ids, n))
    return [a for i, a in enumerate(rows) if i in kept]


RULES = {"of users in all three": users_in_all, "rare users dropped": drop_rare_users,
         "busy users cut": cut_busy_users, "of users in all three again": users_in_all}


def official_splits(folder, row):
    """dict text -> its split by the dataset's own files. A text in two of them stays in training,
    or else in test, as the authors had it. Texts are equal to the letter or different: anything
    softer does not arrive at the authors' counts."""
    where = {}
    for part, file in row["splits"].items():
        path = os.path.join(folder, file)
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as f:
            lines = list(csv.DictReader(f, **row["form"]))
        fits = lines and row["text"] in lines[0] and None not in lines[0].values()
        check(fits, f"{path}: no column {row['text']!r} in it, or not the others beside it; "
              "delete it, then run this again")
        where |= {line[row["text"]]: part for line in lines}
    return where


def counts(rows):
    """dict(train, val, test, users) of numbers."""
    n = Counter(a.split for a in rows)
    return {p: n[p] for p in ("train", "val", "test")} | {"users": len({a.user for a in rows})}


def as_the_authors(rows, row, folder):
    """(rows that are left, what each rule left over)"""
    files = row["splits"].values()
    official = any(os.path.exists(os.path.join(folder, file)) for file in files)
    where = official_splits(folder, row) if official else {a.text: split_of(a.text) for a in rows}
    rows = [a._replace(split=where[a.text]) for a in rows if a.text in where]
    by = ", ".join(files) if official else "a hash of the text"
    notes = {"split by": by, "in a split": counts(rows)}
    for stage, rule in RULES.items():
        rows = rule(rows)
        notes[stage] = counts(rows)
    often = [n for n in Counter(a.text for a in rows).values() if n > 20]  # control comments stay
    return rows, notes | {"texts judged over 20 times": len(often),
                          "annotations of these": sum(often)}


def at_random(rows, row, _):
    """(the rows with their draws, counts). A draw is a split of the texts, 70 : 10 : 20, with every
    user in training. Neither the order of the rows nor another draw changes it."""
    ids = [text_id(a.text) for a in rows]
    texts = sorted(set(ids))
    users = {a.user for a in rows}
    notes = {"texts": len(texts), "users": len(users)}
    n = len(texts) // 10
    for name in (f"draw{i + 1}" for i in range(row["draws"])):
        parts = ["train"] * 7 * n + ["val"] * n + ["test"] * (len(texts) - 8 * n)
        where = dict(zip(random.Random(name).sample(texts, len(texts)), parts))
        rows = [a._replace(draws=a.draws | {name: where[i]}) for a, i in zip(rows, ids)]
        notes[name] = counts([a._replace(split=a.draws[name]) for a in rows])
        new = users - {a.user for a in rows if a.draws[name] == "train"}
        check(not new, f"{name} has users who are not in training; more texts are needed")
    return rows, notes


# -------------------- from files to a file

def user_id(cell):
    """The user that a cell names: 11.0 and 11 are one person, and so are "ann" and "ann "."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", cell.strip())


def read_rows(path, row):
    """list of Row of a file of the original form."""
    table = read_file(path)
    there = table.columns
    text = row["text"]
    user = row["user"]
    for column in (text, user, *row["labels"]):
        check(column in there, f"{path}: no column {column!r}; there are: {', '.join(there)}")
    rows = []
    for place, cells in zip(table.places, table.rows):
        labels = {label: cells[label].strip().removesuffix(".0") for label in row["labels"]}
        wrong = [column for column in (text, user) if not cells[column].strip()]
        wrong += [label for label, value in labels.items() if value not in row["values"]]
        if wrong:
            value = cells[wrong[0]][:40]
            raise BadInput(f"{path}: {place}: {wrong[0]!r} cannot be {value!r}")
        rows.append(Row(cells[text], cells[user], "", cells.get(row.get("time"), ""), {}, labels))
    return rows


def write_rows(path, rows):
    """None; the file has its name when it is complete. Columns that are empty stay away."""
    lines = [("text", "user", "split", "time", *rows[0].draws, *rows[0].labels)]
    for a in rows:
        own = (a.text, user_id(a.user), a.split, a.time)
        lines.append((*own, *a.draws.values(), *a.labels.values()))
    write_csv(path, zip(*(column for column in zip(*lines) if any(column[1:]))))


def write_csv(path, lines):
    """None; writes lists of cells, and the file has its name when it is complete."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path + ".part", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(lines)
    os.replace(path + ".part", path)


def print_counts(notes, row, original):
    """None; the counts stage by stage, and below them the authors' where these are known."""
    differ = False
    print(f"{'':30}", *(f"{part:>8}" for part in ("train", "val", "test", "users")))
    for stage, found in notes.items():
        found = tuple(found.values()) if isinstance(found, dict) else (found,)
        print(f"{stage:30}", *(f"{n:>8,}" if isinstance(n, int) else n for n in found))
        known = row["expected"].get(stage, ()) if original else ()
        if known:
            print(f"{'    the authors':30}", *(f"{n:>8,}" for n in known))
        differ |= any(abs(n - m) > row["tolerance"] * m for n, m in zip(found, known))
    if differ:
        print("WARNING: these counts are not the authors'; scores do not compare with theirs")
    elif not original:
        print("These are not the original files, so there are no counts to compare with.")


def originals(name, folder):
    """(paths of the files with annotations, are they the dataset's own?); downloads these."""
    row = DATASETS[name]
    paths = [os.path.join(folder, file) for file in row["urls"]
             if file not in row.get("splits", {}).values()]
    others = sorted(glob.glob(f"{glob.escape(folder)}/{name}_*.csv"))
    if others and not any(map(os.path.exists, paths)):
        return others, False
    print(f"{name}, licence: {row['license']}", flush=True)
    download_all(name, folder)
    return paths, True


def prepare(name, folder):
    """None; downloads what is missing, applies the rules, prints the counts, writes the CSV."""
    row = AS_THE_PAPER[name]
    out = os.path.join(folder, "annotations.csv")
    foreign = os.path.exists(out) and not start_of(out).startswith("text,user,")
    check(not foreign, f"{out}: not of this script; move it away, or choose another --dir DIR")
    paths, original = originals(name, folder)
    rows = [a for path in paths for a in read_rows(path, row)]
    notes = {"annotations": len(rows)}
    rows = [a for a in rows if set(a.labels.values()) - {"0", ""}]
    notes["with a label"] = len(rows)
    found = notes[row["whole"]]
    whole = row["expected"][row["whole"]][0]
    check(not original or found == whole, f"{', '.join(paths)}: {found:,} annotations, the original "
          f"has {whole:,}; delete what is damaged, then run this again")
    divide = as_the_authors if "splits" in row else at_random
    rows, more = divide(rows, row, folder)
    print_counts(notes | more, row, original)
    divided = "splits" not in row or all(counts(rows).values())
    check(rows and divided, f"{', '.join(paths)}: nothing is left for a part; more texts are needed")
    write_rows(out, rows)
    print(f"{out}: {len(rows):,} annotations")


# -------------------- the downloads. A file gets its name when it is complete and can be what it
# should be. Until then it is FILE.part, and what breaks off begins again.

PAUSES = (0, 1, 3)  # seconds before a file is asked for, once, again, ...
WRONG = {"": "nothing in it", "<": "a web page and not the file"}  # how a file must not begin


def start_of(path):
    """The beginning of a file, without the white space before it."""
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        return f.read(1000).lstrip()


def no_answer(url, seconds=6):
    """Why the server of an address does not answer at all; None if it does, whatever it says."""
    why = [f"no answer in {seconds} s"]

    def ask():
        try:
            requests.head(url, timeout=seconds)
            why[0] = None
        except requests.RequestException as e:
            why[0] = type(e).__name__
    thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no timeout
    thread.start()
    thread.join(seconds)
    return why[0]


def download(url, path):
    """None when the file is there, else why it is not."""
    part = path + ".part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for pause in PAUSES:
        time.sleep(pause)
        try:
            with requests.get(url, headers={"Accept-Encoding": "identity"}, stream=True,
                              timeout=(5, 30)) as r, open(part, "wb") as f:
                r.raise_for_status()
                size = int(r.headers.get("Content-Length", 0))
                f.writelines(progress(r.iter_content(1 << 16), os.path.basename(path), "x 64 KB",
                                      math.ceil(size / (1 << 16)) or None))
            if os.path.getsize(part) != size and "Transfer-Encoding" not in r.headers:
                raise requests.ConnectionError  # only chunks say by themselves where they end
            return WRONG.get(start_of(part)[:1]) or os.replace(part, path)
        except requests.HTTPError as e:
            why = f"{e.response.status_code} {e.response.reason}"
        except requests.RequestException:
            why = "broke off"
    return f"{why}, {len(PAUSES)} times"


def download_all(name, folder):
    """None; fetches the originals that the folder does not have, or says how to do it by hand."""
    urls = {os.path.join(folder, file): url for file, url in DATASETS[name]["urls"].items()}
    missing = [path for path in urls if not os.path.exists(path)]
    while missing:
        url = urls[missing[0]]
        why = no_answer(url) or download(url, missing[0])
        if why:
            raise BadInput("\n".join([
                f"cannot download {name} ({url}: {why}). By hand: save these files where the arrow "
                "points, then run this again", *(f"  {urls[path]} -> {path}" for path in missing)]))
        del missing[0]
    for path in urls:  # also those that somebody put there by hand
        wrong = WRONG.get(start_of(path)[:1])
        check(not wrong, f"{path}: {wrong}; delete it, then run this again")


