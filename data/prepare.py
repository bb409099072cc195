"""Write data/NAME/annotations.csv, the form that plm.py reads, from annotations of any form.

    python data/prepare.py NAME [--dir DIR]            a dataset known by name: see known.py
    python data/prepare.py --file a.csv --name my      a file of yours, whatever its form
    python data/prepare.py --file train.json,dev.json,test.json --name my
                                                       ... or the files of its splits

The form: UTF-8, comma, a header; columns `text`, `user`, if there is one `split`, and labels. Which
columns these are, a flag says, or the form of the file, or else their names; what was taken is
printed, and what was left out, and why. What could be read in two ways is refused.
"""
import argparse
import ast
import json
import os
import re
import sys
from collections import Counter, defaultdict

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import known  # noqa: E402
from formats import SPLITS, Table, named_lines, read_file  # noqa: E402
from plm import BadInput, check, split_of, text_id  # noqa: E402

PARTS = ("train", "val", "test")
MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null"}  # in upper or lower case
SHOWN = 60  # letters of a cell that a message quotes


def few(words, n=12):
    """The first words of a list, and how many more there are."""
    words = [str(word)[:SHOWN] for word in words]
    more = f", and {len(words) - n:,} more" if len(words) > n else ""
    return ", ".join(words[:n]) + more


# -------------------- which column is what: a flag, the form of the file, or a name says it

TEXTS = ("text comment commenttext tweet tweettext sentence post message body content utterance "
         "document displayedtext").split()
USERS = ("user userid username annotator annotatorid annotatorname worker workerid rater raterid "
         "reader readerid coder coderid judge judgeid participant participantid prolificid "
         "labeler labelerid annotatedby completedby").split()
LABELS = "label labels annotation rating answer class".split()
TOOLS = re.compile("^(input:|assignment:|output:|input[.]|answer[.])", re.IGNORECASE)
ANSWERS = re.compile("^(output:|answer[.])", re.IGNORECASE)  # of Toloka, of Mechanical Turk


def plain(column):
    """A column's name without what tools put around it: "ASSIGNMENT:worker_id" is workerid."""
    return re.sub("[^a-z0-9]", "", TOOLS.sub("", column).lower())


def by_name(columns, names):
    """list of the columns that have one of the names; if one has the first name, only that."""
    exact = [c for c in columns if c.lower() == names[0]]
    return exact or [c for c in columns if plain(c) in names]


def said(table, flag, value):
    """list of the columns that a flag names."""
    columns = table.columns
    named = [column.strip() for column in value.split(",")]
    if value in columns:  # a column's name may hold a comma
        named = [value]
    for column in named:
        check(column in columns, f"{flag}: no column {column!r}; there are: {few(columns, 40)}")
    return named


def choose_text(table, flag):
    """list of the columns that hold the text."""
    if flag:
        return said(table, "--text-col", flag)
    found = table.text or by_name(table.columns, TEXTS)
    there = few(table.columns, 40)
    check(found, f"no column is named like a text: say --text-col (there are: {there})")
    check(table.text or len(found) == 1, f"{few(found)} may be the text: say --text-col")
    return found


def choose_user(table, flag):
    """The column that says who annotated."""
    if flag:
        column, *more = said(table, "--user-col", flag)
        check(not more, "--user-col: one column")
        return column
    if table.user:
        return table.user
    found = [c for c in table.columns if plain(c) in USERS]
    side = [c for c in table.columns if re.match(r"(ann|rat|cod|work|judge)\w*[ _.-]?\d+$", c.lower())]
    wide = f": {few(side)} look like a column for each user; a row for each is needed"
    check(found or not side, f"no column says who annotated{wide}")
    there = few(table.columns, 40)
    check(found, f"no column is named like a user: say --user-col (there are: {there})")
    check(len(found) == 1, f"{few(found)} may be who annotated: say --user-col")
    return found[0]


