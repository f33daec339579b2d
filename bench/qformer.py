"""Measures BLIP-2's Q-Former: as Hugging Face has it, compiled, and patched.

    python bench/qformer.py [--batches 1,5,8,64] [--layers 12] [--isa avx2] [--dtype bfloat16]

Random weights, 32 queries, 257 tokens of 1,408 channels; with --text as many tokens of an
instruction, as InstructBLIP has them. Timed in turns are attention to the picture in one layer
("cross": projections, attention, sum and norm), a layer that has it, and all layers. Beside the
variants stand the bare products, by the fastest way of `vlmops.ops.linear`: nothing that multiplies
by the same weights is faster. Results are compared first.
"""

import copy
import itertools

import torch
import transformers
from e2e import TOLERANCE, options_of, timings_of, write
from torch import nn

import vlmops
from vlmops.ops.linear import linear

QUERIES, TOKENS, CHANNELS = 32, 257, 1408


def made(dtype, layers, text):
    """A Q-Former."""
    torch.manual_seed(0)
    name = "InstructBlipQFormer" if text else "Blip2QFormer"
    config = getattr(transformers, f"{name}Config")(num_hidden_layers=layers)
    model = getattr(transformers, f"{name}Model")(config)
    return model.eval().to(getattr(torch, dtype))


def stages(model, given):
    """What is timed of a Q-Former: name -> call."""
    layer = model.encoder.layer[0]
    images, queries = given["encoder_hidden_states"], given["hidden"][:, :QUERIES]
    inputs = {k: given[k] for k in ("query_embeds", "encoder_hidden_states", "input_ids",
                                    "attention_mask") if k in given}  # fmt: skip
    return {
        "cross": lambda: layer.crossattention(queries, None, images, None),
        "layer": lambda: layer(given["hidden"], None, images, None, query_length=QUERIES),
        "qformer": lambda: model(**inputs).last_hidden_state,
    }


def inputs_of(dtype, batch, text):
    """Arguments of a Q-Former and of its layers."""
    draw = torch.Generator().manual_seed(1)

    def drawn(*shape):
        return torch.randn(shape, generator=draw).to(getattr(torch, dtype))

    given = {
        "query_embeds": drawn(1, QUERIES, 768).expand(batch, -1, -1),
        "encoder_hidden_states": drawn(batch, TOKENS, CHANNELS),
        "hidden": drawn(batch, QUERIES + text, 768),
    }
    if text:
        given["input_ids"] = torch.randint(1000, 30000, (batch, text), generator=draw)
        given["attention_mask"] = torch.ones(batch, QUERIES + text, dtype=torch.long)
    return given


def products(call, model):
    """The bare products of a call: those of its linear layers."""
    seen = []
    hooks = [
        layer.register_forward_pre_hook(lambda layer, x: seen.append((layer, x[0].contiguous())))
        for layer in model.modules()
        if isinstance(layer, nn.Linear)
    ]
    call()
    for hook in hooks:
        hook.remove()

    def multiply():
        for layer, x in seen:
            linear(x, layer.weight, layer.bias)

    return multiply


@torch.no_grad()
def measured(dtype, batch, options):
    """Rows of one dtype and batch."""
    model = made(dtype, options.layers, options.text)
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    patched = copy.deepcopy(model, dict(shared))
    report = vlmops.patch(patched)
    given = inputs_of(dtype, batch, options.text)
    calls = {"unpatched": stages(model, given), "all": stages(patched, given)}
    if not options.no_compile:
        for name, of in (("compile", model), ("all, compile", patched)):
            compiled = torch.compile(of, dynamic=False)
            calls[name] = {"qformer": stages(compiled, given)["qformer"]}
    for stage in ("cross", "layer", "qformer"):
        group = {name: of[stage] for name, of in calls.items() if stage in of}
        results = {name: call() for name, call in group.items()}
        results = {n: r[0] if isinstance(r, tuple) else r for n, r in results.items()}
        largest = results["unpatched"].abs().max()
        for name, got in results.items():
            error = float((got - results["unpatched"]).abs().max() / largest)
            if not error < TOLERANCE[dtype]:
                wrong = f"qformer: {dtype}, {stage}, {name}: off by {error:.2g}"
                if name != "compile":  # torch's own
                    raise SystemExit(wrong)
                print(f"{wrong}: not timed", flush=True)
                del group[name]
        group["products"] = products(calls["unpatched"][stage], model)
        timings = timings_of(group, options)
        ours = timings["all"].median
        for name, timing in timings.items():
            median = timing.median
            yield {
                "dtype": dtype,
                "batch": batch,
                "text": options.text,
                "layers": options.layers,
                "stage": stage,
                "variant": name,
                "sites": report.counts,
                "samples": timing.samples,
                "voided": timing.voided,
                "median_ms": None if median is None else median * 1e3,
                "times_patched": median / ours if ours and median else None,
            }


def main():
    options = options_of(
        __doc__,
        batches=("1,5,8,64", "pictures at once"),
        layers=(12, "of the Q-Former"),
        text=(0, "tokens of an instruction, which InstructBLIP has"),
        no_compile=(0, "1: leaves torch.compile out"),
    )
    rows = []
    batches = [int(batch) for batch in options.batches.split(",")]
    for dtype, batch in itertools.product(options.dtype or ("float32", "bfloat16"), batches):
        for row in measured(dtype, batch, options):
            rows.append(row)
            shown = "busy" if row["median_ms"] is None else f"{row['median_ms']:.2f} ms"
            ratio = row["times_patched"]
            print(
                f"{dtype:9} {batch:3} {row['stage']:8} {row['variant']:13}{shown:>12}"
                f"{f'{ratio:.2f} of patched' if ratio else '':>17}  void {row['voided']}",
                flush=True,
            )
    write(options, "qformer", rows)


if __name__ == "__main__":
    main()
