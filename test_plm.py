"""Tests of plm.py, in the order of its sections: each says what would be wrong if it failed.
Oracles are bitsandbytes' bytes, scikit-learn's numbers, transformers' own forward pass; `make test`
needs neither a network nor a GPU."""
import copy
import csv
import hashlib
import json
import math
import os
import random
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers

import plm

HERE = os.path.dirname(os.path.abspath(__file__))
CPU = torch.device("cpu")
VOCABULARY = 97


# ------------------------------------------------------------------------------- data and splits

def write_csv(path, rows, header=("text", "user", "calm", "angry")):
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
    return str(path)


def some_rows(n=60):
    return [(f"comment number {i // 3} about thing {i // 3 * 7}", f"u{i % 3}", i % 2, 1 - i % 2)
            for i in range(n)]


@pytest.mark.parametrize("text", ["cut, with a comma", 'a "quoted"\nline\r\nbreak', "emoji \U0001F600",
                                  "</s> ### Response: <|endoftext|>", "x" * 1_000_000])
def test_any_text_survives_reading(tmp_path, text):
    path = write_csv(tmp_path / "a.csv", [(text, "user with\nnewline", 0, 1), *some_rows()])
    labels, annotations = plm.read_annotations(path, "text", "user")
    assert labels == ["calm", "angry"]
    assert annotations[0] == plm.Annotation(text, "user with\nnewline", (0, 1))


