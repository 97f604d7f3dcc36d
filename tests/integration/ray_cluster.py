"""A Ray cluster on this machine, in a process of its own: prints its address, then obeys lines.

``add N`` adds a node with N cores, ``kill`` ends an actor with SIGKILL and prints its process, and
``actors`` prints the number of actors. Every line is answered by one.
"""

import logging
import os
import signal
import sys

import psutil
from ray.cluster_utils import Cluster

MEMORY_BYTES = 100 * 2**20


def actors():
    """Return the processes of actors that hold a bundle."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [""])[0].startswith("ray::BatchActor")
        and os.getpid() in [parent.pid for parent in process.parents()]
    ]


def main():
    node = {"object_store_memory": MEMORY_BYTES}
    head = {**node, "num_cpus": int(sys.argv[1]), "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        verb, _, number = line.strip().partition(" ")
        answer = "done"
        if verb == "add":
            cluster.add_node(num_cpus=int(number), **node)
        elif verb == "kill":
            process = actors()[0]
            process.send_signal(signal.SIGKILL)
            process.wait(60)
            answer = str(process.pid)
        elif verb == "actors":
            answer = str(len(actors()))
        print(answer, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    main()
