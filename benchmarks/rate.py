"""Crops a second and core of one file or folder, by names that every checkout has: what bench_loaders --against starts.

PYTHONPATH=CHECKOUT python benchmarks/rate.py DATA WORKERS SECONDS      prints one JSON object
"""

import itertools
import json
import resource
import sys
import time

from fastrot import native
from fastrot.assemble import open_loader
from fastrot.config import RandomResized
from fastrot.core import View


def cpu_seconds() -> float:
    """User and system time of this process and of its children that have ended."""
    each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in each)


def main(data: str, workers: str, seconds: str) -> None:
    view = View(crops=(RandomResized(size=224),))
    loader = open_loader(data, view, batch=64, workers=int(workers), enlarge=True)
    for _ in loader.epoch(0):
        pass  # files into the page cache, code into memory
    begun, used, images = time.perf_counter(), cpu_seconds(), 0
    for epoch in itertools.count(1):
        images += sum(len(batch.index) for batch in loader.epoch(epoch))
        if time.perf_counter() - begun > float(seconds):
            break
    wall, used = time.perf_counter() - begun, cpu_seconds() - used
    found = {"images_per_s": images / wall, "per_core": images / used, "native": native.why()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
