"""Tests of prepare.py on small files of the true forms of annotations, made here; no network."""
import csv
import json
import os
import pathlib
import sys
from collections import Counter

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import prepare  # noqa: E402


def run(folder, files, *flags):
    """The rows of the CSV that is written of files: dict name -> str, bytes, or value of JSON."""
    paths = []
    for name, content in files.items():
        if not isinstance(content, (str, bytes)):
            content = json.dumps(content)
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        paths.append(str(path))
    argv = ["--file", ",".join(paths), "--dir", str(folder / "made"), *flags]
    assert prepare.main(argv) == 0
    with open(folder / "made/annotations.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def refused(capsys, folder, files, *flags):
    """The one line of an error."""
    capsys.readouterr()
    with pytest.raises(AssertionError):
        run(folder, files, *flags)
    err = capsys.readouterr().err
    assert err.startswith("prepare.py: ")
    assert err.count("\n") == 1
    assert not (folder / "made").exists()
    return err


def table(rows, header, mark=","):
    """The text of a table."""
    return "\n".join(mark.join(map(str, row)) for row in [header.split(), *rows]) + "\n"


def short(rows, labels):
    """list of "text user labels" of rows."""
    return [" ".join([row["text"], row["user"], *(row[x] for x in labels)]) for row in rows]


# -------------------- dialects of tables

A_B = [dict(text="a, b", user="u", calm="1"), dict(text="c", user="v", calm="0")]


@pytest.mark.parametrize("content, said", [
    ('\ufefftext,user,calm\r\n"a, b",u,1\r\nc,v,0\r\n', "comma, UTF-8"),
    ('text;user;calm\n"a, b";u;1\nc;v;0\n', "semicolon"),
    ("sep=;\ntext;user;calm\na, b;u;1\nc;v;0\n", "semicolon"),
    ("\ufefftext\tuser\tcalm\na, b\tu\t1\nc\tv\t0", "tab"),
    ("text|user|calm\na, b|u|1\nc|v|0", "bar"),
    ('text,user,calm\r"a, b",u,1\rc,v,0\r', "comma"),
    ('"text","user","calm",\n\n"a, b","u","1",\n"c","v","0",\n', "comma"),
    (',text,user,calm\n0,"a, b",u,1\n1,c,v,0\n', "comma"),
    ("text\tuser\tcalm\na, b\tu\t1\nc\tv\t0\n".encode("utf-16"), "tab, utf-16")])
def test_a_table_in_any_dialect(tmp_path, capsys, content, said):
    assert run(tmp_path, {"a.csv": content}) == A_B
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", [
    "cut, with a comma", 'a "quoted"\nline\r\nbreak', "\U0001f600", " space ", "a;b\tc|d",
    "</s> ### Response: <|endoftext|>", "x" * 1_000_000, 'one, 1\n"two", u, 0\nthree, v, 1'])
def test_any_text_survives_quoting(tmp_path, text):
    path = tmp_path / "a.csv"
    rows = [("text", "user", "calm"), (text, "u", 1), ("b", "v", 0), ("c", "u", 0)]
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows(rows)
    assert run(tmp_path, {"a.csv": path.read_bytes()})[0] == dict(text=text, user="u", calm="1")


def test_a_table_without_quoting_keeps_its_marks_and_all_of_its_rows(tmp_path, capsys):
    texts = ['"never closed', 'a "word" inside', '"all" of it', '"so" they say', "plain", '"']
    rows = [(text, user, i % 2) for i, text in enumerate(texts) for user in "uv"]
    found = run(tmp_path, {"a.tsv": table(rows, "text user rude", "\t")})
    assert [row["text"] for row in found] == [text for text in texts for _ in "uv"]
    assert "without quoting" in capsys.readouterr().out
    assert len(run(tmp_path, {"a.csv": table(rows, "text user rude")})) == len(rows)


def test_an_open_quotation_mark_that_swallows_rows_is_named(tmp_path, capsys):
    rows = [("one", "u", 1), ('"two', "v", 0), ("three", "u", 1), ('four"', "v", 0), ("five", "u", 1)]
    rows = rows + [("six", "u", 0)] * 3
    uneven = table(rows + [('"a\tb"', "u", 0)], "text user rude", "\t")  # no way to read it unquoted
    says = refused(capsys, tmp_path, {"a.tsv": uneven})
    assert "row 2" in says or "line 5" in says
    closed = table([("one", "1", "u"), ('"two', "0", "v"), ('three"', "1", "u")], "text rude user")
    closed += '"a, b",1,u\n'
    assert "line 4" in refused(capsys, tmp_path, {"a.csv": closed})


def test_backslashes_before_quotation_marks(tmp_path, capsys):
    content = 'text,user,calm\n"he said \\"no, no\\"",u,1\n"b",v,0\n'
    assert run(tmp_path, {"a.csv": content})[0]["text"] == 'he said "no, no"'
    assert "backslashes" in capsys.readouterr().out


