#!/usr/bin/env bash
# transformers 5.24.0 (tokenizers as it asks for): `add_eos_token` for a tokenizer whose file begins texts with BOS.
#
# Guess: `AutoTokenizer.from_pretrained(folder, add_eos_token=True)` ends texts with EOS as well and leaves their start as it
#   is: text packed for training gets both. `add_eos_token=False`, where no EOS was added before, changes nothing.
# Behaviour: given either, or set on a loaded tokenizer, the post-processor of tokenizer.json is thrown away, and one is made
#   from two settings, of which `add_bos_token` is False because the file says BOS itself, as Llama-3's does. BOS is gone
#   from every text, without a warning, and from the folder that such a tokenizer is saved to.
# Seen: loaded plainly [1, 5, 6]; add_eos_token=True [5, 6, 2]; False [5, 6]; with add_bos_token=True beside it [1, 5, 6, 2].
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q transformers==5.24.0
"$dir/venv/bin/python" - "$dir" <<'PY'
import sys
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

words = ["<unk>", "<s>", "</s>", "red", "green", "blue", "grey"]
made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
first, second = sys.argv[1] + "/first", sys.argv[1] + "/second"
PreTrainedTokenizerFast(
    tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
).save_pretrained(first)


def ids(folder, **given):
    return AutoTokenizer.from_pretrained(folder, **given)("blue grey").input_ids


seen = [
    ids(first),
    ids(first, add_eos_token=True),
    ids(first, add_eos_token=False),
    ids(first, add_eos_token=True, add_bos_token=True),
]
AutoTokenizer.from_pretrained(first, add_eos_token=False).save_pretrained(second)
seen.append(Tokenizer.from_file(second + "/tokenizer.json").encode("blue grey").ids)
print("plain, eos, no eos, eos and bos, saved after no eos:", *seen)
sys.exit(seen != [[1, 5, 6], [5, 6, 2], [5, 6], [1, 5, 6, 2], [5, 6]])
PY
echo "as described: add_eos_token takes BOS away"
