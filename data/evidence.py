"""How far can the score of a run be believed? The evidence that stands beside it.

    python data/evidence.py cls_p --model phi2 --data goemotions     the very flags of plm.py

plm.py trains, predicts, and ends with the paper's score. One number convinces nobody: it may be
luck, it may be the work of the decision rule, and a table may reach it without reading a word. So
this file has plm.py make the run, unless it is there, and puts to it the questions of a reader who
doubts. The answers join the score in the run's metrics.json, where the table and the report find
them; given again, the command only prints them (--fresh makes all of it anew).

What was predicted answers the first four questions, so they are asked of every method:
    1  Is it luck?                         f1_macro_ci
    2  Whose score is it?                  f1_per_user, f1_disagreed
    3  Does the model listen?              listens, spread
    4  How far off is a rating?            mean_absolute_error, mean_absolute_error_median
For the others a trained model reads again (rates answer question 5 from their table; asked models
none of these):
    5  Is it the model or the rule?        f1_macro_tuned, rule
    6  Is it the reader?                   f1_macro_nobody, test_loss_nobody, f1_macro_shuffled
    7  Would a table do?                   f1_macro_user_bias, ..._tuned, test_loss_user_bias,
                                           f1_over_user_bias, ..._tuned, and of the model with a
                                           table: f1_macro_plus_bias, ..._tuned,
                                           test_loss_plus_bias, f1_beyond_user_bias, ..._tuned

Shapes have the letters of plm.py: R rows, L labels.
"""
import itertools
import math
import os
import random
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is loaded needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import plm  # noqa: E402
from table import NoRun, read_predictions  # noqa: E402


def rows_of(keys):
    """dict key -> list of the numbers of the rows that have it."""
    return plm.grouped(itertools.count(), keys)


def f1_macro(gold, predicted):
    """The paper's score of 0/1 arrays (R, L)."""
    return plm.f1_scores(gold, predicted)["f1_macro"]


# 1. Is it luck? -----------------------------------------------------------------------------------
# With other test texts the score would have been another one. How much so? We have no other texts,
# but we can act as if: draw as many texts as there are, some twice and some not at all, score them,
# and do that a thousand times. The middle 95 % of these scores are the interval (a bootstrap).
#
# Texts are drawn, and rows are not. Nine people who judge one text are no nine witnesses: where the
# text is easy all nine rows come out right together. Drawn row by row, the interval would be too
# narrow.
#
# F1 is made of sums over rows (twice the hits, and the ticks of both sides), so a text is kept as
# its sums, and a draw costs no more than a product with how often each text was drawn. The draws
# are the same for every run on the same texts. Two runs can therefore be compared draw by draw, and
# the luck that both had with the texts falls out of their difference.

def sums_by_text(texts, values):
    """(sums (texts, L) of values (R, L), number of each row's text (R))"""
    names, text_of = np.unique(texts, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, text_of, values)
    return sums, text_of


def bootstrap_f1(gold, predicted, texts, draws=1000):
    """(draws) macro F1 of resampled texts; the same draws for every run on the same texts."""
    gold = np.asarray(gold, int)
    predicted = np.asarray(predicted, int)
    hits, _ = sums_by_text(texts, 2 * gold * predicted)
    ticks, _ = sums_by_text(texts, gold + predicted)
    n = len(hits)
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=draws)  # (draws, n)
    return (times @ hits / np.maximum(times @ ticks, 1)).mean(1)


def interval_of_gain(gold, first, second, texts):
    """[low, high] of how much higher the macro F1 of the second prediction of the same rows is."""
    gain = bootstrap_f1(gold, second, texts) - bootstrap_f1(gold, first, texts)
    return np.percentile(gain, [2.5, 97.5]).tolist()


# 2. Whose score is it? ----------------------------------------------------------------------------
# A mean may be good because some people are easy. So every user has a score of their own, and so
# have the texts on which people differ: where all readers agree, there is nothing to personalize.

