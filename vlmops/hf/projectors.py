"""Modules that project features of images into the space of text, and what they are made of.

A module's forward runs once on random features with stand-ins for its linear layers, and what each
of its parts is given and returns is written down. Where a norm, a linear layer, an activation, a
gate and another linear layer hand on each other's results untouched, they are a chain, and the op
can do their work; the gate is a layer, or half of what the first one returns. Whatever else the
forward does (it merges tokens, cuts up images, takes further arguments) stays its own: patched, it
runs on a shadow of the module, in which the last layer of a chain does the work of all and the
others return what they are given.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmops.hf import plain, rehearsal
from vlmops.hf.norms import rms_norm
from vlmops.hf.rebind import changed, original_class, subclass
from vlmops.ops.linear import Activation, activated
from vlmops.ops.mlp_projector import Norm, mlp_projector

_TOLERANCE = 1e-4  # of values around 1, in float32; agreement is about 1e-6
_ACTIVATIONS: tuple[Activation, ...] = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")
_SIDE = 12  # of a picture in tokens: 2, 3 and 4 divide it
_TOKENS = 48  # of what is no picture: 4 and 16 divide it
_LINEARS = range(2, 5)  # how many linear layers a projector has
LISTS = (nn.Sequential, nn.ModuleList)
"""What holds layers, among others."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """Parts of a module, by path, that the op does the work of; see `vlmops.mlp_projector`."""

    fc1: str
    act: str
    activation: Activation
    fc2: str
    gate: str | None = None
    """Whose result is activated, and multiplies fc1's."""
    gated: Literal[0, 1] | None = None
    """The half of fc1's result that is activated, and multiplies the other one."""
    out: str | None = None
    """What activates the result; ``act`` once more, or another part."""
    out_activation: Activation | None = None
    norm: str | None = None
    kind: Norm | None = None
    eps: float = 1e-5
    offset: float = 0.0

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the linear layers."""
        return tuple(path for path in (self.fc1, self.gate, self.fc2) if path is not None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of all."""
        others = (self.norm, self.act, self.out)
        return (*self.linears, *(path for path in others if path is not None))


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a module's forward does."""

    chains: tuple[Chain, ...]
    names: tuple[str, ...]
    """The attributes that the forward looks up."""
    parts: tuple[tuple[str, type[nn.Module], tuple[Any, ...]], ...]
    """Whatever must be as it was, and watched by nobody, for the op to run; class and options."""
    probabilities: tuple[str, ...] = ()
    """Attributes that say how much is dropped in training."""

    @property
    def note(self) -> str:
        """For the report."""
        ends = [n for c in self.chains for n in (c.norm, *c.linears, c.out) if n is not None]
        return "with " + ", ".join(ends)


class _UnlikeError(Exception):
    """Why a module is left as it is, in words that follow a colon."""


