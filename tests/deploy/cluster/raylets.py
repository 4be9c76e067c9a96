"""A Ray cluster of several raylets on this machine, in a process of its own: Ray is noisy and ends whoever loses it.

``python -m tests.deploy.cluster.raylets`` obeys one JSON list a line, such as ``["add", 2, "127.0.0.2"]``, and answers
each with one line of JSON. At the end of its input it stops everything.
"""

import json
import os
import signal
import sys
from typing import Any

from ray.cluster_utils import Cluster


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    head = {"num_cpus": 0, "include_dashboard": False, "dashboard_host": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes: dict[str, Any] = {}
    answers.write(json.dumps({"address": cluster.address}) + "\n")
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "add":
            cpus, *ips = arguments
            for ip in ips:  # they start side by side
                nodes[ip] = cluster.add_node(num_cpus=cpus, node_ip_address=ip, wait=False)
            for ip in ips:
                cluster._wait_for_node(nodes[ip])
        elif command == "kill":
            _kill(nodes.pop(arguments[0]), ["raylet"])
        elif command == "kill-head":
            _kill(cluster.head_node, ["gcs_server", "raylet"])
        answers.write("{}\n")
    cluster.shutdown()


def _kill(node: Any, kinds: list[str]) -> None:
    """SIGKILL, and collect: a zombie would still look alive to its children."""
    for kind in kinds:
        for info in node.all_processes.get(kind, []):
            os.kill(info.process.pid, signal.SIGKILL)
            info.process.wait()


if __name__ == "__main__":
    main()
