"""What the cells of a column mean: yes and no, a rating, a class, several of them, or nothing.

Every decision is about a whole column, so that one odd cell is named and not guessed at. Cells that
could be read in two ways are refused, with the flag that says which.
"""
import ast
import json
import os
import re
import sys
from collections import Counter

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
from plm import BadInput, check  # noqa: E402

SHOWN = 60   # letters of a cell that a message quotes
CLASSES = 100  # more of them are no choice
MISSING = {"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "null"}  # in upper or lower case
NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?")

# No and yes in some languages; 0 and 1 stand for them.
SPELLINGS = [("0", "1"), ("false", "true"), ("no", "yes"), ("n", "y"), ("f", "t"), ("nein", "ja"),
             ("falsch", "wahr"), ("non", "oui"), ("faux", "vrai"), ("no", "sí"), ("no", "si"),
             ("falso", "verdadero"), ("falso", "vero"), ("não", "sim"), ("nee", "ja"),
             ("нет", "да"), ("否", "是")]
TICKS = {"1", "x", "✓", "✔", "☑", "true", "yes", "ja", "wahr", "oui", "vrai", "si", "sí", "on",
         "checked"}
CODES = {"77", "88", "98", "99", "777", "888", "999", "9999", "-8", "-9", "-88", "-98", "-99", "-999"}
SEPARATORS = ("#", "|", ";", ",", "/", "+", "&", "\n", " ")


def few(words, n=12):
    """The first words of a list, and how many more there are."""
    words = [" ".join(str(word).split())[:SHOWN] or repr(word) for word in words]
    more = f", and {len(words) - n:,} more" if len(words) > n else ""
    return ", ".join(words[:n]) + more


def user_id(cell):
    """The user that a cell names: 11.0 and 11 are one person, and so are "ann" and "ann "."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", cell.strip())


def word_of(cell):
    """A cell without case and white space; "" for what is no string."""
    return cell.strip().lower() if isinstance(cell, str) else ""


def is_missing(cell):
    """Is there nothing in a cell, or a word that says so? An empty list chose nothing."""
    return cell is None or isinstance(cell, str) and word_of(cell) in MISSING


# -------------------- yes and no

def tick_word(cell):
    """A cell of yes or no without case, white space and the .0 of spreadsheets."""
    return re.sub(r"^(\d+)[.,]0+$", r"\1", word_of(cell))


def spelling(cells):
    """(no, yes) as a column mostly spells them; ("", "x") if it is ticked or blank; else None."""
    if any(isinstance(cell, list) for cell in cells):
        return None
    counts = Counter(tick_word(cell) for cell in cells)
    blank = counts.pop("", 0)
    for word in MISSING & counts.keys():
        del counts[word]
    if not counts:
        return None
    if blank and len(counts) == 1 and set(counts) <= TICKS:
        return "", next(iter(counts))
    for no, yes in SPELLINGS:
        mostly = counts[no] + counts[yes] > counts.total() / 2
        letters = len(yes) == 1 and not yes.isdigit()
        both = no in counts and yes in counts  # f and t, but not the f of female
        if mostly and (both or not letters):
            return no, yes
    return None


def zero_one(column, cells, places):
    """list of "0" and "1": the cells of one of several columns of labels."""
    spelled = spelling(cells)
    odd = few(sorted({str(cell) for cell in cells}), 5)
    check(spelled, f"column {column!r} is not of 0 and 1 (but {odd}): for one choice say --label-col")
    values = {spelled[0]: "0", spelled[1]: "1"}
    found = []
    for place, cell in zip(places, cells):
        word = tick_word(cell)
        check(word in values, f"{place}: label {column!r} is {cell[:SHOWN]!r}, not 0 or 1; say --labels"
              f" A,B without it or, for one choice or a rating, --label-col {column}")
        found.append(values[word])
    return found


# -------------------- one choice: a rating, or a class

def as_numbers(values):
    """dict value -> its number, plainly written; empty unless all values are numbers for sure. A
    decimal comma is one where no list of numbers can be meant: in halves, or between 0 and 1."""
    written = {value: value.replace("\u2212", "-") for value in values}
    if not written or not all(NUMBER.fullmatch(number) for number in written.values()):
        return {}
    commas = {number for number in written.values() if "," in number}
    if commas:
        points = any("." in number for number in written.values())
        halves = all(re.search(",(0|5|00|25|50|75)$", number) for number in commas)
        rest = set(written.values()) - commas
        shares = all(re.fullmatch("0,[0-9]+|1,0+", number) for number in commas)
        shares = shares and len(commas) > 1 and rest <= {"0", "1"}
        if points or not (halves or shares):
            return {}
    numbers = {}
    for value, number in written.items():
        numbers[value] = f"{float(number.replace(',', '.')):.12g}"
    return numbers


def one_choice(column, cells, notes):
    """(the cells of a single choice in one spelling, what they are in words)"""
    values = Counter(cells)
    spelled = spelling(cells)
    ticks = {value: tick_word(value) for value in values}
    if spelled and set(ticks.values()) <= set(spelled):
        return [str(int(ticks[cell] == spelled[1])) for cell in cells], "one choice, 0 or 1"
    numbers = as_numbers(values)
    if numbers:
        return ratings(column, [numbers[cell] for cell in cells], notes)
    names = one_spelling(values, notes)
    found = sorted(set(names.values()))
    many = len(found) > CLASSES or len(found) > max(10, len(cells) / 2)
    check(not many, f"column {column!r} has {len(found):,} values in {len(cells):,} rows: not a "
          "choice of one; say --label-col or --labels")
    if any(NUMBER.fullmatch(name) for name in found):
        notes.append(f"NOTE: numbers and words in {column!r}: classes without order")
    return [names[cell] for cell in cells], f"one choice of {few(found, 20)}"


def ratings(column, cells, notes):
    """(cells, what they are in words) of a column of numbers."""
    found = sorted(set(cells), key=float)
    check(len(found) <= CLASSES, f"column {column!r} has {len(found):,} values: not a choice of one; "
          "say --label-col, or round them")
    codes = [number for number in found if number in CODES]
    if codes and len(found) > 2:
        notes.append(f"NOTE: is {few(codes)} in {column!r} a rating, or a code for no answer?")
    return cells, f"one choice, ratings {few(found, 20)}"


def one_spelling(values, notes):
    """dict value -> its class: what differs in case and white space alone is one class."""
    best = {}
    for value, _ in values.most_common():
        best.setdefault(" ".join(user_id(value).lower().split()), user_id(value))
    names = {value: best[" ".join(user_id(value).lower().split())] for value in values}
    other = sorted(value for value, name in names.items() if user_id(value) != name)
    if other:
        notes.append(f"NOTE: written in two ways, taken as one class: {few(other)}")
    return names


# -------------------- several in one cell

def list_separator(values):
    """What seems to separate several words in some of the values; "" if these are no lists."""
    values = set(values)
    if any(re.fullmatch(r"(?s)\s*(\[.*\]|\{.*\})\s*", value) for value in values):
        return "json"
    for mark in SEPARATORS:
        lists = []
        for value in values:
            parts = [part.strip() for part in value.split(mark)]
            if len(parts) > 1 and all(parts):
                lists.append(parts)
        if any(set(parts) <= values for parts in lists):
            return mark
        times = Counter()
        for parts in lists:
            times.update(set(parts))
        if mark in "#|;," and max(times.values(), default=0) > 1:
            return mark
    return ""


def check_no_lists(column, cells, places, list_sep):
    """BadInput if cells of a column look like several answers, or several people, in one."""
    values = set(cells)
    if list_sep == "none" or as_numbers(values):
        return
    mark = list_separator(values)
    if not mark:
        return
    for place, cell in zip(places, cells):
        shown = cell.strip()[:1] in "[{" if mark == "json" else mark in cell
        if shown and cell.strip():
            break
    flag = {"\n": r"'\n'", "json": "json"}.get(mark, f'"{mark}"')
    raise BadInput(f"{place}: {column!r} is {cell[:SHOWN]!r}: several in one cell? --list-sep {flag} "
                   "splits them, --list-sep none keeps them whole")


def split_cell(place, cell, mark):
    """list of the words in a cell: between marks, or in a list of JSON or Python."""
    if not isinstance(cell, str):
        return cell or []
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


def any_number_of(column, lists):
    """(dict label -> cells of 0 and 1, what they are in words) of lists of chosen labels."""
    names = {word for words in lists for word in words}
    numbers = as_numbers(names)
    names = sorted(names, key=lambda name: (float(numbers.get(name, 0)), name))
    check(names, f"column {column!r}: nothing was ever chosen")
    check(len(names) <= CLASSES, f"column {column!r} has {len(names):,} labels: not a choice of some")
    times = Counter(name.lower() for name in names)
    alike = [name for name in names if times[name.lower()] > 1]
    check(not alike, f"column {column!r}: written in two ways: {few(alike)}; mend the file")
    columns = {}
    for name in names:
        columns[name] = [str(int(name in words)) for words in lists]
    return columns, f"any number of {few(names, 40)}"


# -------------------- who

def check_users(users):
    """BadInput if IDs of users cannot be those that were given."""
    names = sorted(set(users))
    rounded = [user for user in names if re.fullmatch(r"\d([.,]\d+)?[eE]\+?\d+", user)]
    check(not rounded, f"user IDs such as {few(rounded, 2)} were rounded by a spreadsheet, so that "
          "several people are one: write the original IDs, as text")
    long = [user for user in names if re.fullmatch(r"\d{16,}", user)]
    zeros = len(long) > 2 and all(set(user[15:]) == {"0"} for user in long)
    check(not zeros, f"user IDs such as {few(long, 2)} end in zeros from the 16th digit on: a "
          "spreadsheet rounded them; write the original IDs, as text")
