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
import os
import re
import sys
from collections import Counter, defaultdict

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import known  # noqa: E402
from cells import (  # noqa: E402
    any_number_of, check_no_lists, check_users, few, is_missing, one_choice, spelling, split_cell,
    user_id, word_of, zero_one)
from formats import SPLITS, Table, named_lines, read_file  # noqa: E402
from plm import BadInput, check, split_of, text_id  # noqa: E402

PARTS = ("train", "val", "test")
FORM = ("text", "user", "split", "time")  # columns that are no labels


# -------------------- which column is what: a flag, the form of the file, or a name says it

TEXTS = ("text comment commenttext tweet tweettext sentence post message body content utterance "
         "document displayedtext").split()
USERS = ("user userid username annotator annotatorid annotatorname worker workerid rater raterid "
         "reader readerid coder coderid judge judgeid participant participantid prolificid "
         "labeler labelerid annotatedby completedby").split()
LABELS = "label labels annotation rating answer class".split()
TOOLS = re.compile("^(input:|assignment:|output:|input[.]|answer[.])", re.IGNORECASE)
NAMELESS = re.compile(r"\(column \d+\)|Unnamed: \d+")  # the numbers of rows, mostly
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
    check(found, f"no column is named like a text: say --text-col (there are: {there}); a text that "
          "stands in another file has to be joined by its ID first")
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
    there = few(table.columns, 40)
    check(found, f"no column is named like a user: say --user-col or, where each user has a column, "
          f"--user-cols A,B,C (there are: {there})")
    check(len(found) == 1, f"{few(found)} may be who annotated: say --user-col")
    return found[0]


def is_split(table, column):
    """Does the column say which row is for training, validation and test?"""
    values = {word_of(row.get(column)) for row in table.rows} - {""}
    return bool(values) and values <= SPLITS.keys()


def choose_splits(table, flag, taken):
    """(the column of the split or "", list of the columns of further splits)"""
    if flag == "none":
        return "", []
    rest = [column for column in table.columns if column not in taken]
    named = [column for column in rest if column.lower() == "split"]
    if flag:
        named = said(table, "--split-col", flag)
    for column in named:
        for place, row in zip(table.places, table.rows):
            word = word_of(row.get(column))
            check(not word or word in SPLITS, f"{place}: {column!r} is {word!r}, not train, val or "
                  "test; --split-col none ignores it")
    found = [column for column in rest if is_split(table, column)]
    first = [column for column in (*named, table.split) if column in found]
    if len(found) == 1:
        first = found
    if not first:
        return "", found
    return first[0], [column for column in found if column != first[0]]


def choose_time(table, flag):
    """The column of the time, which plm.py does not read and vary.py does; "" if there is none."""
    if flag:
        return said(table, "--time-col", flag)[0]
    named = [column for column in table.columns if column.lower() == "time"]
    return named[0] if named else ""


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
    rest = [c for c in rest if not NAMELESS.match(c)]
    rest = [c for c in rest if ANSWERS.match(c)] or rest
    kinds = defaultdict(list)
    for column in rest:
        spelled = spelling(cells_of(table, column))
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


# -------------------- what is blank, what is missing, and several in one cell

def cells_of(table, column):
    """list of the cells of a column; "" where a record has no such field."""
    return [row.get(column, "") for row in table.rows]


def fill_blanks(table, columns, options):
    """list of the columns in which blank was read as 0: those that are ticked or blank, with any
    one mark for a tick, or with --blank 0 all columns of labels."""
    filled = []
    for column in columns:
        cells = cells_of(table, column)
        lists = bool(options.list_sep) or any(isinstance(cell, list) for cell in cells)
        ticked = not lists and (spelling(cells) or ("?", ""))[0] == ""
        if not (ticked or options.blank) or all(word_of(cell) or cell == [] for cell in cells):
            continue
        for row, cell in zip(table.rows, cells):
            if isinstance(cell, str) and not cell.strip():
                row[column] = [] if lists else "0"
            elif ticked and not is_missing(cell):
                row[column] = "1"
        filled.append(column)
    return filled


