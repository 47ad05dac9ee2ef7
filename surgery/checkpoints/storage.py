"""Load and save converted models, checked and complete."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..anatomy.reader import load_config
from ..calibration.text import load_tokenizer, where_named
from ..runtime.modeling import converted_class, load_converted
from ..torch_state import plain_torch
from .adapters import base_folder, check_adapter, merged, with_adapter, without_adapter
from .classes import model_class, settle_attention
from .companions import copy_companions
from .files import Checkpoint, Fit, check_fits, read_json
from .places import local_folder
from .provenance import parent_folder, provenance_of, write_provenance
from .writing import new_folder, plain


@plain_torch()
def load(model: str | Path, *, merge_adapter: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load a converted checkpoint, or any other, checked before use.

    Args:
        model: folder, GGUF or Hub id.
        merge_adapter: merge the adapter (of the library peft) that lies in the folder, beside its weights or alone.
        kwargs: for `from_pretrained`; the dtype is the checkpoint's own unless given.

    Raises:
        CheckpointError: a shard or a tensor is missing or damaged, a weight is NaN or of an unknown dtype or shape; an
            adapter lies there and was not asked for. UnsupportedModel: the adapter cannot be merged.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> surgery.load(SMALL).dtype
        torch.bfloat16
    """
    return load_parent(model, merge_adapter, **kwargs)[0]