def is_split(table, column):
    """Does the column say which row is for training, validation and test?"""
    values = {word_of(row.get(column)) for row in table.rows}
    return values - {""} and values <= SPLITS.keys() | {""}


def word_of(cell):
    """A cell without case and white space; "" for what is no string."""
    return cell.strip().lower() if isinstance(cell, str) else ""


def choose_splits(table, flag, taken):
    """(the column of the split or "", list of the columns of further splits)"""
    if flag == "none":
        return "", []
    rest = [c for c in table.columns if c not in taken]
    if flag:
        chosen = said(table, "--split-col", flag)[0]
        place, cell = next(((p, row.get(chosen)) for p, row in zip(table.places, table.rows)
                            if word_of(row.get(chosen)) not in SPLITS | {"": ""}), ("", ""))
        check(not place, f"{place}: {chosen!r} is {cell!r}: not train, val or test")
        return chosen, [c for c in rest if c != chosen and is_split(table, c)]
    named = [c for c in rest if c.lower() == "split"]
    for c in named:
        values = {word_of(row.get(c)) for row in table.rows}
        odd = few(sorted(values - SPLITS.keys() - {""}))
        check(not odd, f"column {c!r} holds {odd}: not train, val, test; --split-col none ignores it")
    found = [c for c in rest if is_split(table, c)]
    if table.split in found or len(named) == 1 and named[0] in found:
        first = table.split or named[0]
        return first, [c for c in found if c != first]
    return (found[0], []) if len(found) == 1 else ("", found)


# yes and no in some languages; 0 and 1 stand for them
SPELLINGS = [("0", "1"), ("false", "true"), ("no", "yes"), ("n", "y"), ("f", "t"), ("nein", "ja"),
             ("falsch", "wahr"), ("non", "oui"), ("faux", "vrai"), ("no", "sí"), ("no", "si"),
             ("falso", "verdadero"), ("falso", "vero"), ("não", "sim"), ("nee", "ja"),
             ("нет", "да"), ("否", "是")]
TICKS = {"1", "x", "✓", "✔", "☑", "true", "yes", "ja", "wahr", "oui", "vrai", "si", "sí", "on",
         "checked"}


def tick_word(cell):
    """A cell of yes or no without case, white space and the .0 of spreadsheets."""
    return re.sub(r"^(\d+)[.,]0+$", r"\1", word_of(cell))


def spelling(table, column):
    """(no, yes) as a column mostly spells them; ("", "x") if it is ticked or blank; else None."""
    counts = Counter(tick_word(row.get(column)) for row in table.rows)
    lists = any(isinstance(row.get(column), list) for row in table.rows)
    blank = counts.pop("", 0)
    for word in MISSING & counts.keys():
        del counts[word]
    n = counts.total()
    if lists or not n:
        return None
    if blank and len(counts) == 1 and set(counts) <= TICKS:
        return "", next(iter(counts))
    for no, yes in SPELLINGS:
        both = len(yes) > 1 or no.isdigit() or no in counts and yes in counts
        if both and counts[no] + counts[yes] > n / 2:
            return no, yes
    return None


def choose_labels(table, options, taken):
    """list of the columns of labels."""
    if options.labels or options.label_col:
        check(not (options.labels and options.label_col), "--labels or --label-col, not both")
        flag = "--labels" if options.labels else "--label-col"
        found = said(table, flag, options.labels or options.label_col)
        check(options.labels or len(found) == 1, f"{flag}: one column; several are --labels A,B")
        return found
    if table.labels:
        several = f"{few(table.labels)} hold labels: say --label-col, as in {table.labels[0]}"
        check(len(table.labels) == 1, several)
        return table.labels
    rest = [c for c in table.columns if c not in taken]
    rest = [c for c in rest if ANSWERS.match(c)] or rest
    kinds = defaultdict(list)
    for column in rest:
        spelled = spelling(table, column)
        if spelled:
            kinds["/".join(word or "blank" for word in spelled)].append(column)
    ticks = {c for columns in kinds.values() for c in columns}
    named = [c for c in rest if plain(c) in LABELS and c not in ticks]
    if not kinds and len(named) == 1:
        return named
    if not kinds and len(rest) == 1 and ANSWERS.match(rest[0]):
        return rest
    there = "; ".join(f"{few(columns)} ({spelled})" for spelled, columns in kinds.items())
    there = "; ".join(filter(None, [there, few(named)])) or f"no column of 0 and 1 ({few(rest, 40)})"
    check(len(kinds) == 1 and not named,
          f"{there}: say --labels A,B or, for one choice, --label-col C")
    return kinds.popitem()[1]


