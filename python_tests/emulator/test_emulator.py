"""The emulator computes what torch does, catches every planted bug, and raises no false alarm."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from emulator.build import MODES, SOURCES, build, launch, load

# Good kernels: name -> sizes to run at.
GOOD = {
    "axpy_f32": [(1,), (127,), (10003,)],
    "axpy_bf16": [(8,), (10003,)],
    "axpy_f16": [(10003,)],
    "norm": [(3, 1), (5, 1000)],
    "histogram": [(3000,)],
    "last_block": [(1,), (20,)],
    "transpose": [(35, 50)],
    "half_warps": [()],
    "atomics": [(500,), (20000,)],
    "counting_barriers": [(0,), (40,), (96,)],
    "gemm_bf16": [(70, 88, 104), (64, 64, 256)],
    "gemm_f16": [(70, 88, 104)],
    "gemm_tf32": [(70, 88, 104)],
    "gemm_f16_by_depth": [(70, 88, 104)],
    "large_shared": [(40000,)],
}


def axpy(mode, case, n):
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[case[5:]]
    x, y = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    expected = (y.double() + 0.5 * x.double()).to(dtype)
    launch(mode, case, [x], [y], [n])
    torch.testing.assert_close(y, expected)


def norm(mode, case, rows, width):
    x = torch.randn(rows, width)
    y = torch.empty_like(x)
    launch(mode, case, [x], [y], [rows, width])
    scaled = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(
        y.double(), scaled - scaled.mean(-1, keepdim=True), atol=2e-6, rtol=0
    )


def histogram(mode, case, n):
    x = torch.randint(0, 64, (n,), dtype=torch.int32)
    counts, total = torch.zeros(64, dtype=torch.int32), torch.zeros(1)
    launch(mode, case, [x], [counts, total], [n])
    assert torch.equal(counts, x.bincount(minlength=64).int())
    assert total == n


def last_block(mode, case, blocks):
    x = torch.randn(blocks * 64)
    partial, ticket = torch.empty(blocks), torch.zeros(1, dtype=torch.int32)
    y = torch.empty(())
    launch(mode, case, [x], [partial, ticket, y], [blocks])
    torch.testing.assert_close(y, x.sum())


def transpose(mode, case, rows, columns):
    x = torch.randn(rows, columns, dtype=torch.float64)
    y = torch.empty(columns, rows, dtype=torch.float64)
    launch(mode, case, [x], [y], [rows, columns])
    assert torch.equal(y, x.T)


def half_warps(mode, case):
    values = []
    for lane in range(32):
        if lane >= 16:  # down by 3 within 16 lanes
            values.append(lane + 3 if lane + 3 < 32 else lane)
        else:  # up by 2, and the 4 lanes of the lower half that are multiples of 4
            values.append((lane - 2 if lane >= 2 else lane) + 4)
    # Written to place l ^ 31 after reading place l ^ 1; then all and any.
    expected = [100 + values[(lane ^ 31) ^ 1] for lane in range(32)] * 2
    y = torch.empty(64, dtype=torch.int32)
    launch(mode, case, [], [y], [])
    assert y.tolist() == expected


def atomics(mode, case, n):
    x = torch.randint(-1000, 1000, (n,), dtype=torch.int32)
    ints = [torch.full((1,), -5000, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)]
    wide, total = torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    locked, lock = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    launch(mode, case, [x], [*ints, wide, total, locked, lock], [n])
    assert ints[0] == x.max()
    assert ints[1] == x[x < 0].max()  # the greatest as unsigned
    assert wide.tolist() == [x.abs().max(), n]
    assert total == locked == x.sum()


def counting_barriers(mode, case, positive):
    x = torch.where(torch.randperm(96) < positive, 1.0, -1.0)
    y = torch.empty(3, dtype=torch.int32)
    launch(mode, case, [x], [y], [])
    assert y.tolist() == [positive, positive > 0, positive == 96]


def gemm(mode, case, m, n, k):
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}[
        case.split("_")[1]
    ]
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    y = torch.empty(m, n)
    launch(mode, case, [x, w.T.contiguous() if case.endswith("by_depth") else w], [y], [m, n, k])
    if dtype == torch.float32:  # the lower 13 bits are not read
        x, w = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (x, w))
    torch.testing.assert_close(y.double(), x.double() @ w.double().T, atol=3e-5, rtol=0)


def large_shared(mode, case, n):
    x = torch.randn(n)
    y = torch.empty_like(x)
    launch(mode, case, [x], [y], [n])
    assert torch.equal(y, x.flip(0))


def check_of(case):
    """The function above that a case's name begins with."""
    (check,) = (check for name, check in globals().items() if case.startswith(name))
    return check


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("case", "sizes"), [(case, sizes) for case, all_sizes in GOOD.items() for sizes in all_sizes]
)
def test_good_kernels_compute_what_torch_does_and_raise_no_alarm(mode, case, sizes):
    check_of(case)(mode, case, *sizes)


