"""Tests of evidence.py, in the order of its sections: by hand, by properties of what is best, and
by runs. They need no network and no GPU."""
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import evidence  # noqa: E402
import plm  # noqa: E402
from test_plm import write_csv  # noqa: E402


def configured(labels, single=False, ordered=False):
    """The configuration that cls would have on data with these labels."""
    parts = {part: [] for part in plm.PARTS}
    data = plm.Dataset("d", list(labels), single, ordered, False, parts, {}, "")
    return plm.make_config(plm.make_parser().parse_args(["cls"]), data)


def made_data(gold, single=True):
    """(Dataset whose parts all hold these labels, configuration)"""
    users = ("u0", "u1")
    rows = []
    for i, labels in enumerate(gold):
        rows.append(plm.Annotation(f"t{i // 2}", users[i % 2], tuple(labels)))
    labels = list("ABC"[:gold.shape[1]])
    parts = dict(train=rows, val=rows, test=rows)
    data = plm.Dataset("d", labels, single, False, False, parts, {}, "")
    return data, configured(labels, single)


# 1. Is it luck? -----------------------------------------------------------------------------------

def test_the_bootstrap_draws_whole_texts():
    # Text a: two rows, both right; text b: one row, missed. Drawn twice: F1 is 1, 4/5 or 0.
    gold = [[1], [1], [1]]
    predicted = [[1], [1], [0]]
    draws = evidence.bootstrap_f1(gold, predicted, list("aab"), 4000)
    shares = {1.0: 0.25, 0.8: 0.5, 0.0: 0.25}
    for f1, share in shares.items():
        found = np.isclose(draws, f1).mean()
        assert found == pytest.approx(share, abs=0.03)


def test_the_bootstrap_draws_the_same_texts_for_every_run():
    gold = [[1], [1], [1]]
    one = evidence.bootstrap_f1(gold, [[1], [1], [0]], list("aab"))
    other = evidence.bootstrap_f1(gold, [[0], [0], [1]], list("aab"))
    assert (np.isclose(one, 1) == np.isclose(other, 0)).all()


# 2. Whose score is it? ----------------------------------------------------------------------------

def scored_ratings(predicted, **more):
    """The scores of four ratings on a scale of 1, 2 and 5, by two users of two texts."""
    gold = np.eye(3, dtype=int)[[0, 2, 1, 1]]
    rows = []
    for text, user, labels in zip("ttss", "abab", gold):
        rows.append(plm.Annotation(text, user, tuple(labels.tolist())))
    config = configured("125", single=True, ordered=True)
    return evidence.from_predictions(config, rows, dict(predicted=predicted, **more))


def test_scores_of_users_of_disagreement_and_in_points():
    found = scored_ratings(np.eye(3, dtype=int)[[0, 0, 1, 1]])
    low, high = found["f1_macro_ci"]
    assert found["f1_per_user"] == pytest.approx(dict(a=2 / 3, b=1 / 3))
    assert found["f1_disagreed"] == pytest.approx(2 / 9)
    assert 0 <= low <= (2 / 3 + 1 + 0) / 3 <= high <= 1
    assert found["listens"]["model"] == 0
    assert found["mean_absolute_error"] == 1.0  # one of four is 4 points off


# 3. Does the model listen? ------------------------------------------------------------------------

@pytest.mark.parametrize("scores, texts, heard, spread", [
    ("0134", "aabb", 0.25 / 2.5, math.sqrt(2.5)),  # a variance of (4 + 1 + 1 + 4) / 4
    ("0134", "abab", 0.9, math.sqrt(2.5)),
    ("003", "aab", 0, math.sqrt(2)),
    ("777", "aab", 0, 0)])
def test_listens_is_the_share_of_variance_between_readers_of_a_text(scores, texts, heard, spread):
    scores = np.array(list(scores), float)
    found = evidence.listens(scores[:, None], list(texts))
    assert found == pytest.approx((heard, spread))


# 4. How far off is a rating? ----------------------------------------------------------------------

