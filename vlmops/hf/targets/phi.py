"""Phi-4-multimodal: all hangs off the decoder."""

from vlmops.hf.targets import patches, text

EXPECTED = {
    "phi4_multimodal": (
        patches("model.embed_tokens_extend.image_embed.img_processor.embeddings"),
        text("model"),
    )
}
