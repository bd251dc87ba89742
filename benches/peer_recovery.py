"""The peer of `cluster bench recovery`: the same GPT in PyTorch DDP over gloo, under torchrun.

Every rank appends "rank step seconds-since-the-epoch pid" to --begun when a step's first forward pass
begins. Rank 0 saves model and optimiser every --every steps; a restarted gang loads them and goes on.
"""

import argparse
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from peer_train import Gpt


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch", type=int, required=True, help="samples per process and step")
    parser.add_argument("--begun", required=True)
    parser.add_argument("--saved", required=True)
    parser.add_argument("--every", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    net = Gpt(6, 384, 6, 128, 256)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.001)
    step = 0
    if os.path.exists(args.saved):
        saved = torch.load(args.saved)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    model = torch.nn.parallel.DistributedDataParallel(net)
    text = np.frombuffer(open(args.data, "rb").read(), dtype=np.uint8).astype(np.int64)
    windows = (len(text) - 1) // 128
    order = np.random.default_rng(1).permutation(windows)
    with open(args.begun, "a", buffering=1) as log:
        while True:
            at = (step * world + rank) * args.batch
            chosen = order[np.arange(at, at + args.batch) % windows]
            rows = np.stack([text[w * 128 : w * 128 + 129] for w in chosen])
            inputs = torch.from_numpy(rows[:, :-1].copy())
            targets = torch.from_numpy(rows[:, 1:].copy()).flatten()
            log.write(f"{rank} {step} {time.time()} {os.getpid()}\n")
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(inputs), targets).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % args.every == 0 and rank == 0:
                state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state, args.saved + ".new")
                os.replace(args.saved + ".new", args.saved)


if __name__ == "__main__":
    main()
