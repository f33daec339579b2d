"""The mechanism of patching: modules change class, functions are rebuilt over other globals.

A Hugging Face ``forward`` calls helpers through its module's globals. To replace one helper for one
model, the function is rebuilt over a synthetic module (Dynamo looks globals up in ``sys.modules``;
a plain dict crashes it) and made the ``forward`` of a subclass; the module's ``__class__`` becomes
that subclass. No forward is copied, parameters, buffers, hooks and state_dict stay as they are, and
another model of the same class sees nothing.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

_DECORATORS = {"torch.utils._contextlib", "transformers.modeling_rope_utils"}
_ORIGINAL = "_vlmops_original_class"
_ABSORBS = "_vlmops_absorbs"
OPS = "_vlmops_ops"
"""Attribute of our classes: the ops for which they were made."""
_REPLACES = "_vlmops_replaces"
_subclasses: dict[tuple[type, Hashable], type] = {}


def rebind(function: types.FunctionType, label: str, **globals_: Any) -> types.FunctionType:
    """The same code, with some of the global names it looks up replaced.

    Args:
        function: A plain Python function.
        label: Tells apart rebuilds of one function with different globals.
        globals_: The replaced names.
    """
    name = f"vlmops._rebound.{function.__module__}.{function.__qualname__}.{label}"
    module = sys.modules[name] = types.ModuleType(name)
    module.__dict__.update({**function.__globals__, **globals_, "__name__": name})
    rebuilt = types.FunctionType(
        function.__code__,
        module.__dict__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    rebuilt.__kwdefaults__ = function.__kwdefaults__
    rebuilt.__annotations__ = function.__annotations__
    return rebuilt


def references(function: types.FunctionType) -> Hashable:
    """The function and what its global names stand for now: equal while a rebuild stays valid."""
    names = function.__code__.co_names
    return function, tuple(id(function.__globals__.get(name)) for name in names)


def subclass(
    original: type[nn.Module],
    key: Hashable,
    make_forward: Callable[[str], Callable[..., Any]],
    absorbs: tuple[str, ...] = (),
    method: str = "forward",
    **more: Any,
) -> type[nn.Module]:
    """A subclass of the same name with another ``forward``; one per (original, key).

    Args:
        original: The class of the module to patch; one of ours if another op has been there.
        key: Whatever the new forward depends on, `references` of the old one included; the op
            first.
        make_forward: Called once with a label, unique to the subclass, and returns the forward.
        absorbs: Paths of the modules below whose work the new forward does itself.
        method: The method that is replaced, if it is not ``forward``.
        more: Further attributes of the subclass.
    """
    cached = _subclasses.get((original, key))
    if cached is None:
        made: dict[str, Any] = {method: make_forward(str(len(_subclasses)))}
        made[_ABSORBS] = (*vars(original).get(_ABSORBS, ()), *absorbs)
        made[OPS] = vars(original).get(OPS, frozenset()) | {_op_of(key)}
        cached = _subclasses[original, key] = derived(original, **made, **more)
    return cached


def _op_of(key: Hashable) -> Hashable:
    return key[0] if isinstance(key, tuple) else key


def ops_of(instance: Any) -> frozenset[Hashable]:
    """The ops for which a module's class was made; none if the class is not one of ours."""
    ops: frozenset[Hashable] = vars(type(instance)).get(OPS, frozenset())
    return ops


def wraps(inner: Any, wrap: Callable[[Any], Any]) -> Any:
    """A function that calls ``inner``, made by ``wrap``; `rebuild` finds its way through."""
    wrapper = wrap(inner)
    wrapper._vlmops_wraps = inner, wrap
    return wrapper


def rebuild(function: Any, label: str, **globals_: Any) -> Any:
    """`rebind` of the model's own function, inside whatever of ours or transformers' wraps it.

    Raises:
        TypeError: somebody wraps it in a way that cannot be made again.
    """
    inner, wrap = getattr(function, "_vlmops_wraps", (None, None))
    if wrap is not None:
        return wraps(rebuild(inner, label, **globals_), wrap)
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        if not inspect.isfunction(function):
            raise TypeError(f"{function!r} is no Python function")
        return rebind(function, label, **globals_)
    made = rebuild(inner, label, **globals_)
    cells = function.__closure__ or ()
    held = [cell for cell in cells if cell.cell_contents is inner]
    if len(held) != 1 or not function.__globals__["__name__"].startswith("transformers."):
        raise TypeError(f"it is wrapped by {owner(function)}")
    wrapper = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        tuple(types.CellType(made) if cell is held[0] else cell for cell in cells),
    )
    wrapper.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(wrapper, made)


