#!/bin/sh
# transformers 5.23: with `transformers serve --continuous-batching` the first request after the start
# decides how all later ones are sampled: its temperature is kept, theirs are not looked at. If it asked
# for temperature 1.5, requests for temperature 0 get sampled answers, another one each time; if it asked
# for 0, all are greedy. One would expect that a request is answered at the temperature it names, as it
# is without --continuous-batching. (The model's generation_config.json has "do_sample": true here.)
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
model.generation_config.do_sample = True
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


def ask(**options):
    body = dict(model="tiny", messages=[dict(role="user", content="a b c d")], max_tokens=8, **options)
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as reply:
        text = json.load(reply)["choices"][0]["message"]["content"]
    print(options, reply.status, text)
    return text


print(f"transformers {importlib.metadata.version('transformers')}, "
      f"torch {importlib.metadata.version('torch')}", *sys.argv[3:])
first = float(sys.argv[2])
ask(temperature=first)
zero = {ask(temperature=0.0) for _ in range(3)}
hot = {ask(temperature=1.5) for _ in range(3)}
is_kept = len(zero) > 1 and len(hot) > 1 if first else len(zero) == 1 and hot == zero
is_right = len(zero) == 1 and len(hot) > 1
sys.exit(0 if (is_kept if sys.argv[3:] else is_right) else 1)
PYTHON
show() {  # $1: the temperature of the first request; $2: the option
    "$folder/venv/bin/transformers" serve tiny --host 127.0.0.1 --port "$port" --device cpu \
        --cb-num-blocks 16 --cb-max-batch-tokens 64 $2 >"$folder/log" 2>&1 &
    server=$!
    "$folder/venv/bin/python" "$folder/ask.py" "$port" $1 $2
    { kill "$server"; wait "$server"; } 2>/dev/null || :
    server=
}
show 1.5 --continuous-batching
show 0 --continuous-batching
show 1.5
# Seen on 2026-12-01:
# transformers 5.23.0, torch 2.13.0+cpu --continuous-batching
# {'temperature': 1.5} 200 h k i e h z p
# {'temperature': 0.0} 200 f o h k c r f l
# {'temperature': 0.0} 200 s l m m m l g
# {'temperature': 0.0} 200 f f b p w q t
# {'temperature': 1.5} 200 h b a u x n j t
# {'temperature': 1.5} 200 x p b z j l c f
# {'temperature': 1.5} 200 q n e c y l l b
# transformers 5.23.0, torch 2.13.0+cpu --continuous-batching
# {'temperature': 0.0} 200 s s l m m k r g
# {'temperature': 0.0} 200 s s l m m k r g
# {'temperature': 0.0} 200 s s l m m k r g
# {'temperature': 0.0} 200 s s l m m k r g
# {'temperature': 1.5} 200 s s l m m k r g
# {'temperature': 1.5} 200 s s l m m k r g
# {'temperature': 1.5} 200 s s l m m k r g
# transformers 5.23.0, torch 2.13.0+cpu
# {'temperature': 1.5} 200 s b a u j s s r
# {'temperature': 0.0} 200 s s l m m k r g
# {'temperature': 0.0} 200 s s l m m k r g
# {'temperature': 0.0} 200 s s l m m k r g
# {'temperature': 1.5} 200 q j u h h c x m
# {'temperature': 1.5} 200 h u e n j j g
# {'temperature': 1.5} 200 e b w z m i d
