"""What lets test suites of other projects run on converted models: configs that say how, and expected failures."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import json
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers.initialization as init
import yaml
from methods import METHODS, Method, merged
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from surgery.anatomy import examine
from surgery.runtime.configuration import converted_config
from surgery.runtime.functions import as_bits
from surgery.runtime.gates import SurgeryGate
from surgery.runtime.latent import SurgeryLatentAttention
from surgery.runtime.layout import AttentionSite
from surgery.runtime.modeling import SurgeryMixin

PARENT = "parent"
"""In the place of a method's name: the model as it was."""
HEADS = ("identity", "per_layer_heads", "unequal_groups")
ALL: dict[str, Method] = METHODS | {
    "windows": merged(METHODS["identity"], ["llama"], "evict", window=3, scorer="window"),
}
METHODS_OF: dict[str, tuple[str, ...]] = {
    "llama": tuple(name for name, method in ALL.items() if "llama" in method.families),
    "qwen3": tuple(name for name, method in ALL.items() if "qwen3" in method.families),
    "mistral": (*HEADS, "mla", "lowrank", "freq", "shared", "shared_values", "shared_lowrank"),
    "gemma3": (*HEADS, "lowrank"),
}
"""Rows by family: Mistral has windows in every layer, Gemma-3 in some, and norms on queries and keys."""
_GEOMETRY = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "head_dim", "rms_norm_eps",
    "sliding_window", "use_sliding_window", "layer_types", "rope_parameters", "query_pre_attn_scalar", "attention_bias",
)  # fmt: skip
"""Fields that decide how the attention of a family looks; tests change some of them."""


def convert_config(config: PreTrainedConfig, method: str) -> PreTrainedConfig:
    """The config of the model that `method` makes of a parent of this config; fields beside `surgery` stay."""
    return converted_config(config, _section(type(config), _json(config.to_diff_dict()), method))


def follow(config: PreTrainedConfig, method: str) -> None:
    """Make the `surgery` of a converted config fit its other fields, where a test has changed those."""
    made_for = config.surgery["provenance"].get("geometry") if config.surgery else "no layers yet"
    if made_for in (None, _geometry(config)):  # None: `_section` is converting
        return
    fields = {name: value for name, value in config.to_diff_dict().items() if name not in ("surgery", "model_type")}
    parent = type(config).__mro__[1]
    config.surgery = _section(parent, _json(fields), method)


@functools.cache
def _section(parent: type[PreTrainedConfig], fields: str, method: str) -> dict[str, Any]:
    model, sites = _parent(parent, fields)
    with torch.device("cpu"):
        surgery = ALL[method].convert(model, sites).config.surgery
    return {**surgery, "provenance": {"method": method, "geometry": _geometry(model.config)}}


@functools.cache
def _parent(parent: type[PreTrainedConfig], fields: str) -> tuple[PreTrainedModel, tuple[AttentionSite, ...]]:
    config = parent.from_dict(json.loads(fields))
    with torch.random.fork_rng(), torch.device("cpu"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        return model, tuple(examine(model).sites)


def _geometry(config: PreTrainedConfig) -> str:
    return _json({name: getattr(config, name) for name in _GEOMETRY if hasattr(config, name)})


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, default=str)


@contextlib.contextmanager
def native_construction(method: str) -> Iterator[None]:
    """`Surgery<Parent>(config)` inside: follows changes of the config, and what no checkpoint has filled decides.

    New gates keep every token, and new rotated parts of latents stand still: right where weights are loaded into them,
    and nothing that a test of a model without a checkpoint could see.
    """
    construct, reset_gate, reset_latent = SurgeryMixin.__init__, SurgeryGate.reset, SurgeryLatentAttention.reset

    def constructed(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        follow(config, method)
        construct(self, config, *args, **kwargs)

    def deciding(self: SurgeryGate) -> None:
        reset_gate(self)
        random = torch.Generator().manual_seed(0)
        for name, parameter in self.named_parameters():
            if name in ("weight", "bias", "mix_weight"):
                init.copy_(parameter, 0.1 * torch.randn(parameter.shape, generator=random, device="cpu"))

    def turning(self: SurgeryLatentAttention) -> None:
        reset_latent(self)
        if self.latent.rope_dims:
            assert self.site.rotary is not None
            frequencies = self.site.rotary.inv_freq
            pairs = self.latent.rope_dims // 2
            init.copy_(self.rope_freq_bits, as_bits([frequencies[i % len(frequencies)] for i in range(pairs)]))

    with (
        mock.patch.object(SurgeryMixin, "__init__", constructed),
        mock.patch.object(SurgeryGate, "reset", deciding),
        mock.patch.object(SurgeryLatentAttention, "reset", turning),
    ):
        yield


@dataclass(frozen=True)
class Expected:
    """Tests that fail on converted models, and why that is right. Names may hold `*`."""

    tests: tuple[str, ...]
    methods: tuple[str, ...]
    families: tuple[str, ...]
    reason: str

    def covers(self, test: str, method: str, family: str) -> bool:
        return all(
            any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            for name, patterns in ((test, self.tests), (method, self.methods), (family, self.families))
        )


def expected_failures(path: Path) -> list[Expected]:
    """The rows of a YAML file: `tests`, `methods`, `families` (all where absent) and `reason`."""
    rows = yaml.safe_load(path.read_text()) or []
    return [
        Expected(tuple(r["tests"]), tuple(r.get("methods", ["*"])), tuple(r.get("families", ["*"])), r["reason"])
        for r in rows
    ]


def checked(
    test: Callable, row_of: Callable[[dict[str, Any]], Expected | None], parent_fails: Callable[..., bool]
) -> Callable:
    """`test`, where listed ones must fail, and others may where they fail on the parent with the same arguments.

    A listed test that passes is a failure, so that the list stays true.
    """

    @functools.wraps(test)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        row = row_of(kwargs)
        try:
            result = test(self, *args, **kwargs)
        except unittest.SkipTest:
            raise
        except (Exception, pytest.fail.Exception) as error:
            if row is not None:
                pytest.xfail(row.reason)
            if parent_fails(*args, **kwargs):
                pytest.xfail(f"fails on the parent too ({type(error).__name__})")
            raise
        if row is not None:
            pytest.fail(f"passes; take it off the list: {row}")
        return result

    return run


def share_package(checkout: str, variable: str, landmark: str) -> None:
    """Let the modules of a checkout import each other as `tests.`, which is what pytest calls our folder as well.

    Raises:
        FileNotFoundError: neither `checkout` nor `checkout/tests` has the file `landmark`.
    """
    given = Path(checkout).expanduser().resolve()
    folder = next((f for f in (given / "tests", given) if (f / landmark).exists()), None)
    if folder is None:
        raise FileNotFoundError(f"{variable}={checkout}: no tests/{landmark} there")
    package = sys.modules.setdefault("tests", types.ModuleType("tests"))
    package.__path__ = [str(folder), *getattr(package, "__path__", [])]


def import_quietly(name: str) -> types.ModuleType:
    """A module of a checkout, whose marks only its own configuration registers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
