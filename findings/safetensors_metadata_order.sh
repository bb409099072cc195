#!/bin/sh
# safetensors 0.8: saving the same tensors with the same metadata gives other bytes from call to call as
# soon as the metadata has two keys: they are written in the random order of a hash map. One would
# expect one file from one content, as it is without metadata or with one key, such as the "format"
# that transformers writes, so that two checkpoints can be compared by a hash of their files.
# Exit status: 0 if it is still so, 1 if it has changed.
set -e
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat > "$folder/show.py" <<'PYTHON'
import hashlib
import sys

import numpy
import safetensors
from safetensors.numpy import load, save

print(f"safetensors {safetensors.__version__}, numpy {numpy.__version__}")
tensors = {"weight": numpy.arange(4, dtype=numpy.float32), "bias": numpy.zeros(2, numpy.float32)}
files = {}
for keys in 0, 1, 2, 3, 5:
    metadata = {f"key{i}": "value" for i in range(keys)} or None
    saved = [save(tensors, metadata) for _ in range(100)]
    assert all((load(data)["weight"] == tensors["weight"]).all() for data in saved)
    files[keys] = len({hashlib.sha256(data).hexdigest() for data in saved})
    print(f"keys in the metadata: {keys}; different files of 100: {files[keys]}")
sys.exit(0 if files[0] == files[1] == 1 and files[2] > 1 and files[5] > 1 else 1)
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
# Seen on 2026-12-01:
# safetensors 0.8.0, numpy 2.4.6
# keys in the metadata: 0; different files of 100: 1
# keys in the metadata: 1; different files of 100: 1
# keys in the metadata: 2; different files of 100: 2
# keys in the metadata: 3; different files of 100: 6
# keys in the metadata: 5; different files of 100: 67
