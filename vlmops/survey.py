"""What `vlmops.patch` would do to models, from their configs alone: behind ``vlmops inspect``.

Models are built on the meta device, so that neither weights nor memory for them are needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import vlmops
from vlmops import _library
from vlmops.cli import CommandError
from vlmops.hf.report import PatchReport

_MAPPINGS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)
_MEASURED = ("linear",)
"""Ops whose places are patched where measurements, or defaults of the machine, say so."""
_ROPE = {"rope_type": "default", "rope_theta": 1e4}

# What transformers' own default config of a type lacks to build a model, and why.
COMPLETIONS: Mapping[str, tuple[dict[str, Any], str]] = {
    "aya_vision": (
        {
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "num_attention_heads": 16,
            }
        },
        "16 vision heads: the default's 14 do not divide its width",
    ),
    "chameleon": ({"vocabulary_map": {"<image>": 8711}}, "a vocabulary_map"),
    "cohere_compass": (
        {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
        "rope_parameters",
    ),
    "deepseek_ocr2": (
        {"text_config": {"mlp_layer_types": ["dense", *["sparse"] * 31]}},
        "mlp_layer_types",
    ),
    "diffusion_gemma": (
        {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 704}},
        "sizes of its experts",
    ),
    "emu3": ({"vocabulary_map": {"<image>": 1, "<|extra_200|>": 0}}, "a vocabulary_map"),
    "granite4_vision": (
        {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/4"},
        "deepstack_layer_map and downsample_rate",
    ),
    "hunyuan_vl": (
        {
            "text_config": {
                "head_dim": 128,
                "rope_parameters": {**_ROPE, "mrope_section": [16, 16, 16, 16]},
            }
        },
        "head_dim and mrope_section",
    ),
    "qwen4_exp": (
        {
            "text_config": {
                "indexer_n_heads": 4,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 128,
                "indexer_budget": 2048,
                "indexer_compress_ratio": 64,
                "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25},
            }
        },
        "sizes of its indexer",
    ),
}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What became of one model."""

    model_type: str
    config: str
    """Where the config came from."""
    report: PatchReport | None = None
    problem: str = ""
    """Why there is no report."""
    built: bool = True
    """Whether there was a model to patch."""

    @property
    def patched(self) -> int:
        """Number of sites that would run on vlmops, of all ops."""
        return sum(self.report.counts.values()) if self.report else 0

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        if self.report is None:
            return "patch failed" if self.built else "not built"
        if self.patched:
            return "patched"
        return "refused" if self.refused else "nothing to patch"

    @property
    def refused(self) -> bool:
        """Whether a site was found, or expected, that would not run on vlmops."""
        return self.report is not None and any(r.status == "refused" for r in self.report.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        found = {"problem": self.problem} if self.report is None else self.report.to_dict()
        return {"model_type": self.model_type, "config": self.config, **found}

    def __str__(self) -> str:
        start = f"{self.model_type} ({self.config})"
        if self.report is None:
            return f"{start}\nvlmops: {self.problem}"
        return f"{start}\n{self.report}"


VERDICTS = ("patched", "refused", "nothing to patch", "patch failed", "not built")


def inspect(model: str) -> Inspection:
    """Builds a model on the meta device and patches it.

    Args:
        model: A model type of transformers, a folder with a config.json, or the id of a model on
            the Hub whose config is in the local cache.

    Raises:
        CommandError: there is no such model, or its config cannot be read.
        ImportError: as `vlmops.patch`.
    """
    _library.require()
    with _quiet():
        config, source = None, "default config"
        try:
            config, source = _config(model)
            with torch.device("meta"):
                built = _model_class(config)._from_config(config)
        except CommandError:
            raise
        except Exception as error:  # foreign code, asked for what nobody may have tried
            model_type = model if config is None else config.model_type
            return Inspection(model_type, source, problem=_why("not built", error), built=False)
        try:
            return Inspection(config.model_type, source, vlmops.patch(built))
        except Exception as error:  # ours; the other models are still worth looking at
            problem = f"{_why('patch failed', error)}; please report this"
            return Inspection(config.model_type, source, problem=problem)


def model_types() -> list[str]:
    """Every vision-language model type of the installed transformers."""
    from transformers.models.auto import modeling_auto

    return sorted(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def inspect_all() -> Iterator[Inspection]:
    """`inspect` for each of `model_types`, from its default config."""
    for model_type in model_types():
        yield inspect(model_type)


def summary(inspections: list[Inspection]) -> str:
    """One line: how many model types came to which verdict."""
    found = [inspection.verdict for inspection in inspections]
    counts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS)
    return f"{len(found)} model types of transformers {_version()}: {counts}"


def table(inspections: list[Inspection]) -> str:
    """One line per model type, for people."""
    lines = [f"{inspection.model_type:24}{cells(inspection)}" for inspection in inspections]
    return "\n".join([*lines, "", summary(inspections)])


def cells(inspection: Inspection) -> str:
    """What was found, op by op, in one line."""
    rows = inspection.report.rows if inspection.report else ()
    ops = dict.fromkeys(row.op for row in rows if row.status != "not present")
    found = "; ".join(f"{op}: {_cell(inspection, op)}" for op in ops)
    return inspection.problem or found or "nothing to patch"


def markdown(inspections: list[Inspection]) -> str:
    """The table of the README, the same on every machine: a column per op that is found."""
    every = [_anywhere(inspection) for inspection in inspections]
    rows = (row for i in every if i.report for row in i.report.rows)
    ops = sorted({row.op for row in rows if row.status != "not present"})
    by_verdict: dict[str, list[Inspection]] = {verdict: [] for verdict in VERDICTS}
    for inspection in every:
        by_verdict[inspection.verdict].append(inspection)
    shown = by_verdict["patched"] + by_verdict["refused"]
    reasons = (row.reason for i in shown if i.report for row in i.report.rows if row.reason)
    notes = {reason: f"note {n}" for n, reason in enumerate(dict.fromkeys(reasons), 1)}
    nothing = ", ".join(i.model_type for i in by_verdict["nothing to patch"])
    return "\n".join(
        [
            f"{summary(every)}. Numbers are calls in one forward pass of the type's default "
            "config; which of the linear layers that are found gain depends on the machine.",
            "",
            f"| model type | {' | '.join(ops)} |",
            f"|---|{'---|' * len(ops)}",
            *(
                f"| {i.model_type} | {' | '.join(_cell(i, op, notes) for op in ops)} |"
                for i in shown
            ),
            "",
            *(f"- {note}: {reason}" for reason, note in notes.items()),
            f"- nothing to patch: {nothing or 'none'}",
            *(f"- {i.model_type}: {i.problem}" for i in every if i.report is None),
        ]
    )


def _anywhere(inspection: Inspection) -> Inspection:
    """With every place patched that would be on a machine where that is the faster."""
    if inspection.report is None:
        return inspection
    rows = tuple(
        dataclasses.replace(row, status="patched", reason="")
        if row.op in _MEASURED and row.status in ("patched", "left alone")
        else row
        for row in inspection.report.rows
    )
    return dataclasses.replace(inspection, report=dataclasses.replace(inspection.report, rows=rows))


def _cell(inspection: Inspection, op: str, notes: Mapping[str, str] | None = None) -> str:
    """Sites of one op by status and reason; notes stand for reasons."""
    sites: dict[tuple[str, str], int] = {}
    for row in inspection.report.rows if inspection.report else ():
        if row.op == op and row.status != "not present":
            key = (row.status, row.reason)
            sites[key] = sites.get(key, 0) + row.sites
    parts = []
    for (status, reason), count in sites.items():
        said = notes[reason] if notes and reason else reason
        if notes is not None and op in _MEASURED and status == "patched":
            status = "found"
        parts.append(f"{count or ''} {status}{f' ({said})' if said else ''}".strip())
    return ", ".join(parts) or "-"


def _config(model: str) -> tuple[Any, str]:
    """The config, and where it came from."""
    transformers = _transformers()
    if model in transformers.CONFIG_MAPPING:
        changes, why = COMPLETIONS.get(model, ({}, ""))
        source = f"default config{f' with {why}' if why else ''}"
        return transformers.AutoConfig.for_model(model, **changes), source
    path = Path(model).expanduser()
    if path.exists():
        return _load(str(path), f"{model} holds no config.json that can be read"), str(path)
    if "/" not in model or model.startswith(("/", ".", "~")):
        near = difflib.get_close_matches(model, list(transformers.CONFIG_MAPPING), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "--all lists those that see"
        raise CommandError(
            f"{model!r} is neither a model type of transformers {_version()} nor a folder; {hint}"
        )
    missing = (
        f"{model} is neither a folder nor in the local cache of the Hub, and inspect does not use "
        f"the network; fetch it with: hf download {model} config.json"
    )
    return _load(model, missing), f"{model}, from the local cache"


def _load(source: str, complaint: str) -> Any:
    transformers = _transformers()
    try:
        return transformers.AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CommandError(f"{complaint} ({_first_line(error)})") from error


def _model_class(config: Any) -> Any:
    """The class that generates from images if there is one, else the checkpoint's, else any."""
    from transformers.models.auto import modeling_auto

    every = [name for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")]
    mappings = [getattr(modeling_auto, name) for name in (*_MAPPINGS, *every)]
    names = [mapping[config.model_type] for mapping in mappings if config.model_type in mapping]
    position = 1 if config.model_type in mappings[0] else 0
    names[position:position] = config.architectures or ()
    for name in names:
        found = getattr(_transformers(), name if isinstance(name, str) else name[0], None)
        if hasattr(found, "_from_config"):
            return found
    raise CommandError(
        f"{config.model_type} is a part of models: transformers has no class that builds it alone; "
        "name a model that contains it"
    )


def _why(verdict: str, error: Exception) -> str:
    message = f"{verdict}: {type(error).__name__}: {_first_line(error)}"
    if isinstance(error, ImportError):
        return message
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{message} ({Path(where.filename).name}:{where.lineno})"


def _first_line(error: BaseException) -> str:
    """The first sentence of an error's first line."""
    line = (str(error).strip().splitlines() or [""])[0]
    return textwrap.shorten(line.split(". ")[0].rstrip("."), 120, placeholder=" ..")


def _transformers() -> Any:
    from vlmops.hf.patch import _require_transformers

    _require_transformers()
    import transformers

    return transformers


def _version() -> str:
    version: str = _transformers().__version__
    return version


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what models say about default configs."""
    logging = _transformers().logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