def f1_of_users(annotations, gold, predicted):
    """dict user -> macro F1 on the user's rows."""
    found = {}
    for user, own in sorted(rows_of(a.user for a in annotations).items()):
        found[user] = f1_macro(gold[own], predicted[own])
    return found


def disputed_rows(texts, annotations):
    """list of the rows whose text was read differently by somebody."""
    disputed = []
    for own in rows_of(texts).values():
        if len({annotations[i].labels for i in own}) > 1:
            disputed += own
    return disputed


# 3. Does the model listen? ------------------------------------------------------------------------
# A model is told who reads; that does not mean that it cares. Its probabilities vary from row to
# row, and this variance has two parts: between texts, and between the readers of one text. The
# second part's share is `listens`. It is 0 for a model that is deaf to the reader, and 1 for one
# that looks at nothing else. What people chose has such a share too, and that is what to aim at.
# Two texts, two readers, how probable "funny" is:
#
#                   reader a   reader b    mean
#     text 1             0.9        0.7     0.8      between readers  0.1^2 = 0.01
#     text 2             0.3        0.1     0.2      in all           0.3^2 + 0.1^2 = 0.10
#                                                    listens          0.01 / 0.10 = 0.1
#
# `spread` is the standard deviation of it all. It is near 0 if training collapsed, and every row
# gets the same answer; `listens` says nothing then.

def listens(scores, texts):
    """(share of the variance of scores (R, L) between readers of one text, standard deviation)"""
    scores = np.asarray(scores, float)
    sums, text_of = sums_by_text(texts, scores)
    means = sums / np.bincount(text_of)[:, None]
    total = scores.var(0).sum()
    within = ((scores - means[text_of]) ** 2).mean(0).sum()
    return float(within / max(total, 1e-12)), float(math.sqrt(total / scores.shape[1]))


# 4. How far off is a rating? ----------------------------------------------------------------------
# F1 knows only right and wrong. But who says 4 of 5 stars where the reader gave 5 is nearer to the
# truth than who says 1. Of ratings, therefore, the mean distance in points is told as well. The
# likeliest rating is not the best answer by this measure; the median of the distribution is.

def median_labels(scores):
    """(R, L) of 0 and 1: the median of each row's distribution over ratings in order."""
    reached = np.cumsum(plm.probabilities(scores, single=True), axis=1) >= 0.5
    reached[:, -1] = True  # though rounding may end a sum below
    return np.eye(scores.shape[1], dtype=int)[reached.argmax(1)]


def rating_error(config, gold, predicted):
    """Mean distance in points of the answers with a label, None if no answer has one."""
    said = predicted.any(1)
    if not said.any():
        return None
    points = np.array(config["labels"], float)
    return float(np.abs(gold[said] @ points - predicted[said] @ points).mean())


# The answers to the first four questions.

def from_predictions(config, annotations, result):
    """dict of the evidence that lies in what was predicted for some annotations. result: as that of
    plm.predict, dict(predicted (R, L), and scores (R, L) where there are any)."""
    gold = plm.gold_labels(annotations)
    predicted = np.asarray(result["predicted"])
    texts = [plm.text_id(a.text) for a in annotations]
    draws = bootstrap_f1(gold, predicted, texts)
    found = dict(f1_macro_ci=np.percentile(draws, [2.5, 97.5]).tolist(),
                 f1_per_user=f1_of_users(annotations, gold, predicted))
    disputed = disputed_rows(texts, annotations)
    if disputed:
        found["f1_disagreed"] = f1_macro(gold[disputed], predicted[disputed])
    shown = predicted
    if "scores" in result:
        shown = plm.probabilities(result["scores"], config["single"])
    heard, found["spread"] = listens(shown, texts)
    found["listens"] = dict(model=heard, people=listens(gold, texts)[0])
    if config["ordered"]:
        found["mean_absolute_error"] = rating_error(config, gold, predicted)
    if config["ordered"] and "scores" in result:
        median = median_labels(result["scores"])
        found["mean_absolute_error_median"] = rating_error(config, gold, median)
    return found