def innermost(function: Any) -> Any:
    """The model's own function, inside whatever wraps it."""
    inner, _ = getattr(function, "_vlmops_wraps", (getattr(function, "__wrapped__", None), None))
    return function if inner is None else innermost(inner)


def derived(original: type, **body: Any) -> type:
    """A subclass of the same name whose instances pickle as those of the original.

    Args:
        original: A class, or one of ours, which has its own.
        body: Methods and other attributes.
    """
    methods = [n for n, v in body.items() if inspect.isfunction(v) and not n.startswith("__")]
    common = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_to_original,
        "__copy__": _copy,
        "__deepcopy__": _deepcopy,
        _ORIGINAL: vars(original).get(_ORIGINAL, original),
        _ABSORBS: vars(original).get(_ABSORBS, ()),
        OPS: vars(original).get(OPS, frozenset()),
        _REPLACES: (*vars(original).get(_REPLACES, ()), *methods),
    }
    return type(original.__name__, (original,), common | body)


def original_class(instance: Any) -> Any:
    """The class that a patched object had, or None if the object's class is not one of ours."""
    return vars(type(instance)).get(_ORIGINAL)


def is_ours(cls: type) -> bool:
    """Whether a class is one from `derived`."""
    return _ORIGINAL in vars(cls)


def was_patched(instance: Any) -> bool:
    """Whether an object is patched, even if somebody put a class of their own on top since."""
    return hasattr(type(instance), _ORIGINAL)


def replaced(module: nn.Module) -> tuple[str, ...]:
    """Names of the methods that are ours."""
    names: tuple[str, ...] = vars(type(module)).get(_REPLACES, ())
    return names


def absorbed(model: nn.Module) -> set[nn.Module]:
    """The modules of a model whose work patched modules around them do."""
    found: set[nn.Module] = set()
    for module in model.modules():
        paths = vars(type(module)).get(_ABSORBS, ())
        found.update(child for path, child in module.named_modules() if path in paths)
    return found


def _reduce_to_original(self: Any, protocol: Any) -> Any:
    # What is pickled loads without vlmops, as an instance of the original class.
    original = getattr(type(self), _ORIGINAL)
    return copyreg._reconstructor, (original, object, None), self.__dict__  # type: ignore[attr-defined]


def _copy(self: Any) -> Any:
    # A copy of what is patched is patched.
    twin = object.__new__(type(self))
    twin.__dict__.update(self.__dict__)
    return twin


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    twin = memo[id(self)] = object.__new__(type(self))
    twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return twin


def changed(
    module: nn.Module,
    method: str = "forward",
    beside: frozenset[Hashable] = frozenset(),
    decorated: bool = False,
) -> str | None:
    """What somebody did to a method of a module that patching would undo.

    Args:
        module: A module of a model.
        method: The method that is to be replaced.
        beside: Ops whose own replacements of it are kept.
        decorated: Whether decorators of transformers are kept, whichever they are.
    """
    name = type(module).__name__
    if was_patched(module) and not original_class(module):
        return f"{name}'s class was replaced after vlmops patched it; undo that, then patch"
    ours = ops_of(module)
    if method in replaced(module) and not (ours and ours <= beside):
        return f"some of its {name} modules are patched and others are not"
    if method in vars(module):
        who = owner(vars(module)[method])
        return f"{name}.{method} was replaced on the instance by {who}; undo that, then patch"
    function: Any = getattr(type(module), method)
    while hasattr(function, "_vlmops_wraps"):
        function, _ = function._vlmops_wraps
    while getattr(function, "__wrapped__", None) and (
        function.__globals__["__name__"] in _DECORATORS
        or (decorated and function.__globals__["__name__"].startswith("transformers."))
    ):
        function = function.__wrapped__
    if not inspect.isfunction(function) or function.__globals__["__name__"] != function.__module__:
        return f"{name}.{method} was wrapped by {owner(function)}; undo that, then patch"
    return None


def owner(function: Any) -> str:
    """Where the code of a function stands, whatever functools.wraps copied onto it."""
    function = getattr(function, "__func__", getattr(function, "func", function))
    code = getattr(function, "__code__", None)
    if code is None:
        return f"{type(function).__module__}.{type(function).__qualname__}"
    return f"{function.__globals__['__name__']}.{getattr(code, 'co_qualname', code.co_name)}"
