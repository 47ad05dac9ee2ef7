"""The parent's likeliest tokens, kept on disk: epochs after the first need no parent."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from surgery.errors import CheckpointError

from .losses import CHUNK_LOGITS, Head, TopK

META = "meta.json"


class KeptLogits:
    """One file per sequence with the log-probabilities of the parent's `k` likeliest next tokens, in float16.

    Args:
        folder: where the files lie; made where absent.
        k: tokens per position.
        temperature: of the parent's distribution.
        parent: names the parent. Another one, k or temperature is refused.

    Raises:
        CheckpointError: the folder holds what another parent said.
    """

    def __init__(self, folder: Path, *, k: int, temperature: float, parent: str) -> None:
        self.folder, self.k, self.temperature = folder, k, temperature
        meta = {"k": k, "temperature": temperature, "parent": parent}
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / META
        if file.is_file() and (found := json.loads(file.read_text())) != meta:
            raise CheckpointError(f"{folder}: holds logits of {found}, this run asks for {meta}. Remove the folder.")
        _write(file, lambda part: part.write_text(json.dumps(meta) + "\n"))

    def read(self, inputs: dict[str, Tensor]) -> TopK | None:
        """What the parent said about these sequences, [B, T, k]; None where one of them is new."""
        files = [self._file(inputs, row) for row in range(len(inputs["input_ids"]))]
        if not all(file.is_file() for file in files):
            return None
        rows = [load_file(file) for file in files]
        device = inputs["input_ids"].device
        return TopK(*(torch.stack([row[name] for row in rows]).to(device) for name in TopK._fields))

    @torch.no_grad()
    def write(self, inputs: dict[str, Tensor], h_BTD: Tensor, head: Head, labels_BT: Tensor) -> TopK:
        """Keep what the parent's last hidden states say, and return it as it would be read."""
        parts: list[list[Tensor]] = [[], [], []]
        size = max(1, CHUNK_LOGITS // len(head.weight_VD))
        following = labels_BT.roll(-1, 1).clamp_min(0).flatten()
        for start in range(0, labels_BT.numel(), size):
            rows = slice(start, start + size)
            logits = head(h_BTD.flatten(0, 1)[rows])
            nll = logits.logsumexp(-1) - logits.gather(-1, following[rows, None])[:, 0]
            log_p, ids = (logits / self.temperature).log_softmax(-1).topk(self.k, -1)
            for part, tensor in zip(parts, (ids.int(), log_p.half(), nll), strict=True):
                part.append(tensor)
        ids, log_p, nll = (torch.cat(part).unflatten(0, labels_BT.shape) for part in parts)
        for row in range(len(labels_BT)):
            tensors = {"ids": ids[row], "log_p": log_p[row], "nll": nll[row]}
            _write(self._file(inputs, row), partial(save_file, {k: t.cpu().contiguous() for k, t in tensors.items()}))
        return TopK(ids, log_p, nll)

    def _file(self, inputs: dict[str, Tensor], row: int) -> Path:
        state = hashlib.sha256()
        for name in sorted(inputs):  # positions too: they say what sees what
            state.update(inputs[name][row].cpu().numpy().tobytes())
        return self.folder / f"{state.hexdigest()[:32]}.safetensors"


def _write(file: Path, write: Callable[[Path], object]) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    write(part)
    part.replace(file)
