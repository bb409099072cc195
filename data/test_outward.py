"""Tests of what leads out: whole models that transformers alone reads, the scores of the LeWiDi
tasks, and the counts of the bench. No network, no GPU; PEFT where it is installed."""
import csv
import importlib.util
import json
import os
import random
import shutil
import sys

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import bench  # noqa: E402
import export  # noqa: E402
import lewidi  # noqa: E402
import plm  # noqa: E402

TEXTS = [
    "well done, genius",
    "nice dog!",
    "why?  so rude",
    "go away\n",
    "a </s> of <user:9",
    "ok...",
]


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return str(path)


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """A CSV of two labels in which a user who is ? does not occur, and the users differ."""
    rng = random.Random(0)
    rows = []
    for i in range(60):
        first = rng.choice(TEXTS)
        second = rng.choice(TEXTS)
        text = f"{first} {second} {i % 20}"
        part = ("train", "train", "val", "test")[i % 20 // 5]
        for user in ("17", "a b", "é"):
            calm = int("dog" in text)
            angry = int(user == "17" or i % 3 == 0)
            rows.append((text, user, part, calm, angry))
    folder = tmp_path_factory.mktemp("csv")
    return write_csv(folder / "moods.csv", ["text", "user", "split", "calm", "angry"], set(rows))


def untied_t5(folder):
    """tiny_t5 with a head of its own, as a flan-t5 has it."""
    shutil.copytree(plm.MODELS["tiny_t5"], folder)
    config = plm.read_json(f"{folder}/config.json") | dict(tie_word_embeddings=False)
    del config["scale_decoder_outputs"]
    plm.write_file(f"{folder}/config.json", config)
    path = f"{folder}/model.safetensors"
    weights = safetensors.torch.load_file(path)
    words = weights["shared.weight"]
    other = 0.02 * torch.randn(words.shape, generator=torch.Generator().manual_seed(0))
    weights["lm_head.weight"] = words * 160 ** -0.5 + other
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    return str(folder)


def finished(tmp_path, annotations, method, model, *more):
    """The folder of a short run."""
    line = [method, "--model", model, "--data", annotations, "--out", str(tmp_path), "--max-steps",
            "5", "--dtype", "float32", *more]
    assert plm.main(line) == 0
    return f"{tmp_path}/moods/{plm.model_name(model)}/{method}/seed42"


def read(folder):
    with open(f"{folder}/predictions.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def asked_of(folder, annotations):
    """(prompts of the test rows out of prompts.json, the rows' lines in predictions.csv)"""
    with open(f"{folder}/merged/prompts.json", encoding="utf-8") as f:
        of_user = json.load(f)
    texts = {}
    for row in plm.read_csv(annotations):
        texts[plm.text_id(row["text"])] = row["text"]
    lines = read(folder)
    user = "" if "" in of_user else None
    prompts = []
    for line in lines:
        prompt = of_user[line["user"] if user is None else user]
        prompts.append(prompt.replace("{text}", texts[line["text_id"]]))
    return prompts, lines


@pytest.mark.parametrize("method, ids", [("cls_p", "token"), ("cls", "token"), ("cls_p", "number")])
def test_a_whole_classifier_gives_the_scores_of_the_run(tmp_path, annotations, method, ids, capsys):
    folder = finished(tmp_path, annotations, method, "tiny", "--ids", ids)
    assert export.main([folder, "--merge"]) == 0
    assert " 0 of " in capsys.readouterr().out.splitlines()[-1]
    prompts, lines = asked_of(folder, annotations)
    name = f"{folder}/merged"
    found = transformers.pipeline("text-classification", name, top_k=None, batch_size=8)(prompts)
    for scores, line in zip(found, lines, strict=True):
        for one in scores:
            logit = float(line[f"score:{one['label']}"])
            assert one["score"] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-4)


@pytest.fixture(scope="module", params=["tiny", "tiny_t5", "untied"])
def whole_writer(request, tmp_path_factory, annotations):
    """(folder of a run of lm_p that has been merged, is it a T5?)"""
    folder = tmp_path_factory.mktemp("writer")
    model = request.param
    if model == "untied":
        model = untied_t5(folder / "untied")
    run = finished(folder, annotations, "lm_p", model, "--epochs", "20", "--max-steps", "20")
    assert export.main([run, "--merge"]) == 0
    return run, request.param != "tiny"


def test_a_whole_language_model_writes_the_answers_of_the_run(whole_writer, annotations):
    folder, seq2seq = whole_writer
    prompts, lines = asked_of(folder, annotations)
    _, answers = export.read_alone(f"{folder}/merged", "lm", seq2seq, prompts)
    assert answers == [line["answer"] for line in lines]
    assert len(set(answers)) > 1


def test_words_have_the_logits_of_the_run_and_users_are_never_written(whole_writer):
    folder, seq2seq = whole_writer
    config, model, tokenizer, users = plm.load_run(folder)
    names = plm.ids_of_users(config, users, model.V)
    prompts, rows = export.awkward_rows(config, tokenizer, users, names)
    own = transformers.AutoTokenizer.from_pretrained(f"{folder}/merged")
    auto = transformers.AutoModelForCausalLM
    if seq2seq:
        auto = transformers.AutoModelForSeq2SeqLM
    whole = auto.from_pretrained(f"{folder}/merged")
    for prompt, row in zip(prompts, rows):
        ids = own(prompt, return_tensors="pt").input_ids
        assert tuple(ids[0].tolist()) == row.prompt
        begun = torch.tensor([row.answer[:-1]])
        with torch.no_grad():
            ours = model(plm.make_batch(model, [row]))
            if seq2seq:
                start = torch.cat([torch.zeros(1, 1, dtype=torch.long), begun], 1)
                theirs = whole(ids, decoder_input_ids=start).logits[0]
            else:
                theirs = whole(torch.cat([ids, begun], 1)).logits[0, ids.shape[1] - 1:]
        assert theirs.shape[1] == model.V + 4  # three users and nobody
        torch.testing.assert_close(theirs[:, :model.V], ours, atol=1e-4, rtol=1e-4)
        assert (theirs.argmax(1) < model.V).all()


def test_a_classifier_of_a_t5_is_refused_in_one_line(tmp_path, annotations, capsys):
    folder = finished(tmp_path, annotations, "cls_p", "tiny_t5")
    capsys.readouterr()
    assert export.main([folder, "--merge"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert export.main([folder]) == 0
    config = plm.read_json(f"{folder}/peft/adapter_config.json")
    assert config["task_type"] == "SEQ_2_SEQ_LM" and config["modules_to_save"] is None


def sentencepiece_like(kind):
    """tiny's vocabulary in a tokenizer of SentencePiece's kind: of a T5 or of a Llama 2."""
    source = plm.MODELS["tiny_t5" if kind == "t5" else "tiny"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    words = tokenizer.convert_ids_to_tokens(range(2048))
    pieces = [word.replace("\u0120", "\u2581") for word in words]
    backend = tokenizer.backend_tokenizer
    backend.decoder = tokenizers.decoders.Metaspace()
    if kind == "t5":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()])
        scored = []
        for piece in pieces:
            scored.append((piece, -5 if len(piece) > 1 else -9))
        backend.model = tokenizers.models.Unigram(scored, 2)
    else:
        spec = json.loads(backend.to_str())
        replace = dict(type="Replace", pattern={"String": " "}, content="\u2581")
        prepend = dict(type="Prepend", prepend="\u2581")
        spec["normalizer"] = dict(type="Sequence", normalizers=[prepend, replace])
        spec["pre_tokenizer"] = None
        spec["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
        merges = []
        for left, right in spec["model"]["merges"]:
            merge = [left.replace("\u0120", "\u2581"), right.replace("\u0120", "\u2581")]
            merges.append(merge)
        spec["model"]["merges"] = merges
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec)), bos_token="<s>",
            eos_token="</s>", pad_token="<pad>")
    return tokenizer


