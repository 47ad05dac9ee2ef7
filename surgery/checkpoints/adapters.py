"""Adapters of the library peft: found in a folder or on a model, and merged into its weights where that was asked for.

A merge is proved: the plain model must answer as the adapted one did.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import CheckpointError, UnsupportedModel
from .files import read_json
from .places import local_folder

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TOLERANCE = 1e-4
"""Of the merged model's logits in float32, over the adapted model's."""
_ASK = "Pass merge_adapter=True (--merge-adapter) to merge it into the weights first"


# In a folder


def adapter_in(folder: Path) -> str | None:
    """Kind of the adapter (`LORA`) that lies in a folder; None where there is none."""
    return str(read_json(folder / CONFIG).get("peft_type", "?")) if (folder / CONFIG).is_file() else None


def base_folder(folder: Path, weights: bool = True) -> Path:
    """Where the model lies: the folder itself, or what an adapter without a model of its own names as its base.

    Raises:
        CheckpointError: the base is not named, or not to be had.
    """
    if (folder / "config.json").is_file() or adapter_in(folder) is None:
        return folder
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{folder / CONFIG}: names no base_model_name_or_path, so its model cannot be found.")
    try:
        return local_folder(name, weights=weights)
    except CheckpointError as error:
        raise CheckpointError(f"{folder / CONFIG}: its base model: {error}") from None


def check_adapter(folder: Path, merge_adapter: bool) -> None:
    """Raise CheckpointError where an adapter lies in a folder and was not asked for, or the other way round."""
    kind = adapter_in(folder)
    if kind is None:
        if merge_adapter:
            raise CheckpointError(
                f"{folder}: has no {CONFIG}, so there is no adapter to merge. Leave merge_adapter out."
            )
        return
    if not (folder / WEIGHTS).is_file():
        pickle = next((file.name for file in folder.glob("adapter_model.*")), None)
        raise CheckpointError(
            f"{folder}: {pickle} is a pickle, which runs code when it is read: convert it to safetensors first."
            if pickle
            else f"{folder}: has {CONFIG}, but no {WEIGHTS}. Fetch the adapter again, or remove that file."
        )
    if not merge_adapter:
        beside = "beside its weights" if base_folder(folder, weights=False) == folder else "and no model of its own"
        raise CheckpointError(
            f"{folder}: holds an adapter ({kind}) {beside}. {_ASK}, or give the folder of the base alone."
        )
    start = read_json(folder / CONFIG).get("init_lora_weights")
    if isinstance(start, str) and start.startswith("pissa_niter"):
        # peft changes the base by a decomposition from random numbers, and draws other ones at loading.
        raise CheckpointError(
            f"{folder / CONFIG}: init_lora_weights: {start} was trained on a base that peft cannot make again. "
            "Save it as plain LoRA (path_initial_model_for_weight_conversion of save_pretrained), or merge where it "
            "was trained."
        )
    _peft()


@contextmanager
def without_adapter(folder: Path) -> Iterator[Path]:
    """The folder as one without its adapter, which transformers would load by itself, and not every kind rightly."""
    if adapter_in(folder) is None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="surgery-base-") as scratch:
        for file in folder.iterdir():
            if file.name != CONFIG and not file.name.startswith("adapter_model."):
                (Path(scratch) / file.name).symlink_to(file.resolve())
        yield Path(scratch)


def with_adapter(model: PreTrainedModel, folder: Path) -> Any:
    """The peft model of a base and the adapter in a folder.

    Raises:
        CheckpointError: they do not belong together, or tensors are missing.
    """
    peft = _peft()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    try:
        adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its adapter does not fit its model: {_first_line(error)}") from error
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    whole = wanted | set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=True))
    for name in sorted((wanted - found) | (found - whole)):
        reason = "is missing. Fetch the adapter again" if name in wanted else "has no place in its model"
        raise CheckpointError(f"{folder / WEIGHTS}: {name} {reason}.")
    return adapted


# On a model


def has_adapter(model: Any) -> bool:
    """Whether modules of peft sit in, or around, a model."""
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return False
    peft = _peft()
    wrappers = (peft.PeftModel, peft.PeftMixedModel)
    return isinstance(model, wrappers) or any(_is_adapted(module) for module in model.modules())


def merged(model: Any, folder: Path | None = None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A copy of an adapted model as a plain one, the active adapters merged, and what is to be told of them.

    Tied weights of which only one side is adapted come apart, and the config says so.

    Args:
        model: a peft model, or one with adapters injected into it.
        folder: where the adapter came from, for the record.

    Raises:
        UnsupportedModel: an adapter that is no change of weights, is switched off, or answers otherwise once merged.
    """
    kinds = adapter_kinds(model)
    named = f"{_base(model).__class__.__name__} with an adapter ({kinds})"
    _check_mergeable(model, named)
    types = _types(_base(model))
    adapted = copy.deepcopy(model)
    nn.Module.float(adapted).eval()
    try:
        with torch.no_grad():
            wanted = _logits(adapted)
            plain = _base(adapted)
            tied = _untie(plain)
            _unload(plain)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UnsupportedModel(f"{named}: cannot be merged: {_first_line(error)}") from error
    with torch.no_grad():
        difference = float((_logits(plain) - wanted).norm() / wanted.norm())
    if not difference <= _TOLERANCE:
        raise UnsupportedModel(
            f"{named}: answers otherwise once it is merged (logits differ by {difference:.1e} of their size), so it "
            "is more than a change of weights. Convert the base alone."
        )
    _tie_again(plain, tied, named)
    for name, parameter in [*plain.named_parameters(), *plain.named_buffers()]:
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(types.get(name, parameter.dtype))
            parameter.requires_grad_(isinstance(parameter, nn.Parameter))
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    plain._hf_peft_config_loaded = False  # else transformers would save the adapter alone
    plain.train(model.training)
    names = sorted({name for module in _layers(_base(model)) for name in module.active_adapters})
    return plain, {"folder": None if folder is None else str(folder), "names": names, "kinds": kinds}