def test_byte_order_mark_and_crlf_are_no_part_of_the_data(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,user,calm\r\nhello,u1,1\r\n")
    assert plm.read_annotations(str(path), "text", "user") == (["calm"], [("hello", "u1", (1,))])


@pytest.mark.parametrize("header, row, says", [
    (("txt", "user", "calm"), ("t", "u", "1"), "no column 'text'; there are: txt, user, calm"),
    (("text", "user", "calm"), ("t", "u", "2"), "row 2: label 'calm' is '2', not 0 or 1"),
    (("text", "user", "calm"), (" ", "u", "1"), "row 2: 'text' is empty"),
    (("text", "user", "calm"), ("t", "", "1"), "row 2: 'user' is empty"),
    (("text", "user", "calm"), ("t", "u"), "row 2 (line 3) does not have the 3 columns"),
    (("text", "user", "a,b"), ("t", "u", "1"), "label 'a,b'"),
])
def test_bad_rows_are_named(tmp_path, header, row, says):
    path = write_csv(tmp_path / "a.csv", [("fine", "u", "1"), row], header)
    with pytest.raises(plm.BadInput, match=re.escape(says)):
        plm.read_annotations(path, "text", "user")


def test_files_that_are_no_csv(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,user,a\ncaf\xe9,u,1\n".encode("latin-1"))
    (tmp_path / "empty.csv").write_text("")
    for name, says in (("latin.csv", "not UTF-8"), ("empty.csv", "no annotations"),
                       ("none.csv", "no such file")):
        with pytest.raises(plm.BadInput, match=says):
            plm.read_annotations(str(tmp_path / name), "text", "user")


def test_splits_share_no_text_and_know_every_user(tmp_path):
    rows = [(f"text {i} {'!' * (i % 3)}", f"u{i % 40}", 1, 0) for i in range(900)]
    rows += [("  TEXT 7 ", "u1", 0, 1)]  # the same text but for case and space: the same split
    data = plm.load_data(write_csv(tmp_path / "a.csv", rows))
    ids = [{plm.text_id(a.text) for a in part} for part in (data.train, data.val, data.test)]
    assert not (ids[0] & ids[1] or ids[0] & ids[2] or ids[1] & ids[2])
    users = [{a.user for a in part} for part in (data.train, data.val, data.test)]
    assert users[1] <= users[0] and users[2] <= users[0]
    assert 0.6 < len(data.train) / len(rows) < 0.8


def test_official_split_leaves_out_texts_that_cross(tmp_path):
    for name, texts in (("train", "ab"), ("dev", "bc"), ("test", "d")):
        (tmp_path / f"{name}.tsv").write_text("".join(f"{t}\t1\tid\n" for t in texts))
    where = plm.official_splits(str(tmp_path), plm.DATASETS["goemotions"]["splits"])
    assert where == {plm.text_id(t): s for t, s in (("a", "train"), ("c", "val"), ("d", "test"))}


# ---------------------------------------------------------------------------------------- prompts

LABELS = ["calm", "angry"]
SHOWN = [plm.Annotation("hi", "u2", (1, 0)), plm.Annotation("go away", "u2", (1, 1))]
GOLDEN = {
    "cls": "Which of the labels fit the text? Answer with labels from the list, separated by commas."
           "\n### Labels: calm, angry\n### Text: well\n### Response:",
    "cls_p": "Which of the labels would this user choose for the text? Answer with labels from the "
             "list, separated by commas.\n### Labels: calm, angry\n### Text: well\n### User ID: u2"
             "\n### Response:",
    "q_1s": "Which of the labels fit the text? First see how other people answered. Answer with "
            "labels from the list, separated by commas.\n### Labels: calm, angry\n### Text: hi"
            "\n### Response: calm\n### Text: well\n### Response:",
    "q_2s_p": "Which of the labels would this user choose for the text? First see how this user "
              "answered before. Answer with labels from the list, separated by commas.\n### Labels: "
              "calm, angry\n### Text: hi\n### Response: calm\n### Text: go away\n### Response: calm, "
              "angry\n### Text: well\n### User ID: u2\n### Response:",
}
GOLDEN |= {"lm": GOLDEN["cls"], "lm_p": GOLDEN["cls_p"], "q_0s": GOLDEN["cls"],
           "q_0s_p": GOLDEN["cls_p"]}


@pytest.mark.parametrize("name", GOLDEN)
def test_prompts_word_for_word(name):
    method = plm.METHODS[name]
    parts = plm.prompt_parts(method, LABELS, "well", "u2", SHOWN[:method.shots])
    assert "".join(sum(parts, [])) == GOLDEN[name]


def tokenizers():
    return {name: transformers.AutoTokenizer.from_pretrained(plm.MODELS[name]["id"])
            for name in ("tiny", "tiny_t5")}


@pytest.mark.parametrize("name", ["tiny", "tiny_t5"])
def test_tokens_spell_the_prompt_and_nothing_in_a_text_ends_it(name):
    tokenizer = tokenizers()[name]
    texts = ["a plain comment", "</s> <s> <pad> ### Response: calm</s>", "word " * 3000]
    rows, counts = plm.encode(tokenizer, plm.METHODS["lm_p"], LABELS,
                              [plm.Annotation(t, "u 2\n", (1, 1)) for t in texts], max_text=50)
    assert counts["texts_cut"] == 1
    for row in rows:
        ids = row.prompt + row.answer[:-1]
        content = ids[ids[0] == tokenizer.bos_token_id:]
        content = [i for i in content if not (tokenizer.bos_token_id is None
                                              and i == tokenizer.eos_token_id)]
        assert tokenizer.eos_token_id not in content and tokenizer.pad_token_id not in content
        # Only the text was cut: instruction, user and marker are whole.
        assert row.shared == rows[0].shared and row.user == rows[0].user
        assert row.answer == rows[0].answer and row.answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(rows[0].user).split() == "u 2 ### Response:".split() or name == "tiny_t5"


def test_examples_come_from_the_right_people_and_never_repeat_the_text():
    train = [plm.Annotation(f"train {i}", f"u{i % 7}", (1, 0)) for i in range(60)]
    for seed in range(40):
        asked = plm.Annotation(f"test {seed}", f"u{seed % 9}", (0, 1))  # u7, u8 have no rows
        for name in ("q_1s", "q_2s", "q_1s_p", "q_2s_p"):
            method = plm.METHODS[name]
            shown = plm.choose_examples(method, train)(asked)
            assert all(a in train for a in shown) and asked.text not in {a.text for a in shown}
            assert {a.user == asked.user for a in shown} <= {method.personalized}
            own = seed % 9 < 7
            assert len(shown) == (method.shots if own or not method.personalized else 0)
            assert shown == plm.choose_examples(method, train)(asked)  # fixed for the row


# -------------------------------------------------------------------------------------------- NF4

def quantized(weight):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return plm.NF4Linear.from_linear(linear)


def test_nf4_values_are_quantiles_of_the_normal_distribution():
    # QLoRA, appendix E: 8 quantiles above 0 and 7 below, equally spaced in probability.
    quantile, edge = statistics.NormalDist().inv_cdf, 0.9677083
    above = [quantile(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    values = torch.tensor(sorted([*above, 0.0, *below])) / max(above)
    assert torch.allclose(values, plm.NF4, atol=2e-7)


def golden_weight():
    """(48, 344): blocks of several scales, a zero block, a last block that is not full."""
    i = torch.arange(48 * 344, dtype=torch.float64)
    weight = (torch.sin(i * 0.7391) + 0.5 * torch.sin(i * i * 0.0173)) * (1 + i // 2000)
    weight[640:704] = 0
    return (weight.float() / 8).round() .div(16).view(48, 344)[:, :]


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def test_nearest_value_by_two_lookups_is_the_nearest_value():
    x = torch.cat([torch.linspace(-1, 1, 100_001), plm.NF4, plm.midpoints(plm.NF4)])
    cell = (x * 16 + 16).int()
    index = plm.CELL_INDEX[cell] + (x > plm.CELL_BORDER[cell])
    assert torch.equal(index.long(), torch.bucketize(x, plm.midpoints(plm.NF4)))


def test_error_is_what_bitsandbytes_publishes():
    # Its tests list, for blocks of 64 of N(0, 1): mean 0.072798, std 0.000074 over 200 samples.
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    layer = quantized(weight)
    error = (layer.dequantize() - weight).abs()
    assert abs(error.mean() - 0.0728) < 7 * 0.000074 + 0.0001  # double quantization adds 0.0001
    # No weight is further off than half the widest gap (0.152) and what absmax itself is off.
    absmax = weight.view(-1, 64).abs().amax(1)
    assert (error.view(-1, 64).amax(1) <= 0.152 * absmax + (layer.absmax() - absmax).abs()).all()


def test_bits_a_weight():
    torch.manual_seed(0)
    layer = quantized(torch.randn(512, 512))
    size = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert abs(8 * size / 512 ** 2 - 4.127) < 0.001


@pytest.mark.parametrize("shape", [(3, 5), (1, 64), (7, 129), (2, 131_072 + 64)])
def test_odd_sizes_and_zeros(shape):
    weight = torch.zeros(shape)
    assert torch.equal(quantized(weight).dequantize(), weight)
    torch.manual_seed(0)
    weight = torch.randn(shape)
    assert (quantized(weight).dequantize() - weight).abs().max() < 0.16 * weight.abs().max()


def test_nf4_matmul_is_the_dense_one_and_keeps_no_dense_weight():
    torch.manual_seed(0)
    layer, x = quantized(torch.randn(96, 128)), torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert not [t for t in saved if t.is_floating_point() and t.numel() >= 96 * 128]
    y.square().sum().backward()
    dense = x.detach().clone().requires_grad_()
    F.linear(dense, layer.dequantize()).square().sum().backward()
    assert torch.equal(y, F.linear(x, layer.dequantize())) and torch.allclose(x.grad, dense.grad)
    layer.dense = layer.dequantize()
    assert torch.equal(layer(x), y)  # the dense copy is of the rounded weights


# ------------------------------------------------------------------------------------------- LoRA

def small_lora(dropout=0.0):
    torch.manual_seed(0)
    return plm.LoRALinear(quantized(torch.randn(24, 64)), r=2, alpha=32, dropout=dropout)


def test_lora_begins_as_nothing_and_is_w_plus_ba():
    layer, x = small_lora(), torch.randn(3, 64)
    assert torch.equal(layer(x), layer.base(x))
    nn.init.normal_(layer.lora_B)
    dense = layer.base.dequantize() + 32 / 2 * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer(x), F.linear(x, dense), atol=1e-4)


def test_lora_gradients_are_autograds():
    layer, x = small_lora(), torch.randn(3, 64, requires_grad=True)
    nn.init.normal_(layer.lora_B)
    drop = plm.drop_mask(x.shape, 0.3, CPU)
    inputs = [t.detach().double().requires_grad_() for t in (x, layer.lora_A, layer.lora_B)]
    assert torch.autograd.gradcheck(
        lambda x, A, B: plm.LoRAMatmul.apply(x, drop, A, B, 1.7), inputs)
    thin = inputs[0].masked_fill(drop, 0)
    assert torch.allclose(plm.LoRAMatmul.apply(inputs[0], drop, *inputs[1:], 1.7),
                          1.7 * thin @ inputs[1].T @ inputs[2].T)


def test_dropout_hits_five_percent_and_only_in_training():
    assert abs(plm.drop_mask((1000, 1000), 0.05, CPU).float().mean() - 13 / 256) < 0.001
    layer, x = small_lora(dropout=0.5), torch.randn(3, 64)
    nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer.train()(x), layer.eval()(x))
    assert torch.equal(layer(x), layer(x))


# ------------------------------------------------------- the prompt tree, the models, the batches

def random_rows(seed=1, texts=4):
    """Rows of one shared part, some texts, one to four readers of each."""
    rng = random.Random(seed)

    def ids(low, high):
        return tuple(rng.randrange(5, VOCABULARY - 7) for _ in range(rng.randrange(low, high)))

    shared, rows = ids(9, 10), []
    for i in range(texts):
        text = ids(3, 30) if i else (shared[0],)  # of very different lengths: several buckets
        for _ in range(rng.randrange(1, 5)):
            rows.append(plm.Row(shared, text, (7, rng.randrange(5, 9), 8), ids(1, 4) + (2,),
                                (rng.randrange(2), 1, 0), None))
    return rows


ARCHITECTURES = {
    "llama": ("LlamaConfig", dict(num_key_value_heads=2)),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2)),
    "phi": ("PhiConfig", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "t5": ("T5Config", {}),
}


def random_model_folder(path, name):
    """A Hugging Face folder of a small random model of an architecture."""
    config, extra = ARCHITECTURES[name]
    size = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                decoder_start_token_id=0, dropout_rate=0.0) if name == "t5" else dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, config)(vocab_size=VOCABULARY, pad_token_id=2, eos_token_id=2,
                                           **size, **extra)
    torch.manual_seed(0)
    kind = transformers.AutoModelForSeq2SeqLM if name == "t5" else transformers.AutoModelForCausalLM
    lm = kind.from_config(config)
    for p in lm.parameters():  # all of it random: norms and biases too
        p.data += 0.1 * torch.randn_like(p)
    lm.save_pretrained(path)
    return str(path), lm.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_dir(request, tmp_path_factory):
    path, lm = random_model_folder(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, path, lm


def ready(path, head, lora=True):
    """A PersonalizedLM from a folder, LoRA's B not zero, so that every gradient is one."""
    torch.manual_seed(1)
    lm = plm.load_quantized(path, CPU, torch.float32)
    if lora:
        plm.add_lora(lm, r=2, alpha=4, dropout=0.05)
    model = plm.PersonalizedLM(lm, head, 3)
    for name, p in model.trainable().items():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    return model.train(False)


def test_only_the_linears_of_the_backbone_are_quantized(model_dir):
    name, path, _ = model_dir
    model = ready(path, "lm")
    leaves = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, plm.LoRALinear)}
    attention = {"llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
                 "mistral": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
                 "phi": "q_proj k_proj v_proj dense fc1 fc2",
                 "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h",
                 "t5": "q k v o wi_0 wi_1 wo"}
    assert leaves == set(attention[name].split())
    assert isinstance(model.lm.get_output_embeddings(), nn.Linear)
    assert set(n.split(".")[-1] for n in model.trainable()) == {"lora_A", "lora_B"}


