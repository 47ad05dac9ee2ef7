"""Give a stock model a smaller cache, without converting it: packed codes, or tokens that leave.

    python docs/examples/stock_cache.py [MODEL] [--prompt FILE]

Without arguments it takes the small model that comes with surgery, and a page of this project as prompt.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import surgery
from surgery.bundled import SMALL
from surgery.measure.memory import tensor_bytes
from surgery.runtime.calling import cache_argument

PAGE = Path(__file__).parents[2] / "CHANGELOG.md"
CACHES = {"int8": {"codec": "int8"}, "int4": {"codec": "int4"}, "h2o, 4x": {"evict": "h2o", "ratio": 4}}


def main(argv: list[str] | None = None) -> dict[str, int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(SMALL))
    parser.add_argument("--prompt", type=Path, default=PAGE)
    parser.add_argument("--tokens", type=int, default=400, help="of the prompt, at most")
    options = parser.parse_args(argv)

    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    asked = tokenizer(options.prompt.read_text(), return_tensors="pt", truncation=True, max_length=options.tokens)
    name = cache_argument(model)  # `past_key_values`, or `cache` from transformers 5.24 on
    sizes = {}
    for label, kind in {"dense": None, **CACHES}.items():
        cache = DynamicCache(config=model.config) if kind is None else surgery.cache(model, **kind)
        with torch.inference_mode():
            out = model.generate(**asked, max_new_tokens=16, do_sample=False, pad_token_id=0, **{name: cache})
        sizes[label] = tensor_bytes(cache)
        answer = tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
        print(f"{label:8} {sizes[label]:10,} bytes: {answer!r}")
    return sizes


if __name__ == "__main__":
    main()
