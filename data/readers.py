"""A trained run reads new sentences, and gets to know new people: the next chapter after plm.py.

    python data/readers.py predict RUN --text "well done, genius" --users 96,44
    python data/readers.py predict RUN --csv rows.csv            columns text and user
    python data/readers.py adapt RUN --csv rows.csv --out DIR    text, user and the run's labels

RUN is the folder of a finished run, as out/sample/tiny/cls_p/seed42. Make has the same commands:
make predict RUN=... TEXT="..." USERS=a,b, and make adapt RUN=... CSV=rows.csv OUT=DIR.
Shapes are written in the letters of plm.py.
"""
import copy
import os
import signal
import sys
import time

if __name__ == "__main__":  # Ctrl-C while torch is loaded needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn as nn
import transformers

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]
import evidence  # noqa: E402
import plm  # noqa: E402
from plm import check  # noqa: E402

# 1. A trained run reads ---------------------------------------------------------------------------
# plm.load_run gives back the very model that a run ended with: read again, the run's own test rows
# have the same scores to the last bit. A new sentence takes the way of every annotation: its prompt
# is written, encoded and read. A reader whom training knows is named in the prompt as in training.
# Anybody else is read by the token of nobody in particular; with --ids number, by their own number.
# The labels of what is asked are unknown. The first takes their place, and no score depends on it.
#
# A rule that data/evidence.py tuned on validation may choose the labels (--tuned). The scores that
# are shown or written are the model's own all the same.

def asked_rows(args, config, users):
    """list of Annotation, one for each reading that is asked for."""
    first = (1,) + (0,) * (len(config["labels"]) - 1)  # an answer that begins as all answers do
    if args.text:
        readers = args.users or users[:5] or ["(anybody)"]
        return [plm.Annotation(args.text, user, first) for user in readers]
    check(not args.users, "--users goes with --text; a CSV names its users")
    needed = ["text", "user"] if config["personalized"] else ["text"]
    try:
        rows = plm.read_csv(args.csv, *needed)
    except plm.BadInput as e:
        raise plm.BadInput(f"{args.csv}: {e}") from None
    return [plm.Annotation(row["text"], row.get("user", ""), first) for row in rows]


def print_strangers(asked, users):
    """Says who is read for nobody in particular."""
    unknown = sorted({a.user for a in asked} - set(users))
    if unknown:
        print(f"unknown to training, read for nobody: {', '.join(unknown[:20])}")


def print_readings(config, asked, result, tuned):
    """A table: what each reader chooses, or how probably; if `tuned`, what is chosen as well."""
    shown = result["predicted"]
    if "scores" in result:
        shown = plm.probabilities(result["scores"], config["single"])
    labels = config["labels"]
    first = max(len("user"), *[len(a.user) for a in asked])
    width = max(len("0.00"), *map(len, labels)) + 2
    head = f"{'user':{first}}" + "".join(f"{label:>{width}}" for label in labels)
    print(head + ("  chosen" if tuned else ""))
    for a, line, predicted in zip(asked, shown, result["predicted"]):
        cells = "".join(f"{p:{width}.2f}" for p in line)
        chosen = f" {plm.answer_text(labels, predicted)}" if tuned else ""
        print(f"{a.user:{first}}{cells}{chosen}")


def predict_run(args):
    """`predict RUN`: a sentence through several people's eyes, or a CSV of texts and users."""
    check(bool(args.text) != bool(args.csv), "predict needs --text T (--users A,B) or --csv FILE")
    config, model, tokenizer, users = plm.load_run(args.run)
    check(config["personalized"] or not args.users, f"{config['method']} knows no users")
    check("rule" in config or not args.tuned,
          f"{args.run} has no tuned rule: data/evidence.py adds one where labels have scores, "
          "and adapt takes it over")
    asked = asked_rows(args, config, users)
    if config["personalized"] and config["ids"] == "token":
        print_strangers(asked, users)
    rows, counts = plm.encode_parts(model, tokenizer, config, users, dict(test=asked), [])
    if counts["texts_cut"]:
        print(f"{counts['texts_cut']} texts are cut to {config['max_text']} tokens")
    result = plm.predict(model, tokenizer, rows["test"], config)
    if args.tuned:
        shifted = result["scores"] + np.array(config["rule"])
        result["predicted"] = plm.chosen_labels(shifted, config["single"])
    if args.text:
        print_readings(config, asked, result, args.tuned)
        return
    name = "_".join(os.path.abspath(args.run).split(os.sep)[-4:])
    name += ".tuned" if args.tuned else ""
    path = f"{os.path.splitext(args.csv)[0]}.{name}.csv"
    plm.write_predictions(path, config, asked, result, gold=False)
    print(f"  files: {path}")