def unquantized_reference(model, lm):
    """transformers' own model with the rounded weights of ours."""
    reference = copy.deepcopy(lm)
    layers = dict(reference.named_modules())
    for name, m in model.lm.named_modules():
        if isinstance(m, plm.NF4Linear):
            layers[name].weight.data = m.dequantize()
    return reference.eval()


def test_loaded_model_is_transformers_own_with_rounded_weights(model_dir):
    # Ours loads tensor by tensor and shares prefixes; theirs runs each prompt by itself.
    name, path, lm = model_dir
    model, rows = ready(path, "lm", lora=False), random_rows()
    reference = unquantized_reference(model, lm)
    batch = plm.make_batch(model, rows)
    ours, theirs = model(batch)[batch["of"]], []
    for row in rows:
        if name == "t5":
            out = reference(input_ids=torch.tensor([row.prompt]),
                            decoder_input_ids=torch.tensor([(0, *row.answer[:-1])]))
            theirs.append(out.logits[0])
        else:
            out = reference(torch.tensor([row.prompt + row.answer[:-1]]))
            theirs.append(out.logits[0, len(row.prompt) - 1:])
    assert torch.allclose(ours, torch.cat(theirs), atol=2e-5)


@pytest.mark.parametrize("head", ["cls", "lm"])
def test_loss_and_every_gradient_are_equal_with_and_without_sharing(model_dir, head):
    _, path, _ = model_dir
    rows, results = random_rows(), []
    for share in (True, False):
        model = ready(path, head)
        batch = plm.make_batch(model, rows, share)
        loss = plm.summed_loss(model, batch) / plm.n_targets(rows, head)
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.trainable().items()}, batch["tokens"]))
    (loss, grads, tokens), (plain_loss, plain_grads, plain_tokens) = results
    assert abs(loss - plain_loss) < 1e-5 and tokens <= plain_tokens
    for name in plain_grads:
        assert grads[name].abs().max() > 0, f"{name} gets no gradient"
        assert (grads[name] - plain_grads[name]).abs().max() < 1e-5, name