def drop_missing(table, text, user, labels, options):
    """list of notes; rows in which a cell is missing are left out if a flag says so, else refused."""
    missing = {}
    for i, row in enumerate(table.rows):
        empty = [column for column in labels if is_missing(row.get(column))]
        if is_missing(row.get(user)) or word_of(row.get(user)) == "none":
            empty = [user]
        if all(is_missing(row.get(column)) for column in text):
            empty = [" + ".join(text)]
        if empty:
            missing[i] = empty[0]
    for i, column in missing.items():
        ticks = column in labels and (len(labels) > 1 or options.list_sep)
        hint = "; --blank 0: a blank is a 0" if ticks else ""
        check(options.skip_missing, f"{table.places[i]}: no {column!r} "
              f"(--skip-missing: {len(missing):,} rows less{hint})")
    kept = [i for i in range(len(table.rows)) if i not in missing]
    check(kept, f"no row has {few([*text, user, *labels])}")
    table.rows = [table.rows[i] for i in kept]
    table.places = [table.places[i] for i in kept]
    left_out = Counter(missing.values())
    return [f"left out: {n:,} rows without {column!r}" for column, n in left_out.items()]


def split_lists(table, user, columns, mark):
    """None; splits cells by --list-sep: answers into lists, several people into rows of their own
    where there is an answer for each of them."""
    people = []
    for place, row in zip(table.places, table.rows):
        people.append(split_cell(place, row.get(user), mark))
    parallel = len(columns) == 1 and any(len(names) > 1 for names in people)
    rows = []
    places = []
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


def columns_to_rows(table, columns):
    """The Table with a row for each user instead of a column, and the blanks that were left out."""
    rows = []
    places = []
    blanks = 0
    for place, row in zip(table.places, table.rows):
        rest = {name: cell for name, cell in row.items() if name not in columns}
        for column in columns:
            if is_missing(row.get(column)):
                blanks += 1
                continue
            rows.append(rest | {"user": column, "label": row[column]})
            places.append(f"{place}, {column}")
    check(rows, f"{few(columns)}: nothing in these columns")
    notes = [f"left out: {blanks:,} blanks in the columns of users"] if blanks else []
    return Table(table.form, rows, places, table.text, "user", ["label"], table.split,
                 notes=table.notes + notes)


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
    first = tables[0]
    whole = Table(first.form, [], [], first.text, first.user, split=first.split)
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
    if options.user_cols:
        table = columns_to_rows(table, said(table, "--user-cols", options.user_cols))
    text = choose_text(table, options.text_col)
    user = choose_user(table, options.user_col)
    split, draws = choose_splits(table, options.split_col, [*text, user])
    time = choose_time(table, options.time_col)
    taken = [*text, user, split, *draws, time]
    labels = choose_labels(table, options, taken)
    twice = [column for column in labels if column in taken]
    check(not twice, f"{few(twice)}: a label, and also the text, the user, the time or the split?")
    if options.list_sep not in (None, "none"):
        split_lists(table, user, labels, options.list_sep)
    filled = fill_blanks(table, labels, options)
    notes = table.notes + drop_missing(table, text, user, labels, options)
    if filled:
        notes.append(f"blank was read as 0, not ticked, in: {few(filled, 40)}")
    columns = {"text": [text_of(row, text) for row in table.rows],
               "user": users_of(table, user, options)}
    if split:
        columns["split"] = parts_of(table, split)
    if time:
        columns["time"] = cells_of(table, time)
    for draw in draws:
        columns[draw] = parts_of(table, draw)
    found, words = labels_of(table, labels, options, notes)
    clash = [name for name in found if name.lower() in (*FORM, *draws)]
    check(not clash, f"a label has the name {few(clash)}, as a column of the form: rename it")
    lines = [f"text: {' + '.join(text)} · user: {user} · split: {split or 'by a hash of the text'}",
             f"labels: {few(labels, 40)}: {words}"]
    if draws:
        lines.append(f"further splits: {few(draws, 40)}")
    rest = [c for c in table.columns if c not in (*taken, *labels)]
    rest = [c for c in rest if c.partition(":::")[0] not in labels]
    if rest:
        lines.append(f"not taken: {few(rest, 40)}")
    return columns | found, lines + notes


def text_of(row, columns):
    """The text of a row; that of several columns is named lines."""
    parts = {column: row.get(column) or "" for column in columns}
    for column, part in parts.items():
        check(isinstance(part, str), f"column {column!r} holds lists, not a text")
    text = named_lines(parts) if len(columns) > 1 else parts[columns[0]]
    return re.sub("[\ud800-\udfff]", "\ufffd", text)  # halves of letters, which no file can hold


