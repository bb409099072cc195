#!/bin/sh
# transformers 5.23: `transformers serve` takes the temperature and the seed of a request to
# /v1/chat/completions, but answers greedily all the same where the model's generation_config.json has no
# "do_sample": true, which is how a model is saved by default. Three requests at temperature 1.5 with
# three seeds get one answer, that of temperature 0, and nothing in the reply says so. One would expect a
# server of this API to sample at any temperature above 0. (A generation_config inside the request, which
# is not of this API, makes it sample.)
# Exit status: 0 if it is still so, 1 if it has changed.
set -e
folder=$(mktemp -d)
server=
trap 'test -z "$server" || { kill "$server"; wait "$server"; } 2>/dev/null || :; rm -rf "$folder"' EXIT
trap 'exit 1' HUP INT TERM
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'transformers[serving]==5.23.0' \
    tokenizers==0.23.3 safetensors==0.8.0 numpy==2.4.6 fastapi==0.165.0 uvicorn==0.54.0 openai==3.57.0
cat > "$folder/make.py" <<'PYTHON'
import string

import tokenizers
import torch
import transformers

words = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="?"))
words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False)
words.train_from_iterator([" ".join(string.ascii_lowercase)], trainer)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", pad_token="?")
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
tokenizer.save_pretrained("tiny")
torch.manual_seed(0)
config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                                  num_hidden_layers=2, num_attention_heads=4, initializer_range=0.1,
                                  max_position_embeddings=256, bos_token_id=None, eos_token_id=None)
model = transformers.LlamaForCausalLM(config)
model.save_pretrained("tiny")
PYTHON
cd "$folder"
export HF_HUB_OFFLINE=1 HF_HOME="$folder"
"$folder/venv/bin/python" "$folder/make.py" >"$folder/log" 2>&1
port=$("$folder/venv/bin/python" -c "import socket
s = socket.socket()
s.bind(('127.0.0.1', 0))
print(s.getsockname()[1])")
cat > "$folder/ask.py" <<'PYTHON'
import importlib.metadata
import json
import sys
import time
import urllib.request

address = f"http://127.0.0.1:{sys.argv[1]}"
for wait in range(180):  # until the server is up
    try:
        urllib.request.urlopen(f"{address}/health").close()
        break
    except OSError:
        time.sleep(1)
print(f"transformers {importlib.metadata.version('transformers')}, "
      f"torch {importlib.metadata.version('torch')}")


def ask(**options):
    body = dict(model="tiny", messages=[dict(role="user", content="a b c d")], max_tokens=8, **options)
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        text = json.load(reply)["choices"][0]["message"]["content"]
    print(options, reply.status, text)
    return text


greedy = ask(temperature=0)
answers = {ask(temperature=1.5, seed=seed) for seed in (1, 2, 3)}
print("and where the request itself brings a generation_config:")
sampled = {ask(temperature=1.5, seed=seed, generation_config='{"do_sample": true}') for seed in (1, 2, 3)}
sys.exit(0 if answers == {greedy} and len(sampled) > 1 else 1)
PYTHON
"$folder/venv/bin/transformers" serve tiny --host 127.0.0.1 --port "$port" --device cpu \
    >"$folder/log" 2>&1 &
server=$!
"$folder/venv/bin/python" "$folder/ask.py" "$port"
# Seen on 2026-12-01:
# transformers 5.23.0, torch 2.13.0+cpu
# {'temperature': 0} 200 s s l m m k r g
# {'temperature': 1.5, 'seed': 1} 200 s s l m m k r g
# {'temperature': 1.5, 'seed': 2} 200 s s l m m k r g
# {'temperature': 1.5, 'seed': 3} 200 s s l m m k r g
# and where the request itself brings a generation_config:
# {'temperature': 1.5, 'seed': 1, 'generation_config': '{"do_sample": true}'} 200 h z o r g
# {'temperature': 1.5, 'seed': 2, 'generation_config': '{"do_sample": true}'} 200 j n j z k g b y
# {'temperature': 1.5, 'seed': 3, 'generation_config': '{"do_sample": true}'} 200 e x d h v a j
