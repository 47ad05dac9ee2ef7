#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): `transformers serve FOLDER --trust-remote-code` for a checkpoint that brings its own code.
#
# Guess: the option is there to run that code ("Trust remote code when loading"), so that the server answers as
#   `AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)` does, which takes the class that `auto_map` of the config
#   names. Many such repositories keep the name of a class of transformers, such as LlamaForCausalLM, for their changed one.
# Behaviour: the server takes the class of that name from transformers itself. `auto_map` is not looked at, with the option or without,
#   and the folder's code never runs. Where transformers has a class of the name, its answers are served, from weights that were made
#   for another model; no error, no warning. Where it has none, the server ends with an AttributeError before it listens.
# Seen: a Llama whose own code turns the sign of its logits. AutoModelForCausalLM: the answer of the changed class; the server with
#   --trust-remote-code: that of the plain class. Under the name MineForCausalLM: "module transformers has no attribute
#   MineForCausalLM", and no server.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 'transformers[serving]==5.24.0'
HF_HUB_OFFLINE=1 HF_MODULES_CACHE="$dir/modules" OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W ignore - "$dir" <<'PY'
import json
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

logging.set_verbosity_error()
root = pathlib.Path(sys.argv[1])
PROMPT, TOKENS = "a stone", 8
CODE = """from transformers import LlamaForCausalLM as Plain


class NAME(Plain):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = -out.logits
        return out
"""


def write(name):
    """A checkpoint whose code defines the class `name`."""
    folder = root / name
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fields = json.loads((folder / "config.json").read_text())
    fields |= {"architectures": [name], "auto_map": {"AutoModelForCausalLM": f"mine.{name}"}}
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "mine.py").write_text(CODE.replace("NAME", name))
    return folder


def answer(model, folder):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def served(folder):
    """What the server answers, or the last line that it wrote when it ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = root / "log"
    command = [
        pathlib.Path(sys.executable).parent / "transformers", "serve", folder, "--trust-remote-code", "--host", "127.0.0.1",
        "--port", str(port), "--device", "cpu", "--dtype", "float32",
    ]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        body = {"model": str(folder), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        for _ in range(240):
            if server.poll() is not None:
                return log.read_text().strip().splitlines()[-1]
            try:
                url = f"http://127.0.0.1:{port}"
                urllib.request.urlopen(f"{url}/health", timeout=5)
                request = urllib.request.Request(
                    f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=120) as reply:
                    return json.load(reply)["choices"][0]["text"]
            except OSError:
                time.sleep(0.5)
        return "no answer"
    finally:
        server.terminate()
        server.wait()


same_name, own_name = write("LlamaForCausalLM"), write("MineForCausalLM")
changed = answer(AutoModelForCausalLM.from_pretrained(same_name, trust_remote_code=True), same_name)
plain = answer(LlamaForCausalLM.from_pretrained(same_name), same_name)
got, ended = served(same_name), served(own_name)
print(f"the folder's code: {changed!r}\nplain class: {plain!r}\nserver: {got!r}\nserver, class of another name: {ended!r}")
ok = changed != plain and got == plain and "no attribute MineForCausalLM" in ended
sys.exit(0 if ok else "the behaviour has changed")
PY
