# SPDX-License-Identifier: Apache-2.0
"""Run jobs on a Ray cluster, for `train_subjects.py --ray_address`; nothing else here needs Ray."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import RayError

PATIENCE = 30  # seconds in which a cluster must answer
LOCAL = "local"  # the address at which Ray starts a cluster of its own, on this machine


@contextmanager
def joined(address: str) -> Iterator[dict[str, float]]:
    """Ray at an address, with what the cluster has of "CPU" and "GPU"; `ValueError` where none can be joined.

    A Ray that starts here listens to nothing outside, and no Ray sends anything home.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default its workers give way to everything else
    options = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options["include_dashboard"] = False
    watchdog = threading.Timer(PATIENCE, give_up, [address])  # init would wait for ten minutes, deaf
    if address != LOCAL:
        watchdog.start()
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"--ray_address {address}: {error}") from error
    finally:
        watchdog.cancel()
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def give_up(address: str) -> None:
    """End the program: there is no cluster."""
    sentence = f"--ray_address {address}: no Ray cluster answers there within {PATIENCE} s; check host and port"
    print(f"train_subjects.py: error: {sentence}, or leave the flag out", file=sys.stderr, flush=True)
    os._exit(2)


def run_all(run: Callable, jobs: list, cpus: int, gpus: float, retries: int) -> Iterator[tuple]:
    """`run(job)` for each job in a worker with so many cores and GPUs; (job, result) in the order in which they end.

    Where a worker was killed or broke, which Ray tries again, the result is the error's last lines.
    """
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(run)
    pending = {remote.remote(job): job for job in jobs}
    while pending:
        (ready,), _ = ray.wait(list(pending))
        job = pending.pop(ready)
        try:
            yield job, ray.get(ready)
        except RayError as error:
            yield job, "\n".join(str(error).splitlines()[-15:])