def test_cp1252_is_read_and_said_and_other_code_pages_are_asked_for(tmp_path, capsys):
    content = table([("caf\xe9 \x93so\x94".encode("latin-1").decode("cp1252"), "u", 1), ("b", "v", 0)],
                    "text user calm")
    rows = run(tmp_path, {"a.csv": content.encode("cp1252")})
    assert rows[0]["text"] == "caf\xe9 \u201cso\u201d"
    assert "cp1252, not UTF-8" in capsys.readouterr().out
    russian = table([("привет как дела", "u", 1), ("да", "v", 0)], "text user calm")
    rows = run(tmp_path, {"a.csv": russian.encode("cp1251")}, "--encoding", "cp1251")
    assert rows[1]["text"] == "да"
    for name in os.listdir(tmp_path / "made"):
        (tmp_path / "made" / name).unlink()
    (tmp_path / "made").rmdir()
    assert "--encoding" in refused(capsys, tmp_path, {"a.csv": russian.encode("cp1251")})
    mixed = content.encode("cp1252") + "é,u,1\n".encode()
    assert "line 2 is not UTF-8 while other lines are" in refused(capsys, tmp_path, {"a": mixed})
    assert "no such encoding" in refused(capsys, tmp_path, {"a": mixed}, "--encoding", "x9")


@pytest.mark.parametrize("content, says", [
    ("", "nothing in it"), ("  \n", "nothing in it"), ("text,user,a\n", "no annotations"),
    ("text\nt\n", "one column"), (b"PK\x03\x04rest", "xlsx"), (b"\x1f\x8b\x08", "gzip"),
    ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ("\n<!DOCTYPE html>", "a web page"), (b"t\0e\0x\0t\0", "NUL"), (b"PAR1xx", "Parquet"),
    ("text,user,a,b\nt,u,1,1\n\nt,u,1", "row 2 (line 4): 3 cells, not the 4 columns"),
    ('text,user,a\n"t\nt",u,1\nt,u', "row 2 (line 4)"),
    ("text user a\n1 t u 1\n2 s v 0\n".replace(" ", "\t"), "one more than the header"),
    ("text,user,user,b\nt,u,1,1", "2 columns 'user'"),
    ("good day,ann,1\nbad day,ann,0\ngood day,bob,1\n", "no header?"),
    ("http://a.b\tA17G\tno\nhttp://a.b\tA18G\tno\nhttp://a.c\tA17G\tyes\n", "no header?"),
    ('{"a": [1,}', "not valid"), ('{"a": 1}\n{"a": 2\n', "line 2"), ('"text"', "one column"),
    ("[1, 2]", "not a record"), ("[]", "no list of records"),
    ('[{"text": "t", "text": "s"}]', "'text' stands twice")])
def test_what_is_no_table_of_annotations_is_named(tmp_path, capsys, content, says):
    assert says in refused(capsys, tmp_path, {"a.csv": content})


# -------------------- which column is what

@pytest.mark.parametrize("header, flags, says", [
    ("words who calm", "", "named like a text: say --text-col (there are: words, who, calm)"),
    ("text who calm", "", "named like a user: say --user-col"),
    ("text user worker", "--label-col user", "user, worker may be who annotated"),
    ("tweet comment user", "", "tweet, comment may be the text"),
    ("text user mood", "", "no column of 0 and 1 (mood)"),
    ("text user calm", "--labels calm,sad", "no column 'sad'; there are: text, user, calm"),
    ("text user calm", "--labels calm --label-col calm", "not both"),
    ("text user calm", "--label-col user", "user: a label, and also"),
    ("text user split", "--label-col split", "not train, val or test"),
    ("text user calm", "--text-col text --user-col text,user", "--user-col: one column")])
def test_a_column_that_is_not_clear_is_asked_for(tmp_path, capsys, header, flags, says):
    rows = [(f"t{i}", f"u{i % 3}", f"w{i % 4}") for i in range(12)]
    assert says in refused(capsys, tmp_path, {"a.csv": table(rows, header)}, *flags.split())


def test_labels_are_the_columns_of_one_spelling(tmp_path, capsys):
    rows = [("t", "u", 0, "TRUE", "false", "m", 9), ("s", "v", 1, "false", "false", "f", 8)]
    header = "text user calm angry sad sex age"
    content = {"a.csv": table(rows, header)}
    says = refused(capsys, tmp_path, content)
    assert "calm (0/1); angry, sad (false/true): say --labels" in says
    found = run(tmp_path, content, "--labels", "calm,angry")
    assert short(found, ["calm", "angry"]) == ["t u 0 1", "s v 1 0"]
    assert "not taken: sad, sex, age" in capsys.readouterr().out
    found = run(tmp_path, {"a.csv": table([row[:2] + row[3:] for row in rows],
                                          "text user angry sad sex age")})
    assert list(found[0]) == ["text", "user", "angry", "sad"]
    found = run(tmp_path, content, "--label-col", "calm")
    assert list(found[0]) == ["text", "user", "calm"]


