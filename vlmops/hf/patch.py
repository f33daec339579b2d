"""`patch`, `unpatch` and `patched`: the one path by which ops get into models."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from vlmops import _library
from vlmops.hf import processor as processors
from vlmops.hf.pixels import adapted
from vlmops.hf.rebind import original_class, replaced, was_patched
from vlmops.hf.report import PatchReport, Row, Status
from vlmops.hf.sites import AlreadyPatched, LeftAlone, Refused, Site, all_sites
from vlmops.hf.targets import Expected, expected_places

_MINIMUM_TRANSFORMERS = (5, 17)


def patch(
    model: nn.Module,
    ops: Sequence[str] | None = None,
    verify: bool = True,
    processor: Any = None,
) -> PatchReport:
    """Replaces what a Hugging Face model does slowly by vlmops' kernels, in this model alone.

    Weights, ``state_dict``, outputs and gradients stay what they were; another model of the same
    class is not touched. Patching twice does nothing more. What another library replaces in a
    modeling file afterwards is not seen by a model that is patched already.

    Args:
        model: A transformers model, or any module that contains one (PEFT, compiled, ...).
        ops: Names of ops, e.g. ``["mrope"]``; None for all of them.
        verify: Compare every replacement with the model's own code on a tiny input, and leave
            alone what differs.
        processor: The model's processor, or its image processor. Called from now on, it returns
            uint8 pixels, a quarter of the bytes, and the model normalises them by the numbers that
            the processor would have computed. It serves this model alone until `unpatch`: others
            would take raw pixels for normalised ones. Calls that do anything but what the processor
            does by default, and pixels that it pads once they are normalised, come as float32, as
            before. What cannot be done so is refused in the report.

    Returns:
        What was replaced, by which kernel, and what was left alone and why; printable.

    Raises:
        TypeError: model is not a torch.nn.Module, ops is a string, or processor none of images.
        ValueError: ops names an unknown op, or one that has no site in this model, or leaves out
            ``"patch_embed"``, which a processor needs.
        ImportError: transformers is missing or older than 5.17, or the library is not loaded.

    Example:
        >>> from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
        >>> text = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        ...     "num_key_value_heads": 1, "intermediate_size": 64, "vocab_size": 99}
        >>> config = Qwen2VLConfig(text_config=text, vision_config={"depth": 1})
        >>> model = Qwen2VLForConditionalGeneration(config)
        >>> vlmops.patch(model, ops=["mrope"]).counts
        {'mrope': 2}
    """
    return _patch(model, ops, verify, processor)[0]


def unpatch(model: nn.Module) -> int:
    """Gives every module that `patch` changed its own class back, and the processor its.

    Args:
        model: A patched model, or a copy of one.

    Returns:
        The number of modules that were restored; 0 if the model was not patched.

    Raises:
        TypeError: model is not a torch.nn.Module.
        RuntimeError: another library has wrapped what `patch` put there; nothing is restored.
    """
    _require_module(model)
    return _restore({m: original_class(m) for m in model.modules() if was_patched(m)})


@contextlib.contextmanager
def patched(
    model: nn.Module,
    ops: Sequence[str] | None = None,
    verify: bool = True,
    processor: Any = None,
) -> Iterator[PatchReport]:
    """`patch` for the length of a ``with`` block; what was patched before stays patched.

    Args: see `patch`. Yields its report.

    Raises:
        As `patch`.
    """
    report, changed = _patch(model, ops, verify, processor)
    try:
        yield report
    finally:
        _restore(changed)


def _patch(
    model: nn.Module, ops: Sequence[str] | None, verify: bool, processor: Any
) -> tuple[PatchReport, dict[nn.Module, Any]]:
    _require_module(model)
    _require_transformers()
    _library.require()
    sites = all_sites()
    rows: list[Row] = []
    changed: dict[nn.Module, Any] = {}  # and the classes that they had
    requested = _requested(ops, sites)
    if processor is not None:
        processors.require_processor(processor)
        if "patch_embed" not in requested:
            raise ValueError("processor: expected 'patch_embed' among ops, which takes its pixels")
    try:
        for op in requested:
            with _where_probes_run():
                found = _patch_site(model, sites[op], verify, changed)
            rows += found or [Row(op, "", "", 0, "", "not present")]
        rows += _missing(model, rows)
        if processor is not None:
            with _where_probes_run():
                rows.append(_hand_over(model, processor, changed))
        report = PatchReport(type(model).__name__, tuple(rows))
        for op in ops or ():
            left_alone = any(row.op == op and row.status == "left alone" for row in rows)
            if report.counts[op] == 0 and not left_alone:
                raise ValueError(
                    f"ops: {op!r} has no site that can be patched in this model\n{report}"
                )
    except BaseException:
        _restore(changed)
        raise
    return report, changed


@contextlib.contextmanager
def _where_probes_run() -> Iterator[None]:
    """On the CPU in float32, whatever the caller's defaults are."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _patch_site(
    model: nn.Module, site: Site, verify: bool, changed: dict[nn.Module, Any]
) -> list[Row]:
    rows = []
    # Listed before anything changes: find walks the modules that adapt alters.
    for found in list(site.find(model)):
        place = found if not isinstance(found, Refused | AlreadyPatched) else found.place
        described = (site.op, place.module, place.path, place.sites)
        backend = place.backend or _backend()
        if isinstance(found, AlreadyPatched):
            rows.append(Row(*described, backend, "already patched"))
            continue
        reason = found.reason if isinstance(found, Refused) else None
        if reason is None and verify:
            reason = site.check(place)
        if reason is not None:
            status: Status = "left alone" if isinstance(found, LeftAlone) else "refused"
            rows.append(Row(*described, "", status, reason))
            continue
        for module, new_class in site.adapt(place).items():
            _change(module, new_class, changed)
        rows.append(Row(*described, backend, "patched", place.note))
    return rows


