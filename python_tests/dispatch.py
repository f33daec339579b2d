"""Counts the operators that run, under their registered names, and keeps the calls of ours."""

from collections import Counter

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
