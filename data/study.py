"""Run a study: some methods on some variations of the data, each run with its evidence, and then
the table of them all.

    python data/study.py paper --model tiny --data sample --seeds 42 43 44
    python data/study.py exp3 --values 2 10 -- --epochs 2         behind --: flags of plm.py
    python data/study.py paper --print > commands.txt             for other machines, see below

The studies are the table below; data/STUDIES.md has what came out of them. A stopped study goes on
by the same command. --print makes the study's CSVs and prints its commands instead, one a line. No
line needs another, each run has a folder of its own, and what is finished is not run again:

    export OMP_NUM_THREADS=1                                      on a CPU: a core each
    tr '\\n' '\\0' < commands.txt | xargs -0 -n 1 -P 4 sh -c       four at a time
    parallel -j 4 < commands.txt                                  the same by GNU parallel
    sed -n "${SLURM_ARRAY_TASK_ID}p" commands.txt | sh            a job of a Slurm array
"""
import argparse
import itertools
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
from typing import NamedTuple

HERE = os.path.relpath(os.path.dirname(os.path.abspath(__file__)))
PYTHON = sys.executable
EVIDENCE = os.path.join(HERE, "evidence.py")
READERS = os.path.join(HERE, "readers.py")
BASELINES = ("rates", "rates_p")
ASKED = ("q_0s", "q_0s_p", "q_1s", "q_1s_p", "q_2s", "q_2s_p")
TRAINED = ("cls", "cls_p", "lm", "lm_p")


class Study(NamedTuple):
    says: str             # what it answers
    methods: tuple
    vary: str = ""        # flags of data/vary.py with {} for a value; without, DATA itself is read
    values: tuple = ("",)
    once: tuple = ()      # methods that read the CSV of the first value alone
    flags: tuple = ("",)  # of plm.py; runs with other flags have another folder
    models: tuple = ("tiny",)
    shared: bool = False  # do its runs stand with all others in --out, or in a folder below it?


STUDIES = {
    "paper": Study(
        "The whole table of the paper: every method reads the same test rows, and a gain is that "
        "of a personalized method over its plain twin.",
        BASELINES + ASKED + TRAINED, shared=True),
    "exp1": Study(
        "What training is worth: q_0s asks the model as it comes; cls_p is trained, and told the "
        "reader.",
        ("q_0s", "cls_p"), shared=True),
    "exp2": Study(
        "What an example is worth: q_1s shows one solved row in the prompt, q_0s shows none.",
        ("q_0s", "q_1s"), shared=True),
    "exp3": Study(
        "Which head is better, with few labels and with many: cls_p scores each label, lm_p writes "
        "their names.",
        ("cls_p", "lm_p"), vary="--labels {}", values=("2", "4", "7")),
    "unseen": Study(
        "How well new people are read, of whom there are 0, 5 or 15 rows. In the column \"unseen\" "
        "training had these rows (with 0 of them cls_p reads for nobody in particular); in the "
        "column \"adapted\" the run that has never met these people got to know them by `adapt`; "
        "q_2s_p has two of the rows in its prompt.",
        BASELINES + ("q_2s", "q_2s_p", "cls", "cls_p"), vary="--unseen --known {}",
        values=("0", "5", "15")),
    "later": Study(
        "Whether it lasts: training has the earlier texts, and the test the later ones. The column "
        "`time` of the CSV says when each row was written.",
        BASELINES + ("cls", "cls_p"), vary="--by-time"),
    "private": Study(
        "What hiding an ID costs: a hash or a made-up word costs nothing as long as cls_p keeps "
        "its score; in randomized response (dp), a lower epsilon hides more and teaches less.",
        ("rates_p", "cls", "cls_p"), vary="--ids {}", once=("cls",),
        values=("dp --epsilon inf", "hash", "words", "dp --epsilon 1", "dp --epsilon 3",
                "dp --epsilon 8")),
    "full": Study(
        "What LoRA and NF4 cost: the same cls_p with other ranks of LoRA, with weights that are "
        "not quantized, and with every weight trained.",
        ("cls_p",),
        flags=("--r 2", "--r 8", "--r 64", "--r 8 --no-quant", "--tune full --lr 3e-4")),
    "architectures": Study(
        "A decoder against an encoder-decoder, on the same rows and with the same two heads.",
        TRAINED, models=("tiny", "tiny_t5"), shared=True),
}


def in_a_name(flags):
    """Flags as a part of a file's name: "--unseen --known 5" is unseen_known_5."""
    return "_".join(flags.replace("-", " ").split())


def folder_of(study, args):
    """The folder of the study's runs and CSVs."""
    return args.out if study.shared else os.path.join(args.out, args.study)


def csv_path(study, args, flags):
    """The CSV that data/vary.py makes with some flags."""
    data = os.path.splitext(os.path.basename(args.data))[0]
    return os.path.join(folder_of(study, args), f"{data}_{in_a_name(flags)}.csv")


def adapted(path):
    """The CSV by which a run gets to know the new people of another CSV, of the same name."""
    return os.path.join(os.path.dirname(path), "adapted", os.path.basename(path))


def split_flag(args):
    """The flag that says which column of DATA has the split."""
    return ["--split-col", args.split_col] if args.split_col else []


def csv_commands(study, args):
    """The commands that make the CSVs of a study."""
    commands = []
    for value in args.values if study.vary else ():
        flags = study.vary.format(value)
        path = csv_path(study, args, flags)
        vary = [PYTHON, f"{HERE}/vary.py", args.data]
        commands.append([*vary, path, *flags.split(), *split_flag(args)])
        if args.study == "unseen" and value != "0":
            own = f"--adapt --known {value}"
            commands.append([*vary, adapted(path), *own.split(), *split_flag(args)])
    return commands