def test_the_tree_computes_every_distinct_prefix_once():
    rows = random_rows(texts=6)
    for head in ("cls", "lm"):
        answer = (lambda row: row.answer[:-1]) if head == "lm" else (lambda row: ())
        prefixes = {(row.shared + row.text + row.user + answer(row))[:n] for row in rows
                    for n in range(1, len(row.prompt + answer(row)) + 1)}
        assert plm.tree_batch(rows, head, CPU)["tokens"] == len(prefixes)
        plain = sum(len(row.prompt + answer(row)) for row in rows)
        assert plm.tree_batch(rows, head, CPU, share=False)["tokens"] == plain


def test_pieces_of_a_batch_give_the_whole_gradient(model_dir):
    # 32 rows at once or 5 at a time: the mean is over the targets of the step, not of the piece.
    _, path, _ = model_dir
    rows, grads = random_rows(), []
    for micro in (0, 5):
        model = ready(path, "lm")
        optimizer = torch.optim.SGD(model.trainable().values(), lr=1.0)
        plm.nn.utils.clip_grad_norm_([], 1.0)
        before = {n: p.detach().clone() for n, p in model.trainable().items()}
        for layer in (m for m in model.modules() if isinstance(m, plm.LoRALinear)):
            layer.dropout = 0.0
        plm.train_step(model, rows, optimizer, clip=1e9, micro=micro)
        grads.append({n: before[n] - p.detach() for n, p in model.trainable().items()})
    assert all(torch.allclose(grads[0][n], grads[1][n], atol=1e-5) for n in grads[0])


