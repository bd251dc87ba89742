"""How long a job stands still when a rank is killed: Cohort beside torchrun, alternating, in one run.

Usage: benches/recovery.py CLUSTER_BINARY PYTORCH_VENV [--rounds N] [--faults N] [--ranks N]
From `kill -9` of one rank to the start of the first microbatch (forward pass) after it, the same
definition for both; the redone step's own time is not part of it. torchrun runs at its best setting
(TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, --standalone) and loads a state that rank 0 saved to a local file.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from train import HERE, gpt_job, text_file

GUARD = 90.0


def ours(binary, job, ranks, batch, faults, seed):
    command = [binary, "bench", "recovery", job, "--json", "--faults", str(faults), "--seed", str(seed)]
    for setting in (f"resources.ranks={ranks}", f"batch.global={batch * ranks}", f"batch.lanes={ranks}"):
        command += ["--set", setting]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def begun(log):
    if not os.path.exists(log):
        return []
    rows = [line.split() for line in open(log).read().splitlines()]
    return [(int(r), int(s), float(t), int(p)) for r, s, t, p in (row for row in rows if len(row) == 4)]


def peer(venv, text, ranks, batch, faults, seed):
    random.seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        log, state = os.path.join(folder, "log"), os.path.join(folder, "state")
        command = [os.path.join(venv, "bin", "torchrun"), f"--nproc-per-node={ranks}", "--max-restarts=1000", "--standalone",
                   os.path.join(HERE, "peer_recovery.py"), "--data", text,
                   "--batch", str(batch), "--begun", log, "--saved", state]
        environment = dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", OMP_NUM_THREADS="1")
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
        stalls, lost = [], []
        try:
            for _ in range(faults):
                # Some steps of every present process, beyond the first checkpoint.
                deadline = time.time() + GUARD
                while True:
                    rows = begun(log)
                    pids = {row[0]: row[3] for row in rows}
                    steady = len(pids) == ranks and all(
                        sum(row[3] == pid for row in rows) > 6 for pid in pids.values())
                    if steady:
                        break
                    if time.time() > deadline:
                        return stalls, lost, "never came back"
                    time.sleep(0.05)
                before = max(row[1] for row in rows)
                struck = time.time()
                os.kill(pids[random.randrange(ranks)], signal.SIGKILL)
                while True:
                    after = [row for row in begun(log) if row[3] not in pids.values() and row[2] > struck]
                    if len({row[0] for row in after}) == ranks:
                        break
                    if time.time() > struck + GUARD:
                        return stalls, lost, f"hung for more than {GUARD:.0f} s"
                    time.sleep(0.01)
                first = min(row[2] for row in after)
                stalls.append(first - struck)
                lost.append(max(0, before - min(row[1] for row in after)))
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        return stalls, lost, ""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("venv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", type=int, default=10, help="of Cohort in each round")
    parser.add_argument("--peer-faults", type=int, default=4, help="of torchrun in each round")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    mine, theirs, ratios, notes, lost, steps_lost, redone = [], [], [], [], [], 0, []
    with tempfile.TemporaryDirectory() as folder:
        text = text_file(folder)
        job = gpt_job(folder, text)
        for number in range(args.rounds):
            report = ours(args.binary, job, args.ranks, args.batch, args.faults, number + 1)
            stalls = [sample["stall"] for sample in report["samples"]]
            mine += stalls
            redone += [sample["next_step"] for sample in report["samples"]]
            steps_lost = max(steps_lost, report["steps_lost_max"])
            if report["survivors_lost"]:
                notes.append(f"{report['survivors_lost']} survivors were lost")
            other, other_lost, note = peer(args.venv, text, args.ranks, args.batch, args.peer_faults, number + 1)
            theirs += other
            lost += other_lost
            if note:
                notes.append(f"torchrun {note}")
            if other:
                ratios.append(statistics.median(other) / statistics.median(stalls))
            print(f"round {number + 1}: Cohort {statistics.median(stalls):.3f} s, torchrun "
                  f"{statistics.median(other) if other else float('nan'):.3f} s", file=sys.stderr)
    show = lambda xs: f"{statistics.median(xs):.2f} ({min(xs):.2f}-{max(xs):.2f}), {len(xs)} faults" if xs else "-"
    print("| ranks | Cohort s | torchrun s | ratio | steps lost, Cohort / torchrun | redone step s |")
    print("|---|---|---|---|---|---|")
    print(f"| {args.ranks} | {show(mine)} | {show(theirs)} | "
          f"**{statistics.median(ratios) if ratios else float('nan'):.1f}** | "
          f"{steps_lost} / {max(lost) if lost else '-'} | {statistics.median(redone):.2f} |")
    for note in notes:
        print(f"- {note}")


if __name__ == "__main__":
    main()
