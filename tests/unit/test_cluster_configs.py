# SPDX-License-Identifier: Apache-2.0
"""The files of cluster_configs/ are right, and what is wrong in one is refused with file, path and what was expected.

Nothing is started: Ray's own validation and parsers, a schema of KubeRay's fields, and our rules (tests/deployment).
"""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.deployment import check as checked
from tests.deployment.check import FILES, check
from tests.deployment.kubernetes import quantity
from tests.deployment.project import HEALTH, RAY, ROOT

CONFIGS = ROOT / "cluster_configs"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_file_is_right(file: Path) -> None:
    assert check(file.name, file.read_text()) == []


def test_every_kind_of_cluster_is_there() -> None:
    assert {file.name for file in FILES} == set(FILE_CASES)
    docs = (ROOT / "docs" / "cluster.md").read_text()
    assert [word for word in (*FILE_CASES, f"Ray {RAY}") if word not in docs] == []


LAUNCHER = [
    ("cluster_name: qgnn", "clustername: qgnn", "clustername: unknown field, expected cluster_name"),
    ("min_workers: 3\n", "min_worker: 3\n", "min_worker: unknown field, expected max_workers"),
    ("  type: local", "  type: locla", "provider.type: got 'locla', expected one of local, aws"),
    ("  head_ip: 10.0.0.1", "  head_pi: 10.0.0.1", "provider.head_pi: unknown field, expected one of head_ip"),
    ("10.0.0.3,", "10.0.0,", "provider.worker_ips[1]: got '10.0.0', expected an IP address"),
    ("10.0.0.3,", "10.0.0.1,", "provider.worker_ips[1]: got '10.0.0.1' again, expected each host once"),
    ("[10.0.0.2, 10.0.0.3, 10.0.0.4]", "10.0.0.2", "provider.worker_ips: got '10.0.0.2', expected a list"),
    ("max_workers: 3", "max_workers: three", "max_workers: got 'three', expected type integer"),
    ("ssh_user", "ssh_usr", "auth.ssh_usr: unknown field, expected ssh_user"),
    ("qgnn_dist: qgnn_dist", "qgnn_dist: qgnndist", "qgnn_dist: got 'qgnndist', expected a file or folder"),
    ("-c constraints.txt .", ".", "setup_commands[2]: got 'cd ~/qgnn/source && ~/qgnn/venv/bin/pip install --quiet .', "
                                  "expected -c constraints.txt"),
    ("--head --port", "--head --prt", "expected options of `ray start`"),
    ("ray start --head --port=6379", "ray start --address=x:6379", "head_start_ray_commands[1]: got head=False"),
    ("ulimit -n 65536; ray start --address", "ulimit -n 65536; ray strat --address",
     "worker_start_ray_commands: got 0 times `ray start`, expected once"),
    ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled",
     "head_start_ray_commands[1] RAY_AUTH_MODE: got 'disabled', expected 'token'"),
    ("RAY_AUTH_TOKEN_PATH=~/qgnn/ray-token", "RAY_AUTH_TOKEN=0123",
     "file: got 'RAY_AUTH_TOKEN=', expected no credentials"),
    ("RAY_AUTH_TOKEN_PATH=~/qgnn/ray-token", "",
     "head_start_ray_commands[1] RAY_AUTH_TOKEN_PATH: missing, expected the token"),
    ("RAY_health_check_period_ms=500", "RAY_health_check_period_ms=50",
     "head_start_ray_commands[1] RAY_health_check_period_ms: got '50', expected '500'"),
    ("--metrics-export-port=8080", "--metrics-export-port=12000", "--metrics-export-port: got 12000, expected 8080"),
    ("qgnn submit train", "qgnn submit trian", "expected words that qgnn takes"),
    ("qgnn submit train /shared/store --out", "qgnn submit train /shared/store --otu",
     "expected words that qgnn takes"),
    ("#   ", "# ", "commands, expected three, each after"),
    ("cluster_name: qgnn", "cluster_name: qgnn\ncluster_name: other", "key 'cluster_name' stands twice"),
    ("cluster_name: qgnn", "cluster_name: [qgnn", "file: got no YAML"),
]
AWS = [
    ("  region: us-west-2", "  regoin: us-west-2", "provider.regoin: unknown field, expected one of"),
    ("  region: us-west-2", "  region: 2", "provider.region: got 2, expected type string"),
    ("cache_stopped_nodes: false", "cache_stopped_nodes: true",
     "provider.cache_stopped_nodes: got True, expected False"),
    ("idle_timeout_minutes: 10\n", "", "idle_timeout_minutes: got None, expected minutes"),
    ("idle_timeout_minutes: 10", "idle_timeout_minutes: -1", "idle_timeout_minutes: got -1, expected at least 0"),
    ("head_node_type: head", "head_node_type: hed", "head_node_type: got 'hed', expected one of head, worker"),
    ("    min_workers: 0", "    min_workers: 9", "The specified global `max_workers` is smaller"),
    ("    min_workers: 0", "    min_worker: 0", "available_node_types.worker.min_worker: unknown field"),
    ("InstanceType: m7i.4xlarge", "InstnceType: m7i.4xlarge", "worker.node_config.InstnceType: unknown field"),
    ("InstanceMarketOptions: {MarketType: spot}", "InstanceMarketOptions: {MarketType: sport}",
     "worker.node_config.InstanceMarketOptions.MarketType: got 'sport', expected 'spot'"),
    ("InstanceType: m7i.2xlarge", "InstanceType: m7i.2xlarge\n      InstanceMarketOptions: {MarketType: spot}",
     "head.node_config.InstanceMarketOptions.MarketType: got 'spot', expected None"),
    ("VolumeSize: 100", "VolumeSize: 8", "node_config.BlockDeviceMappings: got [8] GB, expected a disk of 50 or more"),
    ("FromPort: 8265, ToPort: 8265", "FromPort: 6379, ToPort: 6379",
     "IpPermissions[0]: got ports 6379 to 6379, expected one of"),
    ("FromPort: 8265, ToPort: 8265", "FromPort: 8265, ToPort: 9265", "IpPermissions[0]: got ports 8265 to 9265"),
    ("CidrIp: 10.0.1.0/24", "CidrIp: 0.0.0.0/0",
     "IpPermissions[0].IpRanges: got '0.0.0.0/0', expected a network of yours"),
    ("CidrIp: 10.0.1.0/24", "CidrIp: 10.0.1/24", "IpPermissions[0].IpRanges: got '10.0.1/24'"),
    ("{IpProtocol: tcp", "{IpProtocl: tcp", "IpPermissions[0].IpProtocl: unknown field"),
    ("    GroupName: qgnn", "    Group: qgnn", "provider.security_group.Group: unknown field, expected GroupName"),
    ("  region: us-west-2", "  region: us-west-2  # AKIA0123456789ABCDEF", "expected no credentials"),
    ("threshold=3;", "threshold=30;",
     "worker_start_ray_commands[1] RAY_health_check_failure_threshold: got '30', expected '3'"),
]
LOCAL = [
    ("head_ip: 127.0.0.2", "head_ip: 192.168.1.7", "RAY_AUTH_MODE: got 'disabled', expected 'token'"),
    ("RAY_AUTH_MODE=disabled ray start --head", "ray start --head",
     "RAY_AUTH_MODE: got [None, 'disabled'], expected the same"),
]
PODS = [
    ("headGroupSpec:", "headGroup:", "headGroup: unknown field, expected headGroupSpec"),
    ("headGroupSpec:", "headGroup:", "headGroupSpec: missing, expected this field"),
    ("groupName: workers", "grupName: workers", "workerGroupSpecs[0].grupName: unknown field, expected groupName"),
    ("replicas: 4", 'replicas: "4"', "workerGroupSpecs[0].replicas: got '4', expected type integer"),
    ("replicas: 4", "replicas: 5", "workerGroupSpecs[0].replicas: got 5, expected 4 to 4"),
    ('num-cpus: "0"', "num-cpus: 0", "headGroupSpec.rayStartParams.num-cpus: got 0, expected type string"),
    ('num-cpus: "0"', 'nm-cpus: "0"', "expected options of `ray start`"),
    (f"rayVersion: {RAY}", "rayVersion: 2.52.0", f"rayVersion: got '2.52.0', expected '{RAY}'"),
    (f"-ray{RAY}", "-ray2.52.0", f"headGroupSpec.template.spec.containers[0].image: got 'qgnn-dist:0.1.0-ray2.52.0', "
                                 f"expected 'qgnn-dist:0.1.0-ray{RAY}'"),
    (f"qgnn-dist:0.1.0-ray{RAY}", "qgnn-dist", "containers[0].image: got 'qgnn-dist', expected"),
    ("requests: {cpu: \"8\", memory: 32Gi}", "requests: {cpu: \"8\", memory: 16Gi}",
     "workerGroupSpecs[0].template.spec.containers[0].resources.requests: got {'cpu': '8', 'memory': '16Gi'}, "
     "expected"),
    ("limits: {cpu: \"4\", memory: 16Gi}", "limits: {cpu: \"4\", memory: 16 GB}",
     "headGroupSpec.template.spec.containers[0].resources.limits.memory: got '16 GB', expected text like"),
    ("sizeLimit: 2Gi", "sizeLimit: 512Mi",
     "emptyDir.sizeLimit: got 512Mi, expected at least the object-store-memory, 1073741824"),
    ("sizeLimit: 2Gi", "sizeLimit: 20Gi", "emptyDir.sizeLimit: got 20Gi, expected at most half of the memory"),
    ("medium: Memory", "medium: memory", "volumes[0].emptyDir.medium: got 'memory', expected one of"),
    ("{medium: Memory, sizeLimit: 2Gi}", "{sizeLimit: 2Gi}", "/dev/shm emptyDir.medium: got None, expected 'Memory'"),
    ("mountPath: /dev/shm", "mountPath: /dev/shmem", "volumes for /dev/shm emptyDir.medium: got None"),
    ("{name: shared, mountPath: /shared}", "{name: share, mountPath: /shared}",
     "volumeMounts /shared: got 'share', expected one of shm, shared"),
    ("claimName: qgnn-shared", "claimName: qgnn-share",
     "persistentVolumeClaim.claimName: got 'qgnn-share', expected one of"),
    ("{name: RAY_AUTH_MODE, value: token}", "{name: RAY_AUTH_MODE, value: disabled}",
     "containers[0].env RAY_AUTH_MODE: got 'disabled', expected 'token'"),
    ("- {name: RAY_AUTH_MODE, value: token}", "", "containers[0].env RAY_AUTH_MODE: got None, expected 'token'"),
    ("valueFrom: {secretKeyRef: {name: qgnn-ray-token, key: auth_token}}", "value: abc",
     "env RAY_AUTH_TOKEN: got a value, expected valueFrom a Secret"),
    ("secretName: qgnn-ray-token", "secretName: other", "secretKeyRef.name: got 'qgnn-ray-token', expected 'other'"),
    ("key: auth_token", "key: token", "secretKeyRef.key: got 'token', expected 'auth_token'"),
    ("authOptions: {mode: token,", "authOptions: {mode: tokens,", "authOptions.mode: got 'tokens', expected one of"),
    ("RAY_health_check_timeout_ms", "RAY_health_check_timeot_ms",
     "env RAY_health_check_timeout_ms: got None, expected '500'"),
    ('value: "500"', "value: 500", "value: got 500, expected type string"),
    ("terminationGracePeriodSeconds: 90", "terminationGracePeriodSeconds: 80",
     "terminationGracePeriodSeconds: got 80, expected more than the 80 of preStop"),
    ("preStop:", "prestop:", "lifecycle.prestop: unknown field, expected preStop"),
    ("pkill -TERM -f ^ray::WorkerActor;", "", "expected SIGTERM to workers, a wait, and ray stop"),
    ("ray stop --grace-period 20", "ray stop", "expected SIGTERM to workers, a wait, and ray stop --grace-period"),
    ("^ray::WorkerActor", "^ray::Worker", "preStop.exec.command: got ['sh', '-c', 'pkill -TERM -f ^ray::Worker;"),
    ("{name: metrics, containerPort: 8080}", "{name: metrics, containerPort: 9090}",
     "ports of name metrics: got 9090, expected 8080"),
    ("containerPort: 6379", "containerPort: 637900", "ports[0].containerPort: got 637900, expected at most 65535"),
    ('metrics-export-port: "8080"', 'metrics-export-port: "12000"',
     "rayStartParams.metrics-export-port: got 12000, expected 8080"),
    ("runAsNonRoot: true", "runAsNonRoot: false", "securityContext.runAsNonRoot: got False, expected True"),
    ("runAsUser: 1000", "runAsUser: 1001", "securityContext.runAsUser: got '1001', expected '1000'"),
    ("apiVersion: ray.io/v1", "apiVersion: ray.io/v2", "apiVersion: got 'ray.io/v2', expected 'ray.io/v1'"),
    ("  name: qgnn\n", "  name: Qgnn\n", "metadata.name: got 'Qgnn', expected text like"),
]
JOB = [
    ("kind: RayJob", "kind: RayJobs", "kind: got 'RayJobs', expected one of"),
    ("entrypoint:", "entryPoint:", "spec.entryPoint: unknown field, expected entrypoint"),
    ("jobs/pipeline.py", "jobs/pipelin.py", "spec.entrypoint: got 'python /opt/qgnn/jobs/pipelin.py"),
    ("/opt/qgnn/jobs/", "jobs/", "expected python /opt/qgnn/jobs/JOB"),
    ("--parts 4 ", "--part 4 --prts 3 ",
     "expected words that pipeline.py takes (pipeline.py: error: unrecognized arguments"),
    ("--parts 4 ", "", "(pipeline.py: error: the following arguments are required: --parts)"),
    ("--parts 4 ", "--parts 5 ", "spec.entrypoint: got 5 parts of 8 CPUs, expected at most the 4"),
    ("jobs/pipeline.py /shared/graph.npz --parts 4", "jobs/train.py /shared/store --overwite",
     "expected words that train.py takes ("),
    ("cluster.cpus_per_worker=8", "cluster.cpu_per_worker=8", "expected settings that exist (cluster.cpu_per_worker"),
    ("--out /shared/pipeline", "--out /tmp/pipeline", "got --out /tmp/pipeline, expected a folder under /shared, or s3://…"),
    ("submissionMode: K8sJobMode", "submissionMode: JobMode", "spec.submissionMode: got 'JobMode', expected one of"),
    ("backoffLimit: 2", "backofLimit: 2", "spec.backofLimit: unknown field, expected backoffLimit"),
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: yes please",
     "spec.shutdownAfterJobFinishes: got 'yes please', expected type boolean"),
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false",
     "spec.shutdownAfterJobFinishes: got false, expected true"),
    ("preRunningDeadlineSeconds: 1800", "preRunningDeadlineSeconds: 0",
     "preRunningDeadlineSeconds: got 0, expected at least 1"),
]
SHARED = [
    ("accessModes: [ReadWriteMany]", "accessModes: [ReadWriteOnce]",
     "spec.accessModes: got ['ReadWriteOnce'], expected"),
    ("storage: 200Gi", "storage: 200 Gi", "spec.resources.requests.storage: got '200 Gi', expected text like"),
    ("port: 8265", "port: 6379", "NetworkPolicy spec.ingress[1].ports: got [6379], expected of (8265, 8080)"),
    ("ray.io/is-ray-node", "ray.io/is-ray-nod", "spec.podSelector.matchLabels: got"),
    ("    - from:\n        - podSelector: {}", "    - from: []\n    - from:\n        - podSelector: {}",
     "spec.ingress[1].from: got everybody, expected pods or namespaces"),
    ("policyTypes: [Ingress]", "policyType: [Ingress]", "spec.policyType: unknown field, expected policyTypes"),
    ("kind: NetworkPolicy", "kind: NetPolicy", "kind: got 'NetPolicy', expected one of"),
]
IMAGE = [
    ("FROM python:3.11.14-slim-bookworm\n", "FROM python:latest\n",
     "got FROM python:latest, expected python:3.MINOR.PATCH-slim"),
    ("FROM python:3.11.14-slim-bookworm\n", "FROM python:3.10.14-slim-bookworm\n",
     "expected python:3.MINOR.PATCH-slim-RELEASE, 3.11"),
    ("FROM python:3.11.14-slim-bookworm\n", "FROM python:3.12.4-slim-bookworm\n", "expected two stages of one base"),
    ("FROM python:3.11.14-slim-bookworm\n", "FROM mirror.example.com/python:3.11.14-slim-bookworm\n",
     "expected no host name"),
    ("USER 1000", "USER root", "USER: got 'root', expected a number other than 0"),
    ("USER 1000\n", "", "USER: got '', expected a number other than 0"),
    (f"=={RAY}", "==2.52.0", f"ray: got '2.52.0', expected '{RAY}'"),
    ("qgnn_dist-0.1.0-", "qgnn_dist-0.0.9-", "qgnn_dist: got '0.0.9', expected '0.1.0'"),
    (" wget ", " curl ", "RUN apt-get of the last stage: got no wget, expected it for KubeRay's probes"),
    (" procps ", " ", "got no procps, expected it for pkill and pgrep of preStop"),
    ("COPY jobs ", "COPY job ", "got job, expected a file or folder of the checkout"),
    ("COPY jobs /opt/qgnn/jobs\n", "", "COPY: got no jobs, expected it in the image"),
    ("COPY qgnn_dist", "COPPY qgnn_dist", "got COPPY, expected one of FROM, ARG"),
    ("-c constraints.txt scikit", "scikit", "expected -c constraints.txt"),
    ("ARG PIP_EXTRA_INDEX_URL=\nRUN", "ARG PIP_EXTRA_INDEX_URL=https://wheels.example.org/cpu\nRUN",
     "expected no host name"),
    ("RUN pip wheel", "RUN CXXFLAGS=-march=native pip wheel", "expected no compiler flag for one processor"),
]
FILE_CASES = {"hosts.yaml": LAUNCHER, "aws.yaml": AWS, "local.yaml": LOCAL, "raycluster.yaml": PODS,
              "rayjob.yaml": PODS + JOB, "kubernetes.yaml": SHARED, "Dockerfile": IMAGE}