@pytest.mark.parametrize("cells, made, said", [
    ("0 1 1", "0 1 1", "0 or 1"), ("1.0 0.0 1", "1 0 1", "0 or 1"), ("1,0 0,0 1", "1 0 1", "0 or 1"),
    ("yes No YES", "1 0 1", "0 or 1"), ("True false true", "1 0 1", "0 or 1"),
    ("WAHR FALSCH FALSCH", "1 0 0", "0 or 1"), ("ja nein ja", "1 0 1", "0 or 1"),
    ("vrai faux faux", "1 0 0", "0 or 1"), ("oui non oui", "1 0 1", "0 or 1"),
    ("3 1 10", "3 1 10", "ratings 1, 3, 10"), ("2 2.0 1.5", "2 2 1.5", "ratings 1.5, 2"),
    ("1 -1 0", "1 -1 0", "ratings -1, 0, 1"), ("0,5 1,0 1", "0.5 1 1", "ratings 0.5, 1"),
    ("\u22121 +1 0", "-1 1 0", "ratings -1, 0, 1"), ("joy fear joy", "joy fear joy", "fear, joy"),
    ("1000001 1000002 1000001", "1000001 1000002 1000001", "ratings"),
    ("Joy joy fear", "Joy Joy fear", "taken as one class: joy"),
    ("1 2 99", "1 2 99", "is 99 in 'X' a rating"), ("1 2.0 never", "1 2 never", "numbers and words"),
    ("joy/love fear/awe joy/love", "joy/love fear/awe joy/love", "choice of fear/awe")])
def test_one_column_is_one_choice(tmp_path, capsys, cells, made, said):
    rows = [(f"t{i}", "u", cell) for i, cell in enumerate(cells.split())]
    found = run(tmp_path, {"a.csv": table(rows, "text user X", "\t")}, "--label-col", "X")
    assert " ".join(row["X"] for row in found) == made
    assert said in capsys.readouterr().out


def test_two_text_columns_are_named_lines_and_users_are_people(tmp_path):
    people = ["11.0", "11", "ann ", "ann", " 7.50", "1.10"]  # spreadsheets make 11.0 of 11
    rows = [("is it?", "no" if i else "", user, i % 2) for i, user in enumerate(people)]
    found = run(tmp_path, {"a.csv": table(rows, "context reply user a")}, "--text-col", "context,reply")
    assert [row["user"] for row in found] == ["11", "11", "ann", "ann", "7.50", "1.10"]
    assert found[0]["text"] == "context: is it?"
    assert found[1]["text"] == "context: is it?\nreply: no"


@pytest.mark.parametrize("ids, says", [
    (["3.91E+16", "4.12E+16"], "rounded by a spreadsheet"), (["3,91E+16", "x"], "rounded by a"),
    (["391000000000000001", "391000000000010000", "412000000000020000"], None),
    (["3910000000000100000", "3910000000000110000", "4120000000000120000"], "end in zeros"),
    (["ann,bob", "bob", "ann"], "several in one cell? --list-sep"), (["ann,bob", "ann;bob"], None)])
def test_ids_that_cannot_be_the_peoples_own(tmp_path, capsys, ids, says):
    rows = [("t", user, i % 2) for i, user in enumerate(ids)]
    content = {"a.tsv": table(rows, "text user calm", "\t")}
    if says:
        assert says in refused(capsys, tmp_path, content)
    else:
        assert len(run(tmp_path, content)) == len(ids)


# -------------------- missing, blank, several in one cell

@pytest.mark.parametrize("column, cell", [(0, "NA"), (1, " "), (1, "None"), (2, "nan"), (3, ""),
                                          (3, "NAN"), (2, "#N/A"), (0, "null")])
def test_a_missing_cell_is_named_or_on_demand_left_out_and_counted(tmp_path, capsys, column, cell):
    rows = [[f"t{i}", f"u{i % 3}", i % 2, 1 - i % 2] for i in range(12)]
    rows[1][column] = cell
    content = {"a.csv": table(rows, "text user calm sad")}
    name = ("text", "user", "calm", "sad")[column]
    says = refused(capsys, tmp_path, content)
    assert f"row 2 (line 3): no {name!r} (--skip-missing: 1 rows less" in says
    assert len(run(tmp_path, content, "--skip-missing")) == 11
    assert f"left out: 1 rows without {name!r}" in capsys.readouterr().out


