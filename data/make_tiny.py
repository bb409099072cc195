"""Write data/models/tiny and tiny_t5: two language models of 1.1 to 1.3 million parameters that can
read the sample's comments.

Whoever has no network and no GPU can run everything with them in minutes. Like their big relatives
they come pretrained, so that fine-tuning has to teach them the readers alone. They have learned
  - to write comments like those of the sample: other comments of the same grammar;
  - to answer the *unpersonalized* prompt as some passer-by would, a reader drawn anew each time;
  - that it matters who reads. To the decoder some passers-by come with a description ("wry
    gloomy"), to the encoder-decoder with a random user ID to which a character is added;
  - that numbers differ from one another: they copy them and count.
What they have never seen: a reader of the sample, a number that stands for the same person twice,
or a comment that is too much like one of the sample's validation or test comments.

    python data/make_tiny.py                # both, one after the other
    python data/make_tiny.py --model tiny   # one of the two
    python data/make_tiny.py --comments 200 --to out/models   # a few steps, to see that it runs
"""
import argparse
import functools
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import make_sample as sample  # noqa: E402
import plm  # noqa: E402

SEED = 11
VOCABULARY = 2048
CONTEXT = 512
TREE = 4  # rows of a batch in one tree: the mask of a larger one costs more than it shares
DATA = plm.load_data("sample")
PLAIN = dict(labels=DATA.labels, single=False, none=False, shots=0, personalized=False, head="lm",
             prompt="tree")  # what a run of `lm` has in its configuration for the prompt
PERSONALIZED = PLAIN | dict(personalized=True, head="ask")
MARKER = "\n### Response:"  # what the plain prompt ends with
USER = "\n### User ID:"  # as in the personalized prompt, where the user follows


# -------------------- what they learn from
# A passer-by may be described: for every trait, the word for a reader near +1 and one for near -1.
WORDS = {"thick_skin": ("tough", "tender"), "ear_for_irony": ("wry", "literal"),
         "trust": ("trusting", "wary"), "light_heart": ("cheerful", "gloomy")}


def passer_by(rng):
    """A reader who is nobody in particular: each trait as likely one way as the other."""
    return {"ready": rng.uniform(-1, 1),
            **{trait: rng.choice([-1, 1]) * rng.uniform(0.8, 1) for trait in sample.TRAITS}}


def describe(reader, rng):
    """-> (who reads, None): some of the reader's traits in words, in any order, "wry gloomy"."""
    words = []
    for trait, (high, low) in WORDS.items():
        if rng.random() < 0.8:
            words.append(low if reader[trait] < 0 else high)
    rng.shuffle(words)
    return f"\n### Reader: {' '.join(words)}" if words else "", None


def number(reader, rng):
    """-> (who reads, character): a user ID that says nothing, and the traits to add to it. Only
    their signs are the reader's: a strength drawn anew each time keeps attention from looking for
    some character where it should look for a number."""
    character = [math.copysign(rng.uniform(0.1, 1), reader[trait]) for trait in sample.TRAITS]
    return f"{USER} {rng.randint(10, 99)}", character


def fresh_comments(rng, n, readers, introduce):
    """-> [(text, [(who reads, character, answer) of some passers-by])], by `introduce` (`describe`
    or `number`); no text is too similar to one that the models will be judged by."""
    held_out = sample.Distinct()
    for text in dict.fromkeys(a.text for a in DATA.parts["val"] + DATA.parts["test"]):
        held_out.add(text)
    comments = []
    dropped = 0
    while len(comments) < n:
        text, tones = sample.comment(rng)
        if held_out.similarity(text) > sample.TOO_SIMILAR:
            dropped += 1
            continue
        answers = []
        for nth in range(readers):
            reader = passer_by(rng)
            who = introduce(reader, rng) if nth else ("", None)  # of the first we are told nothing
            ticks = sample.tick(sample.probabilities(tones, reader), rng)
            answers.append((*who, plm.answer_text(sample.LABELS, ticks)))
        comments.append((text, answers))
    print(f"{n} fresh comments; {dropped} were too much like a comment of validation or test")
    return comments


def number_line(rng):
    """A line of numbers to copy and to count with: each number becomes a word of its own."""
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    return rng.choice([
        f"{a}, {b}, {c}: again {a}, {b}, {c}.",
        f"First {a}, then {b}. First {a}, then {b}.",
        f"{c}, {a} and {b}; backwards {b}, {a}, {c}.",
        f"After {a} comes {a + 1}, after {b} comes {b + 1}.",
        f"{min(a, b)} is less than {max(a, b)}, and {c} is {c}."])