# -------------------- what a cell means

def user_of(cell):
    """The user that a cell names: 11.0 and 11 are one person, and so are "ann" and "ann "."""
    return known.user_id(cell if isinstance(cell, str) else ",".join(cell))


def check_users(users):
    """BadInput if IDs of users cannot be those that were given."""
    names = sorted(set(users))
    spoiled = [u for u in names if re.fullmatch(r"\d([.,]\d+)?[eE]\+?\d+", u)]
    check(not spoiled, f"user IDs such as {few(spoiled, 2)} were rounded by a spreadsheet, so that "
          "several people are one: write the original IDs, as text")
    long = [u for u in names if re.fullmatch(r"\d{16,}", u)]
    zeros = len(long) > 2 and all(set(u[15:]) == {"0"} for u in long)
    check(not zeros, f"user IDs such as {few(long, 2)} end in zeros from the 16th digit on: a "
          "spreadsheet rounded them; write the original IDs, as text")


SEPARATORS = ("#", "|", ";", ",", "/", "+", "&", "\n", " ")


def list_separator(values):
    """What seems to separate several words in some of the values; "" if these are no lists."""
    values = set(values)
    if any(re.fullmatch(r"(?s)\s*(\[.*\]|\{.*\})\s*", value) for value in values):
        return "json"
    for mark in SEPARATORS:
        lists = [[part.strip() for part in value.split(mark)] for value in values if mark in value]
        lists = [parts for parts in lists if all(parts)]
        if any(set(parts) <= values for parts in lists):
            return mark
        times = Counter(part for parts in lists for part in set(parts))
        if mark in "#|;," and len(lists) > 1 and len(times) < 2 * len(lists):
            swapped = len({tuple(sorted(parts)) for parts in lists}) < len(lists)
            if swapped or max(times.values()) > 1:
                return mark
    return ""


def check_no_lists(table, column, values, options):
    """BadInput if cells of a column look like several answers, or several people, in one."""
    if options.list_sep == "none" or as_numbers(column, values):
        return
    mark = list_separator(values)
    if not mark:
        return
    place, cell = next((place, row[column]) for place, row in zip(table.places, table.rows)
                       if mark in row[column] or mark == "json" and row[column].strip()[:1] in "[{")
    flag = {" ": '" "', "\n": "'\\n'", "json": "json"}.get(mark, f'"{mark}"')
    raise BadInput(f"{place}: {column!r} is {cell[:SHOWN]!r}: several in one cell? --list-sep {flag} "
                   "splits them, --list-sep none keeps them whole")


def split_cell(place, cell, mark):
    """list of the words in a cell: between marks, or in a list of JSON or Python."""
    if not isinstance(cell, str):
        return cell
    if mark != "json":
        mark = mark.replace("\\n", "\n").replace("\\t", "\t")
        return [part.strip() for part in cell.split(mark) if part.strip()]
    if cell.strip()[:1] not in ("[", "{"):
        return [cell.strip()] if cell.strip() else []
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(cell)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, dict) and len(value) == 1:  # {"choices": [...]} of Label Studio
            value = next(iter(value.values()))
        if isinstance(value, list) and not any(isinstance(x, (list, dict)) for x in value):
            return [str(x).strip() for x in value]
    raise BadInput(f"{place}: {cell[:SHOWN]!r}: not a list of words in JSON")