# Where projectors are.


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that may be projectors, by path, outer ones first.

    They hold two to four linear layers, an activation, perhaps norms, and nothing else that has
    parameters. They are no part of a layer: no element of a list that they hang in holds anything
    besides, and they do not stand in a block of one width throughout, as a tower's pooling head
    does. And they do not end in scores for the rows of a table, as heads do.
    """
    tables = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    for path, module in model.named_modules():
        linears = _linears(module)
        if (
            path
            and linears is not None
            and type(module).forward is not nn.Module.forward
            and not _in_a_layer(model, path)
            and not _in_a_block(model.get_submodule(path.rpartition(".")[0]), module, linears)
            and not _is_head(linears, tables)
        ):
            yield path, module


def _linears(module: nn.Module) -> list[Any] | None:
    """The linear layers of a module that may be a projector."""
    found, activations = [], False
    waiting = [module]
    while waiting:
        part = waiting.pop(0)
        if rehearsal.is_linear(part):
            found.append(part)
            if len(found) > _LINEARS[-1] or part is module:
                return None
            continue
        if any(p is not None and p.dim() != 1 for p in part._parameters.values()):
            return None
        children = list(part.children())
        if children and part._parameters:
            return None
        waiting = [*children, *waiting]
        silent = isinstance(part, nn.Dropout | nn.Identity | nn.ModuleList)
        activations |= not children and not part._parameters and not silent
    return found if activations and len(found) in _LINEARS else None


def _in_a_layer(model: nn.Module, path: str) -> bool:
    names = path.split(".")
    count = _count(model.get_submodule(path))
    for depth in range(1, len(names) - 1):
        outer = model.get_submodule(".".join(names[:depth]))
        if isinstance(outer, LISTS) and _count(outer.get_submodule(names[depth])) > count:
            return True
    return False


def _count(module: nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def _in_a_block(parent: nn.Module, module: nn.Module, linears: list[Any]) -> bool:
    width = linears[0].in_features
    if linears[-1].out_features != width or isinstance(parent, LISTS):
        return False
    own = set(module.parameters())
    others = [p for p in parent.parameters() if p.dim() > 1 and p not in own]
    return bool(others) and all(p.shape[-1] == width for p in others)


def _is_head(linears: list[Any], tables: set[int]) -> bool:
    last = linears[-1]
    return last.out_features in tables and last.out_features > 2 * last.in_features


# What they do.

_studied: dict[Hashable, Layout | str] = {}


def study(module: Any) -> Layout | str:
    """What a module from `candidates` does, or why it is not patched; once per class and shapes."""
    reason = changed(module)
    if reason is not None:
        return reason
    described = {n: v for n, v in vars(module).items() if isinstance(v, int | float | str | tuple)}
    described.pop("training", None)
    key = (
        type(module), type(module).forward, repr(described), repr(module),
        tuple((name, tuple(p.shape)) for name, p in module.named_parameters()),
    )  # fmt: skip
    if key not in _studied:
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                _studied[key] = _proved(module)
        except (_UnlikeError, rehearsal.ImpossibleError) as reason:
            _studied[key] = str(reason)
        except Exception as error:  # foreign code, asked with what it was not written for
            _studied[key] = f"its forward raised {error!r}"
    layout = _studied[key]
    return layout if isinstance(layout, str) else _unfit(module, layout) or layout


def _unfit(module: nn.Module, layout: Layout) -> str | None:
    """What about a module's parts forbids to do their work elsewhere."""
    linears = {path for chain in layout.chains for path in chain.linears}
    for path, *_ in layout.parts:
        part = module.get_submodule(path)
        if path in linears:
            if original_class(part) is not nn.Linear:
                reason = plain.refusal(part, nn.Linear)
                if reason is not None:
                    return f"{path}: {reason}"
            continue
        if plain.watched(part):
            return f"hooks are registered on {path}; remove them, then patch"
        if "forward" in vars(part):
            return f"{path}.forward was replaced on the instance; undo that, then patch"
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """Of a part, in the one forward."""

    path: str
    given: Tensor
    returned: Tensor


def _proved(module: Any) -> Layout:
    """The layout by which a shadow of the module does what the module does."""
    twin = rehearsal.twin(module, stand_in=rehearsal.Sparse)
    forward: Any = type(module).forward
    inputs, calls = _traced(twin, forward)
    chains = tuple(_chains(twin, calls))
    if not chains:
        raise _UnlikeError(_why_not(twin, calls))
    inside = {path for chain in chains for path in chain.parts}
    inside |= {n for n, m in twin.named_modules() if isinstance(m, nn.Dropout)}
    inside |= {name for path in inside for name in _around(path)}
    linears = {path for chain in chains for path in chain.linears}
    found = ((n, module.get_submodule(n)) for n in sorted(inside))
    parts = tuple((n, nn.Linear if n in linears else type(m), _options(m)) for n, m in found)
    names = tuple(n for n in sorted(_looked_up(inspect.unwrap(forward))) if hasattr(module, n))
    layout = Layout(chains, names, parts)
    for given in inputs:
        expected, untouched = forward(twin, *given), given[0].clone()
        ran: list[Chain] = []

        def explained(m: Any, chain: Chain, x: Tensor, ran: list[Chain] = ran) -> Tensor:
            ran.append(chain)
            return _explained(m, chain, x)

        _compare(forward(shadow(twin, layout, explained), *given), expected)
        if not torch.equal(given[0], untouched):  # what a layer made was, and is not made here
            raise _UnlikeError("it writes to what its layers return")
        if set(ran) != set(chains):
            raise _UnlikeError("its forward calls its parts by way of something else")
    return dataclasses.replace(layout, probabilities=_dropping(twin, forward, layout, inputs[0]))


