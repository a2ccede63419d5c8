# SPDX-License-Identifier: Apache-2.0
"""The hosts of a Ray cluster: which can be reached, and how many workers they hold.

Ray counts on a lost host until its health checks have failed, and a placement that it tries there meanwhile waits as
long. So hosts are knocked at before workers are placed, and those that do not open are left out.
"""
from __future__ import annotations

import inspect
import socket
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["HEALTH_CHECKS", "NODE_ID_LABEL", "describe_hosts", "place_off", "placeable_cpus", "unreachable_hosts"]

HEALTH_CHECKS = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "500",
                 "RAY_health_check_timeout_ms": "500", "RAY_health_check_failure_threshold": "3"}
"""Variables of all of a cluster's processes with which Ray takes a host that answers nothing for dead after 3 s. Not
for a Ray of one host: there is none to go on with, and a busy one may be slow to answer."""
KNOCK_S = 1.0
KNOCKS = 32
"""At the same time."""
NODE_ID_LABEL = "ray.io/node-id"


def unreachable_hosts() -> set[str]:
    """Ids of Ray's nodes that Ray believes alive and whose port takes no connection within KNOCK_S.

    None where no port opens at all: this process is then outside of the cluster's network, and cannot know.
    """
    nodes = _alive()
    with ThreadPoolExecutor(min(len(nodes), KNOCKS) or 1, "qgnn-knock") as threads:
        closed = {node["NodeID"] for node, there in zip(nodes, threads.map(_opens, nodes)) if not there}
    return closed if len(closed) < len(nodes) else set()


def placeable_cpus(size: int, wanted: float, wait_s: float, without: Collection[str] = ()) -> float:
    """CPUs a worker, at most `wanted`, with which `size` workers fit the hosts that are there.

    Hosts may come back: they are waited for, `wait_s` seconds at most, before workers get less than they want.

    Args: without: ids of Ray's nodes that do not count.
    Returns: 0 where there is no host at all.
    """
    until = time.monotonic() + wait_s
    while True:
        hosts = [node["Resources"].get("CPU", 0.0) for node in _alive() if node["NodeID"] not in without]
        if fit(hosts, wanted) >= size:
            return wanted
        if time.monotonic() >= until:
            break
        time.sleep(0.2)
    shares = {int(100 * host / k) / 100 for host in hosts for k in range(1, size + 1)}
    fitting = [share for share in shares if 0 < share <= wanted and fit(hosts, share) >= size]
    return max(fitting, default=0.0)


def fit(hosts: Sequence[float], cpus: float) -> int:
    """Workers of so many CPUs that the hosts hold."""
    return sum(int(host / cpus + 1e-9) for host in hosts)


def place_off(without: Collection[str], size: int) -> dict[str, Any]:
    """What to tell `ray.util.placement_group`, so that none of `size` bundles goes to these nodes.

    Ray before 2.49 has no word for it; a worker that is placed there in spite of it is lost again, and placed anew.
    """
    from ray.util.placement_group import placement_group

    if not without or "bundle_label_selector" not in inspect.signature(placement_group).parameters:
        return {}
    return {"bundle_label_selector": [{NODE_ID_LABEL: f"!in({','.join(sorted(without))})"}] * size}


def describe_hosts() -> str:
    """CPUs of the cluster, all and free, by host."""
    free: dict[str, dict[str, float]] = {}
    try:
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()  # type: ignore[no-untyped-call]
    except (ImportError, AttributeError):
        # Not a public interface of Ray: without it, totals have to do.
        pass
    hosts = []
    for node in _alive():
        total = node["Resources"].get("CPU", 0.0)
        left = f"{free[node['NodeID']].get('CPU', 0.0):g} free of " if node["NodeID"] in free else ""
        gpus = f", {node['Resources']['GPU']:g} GPU" if node["Resources"].get("GPU") else ""
        hosts.append(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}) {left}{total:g} CPU{gpus}")
    return f"the cluster has {len(hosts)} host(s): {', '.join(hosts)}"


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def _opens(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=KNOCK_S).close()
    except OSError:
        return False
    return True