def split_lists(table, user, columns, options):
    """None; splits cells by --list-sep: answers into lists, several people into rows of their own
    where there is an answer for each of them."""
    mark = options.list_sep
    people = [split_cell(p, row.get(user), mark) for p, row in zip(table.places, table.rows)]
    parallel = len(columns) == 1 and any(len(names) > 1 for names in people)
    rows, places = [], []
    for place, row, names in zip(table.places, table.rows, people):
        found = {c: split_cell(place, row[c], mark) for c in columns if row.get(c)}
        if not parallel:
            rows.append(row | found)
            places.append(place)
            continue
        answers = found.get(columns[0], [])
        check(len(names) == len(answers), f"{place}: {len(names)} in {user!r} and {len(answers)} in "
              f"{columns[0]!r}: whose are they?")
        for name, answer in zip(names, answers):
            rows.append(row | {user: name, columns[0]: answer})
            places.append(f"{place}, {name}")
    table.rows = rows
    table.places = places


NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")


def as_numbers(column, values):
    """dict value -> its number, plainly written; empty unless all values are numbers."""
    plainly = {value: value.replace("\u2212", "-") for value in values}
    if not plainly or not all(NUMBER.fullmatch(number) for number in plainly.values()):
        return {}
    commas = [number for number in plainly.values() if "," in number]
    if commas:
        both = any("." in number for number in plainly.values())
        halves = all(re.search(",(0|5|00|25|50|75)$", number) for number in commas)
        below_one = all(re.search("^[+-]?[01],", number) for number in commas)
        if both or not (halves or below_one):
            return {}
    return {value: f"{float(number.replace(',', '.')):.12g}" for value, number in plainly.items()}


CODES = {"77", "88", "98", "99", "777", "888", "999", "-8", "-9", "-88", "-98", "-99", "-999", "9999"}


def one_choice(table, column, cells, notes):
    """(name of a column, its cells, what it is in words) of a single choice."""
    values = Counter(cells)
    spelled = spelling(table, column)
    ticks = {value: tick_word(value) for value in values}
    if spelled and set(ticks.values()) <= set(spelled):
        return column, [str(int(ticks[cell] == spelled[1])) for cell in cells], "one choice: 0 or 1"
    numbers = as_numbers(column, values)
    if numbers:
        found = sorted(set(numbers.values()), key=float)
        check(len(found) <= 100, f"column {column!r} has {len(found):,} values: not a choice of one; "
              "say --label-col, or round them")
        codes = [x for x in found if x in CODES and len(found) > 2]
        if codes:
            notes.append(f"NOTE: is {few(codes)} in {column!r} a rating, or a code for no answer?")
        return column, [numbers[cell] for cell in cells], f"one choice, ratings: {few(found, 20)}"
    names = {value: known.user_id(value) for value in values}
    best = {}
    for value, _ in values.most_common():
        best.setdefault(" ".join(names[value].lower().split()), names[value])
    merged = {value: best[" ".join(name.lower().split())] for value, name in names.items()}
    other = sorted({name for value, name in names.items() if name != merged[value]})
    if other:
        notes.append(f"NOTE: spelled in two ways, taken as one class: {few(other)}")
    found = sorted(set(merged.values()))
    check(len(found) <= 100 and not (len(found) > 10 and len(found) > len(cells) / 2),
          f"column {column!r} has {len(found):,} values in {len(cells):,} rows: not a choice of one; "
          "say --label-col or --labels")
    part = [name for name in found if NUMBER.fullmatch(name)]
    if part:
        notes.append(f"NOTE: numbers and words in {column!r}: classes without order")
    return column, [merged[cell] for cell in cells], f"one choice: {few(found, 20)}"


