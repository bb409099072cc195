#!/bin/sh
# bitsandbytes 0.50 on a CPU: 8-bit blockwise quantization (of the state of 8-bit optimizers, and of the
# absmax in NF4's double quantization) does not always take the nearest of its 256 values. It rounds to
# 65,536 even steps from -1 to 1 first, none of which is zero, and looks up the value nearest to that:
# an exact 0 comes back as 0.00002 times the block's absmax, and the seven values around 0 are never used.
# So 8-bit optimizers move weights whose gradient was zero all the time, Lion8bit at nearly full speed.
# One would expect the nearest value, as the CUDA code looks for it, and a zero that stays zero.
# Exit status: 0 if it is still so, 1 if it has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check bitsandbytes==0.50.2 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import sys

import bitsandbytes
import torch
from bitsandbytes import functional

print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}")
torch.manual_seed(0)
code = functional.create_dynamic_map(signed=True)


def nearest(x):
    return torch.bucketize(x.double(), (code[1:].double() + code[:-1].double()) / 2)


def quantize(x):  # blocks of 256 whose first element is 1: absmax is 1, nothing else is rounded
    x = torch.cat([torch.ones(len(x) // 255, 1), x.view(-1, 255)], 1)
    return functional.quantize_blockwise(x, code=code, blocksize=256)[0][:, 1:].reshape(-1).long()


zero = float(code[quantize(torch.zeros(255))][0])
print(f"an exact zero in a block of absmax 1 comes back as {zero:.4g}")
size = torch.logspace(-9, 0, 255 * 2000, dtype=torch.float64).float()
got = quantize(torch.cat([size, -size]))
unused = code[sorted(set(range(256)) - set(got.tolist()))]
print("never used:", " ".join(f"{float(x):.3g}" for x in unused))
for scale in 1e-1, 1e-3, 1e-5:
    x = torch.randn(255 * 4000).mul(scale).clamp(-1, 1)
    got = quantize(x)
    off = float((code[got] - x).norm() / (code[nearest(x)] - x).norm())
    print(f"values of size {scale:g}: {float((got != nearest(x)).float().mean()):.2%} not the nearest, "
          f"error {off:.3f} times that of the nearest")

weight = torch.randn(4096, 1024)
plain = functional.quantize_4bit(weight, quant_type="nf4")[1].absmax
state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)[1]
x = (plain - state.offset).view(-1, 256)
x = (x / x.abs().amax(1, keepdim=True)).view(-1)
off = int((state.absmax.view(-1).long() != nearest(x)).sum())
print(f"NF4 with double quantization: {off} of {len(x)} absmax are not the nearest")

moved = {}
for name in "Adam", "Adam8bit", "Lion", "Lion8bit":
    p = torch.nn.Parameter(torch.zeros(8192))
    optimizer = getattr(bitsandbytes.optim, name)([p], lr=0.001, weight_decay=0.0)
    for _ in range(100):
        p.grad = torch.zeros(8192)
        p.grad[::256] = 1.0  # all others have no gradient, ever
        optimizer.step()
    moved[name] = float(p.data[1].abs())
    print(f"{name}, 100 steps of 0.001: gradient 1 moves a weight by {float(p.data[0].abs()):.4f}, "
          f"gradient 0 by {moved[name]:.5f}")
sys.exit(0 if zero and moved["Adam8bit"] and moved["Lion8bit"] > 0.05 and not moved["Lion"] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
# Seen on 2026-12-01:
# bitsandbytes 0.50.2, torch 2.13.0+cpu
# an exact zero in a block of absmax 1 comes back as 2.125e-05
# never used: -7.75e-06 -3.25e-06 -5.5e-07 0 5.5e-07 3.25e-06 7.75e-06
# values of size 0.1: 0.34% not the nearest, error 1.000 times that of the nearest
# values of size 0.001: 6.91% not the nearest, error 1.006 times that of the nearest
# values of size 1e-05: 85.43% not the nearest, error 5.450 times that of the nearest
# NF4 with double quantization: 111 of 65536 absmax are not the nearest
# Adam, 100 steps of 0.001: gradient 1 moves a weight by 0.1000, gradient 0 by 0.00000
# Adam8bit, 100 steps of 0.001: gradient 1 moves a weight by 0.1000, gradient 0 by 0.00048
# Lion, 100 steps of 0.001: gradient 1 moves a weight by 0.1000, gradient 0 by 0.00000
# Lion8bit, 100 steps of 0.001: gradient 1 moves a weight by 0.1000, gradient 0 by 0.09900
