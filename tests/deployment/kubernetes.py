# SPDX-License-Identifier: Apache-2.0
"""Kubernetes files: fields by a schema derived from KubeRay's own, then what we ask of Ray's pods and jobs."""
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from qgnn_dist.cluster.actor import WorkerActor

from .commands import parse_job, parse_ray_start, parse_shown
from .dockerfile import jobs_folder, user
from .faults import differ, explain
from .project import GUARDED_PORTS, HEALTH, METRICS_PORT, RAY, ROOT, VERSION

__all__ = ["check_kubernetes"]

_SCHEMA = Draft202012Validator(json.loads(Path(__file__).with_name("kuberay.schema.json").read_text()))
_IMAGE = (ROOT / "cluster_configs" / "Dockerfile").read_text()
_CLAIMS = [d["metadata"]["name"] for d in yaml.safe_load_all((ROOT / "cluster_configs" / "kubernetes.yaml").read_text())
           if d["kind"] == "PersistentVolumeClaim"]
_SHARE = "/shared"
_UNITS = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def check_kubernetes(documents: list[Any], text: str) -> list[str]:
    """Faults of one file's objects, each `KIND PATH: got X, expected Y`."""
    faults: list[str] = []
    for document in documents:
        kind = document.get("kind", "?") if isinstance(document, dict) else "?"
        found = [line for error in _SCHEMA.iter_errors(document) for line in explain(error)]
        if not found:
            found = {"RayCluster": _cluster_object, "RayJob": _job, "PersistentVolumeClaim": _claim,
                     "NetworkPolicy": _policy}[kind](document)
        faults += [f"{kind} {line}" for line in dict.fromkeys(found)]
    return faults + parse_shown(text)


def quantity(given: str | int) -> float:
    """Bytes, or CPUs, of a Kubernetes quantity."""
    found = re.fullmatch(r"([\d.]+)(\w*)", str(given))
    return float(found[1]) * _UNITS[found[2]] if found and found[2] in _UNITS else 0.0


def _cluster_object(document: dict[str, Any]) -> list[str]:
    return _cluster(document["spec"], "spec")


def _claim(document: dict[str, Any]) -> list[str]:
    return differ("spec.accessModes", document["spec"]["accessModes"], ["ReadWriteMany"])


def _policy(document: dict[str, Any]) -> list[str]:
    """Only pods of Ray's may reach all ports."""
    faults = differ("spec.podSelector.matchLabels", document["spec"]["podSelector"].get("matchLabels"),
                    {"ray.io/is-ray-node": "yes"})
    for i, rule in enumerate(document["spec"].get("ingress") or []):
        path, ports = f"spec.ingress[{i}]", [port.get("port") for port in rule.get("ports") or []]
        own = rule.get("from") == [{"podSelector": document["spec"]["podSelector"]}]
        if not rule.get("from"):
            faults.append(f"{path}.from: got everybody, expected pods or namespaces")
        if not own and (not ports or not set(ports) <= set(GUARDED_PORTS)):
            faults.append(f"{path}.ports: got {ports or 'all'}, expected of {GUARDED_PORTS}, but for Ray's own pods")
    return faults