CASES = [(file, *case) for file, cases in FILE_CASES.items() for case in cases]


@pytest.mark.parametrize(("file", "old", "new", "said"), CASES)
def test_what_is_wrong_is_refused(file: str, old: str, new: str, said: str) -> None:
    text = (CONFIGS / file).read_text()
    assert old in text
    faults = check(file, text.replace(old, new))
    assert [fault for fault in faults if fault.startswith(f"{file}: ") and said in fault], faults or "nothing was found"


def test_a_file_of_ones_own_is_checked_by_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    for text, code, said in ((("kind: RayCluster\n"), 1, "mine.yaml: RayCluster apiVersion: missing"),
                             ((CONFIGS / "raycluster.yaml").read_text(), 0, "1 files are right")):
        mine.write_text(text)
        monkeypatch.setattr("sys.argv", ["check", str(mine)])
        assert checked.main() == code
        assert said in capsys.readouterr().out


def test_the_schema_is_one_and_says_its_source() -> None:
    schema = json.loads((ROOT / "tests" / "deployment" / "kuberay.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    said = re.findall(r"KubeRay (\d+\.\d+\.\d+)", schema["$comment"])
    assert said
    assert f"KubeRay {said[0]}" in (ROOT / "docs" / "cluster.md").read_text()
    assert [d for d in schema["$defs"].values() if d.get("type") == "object" and "additionalProperties" not in d] == []


def test_both_files_for_kuberay_have_the_same_pods() -> None:
    cluster = yaml.safe_load((CONFIGS / "raycluster.yaml").read_text())["spec"]
    assert yaml.safe_load((CONFIGS / "rayjob.yaml").read_text())["spec"]["rayClusterSpec"] == cluster


def test_the_constants_are_read_from_where_they_are_told() -> None:
    assert set(HEALTH) == {"RAY_health_check_initial_delay_ms", "RAY_health_check_period_ms",
                           "RAY_health_check_timeout_ms", "RAY_health_check_failure_threshold"}
    assert all(0 < int(value) <= 1000 for value in HEALTH.values())
    assert f"ray=={RAY} " in (ROOT / "constraints.txt").read_text()
    given = ("2Gi", "512Mi", "500m", "4", 3, "1G", "5 Gi")
    assert [quantity(one) for one in given] == [2**31, 2**29, 0.5, 4, 3, 1e9, 0]
