"""The peer of `cluster bench train`: the same models, data and steps in PyTorch DDP over gloo.

Run under torchrun, or alone for one process. Prints one JSON line: median step time, samples and
tokens a second, peak memory of all processes, and the time from the start of the command (given as
--since, seconds since the epoch) to the end of the first step.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import struct
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, c))


class Layer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, layers, width, heads, length, vocabulary):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.token(tokens) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)).flatten(0, 1)


def groups(channels):
    return next(g for g in range(8, 0, -1) if channels % g == 0)


def conv(inputs, outputs, size, stride):
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first, self.norm1 = conv(inputs, outputs, 3, stride), nn.GroupNorm(groups(outputs), outputs)
        self.second, self.norm2 = conv(outputs, outputs, 3, 1), nn.GroupNorm(groups(outputs), outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        y = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(y)) + self.shortcut(x))


def cnn(size, width, stages, classes):
    stem = 2 if size >= 16 else 1
    parts = [conv(1, width, 3, stem), nn.GroupNorm(groups(width), width), nn.ReLU()]
    inputs = width
    for stage in range(stages):
        outputs = width << stage
        parts.append(Residual(inputs, outputs, 2 if stage > 0 else 1))
        inputs = outputs
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*parts)


def digits(path):
    with gzip.open(path, "rt") as file:
        rows = [line.split(",") for line in file.read().split("\n")[1:] if line]
    images = np.array([[float(v) for v in row[:-1]] for row in rows], dtype=np.float32)
    labels = np.array([int(row[-1]) for row in rows])
    return images.reshape(-1, 1, 8, 8), labels


def idx(path):
    with gzip.open(path, "rb") as file:
        magic = file.read(4)
        shape = struct.unpack(">" + "I" * magic[3], file.read(4 * magic[3]))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=["gpt", "digits", "fashion"])
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--batch", type=int, required=True, help="samples per process and step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--since", type=float, default=time.time())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world > 1:
        dist.init_process_group("gloo")
    if args.model == "gpt":
        net = Gpt(6, 384, 6, 128, 256)
        text = np.frombuffer(open(args.data, "rb").read(), dtype=np.uint8).astype(np.int64)
        windows = (len(text) - 1) // 128
        order = np.random.default_rng(1).permutation(windows)
        def batch(step):
            at = (step * world + rank) * args.batch
            chosen = order[np.arange(at, at + args.batch) % windows]
            rows = np.stack([text[w * 128 : w * 128 + 129] for w in chosen])
            return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy()).flatten()
    else:
        if args.model == "digits":
            images, labels = digits(args.data)
            net = cnn(8, 16, 2, 10)
        else:
            images = idx(args.data).astype(np.float32)[:, None]
            labels = idx(args.data.replace("images-idx3", "labels-idx1")).astype(np.int64)
            net = cnn(28, 16, 3, 10)
        images = (images - images.mean()) / images.std()
        order = np.random.default_rng(1).permutation(len(images))
        def batch(step):
            at = (step * world + rank) * args.batch
            chosen = order[np.arange(at, at + args.batch) % len(images)]
            return torch.from_numpy(images[chosen]), torch.from_numpy(labels[chosen])
    model = nn.parallel.DistributedDataParallel(net) if world > 1 else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99), fused=True)
    times, first = [], 0.0
    for step in range(args.warmup + args.steps):
        begin = time.perf_counter()
        inputs, targets = batch(step)
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        loss.item()
        times.append(time.perf_counter() - begin)
        if step == 0:
            first = time.time() - args.since
    peak = torch.tensor([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0])
    if world > 1:
        dist.all_reduce(peak)
    median = statistics.median(times[args.warmup :])
    samples = args.batch * world / median
    if rank == 0:
        print(json.dumps({
            "step_median": median, "steps_per_second": 1 / median, "samples_per_second": samples,
            "tokens_per_second": samples * 128 if args.model == "gpt" else 0,
            "start_to_first_step": first, "memory_bytes": peak.item(),
            "parameters": sum(p.numel() for p in net.parameters()),
        }), flush=True)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
