"""Tests of readers.py: how a trained run reads new sentences and gets to know new people."""
import functools
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import evidence  # noqa: E402
import plm  # noqa: E402
import readers  # noqa: E402
import test_plm  # noqa: E402
from test_plm import csv_lines, finished, metrics_of, same_files, some_rows, write_csv  # noqa: E402


def go(line, *more):
    """The exit status of a command of readers.py, in this process."""
    return readers.main([*line.split(), *more])


refused = functools.partial(test_plm.refused, program=readers)


@pytest.fixture(scope="session")
def small_csv(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("data") / "small.csv", some_rows())


def spied(patch):
    """list of what is written as predictions from now on."""
    found = []
    write = plm.write_predictions

    def spy(path, config, annotations, result, gold=True):
        found.append(result)
        write(path, config, annotations, result, gold)

    patch.setattr(plm, "write_predictions", spy)
    return found


@pytest.fixture(scope="session")
def trained(tmp_path_factory, small_csv):
    """A function: METHOD and flags -> (folder of a short run, what it predicted)."""
    @functools.cache
    def train(line):
        with pytest.MonkeyPatch.context() as patch:
            results = spied(patch)
            run = f"{line} --data {small_csv} --max-steps 4 --lr 0.01"
            folder = finished(tmp_path_factory.mktemp("trained"), run)
        return folder, results[0]

    return train


def csv_of(path, annotations):
    rows = [(a.text, a.user) for a in annotations]
    return write_csv(path, rows, "text user")


# 1. A trained run reads ---------------------------------------------------------------------------

@pytest.mark.parametrize("line", ["cls_p", "cls", "lm_p --model tiny_t5", "cls_p --tune full",
                                  "cls_p --recipe paper", "cls_p --dtype bfloat16"])
def test_predict_gives_the_runs_own_scores_to_the_bit(
        tmp_path, monkeypatch, small_csv, trained, line):
    folder, own = trained(line)
    results = spied(monkeypatch)
    path = csv_of(tmp_path / "new.csv", plm.load_data(small_csv).parts["test"])
    assert go(f"predict {folder} --csv {path}") == 0
    for key in own:
        assert np.array_equal(own[key], results[0][key]), key


def test_the_scores_of_an_lm_do_not_depend_on_the_labels_that_are_unknown(
        tmp_path, monkeypatch):
    rows = [(text, user, "is_calm" if int(calm) else "is_angry")
            for text, user, calm, _ in some_rows()]
    path = write_csv(tmp_path / "words.csv", rows, "text user tone")
    own = spied(monkeypatch)
    folder = finished(tmp_path, f"lm_p --data {path} --max-steps 4 --lr 0.01")
    _, model, _, _ = plm.load_run(folder)
    assert model.label_tokens[0] > 0  # the labels begin alike, so scores stand behind a token
    new = csv_of(tmp_path / "new.csv", plm.load_data(path).parts["test"])
    assert go(f"predict {folder} --csv {new}") == 0
    for key in own[0]:
        assert np.array_equal(own[0][key], own[1][key]), key


def test_predict_shows_what_each_reader_chooses(capsys, small_csv, trained):
    folder, own = trained("cls_p")
    asked = plm.load_data(small_csv).parts["test"][0]
    assert go(f"predict {folder} --users {asked.user},new --text", asked.text) == 0
    out = capsys.readouterr().out
    shown = out.split(f"\n{asked.user} ")[1].split("\n")[0].split()
    expected = plm.probabilities(own["scores"][:1], False)[0]
    assert [float(p) for p in shown] == pytest.approx(expected, abs=0.0051)
    assert "unknown to training, read for nobody: new" in out


def test_predict_says_nothing_of_nobody_where_a_run_has_none(capsys, trained):
    folder, _ = trained("cls_p --recipe paper")
    assert go(f"predict {folder} --users new --text hm") == 0
    assert "nobody" not in capsys.readouterr().out


def test_the_tuned_rule_chooses_and_the_scores_stay_the_models_own(
        tmp_path, monkeypatch, small_csv, trained):
    folder, own = trained("cls_p")
    run = f"cls_p --data {small_csv} --max-steps 4 --lr 0.01 --out {folder.parents[3]}"
    assert evidence.main(run.split()) == 0
    results = spied(monkeypatch)
    path = csv_of(tmp_path / "new.csv", plm.load_data(small_csv).parts["test"])
    assert go(f"predict {folder} --tuned --csv {path}") == 0
    m = metrics_of(folder)
    shifted = plm.chosen_labels(own["scores"] + np.array(m["rule"]), False)
    assert np.array_equal(results[0]["predicted"], shifted)
    assert np.array_equal(results[0]["scores"], own["scores"])
    gold = plm.gold_labels(plm.load_data(small_csv).parts["test"])
    assert plm.f1_scores(gold, shifted)["f1_macro"] == m["f1_macro_tuned"]


