"""Test classes that run the common tests of a checkout of transformers on converted models."""

from __future__ import annotations

import contextlib
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from suite_adapter import (
    METHODS_OF,
    PARENT,
    Expected,
    checked,
    convert_config,
    expected_failures,
    import_quietly,
    native_construction,
    share_package,
)
from transformers.models.auto import modeling_auto

from surgery.runtime.configuration import config_class
from surgery.runtime.layout import Latent, LayerPlan, position_numbers
from surgery.runtime.modeling import surgery_class

MODULE = "test_transformers_suite"
BASES = {
    "llama": "LlamaModelTest",
    "qwen3": "Qwen3ModelTest",
    "mistral": "MistralModelTest",
    "gemma3": "Gemma3TextModelTest",
}
_NAMES = {
    "base_model_class": "MODEL_MAPPING_NAMES",
    "causal_lm_class": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
}
"""Classes of a tester that are converted, and the table where transformers' tests look for the kind of a class."""


def classes(checkout: str) -> dict[str, type]:
    """One test class per family and method, and one for the list of expected failures.

    Raises:
        FileNotFoundError: there is no checkout of transformers' tests at `checkout`.
    """
    share_package(checkout, "TRANSFORMERS_TESTS", "causal_lm_tester.py")
    rows = expected_failures(Path(__file__).with_suffix(".yaml"))
    made: dict[str, type] = {}
    used: set[Expected] = set()
    for family, base_name in BASES.items():
        base = getattr(import_quietly(f"tests.models.{family}.test_modeling_{family}"), base_name)
        names = [n for n in dir(base) if n.startswith("test_") and callable(getattr(base, n))]
        for method in (PARENT, *METHODS_OF[family]):
            cls = made[f"{family}_{method}"] = _class(base, family, method)
            for name in names:
                row = next((row for row in rows if method != PARENT and row.covers(name, method, family)), None)
                used |= {row} if row else set()
                setattr(
                    cls,
                    name,
                    checked(getattr(cls, name), lambda _, r=row: r, _parent_fails(base, family, method, name)),
                )

    class ExpectedFailures(unittest.TestCase):
        def test_every_row_names_a_test(self) -> None:
            unused = [row for row in rows if row not in used]
            assert not unused, f"no test of this checkout is called so: {unused}"

    ExpectedFailures.__module__ = MODULE
    return {**made, "ExpectedFailures": ExpectedFailures}


def _parent_fails(base: type, family: str, method: str, name: str) -> Callable[[], bool]:
    if method == PARENT:
        return lambda: True

    def fails() -> bool:
        result = unittest.TestResult()
        _class(base, family, PARENT)(name).run(result)
        return not result.wasSuccessful()

    return fails


def _class(base: type, family: str, method: str) -> type[unittest.TestCase]:
    """`base` on models of four query heads and two KV heads, converted by `method`."""
    tester_base = base.model_tester_class

    class Tester(tester_base):
        def __init__(self, parent: Any) -> None:
            super().__init__(parent)
            self.num_attention_heads, self.num_key_value_heads = 4, 2
            self.head_dim = self.hidden_size // self.num_attention_heads
            # Smaller weights attend to all tokens alike, and hide masks and rotation in rounding. With these the parent
            # misses one test of bfloat16, that sdpa gives packed sequences what it gives padded ones.
            self.initializer_range = 0.2

        def get_config(self) -> Any:
            if method == PARENT:
                return super().get_config()
            converted, self.config_class = self.config_class, parent_config
            try:
                return convert_config(super().get_config(), method)
            finally:
                self.config_class = converted

    Tester._verify_and_infer_model_attributes()
    parent_config = Tester.config_class
    if method != PARENT:
        for name in _NAMES:
            setattr(Tester, name, surgery_class(getattr(Tester, name)))
        Tester.config_class = config_class(parent_config)
        # Other heads than the language model's are not converted here.
        Tester.sequence_classification_class = Tester.token_classification_class = None
        Tester.question_answering_class = None
        Tester._verify_and_infer_model_attributes = classmethod(lambda cls: None)

    def set_up(self: Any) -> None:
        if method != PARENT:
            stack = contextlib.ExitStack()
            self.addCleanup(stack.close)
            stack.enter_context(native_construction(method))
            for name, table in _NAMES.items():
                kind = {Tester.config_class.model_type: getattr(Tester, name).__name__}
                stack.enter_context(mock.patch.dict(getattr(modeling_auto, table), kind))
        super(made, self).setUp()

    converted_only = {} if method == PARENT else {"_check_past_key_values_for_generate": _check_cache}
    made = type(
        f"{family}_{method}",
        (base,),
        {
            **converted_only,
            "__module__": MODULE,
            "model_tester_class": Tester,
            "setUp": set_up,
            # A failing part ends the test: otherwise it is reported past the list of expected failures.
            "subTest": lambda self, *args, **kwargs: contextlib.nullcontext(),
            "test_can_init_all_missing_weights_before_2023": True,  # a year is read from the head of the config's file
            "is_pipeline_test_to_skip": lambda self, *args, **kwargs: True,
        },
    )
    return made


def _check_cache(_: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of the check that every layer caches what the config says of heads: what its plan says.

    Takes batch size, cache, sequence length and config; releases differ in the name of the cache.
    """
    batch_size, cache, seq_length, config = *args, *kwargs.values()
    plans = [LayerPlan.from_dict(layer["plan"]) for layer in config.surgery["layers"]]
    assert len(cache) == len(plans)
    for layer, plan in zip(cache.layers, plans, strict=True):
        if plan.retain is not None:
            continue  # no tensor of whole sequences
        project = plan.project
        shape = (batch_size, 1 if isinstance(project, Latent) else project.kv_heads, seq_length)
        if plan.owner != plan.layer:
            assert layer.keys.numel() == 0
        else:
            assert layer.keys.shape == (*shape, project.dims if isinstance(project, Latent) else project.head_dim)
        if plan.owner != plan.layer or plan.value_owner not in (None, plan.layer):
            assert layer.values.numel() == 0
        else:
            width = project.value_dim
            if isinstance(project, Latent):
                width = position_numbers(layer.values.dtype.itemsize) if project.keeps_positions else 0
            assert layer.values.shape == (*shape, width)