# 2. A trained run gets to know new people ---------------------------------------------------------
# A user enters the model at one place alone, the embedding of the user's token. So a new person
# needs one new embedding, and the rest of the model may stay as it is: those whom it knows are read
# as before, to the last bit.
#
# What does it start as? By nobody's token the model reads for nobody in particular, and so it reads
# a stranger. A new token starts there, and the person's own rows move it on: a few steps of AdamW
# on D numbers.
#
# In a decoder that is cheap. A token sees only what stands before it, and the reader stands behind
# the text, so all states before a reader stay what they are while the token is trained. They are
# computed once, as the tree that plm.py makes of them, and kept for every text, padded to the
# longest of its batch. A step computes the nodes from the readers on, a small tree behind each
# text:
#
#     Which of ... Text: well done, genius ... User ID: | -+- n0
#                                                       |  +- n1
#     Which of ... Text: nice dog ... User ID: (padding)| --- n1
#     computed once, and kept                           | in every step
#
# An encoder reads both ways: its states of a text change with the reader, and every step computes
# all of them.

STEPS = 15     # of AdamW, each on all rows of a person
KEPT = 50_000  # tokens before readers that are kept at once, or all those of one person
NODES = 5120   # of the tree by which those of one batch are read, at most


def add_users(model, n):
    """Gives a model n more users, who start as nobody in particular."""
    known = model.user_embedding.detach()
    model.user_embedding = nn.Parameter(torch.cat([known, model.nobody.repeat(n, 1)]))


def cache_of(model, beginnings):
    """DynamicCache of B beginnings of prompts, padded to the longest. They are read as one tree."""
    inputs, branches = plm.tree_inputs(beginnings)
    tree = transformers.DynamicCache()
    with torch.no_grad():
        model.decode(**plm.to_device(inputs, model.device), cache=tree)
    nodes, _ = plm.padded(branches)
    nodes = nodes.to(model.device)
    cache = transformers.DynamicCache()
    for i, layer in enumerate(tree.layers):  # its tensors are (1, kv_heads, nodes, width)
        cache.update(layer.keys[0][:, nodes].transpose(0, 1),
                     layer.values[0][:, nodes].transpose(0, 1), i)
    return cache


def batch_behind(model, rows):
    """(batch of some rows from their readers on, cache of what stands before these): behind each
    beginning of at most C tokens a tree of at most Q nodes. Of an encoder-decoder, whole rows and
    None."""
    if model.seq2seq:
        return plm.make_batch(model, rows), None
    groups = plm.grouped(rows, [row.prompt[:row.reader_at] for row in rows])
    trees = []
    for beginning, own in groups.items():
        behind = [plm.path_of(row, model.head)[len(beginning):] for row in own]
        trees.append(plm.tree_inputs(behind))
    C = max(len(beginning) for beginning in groups)
    Q = max(len(inputs["input_ids"]) for inputs, _ in trees)
    batch = dict(input_ids=torch.zeros(len(groups), Q, dtype=torch.long),
                 positions=torch.zeros(len(groups), Q, dtype=torch.long),
                 mask=torch.full((len(groups), 1, Q, C + Q), -torch.inf, dtype=model.lm.dtype))
    at = []
    for i, (beginning, own) in enumerate(groups.items()):
        inputs, branches = trees[i]
        before = len(beginning)
        n = len(inputs["input_ids"])
        batch["input_ids"][i, :n] = inputs["input_ids"]
        batch["positions"][i, :n] = before + inputs["positions"]
        batch["mask"][i, 0, :, :before] = 0  # padding sees it too: who sees nothing has no softmax
        batch["mask"][i, 0, :n, C:C + n].masked_fill_(inputs["sees"], 0)
        for row, branch in zip(own, branches):
            at += [i * Q + node for node in branch[len(row.prompt) - before - 1:]]
    batch |= plm.targets_of(sum(groups.values(), []), model.head) | dict(at=torch.tensor(at))
    return plm.to_device(batch, model.device), cache_of(model, groups)


