"""Reads a file of annotations, of whatever form, into one Table of rows.

A form is recognized by what is in the file, never by its name: FORMATS below has a recognizer and a
reader for each form of JSON, read_table reads every dialect of CSV. What a file leaves open (which
column is the text, what a cell means) is decided in prepare.py. What cannot be read for sure is
refused in one line that says what would work.
"""
import csv
import io
import json
import os
import re
import sys
from collections import Counter, defaultdict, namedtuple
from dataclasses import dataclass, field

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from plm import BadInput, check  # noqa: E402

csv.field_size_limit(1 << 30)  # a cell may hold more than the csv module's 128 KB


@dataclass
class Table:
    form: str          # of the file, in words
    rows: list         # of dict: column -> its cell, a string; or a list, if the form knows choices
    places: list       # how an error names each row
    text: list = field(default_factory=list)    # the columns that the form itself says are
    user: str = ""                              # the text, the user, a label or the split;
    labels: list = field(default_factory=list)  # empty if it does not say
    split: str = ""
    one_file_a_user: bool = False  # does the tool write a file for each user?
    notes: list = field(default_factory=list)   # what was left out and why, in words

    @property
    def columns(self):
        """list of the names of all columns, in the order of the file."""
        names = {}
        for row in self.rows:
            names.update(dict.fromkeys(row))
        return list(names)


# -------------------- from bytes to text

NOT_TEXT = {  # how a file begins that holds no text -> what it is, and what would work
    b"PK\x03\x04": "a spreadsheet (xlsx) or a zip archive: save the sheet as CSV UTF-8, or unpack",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (xls): save the sheet as CSV UTF-8",
    b"\x1f\x8b": "compressed (gzip): unpack it", b"BZh": "compressed (bzip2): unpack it",
    b"\xfd7zXZ": "compressed (xz): unpack it", b"7z\xbc\xaf": "compressed (7z): unpack it",
    b"PAR1": "a Parquet file: write its table as CSV", b"ARROW1": "an Arrow file: write it as CSV",
    b"\x80\x04\x95": "a Python pickle: write its table as CSV", b"%PDF": "a PDF",
    b"SQLite format 3": "a database: write its table as CSV",
    b"version https://git-lfs": "the pointer of a Git LFS file, not the file: git lfs pull",
    b"<!doctype": "a web page and not the file", b"<html": "a web page and not the file",
    b"<?xml": "XML: write it as CSV or JSON"}
BOTH_CODES = re.compile(rb"[\xc2-\xc3][\x80-\xbf]|\xe2\x80[\x80-\xbf]")  # UTF-8 of Western letters


def decode(path, data, encoding=""):
    """(the text in the bytes of a file, the name of its encoding)"""
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:40].lower()
    check(start, f"{path}: nothing in it")
    for magic, what in NOT_TEXT.items():
        check(not start.startswith(magic.lower()), f"{path}: {what}")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = encoding or "utf-16"
    try:
        text = data.decode(encoding or "utf-8-sig")
    except LookupError:
        raise BadInput(f"--encoding {encoding}: no such encoding; as in --encoding cp1252") from None
    except UnicodeDecodeError as e:
        line = data[:e.start].count(b"\n") + 1
        check(not encoding, f"{path}: line {line} is not {encoding}: see --encoding")
        text, encoding = western(path, data, line), "cp1252, not UTF-8"
    check("\0" not in text, f"{path}: NUL characters in it: is it UTF-16? say --encoding utf-16-le")
    return text.removeprefix("\ufeff"), encoding or "UTF-8"


def western(path, data, line):
    """The text of a file that is not UTF-8, if it can only be Windows' Western code page."""
    say = "save it as UTF-8, or say --encoding, as in --encoding cp1251"
    mixed = f"{path}: line {line} is not UTF-8 while other lines are; mend that line"
    check(not BOTH_CODES.search(data), mixed)
    try:
        text = data.decode("cp1252")
    except UnicodeDecodeError:
        raise BadInput(f"{path}: line {line} is not UTF-8 nor cp1252: {say}") from None
    letters = [c for c in text if c.isalpha()]
    foreign = sum(c > "\x7f" for c in letters)
    check(foreign < len(letters) / 5, f"{path}: line {line} is not UTF-8: {say}")
    return text