def _job(document: dict[str, Any]) -> list[str]:
    """A job whose command exists, whose files lie on the share, and whose workers fit the cluster."""
    spec = document["spec"]
    missing = {"entrypoint", "rayClusterSpec"} - spec.keys()
    if missing:
        return [f"spec.{name}: missing, expected this field" for name in sorted(missing)]
    faults = _cluster(spec["rayClusterSpec"], "spec.rayClusterSpec")
    parameters, settings, refused = parse_job(spec["entrypoint"], jobs_folder(_IMAGE))
    if refused or settings is None:
        return [*faults, f"spec.entrypoint: got {spec['entrypoint']!r}, expected {refused}"]
    if not str(parameters.get("out")).startswith((_SHARE + "/", "s3://")):
        faults.append(f"spec.entrypoint: got --out {parameters.get('out')}, expected a folder under {_SHARE}, or s3://…")
    room, each, parts = 0.0, settings.cluster.cpus_per_worker, parameters.get("parts") or 0
    for group in spec["rayClusterSpec"].get("workerGroupSpecs") or []:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        room += group["minReplicas"] * (quantity(limits.get("cpu", 0)) // each)
    if parts > room:
        faults.append(f"spec.entrypoint: got {parts} parts of {each:g} CPUs, expected at most the "
                      f"{room:.0f} that minReplicas have room for")
    if not spec.get("shutdownAfterJobFinishes"):
        faults.append("spec.shutdownAfterJobFinishes: got false, expected true: the cluster costs on")
    return faults


def _cluster(spec: dict[str, Any], path: str) -> list[str]:
    faults = differ(f"{path}.rayVersion", spec.get("rayVersion"), RAY)
    auth = spec.get("authOptions") or {}
    faults += differ(f"{path}.authOptions.mode", auth.get("mode"), "token")
    faults += _pods(spec["headGroupSpec"], f"{path}.headGroupSpec", auth.get("secretName"))
    for i, group in enumerate(spec.get("workerGroupSpecs") or []):
        at = f"{path}.workerGroupSpecs[{i}]"
        if not group["minReplicas"] <= group.get("replicas", 0) <= group["maxReplicas"]:
            faults.append(f"{at}.replicas: got {group.get('replicas', 0)}, expected {group['minReplicas']} to "
                          f"{group['maxReplicas']}")
        faults += _pods(group, at, auth.get("secretName"))
    return faults


def _pods(group: dict[str, Any], path: str, secret: str | None) -> list[str]:
    start, pod = group["rayStartParams"], group["template"]["spec"]
    options, refused = parse_ray_start([f"--{name}={value}" for name, value in start.items()])
    if refused:
        return [f"{path}.rayStartParams: got {refused!r}, expected options of `ray start`"]
    at, container = f"{path}.template.spec", pod["containers"][0]
    box = f"{at}.containers[0]"
    faults = differ(f"{box}.image", container["image"].rsplit("/", 1)[-1], f"qgnn-dist:{VERSION}-ray{RAY}")
    faults += differ(f"{path}.rayStartParams.metrics-export-port", options["metrics_export_port"], METRICS_PORT)
    named = {port.get("name"): port["containerPort"] for port in container.get("ports") or []}
    faults += differ(f"{box}.ports of name metrics", named.get("metrics"), METRICS_PORT)
    security = pod.get("securityContext") or {}
    faults += differ(f"{at}.securityContext.runAsNonRoot", security.get("runAsNonRoot"), True)
    faults += differ(f"{at}.securityContext.runAsUser", str(security.get("runAsUser")), user(_IMAGE))
    return (faults + _resources(container["resources"], f"{box}.resources") + _environment(container, box, secret)
            + _volumes(pod, at, options["object_store_memory"]) + _leaving(pod, at))


def _resources(resources: dict[str, Any], path: str) -> list[str]:
    """Requests equal limits: memory that is promised twice ends workers when it is used."""
    faults = differ(f"{path}.requests", resources["requests"], resources["limits"])
    missing = sorted({"cpu", "memory"} - resources["limits"].keys())
    return faults + [f"{path}.limits.{name}: missing, expected it" for name in missing]


def _environment(container: dict[str, Any], path: str, secret: str | None) -> list[str]:
    given = {entry["name"]: entry for entry in container.get("env") or []}
    wanted = {"RAY_AUTH_MODE": "token", **HEALTH}
    faults: list[str] = []
    for name, value in wanted.items():
        faults += differ(f"{path}.env {name}", given.get(name, {}).get("value"), value)
    token = given.get("RAY_AUTH_TOKEN", {})
    source = (token.get("valueFrom") or {}).get("secretKeyRef") or {}
    faults += [] if "value" not in token else [f"{path}.env RAY_AUTH_TOKEN: got a value, expected valueFrom a Secret"]
    faults += differ(f"{path}.env RAY_AUTH_TOKEN secretKeyRef.name", source.get("name"), secret)
    return faults + differ(f"{path}.env RAY_AUTH_TOKEN secretKeyRef.key", source.get("key"), "auth_token")


def _volumes(pod: dict[str, Any], path: str, object_store: int | None) -> list[str]:
    """/dev/shm in memory with room for the object store, and the share, where stores and runs lie."""
    volumes, container = {v["name"]: v for v in pod.get("volumes") or []}, pod["containers"][0]
    mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts") or []}
    faults = [f"{path}.containers[0].volumeMounts {place}: got {name!r}, expected one of {', '.join(volumes)}"
              for place, name in mounts.items() if name not in volumes]
    shm = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir") or {}
    faults += differ(f"{path}.volumes for /dev/shm emptyDir.medium", shm.get("medium"), "Memory")
    limit = f"{path}.volumes for /dev/shm emptyDir.sizeLimit: got {shm.get('sizeLimit')}"
    size, memory = quantity(shm.get("sizeLimit", 0)), quantity(container["resources"]["limits"].get("memory", 0))
    if object_store is None or size < object_store:
        faults.append(f"{limit}, expected at least the object-store-memory, {object_store} bytes, of rayStartParams")
    if size > memory / 2:
        faults.append(f"{limit}, expected at most half of the memory's limit, which it counts against")
    claim = (volumes.get(mounts.get(_SHARE, ""), {}).get("persistentVolumeClaim") or {}).get("claimName")
    if claim not in _CLAIMS:
        faults.append(f"{path}.volumes for {_SHARE} persistentVolumeClaim.claimName: got {claim!r}, expected one of "
                      f"kubernetes.yaml, {', '.join(_CLAIMS)}")
    return faults


def _leaving(pod: dict[str, Any], path: str) -> list[str]:
    """Before a pod goes its workers are told and Ray is stopped, and there is the time that this may take."""
    hook = ((pod["containers"][0].get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}
    words, grace = hook.get("command") or [], pod.get("terminationGracePeriodSeconds", 30)
    tell = rf"pkill -TERM -f \^ray::{WorkerActor.__name__}; .*\$\(seq (\d+)\).*; ray stop --grace-period (\d+)"
    found = re.fullmatch(tell, words[-1]) if words[:2] == ["sh", "-c"] else None
    if found is None:
        return [f"{path}.containers[0].lifecycle.preStop.exec.command: got {words}, expected SIGTERM to workers, a "
                "wait, and ray stop --grace-period SECONDS"]
    needed = int(found[1]) + int(found[2])
    if grace <= needed:
        return [f"{path}.terminationGracePeriodSeconds: got {grace}, expected more than the {needed} of preStop"]
    return []