def test_a_median_has_half_of_the_probability_at_or_below_it():
    p = np.array([
        (0.3, 0.3, 0.4),
        (0.6, 0.3, 0.1),
        (0.1, 0.3, 0.6),
        (0.0, 1.0, 0.0)])
    chosen = evidence.median_labels(np.log(p + 1e-9))
    assert chosen.argmax(1).tolist() == [1, 0, 2, 1]


def test_an_answer_without_a_label_is_no_point_on_a_scale():
    predicted = np.array([(1, 0, 0), (0, 0, 0), (0, 1, 0), (0, 0, 0)])
    assert scored_ratings(predicted)["mean_absolute_error"] == 0
    assert scored_ratings(np.zeros((4, 3), int))["mean_absolute_error"] is None


def test_of_ratings_the_median_is_scored_too():
    scores = np.log(np.array([(0.4, 0.3, 0.3)] * 4))  # argmax says 1, the median 2
    found = scored_ratings(plm.chosen_labels(scores, True), scores=scores)
    assert found["mean_absolute_error"] == (0 + 4 + 1 + 1) / 4
    assert found["mean_absolute_error_median"] == (1 + 3 + 0 + 0) / 4


# 5. Is it the model or the rule? ------------------------------------------------------------------

@pytest.mark.parametrize("gold, scores, best", [
    ("10100", "54321", 4 / 5),  # the first three: 2 * 2 / (3 + 2)
    ("1110", "4321", 1.0),
    ("0111", "4321", 6 / 7),    # all of them
    ("1010", "1111", 2 / 3),    # a tie is ticked together or not at all
    ("11010", "32220", 6 / 7),
    ("000", "321", 0.0)])
def test_a_tuned_threshold_has_the_best_f1_there_is(gold, scores, best):
    gold = np.array(list(gold), int)
    scores = np.array(list(scores), float)
    predicted = scores > evidence.best_threshold(gold, scores)
    found = plm.f1_scores(gold[:, None], predicted[:, None])
    assert found["f1_macro"] == pytest.approx(best)


def test_several_labels_are_shifted_by_a_threshold_each():
    gold = np.array([(1, 0), (1, 1), (0, 1), (0, 0)])
    scores = np.array([(-1.0, 2), (-2, 5), (-3, 4), (-4, 3)])
    shift = evidence.tuned_shift(gold, scores, False, gold.mean(0))
    assert (plm.chosen_labels(scores + shift, False) == gold).all()


def rare_choice():
    """(gold, scores) of a single choice whose argmax hardly ever says the rare label."""
    rng = np.random.default_rng(0)
    label = (rng.random(400) < 0.1).astype(int)
    margin = 3 - 2.5 * label + rng.normal(size=400)
    scores = np.stack([margin, np.zeros(400)], axis=1)
    return np.eye(2, dtype=int)[label], scores


def test_a_single_choice_is_shifted_by_the_one_tau_with_the_best_f1():
    gold, scores = rare_choice()
    rates = gold.mean(0)
    shift = evidence.tuned_shift(gold, scores, True, rates)
    taus = np.linspace(0, 1.5, 31)
    f1 = {}
    for tau in taus:
        predicted = plm.chosen_labels(scores - tau * np.log(rates), True)
        f1[tau] = plm.f1_scores(gold, predicted)["f1_macro"]
    tuned = plm.f1_scores(gold, plm.chosen_labels(scores + shift, True))["f1_macro"]
    assert tuned == max(f1.values()) > f1[0]
    best = max(taus, key=f1.get)
    assert shift == pytest.approx(-best * np.log(rates))


def test_the_rule_is_tuned_on_validation_and_scored_on_the_test_rows():
    gold, scores = rare_choice()
    data, config = made_data(gold)
    turned = scores[::-1].copy()
    found = evidence.by_tuned_rule(config, data, dict(val=scores, test=turned))
    shift = evidence.tuned_shift(gold, scores, True, gold.mean(0))
    predicted = plm.chosen_labels(turned + shift, True)
    assert found["rule"] == shift.tolist()
    assert found["f1_macro_tuned"] == plm.f1_scores(gold, predicted)["f1_macro"]


