"""How soon a host that is cut off is found: a network namespace whose link goes down under a training job.

Usage: benches/cut.py CLUSTER_BINARY [--faults N]      (needs root and iproute2)
A coordinator and a worker here, a worker in a network namespace, one rank on each, the small transformer. The
link is taken down, and brought up when the job goes on without the rank; the rank joins again. Prints the time
from the link's end until the next generation is recorded, and until its first step begins.
"""

import argparse
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NAMESPACE, LINK, HERE, THERE, PORT = "cohort-cut", "cohort-cut0", "10.213.251.1", "10.213.251.2", 7641
GUARD = 120.0


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)


def config(folder, name, more=""):
    path = os.path.join(folder, f"{name}.toml")
    with open(path, "w") as file:
        file.write(f"""[cluster]
id = "cut"
dir = "{folder}/{name}"
token_file = "{folder}/tls/token"
[coordinator]
node = 1
members = [{{ node = 1, address = "{HERE}:{PORT}" }}]
[store]
uri = "file://{folder}/store"
[tls]
ca = "{folder}/tls/ca.pem"
certificate = "{folder}/tls/host.pem"
key = "{folder}/tls/host.key"
{more}""")
    return path


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("binary")
    parser.add_argument("--faults", type=int, default=10)
    args = parser.parse_args()
    started, found, resumed = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            ip("netns", "add", NAMESPACE)
            ip("link", "add", LINK, "type", "veth", "peer", "name", "inside", "netns", NAMESPACE)
            ip("address", "add", f"{HERE}/24", "dev", LINK)
            ip("link", "set", LINK, "up")
            ip("-n", NAMESPACE, "address", "add", f"{THERE}/24", "dev", "inside")
            ip("-n", NAMESPACE, "link", "set", "inside", "up")
            ip("-n", NAMESPACE, "link", "set", "lo", "up")
            run = lambda *command, prefix=(): started.append(subprocess.Popen(
                [*prefix, args.binary, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            subprocess.run([args.binary, "certs", "--output", f"{folder}/tls"], check=True, stdout=subprocess.DEVNULL)
            client = config(folder, "c1")
            run("coordinator", "--config", client)
            for name, address, prefix in (("near", HERE, ()), ("far", THERE, ("ip", "netns", "exec", NAMESPACE))):
                path = config(folder, name, f'[worker]\ndata_address = "{address}"\n')
                run("worker", "--slots", "1", "--name", name, "--config", path, prefix=prefix)
            workers = lambda: subprocess.run([args.binary, "workers", "--json", "--config", client],
                                             capture_output=True, text=True).stdout.count('"attached":true')
            while workers() < 2:
                time.sleep(0.2)
            sets = ["hyperparameters.width=32", "hyperparameters.heads=2", "hyperparameters.sequence_length=32",
                    "batch.global=16", "evaluate.every_steps=0", "checkpoint.every_steps=0", "stop.max_steps=1000000",
                    "recovery.max_failures=1000", "resources.ranks={ min = 1, max = 2 }"]
            submit = [args.binary, "submit", os.path.join(ROOT, "examples/rust-lm/job.toml"), "--json", "--follow",
                      "--config", client]
            for setting in sets:
                submit += ["--set", setting]
            follow = subprocess.Popen(submit, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            started.append(follow)
            events = queue.Queue()
            threading.Thread(target=lambda: [events.put((time.time(), json.loads(line))) for line in follow.stdout],
                             daemon=True).start()

            def until(wanted):
                while True:
                    at, event = events.get(timeout=GUARD)
                    if wanted(event):
                        return at, event

            def steady(ranks):
                _, status = until(lambda e: e.get("event") == "status" and e["phase"] == "running" and len(e["gang"]) == ranks)
                for _ in range(20):
                    until(lambda e: e.get("event") == "step")
                return status["generation"]

            for number in range(args.faults):
                generation = steady(2)
                struck = time.time()
                ip("-n", NAMESPACE, "link", "set", "inside", "down")
                at, _ = until(lambda e: e.get("event") == "status" and e["generation"] > generation)
                found.append(at - struck)
                until(lambda e: e.get("event") == "status" and e["phase"] == "running" and len(e["gang"]) == 1)
                at, event = until(lambda e: e.get("event") == "step")
                resumed.append(at - event["time"]["total"] - struck)
                ip("-n", NAMESPACE, "link", "set", "inside", "up")
                print(f"{number + 1} of {args.faults}: found {found[-1]:.2f} s, going on {resumed[-1]:.2f} s", file=sys.stderr)
        finally:
            for process in reversed(started):
                process.kill()
                process.wait()
            subprocess.run(["ip", "link", "delete", LINK], stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "delete", NAMESPACE], stderr=subprocess.DEVNULL)
    show = lambda xs: f"{statistics.median(xs):.2f} ({min(xs):.2f}-{max(xs):.2f})"
    print(f"cut off {args.faults} times: found after {show(found)} s, going on after {show(resumed)} s")
    sys.exit(1 if max(found) > 3 else 0)


if __name__ == "__main__":
    main()
