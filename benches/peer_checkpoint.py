"""The peer of `cluster bench checkpoint`: the same model saved by PyTorch's distributed checkpoint (DCP),
asynchronously, every so many steps.

One process. Prints one JSON line: how long each call held up the steps, the mean time from step to step
with and without saving, and the state's size.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F

from peer_train import Gpt

WARMUP = 3


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    parser.add_argument("--heads", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    net = Gpt(args.layers, args.width, args.heads, 128, 256)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    text = np.frombuffer(open(args.data, "rb").read(), dtype=np.uint8).astype(np.int64)
    windows = (len(text) - 1) // 128
    order = np.random.default_rng(1).permutation(windows)

    def step(number):
        chosen = order[np.arange(number * args.batch, (number + 1) * args.batch) % windows]
        rows = np.stack([text[w * 128 : w * 128 + 129] for w in chosen])
        inputs, targets = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()).flatten()
        loss = F.cross_entropy(net(inputs), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        loss.item()

    def run(saves):
        folder = tempfile.mkdtemp(prefix="peer-checkpoint-")
        calls, pending, begun = [], None, None
        for number in range(1, WARMUP + args.steps + 1):
            step(number)
            if saves and number % args.every == 0 and number < WARMUP + args.steps:
                at = time.perf_counter()
                if pending is not None:
                    pending.result()
                state = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
                pending = dcp.async_save(state, checkpoint_id=os.path.join(folder, str(number)))
                calls.append(time.perf_counter() - at)
            if number == WARMUP:
                begun = time.perf_counter()
        mean = (time.perf_counter() - begun) / args.steps
        if pending is not None:
            pending.result()
        shutil.rmtree(folder)
        return mean, calls

    plain, _ = run(False)
    saved, calls = run(True)
    print(json.dumps({
        "step_plain": plain, "step_saved": saved, "stalls": calls,
        "bytes": 3 * 4 * sum(p.numel() for p in net.parameters()),
    }))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
