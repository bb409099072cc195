"""A finished run in files that other programs read.

    python data/export.py RUN             (make export RUN=out/sample/tiny/cls_p/seed42)
    python data/export.py RUN --merge     (make export RUN=... MERGE=1)

The first writes RUN/peft: the adapter as PEFT stores one. What PEFT has no place for goes into
beside.safetensors: user tokens, and the head of an encoder-decoder; users and labels stand in its
metadata, in order.

The second writes RUN/merged: a whole model, which needs neither this project nor PEFT. Its linear
layers are what the run computed with, the NF4 weights plus LoRA, in float32. Its users are tokens
of its tokenizer, <user:17>, with the rows V, V + 1, ... of its embeddings; the last is <user:?>,
nobody in particular. README.md in it has the prompt, word for word, and says how to read scores.
"""
import json
import os
import shutil
import signal
import sys

if __name__ == "__main__":  # Ctrl-C while torch is being loaded needs no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import safetensors.torch
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import plm  # noqa: E402


# -------------------- the adapter, for PEFT

def export_peft(folder):
    """Writes adapter_config.json, adapter_model.safetensors and beside.safetensors; says so."""
    config, model, _, users = plm.load_run(folder)
    plm.check(config["tune"] == "lora", f"{folder}: every weight was trained, so there is no "
                                        "adapter (MERGE=1 writes the whole model)")
    adapter = {}
    beside = {}
    for name, p in model.trainable().items():
        tensor = p.detach().cpu().contiguous()
        if ".lora_" in name:
            adapter[f"base_model.model.{name.removeprefix('lm.')}.weight"] = tensor
        elif name == "score.weight" and not model.seq2seq:
            adapter["base_model.model.score.weight"] = tensor
        else:
            beside[name] = tensor
    layers = set()
    for path, layer in model.named_modules():
        if isinstance(layer, plm.LoRALinear):
            layers.add(path.rpartition(".")[2])
    task = "SEQ_CLS" if model.head == "cls" else "CAUSAL_LM"
    if model.seq2seq:
        task = "SEQ_2_SEQ_LM"
    peft_config = dict(
        peft_type="LORA", task_type=task, target_modules=sorted(layers), r=config["r"],
        lora_alpha=config["alpha"], lora_dropout=config["dropout"], bias="none",
        inference_mode=True, modules_to_save=["score"] if task == "SEQ_CLS" else None,
        base_model_name_or_path=plm.MODELS.get(config["model"], config["model"]))
    order = {"users": json.dumps(users), "labels": json.dumps(config["labels"])}
    os.makedirs(f"{folder}/peft", exist_ok=True)
    plm.write_file(f"{folder}/peft/adapter_config.json", peft_config)
    plm.write_file(f"{folder}/peft/adapter_model.safetensors",
                   plm.safetensors_bytes(adapter, {"format": "pt"}))
    plm.write_file(f"{folder}/peft/beside.safetensors", plm.safetensors_bytes(beside, order))
    reader = "PeftModel.from_pretrained(the base model in NF4, it)"
    if task == "SEQ_CLS":
        reader = ("AutoPeftModelForSequenceClassification.from_pretrained(it, num_labels="
                  f"{len(config['labels'])})")
    print(f"{folder}/peft: for {reader}; beside.safetensors holds {', '.join(beside) or 'nothing'} "
          "(users and labels, in order, are in its metadata)")


# -------------------- the weights of a whole model

def merged_weights(config, model, stored):
    """dict name -> float32 of the stored model, with what was trained put in. Leaves the run's
    model in float32 as well."""
    weights = {name: t.detach().float() for name, t in stored.state_dict().items()}
    for path, layer in model.lm.named_modules():
        if isinstance(layer, plm.LoRALinear):
            weight = weights[f"{path}.weight"]
            if config["quant"]:
                layer.base.dense = None  # it may be rounded to bfloat16
                weight = layer.base.dequantize().cpu()
            else:
                layer.base.dense = weight.to(model.device)
            change = layer.scaling * layer.lora_B @ layer.lora_A
            weights[f"{path}.weight"] = weight + change.detach().cpu()
    for name, p in model.lm.named_parameters():
        if p.requires_grad and name in weights:  # --tune full
            weights[name] = p.detach().cpu()
        elif name in weights:
            p.data = weights[name].to(p.device)
    plm.cast(model, torch.float32)
    return weights


