#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): RecurrentGemma with beams, and with two caches.
#
# Guess: the cache that is handed in holds all that the model keeps of a text, so that one model serves two conversations by turns,
#   and beam search, which reorders the cache with its beams, reports for the text that it found the log-likelihood that this text
#   has. Both are so with Llama, and with LFM2, whose convolutions keep a state as well.
# Behaviour: the states of the recurrent layers lie in the modules, not in the cache. A call with another text in between leaves its
#   state to the first one, whatever cache each brings; after a step of beam search each beam goes on with the state of the beam that
#   stood in its row before. No error, no warning: `generate` takes `num_beams`, the model takes `past_key_values`.
# Seen: 8 prompts, 8 beams, 24 tokens: scores reported are up to 0.4 nats off the log-likelihood of the same tokens in one pass, and
#   3 of 8 texts are others than without a cache; LFM2 and Llama 2e-5, none. A text continued by a token after a call with another
#   text: logits up to 0.16 off (largest 1.9); LFM2 and Llama 5e-6.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, logging

logging.set_verbosity_error()
torch.set_grad_enabled(False)
PROMPT, NEW, PROMPTS = 8, 24, 8
small = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "initializer_range": 0.3,
}
own = {
    "llama": {},
    "lfm2": {},
    "recurrent_gemma": {
        "lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "recurrent", "attention"],
    },
}
found = {}
for kind in own:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(small | own[kind]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    off, others, turns = 0.0, 0, 0.0
    for seed in range(PROMPTS):
        ids = torch.randint(3, 64, (2, PROMPT), generator=torch.Generator().manual_seed(seed))
        first, second = ids[:1], ids[1:]
        search = {"max_new_tokens": NEW, "num_beams": 8, "do_sample": False, "length_penalty": 0.0}
        search["attention_mask"] = torch.ones_like(first)
        beams = model.generate(first, **search, use_cache=True, return_dict_in_generate=True, output_scores=True)
        others += int(not torch.equal(beams.sequences, model.generate(first, **search, use_cache=False)))
        likely = model(beams.sequences, use_cache=False).logits.log_softmax(-1)[:, PROMPT - 1 : -1]
        likely = likely.gather(2, beams.sequences[:, PROMPT:, None]).sum()
        off = max(off, float((beams.sequences_scores - likely).abs()))

        caches, places = [DynamicCache(config=config) for _ in range(2)], torch.arange(PROMPT)[None]
        for text, cache in zip((first, second), caches, strict=True):
            model(text[:, :-1], past_key_values=cache, position_ids=places[:, :-1], use_cache=True)
        last = model(first[:, -1:], past_key_values=caches[0], position_ids=places[:, -1:], use_cache=True).logits
        whole = model(first, use_cache=False).logits
        turns = max(turns, float((last[0, -1] - whole[0, -1]).abs().max()))
    found[kind] = off, others, turns
    print(f"{kind}: scores of beams off by {off:.2g}, other texts {others} of {PROMPTS}, by turns off by {turns:.2g}")
right = all(found[kind][0] < 1e-3 and not found[kind][1] and found[kind][2] < 1e-4 for kind in ("llama", "lfm2"))
wrong = found["recurrent_gemma"][0] > 0.1 and found["recurrent_gemma"][2] > 0.01
sys.exit(0 if right and wrong else "the behaviour has changed")
PY