def lists_of_choices(column, lists, notes):
    """(dict label -> cells of 0 and 1, what they are in words) of lists of chosen labels."""
    names = {word for words in lists for word in words}
    names = sorted(names, key=lambda word: (as_numbers("", {word}) == {}, float_of(word), word))
    check(names, f"column {column!r}: nothing was ever chosen")
    check(len(names) <= 100, f"column {column!r} has {len(names):,} labels: not a choice of some")
    alike = {name for name, n in Counter(name.lower() for name in names).items() if n > 1}
    check(not alike, f"column {column!r}: spelled in two ways: {few(sorted(alike))}; mend the file")
    return {name: [str(int(name in words)) for words in lists] for name in names}, (
        f"any number of: {few(names, 40)}")


def float_of(word):
    """The number in a word, or 0."""
    return float(next(iter(as_numbers("", {word}).values()), 0))


def labels_of(table, columns, options, notes):
    """(dict name of a label column -> its cells, what they are in words)"""
    if len(columns) > 1:
        return {column: zero_one(table, column) for column in columns}, (
            f"any number of: {few(columns, 40)}")
    column = columns[0]
    cells = [row.get(column, "") for row in table.rows]
    if any(isinstance(cell, list) for cell in cells):
        lists = [cell if isinstance(cell, list) else [cell] for cell in cells]
        if any(len(set(words)) != 1 for words in lists):
            return lists_of_choices(column, lists, notes)
        cells = [words[0] for words in lists]
    cells = [cell.strip() for cell in cells]
    table.rows = [row | {column: cell} for row, cell in zip(table.rows, cells)]
    check_no_lists(table, column, cells, options)
    name, cells, words = one_choice(table, column, cells, notes)
    return {name: cells}, words


def zero_one(table, column):
    """list of "0" and "1", the cells of one of several columns of labels."""
    spelled = spelling(table, column)
    lists = any(isinstance(row.get(column), list) for row in table.rows)
    check(spelled or not lists, f"{column!r} holds lists: say --label-col {column}")
    check(spelled, f"column {column!r} is not of 0 and 1 (as {few(sorted(values_of(table, column)), 5)}"
          "): for one choice say --label-col")
    words = {spelled[0]: "0", spelled[1]: "1"}
    found = []
    for place, row in zip(table.places, table.rows):
        cell = row.get(column, "")
        check(tick_word(cell) in words, f"{place}: label {column!r} is {cell[:SHOWN]!r}, not 0 or 1; "
              "say which columns are labels: --labels A,B or, for one choice, --label-col C")
        found.append(words[tick_word(cell)])
    return found


def values_of(table, column):
    """The set of the cells of a column, as strings."""
    return {str(row.get(column, "")) for row in table.rows}


# -------------------- what is missing, what is blank

def is_missing(cell):
    return cell is None or isinstance(cell, str) and cell.strip().lower() in MISSING


def fill_blanks(table, columns, options, notes):
    """None; in columns that are ticked or blank, or with --blank 0, blank is 0."""
    filled = []
    for column in columns:
        ticked = (spelling(table, column) or ("?", ""))[0] == ""
        blanks = [row for row in table.rows if word_of(row.get(column, "")) == ""
                  and not isinstance(row.get(column), list)]
        if not blanks or not (ticked or options.blank is not None):
            continue
        no = "0"
        for row in blanks:
            row[column] = [] if lists_in(table, column) or options.list_sep else no
        for row in table.rows:
            if ticked and isinstance(row[column], str) and row[column] != no:
                row[column] = "1"
        filled.append(column)
    if filled:
        notes.append(f"blank was read as 0, not ticked, in: {few(filled)}")


def lists_in(table, column):
    """Does a column hold lists?"""
    return any(isinstance(row.get(column), list) for row in table.rows)