def head_name(lm):
    """What the head of a language model is called among its modules."""
    head = lm.get_output_embeddings()
    return next(name for name, module in lm.named_modules() if module is head)


def split_head(weights, stored):
    """(weights without the head and without second names of the embeddings, name of these, dict of
    the head's own tensors)."""
    prefix = f"{head_name(stored)}."
    words = stored.get_input_embeddings().weight.data_ptr()
    head = {}
    body = {}
    word_names = []
    for name, tensor in stored.state_dict().items():
        if name.startswith(prefix):
            head[name] = weights[name]
        elif tensor.data_ptr() == words:
            word_names.append(name)
        else:
            body[name] = weights[name]
    body[word_names[0]] = weights[word_names[0]]
    return body, word_names[0], head


def longer_head(head, n, config):
    """The head with n more rows, the mean of all others. The head stays as it is: its logits of
    words are the same numbers, and a user is never written, since a mean is below the largest."""
    longer = {}
    for name, rows in head.items():
        if getattr(config, "scale_decoder_outputs", False):  # a T5 scales only where it is tied
            rows = rows * config.d_model ** -0.5
        mean = rows.mean(0, keepdim=True)
        longer[name] = torch.cat([rows, mean.expand(n, *mean.shape[1:])])
    return longer


def whole_weights(config, model, stored):
    """dict name -> float32: all that the whole model's file holds."""
    weights = merged_weights(config, model, stored)
    body, words, head = split_head(weights, stored)
    n = 0
    if model.user_embedding is not None:
        users = torch.cat([model.user_embedding, model.nobody]).detach().cpu()
        n = len(users)
        body[words] = torch.cat([body[words], users])
    if model.head == "cls":
        body["score.weight"] = model.score.weight.detach().cpu()
    else:
        body |= longer_head(head, n, stored.config)
    return {name: tensor.contiguous() for name, tensor in body.items()}


# -------------------- its configuration and its tokenizer

def whole_config(config, stored, V, pad):
    """The dict in config.json of the whole model."""
    found = json.loads(stored.config.to_json_string())
    found.pop("scale_decoder_outputs", None)  # a T5 reads it out of tie_word_embeddings
    found |= dict(vocab_size=V, tie_word_embeddings=False, dtype="float32", pad_token_id=pad,
                  architectures=[type(stored).__name__])
    if config["head"] != "cls":
        return found
    classes = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    name = type(stored.config).__name__
    plm.check(type(stored.config) in classes, f"transformers classifies no text with a {name}")
    kind = "single_label" if config["single"] else "multi_label"
    labels = config["labels"]
    found |= dict(architectures=[classes[type(stored.config)].__name__],
                  problem_type=f"{kind}_classification", id2label=dict(enumerate(labels)),
                  label2id={label: i for i, label in enumerate(labels)})
    return found


def token_of(user):
    """The token that stands for a user, or for nobody in particular."""
    return f"<user:{'?' if user is plm.NOBODY else user}>"


def add_user_tokens(tokenizer, names, V):
    """Adds the tokens of users to a tokenizer, as the ids V, V + 1, ...; what is missing below V
    gets names that nobody writes."""
    known = tokenizer.get_vocab()
    missing = range(max(known.values()) + 1, V)
    added = [f"<unused:{i}>" for i in missing] + [token_of(user) for user in names]
    plm.check(len({*added, *known}) == len(added) + len(known),
              "a user's token is there already, as of a user with the name ?")
    tokens = []
    for token in added:  # special ones would be broken up, or left out of an answer
        tokens.append(transformers.AddedToken(token, lstrip=False, rstrip=False, normalized=False,
                                              single_word=False, special=False))
    tokenizer.add_tokens(tokens)
    for user, i in names.items():
        got = tokenizer.convert_tokens_to_ids(token_of(user))
        plm.check(got == i, f"the tokenizer gives {token_of(user)} the id {got}, not {i}")


def fix_pad(tokenizer, head):
    """The id of a pad token that ends no prompt: a classifier reads the last token that is none.
    Answers are written behind a prompt, so a decoder's has its padding before it."""
    _, after = plm.frame(tokenizer)
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id, *range(len(after) + 1)]
    pad = next(i for i in candidates if i is not None and i not in after[-1:])
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.padding_side = "left" if head == "lm" else "right"
    return pad