def run_command(study, args, method, model, seed, value, flags):
    """(the command of one run, the folder of runs that it belongs to)"""
    out = os.path.normpath(os.path.join(folder_of(study, args), in_a_name(flags)))
    data = [args.data, *split_flag(args)]
    if study.vary:
        data = [csv_path(study, args, study.vary.format(value))]
    command = [PYTHON, EVIDENCE, method, "--model", model, "--data", *data, "--seed", seed,
               *flags.split(), *args.more, "--out", out]
    return command, out


def adapt_commands(study, args, model, seed):
    """The commands by which a run gets to know the people whom its training has never met."""
    out = folder_of(study, args)
    path = csv_path(study, args, study.vary.format("0"))
    data = os.path.basename(path).removesuffix(".csv")
    run = os.path.join(out, data, os.path.basename(os.path.abspath(model)), "cls_p", f"seed{seed}")
    commands = []
    for value in args.values[1:]:
        path = adapted(csv_path(study, args, study.vary.format(value)))
        commands.append([PYTHON, READERS, "adapt", run, "--csv", path, "--fresh",
                         "--out", os.path.dirname(path)])
    return commands


def jobs(study, args):
    """(list of jobs, each a list of commands that follow each other; list of the runs' folders)."""
    found = []
    outs = []
    plan = itertools.product(args.model, args.seeds, args.values, study.flags, study.methods)
    for model, seed, value, flags, method in plan:
        if method in study.once and value != args.values[0]:
            continue
        if method in BASELINES and model != args.model[0]:
            continue  # no model reads anything there
        command, out = run_command(study, args, method, model, seed, value, flags)
        job = [command]
        if args.study == "unseen" and method == "cls_p" and value == "0":
            job += adapt_commands(study, args, model, seed)
        found.append(job)
        if out not in outs:
            outs.append(out)
    if args.study == "unseen":
        outs.append(os.path.join(folder_of(study, args), "adapted"))
    return found, outs


def last_commands(study, args, outs):
    """The commands that print what came out of a study."""
    commands = [[PYTHON, f"{HERE}/table.py", "--out", *outs]]
    if args.study == "later":
        path = csv_path(study, args, study.vary)
        commands.append([PYTHON, f"{HERE}/vary.py", path, "--quarters"])
    return commands


# The script of a command runs in a copy of this process, so that torch is loaded once and not for
# every run. On macOS a copy of a process that has loaded Apple's libraries may crash, so there each
# script begins from nothing.
COPIES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


def load_torch():
    """Loads what a copy of this process would load. Ctrl-C meanwhile ends it without a word."""
    if COPIES.get_start_method() != "fork":
        return
    # If a library asks for a GPU, it shall not claim it here: the copies could not use it any more.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.path.insert(0, os.path.dirname(os.path.abspath(HERE)))
    import plm  # noqa: F401
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_script(command, quiet):
    """What the copy does: the script of a command, with what it prints on stderr if quiet."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # until the script says what Ctrl-C does
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python begins: a lost connection is an error
    sys.argv = command[1:]
    if quiet:
        sys.stdout = sys.stderr
    runpy.run_path(sys.argv[0], run_name="__main__")


def run(command, quiet=False):
    """Runs a command to its end; a SystemExit if it fails."""
    process = COPIES.Process(target=run_script, args=(command, quiet))
    process.start()
    try:
        process.join()
    except KeyboardInterrupt:  # it was heard there, too
        process.join()
        raise
    status = process.exitcode
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status:
        print(f"study.py: the study ends here, since this failed: {shlex.join(command)}",
              file=sys.stderr)
        sys.exit(status)


def make_parser():
    """The argparse parser."""
    parser = argparse.ArgumentParser("study.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--model", nargs="+", help="models (tiny)")
    parser.add_argument("--data", default="sample", help="a name or a CSV (sample)")
    parser.add_argument("--split-col", metavar="COL", help="column of the data's split")
    parser.add_argument("--seeds", nargs="+", default=["42"], help="(42)")
    parser.add_argument("--values", nargs="+", help="other values of what the study varies")
    parser.add_argument("--out", default="out", metavar="DIR", help="folder of all runs (out)")
    parser.add_argument("--print", action="store_true", help="print the commands, run none")
    return parser


def parse(argv):
    """The command line's arguments; `more` has those that are plm.py's."""
    parser = make_parser()
    args, more = parser.parse_known_args(argv)
    args.more = [flag for flag in more if flag != "--"]
    study = STUDIES[args.study]
    if args.values and "{}" not in study.vary:
        parser.error(f"{args.study} has no --values")
    if args.study == "unseen" and args.values and args.values[0] != "0":
        parser.error("unseen begins with people of whom training has no row: --values 0 5 15")
    args.values = args.values or study.values
    args.model = args.model or study.models
    return args


def main(argv=None):
    """Runs a study; returns the exit status."""
    args = parse(sys.argv[1:] if argv is None else argv)
    study = STUDIES[args.study]
    todo, outs = jobs(study, args)
    try:
        if study.vary or not args.print:
            load_torch()
        for command in csv_commands(study, args):
            run(command, quiet=True)
        if args.print:
            for job in todo:
                print(" && ".join(shlex.join(command) for command in job))
            return 0
        for number, job in enumerate(todo, 1):
            for command in job:
                print(f"\n[{number} of {len(todo)}] {shlex.join(command)}", flush=True)
                run(command)
        for command in last_commands(study, args, outs):
            run(command)
        print(f"\n{study.says}")
    except KeyboardInterrupt:
        print("study.py: stopped; the study goes on by the same command", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... --print | head` is no error
    sys.exit(main())
