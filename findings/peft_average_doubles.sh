#!/bin/sh
# PEFT 0.21: add_weighted_adapter with combination_type="linear" does not add up what two LoRAs do. It
# adds up their A and their B apart, each times the square root of its weight, and the product of the two
# sums has cross terms. One half of an adapter and one half of a copy of it make twice that adapter; for
# two unrelated ones the result is as far from their average as an adapter of zeros is. The documentation
# calls "linear" a rough approximation; one would still expect that the average of x and x is x.
# combination_type="cat" is exact.
# Exit status: 0 if it is still so, 1 if it has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check peft==0.21.2 transformers==5.23.0 \
    safetensors==0.8.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import sys
import warnings

import peft
import torch
import transformers

warnings.simplefilter("ignore")
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64,
                                  num_hidden_layers=1, num_attention_heads=4)
lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora, adapter_name="one")
model.add_adapter("two", lora)
model.add_adapter("copy", lora)
layer = model.base_model.model.model.layers[0].self_attn.q_proj
with torch.no_grad():
    for part in layer.lora_A, layer.lora_B:
        part["copy"].weight.copy_(part["one"].weight)
    one, two = layer.get_delta_weight("one"), layer.get_delta_weight("two")
    off = {}
    for kind in "linear", "cat":
        for other, right in ("copy", one), ("two", (one + two) / 2):
            name = f"{kind}_{other}"
            model.add_weighted_adapter(["one", other], [0.5, 0.5], name, combination_type=kind)
            got = layer.get_delta_weight(name)
            off[name] = float((got - right).norm() / right.norm())
            print(f"{kind:6s} average of one and {other:4s}: {float(got.norm() / one.norm()):.3f} times "
                  f"the norm of one, {off[name]:.1%} off the average")
sys.exit(0 if off["linear_copy"] > 0.9 and off["linear_two"] > 0.5 and off["cat_two"] < 0.001 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
# Seen on 2026-12-01:
# peft 0.21.2, transformers 5.23.0, torch 2.13.0+cpu
# linear average of one and copy: 2.000 times the norm of one, 100.0% off the average
# linear average of one and two : 0.925 times the norm of one, 99.8% off the average
# cat    average of one and copy: 1.000 times the norm of one, 0.0% off the average
# cat    average of one and two : 0.673 times the norm of one, 0.0% off the average