@pytest.fixture
def ruled(monkeypatch, trained):
    """The folder of a run whose tuned rule always chooses the label calm and never angry."""
    load_run = plm.load_run
    monkeypatch.setattr(plm, "load_run", lambda run: (
        load_run(run)[0] | dict(rule=[100.0, -100.0]), *load_run(run)[1:]))
    return trained("cls_p")[0]


def test_what_the_tuned_rule_chooses_of_a_sentence_stands_beside_the_models_own_scores(
        capsys, ruled):
    plain = f"predict {ruled} --users u0 --text hm"
    assert go(plain) == 0
    expected = capsys.readouterr().out.splitlines()
    assert go(f"{plain} --tuned") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"{expected[0]}  chosen", f"{expected[1]}  calm"]


def test_tuned_predictions_lie_beside_the_others(tmp_path, ruled):
    path = write_csv(tmp_path / "new.csv", [("hi", "u0")], "text user")
    assert go(f"predict {ruled} --csv {path}") == 0
    assert go(f"predict {ruled} --tuned --csv {path}") == 0
    (plain,) = set(tmp_path.glob("new.*.csv")) - set(tmp_path.glob("new.*.tuned.csv"))
    (tuned,) = tmp_path.glob("new.*.tuned.csv")
    assert tuned.name == f"{plain.stem}.tuned.csv"
    (line,) = csv_lines(tuned)
    assert line["predicted"] == "calm"
    assert line | dict(predicted="") == csv_lines(plain)[0] | dict(predicted="")


def test_columns_stand_apart_however_short_labels_and_long_users_are(capsys):
    asked = [plm.Annotation("t", "a user with a long ID", ()), plm.Annotation("t", "b", ())]
    config = dict(labels=["1", "2"], single=True)
    result = dict(predicted=np.array([(1, 0), (0, 1)]), scores=np.zeros((2, 2)))
    readers.print_readings(config, asked, result, tuned=False)
    assert capsys.readouterr().out == ("user                      1     2\n"
                                       "a user with a long ID  0.50  0.50\n"
                                       "b                      0.50  0.50\n")


def test_without_evidence_there_is_no_tuned_rule(capsys, trained):
    says = refused(capsys, f"predict {trained('lm_p')[0]} --tuned --text hm")
    assert "no tuned rule: data/evidence.py adds one" in says


def test_the_predictions_of_two_runs_lie_beside_each_other(tmp_path, trained):
    path = write_csv(tmp_path / "new.csv", [("hi", "u0")], "text user")
    for line in ("cls_p", "cls"):
        assert go(f"predict {trained(line)[0]} --csv {path}") == 0
    assert len(list(tmp_path.glob("new.*.csv"))) == 2


def test_predict_reads_an_empty_text(tmp_path, trained):
    folder, _ = trained("cls")
    path = write_csv(tmp_path / "new.csv", [("one",), (" ",)], "text")
    assert go(f"predict {folder} --csv {path}") == 0  # an empty text is one, too


@pytest.mark.parametrize("flags, says", [
    ("", "needs --text"), ("--text x --csv new.csv", "predict needs"),
    ("--csv nosuch.csv", "nosuch.csv: No such file"), ("--text x --users a", "knows no users")])
def test_predict_says_what_it_does_not_do(capsys, trained, flags, says):
    assert says in refused(capsys, f"predict {trained('cls')[0]} {flags}")


# 2. A trained run gets to know new people ---------------------------------------------------------

NEW_PEOPLE = ["n0", "n1", "n2"]


@pytest.fixture
def new_csv(tmp_path, monkeypatch):
    """Rows of three new people, some of them to be tested; adapting takes few steps."""
    monkeypatch.setattr(readers, "STEPS", 6)
    rows = []
    for i, row in enumerate(some_rows(30, NEW_PEOPLE)):
        rows.append((*row, "test" if i % 5 == 0 else "train"))
    return write_csv(tmp_path / "people.csv", rows, "text user calm angry split")


