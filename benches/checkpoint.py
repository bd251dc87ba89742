"""What a checkpoint of about 430 MB costs the steps: Cohort beside PyTorch DCP's async save, by turns.

Usage: benches/checkpoint.py CLUSTER_BINARY PYTORCH_VENV [--rounds N] [--batch N] [--steps N] [--every N]
One process of two threads on either side, the same GPT and batch, a folder as store. A stall is how long
the call that saves holds up the step loop; the slow-down compares the same steps with and without saving.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from train import HERE, gpt_job, text_file

LAYERS, WIDTH, HEADS = 12, 496, 8


def ours(binary, job, args):
    command = [binary, "bench", "checkpoint", job, "--json", "--rounds", "1", "--steps", str(args.steps),
               "--every", str(args.every), "--state", "1MB"]
    for setting in (f"hyperparameters.layers={LAYERS}", f"hyperparameters.width={WIDTH}",
                    f"hyperparameters.heads={HEADS}", "resources.ranks=1", "resources.threads_per_rank=2",
                    f"batch.global={args.batch}", "batch.lanes=1"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])["training"]["samples"][0]


def peer(venv, text, args):
    command = [os.path.join(venv, "bin", "python"), os.path.join(HERE, "peer_checkpoint.py"), "--data", text,
               "--layers", str(LAYERS), "--width", str(WIDTH), "--heads", str(HEADS),
               "--batch", str(args.batch), "--steps", str(args.steps), "--every", str(args.every)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    args = parser.parse_args()
    rows = {"Cohort": [], "PyTorch DCP async": []}
    with tempfile.TemporaryDirectory() as folder:
        text = text_file(folder)
        job = gpt_job(folder, text)
        for number in range(1, args.rounds + 1):
            rows["Cohort"].append(ours(args.binary, job, args))
            rows["PyTorch DCP async"].append(peer(args.venv, text, args))
            print(f"round {number} of {args.rounds}", file=sys.stderr)
    show = lambda xs, unit: f"{statistics.median(xs):.{unit}f} ({min(xs):.{unit}f} to {max(xs):.{unit}f})"
    print("| | state MB | step s | stall of a checkpoint ms | slower % | seconds lost per checkpoint |")
    print("|---|---|---|---|---|---|")
    for name, samples in rows.items():
        stalls = [1e3 * stall for sample in samples for stall in sample["stalls"]]
        slower = [100 * (sample["step_saved"] / sample["step_plain"] - 1) for sample in samples]
        lost = [(s["step_saved"] - s["step_plain"]) * args.steps / len(s["stalls"]) for s in samples]
        print(f"| {name} | {samples[0]['bytes'] / 1e6:.0f} | {show([s['step_plain'] for s in samples], 2)} | "
              f"{show(stalls, 0)} | {show(slower, 1)} | {show(lost, 2)} |")


if __name__ == "__main__":
    main()