def copy_of(cache):
    """A cache of the same tensors; what is added to the copy leaves the cache as it is."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied


def read_behind(model, batch, cache):
    """(P, L or V) what the head reads in a batch of batch_behind."""
    if cache is None:
        return model(batch)
    out = model.lm.base_model(
        inputs_embeds=model.embed(batch["input_ids"]), position_ids=batch["positions"],
        attention_mask=batch["mask"], past_key_values=copy_of(cache), use_cache=True)
    return model.read(out.last_hidden_state.flatten(0, 1).index_select(0, batch["at"]))


def chunks_to_learn(model, rows, config):
    """Lists of rows for one batch each. Those of a text stand side by side, and next to texts of as
    many rows and then of their length, lest much of a batch be padding."""
    texts = sorted(plm.by_text(rows), key=lambda own: (len(own), len(own[0].prompt)))
    rows = sum(texts, [])
    mostly_kept = config["prompt"] == "tree" and not model.seq2seq
    return plm.micro_batches(model, rows, NODES if mostly_kept else model.max_nodes)


def learn(model, rows, config, bar):
    """Trains the user tokens of some rows. The loss is a sum and no mean, so that the gradient of a
    person is the same whoever else is learned."""
    batches = [batch_behind(model, chunk) for chunk in chunks_to_learn(model, rows, config)]
    optimizer = plm.make_optimizer(model, config)
    for step in range(STEPS):
        for batch, cache in batches:
            out = read_behind(model, batch, cache)
            plm.summed_loss(out, batch, model.head, config["single"]).backward()
        lr = plm.learning_rate(step, STEPS, config["lr"], config["warmup"])
        plm.update(optimizer, lr)
        bar.update()


def groups_of_people(rows):
    """Lists of rows: all those of some people, of at most KEPT tokens before their readers, or all
    those of one person."""
    groups = [[]]
    tokens = 0
    for own in plm.grouped(rows, [row.annotation.user for row in rows]).values():
        theirs = sum(row.reader_at for row in own)
        tokens += theirs
        if groups[-1] and tokens > KEPT:
            groups.append([])
            tokens = theirs
        groups[-1] += own
    return groups


def adapt(model, rows, config):
    """Trains the tokens of the users whom the rows name; all else stays as it is."""
    model.train(False)
    model.requires_grad_(False)
    model.user_embedding.requires_grad_(True)
    groups = groups_of_people(rows)
    with plm.progress(None, "adapt", "steps", len(groups) * STEPS) as bar:
        for group in groups:
            learn(model, group, config, bar)


# 3. The rows of new people ------------------------------------------------------------------------
# The CSV has the form of every other, and its labels have to be the run's. They may stand in
# another order. A single choice may have fewer values, since a few people seldom give every answer.

def fitting_names(path, what, config):
    """list of what the labels of a CSV are called in a run; BadInput if they cannot be its labels.
    `what` is what plm.read_annotations says of the CSV."""
    names = what["labels"]
    missing = sorted(set(config["labels"]) - set(names))
    check(config["single"] or not missing, f"{path}: no column for the labels {', '.join(missing)}")
    check(what["single"] or not config["single"],
          f"{path}: the columns {', '.join(names)}, but the run has a single choice, in one column")
    if config["ordered"] and names[0] == f"not {names[-1]}":  # ratings that are all 0 or 1
        return ["0", "1"]
    return names


def with_labels_of_run(path, annotation, names, config):
    """The annotation, its labels as the run has them; BadInput if another one is chosen."""
    chosen = {name for name, y in zip(names, annotation.labels) if y}
    odd = sorted(chosen - set(config["labels"]))
    check(not odd, f"{path}: {', '.join(odd)} chosen, but the labels of the run are "
                   f"{', '.join(config['labels'])}")
    labels = [int(label in chosen) for label in config["labels"]]
    return annotation._replace(labels=tuple(labels))


def read_new_people(path, split_col, config):
    """dict part -> list of Annotation of a CSV, with the labels of a run. Without a column to split
    by, all rows are to learn from."""
    found, what, split_col = plm.read_annotations(path, split_col)
    names = fitting_names(path, what, config)
    parts = {part: [] for part in (*plm.PARTS, "")}
    for annotation, part in found:
        if split_col is None:
            part = "train"
        parts[part].append(with_labels_of_run(path, annotation, names, config))
    return parts


def rows_to_use(parts, users):
    """(names of the new people, dict(train: rows to learn them from, test: rows to score)). Known
    users are not learned again. Without test rows, those that were learned from are scored."""
    new = sorted({a.user for a in parts["train"]} - set(users))
    learned = [a for a in parts["train"] if a.user in new]
    return new, dict(train=learned, test=parts["test"] or learned)


def print_learned(parts, used, new, users, seconds):
    """Says which rows were learned from, and what the scores are worth."""
    left_out = sum(map(len, parts.values())) - len(used["train"]) - len(parts["test"])
    print(f"{len(new)} new people by {len(used['train']):,} rows, {seconds:.1f} s in all; "
          f"rows left out: {left_out}")
    if not parts["test"]:
        print("no test rows: the scores below are those of the rows that were learned from")
    strangers = {a.user for a in used["test"]} - {*users, *new}
    if strangers:
        print("users of test rows without a row to learn from, read for nobody: "
              f"{len(strangers)}")


def adapt_run(args):
    """`adapt RUN --csv FILE --out DIR`: a run that knows the new people of a CSV, too."""
    start = time.perf_counter()
    base, model, tokenizer, users = plm.load_run(args.run)
    check(base["nobody"], f"{args.run} has no token for nobody to begin with: cls_p and lm_p of "
                          "our recipe have one")
    parts = read_new_people(args.csv, args.split_col, base)
    new, used = rows_to_use(parts, users)
    check(new, f"{args.csv}: no rows of new people to learn from (people unknown to the run, in "
               "the part train if there is a split)")
    config = plm.read_json(f"{args.run}/run.json")
    config |= dict(data=os.path.splitext(os.path.basename(args.csv))[0], split=args.split_col,
                   data_sha=plm.file_sha(args.csv), adapted_from=os.path.abspath(args.run))
    folder = plm.folder_of(config, args.out)
    check(os.path.realpath(folder) != os.path.realpath(args.run),
          f"{folder} is the run to adapt: keep it, and give another --out")
    with plm.alone_in(folder):
        plm.settle(folder, config, args.fresh)
        add_users(model, len(new))
        trained = model.trainable()  # as long as all of it is: adapt freezes the rest
        rows, counts = plm.encode_parts(model, tokenizer, config, users + new, used, [])
        adapt(model, rows["train"], config)
        print_learned(parts, used, new, users, time.perf_counter() - start)
        plm.save_tensors(f"{folder}/adapter.safetensors", trained, "users", users + new)
        result = plm.predict(model, tokenizer, rows["test"], config)
        facts = dict(counts) | evidence.from_predictions(config, used["test"], result)
        for key in ("base_sha", "computed_in", "rule"):  # the rule that known users were tuned by
            if key in base:
                facts[key] = base[key]
        metrics = plm.write_results(folder, config | facts, used | dict(val=[]), result, start)
        plm.print_summary(metrics, folder)
    evidence.print_evidence(metrics, folder)


# 4. The command line ------------------------------------------------------------------------------

def comma_list(text):
    """An argparse type: names with commas between."""
    found = [name.strip() for name in text.split(",")]
    return [name for name in dict.fromkeys(found) if name]


def make_parser():
    """The argparse parser; `work` is the function of the command."""
    parser = plm.Parser("readers.py", allow_abbrev=False,
                        description="A trained run reads for people, and gets to know new ones.")
    commands = parser.add_subparsers(metavar="predict or adapt", required=True)

    reads = commands.add_parser("predict", allow_abbrev=False,
                                help="one sentence as several people read it, or a CSV")
    reads.set_defaults(work=predict_run)
    reads.add_argument("run", metavar="RUN", help="folder of a finished run")
    reads.add_argument("--text", help="this sentence")
    reads.add_argument("--users", type=comma_list, metavar="A,B", help="as these people read it")
    reads.add_argument("--csv", metavar="FILE", help="a CSV with columns text and user")
    reads.add_argument("--tuned", action="store_true",
                       help="choose labels by the rule tuned on validation")

    learns = commands.add_parser("adapt", allow_abbrev=False, help="learn the new people of a CSV")
    learns.set_defaults(work=adapt_run)
    learns.add_argument("run", metavar="RUN", help="folder of a finished run: cls_p or lm_p")
    learns.add_argument("--csv", metavar="FILE", required=True,
                        help="columns text, user and the run's labels")
    learns.add_argument("--split-col", metavar="COL", help="column of train, val or test (split)")
    learns.add_argument("--out", default="out", metavar="DIR", help="folder of all runs (out)")
    learns.add_argument("--fresh", action="store_true", help="start over what is there already")
    return parser


def main(argv=None):
    """Runs one command; returns the exit status."""
    return plm.guarded(make_parser(), lambda args: args.work(args), argv)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(main())