def whole_prompt(config, text, user):
    """The prompt as one string, the user's token in the user's place."""
    prompt = ""
    for kind, string in plm.prompt_pieces(config, text, user):
        is_token = kind == "reader" and config["ids"] == "token"
        prompt += token_of(user) if is_token else string
    return prompt


# Texts whose pieces a tokenizer might join with what stands around them.
AWKWARD = ["well done, genius", "Really?!", "wait...", "a space behind ", "a line\nand another\n",
           "  two spaces before", "naïve café 😀", "12:30", "a {eos} inside", "it's \"quoted\""]


def awkward_rows(config, tokenizer, users, names):
    """(list of prompts, list of Row): awkward texts as some users read them, and nobody."""
    readers = [*users[:2], plm.NOBODY] if names else users[:2] or [""]
    asked = []
    for text in AWKWARD:
        for user in readers:
            asked.append(plm.Annotation(text.replace("{eos}", tokenizer.eos_token), user,
                                        (0,) * len(config["labels"])))
    rows, _ = plm.encode_rows(tokenizer, config, asked, [], names)
    return [whole_prompt(config, a.text, a.user) for a in asked], rows


def without_spaces_of_its_own(spec):
    """A tokenizer that puts a space before what stands behind a user's token must not: only at the
    beginning of a text. None if it does not."""
    metaspace = dict(type="Metaspace", replacement="\u2581", prepend_scheme="first", split=True)
    normalizer = spec["normalizer"]
    before = spec["pre_tokenizer"] or {}
    kinds = [step["type"] for step in before.get("pretokenizers", [before]) if step]
    if kinds == ["Metaspace"]:
        metaspace = before | dict(prepend_scheme="first")
    elif kinds == ["WhitespaceSplit", "Metaspace"]:  # a T5: any white space is one space
        one_space = dict(type="Replace", pattern={"Regex": "\\s+"}, content=" ")
        steps = [normalizer, one_space] if normalizer else [one_space]
        normalizer = dict(type="Sequence", normalizers=steps)
    elif not kinds and '"Prepend"' in json.dumps(normalizer):  # a Llama 2
        metaspace["split"] = False
        normalizer = None
    else:
        return None
    return spec | dict(normalizer=normalizer, pre_tokenizer=metaspace)


def split_at_sections(spec):
    """A tokenizer that joins the end of a text with the section behind it must not."""
    sections = dict(type="Split", pattern={"Regex": "\n### (Text|User ID|Response):"},
                    behavior="Isolated", invert=False)
    steps = [sections, spec["pre_tokenizer"]] if spec["pre_tokenizer"] else [sections]
    return spec | dict(pre_tokenizer=dict(type="Sequence", pretokenizers=steps))


def special_tokens_apart(spec, special):
    """A SentencePiece vocabulary has "</s>" as a word: inside a text it becomes "< /s>"."""
    steps = [spec["normalizer"]] if spec["normalizer"] else []
    for token in special:
        steps.append(dict(type="Replace", pattern={"String": token},
                          content=f"{token[0]} {token[1:]}"))
    return spec | dict(normalizer=dict(type="Sequence", normalizers=steps))


def fit_prompts(folder, prompts, rows, special):
    """list of the prompts of which the folder's tokenizer makes other ids than the run read, once
    it has been changed as little as makes them fewest."""
    path = f"{folder}/tokenizer.json"
    spec = plm.read_json(path)
    spaces = without_spaces_of_its_own(spec)
    candidates = [spec, spaces, split_at_sections(spec),
                  special_tokens_apart(spaces or spec, special)]
    best = []
    for candidate in candidates:
        if candidate is None:
            continue
        plm.write_file(path, candidate)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        odd = [prompt for prompt, row in zip(prompts, rows)
               if tuple(tokenizer(prompt).input_ids) != row.prompt]
        if not best or len(odd) < len(best[0]):
            best = (odd, candidate)
        if not odd:
            break
    plm.write_file(path, best[1])
    return best[0]


