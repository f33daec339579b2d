"""Phi-4-multimodal: all hangs off the decoder."""

from vlmops.hf.targets import Expected, attention, patches, shuffle, text

EXPECTED = {
    "phi4_multimodal": (
        patches("model.embed_tokens_extend.image_embed.img_processor.embeddings"),
        shuffle("model.embed_tokens_extend.image_embed.image_token_compression"),
        Expected("hd_transform", "model.embed_tokens_extend.image_embed", lambda _: 1),
        attention("model.embed_tokens_extend.image_embed.img_processor.encoder.layers.*.self_attn"),
        text("model"),
    )
}