def test_blank_is_not_ticked_where_a_column_is_ticked_or_blank(tmp_path, capsys):
    rows = [("t", "u", "x", ""), ("s", "v", "", ""), ("r", "u", "X", "x")]
    found = run(tmp_path, {"a.csv": table(rows, "text user calm sad")})
    assert short(found, ["calm", "sad"]) == ["t u 1 0", "s v 0 0", "r u 1 1"]
    assert "blank was read as 0, not ticked, in: calm, sad" in capsys.readouterr().out
    rows = [("t", "u", 1, 0), ("s", "v", "", 1), ("r", "u", 0, 1)]  # 0, 1 and blank: who knows
    content = {"a.csv": table(rows, "text user calm sad")}
    found = run(tmp_path, content, "--blank", "0")
    assert short(found, ["calm", "sad"]) == ["t u 1 0", "s v 0 1", "r u 0 1"]
    capsys.readouterr()
    assert prepare.main(["--file", str(tmp_path / "a.csv"), "--dir", str(tmp_path)]) == 2
    assert "--blank 0: a blank is a 0" in capsys.readouterr().err


@pytest.mark.parametrize("cells, flag, made", [
    ("a#b b a b#a", "#", "11 01 10 11"), ("a|b b a b|a", "|", "11 01 10 11"),
    ("a;b b a b;a", ";", "11 01 10 11"), ("a,b b a b,a", ",", "11 01 10 11"),
    ("a+b b a b+a", "+", "11 01 10 11"), ("a/b b a b/a", "/", "11 01 10 11"),
    ('["a"_"b"] ["b"] a b', "json", "11 01 10 01"), ("['a',_'b'] ['b'] ['a'] ['b']", "json", "11 01 10 01"),
    ('{"choices":["a","b"]} b a b', "json", "11 01 10 01"), ("a_b b a b", " ", "11 01 10 01")])
def test_several_answers_in_one_cell_are_split_by_a_flag_and_else_refused(
        tmp_path, capsys, cells, flag, made):
    cells = [cell.replace('"_"', '", "').replace("_", " ") for cell in cells.split()]
    rows = [(f"t{i}", "u", cell) for i, cell in enumerate(cells)]
    content = {"a.tsv": table(rows, "text user label", "\t")}
    if flag == " ":
        content = {"a.tsv": "\n".join("\t".join(row) for row in [("text", "user", "label"), *rows])}
    says = refused(capsys, tmp_path, content)
    assert f"--list-sep {flag}" in says or f'--list-sep "{flag}"' in says
    found = run(tmp_path, content, "--list-sep", flag)
    assert " ".join(row["a"] + row["b"] for row in found) == made
    (tmp_path / "made/annotations.csv").unlink()
    assert "label" in run(tmp_path, content, "--list-sep", "none")[0]


def test_several_people_in_one_row_become_rows_of_their_own(tmp_path, capsys):
    rows = [("t", "ann;bob;cem", "1;0;1"), ("s", "bob;ann", "0;0"), ("r", "cem", "1")]
    content = {"a.csv": table(rows, "text annotators votes")}
    flags = ["--user-col", "annotators", "--label-col", "votes"]
    assert "--list-sep" in refused(capsys, tmp_path, content, *flags)
    found = run(tmp_path, content, *flags, "--list-sep", ";")
    assert short(found, ["votes"]) == ["t ann 1", "t bob 0", "t cem 1", "s bob 0", "s ann 0", "r cem 1"]
    (tmp_path / "made/annotations.csv").unlink()
    (tmp_path / "made").rmdir()
    rows[1] = ("s", "bob;ann", "0")
    says = refused(capsys, tmp_path, {"a.csv": table(rows, "text annotators votes")}, *flags,
                   "--list-sep", ";")
    assert "2 in 'annotators' and 1 in 'votes'" in says


def test_a_column_for_each_user(tmp_path, capsys):
    rows = [("t", "joy", "fear", ""), ("s", "joy", "joy", "fear"), ("r", "fear", "joy", "joy")]
    content = {"a.csv": table(rows, "text ann1 ann2 ann3")}
    assert "--user-cols A,B,C" in refused(capsys, tmp_path, content)
    found = run(tmp_path, content, "--user-cols", "ann1,ann2,ann3")
    assert short(found, ["label"])[:3] == ["t ann1 joy", "t ann2 fear", "s ann1 joy"]
    assert len(found) == 8
    assert "left out: 1 blanks" in capsys.readouterr().out


@pytest.mark.parametrize("values, says", [
    (range(101), "101 values"), ([f"a remark of mine {i}" for i in range(60)], "60 values in 60 rows"),
    (["0,12", "1,234", "2,7"], "several in one cell?|3 values")])
def test_a_column_that_is_no_choice(tmp_path, capsys, values, says):
    rows = [(f"t{i}", "u", value) for i, value in enumerate(values)]
    content = {"a.tsv": table(rows, "text user label", "\t")}
    if says == "several in one cell?|3 values":
        found = run(tmp_path, content)  # words, as no decimal comma can be told from a list
        assert found[0]["label"] == "0,12"
    else:
        assert says in refused(capsys, tmp_path, content)


