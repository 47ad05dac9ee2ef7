"""What lies beside the weights of a checkpoint and goes with them: tokenizer, processors, templates, code, licence.

Everything does that is not named here, so that files of a kind nobody thought of are not lost.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import filter_repo_objects

from .. import runtime

WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.gguf", "*.ggml", "*.onnx",
    "*.onnx_data*", "*.onnx.data", "*.h5", "*.msgpack", "*.ot", "*.npy", "*.npz", "*.tflite", "*.mlmodel", "*.nemo",
    "*.llamafile", "*.distcp", "*.engine", "openvino*.xml",
)  # fmt: skip
"""Weights in any format. Those of the parent are never those of the child."""
BULK = (
    ".*", "*/.*", "original/*", "onnx/*", "openvino/*", "coreml/*", "metal/*", "consolidated*.safetensors",
    "checkpoint-*/*", "global_step*/*", "runs/*", "wandb/*", "logs/*", "events.out.*", "*/events.out.*", "*.log",
    "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json", "zero_to_fp32.py", "latest",
    "*.parquet", "*.arrow", "*.jsonl", "*.csv", "*.zip", "*.tar", "*.gz", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg",
    "*.webp", "*.mp4", "*.pdf",
)  # fmt: skip
"""The same model in another layout, what a training left behind, data, and the pictures of a model card."""
_OWN = (
    "config.json", "*.index.json", "*.index.*.json", "README.md", "adapter_config.json", "surgery.json", "recipe.yaml",
    "export.json", "gguf.json",
)  # fmt: skip
"""Files about the parent's weights alone, and files that we write ourselves."""
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "*.spm", "chat_template.*", "chat_templates/*", "additional_chat_templates/*",
)  # fmt: skip
"""What is one tokenizer together: parts of another would change it."""

_FORMER = {
    "merged.py", "merging.py", "pages.py", "ragged.py", "ragged_attention.py", "ragged_cache.py", "ragged_dms.py",
    "ragged_dmc.py",
}  # fmt: skip
"""Modules of the runtime that are called otherwise today: exports of version 0.1 hold them."""


def copy_companions(source: Path | None, target: Path, tokenizer: Any = None) -> None:
    """Copy what goes with the weights into a folder that has weights and config. Files that are there stay.

    Of a `config.json` that names code (`auto_map`), entries go which name a model: the weights are of a class of
    transformers, and that code has not seen them. Others (tokenizer, processor) stay where their file does.

    Args:
        source: None where nobody knows of one.
        tokenizer: written in the place of the source's.
    """
    named: tuple[str, ...] = ()
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
        named = (*_TOKENIZER, *dict(getattr(tokenizer, "vocab_files_names", {})).values())
    for file in [] if source is None else companions(source, but=named):
        place = target / file
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, place)  # type: ignore[operator]
    _settle_code(target, () if tokenizer is None else ("AutoTokenizer",))


def companions(source: Path, but: Iterable[str] = ()) -> list[str]:
    """Paths below `source` of what goes with its weights, sorted. `but`: patterns of what does not."""
    files = sorted(path.relative_to(source).as_posix() for path in _files(source))
    modules = _modules(source)
    weights = set(files) - set(filter_repo_objects(files, ignore_patterns=[*WEIGHTS]))
    others = {file.partition("/")[0] for file in weights if "/" in file} - modules  # folders of other models
    stale = _code_of_export(source)
    kept = [
        file for file in filter_repo_objects(files, ignore_patterns=[*WEIGHTS, *BULK, *_OWN, *but])
        if file.partition("/")[0] not in others and file not in stale
    ]  # fmt: skip
    return sorted({*kept, *(file for file in files if file.partition("/")[0] in modules)})


def _files(source: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(source):
        yield from (Path(folder, name) for name in names)


def _modules(source: Path) -> set[str]:
    """Folders of a sentence-transformers model that hold modules after the decoder: pooling, dense layers."""
    try:
        listed = json.loads((source / "modules.json").read_text())
        paths = [str(module["path"]) for module in listed]
    except (OSError, ValueError, TypeError, KeyError):
        return set()
    return {path.partition("/")[0] for path in paths if path}


def _code_of_export(source: Path) -> set[str]:
    """Code of ours that lies in an export: the next export writes its own."""
    if not (source / "export.json").is_file():
        return set()
    made = (*source.glob("configuration_surgery_*.py"), *source.glob("modeling_surgery_*.py"))
    return {file.name for file in (*made, *Path(str(runtime.__file__)).parent.glob("*.py"))} | _FORMER


def _settle_code(folder: Path, replaced: Iterable[str]) -> None:
    """Leave no entry of `auto_map` in `config.json` whose code is not there, or is of a model that this one is not."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) if file.is_file() else {}
    if not config.get("auto_map"):
        return
    stock = "layers" in (config.get("surgery") or {}) or any(
        hasattr(transformers, name) for name in config.get("architectures") or ()
    )
    kept = {
        auto: code
        for auto, code in config["auto_map"].items()
        if all(_is_there(part, folder) for part in ([code] if isinstance(code, str) else code))
        and not (stock and (auto == "AutoConfig" or auto.startswith("AutoModel")))
        and auto not in replaced
    }
    if kept != config.pop("auto_map"):
        config |= {"auto_map": kept} if kept else {}
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _is_there(code: str | None, folder: Path) -> bool:
    """Whether the file of `module.Class` lies in `folder`; `owner/name--module.Class` is on the Hub."""
    return code is None or "--" in code or (folder / f"{code.partition('.')[0]}.py").is_file()