def users_of(table, column, options):
    """list of the users' IDs."""
    cells = cells_of(table, column)
    for place, cell in zip(table.places, cells):
        check(isinstance(cell, str), f"{place}: {column!r} is a list: several people in one record? "
              "--list-sep json makes a row of each")
    check_no_lists(column, cells, table.places, options.list_sep)
    users = [user_id(cell) for cell in cells]
    check_users(users)
    return users


def parts_of(table, column):
    """list of the splits that the rows are in; "" is in none."""
    return [SPLITS.get(word_of(cell), "") for cell in cells_of(table, column)]


def labels_of(table, columns, options, notes):
    """(dict name of a label column -> its cells, what they are in words)"""
    if len(columns) > 1:
        found = {}
        for column in columns:
            found[column] = zero_one(column, cells_of(table, column), table.places)
        if all(cells.count("1") == 1 for cells in zip(*found.values())):
            notes.append("NOTE: every row has exactly one of the labels; one column that names it "
                         "would be a single choice")
        return {TOOLS.sub("", column): cells for column, cells in found.items()}, "any number of them"
    column = columns[0]
    cells = cells_of(table, column)
    if any(isinstance(cell, list) for cell in cells):
        lists = [cell if isinstance(cell, list) else [cell] for cell in cells]
        if any(len(set(words)) != 1 for words in lists):
            return any_number_of(column, lists)
        cells = [words[0] for words in lists]
    cells = [cell.strip() for cell in cells]
    check_no_lists(column, cells, table.places, options.list_sep)
    cells, words = one_choice(column, cells, notes)
    return {TOOLS.sub("", column): cells}, words


# -------------------- what was written, in numbers

def what_is_odd(columns):
    """list of lines: what is in the rows that may not have been meant."""
    labels = [c for c in columns if c not in FORM and not set(columns[c]) <= {*PARTS, ""}]
    split = columns.get("split") or [split_of(text) for text in columns["text"]]
    lines = odd_people(columns, list(zip(*(columns[label] for label in labels))))
    where = defaultdict(set)
    for text, part in zip(columns["text"], split):
        where[text_id(text)].add(part)
    empty = [part for part in PARTS if part not in split]
    if empty:
        lines.append(f"NOTE: no row is in {few(empty)}, and plm.py needs all three: give the files of "
                     "all splits, or say --split-col none")
    twice = sum(len(parts - {""}) > 1 for parts in where.values())
    if twice:
        lines.append(f"NOTE: {twice:,} texts are in two splits")
    for label in labels:
        seen = Counter(zip(split, columns[label]))
        values = {value for _, value in seen}
        if len(values) == 1:
            lines.append(f"NOTE: {label!r} is {few(values)} in every row: leave it out by --labels")
            continue
        late = sorted(value for value in values if "train" in split and not seen["train", value])
        if late:
            n = sum(seen["val", value] + seen["test", value] for value in late)
            lines.append(f"NOTE: no training row has {label} {few(late)}, {n:,} other rows have")
    return lines


def odd_people(columns, answers):
    """list of lines: who answered a text twice, and users of one row."""
    lines = []
    pairs = defaultdict(set)
    for text, user, answer in zip(columns["text"], columns["user"], answers):
        pairs[text, user].add(answer)
    repeated = len(answers) - len(pairs)
    differ = sum(len(found) > 1 for found in pairs.values())
    if repeated:
        lines.append(f"NOTE: {repeated:,} rows repeat a text and user")
    if differ:
        lines.append(f"NOTE: {differ:,} times one person gave one text different answers: is each "
                     "of several choices in a row of its own, or is the user no person?")
    if len(set(columns["user"])) == len(answers):
        lines.append("NOTE: every row has a user of its own: nothing can be learned about a user")
    cases = Counter(user.lower() for user in set(columns["user"]))
    alike = [user for user, n in cases.items() if n > 1]
    if alike:
        lines.append(f"NOTE: users whose IDs differ in case alone: {few(alike)}")
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
    p.add_argument("--user-cols", metavar="A,B", help="columns of one user's answers each")
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
    if args.known:
        given = [key for key, value in vars(args).items() if value and key not in ("known", "dir")]
        check(not given, f"{args.known} takes no --{few(given).replace('_', '-')}")
    if args.known in known.AS_THE_PAPER:
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