# -------------------- splits and several files

def test_a_split_column_is_kept_and_further_ones_too(tmp_path, capsys):
    parts = "train Training val dev valid validation test TEST none train test".split()
    rows = [(f"t{i % 10}", f"u{i % 4}", i % 2, part.replace("none", ""), part.replace("none", ""))
            for i, part in enumerate(parts)]
    want = ["train"] * 2 + ["val"] * 4 + ["test"] * 2 + ["", "train", "test"]
    found = run(tmp_path, {"a.csv": table([row[:4] for row in rows], "text user a fold")})
    assert [row["split"] for row in found] == want
    assert "1 texts are in two splits" in capsys.readouterr().out
    found = run(tmp_path, {"a.csv": table(rows, "text user a draw1 draw2")})
    assert list(found[0]) == ["text", "user", "draw1", "draw2", "a"]
    assert [row["draw2"] for row in found] == want
    found = run(tmp_path, {"a.csv": table(rows, "text user a draw1 draw2")}, "--split-col", "draw2")
    assert list(found[0]) == ["text", "user", "split", "draw1", "a"]
    found = run(tmp_path, {"a.csv": table(rows, "text user a split fold")}, "--split-col", "none")
    assert list(found[0]) == ["text", "user", "a"]


def test_files_of_splits_become_one(tmp_path, capsys):
    files = {}
    for part, text in dict(train="a", dev="b", test="c").items():
        files[f"mood_{part}.csv"] = table([(text, "u", 1), (text, "v", 0)], "text user calm")
    found = run(tmp_path, files)
    assert [row["split"] for row in found] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    assert "make cls_p DATA=mood" in capsys.readouterr().out
    odd = dict(files)
    odd["mood_test.csv"] = table([("c", "u", 1, "dev")], "text user calm split")
    (tmp_path / "made/annotations.csv").unlink()
    (tmp_path / "made").rmdir()
    assert "'split' is 'dev', not test" in refused(capsys, tmp_path, odd)
    odd["mood_test.csv"] = table([("c", "u", 1)], "text user sad")
    assert "mood_test.csv: row 1 (line 2): no 'calm'" in refused(capsys, tmp_path, odd, "--labels", "calm")
    assert len(run(tmp_path, {"one.csv": files["mood_dev.csv"], "two.csv": files["mood_test.csv"]})) == 4
    assert "taken as one file" in capsys.readouterr().out


def test_what_is_odd_is_said(tmp_path, capsys):
    rows = [(f"t{i}", f"u{i % 3}", "calm", ("train", "val", "test")[i % 3]) for i in range(9)]
    rows += [("t0", "u0", "sad", "train"), ("t0", "U0", "sad", "train"), ("t0", "U0", "sad", "train")]
    rows += [("t5", "u1", "grief", "test")]
    run(tmp_path, {"a.csv": table(rows, "text user label split")})
    out = capsys.readouterr().out
    assert "no training row has label grief, 1 other rows have" in out
    assert "2 rows repeat a text and user" in out
    assert "1 times one person gave one text different answers" in out
    assert "differ in case alone: u0" in out
    rows = [(f"t{i}", f"u{i}", i % 2, 1 - i % 2, 0) for i in range(30)]
    run(tmp_path, {"a.csv": table(rows, "text user a b c")})
    out = capsys.readouterr().out
    assert "every row has a user of its own" in out
    assert "every row has exactly one of the labels" in out
    assert "'c' is 0 in every row" in out


# -------------------- the forms of JSON and of tools

def lewidi(text, annotators, annotations, split="train", task="irony detection"):
    return {"annotation task": task, "text": text, "annotators": annotators, "lang": "en",
            "annotations": annotations, "soft_label": {"0.0": 0.5, "1": 0.5}, "split": split,
            "number of annotations": 2, "other_info": {"level": 1.0}}


def test_lewidi_2025(tmp_path, capsys):
    parts = {"train": lewidi({"post": "p", "reply": "r"}, "Ann1,Ann2", {"Ann1": "0", "Ann2": "1"}),
             "dev": lewidi({"post": "q", "reply": ""}, "Ann2", {"Ann2": "1"}, "dev"),
             "test": lewidi({"post": "s", "reply": "r"}, "Ann1,Ann3", {"Ann3": "0"}, "test")}
    files = {f"MP_{part}.json": {"17": item} for part, item in parts.items()}
    found = run(tmp_path, files)
    assert found[0] == dict(text="post: p\nreply: r", user="Ann1", split="train", irony="0")
    assert short(found, ["split", "irony"])[2:] == ["post: q Ann2 val 1",
                                                    "post: s\nreply: r Ann3 test 0"]
    assert "LeWiDi JSON" in capsys.readouterr().out


