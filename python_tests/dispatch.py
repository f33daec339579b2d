"""Counts the operators that run, under their registered names, and keeps the calls of ours."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        if func.namespace == "vlmops":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class Shapes(CountOps):
    """Also keeps the shapes of all that is made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.append(tuple(tensor.shape))
        return out

    def squares(self, tokens):
        return [shape for shape in self.shapes if shape[-2:] == (tokens, tokens)]
