"""Checkpoints on disk: checked before use, and read one tensor at a time."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from ..errors import CheckpointError
from .tracing import Trace, is_whole, origins_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = " Fetch the checkpoint again."
_WEIGHT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Checkpoint:
    """The tensors of a safetensors checkpoint, read lazily by name.

    Opening checks that the index is readable, that every shard is there, is not cut short, and holds what the index
    says. Nothing is read into memory before `get`.

    Raises:
        CheckpointError: names the file or the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: has no config.json. Give the folder of a transformers checkpoint.")
        expected = self._index()
        self._file_of: dict[str, str] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._dtype_of: dict[str, str] = {}
        for file in sorted(set(expected.values())) if expected else [SINGLE]:
            with self._open(file) as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    self._file_of[name] = file
                    header = shard.get_slice(name)
                    self._shape_of[name] = tuple(header.get_shape())
                    self._dtype_of[name] = header.get_dtype()
        for name, file in expected.items():
            if self._file_of.get(name) != file:
                raise CheckpointError(f"{folder / INDEX}: says that {name} is in {file}, which does not hold it.")

    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            if (self.folder / SINGLE).is_file():
                return {}
            others = sorted(p.name for p in self.folder.glob("*.bin")) + sorted(
                p.name for p in self.folder.glob("*.pt*")
            )
            advice = (
                f" {others[0]} is a pickle, which runs code when it is read: convert it to safetensors first."
                if others
                else ""
            )
            raise CheckpointError(f"{self.folder}: has neither {SINGLE} nor {INDEX}.{advice}")
        try:
            index = json.loads(path.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
            raise CheckpointError(f"{path}: not a readable index. Fetch the checkpoint again.") from None
        return dict(index)

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self.folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: this shard is missing. Fetch the checkpoint again.")
        try:
            with safe_open(path, framework="pt") as shard:
                yield shard
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged or cut short ({error}). Fetch the file again.") from None

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor, without reading it."""
        return self._shape_of[name]

    def dtype(self, name: str) -> str:
        """Type of one tensor as safetensors spells it (`BF16`, `I8`), without reading it."""
        return self._dtype_of[name]

    def weight_dtype(self, name: str) -> torch.dtype | None:
        """Type of one tensor, without reading it; None where that is none of a weight."""
        return _WEIGHT_DTYPES.get(self._dtype_of[name])

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: absent, not a floating-point weight of 16 or 32 bits, or with NaN or inf in it.
        """
        if name not in self._file_of:
            raise CheckpointError(f"{self.folder}: no tensor {name} in its safetensors files.")
        with self._open(self._file_of[name]) as shard:
            tensor = shard.get_tensor(name)
        check_weight(name, tensor, self.folder / self._file_of[name])
        return tensor


def check_weight(name: str, tensor: Tensor, where: Path | str) -> None:
    """Raise CheckpointError where `tensor` is no usable weight."""
    if tensor.is_floating_point():
        if tensor.dtype not in _WEIGHT_DTYPES.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{where}: {name} is {kind}, needs float32, bfloat16 or float16. Dequantise the checkpoint first."
            )
        # NaN passes through both ends, and no mask of every number is made.
        if tensor.numel() and not all(end.isfinite() for end in torch.aminmax(tensor)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{where}: {name} has {bad} values that are NaN or inf. The checkpoint is damaged.")


@dataclass(frozen=True)
class Fit:
    """Which tensors of a checkpoint make which of its model."""

    origins: dict[str, tuple[str, ...]]
    """By name in the model: the tensors in the files that it is made of. Those that no file has are left out."""
    same: frozenset[str]
    """Names under which files and model have the same tensor."""
    unused: frozenset[str]
    """Tensors that the model's class has no place for, such as layers that predict further tokens."""
    left_out: tuple[str, ...]
    """`unused` in short, for people: what is wholly unused is named once."""


def check_fits(checkpoint: Checkpoint, architecture: type[PreTrainedModel], config: PreTrainedConfig) -> Fit:
    """How the tensors of `checkpoint` make a model. Reads none of them.

    transformers itself matches the names, so that files which name or split tensors otherwise than the model does
    (experts one by one, no prefix, tied heads left out) are judged as they will be loaded. It fills what is missing at
    random, and casts integers to weights: neither may pass.

    Raises:
        CheckpointError: they do not make a whole model.
    """
    names = checkpoint.names()
    floating = {name for name in names if "F" in checkpoint.dtype(name)}
    trace = Trace({name: checkpoint.shape(name) for name in sorted(floating)})
    report: list[str] = []
    try:
        with kept_back(report):
            loader: Any = architecture
            model, info = loader.from_pretrained(
                None, config=copy.deepcopy(config), state_dict=trace.tensors, device_map="meta",
                output_loading_info=True, ignore_mismatched_sizes=True, attn_implementation="eager",
            )  # fmt: skip
    except RuntimeError as error:
        parts = [line.partition("|")[0].strip() for line in "\n".join(report).splitlines() if "CONVERSION" in line]
        reason = f"cannot put together {parts[0]} from its safetensors files.{_AGAIN}" if parts else str(error)
        raise CheckpointError(f"{checkpoint.folder}: {reason}") from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = sorted(name for name in info["missing_keys"] if name in parameters)
    integers = [name for name in names if name not in floating]
    _check_unpacked(checkpoint, missing, model, info)
    if missing and missing[0] in integers:
        raise CheckpointError(
            f"{checkpoint.folder}: {missing[0]} is {checkpoint.dtype(missing[0])}, needs float32, bfloat16 or float16. "
            "Dequantise the checkpoint first."
        )
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        packed = f" It holds integers, such as {integers[0]}: dequantise it first." if integers else ""
        raise CheckpointError(
            f"{checkpoint.folder}: no tensor {missing[0]}{more} in its safetensors files.{packed or _AGAIN}"
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has shape {list(found)}, its config asks for {list(wanted)}.{_AGAIN}"
        )
    for name in names:
        if checkpoint.dtype(name) not in _WEIGHT_DTYPES and name in floating - info["unexpected_keys"]:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} is {checkpoint.dtype(name)}, needs float32, bfloat16 or float16. "
                "Dequantise the checkpoint first."
            )
    left = sorted(info["unexpected_keys"])
    named = config.architectures or ()
    if left and named and architecture.__name__ not in named:
        raise CheckpointError(
            f"{checkpoint.folder}: is a {', '.join(named)}, which transformers does not have; as a "
            f"{architecture.__name__} it would lose {left[0]}. Load it with the code that it needs, and pass the model "
            "to surgery.convert."
        )
    origins: dict[str, tuple[str, ...]] = {}
    same = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Integers were not traced, and keep their names but for the prefix.
        made_of = origins_of(tensor) or {name, name.removeprefix(f"{model.base_model_prefix}.")}
        if made_of := {n for n in made_of if n in checkpoint}:
            origins[name] = tuple(sorted(made_of))
            if made_of == {name} and (is_whole(tensor) or name not in floating):
                same.add(name)
    used = trace.used.union(*origins.values())
    unused = [name for name in names if name not in used]
    return Fit(origins, frozenset(same), frozenset(unused), _in_short(unused, used))