# -------------------- tables: CSV in its dialects

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
LINE_END = re.compile("\r\n|\n|\r")


def find_delimiter(text):
    """(delimiter, the text after a spreadsheet's first line "sep=;")"""
    said = re.match("sep=(.)(\r\n|\n|\r)", text)
    if said:
        return said[1], text[said.end():]
    first = next(line for line in LINE_END.split(text) if line.strip())
    columns = {d: len(next(csv.reader([first], delimiter=d), [])) for d in DELIMITERS}
    return max(columns, key=columns.get), text


# A line of the file's, or several in one row: numbers of the first and the last, and the cells.
Line = namedtuple("Line", "first last cells")


def quoted_rows(text, delimiter, **dialect):
    """(list of Line, why reading ended too early) by the csv module."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, **dialect)
    rows = []
    first = 1
    try:
        for cells in reader:
            if len(cells) > 1 or cells and cells[0].strip():
                rows.append(Line(first, reader.line_num, cells))
            first = reader.line_num + 1
    except csv.Error:
        mark = "a quotation mark that nothing closes, or text after a closing one"
        return rows, f"line {reader.line_num}: {mark}"
    return rows, ""


def unquoted_rows(text, delimiter):
    """list of Line; a quotation mark is a letter like others."""
    lines = enumerate(LINE_END.split(text), 1)
    return [Line(i, i, line.split(delimiter)) for i, line in lines if line.strip(" ")]


def uneven(rows):
    """The index of the first row that has not as many cells as the header; 0 if there is none."""
    width = len(rows[0].cells)
    for i, row in enumerate(rows):
        if len(row.cells) != width:
            return i
    return 0


def swallowed(text, rows, delimiter):
    """The index of the first row in which an open quotation mark took whole rows for a text: each
    of its lines has the header's number of cells, and in one column the values of other rows."""
    lines = LINE_END.split(text)
    width = len(rows[0].cells)
    seen = [set() for _ in range(width)]
    for row in rows[1:]:
        if row.first == row.last:
            for values, cell in zip(seen, row.cells):
                values.add(cell)
    for i, row in enumerate(rows):
        inside = [line.split(delimiter) for line in lines[row.first - 1:row.last] if line.strip()]
        if row.first == row.last or any(len(cells) != width for cells in inside):
            continue
        whole = [c for c in range(width) if not LINE_END.search(row.cells[c])]
        for column in whole:
            if all(cells[column].strip('"') in seen[column] for cells in inside):
                return i
    return 0


def dialect_rows(path, text, delimiter):
    """(list of Line, words for the quoting) of a table, read in the only way that fits its rows."""
    advice = "write the file with quoting, as CSV has it"
    rows, why = quoted_rows(text, delimiter)
    plain = unquoted_rows(text, delimiter)
    even = len(plain[0].cells) > 1 and not uneven(plain)
    if not why and not uneven(rows):
        if even and len(plain) != len(rows):
            return plain, ", without quoting"
        i = swallowed(text, rows, delimiter)
        check(not i, f"{path}: row {i} (line {rows[i].last}): a quotation mark that nothing closes "
              f"has taken the rows after it for a text; {advice}")
        return rows, ""
    if '\\"' in text:
        escaped, wrong = quoted_rows(text, delimiter, doublequote=False, escapechar="\\")
        if not wrong and not uneven(escaped):
            return escaped, ", backslashes before quotation marks"
    if even:
        return plain, ", without quoting"
    i = uneven(rows) if rows else 0
    check(i, f"{path}: {why}; {advice}")
    width = len(rows[0].cells)
    more = all(len(row.cells) == width + 1 for row in rows[1:])
    hint = "; every row has one more than the header: a name for the first column?" if more else ""
    raise BadInput(f"{path}: row {i} (line {rows[i].last}): {len(rows[i].cells)} cells, not the "
                   f"{width} columns of the header{hint}")