def test_greedy_decoding_over_the_tree_is_transformers_generate(model_dir):
    _, path, lm = model_dir
    model, rows = ready(path, "lm", lora=False), random_rows(seed=3)
    reference = unquantized_reference(model, lm)
    write = plm.write_answers if model.seq2seq else plm.grow_answers
    with torch.no_grad():
        ours, plain = write(model, rows, 2, 9), write(model, rows, 2, 9, share=False)
    for row, answer in zip(rows, ours):
        ids = torch.tensor([row.prompt])
        out = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9,
                                 do_sample=False, pad_token_id=2, eos_token_id=2)[0].tolist()
        out = out[1:] if model.seq2seq else out[len(row.prompt):]
        assert answer == (out[:out.index(2)] if 2 in out else out)
    assert ours == plain


def test_frozen_bytes_stay_and_everything_trained_moves(model_dir):
    _, path, _ = model_dir
    model, rows = ready(path, "cls"), random_rows()
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    frozen |= {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n: p.detach().clone() for n, p in model.trainable().items()}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    plm.train_step(model, rows, optimizer, clip=1.0)
    now = dict(model.named_buffers()) | dict(model.named_parameters())
    assert all(torch.equal(now[n], t) for n, t in frozen.items())
    assert all(not torch.equal(now[n], t) for n, t in trained.items())


