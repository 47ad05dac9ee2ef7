"""What is given as a parent, and the plain model in it: unwrapped, with its weights at hand, or refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..errors import UnsupportedModel
from .adapters import has_adapter, merged, refuse_adapter
from .files import quantised_by
from .gguf import Gguf, check_loaded

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
"""Modules of torch that answer as the one in them does, which has all weights as they are."""
_HOLDERS = ("model", "module", "pretrained_model", "base_model")
"""Where other wrappers keep a model; named in the refusal."""


def plain_parent(given: Any, merge_adapter: bool = False) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The plain model in what was given, which is left as it is, and what the provenance tells of the way there.

    torch.compile, DataParallel and hooks of accelerate are left out. Weights that are offloaded, or lie on several
    devices, are brought together on the CPU. An adapter is merged where that was asked for.

    Raises:
        UnsupportedModel: names what was found and what to pass in its place.
    """
    model = unwrapped(given)
    told: dict[str, Any] = {}
    if merge_adapter:
        if not has_adapter(model):
            raise UnsupportedModel(f"{_named(model)}: has no adapter to merge. Leave merge_adapter out.")
        check_tensors(model)
        model, told["adapter"] = merged(model)
    _check_plain(model)
    gguf = _gguf_of(model)
    if gguf is not None:
        told["gguf_file"], place = gguf
        check_loaded(Gguf.read(place), model)
    if len({tensor.device for tensor in _tensors(model)}) > 1 or any(tensor.is_meta for tensor in _tensors(model)):
        return _gathered(model), told
    return _bare(model), told


def unwrapped(given: Any) -> Any:
    """The transformers or peft model in what was given: itself, or inside wrappers of torch that change no answer.

    Raises:
        UnsupportedModel: there is none; says what was given and, where it holds one, what to pass.
    """
    model = given
    while isinstance(model, _WRAPPERS) or _is_compiled(model):
        model = model._orig_mod if _is_compiled(model) else model.module
    if isinstance(model, PreTrainedModel) or has_adapter(model):
        return model
    kind = _origin(type(model))
    if type(model).__name__ == "FullyShardedDataParallel":
        raise UnsupportedModel(f"{kind}: its weights are cut over devices. Save the model, and pass its folder.")
    parts: list[tuple[Any, Any]] = list(enumerate(model)) if isinstance(model, (tuple, list)) else []
    parts += [(name, vars(model).get(name) or _module(model, name)) for name in _HOLDERS if hasattr(model, "__dict__")]
    for place, part in parts:
        if isinstance(part, PreTrainedModel) or has_adapter(part):
            where = f"[{place}]" if isinstance(place, int) else f".{place}"
            raise UnsupportedModel(f"{kind}: is no model, but holds one. Pass {where} of it.")
    raise UnsupportedModel(f"{kind}: needs a model of transformers, a folder or a Hub id.")


def plain_form(given: Any) -> PreTrainedModel:
    """The model in what was given, as `plain_parent`, for reading its form: its weights may be elsewhere."""
    model = unwrapped(given)
    _check_plain(model)
    form: PreTrainedModel = _bare(model)
    return form


def _check_plain(model: Any) -> None:
    if has_adapter(model):
        refuse_adapter(model)
    check_tensors(model)


def check_tensors(model: nn.Module) -> None:
    """Raise UnsupportedModel where a parameter is no plain tensor of numbers: quantised, cut over devices, not made."""
    for name, parameter in model.named_parameters():
        where, kind = f"{_named(model)}: {name}", type(parameter)
        if is_lazy(parameter):
            raise UnsupportedModel(f"{where} has no shape yet. Load the model's weights first.")
        if hasattr(parameter, "ds_id"):
            raise UnsupportedModel(
                f"{where} is cut over devices by DeepSpeed. Save the model whole, and pass its folder."
            )
        if hasattr(parameter, "placements"):
            raise UnsupportedModel(
                f"{where} is a {kind.__name__}, cut over devices. Save the model, and pass its folder."
            )
        plain = kind is nn.Parameter and type(parameter.data) is Tensor
        if not plain or not parameter.is_floating_point() or parameter.element_size() == 1:
            dtype = str(parameter.dtype).removeprefix("torch.")
            what = dtype if plain else f"of type {_origin(kind)}"
            raise UnsupportedModel(f"{where} is {what}, no plain weight. {changed(model)}")


def check_modules(twin: nn.Module, model: nn.Module) -> None:
    """Raise UnsupportedModel where a module with weights computes otherwise than that of the model's own config."""
    modules = dict(model.named_modules())
    for name, module in twin.named_modules():
        found = modules.get(name)
        if found is None or not (module._parameters or module._buffers):
            continue
        if type(found).forward is not type(module).forward:
            raise UnsupportedModel(
                f"{_named(model)}: {name} is of type {_origin(type(found))}, by its config {_origin(type(module))}. "
                f"{changed(model)}"
            )


