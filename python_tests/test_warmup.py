"""`vlmops.warmup` runs a model where kernels are compiled, and nowhere else.

That one size serves for all is in ops/test_mrope_triton.py.
"""

import pytest
import torch
from torch import nn

import vlmops


class Stub(nn.Module):
    """Notes what it is called with."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, device=device))
        self.shapes = []

    def forward(self, input_ids):
        assert not torch.is_grad_enabled()
        assert input_ids.device == self.weight.device
        self.shapes.append(list(input_ids.shape))


def test_nothing_to_do_on_the_cpu():
    model = Stub("cpu")
    done = vlmops.warmup(model, [1, 16, 17])
    assert model.shapes == []
    assert (done.sizes, done.compiled) == ((), 0)
    assert str(done).startswith("vlmops.warmup: nothing to compile on cpu")


def test_runs_every_size_elsewhere():
    model = Stub("meta")
    done = vlmops.warmup(model, [1, 16, 17])
    assert model.shapes == [[1, 1], [1, 16], [1, 17]]
    assert done.sizes == (1, 16, 17)
    assert str(done).endswith("kernels compiled on meta by running 1, 16, 17 tokens")


def test_takes_a_run_of_the_users():
    seen = []
    vlmops.warmup(Stub("meta"), [3], run=lambda model, size: seen.append((type(model), size)))
    assert seen == [(Stub, 3)]


def test_refuses_what_it_cannot_run():
    with pytest.raises(ValueError, match=r"sizes: expected numbers of tokens of 1 or more, got"):
        vlmops.warmup(Stub("cpu"), [0])
    with pytest.raises(ValueError, match=r"model: expected a module with parameters"):
        vlmops.warmup(nn.Module(), [1])
