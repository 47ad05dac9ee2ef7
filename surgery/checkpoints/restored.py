"""An ordinary checkpoint made from a GGUF: safetensors, config, tokenizer. Everything else reads that."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

from .classes import model_class, without_loader
from .files import check_model, kept_back, read_json
from .gguf import Gguf, check_all_taken, config_of, package
from .gguf_tokenizer import ends_of, tokenizer_in
from .writing import check_output, check_space, new_folder

_log = logging.getLogger(__name__)

FACTS = "gguf.json"
"""File in a restored folder that says which GGUF it was made from, and what that does not hold."""
_FORM = 1
"""Of a restored folder; a change of what is made of a file raises it."""


def restore(file: str | Path, folder: str | Path, *, overwrite: bool = False, weights: bool = True) -> dict[str, Any]:
    """Write the model of a GGUF as a checkpoint of transformers, with its tokenizer and chat template.

    Every weight keeps its value: they are written in the 16-bit type of the file's matrices where all of them are of
    one and that loses nothing, else in float32, quantised ones unpacked.

    Args:
        weights: False writes all but the weights.

    Returns:
        What lies in `gguf.json`: file, family, types of tensors, and `notes` on what the file does not hold.

    Raises:
        CheckpointError, UnsupportedModel: the file is damaged, without tokenizer, or of no family that transformers
            reads; before any weight is read.
    """
    file = Path(file)
    check_output(folder, overwrite)
    header = Gguf.read(file)
    config, notes = config_of(header)
    with torch.device("meta"):
        notes += check_all_taken(header, model_class(config)._from_config(copy.deepcopy(config)))
    tokenizer, more = tokenizer_in(header)
    notes += more
    facts = header.facts()
    with kept_back([]):
        model = None
        if weights:
            check_space(folder, 4 * sum(header.weights.values()))
            model, more = _load(header, config)
            notes += more
            facts["sha256"] = _digest(file)
        with new_folder(folder, overwrite) as target:
            _generation(header, config).save_pretrained(target)
            if model is None:
                config.save_pretrained(target)
            else:
                model.generation_config = _generation(header, config)
                model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            facts["notes"] = notes
            (target / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def restored(file: Path, weights: bool = True) -> Path:
    """The folder with the checkpoint of a GGUF: restored beside the Hub's cache at the first use, then found there.

    Args:
        weights: False: config and tokenizer are enough.
    """
    stat = file.stat()
    versions = [_FORM, transformers.__version__, getattr(package(), "__version__", None)]
    facts = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, *versions, _beside(file)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    whole = shelf() / f"{file.stem}-{key}"
    bare = whole.with_name(f"{whole.name}-config")
    for folder in (whole,) if weights else (whole, bare):
        if (folder / FACTS).is_file():
            return folder
    target = whole if weights else bare
    notes = restore(file, target, weights=weights, overwrite=True)["notes"]
    if weights:
        size = sum(part.stat().st_size for part in target.iterdir())
        _log.warning("%s: written as a checkpoint of %.2f GB to %s, for later use. %s", file, size / 1e9, target,
                     "".join(f"Note: {note}. " for note in notes).rstrip())  # fmt: skip
    return target


def shelf() -> Path:
    """Where restored checkpoints are kept."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "surgery" / "gguf"


def is_kept(folder: str | Path | None) -> bool:
    """Whether `restored` made a folder: its GGUF stands for it, and makes it again."""
    return Path(folder or "").parent == shelf()


def facts_in(folder: str | Path | None) -> dict[str, Any] | None:
    """What a restored folder tells of its GGUF, or the folder of a config.json; None for any other folder."""
    folder = str(folder or "").removesuffix("config.json")
    if not folder or not (Path(folder) / FACTS).is_file():
        return None
    return read_json(Path(folder) / FACTS)


def _load(header: Gguf, config: Any) -> tuple[PreTrainedModel, list[str]]:
    options: dict[str, Any] = {}
    unpack = getattr(transformers, "GgufConfig", None)  # of 5.23
    if unpack is not None:
        options["quantization_config"] = unpack(dequantize=True)
    loader: Any = model_class(config)
    try:
        model, info = loader.from_pretrained(
            str(header.file.parent), gguf_file=header.file.name, config=config, dtype=torch.float32,
            output_loading_info=True, **options,
        )  # fmt: skip
    except (RuntimeError, ValueError, KeyError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise header.refuse(f"its tensors do not make a {loader.__name__} of transformers ({reason})") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise header.refuse(f"has no tensor for {missing[0]} of {loader.__name__}")
    check_model(model)
    model = without_loader(model)
    model.config.architectures = [loader.__name__]
    kind, notes = header.dtype, []
    if kind is not None and kind is not torch.float32:
        if all(torch.equal(p.to(kind).float(), p) for p in model.parameters()):
            model.to(dtype=kind)  # type: ignore[call-arg]
        else:
            notes.append(f"not all of its tensors are {str(kind).removeprefix('torch.')}: they are float32 here")
    return model, notes


def _generation(header: Gguf, config: Any) -> GenerationConfig:
    """How an answer begins and ends, by the file."""
    made = GenerationConfig.from_model_config(config)
    ends = ends_of(header)
    if ends:
        made.eos_token_id = ends[0] if len(ends) == 1 else ends
    return made


def _beside(file: Path) -> list[tuple[str, int]]:
    """Tokenizer files beside a GGUF, which are taken in the place of its own."""
    found = sorted({*file.parent.glob("tokenizer*"), *file.parent.glob("special_tokens_map.json")})
    return [(path.name, path.stat().st_mtime_ns) for path in found]


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
