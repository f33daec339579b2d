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

    def __getitem__(self, index: Any) -> Any:
        return self.value()[index]

    def __add__(self, other: Any) -> Any:
        return self._call(Tensor.__add__, other)

    def __sub__(self, other: Any) -> Any:
        return self._call(Tensor.__sub__, other)

    def __mul__(self, other: Any) -> Any:
        return self._call(Tensor.__mul__, other)

    def __truediv__(self, other: Any) -> Any:
        return self._call(Tensor.__truediv__, other)

    def __matmul__(self, other: Any) -> Any:
        return self._call(Tensor.__matmul__, other)

    def __eq__(self, other: object) -> Any:
        return self.value() == other

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def compute() -> Any:
            return func(*plain(args), **plain(kwargs))

        follow = cls.followed.get(func)
        made = None if follow is None else follow(compute, *args, **kwargs)
        return compute() if made is None else made


def plain(given: Any) -> Any:
    """The tensors that stand-ins stand for, in tuples, lists and dicts too; the rest as it is."""
    if isinstance(given, Lazy):
        return given.value()
    if type(given) in (tuple, list):
        return type(given)(plain(x) for x in given)
    if type(given) is dict:
        return {name: plain(x) for name, x in given.items()}
    return given


class StandIn:
    """In a module's forward: the module, with something else for some of its attributes."""

    def __init__(self, module: Any, instead: Mapping[str, Any]) -> None:
        self.__dict__.update(_module=module, _instead=instead)

    def __getattr__(self, name: str) -> Any:
        found = self._instead.get(name)
        return getattr(self._module, name) if found is None else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, plain(value))
