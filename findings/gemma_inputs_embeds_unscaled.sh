#!/bin/sh
# transformers 5.23: Gemma multiplies by the root of the hidden size inside its embedding module, so
# inputs_embeds is taken as scaled already. In 4.57 the model multiplied later, inputs_embeds as well.
# Rows of the embedding weight (or a soft prompt of their size, kept from 4.57) given as inputs_embeds
# are therefore too small by that factor in 5.23, with no word about it, and the logits are others.
# One would expect that the same weights and the same inputs_embeds give the same logits in both.
# Exit status: 0 if it is still so, 1 if it has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cat > "$folder/show.py" <<'PYTHON'
import sys

import torch
import transformers

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
config = transformers.GemmaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, head_dim=16,
                                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
model = transformers.GemmaForCausalLM(config).eval()
embeddings = model.get_input_embeddings()
ids = torch.arange(8, 16)[None]
with torch.no_grad():
    right = model(input_ids=ids).logits
    off = []
    for embeds in embeddings.weight[ids], embeddings(ids):
        logits = model(inputs_embeds=embeds).logits
        off.append(float((logits - right).norm() / right.norm()))
    scale = float(embeddings(ids).norm() / embeddings.weight[ids].norm())
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"rows of the embedding weight as inputs_embeds: logits {off[0]:.0%} off those of input_ids")
print(f"output of the embedding module ({scale:.0f} times the rows) as inputs_embeds: {off[1]:.0%} off")
is_off = sys.argv[1] == "off"
sys.exit(0 if (off[0] > 0.1) == is_off and off[1] < 0.001 else 1)
PYTHON
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==4.57.6 \
    safetensors==0.8.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore "$folder/show.py" same
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
"$folder/venv/bin/python" -W ignore "$folder/show.py" off
# Seen on 2026-12-01:
# transformers 4.57.6, torch 2.13.0+cpu
# rows of the embedding weight as inputs_embeds: logits 0% off those of input_ids
# output of the embedding module (1 times the rows) as inputs_embeds: 0% off
# transformers 5.23.0, torch 2.13.0+cpu
# rows of the embedding weight as inputs_embeds: logits 63% off those of input_ids
# output of the embedding module (8 times the rows) as inputs_embeds: 0% off
