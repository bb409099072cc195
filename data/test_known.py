"""Tests of the datasets known by name: their rules, their downloads, their counts; no network."""
import contextlib
import csv
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import known  # noqa: E402
import prepare  # noqa: E402
from plm import split_of  # noqa: E402

EMOTIONS = ["anger", "joy"]
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def write_csv(path, rows, header):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header.split(), *rows])
    return str(path)


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


# -------------------- the rules of the paper's authors

def judged(n, user="a", part="train"):
    """list of n rows of one user."""
    return [known.Row(f"t{i}", user, part, "", {}, {}) for i in range(n)]


def users(rows):
    """list, for train, val, test, of Counter user -> rows."""
    counts = []
    for part in ("train", "val", "test"):
        counts.append(Counter(a.user for a in rows if a.split == part))
    return counts


@pytest.mark.parametrize("seed", range(8))
def test_rules(seed):
    r = random.Random(seed)
    rows = []
    weights = [r.paretovariate(0.8) for _ in range(30)]  # busy and rare users, some not everywhere
    for part, n in dict(train=2000, val=300, test=300).items():
        for user, k in Counter(r.choices(range(30), weights, k=n)).items():
            rows += judged(k, str(user), part)
    r.shuffle(rows)
    everywhere = set.intersection(*map(set, users(rows)))
    assert known.users_in_all(rows) == [a for a in rows if a.user in everywhere]
    # "fewer than 1 %" of the busiest user goes, whole; above 60 % of it is cut to 60 %, rounded up
    floor = users(known.drop_rare_users(rows))
    cap = users(known.cut_busy_users(rows))
    for before, kept, cut in zip(users(rows), floor, cap):
        busiest = max(before.values())
        assert kept == {u: n for u, n in before.items() if n * 100 >= busiest}
        assert cut == {u: min(n, -(-busiest * 60 // 100)) for u, n in before.items()}
    for rule in known.RULES.values():  # nothing is invented, the order kept, the same users left
        before = iter(rows)
        rows = rule(rows)
        for a in rows:
            assert any(a is b for b in before)
    assert len({frozenset(part) for part in users(rows)}) == 1


def test_rules_arrive_at_the_authors_numbers_and_always_at_the_same_sample():
    for busiest, cut in ((7913, 4748), (940, 564), (1005, 603), (2382, 1430)):  # of their notebooks
        assert len(known.cut_busy_users(judged(busiest))) == cut
    for rare, left in ((2, 202), (1, 200)):  # exactly 1 % stays
        assert len(known.drop_rare_users(judged(200) + judged(rare, "b"))) == left
    assert known.drop_rare_users([]) == []
    assert known.cut_busy_users([]) == []
    alone = [a.text for a in known.cut_busy_users(judged(100))]
    assert alone[:6] == ["t0", "t1", "t2", "t3", "t5", "t7"]  # in every Python that there is
    random.seed(2)  # nor do the global state, other users and other parts change it
    rows = known.cut_busy_users(judged(100, "b") + judged(100) + judged(9, "a", "val"))
    assert [a.text for a in rows if a.user == "a" and a.split == "train"] == alone
    assert [a.text for a in rows if a.user == "b"] != alone


# -------------------- a server with faults, and goemotions in small

def reply(status, text=""):
    """The parts of an HTTP answer after which the connection stays."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(text.encode())}\r\n\r\n"
    return ((head + text).encode(),)


class Handler(BaseHTTPRequestHandler):
    """Sends the parts that server.behave(path) gives; after a list of them the connection ends."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.seen.append(self.path)
        parts = self.server.behave(self.path)
        with contextlib.suppress(OSError):  # the client may have gone
            for part in parts:
                self.wfile.write(part)
        self.close_connection = isinstance(parts, list)


@pytest.fixture
def web(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.seen = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def small(web, tmp_path, monkeypatch):
    """A folder of goemotions in small, texts in two splits; the web serves it, but for faults."""
    folder = tmp_path / "small"
    folder.mkdir()
    r = random.Random(0)
    texts = [f'text "{t}", he said' for t in range(60)]
    rows = []
    for text in texts:
        for user in range(6):
            rows.append((text, "id", user, "15.0", r.randrange(2), r.randrange(2)))
    for i in range(3):
        path = folder / f"goemotions_{i + 1}.csv"
        write_csv(path, rows[i::3], "text id rater_id created_utc anger joy")
    for file, lines in dict(train=texts[:40], dev=texts[39:50], test=texts[49:]).items():
        (folder / f"{file}.tsv").write_text("".join(f"{text}\t1\tid\n" for text in lines))
    row = dict(known.AS_THE_PAPER["goemotions"])
    row["labels"] = EMOTIONS
    row["expected"] = {"annotations": (360,), "with a label": (1,)}
    row["urls"] = {file: f"{web.url}/{file}" for file in row["urls"]}
    monkeypatch.setitem(known.AS_THE_PAPER, "goemotions", row)
    monkeypatch.setitem(known.DATASETS, "goemotions", row)
    monkeypatch.setattr(known, "PAUSES", (0, 0, 0))
    web.faults = defaultdict(list)

    def behave(path):
        if web.faults[path]:
            return web.faults[path].pop(0)
        return reply("200 OK", (folder / path[1:]).read_bytes().decode())
    web.behave = behave
    return folder


def run(folder, name="goemotions"):
    """The rows of the CSV that is written."""
    assert prepare.main([name, "--dir", str(folder)]) == 0
    return read_csv(folder / "annotations.csv")


def fails(capsys, says, folder, name="goemotions", more=(), files=0):
    """The list of files to save by hand that follows the line of an error, mostly empty."""
    capsys.readouterr()
    assert prepare.main([name, "--dir", str(folder), *more]) == 2
    err = capsys.readouterr().err.split("\r")[-1].lstrip()
    first, *by_hand = err.splitlines()
    assert first.startswith("prepare.py: ")
    assert says in first
    assert len(by_hand) == files
    assert all(" -> " in line for line in by_hand)
    return by_hand


def test_goemotions_is_downloaded(small, web, tmp_path, capsys):
    # what breaks off, is busy or has chunks arrives; what is still missing is listed with its place
    folder = tmp_path / "x"
    dev = (small / "dev.tsv").read_bytes()
    whole = (small / "goemotions_2.csv").read_bytes().replace(b",id", b",id" + b"x" * 3000)
    (small / "goemotions_2.csv").write_bytes(whole)
    size = HEAD + b"Content-Length: %d\r\n\r\n" % len(whole)
    half = whole[:200_000]
    web.faults["/goemotions_2.csv"] = [[size, half], [HEAD, b"\r\n", half]]
    web.faults["/dev.tsv"] = [[CHUNKED, b"%x\r\n%s\r\n0\r\n\r\n" % (len(dev), dev)]]
    web.faults["/test.tsv"] = [reply("503 Service Unavailable")] * 2
    wrong = {"404 Not Found": reply("404 Not Found"), "503 Service": reply("503 Service Unavailable"),
             "nothing in it": reply("200 OK"), "broke off, 3 times": [size, b"{"],
             "a web page and not": reply("200 OK", "\n <!DOCTYPE html>"),
             "broke off": [HEAD, b"\r\n{"]}
    for says, fault in wrong.items():
        web.faults["/train.tsv"] = [fault] * 3
        by_hand = fails(capsys, says, folder, files=3)
        assert by_hand[0].endswith(f"/train.tsv -> {folder / 'train.tsv'}")
        assert not (folder / "train.tsv").exists()
    web.faults["/train.tsv"] = []
    rows = run(folder)
    out = capsys.readouterr().out
    assert {*os.listdir(folder)} == {*os.listdir(small), "annotations.csv"}
    for file in small.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    asked = Counter(path for path in web.seen)
    assert [*asked.values()] == [1, 3, 1, 4 * 3 + 2 + 1, 1, 3]  # in the order of the table's row
    assert run(folder) == rows
    assert len(web.seen) == asked.total()  # nothing is fetched again
    # no text in two splits, texts of two splits where the authors have them, all-zero rows gone
    for word in ("CC BY 4.0", "dev.tsv, test.tsv, train.tsv", "WARNING"):
        assert word in out
    assert list(rows[0]) == ["text", "user", "split", "time", *EMOTIONS]
    where = {row["text"]: row["split"] for row in rows}
    assert all(where[row["text"]] == row["split"] for row in rows)
    assert where['text "39", he said'] == "train"
    assert where['text "49", he said'] == "test"
    assert all(row["time"] == "15.0" and "1" in (row["anger"], row["joy"]) for row in rows)


def test_no_network_bad_names_bad_places_and_ctrl_c(small, tmp_path, monkeypatch, capsys):
    # all files are listed, soon: nobody is there, a proxy refuses, a server never answers
    with monkeypatch.context() as m:
        m.setattr(known, "PAUSES", map(signal.default_int_handler, [2], [None]))
        assert prepare.main(["goemotions", "--dir", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("\nprepare.py: stopped; complete files stay\n")
    fails(capsys, "Not a directory", small / "dev.tsv" / "sub")
    urls = known.DATASETS["goemotions"]["urls"]
    start = time.monotonic()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    bases = {"http://127.0.0.1:9": "ConnectionError", "https://no.invalid": "ProxyError",
             "http://silent": "no answer in 0.3 s"}
    for base, says in bases.items():
        if "silent" in base:
            monkeypatch.setattr(known.requests, "head", lambda *a, **k: time.sleep(2))
            monkeypatch.setattr(known.no_answer, "__defaults__", (0.3,))
        urls.update((file, f"{base}/{file}") for file in urls)
        fails(capsys, says, tmp_path / "new", files=6)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "new").exists()
    fails(capsys, "unrecognized arguments: --data", tmp_path, more=["--data", "x"])
    fails(capsys, "goemotions takes no --text-col", tmp_path, more=["--text-col", "x"])


def test_the_command_refuses_in_one_line():
    done = subprocess.run([sys.executable, prepare.__file__, "sample"], text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "invalid choice: 'sample'" in done.stderr


def test_damaged_originals_and_rubbish_are_refused(small, capsys):
    # half of the original must never pass for the original; a saved login page is named
    lines = (small / "goemotions_2.csv").read_text().splitlines()
    header = lines[0]
    first = lines[1]
    damage = {"359 annotations, the original has 360; delete what": lines[:-1],
              "row 1 (line 2)": [header, first[:-2]], "no column 'joy'": [header[:-4], first[:-2]],
              "'joy' cannot be '2'": [header, first[:-1] + "2"],
              "'rater_id' cannot be ' '": [header, "a,b, ,1,0,1"],
              "dev.tsv: a web page and not the file": ["", "<html>sign in</html>"],
              "dev.tsv: nothing in it": [], "dev.tsv: no column 'text' in it": ["404: Not Found"]}
    for says, lines in damage.items():
        file = small / ("dev.tsv" if "dev.tsv" in says else "goemotions_2.csv")
        before = file.read_bytes()
        file.write_text("\n".join(lines))
        fails(capsys, says, small)
        file.write_bytes(before)
    assert not (small / "annotations.csv").exists()


def test_any_file_of_the_same_columns_is_split_by_its_texts(small, tmp_path, capsys):
    # any text comes back as it was; one of the files of splits, or somebody else's CSV, is refused
    texts = ['a "b"\nc\r\nd', "x\ry", " space ", "\U0001f600,", *(f"text {t}" for t in range(80))]
    rows = []
    for text in texts:
        rows += [(text, user, "1.0" if user < 5 else 0, 0) for user in range(6)]
    write_csv(tmp_path / "goemotions_part.csv", rows, "text rater_id anger joy")
    rows = run(tmp_path)
    out = capsys.readouterr().out
    assert "a hash of the text" in out
    assert "no counts to compare" in out
    assert "authors" not in out
    assert list(rows[0]) == ["text", "user", "split", *EMOTIONS]
    assert all(row["split"] == split_of(row["text"]) and row["anger"] == "1" for row in rows)
    assert {row["text"] for row in rows} == set(texts)
    (tmp_path / "dev.tsv").write_text("a\t1\tx\n")
    fails(capsys, "test.tsv", tmp_path)
    (tmp_path / "annotations.csv").write_text("comment,_worker_id\n")
    fails(capsys, "annotations.csv: not of this script", tmp_path)


def test_unhealthy_has_csvs_of_splits_with_comments_of_several_lines(tmp_path, monkeypatch, capsys):
    row = known.AS_THE_PAPER["unhealthy"]
    texts = [f'text {t},\n"so to say"' for t in range(30)]
    monkeypatch.setitem(row, "expected", {"annotations": (120,)})
    header = " ".join(["_unit_id comment _worker_id", *row["labels"]])
    rows = []
    for text in texts:
        rows += [(0, text, user, *[1] * 8) for user in range(4)]
    write_csv(tmp_path / "unhealthy_full.csv", rows, header)
    (tmp_path / "corpus").mkdir()
    parts = dict(train=texts[:20], val=texts[20:25], test=texts[25:])
    for part, own in parts.items():
        write_csv(tmp_path / f"corpus/{part}.csv", enumerate(own), "id comment")
    rows = run(tmp_path, "unhealthy")
    out = capsys.readouterr().out
    for n in (80, 20, 48, 12):  # 60 % of each user
        assert f"{n:>8}" in out
    assert len(rows) == 72
    assert list(rows[0]) == ["text", "user", "split", *row["labels"]]
    assert all(row["text"] in parts[row["split"]] for row in rows)
    (tmp_path / "corpus/val.csv").write_text("id\n1\n")
    fails(capsys, "val.csv: no column 'comment' in it", tmp_path, "unhealthy")


def test_popquorn_gets_five_draws_whatever_the_order_of_the_rows(tmp_path, monkeypatch, capsys):
    # sizes 70 : 10 : 20 of the texts, nobody new in val and test; what nobody rated is left out
    monkeypatch.setitem(known.AS_THE_PAPER["popquorn"], "expected", {"with a label": (600,)})
    header = "user_id text offensiveness"
    names = [f"draw{i}" for i in range(1, 6)]
    draws = []
    ratings = []
    for t in range(60):
        ratings += [(u, f"text {t}", f"{(t + u) % 5 + 1}.0") for u in range(10)]
    for lines in (ratings + [(1, "nobody rated this", "")], ratings[::-1]):
        write_csv(tmp_path / "raw_data.csv", lines, header)
        rows = run(tmp_path, "popquorn")
        out = capsys.readouterr().out
        assert "no licence file" in out
        assert "WARNING" not in out
        assert f"{len(lines):>8,}" in out
        assert list(rows[0]) == ["text", "user", *names, "offensiveness"]
        assert Counter(row["offensiveness"] for row in rows) == dict.fromkeys("12345", 120)
        draws.append([{row["text"]: row[name] for row in rows} for name in names])
    assert draws[0] == draws[1]
    assert len({tuple(sorted(draw.items())) for draw in draws[0]}) == 5
    assert all(Counter(d.values()) == dict(train=42, val=6, test=12) for d in draws[0])
    val = [t for t in range(60) if draws[0][0][f"text {t}"] == "val"]
    assert val == [9, 11, 19, 27, 39, 41]  # in every Python that there is
    rare = ratings[:540] + [(t + 100, f"text {t}", 1) for t in range(60)]
    write_csv(tmp_path / "raw_data.csv", rare, header)
    fails(capsys, "draw1 has users who are not in training", tmp_path, "popquorn")


def test_a_dataset_of_lewidi_is_downloaded_and_its_counts_compared(web, tmp_path, monkeypatch, capsys):
    item = ('{"%s": {"annotation task": "irony detection", "text": {"post": "p%s", "reply": "r"}, '
            '"annotators": "Ann1,Ann2", "annotations": {"Ann1": "0", "Ann2": "1"}, "split": "%s"}}')
    row = dict(known.LEWIDI_SETS["mp"])
    row["urls"] = {f"{part}.json": f"{web.url}/{part}.json" for part in ("train", "dev", "test")}
    row["expected"] = dict(train=None, val=2, test=3)
    monkeypatch.setitem(known.DATASETS, "mp", row)

    def behave(path):
        part = path[1:].removesuffix(".json")
        return reply("200 OK", item % (part, part, part))
    web.behave = behave
    rows = run(tmp_path, "mp")
    out = capsys.readouterr().out
    assert "mp, licence: none is named" in out
    assert "WARNING: test has 2 annotations, the source 3" in out
    assert out.count("WARNING") == 1
    assert rows[0] == dict(text="post: ptrain\nreply: r", user="Ann1", split="train", irony="0")
    assert [row["split"] for row in rows] == ["train", "train", "val", "val", "test", "test"]
    fails(capsys, "mp takes no --labels", tmp_path, "mp", ["--labels", "x"])