@pytest.mark.parametrize("kind", ["t5", "llama2"])
def test_whole_prompts_have_the_tokens_of_their_pieces(tmp_path, kind):
    tokenizer = sentencepiece_like(kind)
    config = dict(labels=["calm", "angry"], single=False, none=True, personalized=True, shots=0,
                  ids="token", prompt="tree", head="lm", max_text=99)
    V = max(tokenizer.get_vocab().values()) + 5
    names = plm.ids_of_users(config, ["17", "a b"], V)
    prompts, rows = export.awkward_rows(config, tokenizer, ["17", "a b"], names)
    export.add_user_tokens(tokenizer, names, V)
    export.save_tokenizer(str(tmp_path), tokenizer, "lm")
    assert export.fit_prompts(str(tmp_path), prompts, rows, tokenizer.all_special_tokens) == []


# -------------------- the scores of LeWiDi

def rating_run(folder, points):
    """A run of ratings with a file of the task: two items, three readers, scores of their own."""
    rows = []
    for i, rating in enumerate((-5, -5, 5, 3, 3, 0)):
        rows.append((f"train {i}", "AB"[i // 3], "train", rating))
    for point in points:  # so that each is a label
        rows.append((f"val {point}", "A", "val", point))
    rows += [("q: one", "A", "test", 5), ("q: one", "B", "test", 3), ("q: two", "A", "test", -5)]
    path = write_csv(folder / "mine.csv", ["text", "user", "split", "rating"], rows)
    config = dict(method="cls_p", data="mine", split=None, single=True, ordered=True,
                  labels=[str(point) for point in points], data_sha=plm.load_data(path).sha)
    plm.write_file(f"{folder}/metrics.json", config)
    scores = np.full((3, len(points)), -30.0)
    scores[0, [0, 9, 10]] = np.log([0.4, 0.3, 0.3])  # -5 is likeliest, 4 the median
    scores[1, 8] = 0
    scores[2, 0] = 0
    result = dict(predicted=plm.chosen_labels(scores, True), scores=scores)
    asked = plm.load_data(path).parts["test"]
    plm.write_predictions(f"{folder}/predictions.csv", config, asked, result)
    return path


def test_ratings_are_scored_as_the_task_does(tmp_path, capsys):
    points = list(range(-5, 6))
    path = rating_run(tmp_path, points)
    empty = {str(float(point)): 0.0 for point in points}
    given = {}
    given["7"] = dict(
        text={"q": "one"},
        annotators="A,B",
        annotations={"A": "5", "B": "3"},
        soft_label=empty | {"5.0": 0.5, "3.0": 0.5},
    )
    given["8"] = dict(
        text={"q": "two"},
        annotators="A",
        annotations={"A": "-5"},
        soft_label=empty | {"-5.0": 1.0},
    )
    plm.write_file(f"{tmp_path}/Paraphrase_test.json", given)
    line = [str(tmp_path), "--csv", path, "--test", f"{tmp_path}/Paraphrase_test.json"]
    assert lewidi.main(line) == 0
    found = plm.read_json(f"{tmp_path}/lewidi/scores.json")
    # The highest score of A's first is -5, 10 points off; the median is 4, one point off.
    assert found["cls_p, highest score"][0] == pytest.approx((10 / 2 + 0) / 2 / 11)
    assert found["cls_p, median of the scores"][0] == pytest.approx((1 / 2 + 0) / 2 / 11)
    # Shares of the first item: .2 at -5, .15 at 4, .15 at 5, .5 at 3, against .5 at 3 and .5 at 5.
    assert found["cls_p, highest score"][1] == pytest.approx((0.2 * 10 + 0.15 * 1) / 2, abs=1e-4)
    # A's mode in training is -5, B's 3; the median of A's -5, -5, 5 is -5, of B's 3, 3, 0 it is 3.
    assert found["each reader's mode"][0] == pytest.approx((10 / 2 + 0) / 2 / 11)
    assert found["the others' mean (not fair)"][0] == pytest.approx((2 / 11 + 0) / 2)
    with open(f"{tmp_path}/lewidi/Paraphrase_test_pe.tsv", encoding="utf-8") as f:
        assert f.read() == "7\t[4, 3]\n8\t[-5]\n"
    with open(f"{tmp_path}/lewidi/Paraphrase_test_soft.tsv", encoding="utf-8") as f:
        shares = [0.2] + [0.0] * 7 + [0.5, 0.15, 0.15]
        assert f.readline() == f"7\t{shares}\n"
    given["9"] = given["7"] | dict(text="three")
    plm.write_file(f"{tmp_path}/Paraphrase_test.json", given)
    assert lewidi.main(line) == 2
    assert "no prediction for 2" in capsys.readouterr().err
    assert lewidi.main(line[:1]) == 2
    assert "not in data/: --csv FILE names it" in capsys.readouterr().err


def test_ticks_and_a_choice_are_scored_as_the_tasks_do():
    ticks = lewidi.Task("VariErrNLI", "ticks", ["c", "e", "n"], np.arange(3), 1)
    gold = np.array([
        [1, 0, 0],
        [1, 0, 1],
    ])
    said = np.array([
        [1, 0, 0],
        [0, 1, 1],
    ])
    assert lewidi.perspectivist(ticks, gold, said) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert lewidi.soft_distance(ticks, gold.mean(0), said.mean(0)) == pytest.approx((1 + 1 + 0) / 3)
    assert lewidi.answer_cell(ticks, said) == [[1, 0], [0, 1], [0, 1]]
    assert lewidi.soft_cell(ticks, said.mean(0)) == [[0.5, 0.5]] * 3
    choice = lewidi.Task("MP", "choice", ["not irony", "irony"], np.arange(2), 1)
    gold = plm.chosen_labels(np.eye(2)[[0, 1, 1, 1]], True)
    said = plm.chosen_labels(np.eye(2)[[0, 0, 1, 1]], True)
    assert lewidi.perspectivist(choice, gold, said) == 1 / 4
    assert lewidi.soft_distance(choice, gold.mean(0), said.mean(0)) == pytest.approx(0.5)
    assert lewidi.answer_cell(choice, said) == [0, 0, 1, 1]
    scale = lewidi.Task("CSC", "rating", list("123456"), np.arange(1.0, 7), 6)
    assert lewidi.soft_cell(scale, np.eye(6)[0]) == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


# -------------------- the bench

@pytest.fixture(scope="module")
def small_model():
    argv = ["lm", "--dtype", "float32", "--r", "2"]
    args = plm.make_parser().parse_args(argv)
    data = plm.load_data("sample")
    config = plm.make_config(args, data)
    torch.manual_seed(0)
    return plm.load_model(config)[0]


def small_rows():
    """Three rows of two texts: 3 tokens in common, a text of 2 with readers 11 and 12, one of 1."""
    def row(text, reader, answer):
        prompt = (5, 6, 7, *text, reader, 8)
        return plm.Row(prompt, len(prompt) - 2, (), answer, (1, 0), None)

    return [
        row((9, 10), 11, (20, 2)),
        row((9, 10), 12, (20, 21, 2)),
        row((13,), 11, (21, 2)),
    ]


def test_operations_are_counted_as_on_paper(monkeypatch, small_model):
    rows = small_rows()
    shared = 3
    first_text = 2 + 3 + 4  # with the branches of its two readers
    second_text = 1 + 3
    tokens = shared + first_text + second_text
    seen = sum([1, 2, 3])          # by the tokens that all share
    seen += sum([4, 5])            # by the first text
    seen += sum([6, 7, 8])         # by its first reader, the colon and one token of the answer
    seen += sum([6, 7, 8, 9])
    seen += sum([4, 5, 6, 7])      # by the second text and its reader
    read = 2 + 3 + 2               # tokens of answers
    layer = 4 * 128 * 128 + 3 * 128 * 384
    linear = 5 * layer * tokens
    head = 2048 * 128 * read
    attention = 12 * 128 * 5
    needed, computed = bench.operations(small_model, rows)
    assert needed == 4 * (linear + head) + attention * seen
    assert computed == attention * tokens ** 2  # there is one block
    monkeypatch.setattr(plm, "BLOCK", 1)
    assert bench.operations(small_model, rows) == (needed, attention * seen)


def test_the_peers_batch_reads_the_same_places(small_model):
    rows = small_rows()
    with torch.no_grad():
        ours = small_model(plm.make_batch(small_model, rows))
        padded = bench.PaddedLM(small_model.lm, "lm", 2)  # the same weights
        batch = bench.padded_batch(padded, rows)
        theirs = padded(batch)
    assert bench.tokens_in(batch) == sum(len(row.prompt) + len(row.answer) - 1 for row in rows)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is missing")
def test_the_peers_loss_is_ours(tmp_path, annotations, monkeypatch):
    lines = []
    for peer in (False, True):
        argv = ["lm_p", "--data", annotations, "--ids", "number", "--dtype", "float32"]
        lines.append(bench.measure(argv, peer, 1)["first_loss"])
    assert lines[0] == pytest.approx(lines[1], rel=1e-3)
