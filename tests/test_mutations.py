"""What ``mutate.py`` would break is still there; whether the tests notice, it tells itself in some minutes."""

from __future__ import annotations

import pytest

from mutate import ROOT, SUITES

MUTATIONS = [(f"{folder}/{name}", good) for folder, mutations, _ in SUITES for name, good, _, _ in mutations]


@pytest.mark.parametrize(("name", "good"), MUTATIONS)
def test_every_mutation_can_be_made(name: str, good: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").count(good) == 1
