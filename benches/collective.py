"""Cohort's collectives beside Gloo's: the same operations, sizes and loop, alternating, in one run.

Usage: benches/collective.py CLUSTER_BINARY PYTORCH_VENV [--rounds N] [--transport shm|tcp|auto]
       [--ranks 2,4] [--ops …] [--sizes …] [--loop plain|barrier]
Prints a Markdown table of medians and ratios (Gloo / Cohort; above 1 is faster than the peer) and
whether each meets its target. Exits with 1 if one does not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
OPS = "all_reduce,reduce_scatter,all_gather,all_to_all,broadcast,barrier"
SIZES = {"shm": "4KiB,64KiB,1MiB,64MiB", "tcp": "4KiB,64KiB,1MiB,4MiB,16MiB,64MiB"}
KIB, MIB = 1 << 10, 1 << 20
# Of a barrier, and of an all-reduce up to each number of bytes: how many times faster than Gloo.
SHM_TARGETS = {
    2: (20, [(4 * KIB, 20), (64 * KIB, 10), (MIB, 5), (64 * MIB, 3.5)]),
    4: (20, [(MIB, 10), (64 * MIB, 3)]),
}
# Over TCP nothing is slower than Gloo; from 16 MiB on it is beside a bare socket exchange instead.
TCP_TARGETS = [(4 * KIB, 10), (MIB - 1, 1), (4 * MIB, 1.5)]
BARE_BYTES, BARE_SHARE = 16 * MIB, 0.8


def target(transport, op, size, ranks):
    """How many times faster than Gloo it should be; none if nothing is promised."""
    if transport == "tcp":
        least = [ratio for upto, ratio in TCP_TARGETS if size <= upto] if op == "all_reduce" else []
        return least[0] if least else 1
    barrier, steps = SHM_TARGETS.get(ranks, (None, []))
    if op == "barrier":
        return barrier
    least = [ratio for upto, ratio in steps if size <= upto] if op == "all_reduce" else []
    return least[0] if least else None


def output(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr or done.stdout}")
    return json.loads([l for l in done.stdout.splitlines() if l.startswith("{")][-1])["rows"]


def ours(args, ranks, shared):
    command = [args.binary, "bench", "collective", "--json", "--transport", args.transport,
               "--reduction", args.reduction, "--ranks", str(ranks), *shared]
    return output(command + (["--floor"] if args.floor else []))


def theirs(args, ranks, shared):
    script = os.path.join(HERE, "peer_collective.py")
    return output([f"{args.venv}/bin/python", script, "--ranks", str(ranks), "--seconds",
                   str(args.seconds), *shared])


def time(seconds):
    return f"{seconds * 1e6:.1f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def size_name(size):
    return "" if size == 0 else f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def judged(runs, ratios, transport, op, size, ranks):
    """What the target says of the median ratio, and whether it is missed."""
    said, missed = [], False
    least = target(transport, op, size, ranks)
    if least is not None:
        met = statistics.median(ratios) >= least
        said.append(f"≥ {least:g}×: {'met' if met else 'MISSED'}")
        missed |= not met
    if transport == "tcp" and op == "all_reduce" and size >= BARE_BYTES and "floor" in runs[0]:
        share = statistics.median(run["floor"]["ratio"] for run in runs)
        met = share >= BARE_SHARE
        said.append(f"≥ {BARE_SHARE:.0%} of bare: {share:.0%} {'met' if met else 'MISSED'}")
        missed |= not met
    return ", ".join(said) or "–", missed


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transport", default="shm", choices=("shm", "tcp", "auto"))
    parser.add_argument("--reduction", default="deterministic", choices=("deterministic", "fast"))
    parser.add_argument("--ranks", default="2,4")
    parser.add_argument("--ops", default=OPS)
    parser.add_argument("--sizes")
    parser.add_argument("--dtype", default="f32")
    # The loop of Gloo's own benchmark; after a barrier, a peer that leaves it late counts too.
    parser.add_argument("--loop", default="plain", choices=("plain", "barrier"))
    parser.add_argument("--seconds", type=float, default=1.0, help="of each of the peer's cases")
    parser.add_argument("--floor", action="store_true", help="implied by --transport tcp")
    args = parser.parse_args()
    args.floor |= args.transport == "tcp"
    sizes = args.sizes or SIZES["tcp" if args.transport == "tcp" else "shm"]
    shared = ["--ops", args.ops, "--sizes", sizes, "--dtype", args.dtype, "--loop", args.loop]
    print("| operation | bytes | ranks | Cohort, " + args.transport + " | Gloo | ratio (spread) | "
          + ("bare exchange | " if args.floor else "") + "target |")
    print("|---|---|---|---|---|---|---|" + ("---|" if args.floor else ""), flush=True)
    any_missed = False
    for ranks in (int(text) for text in args.ranks.split(",")):
        a, b = [], []
        for _ in range(args.rounds):
            a.append(ours(args, ranks, shared))
            b.append(theirs(args, ranks, shared))
        # Both measure the same cases in the same order; what does not divide is cut off differently.
        for mine, peer in zip(zip(*a), zip(*b)):
            op, size = mine[0]["op"], mine[0]["bytes"]
            assert all(row["op"] == op for row in peer), f"{op} beside {peer[0]['op']}"
            ratios = [y["median"] / x["median"] for x, y in zip(mine, peer)]
            middle = lambda values: time(statistics.median(values))
            transport = mine[0]["transport"]
            verdict, missed = judged(mine, ratios, transport, op, size, ranks)
            any_missed |= missed
            bare = f"{middle(x['floor']['median'] for x in mine)} | " if args.floor else ""
            print(f"| {op} | {size_name(size)} | {ranks} | {middle(x['median'] for x in mine)} "
                  f"| {middle(y['median'] for y in peer)} | **{statistics.median(ratios):.1f}** "
                  f"({min(ratios):.1f}–{max(ratios):.1f}) | {bare}{verdict} |", flush=True)
    sys.exit(1 if any_missed else 0)


if __name__ == "__main__":
    main()
