#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): classifier-free guidance (`guidance_scale`) with beam search and with assisted decoding.
#
# Guess: each strategy searches under the guided scores, a function of the text so far. Beams are those of any other way to compute
#   these scores, assisted greedy decoding says what greedy decoding says, and what cannot be combined is refused, as
#   `negative_prompt_ids` with beams are.
# Behaviour: the second, unconditional pass has a cache of its own inside the logits processor, to which each call adds one token.
#   Nobody reorders it when beams change places, and nobody crops it when candidates are rejected: beams are scored against the
#   texts of others, and after a rejection against a text that has the rejected tokens in it. `use_cache=False` does not help, for
#   the tokens are gathered in the same way. No error, no warning; only with an assistant the log has two lines, on options and
#   processors that come twice.
# Seen, four prompts, 16 new tokens, compared with a processor of the same formula that remembers nothing: greedy agrees for 4 of 4,
#   three beams for 0 of 4, prompt lookup and an assistant for 0 of 4, where the other processor says 4 times what greedy says.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W error::UserWarning - <<'PY'
import logging
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

SCALE, PROMPT = 1.5, 12
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=256,
    initializer_range=0.3, eos_token_id=None, pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()


class Guidance(LogitsProcessor):
    """The formula of `guidance_scale`, with the unconditional text (last token of the prompt and all new ones) run anew."""

    def __call__(self, input_ids, scores):
        alone = model(input_ids[:, PROMPT - 1 :], use_cache=False).logits[:, -1].log_softmax(-1)
        return SCALE * (scores.log_softmax(-1) - alone) + alone


def generate(ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, **options).tolist()


ways = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "assistant": {"assistant_model": model},
}
prompts = torch.randint(3, 64, (4, 1, PROMPT), generator=torch.Generator().manual_seed(1))
said = []
handler = logging.Handler(logging.WARNING)
handler.emit = said.append
logging.getLogger("transformers").addHandler(handler)
seen = {}
for name, way in ways.items():
    said.clear()
    built_in = [generate(ids, guidance_scale=SCALE, **way) for ids in prompts]
    lines = len(said)
    free = [generate(ids, logits_processor=LogitsProcessorList([Guidance()]), **way) for ids in prompts]
    if name == "greedy":
        greedy = free
    seen[name] = (sum(map(list.__eq__, built_in, free)), sum(map(list.__eq__, free, greedy)), lines)
    print(f"{name}: as the other processor {seen[name][0]} of 4, that one as in greedy {seen[name][1]} of 4, lines logged {lines}")
alike = {name: one[0] for name, one in seen.items()}
lossless = [seen[name][1] for name in ("prompt lookup", "assistant")]
silent = [seen[name][2] for name in ways if name != "assistant"]
sys.exit(alike != dict.fromkeys(ways, 0) | {"greedy": 4} or lossless != [4, 4] or any(silent))
PY
echo "as described: guidance follows neither beams nor rejections"