def changed(model: nn.Module) -> str:
    """Why a model's parameters or modules may not be those of its config, and what to do."""
    method = quantised_by(getattr(getattr(model, "config", None), "quantization_config", None))
    if method is not None:
        return (
            f"The model is quantised ({method}). Pass the one it was made from, or unpack its weights: load it with a "
            "quantization_config that has dequantize=True, or call model.dequantize()."
        )
    return "The model was changed after it was built (quantised, adapted or edited); pass the original."


def _gguf_of(model: PreTrainedModel) -> tuple[str, Path] | None:
    """Name and place of the GGUF that a model was loaded from, where that can be told and the file is still there."""
    config = model.config
    section = getattr(config, "quantization_config", None)
    name = section.get("gguf_file") if isinstance(section, dict) else getattr(section, "gguf_file", None)
    folder = Path(config.name_or_path or "")
    if name:
        if Path(name).is_file():
            return name, Path(name)
        found = cached_file(
            str(folder), name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
        return None if found is None else (name, Path(found))
    # Older versions of transformers leave no trace of the file.
    files = sorted(folder.glob("*.gguf")) if config.name_or_path and not (folder / "config.json").exists() else []
    return (files[0].name, files[0]) if len(files) == 1 else None


# Weights that are not all here


def _gathered(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model on the CPU, with the weights that accelerate keeps elsewhere (other devices, CPU, disk).

    Raises:
        UnsupportedModel: a weight was never loaded.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        with _onloaded(module) as deep:
            own = [*module.named_parameters(prefix, recurse=deep), *module.named_buffers(prefix, recurse=deep)]
            tensors |= {name: tensor.detach().to("cpu", copy=True) for name, tensor in own if not tensor.is_meta}
    with torch.device("meta"):
        whole = type(model)(copy.deepcopy(model.config))
    for prefix, module in whole.named_modules():
        for table in (module._parameters, module._buffers):
            for attribute, old in table.items():
                name = f"{prefix}.{attribute}" if prefix else attribute
                if old is not None and name in tensors:
                    is_parameter = table is module._parameters
                    new = tensors[name]
                    table[attribute] = nn.Parameter(new, old.requires_grad) if is_parameter else new
    whole.tie_weights()
    left = next((name for name, tensor in _named_tensors(whole) if tensor.is_meta), None)
    if left is not None:
        raise UnsupportedModel(
            f"{_named(model)}: {left} has no values (it is on the meta device), and nothing says where they lie: its "
            "weights were never loaded. Load the model with from_pretrained, or pass its folder."
        )
    flags = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name not in flags or flags[name].requires_grad)
    if model.can_generate():
        whole.generation_config = copy.deepcopy(model.generation_config)
    return whole.train(model.training)


@contextmanager
def _onloaded(module: nn.Module) -> Iterator[bool]:
    """Bring the offloaded weights of a module to the CPU meanwhile; yields whether its hook serves submodules too."""
    from accelerate.utils import align_module_device, has_offloaded_params

    if not has_offloaded_params(module):
        yield False
        return
    with align_module_device(module, torch.device("cpu")):
        hook: Any = module._hf_hook
        yield bool(hook.place_submodules)


# What loaders and wrappers left


def _bare(module: Any) -> Any:
    """A module without torch.compile, accelerate's hooks and its autocast: itself, or one of the same weights."""
    if _is_compiled(module):
        return _bare(module._orig_mod)
    children = {name: None if child is None else _bare(child) for name, child in module._modules.items()}
    hooked = _is_hooked(module)
    if not hooked and all(child is module._modules[name] for name, child in children.items()):
        return module
    plain = copy.copy(module)
    vars(plain)["_modules"] = children
    for name in ("forward", "_hf_hook", "_old_forward", "_original_forward") if hooked else ():
        vars(plain).pop(name, None)
    return plain


def _is_hooked(module: nn.Module) -> bool:
    own = vars(module)
    hook = own.get("_hf_hook")
    if hook is None:
        return "_original_forward" in own  # a Trainer's autocast
    parts = getattr(hook, "hooks", (hook,))
    return "_old_forward" in own and all(type(part).__name__ in ("AlignDevicesHook", "CpuOffload") for part in parts)


def _is_compiled(module: Any) -> bool:
    return isinstance(module, nn.Module) and type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def _module(given: Any, name: str) -> Any:
    return given._modules.get(name) if isinstance(given, nn.Module) else None


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _tensors(model: nn.Module) -> list[Tensor]:
    return [tensor for _, tensor in _named_tensors(model)]


def _named(model: Any) -> str:
    return type(model).__name__


def _origin(kind: type) -> str:
    package = kind.__module__.partition(".")[0]
    return kind.__name__ if package in ("builtins", "__main__") else f"{kind.__name__} of {package}"