def adapted(folder, csv_path, out):
    """The folder of a run that knows new people, the only one in `out`."""
    assert go(f"adapt {folder} --csv {csv_path} --out {out}") == 0
    (found,) = pathlib.Path(out).glob("*/*/*/seed*")
    return found


def user_rows(folder):
    with plm.safe_open(folder / "adapter.safetensors", "pt") as f:
        return json.loads(f.metadata()["users"]), f.get_tensor("user_embedding")


def other_tensors(folder):
    """dict name -> value of all that an adapter holds besides users."""
    with plm.safe_open(folder / "adapter.safetensors", "pt") as f:
        names = set(f.keys()) - {"user_embedding"}
        return {name: f.get_tensor(name).tolist() for name in names}


ADAPTED = ["cls_p", "lm_p", "cls_p --model tiny_t5", "lm_p --model tiny_t5"]


@pytest.mark.parametrize("line", ADAPTED)
def test_each_new_person_gets_a_token_of_its_own_and_nothing_else_changes(
        tmp_path, new_csv, trained, line):
    folder, _ = trained(line)
    users, before = user_rows(folder)
    found = adapted(folder, new_csv, tmp_path / "out")
    people, after = user_rows(found)
    assert people == users + NEW_PEOPLE
    assert torch.equal(after[:3], before)
    assert len(after) == 6
    assert len(after[3:].unique(dim=0)) == 3  # they all started as nobody
    assert other_tensors(found) == other_tensors(folder)


@pytest.mark.parametrize("line", ["cls_p", "lm_p --model tiny_t5"])
def test_known_users_are_read_as_before_to_the_bit(
        tmp_path, monkeypatch, small_csv, new_csv, trained, line):
    folder, own = trained(line)
    found = adapted(folder, new_csv, tmp_path / "out")
    results = spied(monkeypatch)
    path = csv_of(tmp_path / "old.csv", plm.load_data(small_csv).parts["test"])
    assert go(f"predict {found} --csv {path}") == 0
    for key in own:
        assert np.array_equal(own[key], results[0][key]), key


@pytest.mark.parametrize("line", ["cls_p", "lm_p --model tiny_t5"])
def test_adapting_again_gives_the_same_bytes(tmp_path, new_csv, trained, line):
    folder, _ = trained(line)
    same_files(adapted(folder, new_csv, tmp_path / "a"), adapted(folder, new_csv, tmp_path / "b"))


def test_the_same_adapt_command_can_be_given_again(tmp_path, new_csv, trained):
    folder, _ = trained("cls_p")
    for _ in range(2):
        adapted(folder, new_csv, tmp_path / "a")


def test_a_person_is_learned_whoever_else_is_new(tmp_path, new_csv, trained):
    folder, _ = trained("cls_p")
    _, together = user_rows(adapted(folder, new_csv, tmp_path / "all"))
    rows = [row.values() for row in csv_lines(new_csv) if row["user"] == "n1"]
    alone = write_csv(tmp_path / "one.csv", rows, "text user calm angry split")
    _, own = user_rows(adapted(folder, alone, tmp_path / "one"))
    assert torch.allclose(own[3], together[4], atol=1e-4)


@pytest.mark.parametrize("line", [*ADAPTED, "lm_p --prompt paper", "cls_p --no-share"])
def test_what_is_kept_before_the_reader_changes_no_number(monkeypatch, trained, line):
    folder, _ = trained(line)
    config, model, tokenizer, users = plm.load_run(folder)
    texts = ["hm", "well done, my dear genius", "oh no", "well done, my dear friend", "oh"]
    asked = []
    for i, text in enumerate(texts):  # by one to five people
        asked += [plm.Annotation(text, user, (1, 0)) for user in users[:i + 1]]
    rows, _ = plm.encode_parts(model, tokenizer, config, users, dict(test=asked), [])
    model.max_nodes = 50  # so that there are several batches
    monkeypatch.setattr(readers, "NODES", 50)
    chunks = readers.chunks_to_learn(model, rows["test"], config)
    assert len(chunks) > 1
    for chunk in chunks:
        batch, cache = readers.batch_behind(model, chunk)
        for _ in range(2):  # reading leaves the cache as it is
            found = readers.read_behind(model, batch, cache)
            assert torch.allclose(found, model(plm.make_batch(model, chunk)), atol=1e-4)


