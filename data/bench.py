"""How fast a step of training is, beside PEFT and bitsandbytes if these are installed.

    python data/bench.py cls_p --model smollm2 --data popquorn --split-col draw1 --max-text 64
    python data/bench.py cls_p --growth         rows a step, and lengths of a text

Each line is measured in a process of its own: ours, the peer, ours again, on the same rows, with
users named by their number, since the peer has no tokens of users. The peer has the same prompts,
padded, 8 at once on a CPU, where this is as fast as more in half the memory. It is given the stored
weights, since rounding them to bfloat16 before NF4 would change .3 % of the indices, and its layers
stay in train mode, since bitsandbytes 0.50 repacks weights in a forward pass in eval mode on CPUs
with AVX512_BF16, and has wrong gradients from then on.

MFU is the share of a plain matrix product's speed that a step reaches, counting what training needs
at least, on the tokens that are distinct.
"""
import argparse
import os
import random
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context

import numpy as np
import torch
import torch.nn as nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import plm  # noqa: E402

PEER_ROWS = 8  # at once, on a CPU
ROWS = (8, 32, 128, 512)
LENGTHS = (32, 128, 384)


# -------------------- the peer

class PaddedLM(plm.PersonalizedLM):
    """As its base class, but each prompt for itself, by transformers' own forward pass."""
    def __init__(self, lm, head, n_labels):
        super().__init__(lm, head, n_labels)
        lm.set_attn_implementation("sdpa")

    def hidden(self, batch):
        """(P, D) the states that the head reads."""
        mixed = self.lm.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            out = self.lm.base_model(batch["input_ids"], attention_mask=batch["mask"],
                                     use_cache=False)
        return out.last_hidden_state.flatten(0, 1).index_select(0, batch["at"])

    def train(self, mode=True):
        """Only LoRA and what it wraps: the backbone's own dropout stays off."""
        for layer in self.modules():
            if hasattr(layer, "lora_A"):
                nn.Module.train(layer, mode)
        return self


def padded_batch(model, rows):
    """The batch of some rows for the peer."""
    paths = [plm.path_of(row, model.head) for row in rows]
    input_ids, mask = plm.padded(paths)
    at = []
    for i, (row, path) in enumerate(zip(rows, paths)):
        start = i * input_ids.shape[1]
        at += range(start + len(row.prompt) - 1, start + len(path))
    batch = dict(input_ids=input_ids, mask=mask, at=torch.tensor(at))
    return plm.to_device({**batch, **plm.targets_of(rows, model.head)}, model.device)


def to_nf4(lm, dtype, device):
    """Turns the linear layers of a model, but for its head, into bitsandbytes' own."""
    import bitsandbytes
    layers = {path: layer for path, layer in lm.named_modules()
              if isinstance(layer, nn.Linear) and layer is not lm.get_output_embeddings()}
    kind = dict(quant_type="nf4", compress_statistics=True)
    for path, layer in layers.items():
        packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features,
                                            bias=layer.bias is not None, compute_dtype=dtype,
                                            **kind)
        packed.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, **kind)
        if layer.bias is not None:
            packed.bias = nn.Parameter(layer.bias.data, requires_grad=False)
        lm.set_submodule(path, packed.to(device))
    return sorted({path.rpartition(".")[2] for path in layers})


def load_peer(config, dtype):
    """(PaddedLM of PEFT and bitsandbytes, tokenizer)"""
    import peft
    device = plm.find_device()
    lm, tokenizer = plm.load_pretrained(config["model"])
    plm.fit_tokenizer(config["model"], lm, tokenizer)
    lm = lm.float().requires_grad_(False).eval()
    names = to_nf4(lm, dtype, device)
    for p in lm.parameters():
        if p.is_floating_point():  # the packed weights are bytes
            p.data = p.data.to(device, dtype)
    lora = peft.LoraConfig(r=config["r"], lora_alpha=config["alpha"], target_modules=names,
                           lora_dropout=config["dropout"])
    peft.inject_adapter_in_model(lora, lm)
    for name, p in lm.named_parameters():
        if ".lora_" in name:
            p.data = p.data.float()
    torch.manual_seed(config["seed"])
    return PaddedLM(lm, config["head"], len(config["labels"])), tokenizer


# -------------------- what is timed

