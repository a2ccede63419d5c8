# SPDX-License-Identifier: Apache-2.0
"""Files of Ray's cluster launcher: Ray's own validation, and what we ask of them beyond it."""
from __future__ import annotations

import ipaddress
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import ray.autoscaler
from ray.autoscaler._private.util import prepare_config, validate_config

from .commands import parse_ray_start, parse_shown, start_of
from .faults import differ, explain
from .project import GUARDED_PORTS, HEALTH, METRICS_PORT, ROOT

__all__ = ["check_launcher"]

_RAY_SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
_PROVIDER = {"local": {"type", "head_ip", "worker_ips"},
             "aws": {"type", "region", "availability_zone", "cache_stopped_nodes", "use_internal_ips",
                     "security_group"}}
_NODE_TYPE = {"resources", "node_config", "min_workers", "max_workers", "labels", "worker_setup_commands"}
_INSTANCE = {"InstanceType", "ImageId", "BlockDeviceMappings", "InstanceMarketOptions", "SecurityGroupIds", "SubnetIds",
             "KeyName", "IamInstanceProfile"}
_RULE = {"IpProtocol", "FromPort", "ToPort", "IpRanges"}
_SECRETS = re.compile(r"AKIA[0-9A-Z]{12}|aws_(secret_)?access_key|PRIVATE KEY|RAY_AUTH_TOKEN=|password", re.I)
_DISK_GB = 50


def check_launcher(config: dict[str, Any], text: str) -> list[str]:
    """Faults of a launcher's file, each `PATH: got X, expected Y`."""
    provider = config.get("provider")
    kind = provider.get("type") if isinstance(provider, dict) else None
    if kind not in _PROVIDER:
        return [f"provider.type: got {kind!r}, expected one of {', '.join(_PROVIDER)}"]
    faults = _unknown("provider", provider, _PROVIDER[kind]) + [
        f"file: got {found[0]!r}, expected no credentials" for found in _SECRETS.finditer(text)]
    faults += _addresses(provider) if kind == "local" else _instances(config)
    if not faults:
        faults = _by_ray(config)
    at_home = kind == "local" and all(ipaddress.ip_address(a).is_loopback
                                      for a in [provider["head_ip"], *provider["worker_ips"]]) if not faults else False
    return faults or _starts(config, at_home) + _sources(config) + parse_shown(text)


def _by_ray(config: dict[str, Any]) -> list[str]:
    """Ray's schema on what stands here, since what fills in defaults takes types for granted; then all of it."""
    # Ray takes min_workers out of a list of hosts itself.
    mine = {key: value for key, value in config.items() if key != "min_workers"}
    faults = [line for error in jsonschema.Draft7Validator(_RAY_SCHEMA).iter_errors(mine) for line in explain(error)]
    if faults:
        return faults
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        return explain(error)
    except ValueError as error:
        return [f"file: got what Ray refuses, expected otherwise ({error})"]
    return []


def _unknown(path: str, given: dict[str, Any], known: set[str]) -> list[str]:
    expected = f"expected one of {', '.join(sorted(known))}"
    return [f"{path}.{key}: unknown field, {expected}" for key in given if key not in known]


def _addresses(provider: dict[str, Any]) -> list[str]:
    faults: list[str] = []
    workers = provider.get("worker_ips")
    if not isinstance(workers, list):
        return [f"provider.worker_ips: got {workers!r}, expected a list of addresses"]
    given = {"provider.head_ip": provider.get("head_ip")}
    given |= {f"provider.worker_ips[{i}]": address for i, address in enumerate(workers)}
    seen = set[str]()
    for path, address in given.items():
        try:
            ipaddress.ip_address(str(address))
        except ValueError:
            faults.append(f"{path}: got {address!r}, expected an IP address")
        if str(address) in seen:
            faults.append(f"{path}: got {address!r} again, expected each host once")
        seen.add(str(address))
    return faults


