"""The peer of `cluster bench collective`: the same operations, sizes and loop in PyTorch over gloo.

Usage: VENV/bin/python benches/peer_collective.py --ranks N [--ops …] [--sizes …] [--loop plain]
Starts the processes itself, on loopback, one thread each. Prints one JSON document with a row for
each case: the median and the spread of each call's time on the rank it took longest, in seconds.
"""

import argparse
import json
import os
import re
import socket
import statistics
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Otherwise gloo may listen on another interface than loopback.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

DTYPES = {"f32": torch.float32, "f64": torch.float64, "i64": torch.int64, "u8": torch.uint8,
          "bf16": torch.bfloat16, "f16": torch.float16, "i32": torch.int32}
# As `cluster bench collective` chooses them.
WARMUP_SECONDS, CALLS_MIN, CALLS_MAX = 0.05, 5, 20_000


def size(text):
    number, unit = re.fullmatch(r"(\d+)(B|KiB|MiB|GiB)?", text).groups()
    return int(number) * {None: 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]


def operation(op, elements, dtype, rank, world):
    """A call without arguments, and the result that its first run must have."""
    # Small whole numbers, whose sum is exact in every type; zeros would be shared pages.
    mine = torch.full((elements,), rank % 3 + 1, dtype=dtype)
    total = sum(r % 3 + 1 for r in range(world))
    if op == "all_reduce":
        return (lambda: dist.all_reduce(mine)), mine, lambda: bool((mine == total).all())
    if op == "broadcast":
        return (lambda: dist.broadcast(mine, 0)), mine, lambda: bool((mine == 1).all())
    if op == "reduce_scatter":
        out = torch.ones(elements // world, dtype=dtype)
        return ((lambda: dist.reduce_scatter_tensor(out, mine)), mine,
                lambda: bool((out == total).all()))
    of_each = lambda out: all(bool((part == r % 3 + 1).all())
                              for r, part in enumerate(out.chunk(world)))
    if op == "all_gather":
        out, part = torch.ones(elements, dtype=dtype), mine[: elements // world].clone()
        return (lambda: dist.all_gather_into_tensor(out, part)), part, lambda: of_each(out)
    if op == "all_to_all":
        out = torch.ones(elements, dtype=dtype)
        return (lambda: dist.all_to_all_single(out, mine)), mine, lambda: of_each(out)
    return dist.barrier, mine, lambda: True


def timed(call, calls, spaced):
    """Seconds of each call, on this rank."""
    seconds = []
    dist.barrier()
    for _ in range(calls):
        if spaced:
            dist.barrier()
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def slowest(seconds):
    """Seconds of each call on the rank it took longest, on every rank."""
    together = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return sorted(together.tolist())


def fit(budget, each, least):
    return max(least, min(CALLS_MAX, int(budget / max(each, 1e-9))))


def measure(op, count, rank, world, args):
    dtype = DTYPES[args.dtype]
    # What does not divide among the ranks is left out; an all-reduce and a broadcast divide nothing.
    unit = 1 if op in ("all_reduce", "broadcast") else world
    elements = max(1, count // dtype.itemsize // unit) * unit
    call, buffer, right = operation(op, elements, dtype, rank, world)
    call()
    if not right():
        sys.exit(f"{op}: a wrong result on rank {rank}")
    # So that sums of sums stay what they are, however often they are taken.
    buffer.zero_()
    spaced = args.loop == "barrier"
    once = slowest(timed(call, 2, spaced))[0]
    warmup = args.warmup if args.warmup is not None else fit(WARMUP_SECONDS, once, 1)
    warm = statistics.median(slowest(timed(call, max(1, warmup), spaced)))
    calls = args.iterations or fit(args.seconds, warm, CALLS_MIN)
    mine = timed(call, calls, spaced)
    times = slowest(mine)
    tenth = len(times) // 10
    return {"op": op, "bytes": 0 if op == "barrier" else elements * dtype.itemsize,
            "ranks": world, "transport": "gloo", "iterations": calls,
            "median": statistics.median(times), "p10": times[tenth], "p90": times[-1 - tenth],
            "latency": times[0], "median_rank0": statistics.median(mine)}


def run(rank, port, args):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank,
                            world_size=args.ranks)
    rows = []
    for op in args.ops.split(","):
        sizes = ["0B"] if op == "barrier" else args.sizes.split(",")
        rows += [measure(op, size(text), rank, args.ranks, args) for text in sizes]
    if rank == 0:
        print(json.dumps({"loop": args.loop, "dtype": args.dtype, "rows": rows}), flush=True)
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--ops", default="all_reduce,reduce_scatter,all_gather,all_to_all,broadcast,barrier")
    parser.add_argument("--sizes", default="4KiB,64KiB,1MiB,64MiB")
    parser.add_argument("--dtype", default="f32", choices=DTYPES)
    parser.add_argument("--loop", default="barrier", choices=("barrier", "plain"))
    parser.add_argument("--seconds", type=float, default=1.0, help="of timed calls in each case")
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--warmup", type=int)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(run, args=(port, args), nprocs=args.ranks)


if __name__ == "__main__":
    main()