def long_texts(annotations, length):
    """The annotations, each text made longer by those of others, until it has `length` tokens."""
    texts = [a.text for a in annotations]
    found = []
    for i, a in enumerate(annotations):
        text = a.text
        for other in texts[i + 1:] + texts[:i]:
            if len(text) > 8 * length:
                break
            if other != a.text:
                text += " " + other
        found.append(a._replace(text=text))
    return found


def steps_of(config, data, tokenizer, user_ids, steps, length):
    """Lists of the rows of a step, the first of them twice: it warms up."""
    n = steps * config["batch"]
    some = plm.some_texts(data.parts["train"], n)
    if length:
        some = long_texts(some[:n], length)
    rows, _ = plm.encode_rows(tokenizer, config, some, [], user_ids)
    batches = plm.shuffled_steps(rows, config["batch"], random.Random(config["seed"]))
    full = [batch for batch in batches if len(batch) == config["batch"]]
    plm.check(full, f"{len(rows)} training rows are no step of {config['batch']}")
    full = full[:steps]
    return [full[0]] + full


def linear_weights(lm):
    """How many weights the quantized layers have, ours or bitsandbytes'."""
    n = 0
    for layer in lm.modules():
        if isinstance(layer, plm.NF4Linear):
            n += layer.N * layer.K
        elif hasattr(layer, "quant_state"):
            n += layer.in_features * layer.out_features
    return n


def tokens_in(batch):
    """How many tokens are computed in a batch of ours, or of the peer's."""
    return int(batch["mask"].sum()) if "mask" in batch else len(batch["input_ids"])


def operations(model, rows):
    """(what a step needs at least on distinct tokens, what attention computes): 4 operations a
    frozen weight and token, none being for a gradient of the weight, and for attention 12 D a layer
    for every token that a token sees. What is computed are whole blocks of the mask on a CPU."""
    share = model.share
    model.share = True
    batch = plm.tree_batch(model, rows, model.head)
    model.share = share
    config = model.lm.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_attention_heads * width * config.num_hidden_layers
    tokens = len(batch["input_ids"])
    multiplied = linear_weights(model.lm) * tokens
    if model.head == "lm":
        multiplied += model.lm.get_output_embeddings().weight.numel() * len(batch["at"])
    seen = int(batch["sees"].sum())
    computed = tokens ** 2
    if model.device.type == "cpu":
        blocks = zip(batch["sees"].split(plm.BLOCK), plm.tree_blocks(batch["sees"]))
        computed = sum(len(rows) * len(columns) for rows, columns in blocks)
    return 4 * multiplied + attention * seen, attention * computed


def plain_speed(model):
    """Operations a second of a plain matrix product of this model's width and dtype."""
    D = model.lm.config.hidden_size
    n = 2 ** 16 if model.device.type == "cuda" else 2 ** 12
    a = torch.randn(n, D).to(model.device, model.lm.dtype)
    out = torch.empty_like(a)
    seconds = timeit.repeat(lambda: torch.mm(a, a[:D], out=out)[0, 0].item(), number=3)
    return 3 * 2 * n * D * D / float(np.median(seconds))


def measure(argv, peer, steps, length=None):
    """dict of what a step takes, of the peer or of ours; runs in a process of its own."""
    args = plm.make_parser().parse_args(argv)
    data = plm.load_data(args.data, args.split_col, args.max_eval)
    config = plm.make_config(args, data)
    device = plm.find_device()
    user_ids = {}
    if peer:
        model, tokenizer = load_peer(config, getattr(torch, config["dtype"]))
    else:
        users = sorted({a.user for a in data.parts["train"]}) if config["ids"] == "token" else []
        torch.manual_seed(config["seed"])
        model, tokenizer, _ = plm.load_model(config, users)
        user_ids = plm.ids_of_users(config, users, model.V)
    plm.check(not model.seq2seq, "the bench is for decoders")
    batches = steps_of(config, data, tokenizer, user_ids, steps, length)
    optimizer = plm.make_optimizer(model, config)
    size = PEER_ROWS if device.type == "cpu" else config["batch"]
    losses = []
    seconds = []
    tokens = 0
    needed = np.zeros(2)
    for rows in batches:
        start = time.perf_counter()
        if peer:
            few = [rows[i:i + size] for i in range(0, len(rows), size)]
            parts = [padded_batch(model, some) for some in few]
        else:
            parts = plm.prepare_step(model, rows, config)
        losses.append(plm.train_step(model, parts, optimizer, 1e-4, config).item())
        seconds.append(time.perf_counter() - start)
        if len(seconds) > 1:  # behind the one that warms up
            tokens += sum(map(tokens_in, parts))
            needed += operations(model, rows)
    n = sum(map(len, batches[1:]))
    took = sum(seconds[1:])
    return dict(dtype=str(model.lm.dtype).removeprefix("torch."), rows_per_second=n / took,
                memory_mb=plm.peak_memory_mb(), tokens_a_row=tokens / n,
                mfu=needed[0] / took / plain_speed(model), first_loss=losses[0],
                attention=needed[1] / (needed[0] + needed[1]), parts=len(parts))