# 6. Is it the reader? -----------------------------------------------------------------------------

def test_user_ids_are_dealt_out_anew_and_nothing_else(monkeypatch):
    test = [plm.Annotation(f"t{i}", f"u{i % 4}", (1, 0)) for i in range(40)]
    data, _ = made_data(np.eye(2))
    data = data._replace(parts=dict(train=[], test=test))
    read = []

    def encode_parts(model, tokenizer, config, users, parts, train):
        read.extend(parts["test"])
        return parts, {}

    monkeypatch.setattr(plm, "encode_parts", encode_parts)
    monkeypatch.setattr(plm, "predict", lambda *args: dict(predicted=np.ones((40, 2))))
    assert evidence.scores_for_others(None, None, {}, [], data) == dict(f1_macro_shuffled=0.5)
    users = [a.user for a in test]
    dealt = [a.user for a in read]
    assert dealt != users
    assert sorted(dealt) == sorted(users)
    for a, b in zip(read, test, strict=True):
        assert a._replace(user=b.user) == b


# 7. Would a table do? -----------------------------------------------------------------------------

@pytest.mark.parametrize("single", [False, True])
def test_a_users_bias_is_what_logistic_regression_finds(single):
    # Where the penalized likelihood is highest, what is left over is ridge times the bias.
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(90, 3))
    users = np.array([f"u{i % 4}" for i in range(90)])
    gold = rng.integers(0, 2, (90, 3))
    if single:
        gold = np.eye(3)[rng.integers(0, 3, 90)]
    for user, bias in evidence.user_bias(gold, scores, users, single, ridge=2.0).items():
        p = plm.probabilities(scores[users == user] + bias, single)
        left_over = (gold[users == user] - p).sum(0)
        assert left_over == pytest.approx(2 * bias, abs=1e-4)


def test_a_users_bias_is_found_where_the_scores_are_sure_of_themselves():
    gold = np.arange(1000)[:, None] % 10 < 3
    scores = np.full((1000, 1), -6.0)
    bias = evidence.user_bias(gold, scores, ["u"] * 1000, False, ridge=1)["u"]
    left_over = (gold - plm.probabilities(scores + bias, False)).sum()
    assert abs(left_over - bias[0]) < 1e-3


def test_a_stranger_has_no_bias():
    rows = [plm.Annotation("t", user, (1,)) for user in ("u", "new")]
    bias = dict(u=np.array([2.0]))
    lifted = evidence.with_bias(bias, rows, np.zeros((2, 1)))
    assert lifted.tolist() == [[2.0], [0.0]]


@pytest.mark.parametrize("single", [False, True])
def test_the_table_of_users_knows_what_a_deaf_model_does_not(single):
    # Of two readers one always chooses A and the other B, whatever the text says.
    gold = np.array([(1, 0), (0, 1)] * 30)
    data, config = made_data(gold, single)
    deaf = {part: np.zeros((60, 2)) for part in plm.PARTS}
    found = evidence.by_table(config | dict(personalized=True), data, deaf, own=deaf)
    assert found["f1_macro_user_bias"] == found["f1_macro_user_bias_tuned"] == 1
    assert found["test_loss_user_bias"] < 0.2 < math.log(2)
    assert found["f1_over_user_bias"][1] < 0  # the table is better, whichever texts are drawn


def test_a_model_that_knows_what_no_table_can_is_above_it_by_both_rules():
    # Two readers choose either label equally often, and never the same one.
    gold = np.array([(1, 0), (0, 1), (0, 1), (1, 0)] * 30)
    data, config = made_data(gold, True)
    deaf = {part: np.zeros((120, 2)) for part in plm.PARTS}
    own = {part: 4.0 * gold for part in plm.PARTS}
    found = evidence.by_table(config | dict(personalized=True), data, deaf, own)
    for rule in ("", "_tuned"):
        assert found[f"f1_over_user_bias{rule}"][0] > 0.3
        assert found[f"f1_beyond_user_bias{rule}"][0] > 0.3
    assert evidence.by_table(config, data, deaf, own).keys() == TABLE


