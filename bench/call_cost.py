"""What one call of an op costs around its kernel, by the way autograd is registered.

    python bench/call_cost.py

Decodes one token of Qwen2-VL-7B (28 + 4 heads of 128, float32), where the kernel itself is about
2 us. The library is loaded without vlmops' Python, so that every variant starts from the bare op;
the numbers behind the choice in vlmops/ops/mrope.py are in CONTRIBUTING.md. Bind threads
(OMP_PROC_BIND=true OMP_PLACES=cores) and stop other programs.
"""

import argparse
import importlib.util
import statistics
import time
from pathlib import Path

import torch


def load_bare_library():
    """Registers the C++ ops alone; vlmops/__init__.py would add fake and autograd."""
    package = importlib.util.find_spec("vlmops")
    roots = [Path(p) for p in (package and package.submodule_search_locations) or ()]
    torch.ops.load_library(str(next(p for r in roots for p in r.glob("libvlmops.so"))))


def microseconds(function, samples, calls=400):
    """Median over samples of the mean time of a call."""
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times)


def eager(q, k, cos, sin):
    """Hugging Face's apply_rotary_pos_emb, with cosine and sine given."""

    def rotate_half(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[2:5])
    ctx.options = inputs[5:8]  # torch.library adds the norms of q and k, which are none
    ctx.others = len(inputs) - 2


def ways(op, adjoint):
    """`autograd.Function`s around the bare op without and with setup_context, and backward."""

    def rotate_back(ctx, grad_q, grad_k):
        grads = adjoint(grad_q, grad_k, *ctx.saved_tensors, *ctx.options)
        return *grads, *[None] * ctx.others

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, *rest):
            setup_context(ctx, (q, k, *rest), None)
            return op(q, k, *rest)

        backward = staticmethod(rotate_back)

    class FunctionWithSetup(torch.autograd.Function):
        @staticmethod
        def forward(*args):
            return op(*args)

        setup_context = staticmethod(setup_context)
        backward = staticmethod(rotate_back)

    return Function.apply, FunctionWithSetup.apply, rotate_back


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=15, help="of 400 calls each (default: 15)")
    samples = parser.parse_args().samples
    load_bare_library()
    op, op_, adjoint = (
        getattr(torch.ops.vlmops, name).default for name in ("mrope", "mrope_", "mrope_backward")
    )
    q = torch.randn(1, 1, 28, 128).transpose(1, 2)
    k = torch.randn(1, 1, 4, 128).transpose(1, 2)
    section = torch.tensor([0] * 16 + [1] * 24 + [2] * 24, dtype=torch.int32)
    inv_freq = 1e6 ** -(torch.arange(64) / 64)
    rest = torch.randint(5000, (3, 1, 1)), inv_freq, section, "half", 1.0, 1
    leaves = q.clone().requires_grad_(), k.clone().requires_grad_()
    upstream = torch.randn_like(q), torch.randn_like(k)
    function, function_with_setup, backward = ways(op, adjoint)

    def below_autograd(*args):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    def row(name, function, *args, train=True):
        costs = [microseconds(lambda: function(q, k, *args), samples)]
        if train:

            def step():
                torch.autograd.grad(function(*leaves, *args), leaves, upstream)

            costs.append(microseconds(lambda: function(*leaves, *args), samples))
            costs.append(microseconds(step, samples))
        print(f"{name:46}{''.join(f'{cost:12.1f}' for cost in costs)}", flush=True)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; microseconds a call")
    print(f"{'':46}{'no grad':>12}{'grad fwd':>12}{'fwd + bwd':>12}")
    row("bare op, no autograd key", op, *rest, train=False)
    row("in place, no autograd key", op_, *rest, train=False)
    row("autograd.Function outside", function, *rest)
    row("the same with setup_context", function_with_setup, *rest)
    torch.library.register_autograd("vlmops::mrope", backward, setup_context=setup_context)
    row("register_autograd", op, *rest)
    row("the same, skipped by a guard without grad", below_autograd, *rest, train=False)
    row("eager, cosine and sine given", eager, *torch.randn(2, 1, 1, 128).unbind())


if __name__ == "__main__":
    main()
