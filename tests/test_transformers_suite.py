"""transformers' own common tests (modelling, generation, export, training) on converted models.

They are not part of the distribution of transformers: get its repository at the release that is installed, then

    TRANSFORMERS_TESTS=~/transformers HF_HUB_OFFLINE=1 python -m pytest tests/test_transformers_suite.py -k llama_mla

runs one class; the classes are named <family>_<method> (`llama_parent`, `qwen3_dms`, ...), and all of them take hours.
`pip install parameterized httpx` brings what these tests need beside ours. Failures that are right are listed in
`transformers_suite.yaml`, each with its reason; a listed test that passes is a failure, one that fails on the parent
as well is none.
"""

import os

import pytest

if not os.environ.get("TRANSFORMERS_TESTS"):
    pytest.skip("TRANSFORMERS_TESTS names no checkout of transformers", allow_module_level=True)

from transformers_suite import classes

globals().update(classes(os.environ["TRANSFORMERS_TESTS"]))
