#!/usr/bin/env bash
# transformers 5.24.0 (and 5.23.0, for comparison): attention modules that know the cache by its name of 5.0 to 5.23.
#
# Guess: 5.24 renames the argument `past_key_values` to `cache`, and keeps the old name alive with a deprecation. So a
#   custom attention that is written to the signature of 5.23, forward(hidden_states, position_embeddings,
#   attention_mask, past_key_values=None, **kwargs), still gets its cache, or ends in a TypeError.
# Behaviour: the bridge translates the old name on its way INTO the library's own forwards only. From decoder layer to
#   attention the new name is passed, `**kwargs` (which the library's own convention asks for) swallows it, the cache
#   stays empty, and every step sees its newest token alone. `generate` returns other tokens; no error, no warning.
# Seen: under 5.23.0 the module continues a prompt as the stock one does; under 5.24.0 it gives other tokens, and its
#   cache holds 0 tokens after generating.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/attend.py" <<'PY'
import logging, sys, warnings
import torch, transformers
import torch.nn.functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

heard = []
logging.getLogger("transformers").addHandler(type("Ear", (logging.Handler,), {"emit": lambda _, r: heard.append(r.getMessage())})())
warnings.showwarning = lambda message, *rest: heard.append(str(message))


class Attention(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = LlamaForCausalLM(config).eval()
prompt = torch.tensor([[5, 9, 30, 17, 44]])
ask = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=12, min_new_tokens=12, do_sample=False)
want = model.generate(prompt, **ask)[0, 5:].tolist()
for layer in model.model.layers:
    layer.self_attn.__class__ = Attention
whole = model(prompt, use_cache=False).logits
heard.clear()
done = model.generate(prompt, return_dict_in_generate=True, **ask)
got = done.sequences[0, 5:].tolist()
cache = next(value for value in done.values() if isinstance(value, DynamicCache))
print("transformers", transformers.__version__)
print("  stock attention :", want)
print("  custom attention:", got)
print("  tokens in its cache:", cache.get_seq_length(), " warnings:", heard)
silent = not heard
if transformers.__version__ == "5.23.0":
    sys.exit(not (got == want and cache.get_seq_length() == 16))
sys.exit(not (got != want and cache.get_seq_length() == 0 and silent))
PY
for version in 5.23.0 5.24.0; do
    python3 -m venv "$dir/$version"
    "$dir/$version/bin/pip" install -q torch==2.13.0 "transformers==$version"
    OMP_NUM_THREADS=1 "$dir/$version/bin/python" "$dir/attend.py"
done
echo "as described: 5.24.0 passes the cache under a name that the module does not have, and says nothing"
