"""Which backend runs: argument, context, environment, default; and what cannot run is said."""

import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from dispatch import CountOps
from testbed import HAS_TRITON

import vlmops
from vlmops import dispatch

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")


def tensors():
    x = torch.randn(1, 2, 3, 8)
    ids = torch.arange(3).expand(1, 1, 3)
    return x, x.clone(), ids, torch.ones(4), torch.zeros(4, dtype=torch.int32)


def ran(call, **options):
    """The names of our ops that a call runs."""
    with CountOps() as ops:
        call(*tensors(), **options)
    return [func._schema.name.removeprefix("vlmops::") for func, *_ in ops.calls]


@needs_triton
@pytest.mark.parametrize("call", [vlmops.mrope, vlmops.mrope_])
def test_argument_then_context_then_default(call):
    suffix = "_" if call is vlmops.mrope_ else ""
    assert ran(call) == [f"mrope{suffix}"]
    assert ran(call, backend="triton") == [f"mrope_triton{suffix}"]
    assert ran(call, backend="reference") == []
    with vlmops.backend("triton"):
        assert ran(call) == [f"mrope_triton{suffix}"]
        assert ran(call, backend="cpu") == [f"mrope{suffix}"]
        with vlmops.backend("cpu"):
            assert ran(call) == [f"mrope{suffix}"]
        assert ran(call) == [f"mrope_triton{suffix}"]
    assert ran(call) == [f"mrope{suffix}"]


def test_the_context_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), vlmops.backend("reference"):
        raise ZeroDivisionError
    assert ran(vlmops.mrope) == ["mrope"]


@needs_triton
def test_a_derivative_runs_where_its_forward_ran():
    args = tensors()
    args[0].requires_grad_()
    with CountOps() as ops:
        with vlmops.backend("triton"):
            q, _ = vlmops.mrope(*args)
        q.sum().backward()
    assert ops.counts["vlmops::mrope_triton_backward"] == 1
    assert ops.counts["vlmops::mrope_backward"] == 0


def test_backends_agree():
    args = tensors()
    expected = vlmops.mrope(*args, backend="reference")
    for name in ["cpu", *(["triton"] if HAS_TRITON else [])]:
        torch.testing.assert_close(vlmops.mrope(*args, backend=name), expected)


def test_threads_and_tasks_have_their_own():
    found = {}

    def look(name):
        found[name] = ran(vlmops.mrope)

    async def main():
        async def inside():
            with vlmops.backend("reference"):
                await asyncio.sleep(0)
                look("inside")

        async def outside():
            await asyncio.sleep(0)
            look("outside")

        await asyncio.gather(inside(), outside())

    asyncio.run(main())
    with vlmops.backend("reference"):
        thread = threading.Thread(target=look, args=("thread",))
        thread.start()
        thread.join()
    assert found == {"inside": [], "outside": ["mrope"], "thread": ["mrope"]}


@needs_triton
def test_compile_guards_the_context_and_knows_it_inside():
    args = tensors()
    graphs = []

    def keep(graph, _):
        names = [str(n.target) for n in graph.graph.nodes if "vlmops" in str(n.target)]
        graphs.append(names)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(vlmops.mrope, fullgraph=True, backend=keep)
    compiled(*args)
    with vlmops.backend("triton"):
        compiled(*args)
    compiled(*args)
    assert graphs == [["vlmops.mrope"], ["vlmops.mrope_triton"]]

    def both(*args):
        with vlmops.backend("triton"):
            q, k, *rest = args
            q, k = vlmops.mrope(q, k, *rest)
        return vlmops.mrope(q, k, *rest)

    graphs.clear()
    torch.compile(both, fullgraph=True, backend=keep)(*args)
    assert graphs == [["vlmops.mrope_triton", "vlmops.mrope"]]
    assert ran(vlmops.mrope) == ["mrope"]


@pytest.mark.parametrize("call", [vlmops.mrope, vlmops.mrope_])
def test_what_cannot_run_is_said(call):
    with pytest.raises(ValueError, match=r"backend: expected one of cpu, cuda, .*got 'tritn'"):
        call(*tensors(), backend="tritn")
    with pytest.raises(ValueError, match=r"backend: expected one of cpu, cuda, .*got 'gpu'"):
        vlmops.backend("gpu")
    message = r"mrope: backend 'cuda', asked for by backend: expected tensors on cuda, got cpu; "
    with pytest.raises(RuntimeError, match=message):
        call(*tensors(), backend="cuda")
    with (
        pytest.raises(RuntimeError, match=r"backend 'cuda', asked for by vlmops\.backend\("),
        vlmops.backend("cuda"),
    ):
        call(*tensors())


def test_triton_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"triton is not installed; run 'pip install triton'"):
        vlmops.mrope(*tensors(), backend="triton")


def test_defaults_say_whether_they_were_measured(monkeypatch):
    assert dispatch.default("mrope", "cpu")[:2] == ("cpu", True)
    refused = {"cuda": None, "triton": None}
    monkeypatch.setattr(dispatch, "unavailable", lambda op, name, device: refused[name])
    backend, measured, why = dispatch.default("mrope", torch.device("cuda", 0))
    assert (backend, measured) == ("cuda", True)
    folder = Path(__file__).parent.parent / why.split()[-1]
    assert list(folder.glob("*-mrope.json"))
    refused["cuda"] = "no kernels"
    backend, measured, why = dispatch.default("mrope", "cuda")
    assert (backend, measured) == ("triton", False)
    assert "guess" in why


def run_with(value):
    script = "import torch, vlmops\nprint(vlmops.dispatch.asked.get())\n" \
        "x = torch.randn(3, 1, 8)\n" \
        "vlmops.mrope(x, x, torch.zeros(1, 3, dtype=torch.int64), torch.ones(4), " \
        "torch.zeros(4, dtype=torch.int32))"  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "VLMOPS_BACKEND": value},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("value", ["", "reference", "cpu"])
def test_the_environment_chooses(value):
    assert run_with(value).stdout.strip() == (value or "None")


def test_the_environment_that_names_nothing_is_an_error():
    run = run_with("nonsense")
    assert "VLMOPS_BACKEND: expected one of cpu, cuda, triton, reference" in run.stderr
