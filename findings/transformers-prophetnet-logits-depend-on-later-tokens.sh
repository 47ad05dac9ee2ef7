#!/usr/bin/env bash
# transformers 5.24.0: ProphetNet's decoder, with and without its cache.
#
# Guess: a decoder is causal. Logits of a token are the same whether later tokens are there or not, and the same through
#   the cache, token by token, as in one pass over the whole text.
# Behaviour: the streams that predict add a bias per relative position, which depends on the hidden state. Its axes for
#   time, stream and head are put in one order and read in another, so that a token gets biases of other tokens' hidden
#   states, later ones among them, and which ones depends on how many tokens there are. Loss in teacher forcing looks at
#   what comes after, and greedy decoding differs with the cache and without; no error, no warning. Where one token is
#   given at a time, heads and streams are still exchanged.
# Seen: logits of up to 3.8; a token's differ by up to 0.71 from those of the same text cut off after it, and by up to
#   0.93 from those through the cache. Greedy tokens part at the second new one. With the axes read in the order in which
#   they are put, all differences are below 1e-5.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'PY'
import inspect
import sys
import textwrap

import torch
import transformers
from transformers import ProphetNetConfig, ProphetNetForConditionalGeneration
from transformers.models.prophetnet import modeling_prophetnet

torch.manual_seed(0)
model = ProphetNetForConditionalGeneration(ProphetNetConfig(
    vocab_size=64, hidden_size=32, encoder_ffn_dim=64, decoder_ffn_dim=64, num_encoder_layers=2, num_decoder_layers=2,
    num_encoder_attention_heads=2, num_decoder_attention_heads=2, max_position_embeddings=64, ngram=2, init_std=0.3,
    pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)).eval()
ids, text = torch.randint(3, 64, (1, 20)), torch.randint(3, 64, (1, 12))
text[:, 0] = 1


@torch.no_grad()
def differences():
    encoded = model.get_encoder()(ids)

    def logits(tokens, **more):
        return model(encoder_outputs=encoded, decoder_input_ids=tokens, **more)

    whole = logits(text, use_cache=False).logits[0]
    cut, cached, cache = [], [], None
    for i in range(text.shape[1]):
        cut.append(float((logits(text[:, : i + 1], use_cache=False).logits[0, -1] - whole[i]).abs().max()))
        out = logits(text[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        cached.append(float((out.logits[0, 0] - whole[i]).abs().max()))
    ask = {"max_new_tokens": 12, "do_sample": False}
    tokens = [model.generate(ids, use_cache=use, **ask)[0].tolist() for use in (True, False)]
    return float(whole.abs().max()), max(cut), max(cached), tokens


print("transformers", transformers.__version__)
size, cut, cached, tokens = differences()
print(f"largest logit {size:.2f}; differences: text cut off after the token {cut:.2f}, through the cache {cached:.2f}")
print(f"  greedy with the cache    {tokens[0]}\n  greedy without the cache {tokens[1]}")
found = cut > 0.1 and cached > 0.1 and tokens[0] != tokens[1]

attention = modeling_prophetnet.ProphetNetNgramSelfAttention
source = textwrap.dedent(inspect.getsource(attention.get_predict_relative_pos_embeddings))
put = "permute(0, 2, 1, 4, 3)"
if put not in source:
    sys.exit("the order of axes is another one now")
space = {}
exec(source.replace(put, "permute(0, 1, 4, 2, 3)"), vars(modeling_prophetnet), space)
attention.get_predict_relative_pos_embeddings = space["get_predict_relative_pos_embeddings"]
_, cut, cached, tokens = differences()
print(f"read in the order in which they are put: cut off {cut:.1e}, through the cache {cached:.1e}, greedy {tokens[0] == tokens[1]}")
sys.exit(not (found and cut < 1e-4 and cached < 1e-4 and tokens[0] == tokens[1]))
PY
