# SPDX-License-Identifier: Apache-2.0
"""Ray's token authentication: on for a local Ray, and one line where a cluster's token is missing or another one."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rayhead import ray_head

TOKEN = "0123456789abcdef" * 4
DRIVER = """
import json, os, sys
if sys.argv[2] == "early":
    import ray
from qgnn_dist.cluster.session import RaySession
from qgnn_dist.errors import InputError

told = {}
for turn in range(int(sys.argv[3])):
    try:
        with RaySession(sys.argv[1] or None, num_cpus=1):
            import ray
            from ray._raylet import AuthenticationMode, get_authentication_mode

            @ray.remote
            def see():
                import os
                return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN")

            told["worker"] = ray.get(see.remote(), timeout=60)
            told["driver"] = get_authentication_mode() == AuthenticationMode.TOKEN
            told["address"] = ray.get_runtime_context().gcs_address
            told.setdefault("tokens", []).append(told["worker"][1])
            if sys.argv[4:]:
                import subprocess
                told["stranger"] = subprocess.run(
                    [sys.executable, "-c", sys.argv[4], told["address"]], capture_output=True, text=True,
                    env={k: v for k, v in os.environ.items() if not k.startswith("RAY_")}).stdout.strip()
    except InputError as error:
        told["error"] = str(error)
told["after"] = [name for name in os.environ if name.startswith("RAY_AUTH")]
print(json.dumps(told))
"""
STRANGER = """
import sys, ray
from ray._raylet import GcsClient
try:
    client = GcsClient(address=sys.argv[1])
    client.internal_kv_put(b"x", b"y", True, None, timeout=10)
    print("was let in")
except Exception as error:
    print(type(error).__name__)
"""


def drive(home: Path, address: str = "", *, early: bool = False, turns: int = 1, stranger: bool = False,
          **environment: str) -> dict[str, Any]:
    """What a command sees, in a process whose environment has these RAY_… alone."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", DRIVER, address, "early" if early else "late", str(turns),
                           *([STRANGER] if stranger else [])],
                          env={**env, "HOME": str(home), **environment}, capture_output=True, text=True, timeout=200,
                          check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_a_local_ray_asks_for_a_token_of_its_own(tmp_path: Path) -> None:
    """A stranger is sent away, nothing is written to the home folder, and the environment is as before."""
    told = drive(tmp_path, early=True, turns=2, stranger=True)
    assert told["driver"] is True
    assert told["worker"][0] == "token"
    assert [len(token) for token in told["tokens"]] == [64, 64]
    assert len(set(told["tokens"])) == 2
    assert told["address"].startswith("127.0.0.1:")
    assert told["stranger"] == "AuthenticationError"
    assert told["after"] == []
    assert not (tmp_path / ".ray").exists()


def test_what_the_environment_says_of_tokens_is_kept(tmp_path: Path) -> None:
    told = drive(tmp_path, stranger=True, RAY_AUTH_MODE="disabled")
    assert (told["driver"], told["worker"], told["stranger"]) == (False, ["disabled", None], "was let in")
    told = drive(tmp_path, RAY_AUTH_TOKEN=TOKEN)
    assert (told["driver"], told["worker"]) == (True, ["token", TOKEN])
    assert told["after"] == ["RAY_AUTH_TOKEN"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A head that asks for a token, and the file with it."""
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN)
    with ray_head({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}, address="127.0.0.1") as address:
        yield address, file


def test_a_cluster_is_joined_with_its_token(cluster: tuple[str, Path], tmp_path: Path) -> None:
    address, file = cluster
    told = drive(tmp_path, address, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(file))
    assert told["driver"] is True
    assert "error" not in told
    assert told["worker"][0] == "token"


@pytest.mark.parametrize("environment", [
    {}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token"},
    {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}], ids=["unset", "disabled", "no token", "another token"])
def test_a_missing_or_wrong_token_is_one_line_that_says_what_to_do(cluster: tuple[str, Path], tmp_path: Path,
                                                                   environment: dict[str, str]) -> None:
    told = drive(tmp_path, cluster[0], RAY_NUM_REDIS_GET_RETRIES="2", **environment)  # Ray's own, of a second each
    assert "worker" not in told
    first, last = told["error"].split(" (", 1)[0], told["error"].rpartition("); ")[2]
    assert first == (f"--ray-address {cluster[0]}: the Ray cluster there asks for a token, and this command has none or "
                     "another one")
    assert last == ("set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file with the cluster's token (`ray "
                    "get-auth-token` on its head prints it)")
    assert "\n" not in told["error"]
