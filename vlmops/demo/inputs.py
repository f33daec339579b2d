"""What `vlmops demo` runs on: photographs, a model, and the prompt that joins them."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SAMPLES = ("astronaut", "chelsea", "coffee")
VOCABULARY = 16_384


class DemoError(Exception):
    """What stopped the demo and what to do next, in one line."""


@dataclasses.dataclass
class Subject:
    """A model, the arguments of its `generate`, and how they came about.

    Attributes:
        description: Facts to print, by heading.
        preprocessing: Seconds that the processor took.
        decode: Turns generated ids into text; None where there is no tokenizer.
    """

    model: Any
    inputs: dict[str, Tensor]
    description: dict[str, str]
    preprocessing: float
    decode: Callable[[list[int]], str] | None = None


@dataclasses.dataclass
class Picture:
    """A photograph as a PIL image in RGB."""

    name: str
    image: Any

    def __str__(self) -> str:
        return f"{self.name} {self.image.width}x{self.image.height}"


def need(module: str) -> Any:
    """Imports a module of the demo's extra, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DemoError(
            f"{error.name} is not installed; install it with: pip install 'vlmops[demo]'"
        ) from error


def first_line(error: BaseException) -> str:
    """An exception's message, cut to what fits one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 240 else lines[0][:237] + "..."


def pictures(paths: Sequence[str], side: int) -> list[Picture]:
    """The user's pictures, or scikit-image's photographs, made to fit a square of `side` pixels."""
    found = [_open(path) for path in paths] or [_sample(name) for name in SAMPLES]
    for picture in found:
        picture.image.thumbnail((side, side))
    return found


def random_subject(
    shown: Sequence[Picture],
    layers: int,
    vision_layers: int,
    dtype: torch.dtype,
    config: Any = None,
) -> Subject:
    """A Qwen2-VL with random weights and a prompt of random text ids around the pictures.

    Args:
        shown: The pictures, in the order of the prompt.
        layers: Number of text layers.
        vision_layers: Number of layers of the vision tower.
        dtype: Of the weights.
        config: A `Qwen2VLConfig` to use in place of the 2B model's.
    """
    need("transformers")
    if config is None:
        config = _qwen2_vl_2b(layers, vision_layers)
    processor = _qwen2_vl_processor()(
        patch_size=config.vision_config.patch_size,
        temporal_patch_size=config.vision_config.temporal_patch_size,
        merge_size=config.vision_config.spatial_merge_size,
    )
    start = time.perf_counter()
    images = _process(processor, shown)
    preprocessing = time.perf_counter() - start
    model = random_model(config, dtype)
    ids = _random_prompt(config, images["image_grid_thw"])
    inputs = {**_around(ids, config.image_token_id), **images}
    return Subject(
        model,
        _cast(inputs, dtype),
        {
            "model": _random_description(model, dtype),
            "images": _listing(shown, type(processor).__name__),
            "prompt": _prompt_line(inputs, config.image_token_id) + ", random ids",
        },
        preprocessing,
    )


def checkpoint_subject(
    shown: Sequence[Picture], source: str, prompt: str, dtype: torch.dtype
) -> Subject:
    """A model from a directory or the Hub, with its own processor and tokenizer."""
    transformers = need("transformers")
    if source.startswith(("/", ".", "~")) and not Path(source).expanduser().is_dir():
        raise DemoError(f"--model: there is no directory {source}; give one, or an id on the Hub")
    source = str(Path(source).expanduser()) if source.startswith("~") else source
    config = _load("configuration", source, transformers.AutoConfig)
    if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise DemoError(
            f"--model {source}: transformers has no image-text-to-text class for model type "
            f"{config.model_type!r}; give a vision-language model that chats, such as "
            "Qwen/Qwen2-VL-2B-Instruct"
        )
    prepare, decode, processor = _preparation(source, config)
    start = time.perf_counter()
    try:
        inputs = prepare(shown, prompt)
    except Exception as error:
        raise DemoError(
            f"--model {source}: its processor failed on the prompt ({first_line(error)}); the demo "
            "needs a chat model that takes images"
        ) from error
    preprocessing = time.perf_counter() - start
    model = _load("model", source, transformers.AutoModelForImageTextToText, dtype=dtype)
    image_token = getattr(config, "image_token_id", None)
    return Subject(
        model.eval(),
        _cast(inputs, dtype),
        {
            "model": f"{source}: {type(model).__name__}, {_parameters(model)} in {_name(dtype)}",
            "images": _listing(shown, processor),
            "prompt": _prompt_line(inputs, image_token),
        },
        preprocessing,
        decode,
    )


def _open(path: str) -> Picture:
    pil, ops = need("PIL.Image"), need("PIL.ImageOps")
    try:
        with pil.open(path) as image:
            upright = ops.exif_transpose(image).convert("RGB")
    except FileNotFoundError as error:
        raise DemoError(f"--image: there is no file {path}") from error
    except (OSError, ValueError, SyntaxError, pil.DecompressionBombError) as error:
        raise DemoError(
            f"--image: {path} cannot be read as a picture ({first_line(error)}); give a PNG, JPEG "
            "or another format that Pillow reads"
        ) from error
    return Picture(Path(path).name, upright)


def _sample(name: str) -> Picture:
    data, pil = need("skimage.data"), need("PIL.Image")
    return Picture(name, pil.fromarray(getattr(data, name)()).convert("RGB"))


def _process(processor: Any, shown: Sequence[Picture]) -> dict[str, Tensor]:
    try:
        images = processor(images=[picture.image for picture in shown], return_tensors="pt")
    except ValueError as error:
        raise DemoError(
            f"the image processor refused a picture ({first_line(error)}); leave it out, or crop it"
        ) from error
    return dict(images)


def _qwen2_vl_processor() -> Any:
    """The image processor for PIL, which needs no torchvision, or else the one there is."""
    package = "transformers.models.qwen2_vl.image_processing_"
    try:
        return importlib.import_module(package + "pil_qwen2_vl").Qwen2VLImageProcessorPil
    except ModuleNotFoundError:
        return importlib.import_module(package + "qwen2_vl").Qwen2VLImageProcessor


def _qwen2_vl_2b(layers: int, vision_layers: int) -> Any:
    """Qwen2-VL-2B's widths; ids of special tokens are the last of a smaller vocabulary."""
    return need("transformers").Qwen2VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": layers,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            # transformers' 0.02 makes it repeat one token for ever.
            "initializer_range": 0.03,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"depth": vision_layers, "embed_dim": 1280, "hidden_size": 1536},
        vision_start_token_id=VOCABULARY - 4,
        vision_end_token_id=VOCABULARY - 3,
        video_token_id=VOCABULARY - 2,
        image_token_id=VOCABULARY - 1,
    )