def _instances(config: dict[str, Any]) -> list[str]:
    """A head on demand, spot workers that end when idle, disks of a size, and a group that opens two ports to some."""
    faults: list[str] = []
    if not isinstance(config.get("idle_timeout_minutes"), int):
        faults.append(f"idle_timeout_minutes: got {config.get('idle_timeout_minutes')!r}, expected minutes")
    faults += differ("provider.cache_stopped_nodes", config["provider"].get("cache_stopped_nodes"), False)
    types = config.get("available_node_types") or {}
    if config.get("head_node_type") not in types:
        faults.append(f"head_node_type: got {config.get('head_node_type')!r}, expected one of {', '.join(types)}")
    for name, node in types.items():
        path, instance = f"available_node_types.{name}.node_config", node.get("node_config") or {}
        faults += _unknown(f"available_node_types.{name}", node, _NODE_TYPE) + _unknown(path, instance, _INSTANCE)
        market = (instance.get("InstanceMarketOptions") or {}).get("MarketType")
        faults += differ(f"{path}.InstanceMarketOptions.MarketType", market,
                         None if name == config.get("head_node_type") else "spot")
        sizes = [disk.get("Ebs", {}).get("VolumeSize", 0) for disk in instance.get("BlockDeviceMappings") or []]
        if not any(isinstance(size, int) and size >= _DISK_GB for size in sizes):
            faults.append(f"{path}.BlockDeviceMappings: got {sizes} GB, expected a disk of {_DISK_GB} or more")
    group = config["provider"].get("security_group") or {}
    for i, rule in enumerate(group.get("IpPermissions") or []):
        path = f"provider.security_group.IpPermissions[{i}]"
        faults += _unknown(path, rule, _RULE)
        if rule.get("FromPort") not in GUARDED_PORTS or rule.get("ToPort") != rule.get("FromPort"):
            faults.append(f"{path}: got ports {rule.get('FromPort')} to {rule.get('ToPort')}, expected one of "
                          f"{GUARDED_PORTS}")
        for given in rule.get("IpRanges") or [{}]:
            try:
                wide = ipaddress.ip_network(str(given.get("CidrIp"))).prefixlen < 8
            except ValueError:
                wide = True
            if wide:
                faults.append(f"{path}.IpRanges: got {given.get('CidrIp')!r}, expected a network of yours, /8 or "
                              "narrower")
    return faults


def _starts(config: dict[str, Any], at_home: bool) -> list[str]:
    """How Ray is started: by options that it has, with the same authentication, health checks and ports everywhere."""
    faults: list[str] = []
    modes = dict[str, str | None]()
    for role in ("head_start_ray_commands", "worker_start_ray_commands"):
        found = [(i, *start_of(command)) for i, command in enumerate(config.get(role) or [])]
        starts = [(i, env, words) for i, env, words in found if words is not None]
        if len(starts) != 1:
            faults.append(f"{role}: got {len(starts)} times `ray start`, expected once")
            continue
        i, env, words = starts[0]
        path, (options, refused) = f"{role}[{i}]", parse_ray_start(words)
        if refused:
            faults.append(f"{path}: got {refused!r}, expected options of `ray start`")
            continue
        modes[path] = env.get("RAY_AUTH_MODE")
        if role.startswith("head") != bool(options["head"]):
            faults.append(f"{path}: got head={bool(options['head'])}, expected --head on the head alone")
        if at_home:
            continue
        faults += differ(f"{path} RAY_AUTH_MODE", env.get("RAY_AUTH_MODE"), "token")
        if "RAY_AUTH_TOKEN_PATH" not in env:
            faults.append(f"{path} RAY_AUTH_TOKEN_PATH: missing, expected the token's file")
        faults += [f for name, value in HEALTH.items() for f in differ(f"{path} {name}", env.get(name), value)]
        faults += differ(f"{path} --metrics-export-port", options["metrics_export_port"], METRICS_PORT)
    if len(set(modes.values())) > 1 or None in modes.values():
        faults.append(f"{' and '.join(modes)} RAY_AUTH_MODE: got {list(modes.values())}, expected the same, set on "
                      "both")
    return faults


def _sources(config: dict[str, Any]) -> list[str]:
    """What is copied is there, and what is installed from it keeps to constraints.txt."""
    mounts = config.get("file_mounts") or {}
    faults = [f"file_mounts.{there}: got {here!r}, expected a file or folder of the checkout"
              for there, here in mounts.items() if not here.startswith("~") and not (ROOT / here).exists()]
    for i, command in enumerate(config.get("setup_commands") or []):
        if "pip install" in command and "-c constraints.txt" not in command:
            faults.append(f"setup_commands[{i}]: got {command!r}, expected -c constraints.txt")
    return faults