# 5. Is it the model or the rule? ------------------------------------------------------------------
# F1-macro depends on the decision rule as much as on the model. A label that one row in fifty has
# is seldom more probable than not, so an honest model hardly ever ticks it, and gets an F1 near 0
# for it; and that 0 counts as much as the F1 of the most frequent label. A method that ticks more
# freely wins, though it knows no more. So all methods are given the same chance: their scores are
# shifted until F1-macro is best on the validation rows, and the test rows are scored by that rule.
#
# With several labels every label has a threshold of its own. A single choice gets one number
# instead, how much rare labels are lifted: a threshold for each would learn the accidents of the
# few validation rows that rare labels have.

def best_threshold(gold, scores):
    """The threshold of one label, gold (R) and scores (R), with the best F1 on these rows."""
    order = np.argsort(-scores)
    gold = gold[order]
    scores = np.append(scores[order], -np.inf)
    ticked = np.arange(1, len(gold) + 1)  # the first 1, 2, ... rows
    f1 = 2 * np.cumsum(gold) / (ticked + gold.sum())
    f1[scores[:-1] == scores[1:]] = -1    # equal scores are ticked together
    i = int(f1.argmax())
    return (scores[i] + max(scores[i + 1], scores[i] - 1)) / 2


def tuned_shift(gold, scores, single, rates):
    """(L) to add to scores before labels are chosen, so that F1-macro is best on these rows. For
    several labels it is a threshold each, for a single choice -tau * log(rate), with one tau."""
    if not single:
        return -np.array([best_threshold(gold[:, i], scores[:, i]) for i in range(len(rates))])
    log_rates = np.log(np.maximum(rates, 1e-6))
    taus = np.linspace(0, 1.5, 31)
    f1 = []
    for tau in taus:
        chosen = plm.chosen_labels(scores - tau * log_rates, single)
        f1.append(f1_macro(gold, chosen))
    return -taus[np.argmax(f1)] * log_rates


def tuned_labels(config, data, scores):
    """((R, L) labels chosen for the test rows, the rule) by the rule that is tuned on validation.
    scores: dict part -> (R, L)."""
    rates = plm.gold_labels(data.parts["train"]).mean(0)
    gold = plm.gold_labels(data.parts["val"])
    shift = tuned_shift(gold, scores["val"], config["single"], rates)
    return plm.chosen_labels(scores["test"] + shift, config["single"]), shift


def by_tuned_rule(config, data, scores):
    """dict(f1_macro_tuned, rule) of scores of the validation and the test rows."""
    predicted, shift = tuned_labels(config, data, scores)
    return dict(f1_macro_tuned=f1_macro(plm.gold_labels(data.parts["test"]), predicted),
                rule=shift.tolist())


# 6. Is it the reader? -----------------------------------------------------------------------------
# A personalized run has a higher score than its plain twin: does it know the readers, or did it
# only learn better? Two readings by the very same weights tell. The first is for nobody in
# particular, whom our recipe trains as well: it should be about as good as the plain twin. In the
# second the test rows keep their texts and labels, and the user IDs are dealt out anew; by chance a
# row may keep its reader. What stays of the gain has nothing to do with the reader (F1 gives
# something to any answer that varies, too).

def scores_for_nobody(model, tokenizer, config, rows, gold):
    """dict(f1_macro_nobody, and test_loss_nobody where there are scores) of encoded test rows."""
    read = plm.predict(model, tokenizer, plm.for_nobody(rows), config)
    found = dict(f1_macro_nobody=f1_macro(gold, read["predicted"]))
    if "scores" in read:
        found["test_loss_nobody"] = plm.mean_loss(gold, read["scores"], config["single"])
    return found


