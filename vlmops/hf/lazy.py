"""Stand-ins for tensors that nobody has computed, and for modules in whose forward they are met.

A forward runs as it is. What it does with stand-ins is followed as far as that is known; anything
else is done with the tensors that they stand for, by the model's own functions. So nothing of a
forward is copied, and a new line in it costs time, not numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

Compute = Callable[[], Any]
"""The model's own step, on the tensors that stand-ins stand for."""


class Lazy:
    """Stands for a tensor that nobody has computed."""

    followed: ClassVar[Mapping[Any, Callable[..., Any]]] = {}
    """Function of torch's -> ``follow(compute, *args, **kwargs)`` with the function's arguments.

    It returns None where the call is none that can be followed.
    """

    def value(self) -> Tensor:
        """The tensor, by the model's own steps."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        function = getattr(Tensor, name, None)
        if function in self.followed:
            return functools.partial(self._call, function)
        return getattr(self.value(), name)

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__torch_function__(function, (), (self, *args), kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def compute() -> Any:
            return func(*computed(args), **computed(kwargs))

        follow = cls.followed.get(func)
        made = None if follow is None else follow(compute, *args, **kwargs)
        return compute() if made is None else made


def _operator(name: str) -> Callable[..., Any]:
    function = getattr(Tensor, name)

    def operator(self: Lazy, *args: Any) -> Any:
        return self._call(function, *args)

    return operator


# Python looks for these on the class alone.
for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"),
    *("radd", "rsub", "rmul", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul"),
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "iand", "ior", "ixor"),
    *("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge"),
    *("getitem", "setitem", "len", "iter", "contains", "bool", "int", "float", "index", "array"),
):
    setattr(Lazy, f"__{_name}__", _operator(f"__{_name}__"))


def computed(given: Any) -> Any:
    """The tensors that stand-ins stand for, in tuples, lists and dicts too; the rest as it is."""
    if isinstance(given, Lazy):
        return given.value()
    if type(given) in (tuple, list):
        return type(given)(computed(x) for x in given)
    if type(given) is dict:
        return {name: computed(x) for name, x in given.items()}
    return given


class StandIn:
    """In a module's forward: the module, with something else for some of its attributes."""

    def __init__(self, module: Any, instead: Mapping[str, Any]) -> None:
        self.__dict__.update(_module=module, _instead=instead)

    def __getattr__(self, name: str) -> Any:
        found = self._instead.get(name)
        return getattr(self._module, name) if found is None else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, computed(value))
