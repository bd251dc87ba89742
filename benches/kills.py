"""The same bits after a hundred deaths: random kills of random ranks, ranks moving between 1 and 8.

Usage: benches/kills.py CLUSTER_BINARY [--kills 100] [--seed 1] [--only transformer,classifier]
Runs each job once undisturbed on one rank, then elastic on 1 to 8 ranks while ranks are killed at random
moments, and compares the SHA-256 of the weights. Checkpoints are off: what a rank needs comes from the
others. Prints kills, generations, how many ranks there were, both digests, and the sample ledger: in how many
epochs the model was fed every sample exactly once. Fails if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COMMON = ["checkpoint.every_steps=0", "recovery.max_failures=50"]
JOBS = {
    "transformer": ("examples/rust-lm/job.toml", [
        "hyperparameters.width=32", "hyperparameters.heads=2", "hyperparameters.sequence_length=32",
        "batch.global=16", "evaluate.every_steps=0"], 60),
    "classifier": ("examples/digits/job.toml", ["stop.max_epochs=100000", "evaluate.every_steps=0"], 60),
}


def command(binary, job, sets, folder, steps, ranks):
    line = [binary, "submit", os.path.join(ROOT, job), "--local", "--json", "--dir", folder]
    for setting in [*sets, *COMMON, f"stop.max_steps={steps}", f"resources.ranks={ranks}"]:
        line += ["--set", setting]
    return line


def digest(lines):
    last = json.loads(lines[-1])
    return last["sha256"]


def ranks_of(parent):
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()
            line = open(f"/proc/{entry}/cmdline").read().split("\0")
        except OSError:
            continue
        if int(stat[1]) == parent and stat[0] != "Z" and "rank" in line[1:2]:
            found.append(int(entry))
    return sorted(found)


def disturbed(line, kills, seed):
    random.seed(seed)
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    os.set_blocking(run.stdout.fileno(), False)
    lines, done, sizes, generation, rest = [], 0, set(), 0, ""
    due = None
    while True:
        try:
            rest += run.stdout.read() or ""
        except TypeError:
            pass
        *whole, rest = rest.split("\n")
        for text in whole:
            lines.append(text)
            event = json.loads(text)
            if event.get("event") == "status" and event["phase"] == "running":
                sizes.add(len(event["gang"]))
                generation = event["generation"]
                due = due or time.time() + random.uniform(0.2, 1.5)
        if run.poll() is not None:
            rest += run.stdout.read() or ""
            lines += [text for text in rest.split("\n") if text]
            break
        if due and time.time() >= due and done < kills:
            processes = ranks_of(run.pid)
            # One or several at once; somebody has to hold the state: one is left.
            several = min(random.choice([1, 1, 1, 2, 3, 7]), len(processes) - 1, kills - done)
            for victim in random.sample(processes, max(several, 0)):
                try:
                    os.kill(victim, signal.SIGKILL)
                    done += 1
                except ProcessLookupError:
                    pass
            due = time.time() + random.uniform(0.2, 1.5)
        time.sleep(0.02)
    return lines, done, sizes, generation, run.returncode


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(JOBS))
    parser.add_argument("--set", action="append", default=[], help="a setting of the disturbed run, such as "
                        "recovery.join_behind_above=0B")
    args = parser.parse_args()
    failed = False
    for name in args.only.split(","):
        job, sets, steps_per_kill = JOBS[name]
        steps = steps_per_kill * args.kills
        with tempfile.TemporaryDirectory() as folder:
            line = command(args.binary, job, sets, os.path.join(folder, "one"), steps, 1)
            alone = subprocess.run(line, capture_output=True, text=True)
            if alone.returncode != 0:
                sys.exit(alone.stderr)
            expected = digest(alone.stdout.strip().split("\n"))
            begun = time.time()
            many = os.path.join(folder, "many")
            line = command(args.binary, job, sets + args.set, many, steps, "{ min = 1, max = 8 }")
            lines, kills, sizes, generation, code = disturbed(line, args.kills, args.seed)
            found = digest(lines) if code == 0 else f"exit code {code}: {lines[-1] if lines else ''}"
            status = json.loads(lines[-1]) if code == 0 else {}
            restarts = status.get("restarts", 0) - status.get("regroups", 0)
            samples = status.get("samples") or {}
            epochs, count = samples.get("epochs_verified", -1), samples.get("count", -1)
            ledger = f"{epochs} epochs with every sample exactly once, {count} samples of the next"
            alone_samples = json.loads(alone.stdout.strip().split("\n")[-1])["samples"]
            failed |= samples != alone_samples
            verdict = "the same" if found == expected else "DIFFERENT"
            failed |= found != expected
            print(f"{name}: {steps} steps, {kills} kills in {time.time() - begun:.0f} s, {generation} generations "
                  f"({restarts} of them from the beginning), ranks {sorted(sizes)}: {verdict}\n  {expected}\n  {found}\n"
                  f"  {ledger}{'' if samples == alone_samples else ', DIFFERENT'}",
                  flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