def scores_for_others(model, tokenizer, config, users, data):
    """dict(f1_macro_shuffled) of the test rows, each read for the user whom it was dealt."""
    test = data.parts["test"]
    readers = [a.user for a in test]
    random.Random(0).shuffle(readers)
    dealt = [a._replace(user=user) for a, user in zip(test, readers)]
    rows, _ = plm.encode_parts(model, tokenizer, config, users, dict(test=dealt),
                               data.parts["train"])
    read = plm.predict(model, tokenizer, rows["test"], config)
    return dict(f1_macro_shuffled=f1_macro(plm.gold_labels(test), read["predicted"]))


# 7. Would a table do? -----------------------------------------------------------------------------
# Some people call much hostile and some nothing, whatever it says. To know that, nobody has to put
# a user ID into a language model: read the text for nobody in particular, and add to the scores a
# number for each user and label,
#
#     score of a label = score of the text + bias of the user
#
# which is found on the training rows by logistic regression. That is a table, and it is what a
# personalized model has to beat ("user_bias"). We take the text's scores from the personalized run
# itself, read for nobody, and of a plain run as they are.
#
# A model that beats the table has learned who finds what funny. One that does not may have learned
# it all the same, and only be worse than the table at who ticks much, which a table simply counts.
# So the model's own reading gets a table, too ("plus_bias"). Then both sides have one, and what the
# second gains over the first estimates what the model knows besides.
#
# How short the biases are kept is chosen on the validation rows (RIDGES). The model has already
# learned the training rows: what its own reading still misses in them is mostly chance, and wants a
# larger ridge than nobody's reading.

RIDGES = (0.5, 1, 2, 4, 8, 16)  # of the table: the larger, the shorter its biases


def user_bias(gold, scores, users, single, ridge):
    """dict user -> (L) to add to the scores: ridge logistic regression, the scores its offset."""
    found = {}
    for user, own in rows_of(users).items():
        bias = np.zeros(scores.shape[1])
        # 0.7 of Newton's step by the diagonal, at most 1: longer ones may swing for ever.
        for _ in range(100):
            p = plm.probabilities(scores[own] + bias, single)
            slope = (gold[own] - p).sum(0) - ridge * bias
            curvature = (p * (1 - p)).sum(0) + ridge
            step = np.clip(0.7 * slope / curvature, -1, 1)
            bias += step
            if np.abs(step).max() < 1e-6:
                break
        found[user] = bias
    return found


def with_bias(bias, annotations, scores):
    """(R, L) scores with the bias of each row's user; a stranger's is 0."""
    nothing = np.zeros(scores.shape[1])
    return scores + np.array([bias.get(a.user, nothing) for a in annotations])


def with_table(config, data, scores):
    """dict(val, test) of scores with a bias for each user, which is learned on the training rows,
    its ridge on the validation rows. scores: dict part -> (R, L)."""
    train = data.parts["train"]
    users = [a.user for a in train]
    gold = plm.gold_labels(train)
    gold_val = plm.gold_labels(data.parts["val"])
    lowest = math.inf
    for ridge in RIDGES:
        bias = user_bias(gold, scores["train"], users, config["single"], ridge)
        val = with_bias(bias, data.parts["val"], scores["val"])
        loss = plm.mean_loss(gold_val, val, config["single"])
        if loss < lowest:
            lowest = loss
            best = dict(val=val, test=with_bias(bias, data.parts["test"], scores["test"]))
    return best


def by_both_rules(config, data, scores):
    """dict rule -> (R, L) labels of the test rows by two rules: "", the likeliest label or all that
    are more probable than not, and "_tuned"."""
    tuned, _ = tuned_labels(config, data, scores)
    return {"": plm.chosen_labels(scores["test"], config["single"]), "_tuned": tuned}