def test_people_are_learned_in_groups_that_bound_what_is_kept(monkeypatch):
    monkeypatch.setattr(readers, "KEPT", 20)
    rows = []
    for user, n in dict(a=4, b=6, c=1, d=12, e=3).items():
        rows += [plm.Row((1, 2, 3), 2, (), (2,), (1,), plm.Annotation("t", user, (1,)))] * n
    random.Random(0).shuffle(rows)
    groups = [[row.annotation.user for row in group] for group in readers.groups_of_people(rows)]
    assert sorted(sum(groups, [])) == sorted(row.annotation.user for row in rows)
    for group in groups:
        assert len(group) <= 10 or len(set(group)) == 1
    for user in "abcde":
        assert sum(user in group for group in groups) == 1


def test_adapting_learns_a_person(tmp_path, new_csv, trained):
    folder, _ = trained("cls_p")
    config, model, tokenizer, users = plm.load_run(folder)
    parts = readers.read_new_people(new_csv, None, config)
    names = plm.ids_of_users(config, users + NEW_PEOPLE, model.V)
    readers.add_users(model, 3)
    rows, _ = plm.encode_rows(tokenizer, config, parts["train"], [], names)
    before, _ = plm.read_labels(model, rows, config, "before")
    readers.adapt(model, rows, config)
    after, _ = plm.read_labels(model, rows, config, "after")
    assert after < before


def test_new_people_are_scored_on_their_own_test_rows(tmp_path, new_csv, trained):
    m = metrics_of(adapted(trained("cls_p")[0], new_csv, tmp_path / "out"))
    assert m["rows"] == dict(train=24, val=0, test=6)
    assert set(m["f1_per_user"]) <= set(NEW_PEOPLE)
    assert m["data"] == "people"
    assert "f1_macro_nobody" not in m  # that of other people


def test_an_adapted_run_keeps_the_tuned_rule(tmp_path, new_csv, ruled):
    found = adapted(ruled, new_csv, tmp_path / "out")
    assert metrics_of(found)["rule"] == [100, -100]
    assert go(f"predict {found} --tuned --users n0 --text hm") == 0


def test_adapt_says_which_rows_it_left_out_and_which_it_scored(tmp_path, capsys, trained):
    path = write_csv(tmp_path / "people.csv", some_rows(12, ["u1", "n1", "n2"]))
    adapted(trained("cls_p")[0], path, tmp_path / "a")
    said = capsys.readouterr().out
    assert "rows left out: 4" in said and "scores below are those of the rows that were" in said
    rows = [("hm", "n1", 1, 0, "train"), ("oh", "n2", 0, 1, "test")]
    path = write_csv(tmp_path / "two.csv", rows, "text user calm angry split")
    adapted(trained("cls_p")[0], path, tmp_path / "b")
    assert "without a row to learn from, read for nobody: 1" in capsys.readouterr().out


def test_a_run_is_not_adapted_into_its_own_folder(capsys, tmp_path, trained):
    folder, _ = trained("cls_p")
    before = sorted(folder.iterdir())
    path = write_csv(tmp_path / "small.csv", some_rows(12, NEW_PEOPLE))  # the run's own name
    says = refused(capsys, f"adapt {folder} --csv {path} --out {folder.parents[3]} --fresh")
    assert "is the run to adapt" in says
    assert sorted(folder.iterdir()) == before


def test_without_a_split_every_row_of_a_new_person_is_learned_from(tmp_path, trained):
    rows = some_rows(12, ["u1", "n1", "n2"])  # u1 is known, and stays as it is
    path = write_csv(tmp_path / "people.csv", rows)
    found = adapted(trained("cls_p")[0], path, tmp_path / "out")
    assert user_rows(found)[0][3:] == ["n1", "n2"]
    assert metrics_of(found)["rows"] == dict(train=8, val=0, test=8)
    assert len(csv_lines(found / "predictions.csv")) == 8


# 3. The rows of new people ------------------------------------------------------------------------

@pytest.mark.parametrize("users, header, says", [
    (["u0", "u1", "u2"], "text user calm angry", "no rows of new people"),
    (NEW_PEOPLE, "text user calm odd", "no column for the labels angry"),
    (NEW_PEOPLE, "text user calm time", "no column for the labels angry")])
def test_people_who_are_all_known_and_other_labels_are_refused(
        tmp_path, capsys, trained, users, header, says):
    path = write_csv(tmp_path / "people.csv", some_rows(12, users), header)
    line = f"adapt {trained('cls_p')[0]} --csv {path} --out {tmp_path}/out"
    assert says in refused(capsys, line)


