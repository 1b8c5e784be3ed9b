"""Tickets at full size: found, certified, saved and verified, with times and memory.

    python benchmarks/lottery/tickets.py [--threads 2] [--only NAME]

Targets: a 784-300-100-10 ReLU MLP at weight error 1e-2 (shared-pool LogTicket and
SubsetSumTicket), and the published experiment of Pensia et al. (784-500-10 without biases, 397,000
weights, the best subset of n = 21 products for every weight; 77,266 s on 36 cores with a MIP
solver there). With Debian's dataset-fashion-mnist installed the first network is trained on it,
else its weights are He-normal. Writes benchmarks/results/lottery-tickets.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.files import write_json
from secateur.lottery import LogTicket, MaskedNetwork, SubsetSumTicket, certify, save_ticket
from secateur.lottery.certificate import bound_error
from secateur.lottery.reading import from_module
from secateur.lottery.targets import he_mlp, train_mlp
from secateur.lottery.verify import verify_ticket

ROOT = Path(__file__).parents[2]
FASHION = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))


def fashion(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1], float32 (n, 784), and labels."""
    images = gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    x = torch.from_numpy(np.frombuffer(images, np.uint8).copy()).view(-1, 784).float() / 255
    return x, torch.from_numpy(np.frombuffer(labels, np.uint8).copy()).long()


def cases() -> dict[str, tuple]:
    """Name -> (target's name, module, construction, test data or None)."""
    trained = FASHION.exists()
    if trained:
        x, y = fashion("train")
        model, name = (
            train_mlp(x[:20000], y[:20000], (784, 300, 100, 10), epochs=3),
            "fashion-mnist",
        )
    else:
        model, name = he_mlp((784, 300, 100, 10)), "he-normal"
    test = fashion("t10k") if trained else None
    published = he_mlp((784, 500, 10))
    return {
        "log-shared": (f"784-300-100-10 {name}", model, LogTicket(weight_eps=1e-2), test),
        "subset-sum": (f"784-300-100-10 {name}", model, SubsetSumTicket(weight_eps=1e-2), test),
        "subset-sum-n21": (
            "784-500-10 he-normal, 397,000 weights",
            published,
            SubsetSumTicket(weight_eps=1e-2, products=21, exact=True),
            None,
        ),
    }


def measure(name: str, case: tuple) -> dict:
    """One ticket from nothing to a verified file."""
    label, model, construction, test = case
    target = from_module(model)
    record = {"name": name, "target": label, "weights": target.weights}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        record[f"{step}_seconds"] = time.perf_counter() - wall
        record[f"{step}_cpu_seconds"] = time.process_time() - cpu
        return result

    ticket = timed("find", lambda: construction.fit(target, (0, 1), seed=0))
    certificate = timed("certify", lambda: certify(ticket))
    tight = timed("zonotope", lambda: bound_error(ticket.fold(), ticket.box, "zonotope"))
    record["zonotope_bound"] = float(tight.max())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket.safetensors"
        save_ticket(ticket, path, certificate)
        record["file_bytes"] = path.stat().st_size
        record["verified"] = timed("verify", lambda: verify_ticket(path, target).holds)
    size = ticket.size()
    record |= {
        "size": asdict(size),
        "random_per_weight": size.random / size.target,
        "neurons_per_weight": size.neurons_per_weight,
        "out_edges": sum(len(part.output) for part in ticket.layers),
        "history": ticket.history["layers"],
        "certificate": {k: v for k, v in certificate.record().items() if k != "per_output"},
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    if test is not None:
        x, y = test
        with torch.no_grad():
            dense = (model(x).argmax(1) == y).double().mean()
        masked = MaskedNetwork(ticket).run(x)
        record["accuracy_dense"] = float(dense)
        record["accuracy_ticket"] = float((masked.argmax(1) == y).double().mean())
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    # Compile outside the clock, as a user's second run would.
    warm = he_mlp((4, 3))
    for construction in (LogTicket(weight_eps=0.1), SubsetSumTicket(weight_eps=0.1)):
        construction.fit(warm)
    results = []
    for name, case in cases().items():
        if arguments.only in (None, name):
            results.append(measure(name, case))
            print(json.dumps(results[-1], indent=1), flush=True)
    write_json(
        ROOT / "benchmarks" / "results" / "lottery-tickets.json",
        {
            "command": "python " + " ".join([*sys.argv]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared with other work",
            "threads": arguments.threads,
            "torch": torch.__version__,
            "load_average": os.getloadavg(),
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
