"""peft's own common tests of decoders on converted models.

They are not part of the distribution of peft: get its repository at the release that is installed, then

    PEFT_TESTS=~/peft HF_HUB_OFFLINE=1 python -m pytest tests/test_peft_suite.py -k llama_mla

runs one class; the classes are named Test_<family>_<method> (`Test_llama_parent`, `Test_qwen3_dms`, ...), and all of
them take hours. `pip install diffusers` brings what these tests import beside ours. Failures that are right are listed
in `peft_suite.yaml`, each with its reason; a listed test that passes is a failure, one that fails on the parent as well
is none.
"""

import os

import pytest

if not os.environ.get("PEFT_TESTS"):
    pytest.skip("PEFT_TESTS names no checkout of peft", allow_module_level=True)

from peft_suite import classes

globals().update(classes(os.environ["PEFT_TESTS"]))
