"""`vlmops.mlp_projector` for the projectors between vision towers and language models.

What a projector is, and which of its parts the op does the work of, `vlmops.hf.projectors` says.
Projectors of one linear layer (PaliGemma, Mllama, Idefics3, SmolVLM, BLIP-2) are `linear`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init  # draws no random numbers

from vlmops import dispatch
from vlmops.hf import plain, projectors, rehearsal
from vlmops.hf.projectors import Chain, Layout
from vlmops.hf.sites import AlreadyPatched, Place, Refused, Site
from vlmops.ops.linear_tuning import tune

_SECONDS = 0.5  # at most for timing products
_SIZES = 40, 56, 24  # channels in, between and out, in the numeric check
_ROWS = 9


@dataclasses.dataclass(frozen=True)
class _Projector:
    module: nn.Module
    layout: Layout

    @property
    def linears(self) -> list[Any]:
        paths = (path for chain in self.layout.chains for path in chain.linears)
        return [self.module.get_submodule(path) for path in paths]

    @property
    def weights(self) -> Iterator[Any]:
        """As they are multiplied by."""
        for chain in self.layout.chains:
            pairs = projectors.in_front(self.module, chain)
            yield from (weight for weight, _ in pairs if weight is not None)
            yield self.module.get_submodule(chain.fc2).weight


def find(model: nn.Module) -> Iterator[Place | Refused | AlreadyPatched]:
    """Every module that is, or holds, a chain of a projector."""
    served: list[Place] = []
    done: list[str] = []
    failed: dict[str, str] = {}
    for path, module in projectors.candidates(model):
        if any(path.startswith(f"{outer}.") for outer in done):
            continue
        place = Place(path, type(module).__name__, 1)
        if projectors.is_patched(module):
            yield AlreadyPatched(place)
            done.append(path)
            continue
        layout = projectors.study(module)
        if isinstance(layout, str):
            failed[path] = layout
            continue
        done.append(path)
        found = _Projector(module, layout)
        reason = _refusal(found)
        if reason is not None:
            yield Refused(place, reason)
        else:
            served.append(dataclasses.replace(place, details=found, note=layout.note))
    tune((w for p in served for w in p.details.weights if w.is_cpu), _SECONDS)
    yield from served
    for path, reason in failed.items():
        outer = path.rpartition(".")[0]
        inside = any(path.startswith(f"{other}.") for other in failed)
        holds = any(other.startswith(f"{path}.") for other in done)
        # In a list what is no projector is a layer, which nobody takes for one.
        if (
            not inside
            and not holds
            and not isinstance(model.get_submodule(outer), projectors.LISTS)
        ):
            yield Refused(Place(path, type(model.get_submodule(path)).__name__, 1), reason)


def _refusal(found: _Projector) -> str | None:
    """Why what does the right thing is not replaced."""
    for layer in found.linears:
        for tensor in plain.tensors(layer):
            if tensor.dtype not in plain.DTYPES or tensor.layout is not torch.strided:
                return f"no kernel for weights of {tensor.dtype}, {tensor.layout}"
    return dispatch.refuses("mlp_projector", found.linears[0].weight.device)


def adapt(place: Place) -> dict[nn.Module, type[nn.Module]]:
    """See `Site.adapt`."""
    found: _Projector = place.details
    return {found.module: projectors.patched_class(found.module, found.layout)}


_checked: dict[Hashable, str | None] = {}


def check(place: Place) -> str | None:
    """Runs the op against the parts of each chain; once per kind and dtype."""
    found: _Projector = place.details
    for chain in found.layout.chains:
        fc1: Any = found.module.get_submodule(chain.fc1)
        dtype = fc1.weight.dtype
        biases = tuple(found.module.get_submodule(p).bias is not None for p in chain.linears)
        norm = None if chain.norm is None else type(found.module.get_submodule(chain.norm))
        key = chain, norm, biases, dtype
        if key not in _checked:
            _checked[key] = _difference(found.module, chain, dtype)
        if _checked[key] is not None:
            return _checked[key]
    return None


@torch.no_grad()
def _difference(module: nn.Module, chain: Chain, dtype: torch.dtype) -> str | None:
    """Why the op is not what its parts do, with few channels."""
    draw = torch.Generator().manual_seed(0)
    k, h, n = _SIZES
    sizes = {
        chain.fc1: (k, h if chain.gated is None else 2 * h),
        chain.gate: (k, h),
        chain.fc2: (h, n),
    }
    names = dict.fromkeys(chain.parts)
    small = nn.Module()
    for i, path in enumerate(names):
        part, names[path] = module.get_submodule(path), f"part{i}"
        if path in sizes:
            made: Any = skip_init(nn.Linear, *sizes[path], bias=part.bias is not None)
        else:
            made = rehearsal.twin(part)
            made._parameters = {
                name: None if p is None else nn.Parameter(torch.empty(k), False)
                for name, p in part._parameters.items()
            }
            if hasattr(made, "normalized_shape"):
                made.normalized_shape = (k,)
        small.add_module(f"part{i}", made)
    for parameter in small.parameters():
        scale = parameter[0].numel() ** -0.5
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
        parameter.data = parameter.data.to(dtype)
    fields = ("fc1", "act", "fc2", "gate", "out", "norm")
    paths: dict[str, Any] = {field: names.get(getattr(chain, field)) for field in fields}
    renamed = dataclasses.replace(chain, **paths)
    x = torch.randn(_ROWS, k, generator=draw).to(dtype)
    ours: Tensor = projectors.projected(small, renamed, x)
    theirs = projectors.by_parts(small, renamed, x)
    exact = projectors.by_parts(small.double(), renamed, x.double())
    if ours.shape != exact.shape or ours.dtype != dtype:
        return (
            f"the numeric check failed: expected {list(exact.shape)} of {dtype}, got "
            f"{list(ours.shape)} of {ours.dtype}"
        )
    rounding = torch.finfo(dtype).eps * float(exact.abs().max())
    error = float((ours.double() - exact).abs().max())
    if not error <= 2 * float((theirs.double() - exact).abs().max()) + rounding:
        return f"the numeric check failed: results in {dtype} are off by {error:.3g}"
    return None


SITE = Site("mlp_projector", find, adapt, check)