def save_tokenizer(folder, tokenizer, head):
    """Writes a tokenizer that reads special tokens inside texts as letters, as the run did."""
    tokenizer.chat_template = None
    if head == "lm" and plm.frame(tokenizer) == ((), ()):  # a server's chat: the prompt as it is
        tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    tokenizer.save_pretrained(folder)
    path = f"{folder}/tokenizer_config.json"
    known = plm.read_json(path)
    for key in ("is_local", "local_files_only", "backend"):
        known.pop(key, None)
    known |= dict(tokenizer_class="PreTrainedTokenizerFast", split_special_tokens=True,
                  padding_side=tokenizer.padding_side)
    plm.write_file(path, known)


# -------------------- README.md

HOW_CLS = """```python
from transformers import pipeline
read = pipeline("text-classification", "{name}", top_k=None)
print(read([prompt]))
```

The scores are {what} of {labels}. In the model's own words they are `logits`.
The class is read at the last token, so nothing may stand behind the prompt, no space either.
{rule}
"""
HOW_LM = """```python
from transformers import {auto}, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {auto}.from_pretrained("{name}")
ids = tokenizer(prompt, return_tensors="pt")
answer = model.generate(**ids)[0]{cut}
print(tokenizer.decode(answer, skip_special_tokens=True).strip())
```

The answer is {what} {labels}.
Write greedily (temperature 0), and at most {room} tokens. A server of the OpenAI protocol is asked
at `/v1/completions`{chat}.
"""
README = """---
base_model: {base}
---
# {method} of {base} on {data}, seed {seed}

Written by data/export.py of plm.py, a reference of *Personalized Large Language Models* (arXiv
2402.09269). The base model's linear layers were trained with LoRA on top of NF4, and are merged
here into float32. Nothing of that project is needed to use it; the licence of the base model holds.

## The prompt, word for word

```
{prompt}
```

TEXT stands for the text{reader}. prompts.json has it for every user, with `{{text}}` in the
text's place:

```python
import json
prompt = json.load(open("{name}/prompts.json"))["{user}"].replace("{{text}}", "well done, genius")
```

A text of more than {max_text} tokens was cut to so many, and has to be cut here as well:
`tokenizer.decode(tokenizer(" " + text, add_special_tokens=False).input_ids[:{max_text}]).strip()`.
A special token inside a text is read as letters (`split_special_tokens` in tokenizer_config.json);
a user's token is not: break it up.
{odd}

## How to read it

{how}
{users}"""


def how_to_read(config, folder, seq2seq, chat):
    """The part of README.md that says how to ask and how to read what comes."""
    labels = ", ".join(config["labels"])
    if config["head"] == "cls":
        what = "probabilities (softmax)"
        rule = "The highest is the prediction."
        if not config["single"]:
            what = "separate probabilities (sigmoid)"
            rule = "All labels above 0.5 (logits above 0) are predicted."
        return HOW_CLS.format(name=folder, what=what, labels=labels, rule=rule)
    auto = "AutoModelForSeq2SeqLM" if seq2seq else "AutoModelForCausalLM"
    cut = "" if seq2seq else "[ids.input_ids.shape[1]:]"
    what = "one of" if config["single"] else "any of these, with commas between:"
    if config["none"] and not config["single"]:
        labels += f"; or {plm.NONE}"
    says = ", or at `/v1/chat/completions` with the prompt as the user's message" if chat else ""
    return HOW_LM.format(auto=auto, name=folder, cut=cut, what=what, labels=labels, chat=says,
                         room=config["answer_room"])


def write_readme(folder, config, users, names, odd, how):
    """Writes README.md and prompts.json."""
    readers = [*users, plm.NOBODY] if names else users or [""]
    prompts = {}
    for user in readers:
        prompts["?" if user is plm.NOBODY else user] = whole_prompt(config, "{text}", user)
    plm.write_file(f"{folder}/prompts.json", prompts)
    reader = ""
    if names:
        reader = f", and {token_of(readers[0])} for the user: each has a token"
    elif users:
        reader = f", and {readers[0]} for the user"
    warning = ""
    if odd:
        warning = ("Of texts like these the tokenizer makes other ids than the run read:\n\n"
                   + "\n".join(f"    {prompt!r}" for prompt in odd[:3]))
    tokens = ", ".join(f"`{token_of(user)}`" for user in names)
    known = ""
    if names:
        known = f"\n## Users\n\n{tokens}\n\nThe last is nobody in particular, for strangers.\n"
    keys = {key: config[key] for key in ("method", "data", "seed", "max_text")}
    base = plm.MODELS.get(config["model"], config["model"])
    if os.path.isdir(base):
        base = plm.model_name(config["model"])
    text = README.format(**keys, base=base, prompt=whole_prompt(config, "TEXT", readers[0]),
                         reader=reader, name=os.path.basename(folder), odd=warning, how=how,
                         user=next(iter(prompts)), users=known)
    plm.write_file(f"{folder}/README.md", text.encode())


