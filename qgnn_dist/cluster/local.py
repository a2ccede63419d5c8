# SPDX-License-Identifier: Apache-2.0
"""A local Ray is for this machine alone: it listens on the loopback address, and asks for a token that is drawn here.

Ray reads RAY_AUTH_MODE (`token` or `disabled`), RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH when it starts, and hands them
to the processes that it starts. Without a token in the environment it would write one to the home folder, after which
`ray start` on this machine silently asks for it. Versions without token authentication ignore all three.

Ray binds all interfaces unless it takes 127.0.0.1 for its host's address. It does where it is told, by the variable
below, that this machine joins no cluster with others; the name says for whom that was made, and it serves Linux too.
"""
from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["for_this_machine_alone"]

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextmanager
def for_this_machine_alone() -> Iterator[None]:
    """Around the life of a local Ray. What the environment says of these variables already is kept."""
    before = {name: os.environ.get(name) for name in (MODE, TOKEN, CLUSTERS)}
    if os.environ.setdefault(MODE, "token") == "token" and TOKEN_PATH not in os.environ:
        os.environ.setdefault(TOKEN, secrets.token_hex(32))
    os.environ.setdefault(CLUSTERS, "0")
    _look_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _look_again()


def _look_again() -> None:
    """Ray keeps in mind what the environment said when it was imported, or last asked."""
    from ray import _raylet
    from ray._private import ray_constants

    raylet: Any = _raylet
    if hasattr(ray_constants, "ENABLE_RAY_CLUSTER"):
        ray_constants.ENABLE_RAY_CLUSTER = os.environ.get(CLUSTERS, "1") not in ("0", "false", "False")
    if hasattr(raylet, "AuthenticationTokenLoader"):  # not in versions without tokens
        raylet.Config.initialize("")  # first: a thread of Ray's that still ends must not look for a token in vain
        raylet.AuthenticationTokenLoader.instance().reset_cache()