def by_table(config, data, plain, own):
    """dict of the scores of a plain reading with a table. If the run is personalized, also of its
    own reading with a table, and what its own reading gains over the first, without a table (over)
    and with one (beyond). plain, own: dict part -> (R, L)."""
    test = data.parts["test"]
    gold = plm.gold_labels(test)
    texts = [plm.text_id(a.text) for a in test]
    readings = dict(user_bias=with_table(config, data, plain))
    if config["personalized"]:
        readings["plus_bias"] = with_table(config, data, own)
    found = {}
    answers = {}
    for name, scores in readings.items():
        answers[name] = by_both_rules(config, data, scores)
        for rule, predicted in answers[name].items():
            found[f"f1_macro_{name}{rule}"] = f1_macro(gold, predicted)
        found[f"test_loss_{name}"] = plm.mean_loss(gold, scores["test"], config["single"])
    if config["personalized"]:
        as_it_is = by_both_rules(config, data, own)
        for rule, table in answers["user_bias"].items():
            both = answers["plus_bias"][rule]
            found[f"f1_over_user_bias{rule}"] = interval_of_gain(gold, table, as_it_is[rule], texts)
            found[f"f1_beyond_user_bias{rule}"] = interval_of_gain(gold, table, both, texts)
    return found


# The answers to the last three questions.

def from_rates(config, data):
    """dict of the evidence for a table of label rates, which has scores and no model."""
    scores = {}
    for part in ("val", "test"):
        scores[part] = plm.predict_rates(data, config, data.parts[part])["scores"]
    return by_tuned_rule(config, data, scores)


def read_parts(model, config, rows):
    """dict part -> (R, L) the scores of encoded rows. rows: dict part -> list of Row."""
    scores = {}
    for part in plm.PARTS:
        _, scores[part] = plm.read_labels(model, rows[part], config, "table")
    return scores


def from_model(folder, data, result):
    """dict of the evidence that the trained model of a run gives when it reads again. result: what
    it predicted for the test rows."""
    config, model, tokenizer, users = plm.load_run(folder)
    rows, _ = plm.encode_parts(model, tokenizer, config, users, data.parts, data.parts["train"])
    found = {}
    if "scores" in result:
        _, val = plm.read_labels(model, rows["val"], config, "tune")
        own = dict(val=val, test=result["scores"])
        found |= by_tuned_rule(config, data, own)
    if config["personalized"]:
        found |= scores_for_others(model, tokenizer, config, users, data)
    if config["nobody"]:
        gold = plm.gold_labels(data.parts["test"])
        found |= scores_for_nobody(model, tokenizer, config, rows["test"], gold)
    if config["head"] == "cls" and config["nobody"]:
        pairs = {part: plm.for_nobody(rows[part]) + rows[part] for part in plm.PARTS}
        read = read_parts(model, config, pairs)  # together, for they share their texts
        plain = {part: np.split(scores, 2)[0] for part, scores in read.items()}
        own["train"] = np.split(read["train"], 2)[1]
        found |= by_table(config, data, plain, own)
    elif config["head"] == "cls" and not config["personalized"]:
        plain = read_parts(model, config, rows)
        found |= by_table(config, data, plain, plain)
    return found


# 8. A finished run and its evidence ---------------------------------------------------------------
# What was predicted for the test rows is read back from predictions.csv. Scores have five decimals
# there, which is enough for all that is asked here, and the answers of a server are not paid twice.

SUMMARY = {  # key of the metrics -> what it says
    "f1_macro": plm.SUMMARY["f1_macro"], "f1_macro_ci": "95 % interval over texts",
    "f1_macro_tuned": "with a decision rule tuned on validation",
    "f1_macro_nobody": "read for nobody in particular",
    "f1_macro_user_bias": "without the user, and a bias for each user: what cls_p has to beat",
    "f1_macro_user_bias_tuned": "... with a rule tuned on validation",
    "f1_over_user_bias": "95 % interval of the gain over that bias",
    "f1_over_user_bias_tuned": "... where both have a rule tuned on validation",
    "f1_macro_plus_bias": "with the user, and a bias for each user on top",
    "f1_macro_plus_bias_tuned": "... with a rule tuned on validation",
    "f1_beyond_user_bias": "95 % interval of its gain over f1_macro_user_bias",
    "f1_beyond_user_bias_tuned": "... where both have a rule tuned on validation",
    "f1_macro_shuffled": "with user IDs shuffled: what stays of the gain is not the reader's",
    "f1_disagreed": "on texts that people read differently",
    "test_loss": plm.SUMMARY["test_loss"],
    "test_loss_nobody": "read for nobody in particular",
    "test_loss_user_bias": "without the user, and a bias for each user",
    "test_loss_plus_bias": "with the user, and a bias for each user on top",
    "mean_absolute_error": "points", "mean_absolute_error_median": "points, of the median",
    "listens": "share of variance between readers of one text",
}


