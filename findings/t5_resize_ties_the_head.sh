#!/bin/sh
# transformers 5.23: a T5 whose checkpoint has an lm_head of its own (as every flan-t5 has) is loaded
# with that head, but resize_token_embeddings, which says nothing of it, ties the head to the
# embeddings: all logits of the old words are others from then on. One would expect that a longer
# vocabulary leaves the logits of the old words as they are.
# Exit status: 0 if it is still so, 1 if the behaviour has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 \
    safetensors==0.8.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import json
import sys

import torch
import transformers
from safetensors.torch import save_file

transformers.logging.set_verbosity_error()
folder = sys.argv[1]
torch.manual_seed(0)
config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
                               decoder_start_token_id=0)
weights = {}
for name, tensor in transformers.T5ForConditionalGeneration(config).state_dict().items():
    if "embed_tokens" not in name:
        weights[name] = tensor.clone()
weights["lm_head.weight"] = torch.randn(64, 32)  # not the embeddings
save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
raw = json.loads(config.to_json_string())
raw.pop("scale_decoder_outputs", None)           # flan-t5's config.json has none
raw |= dict(tie_word_embeddings=False, architectures=["T5ForConditionalGeneration"])
with open(f"{folder}/config.json", "w") as f:
    json.dump(raw, f)

model = transformers.T5ForConditionalGeneration.from_pretrained(folder)


def logits():
    with torch.no_grad():
        out = model(input_ids=torch.arange(8)[None], decoder_input_ids=torch.tensor([[0, 5, 9]]))
    return out.logits[..., :64]


def is_tied():
    return model.lm_head.weight.data_ptr() == model.shared.weight.data_ptr()


before = logits()
tied_before = is_tied()
model.resize_token_embeddings(65, mean_resizing=False)
off = float((logits() - before).norm() / before.norm())
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"loaded:  the head is tied to the embeddings: {tied_before}")
print(f"resized: the head is tied to the embeddings: {is_tied()}")
print(f"logits of the old words: {off:.0%} off")
sys.exit(0 if not tied_before and is_tied() and off > 0.1 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
# Seen on 2026-11-30:
# transformers 5.23.0, torch 2.13.0+cpu
# loaded:  the head is tied to the embeddings: False
# resized: the head is tied to the embeddings: True
# logits of the old words: 163% off
