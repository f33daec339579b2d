"""Qwen2-VL and Qwen2.5-VL.

Both generations hang the language model at ``model.language_model``: its ``rotary_emb`` makes one
pair of cos and sin for all ``layers[i].self_attn``, chunked by ``mrope_section``. The vision tower
is ``model.visual``.
"""

from vlmops.hf.targets import Expected

_TEXT = Expected(
    op="mrope",
    path="model.language_model",
    sites=lambda config: int(config.text_config.num_hidden_layers),
)

EXPECTED = {
    "qwen2_vl": (_TEXT,),
    "qwen2_5_vl": (_TEXT,),
}