def check_header(path, header, rows):
    """BadInput if the first line is no header: a name twice, or what stands in the rows, too."""
    for name in header:
        twice = name and header.count(name) > 1
        check(not twice, f"{path}: {header.count(name)} columns {name!r}; rename all but one")
    check(len(header) > 1, f"{path}: one column, {header[0][:60]!r}: not a table with a header")
    check(rows, f"{path}: no annotations in it")
    again = set()
    data = set()
    for i, name in enumerate(header):
        if any(row.cells[i].strip() == name for row in rows):
            again.add(name)
        if re.fullmatch(r"[-+.,\d]+|\w+://.*|.{60,}|\S+( \S+){5,}", name):
            data.add(name)
    names = set(header) - again - data - {""}
    check(names or not again, f"{path}: no header? its first line is {', '.join(header)[:80]}, as the "
          "rows are; write the names of the columns above it, as text,user,label")


def read_table(path, text, encoding):
    """The Table of a CSV, whatever separates its cells."""
    delimiter, text = find_delimiter(text)
    lines, quoting = dialect_rows(path, text, delimiter)
    header = [name.strip() for name in lines[0].cells]
    rows = [row for row in lines[1:] if any(cell.strip() for cell in row.cells)]
    check_header(path, header, rows)
    names = {}
    for i, name in enumerate(header):
        if name or any(row.cells[i].strip() for row in rows):  # not a spreadsheet's empty columns
            names[i] = name or f"(column {i + 1})"
    read = [{name: row.cells[i] for i, name in names.items()} for row in rows]
    form = f"table ({DELIMITERS.get(delimiter, delimiter)}, {encoding}{quoting})"
    places = [f"row {i} (line {row.last})" for i, row in enumerate(rows, 1)]
    table = Table(form, read, places)
    empty = len(lines) - 1 - len(rows)
    if empty:
        table.notes.append(f"left out: {empty:,} rows in which every cell is empty")
    return with_ticks(table) if any(":::" in name for name in header) else table


def with_ticks(table):
    """A Table of Potato, in which "tone:::rude" is ticked or blank: `tone` is the list of ticks."""
    table.form = f"Potato's {table.form}"
    schemas = defaultdict(list)
    for column in table.columns:
        schema, mark, label = column.partition(":::")
        if mark:
            schemas[schema].append((column, label))
    for schema, columns in schemas.items():
        kinds = [{row.get(column, "").strip() for row in table.rows} for column, _ in columns]
        kinds = [values - {"", "0", "false"} for values in kinds]
        scale = len(columns) == 1 and not kinds[0] <= {"1", "true", "x", columns[0][1]}
        if scale or not any(kinds) or any(len(values) > 1 for values in kinds):
            continue  # a number or words, not a tick
        for row in table.rows:
            row[schema] = []
            for column, label in columns:
                if row.get(column, "").strip() not in ("", "0", "false"):
                    row[schema].append(label)
        table.labels.append(schema)
        table.notes.append(f"blank was read as not ticked, in the columns of {schema!r}")
    return table


# -------------------- JSON: one value, or one in each line

def once(pairs):
    """The dict of an object in JSON; a key that stands twice would lose its first value."""
    twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands twice in one object")
    return dict(pairs)


def parse_json(path, text):
    """(value, numbers of the lines if there is a value in each)"""
    decoder = json.JSONDecoder(object_pairs_hook=once, parse_constant=str)
    try:
        return decoder.decode(text), []
    except ValueError as e:
        whole = e
    found = []
    numbers = []
    for number, line in enumerate(LINE_END.split(text), 1):
        if not line.strip():
            continue
        try:
            found.append(decoder.decode(line))
        except ValueError as e:
            why = f"line {number}: {e}" if found else whole  # JSON lines, or one value, broken
            raise BadInput(f"{path}: JSON, but not valid: {why}") from None
        numbers.append(number)
    return found, numbers


