"""Cohort beside PyTorch DDP + gloo: the same models, data and steps, alternating, in one run.

Usage: benches/train.py CLUSTER_BINARY PYTORCH_VENV [--rounds N] [--only gpt,digits,fashion]
Prints a Markdown table of medians and ratios (Cohort / PyTorch; above 1 is faster than the peer).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FASHION = "/usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz"
# (ranks, threads per rank)
SHAPES = [(1, 1), (1, 2), (2, 1)]


def gpt_job(folder, text):
    path = os.path.join(folder, "gpt.toml")
    with open(path, "w") as file:
        file.write(f"""name = "gpt"
algorithm = "transformer"
[channels]
train = {{ uri = "file://{text}" }}
[hyperparameters]
layers = 6
width = 384
heads = 6
sequence_length = 128
[stop]
max_steps = 10
""")
    return path


def text_file(folder):
    """Real text that every machine with these sources has: our own."""
    path = os.path.join(folder, "text.txt")
    with open(path, "wb") as out:
        for folder_path, folders, files in os.walk(ROOT):
            folders[:] = sorted(f for f in folders if f not in ("target", ".git", ".cohort"))
            for name in sorted(files):
                if name.endswith((".rs", ".md")):
                    with open(os.path.join(folder_path, name), "rb") as file:
                        out.write(file.read())
    return path


def ours(binary, job, ranks, threads, batch, lanes, steps):
    command = [binary, "bench", "train", job, "--json", "--steps", str(steps)]
    # One lane per rank is one forward pass of the whole batch, as the peer does it.
    for setting in (f"resources.ranks={ranks}", f"resources.threads_per_rank={threads}",
                    f"batch.global={batch * ranks}", f"batch.lanes={lanes}"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    report = json.loads(done.stdout.splitlines()[-1])
    report["memory_bytes"] = report["memory_bytes_rank0"] * ranks
    return report


def theirs(venv, model, data, ranks, threads, batch, steps):
    script = [os.path.join(HERE, "peer_train.py"), model, "--data", data, "--batch", str(batch),
              "--threads", str(threads), "--steps", str(steps), "--since", str(time.time())]
    if ranks == 1:
        command = [f"{venv}/bin/python", *script]
    else:
        command = [f"{venv}/bin/torchrun", "--standalone", f"--nproc-per-node={ranks}", *script]
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{command}: {done.stderr}")
    return json.loads([l for l in done.stdout.splitlines() if l.startswith("{")][-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="gpt,digits,fashion")
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="cohort-bench-")
    text = text_file(folder)
    # name: job, data for the peer, samples per rank, steps, what a sample rate is called
    cases = {
        "gpt": (gpt_job(folder, text), text, 8, 8, "tokens_per_second"),
        "digits": (f"{ROOT}/examples/digits/job.toml", f"{ROOT}/examples/digits/train.csv.gz", 64,
                   150, "samples_per_second"),
        "fashion": (f"{ROOT}/examples/fashion-mnist/job.toml", FASHION, 64, 60,
                    "samples_per_second"),
    }
    print("| model | ranks × threads | Cohort /s | PyTorch /s | ratio (spread) | memory MB, "
          "Cohort / PyTorch | to first step s, Cohort / PyTorch |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in args.only.split(","):
        job, data, batch, steps, rate = cases[name]
        if not os.path.exists(data):
            print(f"| {name} | SKIPPED: `{data}` is not here | | | | | |")
            continue
        for ranks, threads in SHAPES:
            # digits and fashion keep one global batch; GPT has 8 samples on every rank.
            share = batch if name == "gpt" else batch // ranks
            a, b = [], []
            for _ in range(args.rounds):
                a.append(ours(args.binary, job, ranks, threads, share, ranks, steps))
                b.append(theirs(args.venv, name, data, ranks, threads, share, steps))
            ratios = [x[rate] / y[rate] for x, y in zip(a, b)]
            middle = lambda runs, key: statistics.median(run[key] for run in runs)
            print(f"| {name} | {ranks} × {threads} | {middle(a, rate):.0f} | {middle(b, rate):.0f} "
                  f"| **{statistics.median(ratios):.2f}** ({min(ratios):.2f}–{max(ratios):.2f}) "
                  f"| {middle(a, 'memory_bytes') / 1e6:.0f} / {middle(b, 'memory_bytes') / 1e6:.0f} "
                  f"| {middle(a, 'start_to_first_step'):.2f} / "
                  f"{middle(b, 'start_to_first_step'):.2f} |", flush=True)


if __name__ == "__main__":
    main()
