"""GLM-4V and GLM-OCR, built like Qwen2-VL."""

from vlmops.hf.targets import text, tower

EXPECTED = dict.fromkeys(("glm4v", "glm_ocr"), (tower("model.visual", "depth"), text()))
