#!/usr/bin/env bash
# transformers 5.24.0: what `from_pretrained(..., gguf_file=...)` takes over from a GGUF.
#
# Guess: for the families that its documentation lists (Llama, Starcoder2) the model computes what the file says; where it
#   has a tensor or a setting that the loader does not know, there is an error or at least a line in the report of keys.
# Behaviour: tensors without a place in the model are passed over, and settings are taken from a fixed list by family.
#   A Llama with biases on its attention (attn_q.bias and so on) is built and loaded without them: the config has no
#   attention_bias, and missing, unexpected and mismatched keys are all empty. Of Starcoder2 `rope.freq_base` is not on
#   the list, so that a model with base 1000000 (as all published ones) runs with the class's default of 10000.
# Seen: logits differ by more than 1 in both; without biases, and with base 10000, they are equal.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - "$dir" <<'PY'
import pathlib, sys
import gguf, torch, transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Starcoder2Config

SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
ids = torch.arange(24)[None]


def pairs(rows):  # llama.cpp rotates neighbours: rows of q and k of a Llama are stored in that order
    return rows.reshape(4, 2, rows.shape[0] // 8, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def difference(name, config, family, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder = pathlib.Path(sys.argv[1]) / name
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", family)
    writer.add_context_length(128)
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_vocab_size(64)
    writer.add_rope_dimension_count(8)
    settings(writer)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_pad_token_id(0)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family)
    places = gguf.get_tensor_name_map(arch, 2)
    for key, tensor in model.named_parameters():
        tensor = tensor.detach()
        if family == "llama" and (".q_proj." in key or ".k_proj." in key):
            tensor = pairs(tensor)
        writer.add_tensor(places.get_name(key, (".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", output_loading_info=True)
    with torch.no_grad():
        found = (loaded(ids).logits - model(ids).logits).abs().max().item()
    silent = not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    print(f"  {name}: logits differ by {found:.2g}; report of keys empty: {silent}")
    return found, silent


def llama(writer):
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)


def starcoder(base):
    def add(writer):
        writer.add_layer_norm_eps(1e-5)
        writer.add_rope_freq_base(base)
    return add


def rope(base):
    return {"rope_type": "default", "rope_theta": base}


print("transformers", transformers.__version__, "gguf 0.19.0")
plain = difference("llama", LlamaConfig(**SHAPE), "llama", llama)
biases = difference("llama-with-biases", LlamaConfig(**SHAPE, attention_bias=True), "llama", llama)
small = difference("starcoder2-base-10000", Starcoder2Config(**SHAPE, rope_parameters=rope(1e4)), "starcoder2", starcoder(1e4))
large = difference("starcoder2-base-1000000", Starcoder2Config(**SHAPE, rope_parameters=rope(1e6)), "starcoder2", starcoder(1e6))
sys.exit(not (
    max(plain[0], small[0]) < 1e-4 and min(biases[0], large[0]) > 1 and all(x[1] for x in (plain, biases, small, large))
))
PY
echo "as described: transformers loads both files without a word, and computes something else"