def read_scores(path, labels):
    """(R, L) the scores in a run's predictions.csv, None if there are none."""
    lines = plm.read_csv(path)
    if f"score:{labels[0]}" not in lines[0]:
        return None
    scores = []
    for line in lines:
        scores.append([float(line[f"score:{label}"]) for label in labels])
    scores = np.array(scores)
    plm.check(np.isfinite(scores).all(), "a score is no number")
    return scores


def read_back(folder, config, annotations):
    """dict(predicted (R, L), and scores (R, L) where there are any) of a run's test rows."""
    path = f"{folder}/predictions.csv"
    try:
        _, predicted, rows = read_predictions(folder, config["labels"])
        scores = read_scores(path, config["labels"])
    except (NoRun, plm.BadInput, KeyError, ValueError):  # somebody wrote in it
        raise plm.BadInput(f"{path} is damaged: --fresh makes the run anew") from None
    asked = [(plm.text_id(a.text), a.user) for a in annotations]
    plm.check(rows == asked, f"{path} has other rows than the test: --fresh makes the run anew")
    if scores is None:
        plm.check(config["head"] in ("lm", "ask"),
                  f"{path} has no scores: --fresh makes the run anew")
        return dict(predicted=predicted)
    if not config["single"]:  # "none" may be no label, or the label of that name
        predicted &= scores >= 0
    return dict(predicted=predicted, scores=scores)


def evidence_of(folder, metrics, data):
    """dict of all the evidence for a finished run."""
    test = data.parts["test"]
    result = read_back(folder, metrics, test)
    f1 = f1_macro(plm.gold_labels(test), result["predicted"])
    plm.check(math.isclose(f1, metrics["f1_macro"], abs_tol=1e-9),
              f"{folder}/predictions.csv does not give the run's F1: --fresh makes the run anew")
    found = from_predictions(metrics, test, result)
    if metrics["head"] == "rates":
        found |= from_rates(metrics, data)
    elif metrics["head"] != "ask":
        found |= from_model(folder, data, result)
    return found


def print_evidence(m, folder):
    """The score with its evidence, for people, and a word where something went wrong."""
    plm.print_metrics(m, SUMMARY)
    heard = m["listens"]
    if m["rows"]["test"] > 1 and m["spread"] < 0.01 and m["head"] in ("cls", "lm"):
        print("  COLLAPSED: every row gets the same scores; lower --lr or train longer")
    elif m["personalized"] and heard["model"] < 0.02 < heard["people"]:
        print("  DEAF: the scores hardly differ between the readers of a text")
    print(f"  files: {folder}/")


def add_evidence(args):
    """Prints the run of a command and its evidence; what of the two is not there yet is made."""
    folder, data = plm.run(args)
    path = f"{folder}/metrics.json"
    with plm.alone_in(folder):
        metrics = plm.read_json(path)
        if "f1_macro_ci" not in metrics:
            metrics |= evidence_of(folder, metrics, data)
            plm.write_file(path, metrics)
    print_evidence(metrics, folder)


def main(argv=None):
    """One run and its evidence; returns the exit status."""
    parser = plm.make_parser()
    parser.prog = "evidence.py"
    parser.description = "A run of plm.py, made if it is not there, and the evidence beside it."
    return plm.guarded(parser, add_evidence, argv, **plm.ADVICE)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(main())