def records_of(path, value, lines):
    """list of (place, dict): the records in a JSON value."""
    if isinstance(value, dict):
        value = from_dict(value)
    told = f"{path}: JSON, but no list of records such as {{\"text\": ..., \"user\": ..., ...}}"
    check(isinstance(value, list) and value, told)
    found = []
    for i, record in enumerate(value):
        place = f"line {lines[i]}" if lines else f"record {i + 1}"
        if isinstance(record, tuple):
            place, record = record
        check(isinstance(record, dict), f"{path}: {place}: not a record but {str(record)[:40]!r}")
        found.append((place, record))
    return found


def from_dict(value):
    """The records, or (place, record), in a dict: of splits, of items, of columns; else None."""
    if any(fits(value) for fits, reader in FORMATS if reader is not read_records):
        return [value]  # the only line of JSON lines
    parts = list(value.values())
    if parts and all(isinstance(part, dict) for part in parts):
        inner = {key for part in parts for key in part}
        if all(key.isdigit() for key in inner):  # as pandas writes a table
            return from_columns({name: list(part.values()) for name, part in value.items()})
        return [(f"item {key!r}", item) for key, item in value.items()]
    lists = {key: part for key, part in value.items() if isinstance(part, list) and part}
    tables = {key: part for key, part in lists.items() if isinstance(part[0], dict)}
    if tables and set(tables) <= set(SPLITS):
        records = []
        for key, part in tables.items():
            records += [{"split": key} | record for record in part]
        return records
    if len(tables) == 1:
        return tables.popitem()[1]
    if lists and len(lists) == len(value):
        return from_columns(lists)
    return [value]


def from_columns(columns):
    """list of records of a dict: column -> list of cells; None if they are of different lengths."""
    if len({len(cells) for cells in columns.values()}) > 1:
        return None
    return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


SPLITS = {"train": "train", "training": "train", "trn": "train", "val": "val", "dev": "val",
          "valid": "val", "validation": "val", "development": "val", "test": "test",
          "testing": "test"}


def cell_of(value):
    """The cell of a value of JSON: a string, or a list of strings; what is nested stays JSON."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and list(value) == ["choices"]:  # Label Studio's short JSON
        value = value["choices"]
    flat = isinstance(value, list) and not any(isinstance(x, (list, dict)) for x in value)
    if flat:
        return [cell_of(x) for x in value]
    return json.dumps(value, ensure_ascii=False)


def named_lines(parts):
    """The text of several fields: a line "name: value" for each that is not empty."""
    return "\n".join(f"{name}: {part}" for name, part in parts.items() if str(part or "").strip())


# -------------------- LeWiDi: the shared tasks on learning with disagreement

def is_lewidi(record):
    return {"text", "annotators", "annotations"} <= record.keys()


def lewidi_text(item):
    """The text of an item; that of several fields, also of a string of JSON, in named lines."""
    text = item["text"]
    if isinstance(text, str) and text.startswith("{"):
        try:
            text = json.loads(text)
        except ValueError:
            pass  # a text that begins with a brace
    return named_lines(text) if isinstance(text, dict) else str(text or "")


def lewidi_answers(place, item):
    """list of (user, list of labels) of an item. 2025: a dict, in which one person may have given
    two labels and then stands twice in `annotators`. 2023: a string in the annotators' order."""
    given = item["annotations"]
    if isinstance(given, dict):
        return [(user, words_in(labels)) for user, labels in given.items()]
    users = words_in(item["annotators"])
    labels = words_in(given)
    check(not labels or len(users) == len(labels), f"{place}: {len(users)} annotators and "
          f"{len(labels)} annotations")
    return [(user, [label]) for user, label in zip(users, labels)]


def words_in(value):
    """list of the words in a comma-separated string, or in a list."""
    words = value if isinstance(value, list) else str(value or "").split(",")
    return [str(word).strip() for word in words if str(word).strip()]


