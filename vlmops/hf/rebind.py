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
import inspect
import sys
import types
from collections.abc import Callable, Hashable
from typing import Any

from torch import nn

_DECORATORS = {"torch.utils._contextlib", "transformers.modeling_rope_utils"}
_ORIGINAL = "_vlmops_original_class"
_ABSORBS = "_vlmops_absorbs"
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
        key: Whatever the new forward depends on, `references` of the old one included.
        make_forward: Called once with a label, unique to the subclass, and returns the forward.
        absorbs: Paths of the modules below whose work the new forward does itself.
        method: The method that is replaced, if it is not ``forward``.
        more: Further attributes of the subclass.
    """
    cached = _subclasses.get((original, key))
    if cached is None:
        made: dict[str, Any] = {method: make_forward(str(len(_subclasses)))}
        made[_ABSORBS] = (*vars(original).get(_ABSORBS, ()), *absorbs)
        cached = _subclasses[original, key] = derived(original, **made, **more)
    return cached


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


def changed(module: nn.Module, method: str = "forward") -> str | None:
    """What somebody did to a method of a module that patching would undo."""
    name = type(module).__name__
    if was_patched(module) and not original_class(module):
        return f"{name}'s class was replaced after vlmops patched it; undo that, then patch"
    if method in replaced(module):
        return f"some of its {name} modules are patched and others are not"
    if method in vars(module):
        who = owner(vars(module)[method])
        return f"{name}.{method} was replaced on the instance by {who}; undo that, then patch"
    function: Any = getattr(type(module), method)
    while (
        getattr(function, "__wrapped__", None) and function.__globals__["__name__"] in _DECORATORS
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
