"""Write data/models/tiny and tiny_t5: two language models of a million parameters that have learned to read the sample.

Whoever has no network and no GPU can run everything with them in a minute. Like their big relatives they come
pretrained, so that fine-tuning needs to teach them the readers alone. What they have learned:
  - to write comments like those of the sample (other comments, of the same grammar);
  - to answer the *unpersonalized* prompt as some passer-by would: a reader drawn anew for every comment;
  - that numbers differ from one another: they copy them and count.
What they have never seen: a reader of the sample, the personalized prompt, or a comment that is too much like one of the sample's
validation or test comments.

    python data/make_tiny.py                # both, about eight minutes on two cores
    python data/make_tiny.py --model tiny   # one of the two
"""
import argparse
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config,
                          T5ForConditionalGeneration)

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import make_sample as sample  # noqa: E402
import plm  # noqa: E402

SEED, COMMENTS, VOCABULARY, CONTEXT = 11, 40_000, 2048, 512
METHOD = plm.METHODS["lm"]            # its prompt: unpersonalized, without examples


# ------------------------------------------------------------------ what they learn from
def passer_by(rng):
    """A reader who is nobody in particular: each trait as likely one way as the other."""
    return {"ready": rng.uniform(-1, 1),
            **{trait: rng.choice([-1, 1]) * rng.uniform(0.8, 1) for trait in sample.TRAITS}}


def fresh_comments(rng, n):
    """-> [(text, answer of a passer-by as 0/1)], none too similar to a comment that the models will be judged by."""
    held_out, comments, dropped = sample.Distinct(), [], 0
    for text in {a.text: 0 for split in plm.load_data("sample")[3:5] for a in split}:
        held_out.add(text)
    while len(comments) < n:
        text, tones = sample.comment(rng)
        if held_out.similarity(text) > sample.TOO_SIMILAR:
            dropped += 1
            continue
        p = sample.probabilities(tones, passer_by(rng))
        ticks = [int(rng.random() < x) for x in p]
        if not any(ticks):
            ticks[p.argmax()] = 1
        comments.append((text, ticks))
    print(f"{n} fresh comments; {dropped} were too much like a comment of validation or test")
    return comments


def number_line(rng):
    """A line of numbers to copy and to count with, so that each number becomes a word of its own."""
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    return rng.choice([
        f"{a}, {b}, {c}: again {a}, {b}, {c}.", f"First {a}, then {b}. First {a}, then {b}.",
        f"{c}, {a} and {b}; backwards {b}, {a}, {c}.", f"After {a} comes {a + 1}, after {b} comes {b + 1}.",
        f"{min(a, b)} is less than {max(a, b)}, and {c} is {c}."])