def _change(module: nn.Module, new_class: type[nn.Module], changed: dict[nn.Module, Any]) -> None:
    changed.setdefault(module, type(module))
    module.__class__ = new_class


def _hand_over(model: nn.Module, processor: Any, changed: dict[nn.Module, Any]) -> Row:
    """Makes a processor hand over raw pixels and a model take them, or says why not."""
    name = type(processor).__name__
    handover = processors.of(processor)
    if handover is not None and handover.stands():
        if handover.is_to(model):
            return Row("processor", name, "", 1, "uint8", "already patched")
        reason = "it hands over to another model; give each model a processor of its own"
        return Row("processor", name, "", 1, "", "refused", reason)
    processors.settle()
    learned = processors.learn(processor)
    if isinstance(learned, str):
        return Row("processor", name, "", 1, "", "refused", learned)
    classes = adapted(model, learned.pixels, learned.sample)
    if isinstance(classes, str):
        return Row("processor", name, "", 1, "", "refused", classes)
    for module, new_class in classes.items():
        if type(module) is not new_class:
            _change(module, new_class, changed)
    processors.Handover(learned, classes).begin(processor)
    return Row("processor", name, "", 1, "uint8", "patched", learned.note)


def _backend() -> str:
    return f"cpu ({_library.cpu_isa()})"


def _missing(model: nn.Module, rows: list[Row]) -> list[Row]:
    """Places that the model's family is known to have and that no site found."""
    config: Any = getattr(model, "config", None)
    ops = {row.op for row in rows}

    def ends(path: str, tail: str) -> bool:
        return tail == "" or f".{path}".endswith(f".{tail}")

    def found(expected: Expected) -> bool:  # the model may be wrapped, or itself be a part
        path = expected.path
        return any(
            row.op == expected.op and (ends(row.path, path) or ends(path, row.path))
            for row in rows
            if row.sites
        )

    return [
        Row(
            expected.op,
            "",
            expected.path,
            0,
            "",
            "refused",
            f"expected in {config.model_type} and not found: this transformers is built "
            "differently; please report it with the version",
        )
        for expected in expected_places(getattr(config, "model_type", ""))
        if expected.op in ops and expected.sites(config) and not found(expected)
    ]


def _restore(classes: dict[nn.Module, Any]) -> int:
    """Gives modules the classes that they had; those that are ours no more keep what they have."""
    for module in classes:
        what = None
        if original_class(module) is None and was_patched(module):
            what = f"class of a {type(module).__bases__[0].__name__}"
        for method in replaced(module):
            if method in vars(module):
                what = f"{method} of a {type(module).__name__}"
        if what is not None:
            raise RuntimeError(
                f"the {what} was replaced on the instance after vlmops patched it; undo that "
                "first, then call vlmops.unpatch"
            )
    for module, original in classes.items():
        if original_class(module) is not None:
            module.__class__ = original
    processors.settle()
    return len(classes)


def _requested(ops: Sequence[str] | None, sites: dict[str, Site]) -> list[str]:
    if ops is None:
        return list(sites)
    if isinstance(ops, str):
        raise TypeError(f"ops: expected a list of names, got the string {ops!r}: write [{ops!r}]")
    for op in ops:
        if op not in sites:
            raise ValueError(f"ops: expected names among {', '.join(sites)}, got {op!r}")
    return list(dict.fromkeys(ops))


def _require_module(model: nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _require_transformers() -> None:
    minimum = ".".join(map(str, _MINIMUM_TRANSFORMERS))
    remedy = f"pip install -U 'transformers>={minimum}'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"vlmops.patch needs transformers {minimum} or later: {remedy}"
        ) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _MINIMUM_TRANSFORMERS:
        raise ImportError(
            f"vlmops.patch needs transformers {minimum} or later, found "
            f"{transformers.__version__}: {remedy}"
        )