def drop_missing(table, text, user, labels, options, notes):
    """None; rows in which a cell is missing are left out if a flag says so, else refused."""
    missing = {}
    for i, row in enumerate(table.rows):
        empty = [c for c in (user, *labels) if is_missing(row.get(c))]
        if user in empty or word_of(row.get(user)) == "none":
            empty = [user, *empty]
        if all(is_missing(row.get(c)) for c in text):
            empty = [" + ".join(text), *empty]
        if empty:
            missing[i] = empty[0]
    for i, column in missing.items():
        ticks = column in labels and (options.labels or len(labels) > 1)
        blank = "; --blank 0: blank is not ticked" if ticks or options.list_sep else ""
        check(options.skip_missing, f"{table.places[i]}: no {column!r} "
              f"(--skip-missing: {len(missing):,} rows less{blank})")
    for column, n in Counter(missing.values()).items():
        notes.append(f"left out: {n:,} rows without {column!r}")
    kept = [i for i in range(len(table.rows)) if i not in missing]
    table.rows = [table.rows[i] for i in kept]
    table.places = [table.places[i] for i in kept]
    check(kept, "no row is complete")


# -------------------- several files are one dataset

def split_in_name(path):
    """The split that a file's name names; "" if it names none, or several."""
    stem = os.path.splitext(os.path.basename(path))[0].lower()
    found = {SPLITS[word] for word in re.split("[^a-z]+", stem) if word in SPLITS}
    return found.pop() if len(found) == 1 else ""


def gather(paths, encoding=""):
    """The Table of all files; where they are the files of splits, with a column `split`."""
    tables = [read_file(path, encoding) for path in paths]
    names = [split_in_name(path) for path in paths]
    by_name = len(paths) > 1 and all(names) and len(set(names)) > 1
    whole = Table(tables[0].form, [], [], tables[0].text, tables[0].user)
    whole.split = tables[0].split
    for path, table, name in zip(paths, tables, names):
        print(f"{path}: {table.form}, {len(table.rows):,} rows", flush=True)
        several = len(paths) > 1
        if table.one_file_a_user and several and not by_name:
            user = os.path.splitext(os.path.basename(path))[0]
            table.rows = [row | {"user": user} for row in table.rows]
            whole.notes.append(f"{path} names no user: its name is taken, {user!r}")
            whole.user = "user"
        split = table.split or next((c for c in table.columns if c.lower() == "split"), "split")
        for place, row in zip(table.places, table.rows):
            if by_name:
                own = SPLITS.get(word_of(row.get(split)), name)
                check(own == name, f"{path}: {place}: {split!r} is {row.get(split)!r}, not {name}")
                row[split] = name
            whole.rows.append(row)
            whole.places.append(f"{path}: {place}")
        whole.labels += [c for c in table.labels if c not in whole.labels]
        whole.notes += [f"{path}: {note}" if several else note for note in table.notes]
    if len(paths) > 1 and not by_name:
        whole.notes.append("the files' names name no splits: they are taken as one file")
    return whole


# -------------------- a file of one's own

def read_own(options):
    """(dict column -> cells in the one form, lines that say what was taken and left out)"""
    table = gather([path.strip() for path in options.file.split(",")], options.encoding)
    notes = list(table.notes)
    text = choose_text(table, options.text_col)
    user = choose_user(table, options.user_col)
    split, draws = choose_splits(table, options.split_col, [*text, user])
    time = options.time_col or next((c for c in table.columns if c.lower() == "time"), "")
    taken = [*text, user, split, *draws, time]
    labels = choose_labels(table, options, taken)
    twice = [c for c in labels if c in (*text, user, split)]
    check(not twice, f"{few(twice)}: a label, and also the text, the user or the split?")
    if options.list_sep and options.list_sep != "none":
        split_lists(table, user, labels, options)
    fill_blanks(table, labels, options, notes)
    drop_missing(table, text, user, labels, options, notes)
    check_no_lists(table, user, [str(row[user]) for row in table.rows], options)
    columns = {"text": [text_of(row, text, table) for row in table.rows],
               "user": [user_of(row[user]) for row in table.rows]}
    check_users(columns["user"])
    for name, column in [("split", split)] * bool(split) + [(draw, draw) for draw in draws]:
        cells = [word_of(row.get(column)) for row in table.rows]
        columns[name] = [SPLITS.get(cell, "") for cell in cells]
    if time:
        said(table, "--time-col", time)
        columns["time"] = [row.get(time, "") for row in table.rows]
    found, words = labels_of(table, labels, options, notes)
    for name in found:
        check(name.lower() not in ("text", "user", "split", "time"), f"a label is named {name!r}, as a "
              "column of the form is: rename it in the file")
    rest = [c for c in table.columns if c not in [*taken, *labels]]
    rest = [c for c in rest if not any(c.startswith(f"{label}:::") for label in labels)]
    lines = [f"text: {' + '.join(text)} · user: {user} · split: {split or 'by a hash of the text'}",
             f"labels: {', '.join(labels)}, {words}"]
    lines += [f"further splits: {', '.join(draws)}"] if draws else []
    lines += [f"not taken: {few(rest, 40)}"] if rest else []
    return columns | found, lines + notes