# ------------------------------------------------------------------ tokenizers
def make_tokenizer(texts, specials, template):
    """Byte-level BPE; `template` says what stands around a text, as in '<s> $A'."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(specials.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} {template.replace('$A', '$B')}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in template.split() if token[0] == "<"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **specials)


def tokenizer_texts(comments):
    """Comments, the pieces of both prompts and, often enough to become tokens, every number of two digits."""
    pieces = [piece for name in ("lm", "lm_p") for part in plm.prompt_parts(plm.METHODS[name], sample.LABELS, "", "")
              for piece in part]
    answers = [plm.answer_text(sample.LABELS, [1] * len(sample.LABELS)), ",".join(sample.LABELS)]
    return [" " + text for text, _ in comments] + (pieces + answers + [f" {n}" for n in range(10, 100)]) * 500


# ------------------------------------------------------------------ examples: (what is given, what is to be said)
def examples(tokenizer, comments, rng, bos):
    """-> [(prompt ids, target ids)]: one in two comments with the prompt and an answer, one in three to be written,
    and number lines. The decoder reads and writes one sequence; T5 is given a damaged text and repairs it."""
    end, unknown = [tokenizer.eos_token_id], tokenizer.unk_token_id
    out = []
    for text, ticks in comments:
        kind = rng.random()
        if kind < 0.6:
            shared, middle, user = plm.prompt_parts(METHOD, sample.LABELS, text, "")
            given = sum((plm.tokenize(tokenizer, piece) for piece in (*shared, *middle, *user)), [])
            said = plm.tokenize(tokenizer, plm.answer_text(sample.LABELS, ticks))
        else:
            said = plm.tokenize(tokenizer, " " + (text if kind < 0.85 else number_line(rng)))
            given = [] if unknown is None else [unknown if rng.random() < 0.25 else token for token in said]
        out.append((bos + given + (end if unknown is not None else []), said + end))
    return out


def batches(rows, size, rng):
    """Batches of rows of about the same length, in random order."""
    rng.shuffle(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    groups = [[rows[i] for i in order[at:at + size]] for at in range(0, len(rows) - size + 1, size)]
    rng.shuffle(groups)
    return groups


def pad(rows, value=0):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# ------------------------------------------------------------------ training
def decoder_loss(model, rows):
    """Cross-entropy of what follows the prompt, and of the comment inside the prompt with a small weight."""
    ids = pad([given + said for given, said in rows])
    weight = pad([[0.0] + [0.1] * (len(given) - 1) + [1.0] * len(said) for given, said in rows])[:, 1:]
    at = weight > 0
    logits = model.lm_head(model.model(input_ids=ids[:, :-1]).last_hidden_state[at])
    return (F.cross_entropy(logits, ids[:, 1:][at], reduction="none") * weight[at]).sum() / weight.sum()


def seq2seq_loss(model, rows):
    given = pad([g for g, _ in rows])
    mask = torch.arange(given.shape[1]) < torch.tensor([len(g) for g, _ in rows])[:, None]
    return model(input_ids=given, attention_mask=mask.long(), labels=pad([s for _, s in rows], -100)).loss


def pretrain(model, loss_of, rows, rng, lr, batch=32):
    """One pass over the rows: AdamW, warm-up, then down to zero along a cosine."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.98))
    groups = batches(rows, batch, rng)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(groups), pct_start=0.05)
    start, recent = time.time(), []
    model.train()
    for step, group in enumerate(groups, 1):
        loss = loss_of(model, group)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = recent[-49:] + [loss.item()]
        if step % 50 == 0 or step == len(groups):
            print(f"step {step}/{len(groups)}  loss {sum(recent) / len(recent):.3f}  {time.time() - start:.0f} s", flush=True)


def make_decoder(comments, rng):
    specials = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer = make_tokenizer(tokenizer_texts(comments), specials, "<s> $A")
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, initializer_range=0.05,
        pad_token_id=0, bos_token_id=1, eos_token_id=2))
    pretrain(model, decoder_loss, examples(tokenizer, comments, rng, bos=[1]), rng, lr=4e-3)
    return model, tokenizer


def make_t5(comments, rng):
    specials = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer = make_tokenizer(tokenizer_texts(comments), specials, "$A </s>")
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=128, d_kv=32, d_ff=320, num_layers=3, num_decoder_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, n_positions=CONTEXT,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))
    pretrain(model, seq2seq_loss, examples(tokenizer, comments, rng, bos=[]), rng, lr=4e-3)
    return model, tokenizer


MODELS = {"tiny": make_decoder, "tiny_t5": make_t5}


def main():
    parser = argparse.ArgumentParser(description="Build and pretrain the tiny models.")
    parser.add_argument("--model", choices=MODELS, help="only this one")
    only = parser.parse_args().model
    for name in [only] if only else MODELS:
        rng = random.Random(SEED)
        torch.manual_seed(SEED)
        model, tokenizer = MODELS[name](fresh_comments(rng, COMMENTS), rng)
        folder = HERE / "models" / name
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        print(f"{folder.relative_to(HERE.parent)}: {model.num_parameters() / 1e6:.2f} million parameters, "
              f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