def test_lewidi_two_labels_of_one_person_are_multi_label(tmp_path):
    item = lewidi({"context": "c", "statement": "s"}, "Ann1,Ann2,Ann2", {
        "Ann1": "neutral", "Ann2": "entailment,neutral"}, task="natural language inference")
    other = lewidi({"context": "d", "statement": "s"}, "Ann1", {"Ann1": "contradiction"}, "test")
    found = run(tmp_path, {"a.json": {"1": item, "2": other | {"annotation task": item["annotation task"]}}})
    assert [row["user"] for row in found] == ["Ann1", "Ann2", "Ann1"]
    names = ["contradiction", "entailment", "neutral"]
    assert ["".join(row[name] for name in names) for row in found] == ["001", "011", "100"]


def test_lewidi_2023(tmp_path, capsys):
    text = json.dumps(dict(prev_agent="hi", prev_user="", agent="so?", user="no"))
    items = {"1": lewidi(text, "Ann2,Ann3", "1,-3", task="abusivness detection"),
             "2": lewidi("{not JSON", "Ann2,Ann2", "0,1", task="abusivness detection"),
             "3": lewidi("masked", "Ann2", "", "test", task="abusivness detection")}
    found = run(tmp_path, {"a.json": items})
    assert found[0]["text"] == "prev_agent: hi\nagent: so?\nuser: no"
    assert [(row["user"], row["abusivness"]) for row in found] == [
        ("Ann2", "1"), ("Ann3", "-3"), ("Ann2", "0"), ("Ann2", "1")]
    out = capsys.readouterr().out
    assert "left out: 1 items without annotations" in out
    assert "ratings -3, 0, 1" in out
    (tmp_path / "made/annotations.csv").unlink()
    (tmp_path / "made").rmdir()
    items["2"]["annotations"] = "0"
    assert "item '2': 2 annotators and 1 annotations" in refused(capsys, tmp_path, {"a.json": items})
    meta = '{\n"Ann1": {\n"Age": "22",\n},\n}'  # as two of the tasks' files are
    assert "not valid" in refused(capsys, tmp_path, {"a.json": meta})


@pytest.mark.skipif("PLM_LEWIDI" not in os.environ, reason="PLM_LEWIDI names no folder of LeWiDi 2025")
@pytest.mark.parametrize("name, counts, labels", [
    ("Paraphrase", (1600, 200, 200), ["paraphrase"]),
    ("VariErrNLI", (1443, 181, 192), ["contradiction", "entailment", "neutral"])])
def test_lewidi_whole(tmp_path, name, counts, labels):
    folder = pathlib.Path(os.environ["PLM_LEWIDI"])
    parts = ("train", "dev", "test")
    found = run(tmp_path, {f"{p}.json": (folder / f"{name}_{p}.json").read_bytes() for p in parts},
                "--name", "x")
    n = Counter(row["split"] for row in found)
    assert (n["train"], n["val"], n["test"]) == counts
    assert list(found[0]) == ["text", "user", "split", *labels]
    if labels == ["paraphrase"]:
        assert {int(row["paraphrase"]) for row in found} == set(range(-5, 6))


def studio(text, *annotations):
    """A task of Label Studio; annotations: (completed_by, *results)."""
    done = [dict(id=i, completed_by=user, was_cancelled=user == 9, ground_truth=False,
                 result=list(results)) for i, (user, *results) in enumerate(annotations)]
    return dict(id=1, data=dict(text=text, ref_id=7), annotations=done, predictions=[{"result": []}])


def choice(name, *chosen):
    return dict(id="x", from_name=name, to_name="text", type="choices", value=dict(choices=chosen))


def test_label_studio(tmp_path, capsys):
    span = dict(from_name="ner", to_name="text", type="labels", value=dict(start=0, end=1, labels=["X"]))
    tasks = [studio("t", (1, choice("mood", "calm")), (dict(id=2, email="b@c.d"), choice("mood", "sad"), span)),
             studio("s", (1, choice("mood", "sad")), (9, choice("mood", "sad")))]
    found = run(tmp_path, {"project-1-at.json": tasks})
    assert short(found, ["mood"]) == ["t 1 calm", "t b@c.d sad", "s 1 sad"]
    out = capsys.readouterr().out
    for line in ("2 predictions", "1 annotations that were skipped", "answers of the kind 'labels'"):
        assert line in out
    tasks[0]["annotations"][0]["result"] = [choice("mood", "calm", "sad")]
    tasks[1]["annotations"][0]["result"] = []
    found = run(tmp_path, {"a.json": tasks})
    assert short(found, ["calm", "sad"]) == ["t 1 1 1", "t b@c.d 0 1", "s 1 0 0"]
    rating = dict(from_name="stars", to_name="text", type="rating", value=dict(rating=4))
    for task in tasks:
        for done in task["annotations"]:
            done["result"] += [rating]
    found = run(tmp_path, {"a.json": tasks}, "--label-col", "stars")
    assert [row["stars"] for row in found] == ["4", "4", "4"]
    capsys.readouterr()
    assert prepare.main(["--file", str(tmp_path / "a.json"), "--dir", str(tmp_path)]) == 2
    assert "mood, stars hold labels: say --label-col, as in mood" in capsys.readouterr().err