def text_of(row, columns, table):
    """The text of a row; that of several columns is named lines."""
    parts = {column: row.get(column) for column in columns}
    for column, part in parts.items():
        check(part is None or isinstance(part, str), f"column {column!r} holds lists, not a text")
    text = named_lines(parts) if len(columns) > 1 else parts[columns[0]]
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of letters, which no file can hold


def what_is_odd(columns):
    """list of lines: what is in the rows that may not have been meant."""
    labels = [c for c in columns if c not in ("text", "user", "split", "time")]
    labels = [c for c in labels if not set(columns[c]) <= {*PARTS, ""}]
    lines = []
    answers = list(zip(*(columns[c] for c in labels)))
    pairs = defaultdict(set)
    for text, user, answer in zip(columns["text"], columns["user"], answers):
        pairs[text, user].add(answer)
    repeated = len(answers) - len(pairs)
    differ = sum(len(found) > 1 for found in pairs.values())
    if repeated:
        lines.append(f"NOTE: {repeated:,} rows repeat a text and user; {differ:,} people answered one "
                     "text in several ways" + " (several choices, one in a row?)" * (differ > 0))
    if len(set(columns["user"])) == len(answers) > 1:
        lines.append("NOTE: every row has a user of its own: nothing can be learned about a user")
    split = columns.get("split") or [split_of(text) for text in columns["text"]]
    where = defaultdict(set)
    for text, part in zip(columns["text"], split):
        where[text_id(text)].add(part)
    twice = sum(len(parts - {""}) > 1 for parts in where.values())
    if twice:
        lines.append(f"NOTE: {twice:,} texts are in two splits")
    for label in labels:
        seen = Counter(zip(split, columns[label]))
        values = {value for _, value in seen}
        if len(values) == 1:
            lines.append(f"NOTE: {label!r} is {few(values)} in every row; --labels leaves it out")
        late = sorted(v for v in values if not seen["train", v])
        if late and len(values) > 1:
            n = sum(seen["val", v] + seen["test", v] for v in late)
            lines.append(f"NOTE: no training row has {label} = {few(late)} ({n:,} other rows have)")
    return lines


def print_parts(columns, expected=None):
    """None; how many rows, texts and users there are, and how many there should be."""
    split = columns.get("split") or [split_of(text) for text in columns["text"]]
    print(f"{'':8}{'rows':>9}{'texts':>9}{'users':>9}" + f"{'source':>9}" * bool(expected))
    for part in (*PARTS, ""):
        own = [i for i, there in enumerate(split) if there == part]
        texts = len({columns["text"][i] for i in own})
        users = len({columns["user"][i] for i in own})
        line = f"{part or 'none':8}{len(own):9,}{texts:9,}{users:9,}"
        n = (expected or {}).get(part)
        if own or part:
            print(line + (f"{n:9,}" if n else ""))
        if n and n != len(own):
            print(f"WARNING: {part} has {len(own):,} annotations, the source {n:,}: is it whole?")


