"""Writing over a third of a fused projection, which vision towers rotate."""

import pytest
import torch
from dispatch import CountOps
from hf.checks import batch_of
from hf.tiny import build, run
from torch import nn

import vlmops

KEEP = {
    "output": lambda out: out,
    "detached": lambda out: out.detach(),
    "a slice": lambda out: out[0],
    "v": lambda out: out.view(len(out), 3, -1)[:, 2],
    "numpy": lambda out: out.numpy(),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep", KEEP.values(), ids=KEEP)
def test_hooks_on_a_fused_projection_see_what_they_saw(keep, mode):
    model, batch = build("qwen2_vl"), batch_of("qwen2_vl", "several_images")
    vlmops.patch(model)
    kept, copies = [], []

    def record(module, args, out):
        copies.append(out.clone())
        kept.append(keep(out))

    with mode():
        with CountOps() as ran:
            run(model, batch)
        assert ran.counts["vlmops::mrope"] == 0
        model.model.visual.blocks[0].attn.qkv.register_forward_hook(record)
        with CountOps() as ran:
            run(model, batch)
        assert ran.counts["vlmops::mrope"] == 1
        assert torch.equal(torch.as_tensor(kept[0]), torch.as_tensor(keep(copies[0])))


def rotate_half(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(q, k, cos, sin):
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class TwoViewsOfQ(nn.Module):
    """Its three views count like q, k and v, but one of them is of q before it was rotated."""

    def __init__(self):
        super().__init__()
        self.qk, self.proj = nn.Linear(40, 80), nn.Linear(40, 40)

    def forward(self, hidden_states, position_embeddings):
        q, k, before = self._views(self.qk(hidden_states).reshape(len(hidden_states), 2, 2, 20))
        cos, sin = position_embeddings
        q, k = apply_rotary(q, k, cos, sin)
        return self.proj((q + k + before).flatten(1))

    def _views(self, qk):
        return qk[:, 0], qk[:, 1], qk[:, 0]


def test_attention_that_keeps_q_is_refused():
    model = build("qwen2_vl")
    model.model.visual.blocks[0].attn = TwoViewsOfQ()
    with torch.no_grad():
        report = vlmops.patch(model, ["mrope"])
    (row,) = [row for row in report.rows if row.path == "model.visual"]
    assert row.status == "refused"
    assert "the numeric check failed: TwoViewsOfQ" in row.reason