def _in_short(unused: Sequence[str], used: Iterable[str]) -> tuple[str, ...]:
    """The modules of which nothing is used, each once, with the number of their tensors."""
    places = {tuple(name.split(".")[:i]) for name in used for i in range(1, name.count(".") + 2)}
    found: dict[tuple[str, ...], list[str]] = {}
    for name in unused:
        parts = tuple(name.split("."))
        place = next((parts[:i] for i in range(1, len(parts)) if parts[:i] not in places), parts)
        found.setdefault(place, []).append(name)
    return tuple(f"{'.'.join(p)} ({len(n)} tensors)" if len(n) > 1 else n[0] for p, n in found.items())


def exact_dtype(checkpoint: Checkpoint, fit: Fit, config: PreTrainedConfig) -> str | torch.dtype:
    """What `from_pretrained` is to be told, so that no tensor loses digits: `auto`, or float32 where that rounds."""
    stored = {checkpoint.weight_dtype(name) for names in fit.origins.values() for name in names} - {None}
    own = getattr(torch, str(config.dtype).removeprefix("torch."), None)
    is_exact = own is torch.float32 or stored <= {own} or (own is None and len(stored) == 1)
    return "auto" if is_exact else torch.float32


def _check_unpacked(checkpoint: Checkpoint, missing: Sequence[str], model: PreTrainedModel, info: Any) -> None:
    """Raise CheckpointError where a checkpoint whose config names a quantisation is not plain weights after all."""
    method = quantised_by(read_json(checkpoint.folder / "config.json").get("quantization_config"))
    if method is None:
        return
    tensors = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    modules = {name.rpartition(".")[0] for name in tensors}
    packed = [name for name in checkpoint.names() if checkpoint.dtype(name) not in _WEIGHT_DTYPES]
    strange = [name for name in packed if name not in tensors or checkpoint.dtype(name).startswith("F")]
    # Scales and offsets lie beside the weight that they are of.
    strange += sorted(name for name in info["unexpected_keys"] if name.rpartition(".")[0] in modules)
    strange += sorted(name for name, *_ in info["mismatched_keys"]) + list(missing)
    if strange:
        name = strange[0]
        held = f"it holds {name} of {checkpoint.dtype(name)}" if name in checkpoint else f"it has no plain {name}"
        raise CheckpointError(
            f"{checkpoint.folder}: its weights are quantised ({method}): {held}. Give the checkpoint that it was made "
            "from, or unpack it: load it with transformers, model.dequantize(), model.save_pretrained(...)."
        )


def quantised_by(section: Any) -> str | None:
    """The method that a `quantization_config` names, as it is in JSON or in memory; None where there is none."""
    if not section:
        return None
    method = section.get("quant_method") if isinstance(section, dict) else getattr(section, "quant_method", None)
    return str(getattr(method, "value", method))


@contextmanager
def kept_back(report: list[str]) -> Iterator[None]:
    """Put transformers' report of missing tensors into `report`, not on the screen, and show no progress bar."""
    log, bar = logging.getLogger("transformers"), hf_logging.is_progress_bar_enabled()
    before = log.handlers, log.level, log.propagate
    handler = logging.Handler()
    handler.emit = lambda record: report.append(record.getMessage())  # type: ignore[method-assign]
    log.handlers, log.propagate = [handler], False
    log.setLevel(logging.WARNING)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])
        if bar:
            hf_logging.enable_progress_bar()


def check_model(model: torch.nn.Module) -> None:
    """Raise CheckpointError where a parameter of `model` is no usable weight."""
    for name, parameter in model.named_parameters():
        check_weight(name, parameter.detach(), "model")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`.

    Raises:
        CheckpointError: absent, not JSON, or not an object.
    """
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds {type(data).__name__}, needs an object.")
    return data