def prepare_own(options, folder, name, expected=None):
    """None; writes the CSV of a file of one's own, and prints what it took and left out."""
    out = os.path.join(folder, "annotations.csv")
    here = [os.path.realpath(path.strip()) for path in options.file.split(",")]
    check(os.path.realpath(out) not in here, f"{out} would overwrite --file: choose another --name")
    foreign = os.path.exists(out) and not known.start_of(out).startswith("text,user,")
    check(not foreign, f"{out}: not of this script; move it away, or choose another --name")
    columns, lines = read_own(options)
    for line in lines + what_is_odd(columns):
        print(line)
    print_parts(columns, expected)
    known.write_csv(out, [tuple(columns), *zip(*columns.values())])
    print(f"{out}: {len(columns['text']):,} annotations; next: make cls_p DATA={name}")


def name_of(paths):
    """The name of a dataset: that of its file, without the split that it names."""
    stem = os.path.splitext(os.path.basename(paths[0]))[0]
    words = [word for word in re.split("[^A-Za-z0-9]+", stem) if word]
    if len(paths) > 1:
        words = [word for word in words if word.lower() not in SPLITS]
    check(words, f"{paths[0]}: no name for the dataset in it: say --name")
    return "_".join(words)


# -------------------- the command

def make_parser():
    """The parser of the command line."""
    def refuse(message):
        raise BadInput(f"{message}; make data DATA={'|'.join(known.DATASETS)} or FILE=my.csv")
    p = argparse.ArgumentParser("prepare.py", description=__doc__.splitlines()[0])
    p.error = refuse
    p.add_argument("known", choices=known.DATASETS, metavar="NAME", nargs="?",
                   help=", ".join(known.DATASETS))
    p.add_argument("--dir", metavar="DIR", help="folder of all the files (data/NAME)")
    p.add_argument("--file", metavar="A,B", help="files of annotations: one dataset")
    p.add_argument("--name", metavar="NAME", help="what to call it (the file's name)")
    p.add_argument("--text-col", metavar="A,B", help="column of the text; several are named lines")
    p.add_argument("--user-col", metavar="C", help="column that says who annotated")
    p.add_argument("--label-col", metavar="C", help="column of one choice, words or a rating")
    p.add_argument("--labels", metavar="A,B", help="columns of 0 and 1, any of which may be chosen")
    p.add_argument("--split-col", metavar="C", help="column of train, val, test; none: no column is")
    p.add_argument("--time-col", metavar="C", help="column of the time, which is kept")
    p.add_argument("--skip-missing", action="store_true", help="leave out rows with a missing cell")
    p.add_argument("--list-sep", metavar="SEP", help="what separates several answers in one cell; "
                   "json: they are lists of JSON; none: no cell is a list")
    p.add_argument("--blank", choices=["0"], help="a blank label is 0, not missing")
    p.add_argument("--encoding", default="", help="of a file that is not UTF-8, as cp1252")
    return p


def run(args):
    """None; does what the command line says."""
    if args.known in known.AS_THE_PAPER:
        given = [key for key, value in vars(args).items() if value and key not in ("known", "dir")]
        check(not given, f"{args.known} takes no --{few(given).replace('_', '-')}")
        known.prepare(args.known, args.dir or os.path.join(HERE, args.known))
        return
    check(bool(args.known) != bool(args.file), "NAME, or --file FILE: see --help")
    if args.known:
        folder = args.dir or os.path.join(HERE, args.known)
        paths, _ = known.originals(args.known, folder)
        args.file = ",".join(paths)
        prepare_own(args, folder, args.known, known.DATASETS[args.known]["expected"])
        return
    name = args.name or name_of(args.file.split(","))
    check(re.fullmatch(r"[\w.-]+", name), f"--name {name!r}: letters, digits and _ only")
    ours = name in (*known.AS_THE_PAPER, "sample", "models")
    check(not ours or args.dir, f"--name {name} is taken: choose another")
    prepare_own(args, args.dir or os.path.join(HERE, name), name)


def main(argv=None):
    """Runs the command; returns the exit status."""
    try:
        run(make_parser().parse_args(argv))
    except (BadInput, OSError) as e:
        print(f"prepare.py: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nprepare.py: stopped; complete files stay", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
