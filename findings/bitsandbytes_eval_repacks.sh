#!/bin/sh
# bitsandbytes 0.50 on a CPU with AVX512_BF16: one forward pass of a Linear4bit in eval mode repacks
# its weights in place. From then on dequantize_4bit of the same weight and quant_state gives other
# numbers, and back in train mode the layer's input gets no gradient at all, with only a warning of
# torch. One would expect that evaluating between two epochs changes nothing.
# Exit status: 0 if it is still so (or the CPU lacks the instructions), 1 if it has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check bitsandbytes==0.50.2 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import sys
import warnings

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit

warnings.simplefilter("ignore")
print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
if not torch.cpu._is_avx512_bf16_supported():
    print("this CPU has no AVX512_BF16: nothing to see here")
    sys.exit(0)
torch.manual_seed(0)
kind = dict(quant_type="nf4", compress_statistics=True)
layer = bitsandbytes.nn.Linear4bit(256, 256, bias=False, compute_dtype=torch.bfloat16, **kind)
layer.weight = bitsandbytes.nn.Params4bit(torch.randn(256, 256) / 16, requires_grad=False, **kind)
layer = layer.to("cpu")


def look():
    layer.train()
    x = torch.linspace(-1, 1, 16 * 256).view(16, 256).to(torch.bfloat16).requires_grad_(True)
    y = layer(x)
    if y.requires_grad:
        y.float().square().sum().backward()
    dense = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return tuple(layer.weight.shape), dense, x.grad


def norm(x):
    return 0.0 if x is None else float(x.float().norm())


shape, dense, grad = look()
layer.eval()
with torch.no_grad():
    layer(torch.ones(1, 256, dtype=torch.bfloat16))
shape_after, dense_after, grad_after = look()
off = norm(dense_after - dense) / norm(dense)
print(f"packed weights: {shape} before, {shape_after} after one forward pass in eval mode")
print(f"dequantized weights: {off:.0%} off")
print(f"norm of the input's gradient: {norm(grad):.3g} before, {norm(grad_after):.3g} after")
sys.exit(0 if off > 0.1 and norm(grad_after) < 0.5 * norm(grad) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
# Seen on 2026-11-30:
# bitsandbytes 0.50.2, torch 2.13.0+cpu
# packed weights: (32768, 1) before, (256, 128) after one forward pass in eval mode
# dequantized weights: 144% off
# norm of the input's gradient: 93.3 before, 0 after