def _compare(got: Any, expected: Any) -> None:
    if not isinstance(got, Tensor) or got.shape != expected.shape or got.dtype != expected.dtype:
        raise _UnlikeError("something happens between its linear layers")
    error = float((got - expected).abs().max())
    if not error <= _TOLERANCE * max(1.0, float(expected.abs().max())):
        raise _UnlikeError(f"its results differ by {error:.3g}")


def _around(path: str) -> Iterator[str]:
    """The paths of what holds a part, but for the module itself."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path


def _looked_up(forward: Any) -> set[str]:
    """Every name in the code of a function."""
    found, waiting = set(), [forward.__code__]
    while waiting:
        code = waiting.pop()
        found |= set(code.co_names)
        waiting += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return found


def _traced(twin: Any, forward: Any) -> tuple[list[tuple[Any, ...]], list[_Call]]:
    """Arguments that the forward takes, and the calls of its parts with the first of them."""
    first: list[_Call] = []
    inputs: list[tuple[Any, ...]] = []
    failed = ""
    for given in _arguments(twin, forward):
        if len(inputs) == 2 or (inputs and given[0].shape[-1] != inputs[0][0].shape[-1]):
            break
        calls: list[_Call] = []
        hooks = [
            part.register_forward_hook(functools.partial(_note, calls, path))
            for path, part in twin.named_modules()
            if path and not any(part.children())
        ]
        try:
            result = forward(twin, *given)
        except Exception as error:  # foreign code, asked with what it was not written for
            failed = failed or f"its forward raised {error!r}"
            continue
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(result, Tensor):
            raise _UnlikeError(f"it returns a {type(result).__name__}, not a tensor")
        first = first or calls
        inputs.append(given)
    if not inputs:
        raise _UnlikeError(failed)
    return inputs, first


def _note(calls: list[_Call], path: str, _: Any, given: Any, returned: Any) -> None:
    if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(returned, Tensor):
        calls.append(_Call(path, given[0], returned))


def _arguments(twin: Any, forward: Any) -> Iterator[tuple[Any, ...]]:
    """Features of every width that the module may take, as rows, in batches and as pictures."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [
        p.name
        for p in list(inspect.signature(forward).parameters.values())[1:]
        if p.default is p.empty and p.kind not in variadic
    ]
    sides = [(_SIDE, _SIDE), (_SIDE, 2 * _SIDE)]
    sizes = (getattr(part, "patch_size", None) for part in twin.modules())
    patch = next((size for size in sizes if isinstance(size, int)), 1)
    known = {
        "image_sizes": torch.tensor(sides) * patch,
        "image_grid_thw": torch.tensor([(1, *side) for side in sides]),
    }
    unknown = [name for name in wanted[1:] if name not in known]
    if not wanted:
        raise _UnlikeError("its forward takes no features")
    if unknown:
        raise _UnlikeError(f"its forward wants {', '.join(unknown)}, which vlmops does not know")
    more = [known[name] for name in wanted[1:]]
    shapes: list[tuple[int, ...]] = [(sum(h * w for h, w in sides),)]
    if not more:
        shapes = [(_TOKENS,), (1, _TOKENS), (1, _SIDE * _SIDE), (1, _SIDE, _SIDE)]
    widths = [len(p) for p in twin.parameters() if p.dim() == 1]
    widths += [m.in_features for m in twin.modules() if isinstance(m, rehearsal.Sparse)]
    merged = [w // n for n in (1, 4, 9, 16) for w in widths if w % n == 0]
    for width in dict.fromkeys(merged):
        for shape in shapes:
            draw = torch.Generator().manual_seed(width)
            yield torch.randn(*shape, width, generator=draw), *more


def _chains(twin: Any, calls: list[_Call]) -> Iterator[Chain]:
    """Every run of parts that hand on their results untouched, once."""
    calls = [
        c for c in calls if not isinstance(twin.get_submodule(c.path), nn.Dropout | nn.Identity)
    ]
    linears = [c for c in calls if isinstance(twin.get_submodule(c.path), rehearsal.Sparse)]
    kinds = {c.path: _activation(twin.get_submodule(c.path)) for c in calls if c not in linears}
    taken: set[str] = set()
    for call in linears:
        halves = call.returned.chunk(2, -1)
        parts = (call.returned, *halves)
        act = _only(c for c in calls if any(_same(c.given, part) for part in parts))
        if call.path in taken or act is None or kinds.get(act.path) is None:
            continue
        fc1, gate = call, None
        gated: Literal[0, 1] | None = None
        fc2 = _only(c for c in calls if _same(c.given, act.returned))
        if not _same(act.given, call.returned):  # it multiplies the other half
            gated = 0 if _same(act.given, halves[0]) else 1
            fc2 = _only(c for c in linears if _is_product(c.given, act.returned, halves[1 - gated]))
        elif fc2 is None:  # a gate: what is activated multiplies the result of another layer
            others = [c for c in linears if c is not call and _same(c.given, call.given)]
            for fc1, fc2 in itertools.product(others, linears):
                if _is_product(fc2.given, act.returned, fc1.returned):
                    gate = call
                    break
            else:
                continue
        if fc2 not in linears:
            continue
        out = _only(c for c in calls if _same(c.given, fc2.returned))
        if out is not None and kinds.get(out.path) is None:
            out = None
        chain = Chain(
            fc1.path,
            act.path,
            kinds[act.path],  # type: ignore[arg-type]
            fc2.path,
            gate.path if gate else None,
            gated,
            out.path if out else None,
            kinds[out.path] if out else None,
            **_norm_before(twin, calls, call, 1 if gate is None else 2),
        )
        taken |= set(chain.linears)
        yield chain


def _why_not(twin: Any, calls: list[_Call]) -> str:
    """Why there is no chain."""
    made = [c.returned for c in calls if isinstance(twin.get_submodule(c.path), rehearsal.Sparse)]
    for call in calls:
        part = twin.get_submodule(call.path)
        known = isinstance(part, rehearsal.Sparse | nn.Dropout | nn.Identity) or _activation(part)
        if not known and not part._parameters and any(_same(call.given, out) for out in made):
            return f"{type(part).__name__} is no activation that vlmops.mlp_projector knows"
    return "more than an activation or a gate lies between its linear layers"


def _only(found: Iterator[_Call]) -> _Call | None:
    """The one call, if there is no other."""
    calls = list(found)
    return calls[0] if len(calls) == 1 else None


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one."""
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _is_product(x: Tensor, a: Tensor, b: Tensor) -> bool:
    return x.shape == a.shape == b.shape and torch.allclose(x, a * b, rtol=1e-5, atol=1e-6)


def _norm_before(twin: Any, calls: list[_Call], first: _Call, readers: int) -> dict[str, Any]:
    """The norm whose result a chain, and nobody else, is given, as the options of a `Chain`."""
    made = [c for c in calls if _same(c.returned, first.given)]
    read = [c for c in calls if _same(c.given, first.given)]
    if len(made) != 1 or len(read) != readers:
        return {}
    norm = twin.get_submodule(made[0].path)
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1:
        return {"norm": made[0].path, "kind": "layer", "eps": norm.eps}
    found = rms_norm(norm)
    if found is None:
        return {}
    return {"norm": made[0].path, "kind": "rms", "eps": found[0], "offset": found[1]}


def _activation(module: nn.Module) -> Activation | None:
    """Which activation of the op's a module is."""
    if any(True for _ in module.parameters()):
        return None
    x = torch.linspace(-8, 8, 257)
    try:
        got = module(x)
    except Exception:  # foreign code that wants something else is no activation
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    found = (n for n in _ACTIVATIONS if torch.allclose(got, activated(x, n), rtol=0, atol=1e-5))
    return next(found, None)


def _dropping(twin: Any, forward: Any, layout: Layout, given: tuple[Any, ...]) -> tuple[str, ...]:
    """The attributes that are probabilities by which the forward itself drops in training."""
    if "training" not in layout.names:
        return ()
    found = []
    for name in layout.names:
        value = getattr(twin, name)
        if not isinstance(value, float | int) or isinstance(value, bool) or not 0 <= value < 1:
            continue
        setattr(twin, name, 0.5)
        twin.training = False
        evaluated = forward(twin, *given)
        twin.training = True
        if not torch.equal(forward(twin, *given), evaluated):
            found.append(name)
        setattr(twin, name, 0.0 if name in found else value)
    twin.training = True
    trained = forward(twin, *given)
    twin.training = False
    if not torch.equal(trained, forward(twin, *given)):
        raise _UnlikeError("it does something else in training")
    return tuple(found)


# What is done instead.


class _Shadow:
    """What a forward takes for its module."""


class _Role:
    """Stands for a part in a shadow, with what a forward may ask of a layer."""

    def __init__(self, part: Any, work: Callable[[Any], Any]) -> None:
        self._work = work
        for name in ("weight", "bias", "in_features", "out_features"):
            if hasattr(part, name):
                setattr(self, name, getattr(part, name))

    def __call__(self, x: Any) -> Any:
        return self._work(x)


class _Series:
    """An `nn.Sequential` of parts, some of them replaced."""

    def __init__(self, parts: list[Any]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts)

    def __call__(self, x: Any) -> Any:
        for part in self._parts:
            x = part(x)
        return x


Project = Callable[[Any, Chain, Any], Any]


def shadow(module: Any, layout: Layout, project: Project) -> Any:
    """What a module's forward can run on, with the work of chains left to a function.

    Args:
        module: A module of this layout.
        layout: From `study`.
        project: Takes the module, a chain, and what the chain is given.
    """
    roles: dict[str, Any] = {}
    for chain in layout.chains:
        for path in chain.parts:
            roles[path] = _return
        if chain.gate is not None:
            roles[chain.fc1] = _factor
        if chain.gated is not None:
            roles[chain.fc1] = _Halves
        roles[chain.fc2] = functools.partial(project, module, chain)
    if isinstance(module, nn.Sequential):
        return _Series([_shadowed(part, name, roles) for name, part in module._modules.items()])
    made: Any = _Shadow()
    for name in layout.names:
        setattr(made, name, _shadowed(getattr(module, name), name, roles))
    return made


def _shadowed(part: Any, path: str, roles: dict[str, Any]) -> Any:
    if path in roles:
        return _Role(part, roles[path])
    if not isinstance(part, LISTS) or not any(p.startswith(f"{path}.") for p in roles):
        return part
    parts = [_shadowed(child, f"{path}.{name}", roles) for name, child in part._modules.items()]
    return _Series(parts) if isinstance(part, nn.Sequential) else parts


def _return(x: Tensor) -> Tensor:
    return x


def _factor(_: Tensor) -> Literal[1]:
    """What stands for the layer that a gate multiplies."""
    return 1


class _Halves:
    """What stands for the result of a layer whose halves multiply each other."""

    def __init__(self, x: Any) -> None:
        self._x = x

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Any, Any]:
        """What the layer was given, and a factor of 1: which is activated makes no difference."""
        if chunks != 2 or dim not in (-1, self._x.dim() - 1):
            raise ValueError("its features are not cut in two")
        return self._x, 1


