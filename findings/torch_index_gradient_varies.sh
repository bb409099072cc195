#!/bin/sh
# torch 2.13 on a CPU: the gradient of x[index] in float32 is not the same bits from run to run if index
# names rows more than once and torch has two threads: both add into the same row, in the order in which
# they happen to come. The gradient of x.index_select(0, index), the same values, is the same every time,
# and so is that of x[index] in float64. One would expect it of all three on a CPU with the same inputs
# and a fixed number of threads. torch.use_deterministic_algorithms(True) makes x[index] reproducible.
# Exit status: 0 if it is still so (or there is one core only), 1 if it has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import os
import sys

import torch

print(f"torch {torch.__version__}")
if os.cpu_count() < 2:
    print("one core only: nothing to see here")
    sys.exit(0)
torch.set_num_threads(2)


def count(name, take, dtype=torch.float32):
    torch.manual_seed(0)
    start, weight = torch.randn(100, 64, dtype=dtype), torch.randn(20000, 64, dtype=dtype)
    index = torch.randint(100, (20000,))
    seen = set()
    for _ in range(100):
        x = start.clone().requires_grad_(True)
        (take(x, index) * weight).sum().backward()
        seen.add(x.grad.numpy().tobytes())
    print(f"{name}: {len(seen)} different gradients in 100 runs")
    return len(seen)


varies = count("x[index], float32", lambda x, index: x[index])
same = [count("x[index], float64", lambda x, index: x[index], torch.float64),
        count("x.index_select(0, index), float32", lambda x, index: x.index_select(0, index))]
torch.use_deterministic_algorithms(True)
same.append(count("x[index], float32, deterministic algorithms", lambda x, index: x[index]))
sys.exit(0 if varies > 1 and same == [1, 1, 1] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
# Seen on 2026-12-01:
# torch 2.13.0+cpu
# x[index], float32: 71 different gradients in 100 runs
# x[index], float64: 1 different gradients in 100 runs
# x.index_select(0, index), float32: 1 different gradients in 100 runs
# x[index], float32, deterministic algorithms: 1 different gradients in 100 runs