def test_a_model_that_knows_only_what_the_table_does_not_is_beyond_it():
    # u0 chooses A and u1 chooses B, but for every tenth text, and that is all the model knows.
    usual = [(1, 0), (0, 1)] * 9
    odd_ones = [(0, 1), (1, 0)]
    gold = np.array((usual + odd_ones) * 9)
    data, config = made_data(gold, True)
    deaf = {part: np.zeros((180, 2)) for part in plm.PARTS}
    odd = np.arange(180)[:, None] % 20 >= 18
    own = {part: 9.0 * odd * gold for part in plm.PARTS}
    found = evidence.by_table(config | dict(personalized=True), data, deaf, own)
    assert found["f1_macro_user_bias"] == pytest.approx(0.9)
    assert found["f1_over_user_bias"][1] < 0
    assert found["f1_macro_plus_bias"] == found["f1_macro_plus_bias_tuned"] == 1
    assert found["f1_beyond_user_bias"][0] > 0
    assert found["test_loss_plus_bias"] < found["test_loss_user_bias"]


def test_the_ridge_of_the_table_is_that_with_the_lowest_validation_loss():
    rng = np.random.default_rng(1)
    gold = {part: np.eye(3, dtype=int)[rng.integers(0, 3, 80)] for part in plm.PARTS}
    data, config = made_data(gold["train"], True)
    for part in plm.PARTS:
        rows = []
        for a, chosen in zip(data.parts[part], gold[part]):
            rows.append(a._replace(labels=tuple(chosen.tolist())))
        data.parts[part] = rows
    scores = {part: rng.normal(size=(80, 3)) for part in plm.PARTS}
    found = evidence.with_table(config, data, scores)
    users = [a.user for a in data.parts["train"]]
    losses = []
    for ridge in evidence.RIDGES:
        bias = evidence.user_bias(gold["train"], scores["train"], users, True, ridge)
        val = evidence.with_bias(bias, data.parts["val"], scores["val"])
        losses.append(plm.mean_loss(gold["val"], val, True))
    assert plm.mean_loss(gold["val"], found["val"], True) == min(losses)
    assert len(set(losses)) == len(evidence.RIDGES)


# 8. A finished run and its evidence ---------------------------------------------------------------

def with_evidence(line):
    """The metrics of a run that a command makes, with their evidence."""
    assert evidence.main(line.split()) == 0
    args = plm.make_parser().parse_args(line.split())
    data = plm.load_data(args.data, args.split_col, args.max_eval)
    folder = plm.folder_of(plm.make_config(args, data), args.out)
    return plm.read_json(f"{folder}/metrics.json")


def file_of(out, name):
    """The file of that name of the only run in a folder of runs."""
    (path,) = pathlib.Path(out).glob(f"*/*/*/*/{name}")
    return path


