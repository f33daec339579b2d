"""Measures F.linear against its alternatives: what the defaults in vlmops/ops/linear.py come from.

    python bench/linear.py [--isa avx2] [--dtype bfloat16] [--json PATH]

Shapes of Qwen2-VL-2B, one weight of each, which the caches hold where it is small. Beside them, for
single rows, the speed at which the weight is read, and that of copying it.
"""

import torch
from e2e import options_of, timings_of, write
from torch.nn import functional

from vlmops.bench import runner
from vlmops.ops.linear import alternative

SHAPES = [(256, 1536), (1536, 1536), (8960, 1536), (1536, 8960), (5120, 1280), (151936, 1536)]
ROWS = [1, 4, 8, 64, 1024]


@torch.no_grad()
def measured(dtype, options):
    for n, k in SHAPES:
        weight = torch.randn(n, k).to(dtype)
        existing = torch.empty_like(weight)
        for rows in ROWS if n < 100_000 else [1, 8]:  # a head sees few rows
            x = torch.randn(rows, k).to(dtype)
            calls = {
                "F.linear": lambda x=x, w=weight: functional.linear(x, w),
                "alternative": lambda x=x, w=weight: alternative(x, w),
                "copy": lambda w=weight, to=existing: to.copy_(w),
            }
            timings = timings_of(calls, options)
            row = {"dtype": str(dtype).removeprefix("torch."), "n": n, "k": k, "rows": rows}
            for name, timing in timings.items():
                row[name] = None if timing.median is None else timing.median * 1e3
            row["voided"] = sum(t.voided for t in timings.values())
            row["weight_bytes"] = weight.nbytes
            yield row


def line(row):
    shown = f"{row['dtype']:9} {row['n']:6} x {row['k']:<5} rows {row['rows']:<5}"
    times = [row[name] for name in ("F.linear", "alternative", "copy")]
    if None in times:
        return f"{shown} busy"
    theirs, ours, copy = times
    shown += f"{theirs:10.3f} ms {ours:10.3f} ms {theirs / ours:6.2f}x"
    if row["rows"] == 1:
        read, copied = (row["weight_bytes"] * f / 1e6 for f in (1 / ours, 2 / copy))
        shown += f"  reads {read:.1f} GB/s, copy moves {copied:.1f}"
    return shown


def main():
    options = options_of(__doc__)
    print(f"{'':37}{'F.linear':>10}   {'alternative':>11}")
    rows = []
    for dtype in options.dtype or runner.DTYPES:
        for row in measured(getattr(torch, dtype), options):
            rows.append(row)
            print(line(row), flush=True)
    write(options, "linear", rows)


if __name__ == "__main__":
    main()
