"""Fixtures of the suites about patching."""

import pytest

from vlmops.hf import eager_attention, shuffles
from vlmops.hf import patch as patching
from vlmops.hf.sites import add_norm, gated_residual, packed_attention


def _only(op, monkeypatch):
    """`vlmops.patch` knows no other op: reports and counts are about this one."""
    site = patching.all_sites()[op]
    monkeypatch.setattr(patching, "all_sites", lambda: {op: site})


@pytest.fixture
def only_mrope(monkeypatch):
    _only("mrope", monkeypatch)


@pytest.fixture
def only_patch_embed(monkeypatch):
    _only("patch_embed", monkeypatch)


@pytest.fixture
def only_pixel_shuffle(monkeypatch):
    """And no tensor is too small for it."""
    _only("pixel_shuffle", monkeypatch)
    monkeypatch.setattr(shuffles, "SMALL", 0)


@pytest.fixture
def only_mlp_projector(monkeypatch):
    _only("mlp_projector", monkeypatch)


@pytest.fixture
def only_packed_attention(monkeypatch):
    """And it is as quick as anything."""
    _only("packed_attention", monkeypatch)
    monkeypatch.setattr(packed_attention, "worthwhile", lambda *_: None)


@pytest.fixture
def only_gated_cross_attention(monkeypatch):
    _only("gated_cross_attention", monkeypatch)


@pytest.fixture
def only_gated_residual(monkeypatch):
    """And no tensor is too small for it."""
    _only("gated_residual", monkeypatch)
    monkeypatch.setattr(gated_residual, "SMALL", 0)


@pytest.fixture
def only_qformer_attention(monkeypatch):
    """And nothing is too small for it."""
    _only("qformer_attention", monkeypatch)
    monkeypatch.setattr(eager_attention, "SMALL", 0)


@pytest.fixture
def only_perceiver_attention(monkeypatch):
    """And nothing is too small for it."""
    _only("perceiver_attention", monkeypatch)
    monkeypatch.setattr(eager_attention, "SMALL", 0)


@pytest.fixture
def only_add_norm(monkeypatch):
    """And no tensor is too small for it."""
    _only("add_norm", monkeypatch)
    monkeypatch.setattr(add_norm, "SMALL", 0)
    monkeypatch.setattr(add_norm, "SMALL_RECORDED", 0)