def patched_class(module: Any, layout: Layout) -> type[nn.Module]:
    """The class of a module that leaves its chains to the op."""
    original: Any = type(module)

    def make_forward(_: str) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen = shadow(self, layout, _projected) if _undisturbed(self, layout) else self
            return original.forward(seen, *args, **kwargs)

        forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
        return forward

    linears = tuple(path for chain in layout.chains for path in chain.linears)
    made = subclass(original, ("mlp_projector", layout, original.forward), make_forward, linears)
    _classes.add(made)
    return made


_classes: set[type[nn.Module]] = set()


def is_patched(module: nn.Module) -> bool:
    """Whether a module leaves its chains to the op."""
    # Another op may have made a class of its own of ours since.
    return any(kind in _classes for kind in type(module).__mro__)


def _undisturbed(module: Any, layout: Layout) -> bool:
    """Whether the parts of a module are what they were, and nobody watches them."""
    for path, kind, options in layout.parts:
        part = _part(module, path)
        if part is None or not plain.bypassable(part, kind) or _options(part) != options:
            return False
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            return False
    return not module.training or all(getattr(module, name) == 0 for name in layout.probabilities)


def _options(part: Any) -> tuple[Any, ...]:
    """What else than its class says what a part does."""
    return tuple(getattr(part, name, None) for name in ("approximate", "eps", "variance_epsilon"))