def load_parent(
    model: str | Path, merge_adapter: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`load`, and what the provenance of its children tells of the adapter, if any."""
    folder = local_folder(model)
    check_adapter(folder, merge_adapter)
    base = base_folder(folder)
    loaded = _load_plain(base, **kwargs)
    if not merge_adapter:
        return loaded, {}
    plain, adapter = merged(with_adapter(loaded, folder), folder)
    return plain, {"adapter": adapter}


def _load_plain(folder: Path, **kwargs: Any) -> PreTrainedModel:
    checkpoint = Checkpoint(folder)
    check_whole(checkpoint)
    for name in checkpoint.names():
        checkpoint.get(name)
    kwargs.setdefault("dtype", "auto")
    if _is_converted(folder):
        made = load_converted(str(folder), **kwargs)
        if hasattr(made.config, "auto_map"):
            del made.config.auto_map  # it names the code of an export, which this model does without
        return made
    config = load_config(folder)
    settle_attention(config)
    for name in [name for name in kwargs if name in config.to_dict() and name != "dtype"]:
        setattr(config, name, kwargs.pop(name))  # as `from_pretrained` does where it reads the config itself
    with without_adapter(folder) as alone:
        made = model_class(config).from_pretrained(str(alone), config=config, **kwargs)
    made.config.name_or_path = made.name_or_path = str(folder)
    return made


def check_whole(checkpoint: Checkpoint) -> Fit:
    """Raise CheckpointError where tensors are missing or do not fit the config. Reads no tensor."""
    config: Any
    if _is_converted(checkpoint.folder):
        architecture = converted_class(str(checkpoint.folder))  # makes its config known to transformers
        config = cast(Any, architecture.config_class).from_pretrained(checkpoint.folder)
    else:
        config = load_config(checkpoint.folder)
        architecture = model_class(config)
    return check_fits(checkpoint, architecture, config)


def _is_converted(folder: Path) -> bool:
    return "layers" in (read_json(folder / "config.json").get("surgery") or {})


def save(model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False) -> None:
    """Write a converted model with all that belongs to it: tokenizer, generation config, recipe, provenance.

    Args:
        tokenizer: written in the place of the parent's. All else that lay beside its weights is copied.
        overwrite: replace a folder that is not empty.

    Raises:
        CheckpointError: the folder cannot be written, or is not empty.

    Examples:
        >>> import surgery, tempfile
        >>> from surgery.bundled import SMALL
        >>> folder = tempfile.mkdtemp() + "/child"
        >>> surgery.save(surgery.convert(SMALL, "kv-int8"), folder)
        >>> type(surgery.load(folder)).__name__
        'SurgeryLlamaForCausalLM'
    """
    _write(model, folder, tokenizer, overwrite, lambda target: model.save_pretrained(target, state_dict=_plain(model)))


def save_like(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    dtypes: Mapping[str, torch.dtype],
    folder: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """`save` of a model that was made from `checkpoint`: tensors are stored as that stores its own.

    Args:
        dtypes: by name in the state dict of `model`: that of the file's tensor that it comes from.
    """
    _write(model, folder, tokenizer, overwrite, lambda target: write_like(model, checkpoint, dtypes, target))


def write_like(model: PreTrainedModel, checkpoint: Checkpoint, dtypes: Mapping[str, torch.dtype], target: Path) -> None:
    """Config and tensors of `model` in `target`, these in `dtypes`; the config names those of the checkpoint's."""
    tensors = _plain(model, checkpoint.names())
    tensors = {name: tensor.to(dtypes.get(name, tensor.dtype)) for name, tensor in tensors.items()}
    model.save_pretrained(target, state_dict=tensors)
    # A class computes in the dtype that its config names, whatever its files hold: that stays as it was, too.
    config = read_json(target / "config.json")
    copy_dtypes(read_json(checkpoint.folder / "config.json"), config)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _write(
    model: PreTrainedModel, folder: str | Path, tokenizer: Any, overwrite: bool, write_model: Callable[[Path], None]
) -> None:
    data = provenance_of(model)
    with new_folder(folder, overwrite) as target:
        write_model(target)
        copy_parents_companions(data, target, tokenizer)
        write_provenance(target, data)


def copy_parents_companions(data: dict[str, Any], target: Path, tokenizer: Any = None) -> None:
    """Write what lies beside the parent that a provenance names, and beside its adapter, to a child's new folder.

    Args:
        tokenizer: written in the place of the adapter's, or the one inside the GGUF, or else the parent's.
    """
    data = where_named(data) | ({"adapter": data["adapter"]} if data.get("adapter") else {})
    parent, adapter = parent_folder(data), (data.get("adapter") or {}).get("folder")
    if adapter is not None and Path(adapter).is_dir():
        tokenizer = tokenizer or load_tokenizer(adapter)
        copy_companions(Path(adapter), target, tokenizer)
    if tokenizer is None and parent is not None and data.get("gguf_file"):
        tokenizer = load_tokenizer(parent, gguf_file=data["gguf_file"])
        if tokenizer is None:
            warnings.warn(f"{data['gguf_file']}: no tokenizer can be read from it. Written without.", stacklevel=3)
    copy_companions(parent, target, tokenizer)


def _plain(model: PreTrainedModel, names: Collection[str] = ()) -> dict[str, Tensor]:
    """The state dict of a model as files can hold it.

    Args:
        names: of tensors that are tied, these are all written; without any of them, what transformers writes.
    """
    tensors = {name: plain(tensor) for name, tensor in model.state_dict().items()}
    places: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if not tensor.is_meta and tensor.numel():
            places.setdefault((tensor.device, tensor.untyped_storage().data_ptr()), []).append(name)
    known = getattr(model, "all_tied_weights_keys", {})
    for group in places.values():
        tied = {*group} & {*known, *known.values()}
        if tied.intersection(names):
            for name in tied.difference(names):
                del tensors[name]
        alone = [name for name in group if name in tensors and (name in names or name not in tied)]
        # Safetensors writes no memory twice, and transformers leaves out what its class ties, nothing else.
        for name in alone if tied else alone[1:]:
            tensors[name] = tensors[name].clone()
    return tensors


def copy_dtypes(source: dict[str, Any], target: dict[str, Any]) -> None:
    """The dtypes that a config, and those inside it, name."""
    target.pop("dtype", None)
    found = source.get("dtype", source.get("torch_dtype"))
    if found is not None:
        target["dtype"] = found
    for name, part in source.items():
        if isinstance(part, dict) and isinstance(target.get(name), dict):
            copy_dtypes(part, target[name])
