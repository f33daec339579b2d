"""Fixtures of the suites about patching."""

import pytest

from vlmops.hf import patch as patching


@pytest.fixture
def only_mrope(monkeypatch):
    """`vlmops.patch` knows no other op: reports and counts are about M-RoPE."""
    site = patching.all_sites()["mrope"]
    monkeypatch.setattr(patching, "all_sites", lambda: {"mrope": site})