def refused(capsys, line):
    """The one line that a refused command leaves."""
    capsys.readouterr()
    assert evidence.main(line.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("evidence.py: ")
    assert err.count("\n") == 1
    return err


def some_rows():
    """Every text is read by three people, who disagree."""
    rows = []
    for i in range(90):
        text = f"comment number {i // 3} about thing {i // 3 * 7}"
        rows.append((text, f"u{i % 3}", i % 2, 1 - i % 2))
    return rows


@pytest.fixture
def run(tmp_path):
    """A function: a METHOD with flags -> the command of a short run."""
    path = write_csv(tmp_path / "small.csv", some_rows())
    return lambda line: f"{line} --data {path} --max-steps 2 --out {tmp_path}/out"


FROM_PREDICTIONS = {"f1_macro_ci", "f1_per_user", "f1_disagreed", "listens", "spread"}
RULE = {"f1_macro_tuned", "rule"}
TABLE = {
    "f1_macro_user_bias",
    "f1_macro_user_bias_tuned",
    "test_loss_user_bias",
}
ABOVE_TABLE = {
    "f1_over_user_bias",
    "f1_over_user_bias_tuned",
    "f1_macro_plus_bias",
    "f1_macro_plus_bias_tuned",
    "test_loss_plus_bias",
    "f1_beyond_user_bias",
    "f1_beyond_user_bias_tuned",
}
NOBODY = {"f1_macro_nobody", "f1_macro_shuffled"}


@pytest.mark.parametrize("line, keys", [
    ("rates_p", RULE),
    ("q_0s_p", set()),
    ("cls", RULE | TABLE),
    ("lm", set()),
    ("lm_p", NOBODY),
    ("cls_p", RULE | TABLE | ABOVE_TABLE | NOBODY | {"test_loss_nobody"}),
    ("cls_p --recipe paper", RULE | {"f1_macro_shuffled"})])
def test_each_method_is_asked_what_it_can_answer(run, line, keys):
    assert plm.main(run(line).split()) == 0
    path = file_of(run(line).split()[-1], "metrics.json")
    before = plm.read_json(path)
    assert evidence.main(run(line).split()) == 0
    after = plm.read_json(path)
    assert after.keys() - before.keys() == FROM_PREDICTIONS | keys
    assert {key: after[key] for key in before} == before


@pytest.mark.parametrize("line", ["cls_p", "rates_p", "q_0s"])
def test_what_is_read_back_is_what_was_predicted(monkeypatch, run, line):
    found = []
    write = plm.write_predictions

    def spy(path, config, annotations, result):
        found.append((config, annotations, result))
        write(path, config, annotations, result)

    monkeypatch.setattr(plm, "write_predictions", spy)
    m = with_evidence(run(line))
    for key, value in evidence.from_predictions(*found[0]).items():
        assert m[key] == pytest.approx(value, abs=1e-4), key


def test_none_may_be_nothing_or_a_label_of_that_name(tmp_path):
    config = configured(["none", "sad"])
    rows = [plm.Annotation("t", user, (1, 0)) for user in "abc"]
    scores = np.array([(-1.0, -2), (1, -2), (1, 1e-7)])
    result = dict(predicted=plm.chosen_labels(scores, False), scores=scores)
    plm.write_predictions(f"{tmp_path}/predictions.csv", config, rows, result)
    found = evidence.read_back(tmp_path, config, rows)
    assert found["predicted"].tolist() == [[0, 0], [1, 0], [1, 1]]


def test_the_command_makes_the_run_as_plm_py_does(tmp_path, run):
    assert plm.main(run("cls_p").split()) == 0
    assert evidence.main(run("cls_p").replace("/out", "/ours").split()) == 0
    for name in ("predictions.csv", "adapter.safetensors"):
        ours = file_of(tmp_path / "ours", name)
        assert ours.read_bytes() == file_of(tmp_path / "out", name).read_bytes()


def test_given_again_the_command_prints_and_works_nothing_out(capsys, monkeypatch, run):
    with_evidence(run("cls_p"))
    shown = capsys.readouterr().out.split("\n\n")[-1]
    monkeypatch.setattr(plm, "load_model", None)
    assert evidence.main(run("cls_p").split()) == 0
    assert capsys.readouterr().out.endswith("\n\n" + shown)
    assert "f1_macro_ci" in shown


def test_fresh_makes_the_run_and_its_evidence_anew(tmp_path, run):
    m = with_evidence(run("rates"))
    path = file_of(tmp_path / "out", "metrics.json")
    plm.write_file(str(path), m | dict(written_by="somebody"))
    assert "written_by" in with_evidence(run("rates"))
    anew = with_evidence(run("rates --fresh"))
    same = m.keys() - {"seconds", "peak_memory_mb"}
    assert anew.keys() == m.keys()
    assert [anew[key] for key in same] == [m[key] for key in same]


def test_evidence_of_other_flags_or_other_rows_is_refused(tmp_path, capsys, run):
    assert plm.main(run("cls").split()) == 0
    assert "lr 0.003 there, 0.1 here" in refused(capsys, run("cls --lr 0.1"))
    path = file_of(tmp_path / "out", "predictions.csv")
    lines = path.read_text("utf-8").splitlines()
    path.write_text("\n".join(lines[:-1]), "utf-8")
    assert "predictions.csv has other rows than the test" in refused(capsys, run("cls"))


@pytest.mark.parametrize("old, new, says", [
    ("predicted", "said", "is damaged"),
    (r",-?\d+\.", ",x", "is damaged"),
    (r",-?\d+\.\d+", ",nan", "is damaged"),
    (",calm,", ",angry,", "does not give the run's F1")])
def test_predictions_that_somebody_changed_are_refused(tmp_path, capsys, run, old, new, says):
    assert plm.main(run("rates_p").split()) == 0
    path = file_of(tmp_path / "out", "predictions.csv")
    path.write_text(re.sub(old, new, path.read_text("utf-8")), "utf-8")
    before = plm.read_json(path.parent / "metrics.json")
    assert says in refused(capsys, run("rates_p"))
    assert plm.read_json(path.parent / "metrics.json") == before


def test_a_comma_in_a_label_stays_in_it(tmp_path):
    config = configured(["sad, blue", "calm", "calm, too"]) | dict(head="lm")
    rows = [plm.Annotation("t", user, (1, 0, 0)) for user in "abc"]
    predicted = np.array([(1, 0, 0), (1, 1, 0), (0, 0, 1)])
    plm.write_predictions(f"{tmp_path}/predictions.csv", config, rows, dict(predicted=predicted))
    found = evidence.read_back(tmp_path, config, rows)
    assert found["predicted"].tolist() == predicted.tolist()
    with pytest.raises(plm.BadInput, match="has no scores"):  # which a head always writes
        evidence.read_back(tmp_path, config | dict(head="cls"), rows)


def test_letters_that_a_terminal_does_not_know_are_written_in_others(tmp_path):
    path = write_csv(tmp_path / "gef\u00fchl.csv", some_rows())
    flags = ["rates", "--data", path, "--out", str(tmp_path / "out")]
    assert plm.main(flags) == 0
    command = [sys.executable, f"{HERE}/evidence.py", *flags]
    ascii_only = os.environ | dict(PYTHONIOENCODING="ascii")
    done = subprocess.run(command, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0 and "gef\\xfchl" in done.stdout


@pytest.mark.parametrize("rows, spread, heard, people, says", [
    (9, 0.001, 0.5, 0.5, "COLLAPSED"),
    (9, 0.2, 0.001, 0.5, "DEAF"),
    (9, 0.2, 0.001, 0.0, ""),  # no two readers of a text differ
    (1, 0.0, 0.0, 0.0, ""),
    (9, 0.2, 0.5, 0.5, "")])
def test_what_went_wrong_is_said(capsys, rows, spread, heard, people, says):
    m = dict(method="cls_p", model="m", data="d", seed=1, rows=dict(test=rows))
    m |= dict(head="cls", personalized=True, spread=spread)
    m["listens"] = dict(model=heard, people=people)
    evidence.print_evidence(m, "out")
    found = capsys.readouterr().out
    for word in ("COLLAPSED", "DEAF"):
        assert (word in found) == (word == says)


def test_the_personalized_model_beats_the_plain_reading_with_a_bias_for_each_user(tmp_path):
    # The claim of the paper, for six readers of the sample: it is more than a table of users.
    rows = plm.read_csv(f"{HERE}/sample/annotations.csv")
    some = [row.values() for row in rows if row["user"] in "16 44 45 65 75 96".split()]
    path = write_csv(tmp_path / "a.csv", some, " ".join(rows[0]))
    run = f"cls_p --data {path} --epochs 20 --max-steps 130 --batch 16 --out {tmp_path}"
    m = with_evidence(run)
    assert m["f1_macro"] > m["f1_macro_user_bias"] > m["f1_macro_nobody"]
    assert m["f1_macro_shuffled"] < m["f1_macro_user_bias"]  # a deaf model gains nothing
