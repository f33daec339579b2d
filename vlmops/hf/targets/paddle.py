"""ERNIE-4.5-VL and PaddleOCR-VL."""

from vlmops.hf.targets import text, tower

EXPECTED = {
    "ernie4_5_vl_moe": (tower("model.vision_tower", "depth"), text()),
    "paddleocr_vl": (tower("model.visual.vision_model.encoder"), text()),
}