def _part(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = module._modules.get(name)
        if module is None:
            return None
    return module


def _projected(module: Any, chain: Chain, x: Any) -> Any:
    """The op's result, or that of the parts where these have to run."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return by_parts(module, chain, x)
    of_products = [t for path in chain.linears for t in plain.tensors(_part(module, path))]
    of_norm = [] if chain.norm is None else plain.tensors(_part(module, chain.norm))
    if (
        not plain.runs("mlp_projector", [x, *of_products, *of_norm])
        or torch.is_autocast_enabled(x.device.type)  # a norm is not cast as products are
        or any(t.dtype != x.dtype for t in of_products)
        or x.shape[-1] != of_products[0].shape[1]
    ):
        return by_parts(module, chain, x)
    return projected(module, chain, x)


def projected(module: Any, chain: Chain, x: Tensor) -> Tensor:
    """The op with the weights of a chain."""
    fc2 = _part(module, chain.fc2)
    (fc1_weight, fc1_bias), (gate_weight, gate_bias) = in_front(module, chain)
    norm = None if chain.norm is None else _part(module, chain.norm)
    return mlp_projector(
        x,
        fc1_weight,
        fc1_bias,
        fc2.weight,
        fc2.bias,
        activation=chain.activation,
        out_activation=chain.out_activation,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        norm=chain.kind,
        norm_weight=None if norm is None else norm.weight,
        norm_bias=None if norm is None else getattr(norm, "bias", None),
        norm_eps=chain.eps,
        norm_offset=chain.offset,
    )


def in_front(module: Any, chain: Chain) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Weight and bias of fc1 and those of its gate, which may be rows of one layer's."""
    fc1 = _part(module, chain.fc1)
    if chain.gated is not None:
        rows = ((None, None) if t is None else t.chunk(2) for t in (fc1.weight, fc1.bias))
        halves = tuple(zip(*rows, strict=True))
        return halves[1 - chain.gated], halves[chain.gated]
    gate = None if chain.gate is None else _part(module, chain.gate)
    return (fc1.weight, fc1.bias), (None, None) if gate is None else (gate.weight, gate.bias)


def _hidden(module: Any, chain: Chain, z: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """What fc2 is given, by the layers in front of it."""
    hidden: Tensor = _part(module, chain.fc1)(z)
    if chain.gated is not None:
        halves = hidden.chunk(2, -1)
        return activation(halves[chain.gated]) * halves[1 - chain.gated]
    if chain.gate is not None:
        return activation(_part(module, chain.gate)(z)) * hidden
    return activation(hidden)


def by_parts(module: Any, chain: Chain, x: Any) -> Any:
    """What the parts of a chain return."""
    z = x if chain.norm is None else _part(module, chain.norm)(x)
    out = _part(module, chain.fc2)(_hidden(module, chain, z, _part(module, chain.act)))
    return out if chain.out is None else _part(module, chain.out)(out)


def _explained(module: Any, chain: Chain, x: Tensor) -> Tensor:
    """What the op would return, by its definition and a twin's stand-ins."""
    z = x
    if chain.norm is not None:
        norm = _part(module, chain.norm)
        if chain.kind == "layer":
            z = functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, chain.eps)
        else:
            z = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + chain.eps)
            z = z * (chain.offset + norm.weight)
    hidden = _hidden(module, chain, z, lambda y: activated(y, chain.activation))
    return activated(_part(module, chain.fc2)(hidden), chain.out_activation)