class _SkipRandomInit(TorchFunctionMode):
    """Leaves unwritten what constructors would draw, most of it twice."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def random_model(config: Any, dtype: torch.dtype) -> Any:
    """The image-text-to-text model of a config, with random weights."""
    transformers = need("transformers")
    with _SkipRandomInit():
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, config.text_config.initializer_range, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _random_description(model: Any, dtype: torch.dtype) -> str:
    text, vision = model.config.text_config, model.config.vision_config
    lines = [
        f"Qwen2-VL, random weights, {_parameters(model)} in {_name(dtype)}",
        f"text: {text.num_hidden_layers} layers, width {text.hidden_size}, "
        f"{text.num_attention_heads} heads, {text.num_key_value_heads} KV heads; "
        f"tower: {vision.depth} layers, width {vision.embed_dim}",
    ]
    if text.vocab_size == VOCABULARY:
        lines += [
            f"as wide as Qwen2-VL-2B, with fewer layers (of 28 and 32) and {VOCABULARY:,} of its "
            "151,936 ids,",
            "so that it starts in seconds; what it says means nothing",
        ]
    return "\n".join(lines)


def _parameters(model: Any) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.3g} M parameters"


def _random_prompt(config: Any, grids: Tensor) -> list[int]:
    """Text, then each image between its markers with text after it: images must not touch."""
    generator = torch.Generator().manual_seed(1)
    ordinary = config.text_config.vocab_size - 4

    def text(length: int) -> list[int]:
        ids: list[int] = torch.randint(ordinary, (length,), generator=generator).tolist()
        return ids

    ids = text(8)
    for patches in grids.prod(-1).tolist():
        tokens = patches // config.vision_config.spatial_merge_size**2
        image = [config.image_token_id] * tokens
        ids += [config.vision_start_token_id, *image, config.vision_end_token_id, *text(5)]
    return ids + text(12)


def _around(ids: list[int], image_token: int) -> dict[str, Tensor]:
    input_ids = torch.tensor([ids])
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == image_token).int(),
    }


def _cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _load(what: str, source: str, auto: Any, **options: Any) -> Any:
    """`auto.from_pretrained(source)`; whatever fails in there becomes one line."""
    try:
        return auto.from_pretrained(source, **options)
    except Exception as error:
        raise DemoError(
            f"--model {source}: the {what} cannot be loaded ({first_line(error)}); give a complete "
            "image-text-to-text checkpoint: its directory, or its id on the Hub"
        ) from error


Prepare = Callable[[Sequence[Picture], str], dict[str, Tensor]]


def _preparation(source: str, config: Any) -> tuple[Prepare, Callable[[list[int]], str], str]:
    """How a checkpoint's inputs are made, how its ids are read, and the processor's name."""
    transformers = need("transformers")
    tokenizer = _load("tokenizer", source, transformers.AutoTokenizer)
    # Where its files are missing transformers makes an empty one.
    if not tokenizer("photograph")["input_ids"]:
        raise DemoError(
            f"--model {source}: the tokenizer cannot be loaded, or has no vocabulary; add its "
            "files (tokenizer.json, tokenizer_config.json) to the checkpoint"
        )

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    try:
        processor = transformers.AutoProcessor.from_pretrained(source)
    except ImportError as error:
        # The processors of the Qwen family hold a video processor, which needs torchvision; so does
        # AutoImageProcessor in some versions. They share one class for images.
        if not hasattr(config, "vision_start_token_id"):
            raise DemoError(
                f"--model {source}: its processor needs a package ({first_line(error)})"
            ) from error
        images = _load("image processor", source, _qwen2_vl_processor())
        return _without_processor(tokenizer, images, config), decode, type(images).__name__
    except Exception as error:
        raise DemoError(
            f"--model {source}: the processor cannot be loaded ({first_line(error)})"
        ) from error

    def prepare(shown: Sequence[Picture], prompt: str) -> dict[str, Tensor]:
        text = processor.apply_chat_template(
            _messages(shown, prompt), add_generation_prompt=True, tokenize=False
        )
        pixels = [picture.image for picture in shown]
        return dict(processor(text=[text], images=pixels, return_tensors="pt"))

    return prepare, decode, type(processor).__name__


def _without_processor(tokenizer: Any, processor: Any, config: Any) -> Prepare:
    """What Qwen's processor does for still images, from its tokenizer and image processor."""

    def prepare(shown: Sequence[Picture], prompt: str) -> dict[str, Tensor]:
        images = _process(processor, shown)
        counts = iter((images["image_grid_thw"].prod(-1) // processor.merge_size**2).tolist())
        text = tokenizer.apply_chat_template(
            _messages(shown, prompt), add_generation_prompt=True, tokenize=False
        )
        image_token: int = config.image_token_id
        ids = tokenizer(text)["input_ids"]
        expanded = ([i] * next(counts) if i == image_token else [i] for i in ids)
        return {**_around(list(itertools.chain(*expanded)), image_token), **images}

    return prepare


def _messages(shown: Sequence[Picture], prompt: str) -> list[dict[str, Any]]:
    content: list[dict[str, str]] = []
    for number in range(1, len(shown) + 1):
        content += [{"type": "text", "text": f"Picture {number}: "}, {"type": "image"}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]


def _listing(shown: Sequence[Picture], processor: str) -> str:
    return f"{', '.join(map(str, shown))}, through {processor}"


def _prompt_line(inputs: dict[str, Tensor], image_token: int | None) -> str:
    ids = inputs["input_ids"]
    images = int((ids == image_token).sum()) if image_token is not None else 0
    return f"{ids.shape[1]} tokens, {images} of them from the images"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
