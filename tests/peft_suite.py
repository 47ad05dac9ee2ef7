"""Test classes that run peft's common tests of decoders, from a checkout of peft, on converted models."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.utils.constants
import pytest
from methods import parent, sites
from suite_adapter import (
    ALL,
    METHODS_OF,
    PARENT,
    Expected,
    checked,
    expected_failures,
    import_quietly,
    share_package,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from surgery.runtime.configuration import PREFIX

MODULE = "test_peft_suite"


class Converted:
    """In the place of an Auto class: every model of the hub is the converted one."""

    def __init__(self, family: str, method: str) -> None:
        self.family, self.method = family, method

    @functools.cached_property
    def folder(self) -> str:
        self.kept = tempfile.TemporaryDirectory(prefix=f"{self.family}-{self.method}-")
        model = parent(self.family)
        if self.method != PARENT:
            model = ALL[self.method].convert(model, sites(self.family))
        model.save_pretrained(self.kept.name)
        return self.kept.name

    def from_pretrained(self, path: str, **kwargs: Any) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path if Path(path).is_dir() else self.folder, **kwargs)


def classes(checkout: str) -> dict[str, type]:
    """One test class per family and method; `ExpectedFailures` has no place for rows that name no test.

    Raises:
        FileNotFoundError: there is no checkout of peft's tests at `checkout`.
    """
    share_package(checkout, "PEFT_TESTS", "testing_common.py")
    base = import_quietly("tests.test_decoder_models").TestDecoderModels
    rows = expected_failures(Path(__file__).with_suffix(".yaml"))
    made = {}
    for family, methods in METHODS_OF.items():
        _target_modules_as_in(family)
        reference = base()
        reference.transformers_class = Converted(family, PARENT)
        for method in (PARENT, *methods):
            cls = type(f"Test_{family}_{method}", (base,), {"__module__": MODULE})
            cls.transformers_class = Converted(family, method)
            for name in [name for name in dir(base) if name.startswith("test_")]:
                test = getattr(base, name)
                marks = [_with_model(mark, f"{family}-{method}") for mark in getattr(test, "pytestmark", [])]
                wrapped = checked(test, _row(rows, name, method, family), _parent_fails(reference, method, test))
                wrapped.pytestmark = marks
                setattr(cls, name, wrapped)
            made[cls.__name__] = cls
    return made


def _with_model(mark: pytest.Mark, model: str) -> pytest.Mark:
    """A parametrization by names of models, on one name."""
    if mark.name == "parametrize" and mark.args[0] == "model_id":
        return pytest.mark.parametrize("model_id", [model]).mark
    return mark


def _row(rows: list[Expected], name: str, method: str, family: str) -> Callable[[dict[str, Any]], Expected | None]:
    def of(arguments: dict[str, Any]) -> Expected | None:
        config = arguments.get("config_cls")
        full = name if config is None else f"{name}[{config.__name__}]"
        return next((row for row in rows if method != PARENT and row.covers(full, method, family)), None)

    return of


def _parent_fails(reference: Any, method: str, test: Callable) -> Callable[..., bool]:
    def fails(*args: Any, **kwargs: Any) -> bool:
        if method == PARENT:
            return True
        try:
            test(reference, *args, **kwargs)
        except (Exception, pytest.fail.Exception):
            return True
        return False

    return fails


def _target_modules_as_in(family: str) -> None:
    """peft knows which modules to adapt by families; where those make K and V, latents have one module instead."""
    family = {"gemma3": "gemma3_text"}.get(family, family)
    for mapping in vars(peft.utils.constants).values():
        if isinstance(mapping, dict) and family in mapping:
            modules = mapping[family]
            made = {"k_proj", "v_proj"} & set(modules) if isinstance(modules, list) else ()
            mapping[PREFIX + family] = [*modules, "kv_down"] if made else modules
