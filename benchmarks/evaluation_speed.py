"""How long an evaluation of the bundled model takes: 50,000 tokens in one pass, and token by token through the cache.

python benchmarks/evaluation_speed.py
"""

from __future__ import annotations

import time

import torch
from common import environment, write

import surgery
from surgery.bundled import SMALL

SEED = 0
LENGTH = 512
WINDOWS = 98  # 50,176 tokens


def main() -> None:
    model = surgery.load(SMALL, dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(model.config.vocab_size, (WINDOWS, LENGTH), generator=generator)
    result: dict[str, object] = {"model": "small", "tokens": ids.numel()}
    for path in ("prefill", "decode"):
        begun = time.monotonic()
        report = surgery.evaluate(model, text=ids, path=path)
        result[path] = {
            "seconds": round(time.monotonic() - begun, 1),
            "nats_per_token": report.model.nats_per_token,
            "text": report.text_digest,
        }
    write("evaluation_speed", {**environment(SEED), **result})
    print(result)  # noqa: T201


if __name__ == "__main__":
    main()