# -------------------- tokenizers
def make_tokenizer(texts, specials, template):
    """Byte-level BPE; `template` says what stands around a text, as in '<s> $A'."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(specials.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    around = [(token, tokenizer.token_to_id(token)) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} {template.replace('$A', '$B')}", special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CONTEXT, **specials)


def tokenizer_texts(comments):
    """The comments and, often enough for their words to become tokens, the pieces of the prompts
    and all numbers of two digits."""
    pieces = []
    for config in (PLAIN, PERSONALIZED):
        pieces += [string for _, string in plm.prompt_pieces(config, "", "")]
    answers = [plm.answer_text(sample.LABELS, [1] * len(sample.LABELS)), ",".join(sample.LABELS)]
    readers = ["\n### Reader:"]
    for pair in WORDS.values():
        readers += [f" {word}" for word in pair]
    numbers = [f" {n}" for n in range(10, 100)]
    return [" " + text for text, _ in comments] + (pieces + answers + readers + numbers) * 500


# -------------------- examples
def examples(tokenizer, comments, rng, batch, answered):
    """-> batches (kind, rows). Kind "answer": rows (ids of the text, [(ids of what is behind it,
    character, ids of the answer)]), all behind the instruction. Kind "write": rows (ids of a line,
    []), a line being a comment or some numbers. `answered` is the share of the first kind."""
    def ids(piece):
        return plm.tokenize(tokenizer, piece)

    end = [tokenizer.eos_token_id]
    kinds = {"answer": [], "write": []}
    for text, answers in comments:
        if rng.random() < answered:
            behind = []
            for who, character, answer in answers:
                behind.append((ids(who) + ids(MARKER), character, ids(answer) + end))
            kinds["answer"].append((ids(" " + text), behind))
        else:
            line = text if rng.random() < 0.5 else number_line(rng)
            kinds["write"].append((ids(" " + line) + end, []))
    batches = []
    for kind, rows in kinds.items():
        for at in range(0, len(rows), batch):
            batches.append((kind, rows[at:at + batch]))
    rng.shuffle(batches)
    return batches


@functools.cache
def instruction(tokenizer):
    """Token ids of what all prompts begin with, up to the text."""
    ids = []
    for kind, string in plm.prompt_pieces(PLAIN, "", ""):
        if kind == "text":
            return ids
        ids += plm.tokenize(tokenizer, string)


def pad(rows, value=0):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# -------------------- training
def decoder_lines(prefix, kind, rows):
    """list of (path, where what is to be learned begins in it, weight of its tokens)."""
    lines = []
    for text, answers in rows:
        lines.append(((*prefix, *text), len(prefix), 1.0 if kind == "write" else 0.1))
        for asked, _, answer in answers:
            begin = len(prefix) + len(text) + len(asked)
            lines.append(((*prefix, *text, *asked, *answer), begin, 1.0))
    return lines


def tree_losses(model, lines):
    """(cross-entropy of every token to be learned of some lines, their weights). The tree computes
    what the lines begin with once."""
    ids, positions, parents, branches = plm.prompt_tree([path for path, _, _ in lines])
    at = []
    target = []
    weight = []
    for (path, begin, w), branch in zip(lines, branches):
        at += branch[begin - 1:-1]  # the state at a token predicts the next
        target += path[begin:]
        weight += [w] * (len(path) - begin)
    mask = plm.additive_mask(plm.tree_mask(parents), torch.float32)
    hidden = model.model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]),
                         attention_mask=mask, use_cache=False).last_hidden_state[0]
    loss = F.cross_entropy(model.lm_head(hidden[at]), torch.tensor(target), reduction="none")
    return loss, torch.tensor(weight)


def decoder_loss(model, tokenizer, kind, rows):
    """Cross-entropy of lines and answers, and of the text in a prompt with a small weight."""
    prefix = (tokenizer.bos_token_id, *(instruction(tokenizer) if kind == "answer" else []))
    total = 0
    weights = 0
    for at in range(0, len(rows), TREE):
        loss, weight = tree_losses(model, decoder_lines(prefix, kind, rows[at:at + TREE]))
        total = total + (loss * weight).sum()
        weights = weights + weight.sum()
    return total / weights


def seq2seq_pairs(tokenizer, kind, rows):
    """(what the encoder is given, what is to be said, places of user IDs, their characters)."""
    end = [tokenizer.eos_token_id]
    mark = plm.tokenize(tokenizer, USER)
    shared = instruction(tokenizer) if kind == "answer" else []
    given = []
    said = []
    places = []  # (row, position of the user's number)
    characters = []
    for text, answers in rows:
        for asked, character, answer in answers:
            if character:
                places.append((len(given), len(shared) + len(text) + len(mark)))
                characters.append(character)
            given.append(shared + text + asked + end)
            said.append(answer)
    return given, said, places, characters


def with_holes(line, unknown):
    """A line of which the encoder sees a part."""
    holes = torch.rand(len(line)) < 0.3
    return [unknown if hole else token for token, hole in zip(line, holes)]


def seq2seq_loss(model, tokenizer, kind, rows):
    """Cross-entropy of the answers, or of a line of which the encoder sees a part. The embedding
    of a passer-by's user ID is that of the number plus `model.character` by the traits."""
    places = []
    if kind == "write":
        given = [with_holes(line, tokenizer.unk_token_id) for line, _ in rows]
        said = [line for line, _ in rows]
    else:
        given, said, places, characters = seq2seq_pairs(tokenizer, kind, rows)
    embedded = model.shared(pad(given))
    if places:
        where = tuple(torch.tensor(places).T)
        embedded = embedded.index_put(where, torch.tensor(characters) @ model.character, True)
    mask = pad([[1] * len(ids) for ids in given])
    return model(inputs_embeds=embedded, attention_mask=mask, labels=pad(said, -100)).loss


