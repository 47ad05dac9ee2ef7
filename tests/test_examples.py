"""Every public name has an example in its docstring, and what the example says it prints, it prints."""

from __future__ import annotations

import doctest

import pytest

import surgery

_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.IGNORE_EXCEPTION_DETAIL


@pytest.mark.parametrize("name", surgery.__all__)
def test_the_example_of_a_public_name_runs(name):
    found = doctest.DocTestFinder(recurse=False).find(getattr(surgery, name), name, globs={})
    (test,) = (t for t in found if t.examples)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=_FLAGS).run(test, out=said.append)
    assert not said, "".join(said)