def in_a_process(*what):
    """What `measure` returns, measured in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(measure, *what).result()


def print_line(name, found):
    """One line of the table."""
    print(f"{name:18}{found['rows_per_second']:10.1f}{found['memory_mb']:10,}"
          f"{found['tokens_a_row']:12.1f}{found['mfu']:8.2f}{found['first_loss']:12.5f}"
          f"{found['parts']:7}{found['attention']:11.2f}", flush=True)


def print_head(args, dtype):
    """What the table is of."""
    print(f"{args.command} with {args.model} on {args.data}, {dtype}, {torch.get_num_threads()} "
          f"threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'':18}{'rows/s':>10}{'MB':>10}{'tokens/row':>12}{'MFU':>8}{'first loss':>12}"
          f"{'parts':>7}{'attention':>11}")


def beside_peer(argv, args, steps):
    """Prints ours, the peer, ours; BadInput if the losses of an LM's first step differ."""
    ours = in_a_process(argv, False, steps)
    dtype = ours["dtype"]
    print_head(args, dtype)
    print_line("ours", ours)
    lines = {"ours": ours}
    if find_spec("peft") and find_spec("bitsandbytes"):
        peer = in_a_process([*argv, "--dtype", dtype], True, steps)
        print_line("PEFT+bitsandbytes", peer)
        again = in_a_process(argv, False, steps)
        print_line("ours again", again)
        rate = (ours["rows_per_second"] + again["rows_per_second"]) / 2
        print(f"{rate / peer['rows_per_second']:.1f} times as fast, "
              f"{ours['memory_mb'] / peer['memory_mb']:.2f} of its memory")
        lines |= {"peer": peer, "ours again": again}
        off = abs(ours["first_loss"] / peer["first_loss"] - 1)
        most = 1e-3 if dtype == "float32" else 2e-2
        same = plm.METHODS[args.command].head == "cls" or off < most  # a new head is random
        plm.check(same, f"the losses of the first step are {off:.2%} apart")
    else:
        print("PEFT and bitsandbytes are not installed: "
              ".venv/bin/pip install peft 'bitsandbytes==0.50.*'")
    return lines


def growth(argv, args, steps):
    """Prints ours by rows a step and by tokens a text."""
    lines = {}
    for rows in ROWS:
        found = in_a_process([*argv, "--batch", str(rows)], False, max(1, steps * 32 // rows))
        if not lines:
            print_head(args, found["dtype"])
        lines[f"{rows} rows a step"] = found
        print_line(f"{rows} rows a step", found)
    for length in LENGTHS:
        own = [*argv, "--max-text", str(length)]
        found = in_a_process(own, False, max(1, steps // 2), length)
        lines[f"{length} tokens a text"] = found
        print_line(f"{length} tokens a text", found)
    return lines


def main(argv=None):
    """Measures; returns the exit status."""
    parser = argparse.ArgumentParser("bench.py", allow_abbrev=False, epilog="and flags of plm.py",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("cls", "cls_p", "lm", "lm_p"))
    parser.add_argument("--steps", type=int, default=4, help="that are timed (4)")
    parser.add_argument("--growth", action="store_true", help="by rows a step and length of texts")
    own, rest = parser.parse_known_args(argv)
    line = [own.command, *rest]
    try:
        args = plm.make_parser().parse_args(line)
        if own.growth:
            lines = growth(line, args, own.steps)
        else:
            line += [] if args.ids else ["--ids", "number"]
            lines = beside_peer(line, args, own.steps)
        os.makedirs(args.out, exist_ok=True)
        path = f"{args.out}/bench.json"
        key = f"{' '.join(line)}, {torch.get_num_threads()} threads"
        plm.write_file(path, plm.read_json(path) | {key: lines})
    except (plm.BadInput, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