# Bug class -> {planted kernel: what the message must hold besides the class}.
PLANTED = {
    "out of bounds": {
        "read_past_end": r"thread \(31,0,0\) reads 4 bytes.*offset 256 of 'input 0', which has",
        "write_past_end": r"block \(1,0,0\), thread \(31,0,0\) writes 4.*offset 256 of 'output 0'",
        "read_before_start": r"reads 4 bytes.*offset -4 of 'input 0'",
        "pack_over_end": r"reads 16 bytes.*offset 256 of 'input 0'",
        "null_pointer": r"a null pointer",
        "memcpy_past_end": r"reads 32 bytes.*offset 228 of 'input 0'",
        "other_threads_local": r"another thread's local memory",
        "atomic_past_end": r"updates atomically 4 bytes.*offset 256 of 'output 0'",
        "shared_past_end": r"writes 4 bytes at offset 128 of shared 'row', which has 128",
        "shared_index": r"indexes an array outside of its size",
        "local_index": r"indexes an array outside of its size",
        "dynamic_past_end": r"writes 4 bytes at offset 124 of dynamic shared memory",
        "copy_past_end": r"reads 16 bytes.*offset 256 of 'input 0'",
        "copy_past_shared_end": r"cp\.async to 16 bytes at offset 240 of shared 'row'",
        "narrow_copy_past_shared_end": r"cp\.async to 4 bytes at offset 60 of shared 'row'",
    },
    "misaligned": {
        "misaligned_pack": r"accesses 16 bytes of 'input 0' at offset 12",
        "misaligned_shared_pack": r"accesses 8 bytes of shared 'row' at offset 124",
        "misaligned_cast": r"accesses 4 bytes of 'input 0' at offset 66",
        "misaligned_vector_cast": r"accesses 16 bytes of 'input 0' at offset 4",
        "copy_misaligned": r"accesses 16 bytes of shared 'row' at offset 4",
        "narrow_copy_misaligned": r"accesses 8 bytes of shared 'row' at offset 4",
        "ldmatrix_misaligned": r"accesses 16 bytes of shared 'row' at offset 8",
    },
    "uninitialised": {
        "uninitialised_shared": r"thread \(0,0,0\) reads 4 bytes of shared 'row' at offset 0",
        "shared_of_other_block": r"block \(1,0,0\)",
    },
    "read-only": {"write_to_input": r"writes 4 bytes of 'input 0' at offset 0"},
    "race": {
        "race_write_read": r"writes 4 bytes of shared 'row'.* read with no barrier",
        "race_write_read_later": r"reads 4 bytes of shared 'row'.* wrote with no barrier",
        "race_read_write": r"of shared 'row'",
        "race_write_write": r"writes 4 bytes of shared 'total' at offset 0, which thread \(0,0,0\)",
        "race_sum": r"of shared 'total'",
        "race_atomic_and_read": r"updates atomically 4 bytes of shared 'total'",
        "race_in_warp": r"of shared 'row'",
        "race_over_shuffle": r"of shared 'row'",
        "race_over_syncwarp": r"of shared 'row'",
        "race_over_half_syncwarp": r"of shared 'row'",
        "race_in_place": r"of 'output 0'",
        "race_of_blocks": r"block \(1,0,0\).*of 'output 0' at offset 0, which block \(0,0,0\)",
        "race_of_blocks_read": r"block \(1,0,0\).*reads.*'output 0' at offset 0",
        "ticket_without_fence": r"reads 4 bytes of 'output 0' at offset 4",
        "copy_without_barrier": r"of shared 'row'",
        "copy_over_readers": r"of shared 'row'",
        "ldmatrix_race": r"thread \(0,0,0\) reads 16 bytes of shared 'row'",
    },
    "divergent barrier": {
        "exit_before_barrier": r"waits in __syncthreads at order\.cu:\d+, but thread \(50,0,0\)",
        "barrier_in_branch": r"another __syncthreads than thread \(0,0,0\) at order\.cu",
        "barrier_skipped": r"but thread \(1,0,0\) has left",
    },
    "lane has left": {
        "shuffle_after_exit": r"a shuffle.*thread \(50,0,0\)",
        "exit_during_shuffle": r"a shuffle.*thread \(63,0,0\)",
        "vote_after_exit": r"a vote with mask 0xffffffff, but lane 0",
        "ragged_warp": r"lane 16 does not exist",
        "mma_of_half_a_warp": r"mma.*thread \(16,0,0\)",
    },
    "warp mask": {
        "caller_not_in_mask": r"thread \(16,0,0\) calls a shuffle with mask 0x0000ffff",
        "source_not_in_mask": r"lane 0 reads lane 16",
    },
    "deadlock": {
        "masks_differ": r"masks 0xffffffff and 0x0000ffff",
        "shuffle_against_vote": r"waits in a vote.*waits in a shuffle",
        "shuffle_against_barrier": r"waits in a shuffle.*waits in __syncthreads",
        "lock_kept": r"waits for what no other thread will do",
        "polls_for_ever": r"'input 0' at offset 0, again and again",
    },
    "cp.async": {
        "copy_without_wait": r"shared 'row'.*has not been waited for",
        "copy_wait_one_short": r"has not been waited for",
        "copy_without_commit": r"has not been waited for",
        "copy_to_global": r"which is not shared memory",
    },
    "undefined": {
        "shift_too_far": r"shifts by too much",
        "overflow_in_launcher": r"a signed sum overflows in host code \(at limits\.cu",
    },
    "trap": {
        "trapped": r"block \(1,0,0\), thread \(31,0,0\) ran into __trap",
        "asserted": r"block \(1,0,0\), thread \(31,0,0\) asserted global_thread\(\) < n - 1",
    },
    "launch limit": {
        "static_shared": r"49156 bytes of static",
        "static_and_dynamic_shared": r"4096 bytes of static and 47104 of dynamic",
        # Given their sizes in LIMITS.
        "launch_shape": None,
        "too_much_asked": None,
    },
}
# What hardware punishes. A class must have a detector that some planted bug has set off.
BUG_CLASSES = {
    "out of bounds",
    "misaligned",
    "uninitialised",
    "read-only",
    "race",
    "divergent barrier",
    "lane has left",
    "warp mask",
    "deadlock",
    "cp.async",
    "undefined",
    "trap",
    "launch limit",
}