def test_label_studios_short_json_and_csv(tmp_path, capsys):
    rows = [dict(text="t", id=1, annotator=1, annotation_id=3, lead_time=2.5, label="calm"),
            dict(text="s", id=2, annotator=2, annotation_id=4, lead_time=1.5,
                 label=dict(choices=["calm", "sad"]))]
    found = run(tmp_path, {"a.json": rows})
    assert short(found, ["calm", "sad"]) == ["t 1 1 0", "s 2 1 1"]


def prodigy(text, user, answer="accept", **more):
    return dict(text=text, _input_hash=-7, _task_hash=5, answer=answer, _timestamp=1707211049,
                _annotator_id=f"set-{user}", _session_id=f"set-{user}", **more)


def lines(records):
    """JSON lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def test_prodigy(tmp_path, capsys):
    options = [dict(id="calm", text="Calm!"), dict(id=7, text="sad")]
    rows = [prodigy("t", "ann", options=options, accept=["calm"], _view_id="choice"),
            prodigy("t", "bob", options=options, accept=["calm", 7]),
            prodigy("s", "ann", "ignore", options=options, accept=[]),
            prodigy("s", "bob", options=options, accept=[])]
    found = run(tmp_path, {"a.jsonl": lines(rows)})
    assert short(found, ["calm", "sad"]) == ["t set-ann 1 0", "t set-bob 1 1", "s set-bob 0 0"]
    assert "left out: 1 answers that were ignored" in capsys.readouterr().out
    rows = [prodigy("t", "ann", label="RUDE"), prodigy("s", "ann", "reject", label="RUDE")]
    assert [row["RUDE"] for row in run(tmp_path, {"a.jsonl": lines(rows)})] == ["1", "0"]
    (tmp_path / "made/annotations.csv").unlink()
    (tmp_path / "made").rmdir()
    rows += [prodigy("s", "ann", label="SAD")]
    assert "one of 2 labels" in refused(capsys, tmp_path, {"a.jsonl": lines(rows)})
    rows = [prodigy("t", "ann", spans=[dict(start=0, end=1, label="X")])]
    assert "spans?" in refused(capsys, tmp_path, {"a.jsonl": lines(rows)})


def test_doccano(tmp_path, capsys):
    ann = lines([dict(id=1, text="t", label=["calm"]), dict(id=2, text="s", label=["sad"])])
    bob = lines([dict(id=1, text="t", label=["sad"]), dict(id=2, text="s", label=["sad"])])
    found = run(tmp_path, {"ann.jsonl": ann, "bob.jsonl": bob}, "--name", "mood")
    assert short(found, ["label"]) == ["t ann calm", "s ann sad", "t bob sad", "s bob sad"]
    assert "its name is taken, 'ann'" in capsys.readouterr().out
    old = lines([{"id": 1, "text": "t", "meta": {}, "annotation_approver": None, "annotations": [
        {"label": 2, "user": 1}, {"label": 3, "user": 1}, {"label": 3, "user": 5}]}])
    assert short(run(tmp_path, {"old.json": old}), "23") == ["t 1 1 1", "t 5 0 1"]
    (tmp_path / "made/annotations.csv").unlink()
    (tmp_path / "made").rmdir()
    assert "named like a user" in refused(capsys, tmp_path, {"ann.jsonl": ann})
    spans = lines([dict(id=1, text="t", label=[[0, 1, "X"]])])
    assert "marks places in the text" in refused(capsys, tmp_path, {"a.jsonl": spans})


def test_potato(tmp_path, capsys):
    header = "user instance_id displayed_text tone:::rude tone:::kind sure:::scale_5"
    rows = [("ann", 1, "t", 1, "", 3), ("bob", 1, "t", 1, 1, 5), ("ann", 2, "s", "", "", 1)]
    found = run(tmp_path, {"annotated_instances.tsv": table(rows, header, "\t")})
    assert short(found, ["kind", "rude"]) == ["t ann 0 1", "t bob 1 1", "s ann 0 0"]
    out = capsys.readouterr().out
    assert "blank was read as not ticked, in the columns of 'tone'" in out
    assert "not taken: instance_id, sure:::scale_5" in out
    found = run(tmp_path, {"a.tsv": table(rows, header, "\t")}, "--label-col", "sure:::scale_5")
    assert [row["sure:::scale_5"] for row in found] == ["3", "5", "1"]
    rows = [("ann", 1, "t", "", "2"), ("bob", 1, "t", "1", ""), ("ann", 2, "s", "", "2")]  # a radio
    found = run(tmp_path, {"a.tsv": table(rows, "user id displayed_text tone:::1 tone:::2", "\t")})
    assert [row["tone"] for row in found] == ["2", "1", "2"]
    record = dict(id="1", displayed_text="t", label_annotations=dict(tone=dict(rude="1")))
    other = dict(id="2", displayed_text="s", label_annotations=dict(tone=dict(kind="1")))
    found = run(tmp_path, {"ann.jsonl": lines([record, other]), "bob.jsonl": lines([record])})
    assert short(found, ["tone"]) == ["t ann rude", "s ann kind", "t bob rude"]


def test_toloka_and_mechanical_turk(tmp_path):
    content = ("INPUT:text\tOUTPUT:rude\tGOLDEN:rude\tHINT:text\tASSIGNMENT:worker_id\tASSIGNMENT:status\n"
               "t\tyes\t\t\tann\tAPPROVED\ns\tno\t\t\tann\tAPPROVED\n\nt\tno\t\t\tbob\tAPPROVED\n\n")
    assert short(run(tmp_path, {"a.tsv": content}), ["rude"]) == ["t ann 1", "s ann 0", "t bob 0"]
    content = ('"HITId","Title","WorkerId","AssignmentStatus","Input.text","Answer.tone.label","Approve","Reject"\n'
               '"3X","Judge","A1","Submitted","t, so","calm","x",""\n"3X","Judge","A2","Submitted","t, so","sad","x",""\n')
    found = run(tmp_path, {"Batch_1_batch_results.csv": content})
    assert short(found, ["tone.label"]) == ["t, so A1 calm", "t, so A2 sad"]


@pytest.mark.parametrize("value", [
    [dict(text="t", user=1, calm=True, meta=dict(a=1)), dict(text="s", user=2, calm=False, meta=None)],
    lines([dict(text="t", user=1, calm=1), dict(text="s", user=2.0, calm=0)]),
    {"text": {"0": "t", "1": "s"}, "user": {"0": 1, "1": 2}, "calm": {"0": 1, "1": 0}},
    {"text": ["t", "s"], "user": [1, 2], "calm": ["yes", "no"]},
    {"data": [dict(text="t", user=1, calm=1), dict(text="s", user=2, calm=0)], "version": "1.1"},
    {"a1": dict(text="t", user=1, calm=1), "a2": dict(text="s", user=2, calm=0)}])
def test_plain_records(tmp_path, value):
    assert short(run(tmp_path, {"a.json": value}), ["calm"]) == ["t 1 1", "s 2 0"]


@pytest.mark.parametrize("record, says", [
    (dict(text="t", user=["a", "b"], label=["x", "y"]), "several people in one record?"),
    (dict(text="t", user="a", label=[["x"]]), "marks places"),
    (dict(text="t", user="a", label={"x": 1, "y": 2}), "several in one cell?"),
    (dict(text=["t"], user="a", label="x"), "holds lists, not a text"),
    (dict(text="t", annotators=[dict(label="x", annotator_id=1)]), "named like a user"),
    (dict(text="t", user="a", label=None), "record 1: no 'label'")])
def test_nested_records_are_refused(tmp_path, capsys, record, says):
    assert says in refused(capsys, tmp_path, {"a.json": [record, record]})


def test_splits_in_json_and_halves_of_letters(tmp_path):
    value = {part: [dict(text=f"{part} \ud83d", user=1, label="x"), dict(text=part, user=2, label="y")]
             for part in ("train", "validation", "test")}
    found = run(tmp_path, {"a.json": value})
    assert [row["split"] for row in found] == ["train", "train", "val", "val", "test", "test"]
    assert found[0]["text"] == "train \ufffd"


# -------------------- names and places

def test_names_and_places(tmp_path, capsys, monkeypatch):
    content = table([("t", "u", 1), ("s", "v", 0)], "text user calm")
    path = tmp_path / "My data-2.csv"
    path.write_text(content)
    monkeypatch.setattr(prepare, "HERE", str(tmp_path))
    assert prepare.main(["--file", str(path)]) == 0
    assert (tmp_path / "My_data_2/annotations.csv").exists()
    made = str(tmp_path / "My_data_2/annotations.csv")
    assert prepare.main(["--file", str(path)]) == 0  # again
    (tmp_path / "own").mkdir()
    (tmp_path / "own/annotations.csv").write_text("comment,who\n")
    for argv, says in {("--file", made, "--name", "My_data_2"): "would overwrite --file",
                       ("--file", made, "--name", "sample"): "is taken",
                       ("--file", made, "--name", "a/b"): "letters, digits",
                       ("--file", made, "--name", "own"): "not of this script",
                       ("--file", "train.csv,test.csv"): "say --name", (): "NAME, or --file",
                       ("--file", str(tmp_path / "no.csv")): "No such file",
                       ("par", "--file", made): "par takes no --file"}.items():
        capsys.readouterr()
        assert prepare.main(list(argv)) == 2
        assert says in capsys.readouterr().err