# -------------------- the whole model

def read_alone(folder, head, seq2seq, prompts):
    """(scores, answers) that transformers alone gives of some prompts; one is None."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    if head == "cls":
        auto = transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    plm.check(not info["missing_keys"] and not info["unexpected_keys"], f"{folder}: {info}")
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        if head == "cls":
            return model(**inputs).logits.numpy(), None
        out = model.generate(**inputs)
    if not seq2seq:
        out = out[:, inputs.input_ids.shape[1]:]
    answers = tokenizer.batch_decode(out, skip_special_tokens=True)
    return None, [answer.strip() for answer in answers]


def compare(folder, config, model, tokenizer, prompts, rows):
    """What the whole model does otherwise than the run, in words."""
    ours = plm.predict(model, tokenizer, rows, config)
    scores, answers = read_alone(folder, config["head"], model.seq2seq, prompts)
    if answers is None:
        off = float(abs(scores - ours["scores"]).max())
        return f"scores of {len(rows)} prompts are at most {off:.1g} off plm.py's in float32"
    same = sum(a == b for a, b in zip(answers, ours["answers"]))
    return f"answers to {same} of {len(rows)} prompts are plm.py's in float32"


def export_merged(folder):
    """Writes a whole model into RUN/merged, and says how its readings compare with plm.py's."""
    config, model, tokenizer, users = plm.load_run(folder)
    plm.check(config["head"] == "lm" or not model.seq2seq,
              f"{folder}: a classifier of a T5 reads the decoder at its start token, which no "
              "class of transformers does; lm and lm_p can be merged, or export without --merge")
    stored, _ = plm.load_pretrained(config["model"])
    plm.fit_tokenizer(config["model"], stored, tokenizer)
    names = {}
    if model.user_embedding is not None:
        names = plm.ids_of_users(config, users, model.V)
    prompts, rows = awkward_rows(config, tokenizer, users, names)
    out = f"{folder}/merged"
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    own = plm.load_pretrained(config["model"])[1]  # tokenizer stays as the run's is
    plm.fit_tokenizer(config["model"], stored, own)
    pad = fix_pad(own, config["head"])
    if names:
        add_user_tokens(own, names, model.V)
    save_tokenizer(out, own, config["head"])
    plm.write_file(f"{out}/config.json", whole_config(config, stored, model.V + len(names), pad))
    if config["head"] == "lm":
        stored.generation_config.update(pad_token_id=pad, do_sample=False,
                                        max_new_tokens=config["answer_room"])
        stored.generation_config.save_pretrained(out)
    weights = f"{out}/model.safetensors"
    safetensors.torch.save_file(whole_weights(config, model, stored), weights, {"format": "pt"})
    os.chmod(weights, 0o644)  # it is for others to serve
    odd = fit_prompts(out, prompts, rows, own.all_special_tokens)
    how = how_to_read(config, os.path.basename(out), model.seq2seq, bool(own.chat_template))
    write_readme(out, config, users, names, odd, how)
    print(f"{out}: {compare(out, config, model, tokenizer, prompts, rows)}; {len(odd)} of "
          f"{len(prompts)} awkward prompts have other tokens; README.md says how to ask it")


def export(args):
    """Writes the adapter of a run, or with --merge a whole model."""
    if args.merge:
        export_merged(args.run)
    else:
        export_peft(args.run)


def main(argv=None):
    """Exports one run; returns the exit status."""
    parser = plm.Parser("export.py", description=__doc__.partition("\n")[0])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--merge", action="store_true", help="a whole model instead of an adapter")
    return plm.guarded(parser, export, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know every letter
    sys.exit(main())