def test_a_label_that_is_missing_is_not_taken_for_never_chosen(tmp_path, capsys):
    rows = [(*row, 1) for row in some_rows()]
    path = write_csv(tmp_path / "a.csv", rows, "text user calm angry sad")
    folder = finished(tmp_path / "out", f"cls_p --data {path} --max-steps 1 --max-eval 6")
    people = write_csv(tmp_path / "people.csv", some_rows(12, NEW_PEOPLE))
    says = refused(capsys, f"adapt {folder} --csv {people} --out {tmp_path}/adapted")
    assert "sad" in says


def new_choices(tmp_path, choices, header="text user stars"):
    rows = [(f"text {i}", "n1", *choice) for i, choice in enumerate(choices)]
    config = dict(labels=["0", "1", "2"], single=True, ordered=True)
    path = write_csv(tmp_path / "choices.csv", rows, header)
    return [a.labels for a in readers.read_new_people(path, None, config)["train"]]


def test_new_people_may_have_given_only_ratings_of_0_and_1(tmp_path):
    assert new_choices(tmp_path, ["0", "1"]) == [(1, 0, 0), (0, 1, 0)]
    assert new_choices(tmp_path, ["1", "2"]) == [(0, 1, 0), (0, 0, 1)]


def test_new_people_may_have_given_one_answer_alone(tmp_path):
    assert new_choices(tmp_path, ["2"]) == [(0, 0, 1)]


def test_only_a_choice_that_the_run_does_not_know_is_named(tmp_path):
    with pytest.raises(plm.BadInput, match=": 7 chosen, but the labels of the run are 0, 1, 2"):
        new_choices(tmp_path, ["1", "7"])


def test_several_columns_are_not_a_single_choice(tmp_path):
    with pytest.raises(plm.BadInput, match="the columns 0, 1, but the run has a single choice"):
        new_choices(tmp_path, ["11", "00"], "text user 0 1")


def test_a_run_without_nobodys_token_gets_to_know_no_one(capsys, new_csv, trained):
    says = refused(capsys, f"adapt {trained('cls')[0]} --csv {new_csv}")
    assert "has no token for nobody" in says


# 4. The command line ------------------------------------------------------------------------------

@pytest.mark.parametrize("line, says", [
    ("", "required: predict or adapt"), ("read x", "invalid choice: 'read'"),
    ("predict", "required: RUN"), ("predict x", "needs --text"),
    ("predict nosuch --text x", "nosuch: no finished run"),
    ("predict x --text x --seed 1", "unrecognized arguments: --seed 1 (see --help)"),
    ("adapt x", "required: --csv"), ("adapt nosuch --csv x.csv", "nosuch: no finished run"),
    ("adapt x --csv x.csv --users a", "unrecognized arguments: --users a")])
def test_bad_input_gets_one_line_and_status_2(capsys, line, says):
    assert says in refused(capsys, line)


@pytest.mark.parametrize("command", ["predict", "adapt"])
def test_a_csv_of_another_form_is_named(tmp_path, capsys, trained, command):
    path = write_csv(tmp_path / "new.csv", [("a", "b", 1, 0)], "txt reader calm angry")
    says = refused(capsys, f"{command} {trained('cls_p')[0]} --csv {path}")
    assert path in says and "needs exactly one column 'text'" in says
    assert ("make data" in says) == (command == "adapt")  # which needs labels


def test_an_error_of_ours_is_no_error_of_the_users(monkeypatch):
    def load_run(folder):
        raise RuntimeError("shapes (3, 4) and (5, 6) do not fit")

    monkeypatch.setattr(plm, "load_run", load_run)
    with pytest.raises(RuntimeError, match="do not fit"):
        go("predict x --text x")


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    def load_run(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(plm, "load_run", load_run)
    assert go("predict x --text x") == 130
    assert capsys.readouterr().err.startswith("readers.py: stopped")


@pytest.mark.parametrize("given, command", [
    ("predict RUN=r TEXT=hm USERS=a,b", "predict r --text=\"$TEXT\" --users=\"$USERS\""),
    ("predict RUN=r CSV=x.csv ARGS=--tuned", "predict r --csv x.csv --tuned"),
    ("adapt RUN=r CSV=x.csv OUT=o", "adapt r --csv x.csv --out o")])
def test_make_gives_its_variables_to_the_commands(given, command):
    line = ["make", "--no-print-directory", "-n", "VENV=.", "-o", "./ready", *given.split()]
    done = subprocess.run(line, cwd=os.path.dirname(HERE), capture_output=True, text=True)
    assert done.stdout.strip() == f"./bin/python data/readers.py {command}"