def test_every_bug_class_has_a_detector_and_every_case_is_tested():
    assert PLANTED.keys() == BUG_CLASSES
    assert all(PLANTED.values())
    planted = [case for cases in PLANTED.values() for case in cases]
    assert sorted(load("checked").cases()) == sorted([*GOOD, *planted])
    assert load("fast").cases() == load("checked").cases()


@pytest.mark.parametrize(
    ("bug", "case", "pattern"),
    [(b, case, p) for b, cases in PLANTED.items() for case, p in cases.items() if p],
)
def test_planted_bugs_are_caught_and_named(bug, case, pattern):
    with pytest.raises(RuntimeError) as caught:
        launch("checked", case, [torch.randn(64)], [torch.zeros(64)], [])
    message = str(caught.value)
    assert re.fullmatch(rf"kernel vlmops::planted::\w+_kernel: {re.escape(bug)}: .+", message)
    assert re.search(pattern, message), message
    if bug not in ("undefined", "launch limit"):
        assert re.search(r"block \(\d,0,0\), thread \(\d+,0,0\) ", message), message
    # Where in the source; for a lock that is never given back it would be a line of the run time.
    if bug != "launch limit" and case != "lock_kept":
        assert re.search(r"at (memory|order|copy|limits)\.cu:\d+", message), message


# What the scheduler itself sees, without instrumentation. Other bugs might bring Python down there.
FAST_CLASSES = (
    "divergent barrier",
    "lane has left",
    "warp mask",
    "launch limit",
    "deadlock",
    "trap",
)
FAST_CASES = ("misaligned_pack", "misaligned_shared_pack", "copy_misaligned", "ldmatrix_misaligned")


@pytest.mark.parametrize(
    ("bug", "case", "pattern"),
    [
        (bug, case, pattern)
        for bug, cases in PLANTED.items()
        for case, pattern in cases.items()
        if pattern and (bug in FAST_CLASSES or case in FAST_CASES) and case != "polls_for_ever"
    ],
)
def test_the_fast_build_catches_what_needs_no_instrumentation(bug, case, pattern):
    with pytest.raises(RuntimeError, match=rf"kernel: {bug}: ") as caught:
        launch("fast", case, [torch.randn(64)], [torch.zeros(64)], [])
    assert re.search(pattern, str(caught.value)), caught.value


def test_copies_that_are_not_waited_for_are_nan_in_the_fast_build():
    y = torch.zeros(64)
    launch("fast", "copy_without_wait", [torch.randn(64)], [y], [])
    assert y.isnan().all()


def test_checked_kernels_run_again_after_an_error():
    with pytest.raises(RuntimeError, match="divergent barrier"):
        launch("checked", "exit_before_barrier", [torch.randn(64)], [torch.zeros(64)], [])
    axpy("checked", "axpy_f32", 1000)