def read_lewidi(path, records):
    """The Table of LeWiDi JSON; the label is named by the task: "irony detection" is `irony`."""
    rows = []
    places = []
    empty = 0
    for place, item in records:
        check(is_lewidi(item), f"{path}: {place}: not with text, annotators and annotations")
        label = re.split(" detection| in ", str(item.get("annotation task") or "label"))[0]
        found = lewidi_answers(f"{path}: {place}", item)
        empty += not found
        for user, labels in found:
            split = str(item.get("split") or "")
            rows.append({"text": lewidi_text(item), "user": user, "split": split,
                         label: labels if labels else ""})
            places.append(f"{place}, {user}")
    notes = [f"left out: {empty:,} items without annotations"] if empty else []
    table = Table("LeWiDi JSON", rows, places, ["text"], "user", split="split", notes=notes)
    table.labels = [c for c in table.columns if c not in ("text", "user", "split")]
    return table


# -------------------- Label Studio

CHOSEN = ("choices", "rating", "number")  # the kinds of answers that are labels of a whole text


def is_label_studio(record):
    return isinstance(record.get("data"), dict) and (
        isinstance(record.get("annotations", record.get("completions")), list))


def read_label_studio(path, records):
    """The Table of Label Studio's JSON: a row for each annotation, a column for each control."""
    rows = []
    places = []
    left_out = Counter()
    controls = {}
    for place, task in records:
        check(is_label_studio(task), f"{path}: {place}: not a task with data and annotations")
        left_out["predictions of a model"] += len(task.get("predictions") or [])
        for done in task.get("annotations", task.get("completions")):
            if done.get("was_cancelled"):
                left_out["annotations that were skipped"] += 1
                continue
            answers = chosen_answers(done, left_out)
            controls |= answers
            row = {name: cell_of(value) for name, value in task["data"].items()}
            row["annotator"] = person(done.get("completed_by"))
            rows.append(row | answers)
            places.append(f"{place}, annotation {done.get('id', '')}")
    for row in rows:  # who submitted without a choice chose nothing
        for control in controls:
            row.setdefault(control, [])
    notes = [f"left out: {n:,} {what}" for what, n in left_out.items() if n]
    check(controls, f"{path}: Label Studio's JSON without choices or ratings; {'; '.join(notes)}")
    return Table("Label Studio JSON", rows, places, [], "annotator", list(controls), notes=notes)


def chosen_answers(done, left_out):
    """dict control -> list of what was chosen in one annotation; other answers are counted."""
    found = {}
    for answer in done.get("result") or []:
        kind = answer.get("type")
        if kind not in CHOSEN:
            left_out[f"answers of the kind {kind!r}"] += 1
            continue
        value = answer["value"].get(kind)
        chosen = cell_of(value if isinstance(value, list) else [value])
        control = answer.get("from_name", "label")
        found[control] = found.get(control, []) + chosen
    return found


def person(value):
    """The ID of a user that Label Studio names by a number, an address or a record."""
    if isinstance(value, dict):
        value = value.get("email") or value.get("id")
    return cell_of(value)


# -------------------- Prodigy

def is_prodigy(record):
    return record.get("answer") in ("accept", "reject", "ignore")


def read_prodigy(path, records):
    """The Table of Prodigy's JSONL: choices out of options, or yes and no to one label."""
    rows = []
    places = []
    ignored = 0
    asked = set()
    for place, task in records:
        check(is_prodigy(task), f"{path}: {place}: no answer: accept, reject or ignore")
        choice = "accept" in task
        check(choice or isinstance(task.get("label"), str),
              f"{path}: {place}: Prodigy's JSONL without choices or a label (spans?)")
        if task["answer"] == "ignore" or choice and task["answer"] == "reject":
            ignored += 1
            continue
        row = {name: cell_of(value) for name, value in task.items()}
        if choice:
            row["accept"] = chosen_options(task)
        else:
            asked.add(task["label"])
            row[task["label"]] = str(int(task["answer"] == "accept"))
        rows.append(row)
        places.append(place)
    check(len(asked) < 2, f"{path}: yes or no to one of {len(asked)} labels in each row "
          f"({', '.join(sorted(asked))[:100]}): give the rows of one label, in a file of their own")
    check(rows, f"{path}: Prodigy's JSONL without an accepted answer")
    users = [column for column in ("_annotator_id", "_session_id") if column in rows[0]]
    user = users[0] if users else ""
    notes = [f"left out: {ignored:,} answers that were ignored or rejected"] if ignored else []
    labels = sorted(asked) or ["accept"]
    return Table("Prodigy JSONL", rows, places, [], user, labels, notes=notes)