def test_masks_and_pooling_go_by_length_when_pad_is_eos_and_ends_inside(model_dir):
    # 2 is pad and eos of these models; texts that contain it must change nothing but themselves.
    _, path, _ = model_dir
    model, rows = ready(path, "cls"), random_rows()
    rows[3] = rows[3]._replace(text=(2, 2, 9, 2))
    batch = plm.make_batch(model, rows)
    together = model(batch)[batch["of"]]
    for row, scores in zip(rows, together):
        alone = plm.make_batch(model, [row])
        assert torch.allclose(model(alone)[alone["of"]][0], scores, atol=1e-5)


def test_batches_hold_every_row_once_and_keep_texts_together():
    rows = [plm.Row((1,), (i // 3,) * (1 + i % 17 // 3), (i,), (2,), (1,), None) for i in range(1000)]
    for rng in (None, random.Random(0)):
        batches = plm.in_batches(rows, 32, rng)
        assert sorted(row.user for b in batches for row in b) == sorted(row.user for row in rows)
        assert [len(b) for b in batches].count(32) == 31
    assert plm.in_batches(rows, 32, random.Random(0)) == plm.in_batches(rows, 32, random.Random(0))


# ------------------------------------------------------------------------- training and the paper

def test_learning_rate_climbs_then_falls_to_nearly_nothing():
    rates = [plm.learning_rate(step, 100, 1.0, 0.05) for step in range(100)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True) and rates[-1] < 0.001


def miniature(head, personalized, tmp_path):
    """F1 after training on texts that two users label in opposite ways."""
    path, _ = random_model_folder(tmp_path, "llama")
    model = ready(path, head)
    rows, labels = [], ["calm", "angry"]
    for i in range(8):
        for user in (0, 1):
            chosen = (user, 1 - user)
            ids = (50 + user, 9) if personalized else (9,)
            rows.append(plm.Row((1, 3, 5), (20 + i, 30 + i), ids, (60 + user, 2), chosen, None))
    model = plm.PersonalizedLM(model.lm, head, 2)
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        plm.train_step(model, rows, optimizer, clip=1.0)
    if head == "cls":
        predicted = plm.label_scores(model, rows) > 0
    else:
        with torch.no_grad():
            answers = plm.grow_answers(model.train(False), rows, 2, 3)
        predicted = [(answer == [61], answer == [60]) for answer in answers]
    return plm.f1_scores([row.labels for row in rows], predicted)["f1_macro"]


@pytest.mark.parametrize("head", ["cls", "lm"])
def test_the_paper_in_miniature(head, tmp_path):
    # Same text, two users, opposite labels: who is told the user can be right, nobody else can.
    # Without the user the best is to tick both labels always: F1 = 2 / 3.
    assert miniature(head, True, tmp_path / "p") == 1.0
    assert miniature(head, False, tmp_path / "plain") <= 2 / 3 + 1e-6


# ----------------------------------------------------------------------------- answers and scores

@pytest.mark.parametrize("answer, chosen, unknown", [
    ("calm, angry", (1, 1, 0), 0), ("Angry.", (0, 1, 0), 0), ("ANGRY;calm", (1, 1, 0), 0),
    ("calm calm", (1, 0, 0), 0), ("", (0, 0, 0), 0), ("I think: angry", (0, 1, 0), 2),
    ("not_calm", (0, 0, 1), 0), ("very furious", (0, 0, 0), 2)])
def test_answers_are_read_with_forgiveness(answer, chosen, unknown):
    assert plm.parse_answer(answer, ["calm", "angry", "not_calm"]) == (chosen, unknown)


def test_answers_we_train_on_are_read_back():
    labels = ["generalisation", "generalisation_unfair", "hostile"]
    for chosen in ((1, 0, 1), (0, 1, 0), (1, 1, 1)):
        assert plm.parse_answer(plm.answer_text(labels, chosen), labels) == (chosen, 0)


def test_f1_by_hand():
    # Label a: TP 1, FP 1, FN 1 -> 2 / 4.  b: TP 2, FP 0, FN 1 -> 4 / 5.  c: nothing anywhere -> 0.
    gold = [(1, 1, 0), (1, 1, 0), (0, 1, 0)]
    predicted = [(1, 1, 0), (0, 1, 0), (1, 0, 0)]
    scores = plm.f1_scores(gold, predicted)
    assert scores["per_label"] == pytest.approx([0.5, 0.8, 0.0])
    assert scores["f1_macro"] == pytest.approx(1.3 / 3)
    assert scores["f1_micro"] == pytest.approx(6 / 9)