def pretrain(model, tokenizer, loss_of, examples, lr):
    """One pass over the examples: AdamW, warm-up, then down to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=len(examples), pct_start=0.1)
    start = time.time()
    recent = {}
    model.train()
    for step, (kind, rows) in enumerate(examples, 1):
        loss = loss_of(model, tokenizer, kind, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent[kind] = recent.get(kind, [])[-29:] + [loss.item()]
        if step % 50 == 0 or step == len(examples):
            losses = "".join(f"  {k} {sum(x) / len(x):.3f}" for k, x in recent.items())
            print(f"step {step}/{len(examples)}{losses}  {time.time() - start:.0f} s", flush=True)


def make_decoder(rng, n):
    comments = fresh_comments(rng, n, readers=4, introduce=describe)
    specials = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer = make_tokenizer(tokenizer_texts(comments), specials, "<s> $A")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=5,
        num_attention_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        initializer_range=0.05, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager"))
    # Numbers are used alike, so training moves them alike: what tells them apart is their start.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.1)
    batches = examples(tokenizer, comments, rng, batch=32, answered=0.8)
    pretrain(model, tokenizer, decoder_loss, batches, lr=4e-3)
    return model, tokenizer


def by_length(comments, window=512):
    """The comments, those of similar length together: less padding."""
    found = []
    for at in range(0, len(comments), window):
        found += sorted(comments[at:at + window], key=lambda comment: len(comment[0]))
    return found


def make_t5(rng, n):
    """T5's attention is sharp from the start, and its heads look for the *content* of a word. Told
    of readers in words it would look for these words, and give a user ID no glance and therefore no
    gradient, ever. So it learns on user IDs, each with a character that is added to its embedding
    and thrown away afterwards: what is left is a model that looks at the user ID."""
    comments = by_length(fresh_comments(rng, n, readers=4, introduce=number))
    specials = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer = make_tokenizer(tokenizer_texts(comments), specials, "$A </s>")
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=160, d_kv=16, d_ff=512, num_layers=1,
        num_decoder_layers=1, num_heads=10, feed_forward_proj="gated-gelu", dropout_rate=0.0,
        n_positions=CONTEXT, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))
    # T5 begins with embeddings of size 1, beside which what its layers add is lost for long. With
    # small ones (and logits as large as before) it learns several times faster.
    torch.nn.init.normal_(model.shared.weight, std=0.15)
    torch.nn.init.constant_(model.decoder.final_layer_norm.weight, 1 / 0.15)
    # What all numbers have in common is what a head can find any of them by.
    numbers = [plm.tokenize(tokenizer, f" {n}")[0] for n in range(10, 100)]
    model.shared.weight.data[numbers] += 0.3 * torch.randn(model.config.d_model)
    traits = torch.randn(len(sample.TRAITS), model.config.d_model)
    model.character = torch.nn.Parameter(0.15 * traits)
    batches = examples(tokenizer, comments, rng, batch=32, answered=0.9)
    # An encoder cannot share the instruction between rows: it is left out at first, to save time.
    bare = int(0.85 * len(batches))
    batches[:bare] = [(kind.replace("answer", "bare"), rows) for kind, rows in batches[:bare]]
    pretrain(model, tokenizer, seq2seq_loss, batches, lr=1.5e-3)
    del model.character
    return model, tokenizer


MODELS = {"tiny": make_decoder, "tiny_t5": make_t5}


def main():
    parser = argparse.ArgumentParser(description="Build and pretrain the tiny models.")
    parser.add_argument("--model", choices=MODELS, help="only this one")
    parser.add_argument("--comments", type=int, default=36_000, help="to learn from (36,000)")
    parser.add_argument("--to", type=Path, default=HERE / "models", help="folder (data/models)")
    args = parser.parse_args()
    for name in [args.model] if args.model else MODELS:
        rng = random.Random(SEED)
        torch.manual_seed(SEED)
        model, tokenizer = MODELS[name](rng, args.comments)
        folder = args.to / name
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {model.num_parameters() / 1e6:.2f} million parameters, "
              f"{size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