def adapter_kinds(model: nn.Module) -> str:
    """Kinds and names of the adapters of a model, for messages: `LORA default`."""
    found: dict[str, str] = {}
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            kind = getattr(config, "peft_type", None)
            found[name] = str(getattr(kind, "value", kind))
    return ", ".join(f"{kind} {name}" for name, kind in sorted(found.items())) or "of peft"


def refuse_adapter(model: nn.Module) -> None:
    """Raise UnsupportedModel for a model with adapters that nobody asked to merge."""
    raise UnsupportedModel(
        f"{_base(model).__class__.__name__}: carries an adapter ({adapter_kinds(model)}). {_ASK}, or pass the base "
        "alone."
    )


def _check_mergeable(model: Any, named: str) -> None:
    for config in (getattr(model, "peft_config", None) or {}).values():
        if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
            raise UnsupportedModel(
                f"{named}: adds tokens or keys at run time, which no weight can hold. Convert the base alone."
            )
    layers = _layers(_base(model))
    if not any(module.active_adapters for module in layers) or any(module.disable_adapters for module in layers):
        raise UnsupportedModel(
            f"{named}: the adapter is switched off, at least in places. Switch it on (enable_adapters, set_adapter), "
            "or pass the base alone."
        )
    if any(p.is_meta for p in model.parameters()):
        raise UnsupportedModel(f"{named}: its weights are offloaded. Load it without a device_map that offloads.")


def _unload(model: nn.Module) -> None:
    """Merge the active adapters of every adapted module, and put the plain module in its place."""
    done: tuple[str, ...] = ()
    for name, module in list(model.named_modules()):
        if name.startswith(done) or not _is_adapted(module):
            continue
        if hasattr(module, "unload_and_optionally_merge_module"):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            module.merge(safe_merge=True)
            plain = module.get_base_layer()
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, plain)
        done += (name + ".",)


_Tied = list[list[tuple[nn.Module, str, str]]]
"""Groups of (owner, attribute, name) that one parameter had."""


def _untie(model: nn.Module) -> _Tied:
    """Give each place of a shared parameter one of its own: an adapter of one place must not change the others."""
    groups: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                groups.setdefault(id(parameter), []).append((module, attribute, _plain_name(f"{name}.{attribute}")))
    tied = [places for places in groups.values() if len(places) > 1]
    for places in tied:
        for owner, attribute, _ in places[1:]:
            parameter = getattr(owner, attribute)
            owner._parameters[attribute] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
    return tied


def _tie_again(model: PreTrainedModel, tied: _Tied, named: str) -> None:
    """Share again what is still equal; embeddings that are not are said to be untied."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for places in tied:
        if not all(name in own for _, _, name in places):
            continue  # of the adapter itself
        owners = [(model.get_submodule(name.rpartition(".")[0]), attribute) for _, attribute, name in places]
        values = [getattr(owner, attribute) for owner, attribute in owners]
        if all(torch.equal(value, values[0]) for value in values):
            for owner, attribute in owners[1:]:
                owner._parameters[attribute] = values[0]
        elif all(any(owner is end for end in ends) for owner, _ in owners):
            for config in (model.config, model.config.get_text_config()):
                if getattr(config, "tie_word_embeddings", False):
                    config.tie_word_embeddings = False
        else:
            raise UnsupportedModel(f"{named}: changes one place of {places[0][2]}, which the model uses in several.")


def _plain_name(name: str) -> str:
    """A parameter's name without the adapter around it."""
    return re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", name)


def _types(model: nn.Module) -> dict[str, torch.dtype]:
    """The dtype of each tensor of the base, by its plain name."""
    found: dict[str, torch.dtype] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]:
        found.setdefault(_plain_name(name), tensor.dtype)
    return found


def _logits(model: Any) -> Tensor:
    vocabulary = _base(model).config.get_text_config(decoder=True).vocab_size
    device = next(model.parameters()).device
    ids = (torch.arange(32, device=device).reshape(2, 16) * 7 + 3) % vocabulary
    found: Tensor = model(input_ids=ids, use_cache=False)[0]
    return found


def _base(model: Any) -> Any:
    """The transformers model inside a peft model, adapters still in it; any other model as it is."""
    peft = sys.modules.get("peft")
    while peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        inner = model.base_model
        model = inner if isinstance(inner, PreTrainedModel) else inner.model
    return model


def _layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_adapted(module)]


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise CheckpointError("An adapter needs the library peft. Run: pip install 'kv-surgery[train]'") from None
    return peft


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