LIMITS = [
    ([1, 1, 1, 1025, 1, 1, 0], r"block \(1025,1,1\)"),
    ([1, 1, 1, 32, 33, 1, 0], r"1024 threads together"),
    ([1, 1, 1, 1, 1, 65, 0], r"block \(1,1,65\)"),
    ([1, 65536, 1, 1, 1, 1, 0], r"grid \(1,65536,1\)"),
    ([1, 1, 65536, 1, 1, 1, 0], r"grid \(1,1,65536\)"),
    ([1 << 31, 1, 1, 1, 1, 1, 0], r"grid \(2147483648,1,1\)"),
    ([0, 1, 1, 32, 1, 1, 0], r"a dimension is zero"),
    ([1, 1, 1, 32, 0, 1, 0], r"a dimension is zero"),
    ([1, 1, 1, 32, 1, 1, 49153], r"49153 bytes of dynamic shared memory.*49152"),
]


@pytest.mark.parametrize(("sizes", "pattern"), LIMITS)
def test_launches_over_the_limits_are_refused(sizes, pattern):
    with pytest.raises(RuntimeError, match=rf"nothing_kernel: launch limit: .*{pattern}"):
        launch("checked", "launch_shape", [], [], sizes)


def test_launches_at_the_limits_run():
    for sizes in ([1, 65535, 1, 1, 1, 1, 0], [1, 1, 1, 1024, 1, 1, 49152], [1, 1, 1, 4, 4, 64, 0]):
        launch("checked", "launch_shape", [], [], sizes)


@pytest.mark.parametrize(("architecture", "limit"), [(80, 163), (89, 99), (90, 227), (120, 99)])
def test_shared_memory_is_limited_by_architecture(architecture, limit):
    module = load("checked")
    module.set_device(architecture)
    try:
        launch("checked", "too_much_asked", [], [], [limit << 10])
        with pytest.raises(RuntimeError, match=rf"sm_{architecture}'s limit of {limit << 10}"):
            launch("checked", "too_much_asked", [], [], [(limit << 10) + 1])
    finally:
        module.set_device(80)


def test_kernels_without_registered_buffers_run_on_any_memory():
    module = load("checked")
    x, y = torch.randn(100), torch.zeros(100)
    module.run_case("axpy_f32", [x.data_ptr(), y.data_ptr()], [100])
    torch.testing.assert_close(y, 0.5 * x)


@pytest.mark.parametrize("mode", MODES)
def test_results_are_the_same_every_time(mode):
    x, w = torch.randn(576, 104).half(), torch.randn(512, 104).half()
    # Enough blocks for several host threads.
    results = [torch.empty(576, 512) for _ in range(3)]
    try:
        for y, host_threads in zip(results, (0, 0, 1), strict=True):
            load(mode).set_host_threads(host_threads)
            launch(mode, "gemm_f16", [x, w], [y], [576, 512, 104])
    finally:
        load(mode).set_host_threads(0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("mode", MODES)
def test_the_module_is_a_library_of_launchers(mode):
    module = load(mode)
    library = ctypes.CDLL(build() / f"vlmops_emulator_{mode}.so")
    library.vlmops_cuda_kernels.restype = ctypes.c_void_p
    table = library.vlmops_cuda_kernels()
    assert table == module.cuda_kernels()
    describe = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)(
        ctypes.c_void_p.from_address(table).value
    )
    assert describe(0) == b"no error"


def test_speed_is_what_the_suites_are_planned_with():
    x, y = torch.randn(1 << 18), torch.randn(1 << 18)
    for mode, floor in (("fast", 5e6), ("checked", 1.5e5)):
        launch(mode, "axpy_f32", [x[:4096]], [y[:4096]], [4096])
        start = time.perf_counter()
        launch(mode, "axpy_f32", [x], [y], [len(x)])
        rate = len(x) / (time.perf_counter() - start)
        print(f"{mode}: {rate / 1e6:.1f} M elements/s")
        assert rate > floor


NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.pathsep.join(f"{p}/nvidia/cu13/bin" for p in sys.path)
)


@pytest.mark.skipif(NVCC is None, reason="no nvcc: pip install -e '.[cuda]'")
@pytest.mark.parametrize("source", ["emulator/good/gemm.cu", "common/cuda_kernels.cu"])
def test_what_the_emulator_runs_compiles_with_nvcc(source, tmp_path):
    # What bench/gpu_static.py leaves out, which compiles the ops' kernels.
    command = [NVCC, "-std=c++17", "-Werror", "all-warnings", f"-I{SOURCES}", "-arch=sm_90"]
    command += ['-DVLMOPS_CUDA_ARCHITECTURES="90"', "-c"]
    done = subprocess.run(
        [*command, SOURCES / source, "-o", tmp_path / "out.o"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