def chosen_options(task):
    """list of the chosen options; by what was shown where their IDs are only numbers."""
    shown = {}
    for option in task.get("options") or []:
        known = str(option.get("id", ""))
        shown[known] = option.get("text") if known.isdigit() and option.get("text") else known
    return [str(shown.get(str(known), known)) for known in task["accept"]]


# -------------------- doccano, Potato's JSONL, and plain records

def is_doccano(record):
    labels = record.get("label", record.get("labels", record.get("annotations")))
    text = record.get("text", record.get("data"))
    return isinstance(labels, list) and isinstance(text, str)


def read_doccano(path, records):
    """The Table of doccano's JSONL: a list of labels in each record; mostly no user in it."""
    rows = []
    places = []
    first = records[0][1]
    column = next(c for c in ("label", "labels", "annotations") if isinstance(first.get(c), list))
    for place, record in records:
        given = record.get(column) or []
        check(isinstance(given, list), f"{path}: {place}: {column!r} is no list")
        spans = any(isinstance(x, list) or "start_offset" in str(x) for x in given)
        check(not spans, f"{path}: {place}: {column!r} marks places in the text, not the text")
        row = {name: cell_of(value) for name, value in record.items()}
        answers = [row]
        if given and isinstance(given[0], dict):
            by_user = labels_by_user(f"{path}: {place}: {column!r}", given)
            answers = [row | {"user": user, column: by_user[user]} for user in by_user]
        rows += answers
        places += [place] * len(answers)
    text = ["text" if "text" in first else "data"]
    user = "user" if "user" in rows[0] else ""
    return Table("doccano JSONL", rows, places, text, user, [column], one_file_a_user=not user)


def labels_by_user(where, given):
    """dict user -> list of labels, of old doccano's records of them."""
    found = defaultdict(list)
    for answer in given:
        told = isinstance(answer, dict) and {"user", "label"} <= answer.keys()
        check(told, f"{where} holds records without user and label")
        found[str(answer["user"])].append(str(answer["label"]))
    return found


def is_potato(record):
    return isinstance(record.get("label_annotations"), dict)


def read_potato(path, records):
    """The Table of Potato's JSONL, in which the answers stand in a dict of dicts."""
    rows = []
    for place, record in records:
        check(is_potato(record), f"{path}: {place}: no label_annotations")
        row = {name: cell_of(x) for name, x in record.items() if name != "label_annotations"}
        for schema, ticks in record["label_annotations"].items():
            for label, value in ticks.items():
                row[f"{schema}:::{label}"] = cell_of(value)
        rows.append(row)
    table = with_ticks(Table("JSONL", rows, [place for place, _ in records]))
    table.one_file_a_user = True
    return table


def read_records(path, records):
    """The Table of plain records; what is nested in them is no cell."""
    rows = [{name: cell_of(value) for name, value in record.items()} for _, record in records]
    return Table("JSON records", rows, [place for place, _ in records])


FORMATS = [  # is a record of this form? its reader; the first that fits
    (is_lewidi, read_lewidi), (is_label_studio, read_label_studio), (is_prodigy, read_prodigy),
    (is_potato, read_potato), (is_doccano, read_doccano), (lambda record: True, read_records)]


def read_file(path, encoding=""):
    """The Table of a file of any form."""
    with open(path, "rb") as f:
        text, encoding = decode(path, f.read(), encoding)
    if text.lstrip()[:1] not in ("[", "{"):
        return read_table(path, text, encoding)
    records = records_of(path, *parse_json(path, text))
    reader = next(read for fits, read in FORMATS if fits(records[0][1]))
    table = reader(path, records)
    check(table.rows, f"{path}: {table.form} without annotations; {'; '.join(table.notes)}")
    return table
