# SPDX-License-Identifier: Apache-2.0
"""Several "hosts" on one Linux machine: network namespaces joined by a bridge that lies in a namespace of its own.

The machine's own network is never touched. Needs root and `ip`; `tc` and the kernel's token bucket (tbf) for
shaped links.
"""
from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import InputError, QgnnError

__all__ = ["NetnsCluster", "bits_per_second", "cannot", "congestion_control"]

_LOG = logging.getLogger(__name__)
NAMESPACES = Path("/var/run/netns")
"""Where `ip` keeps the names."""
COMMAND_S = 20.0
END_S = 10.0
BURST_BYTES, BURST_S = 1 << 18, 0.001
"""Of a token bucket: at least the largest piece that TCP hands to an interface, and a millisecond of its rate."""
QUEUE = "50ms"
"""What waits before a shaped link at most, as of a switch with deep buffers."""
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


class NetnsCluster:
    """Context manager around `n` namespaces, each with one link `eth0` to a switch and the address `address(i)`.

    Processes started by `exec` have their own host name (`node<i>`), /etc/hosts and /tmp/ray, no name server, and end
    with the cluster.

    Args:
        rate: of each link in both directions, as `tc` writes it ("1gbit", "100mbit"); None: unshaped.
    Raises:
        QgnnError: on entering it, where namespaces or shaped links cannot be made; says why.
    """

    def __init__(self, n: int, rate: str | None = None) -> None:
        self.n, self._rate = n, rate
        self._tag = f"q{os.getpid() % 100_000:x}"
        self._made: list[str] = []
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> NetnsCluster:
        reason = cannot(shaped=self._rate is not None)
        if reason:
            raise QgnnError(reason)
        self._folder = Path(tempfile.mkdtemp(prefix="netns-"))
        try:
            self._up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def address(self, i: int) -> str:
        """IP address of host `i`."""
        return f"10.77.0.{10 + i}"

    def exec(self, i: int, command: Sequence[str], env: Mapping[str, str] | None = None, *,
             stdout: int | IO[Any] | None = None, stderr: int | IO[Any] | None = None,
             pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]:
        """Start a command on host `i`, in a session of its own.

        Args:
            env: added to this process's environment. pass_fds: open files that it keeps, under their numbers.
        """
        folder = self._folder / str(i)
        inside = ('hostname "$1"; mkdir -p /tmp/ray; mount --bind "$2" /tmp/ray; mount --bind "$3" /etc/hosts; '
                  'mount --bind /dev/null /etc/resolv.conf; shift 3; exec "$@"')
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._name(i), "unshare", "--uts", "--mount", "--propagation", "private", "bash",
             "-c", inside, "_", f"node{i}", str(folder), str(self._folder / "hosts"), *command],
            env={**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", **(env or {})},
            stdout=stdout, stderr=stderr, text=True, start_new_session=True, pass_fds=pass_fds)
        self._processes.append(process)
        return process

    def sent_bytes(self, i: int) -> int:
        """What host `i`'s interface has sent, by the kernel's count: Ethernet frames without their checksums."""
        return self._counter(i, "tx_bytes")

    def shape(self, rate: str | None) -> None:
        """Give every link another rate, in both directions; None: none."""
        for i in range(self.n):
            for place, device in ((self._name(i), "eth0"), (self._name(None), f"p{i}")):
                subprocess.run(["ip", "netns", "exec", place, "tc", "qdisc", "del", "dev", device, "root"], check=False,
                               capture_output=True, timeout=COMMAND_S)
                if rate is not None:
                    burst = max(BURST_BYTES, int(bits_per_second(rate) / 8 * BURST_S))
                    _run("ip", "netns", "exec", place, "tc", "qdisc", "add", "dev", device, "root", "tbf", "rate", rate,
                         "burst", str(burst), "latency", QUEUE)
        self._rate = rate

    def cut(self, i: int) -> None:
        """Pull the cable of host `i`."""
        _run("ip", "-n", self._name(None), "link", "set", f"p{i}", "down")

    def join(self, i: int) -> None:
        """Plug the cable of host `i` in again."""
        _run("ip", "-n", self._name(None), "link", "set", f"p{i}", "up")

    def pids(self, i: int) -> list[int]:
        """Processes that live on host `i`."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self._name(i)).split()]

    def close(self) -> None:
        """End what was started on the hosts, and remove them; a signal that comes meanwhile waits for its end."""
        with _undisturbed():
            self._take_down()

    def _take_down(self) -> None:
        self._made = [name for name in self._made if (NAMESPACES / name).exists()]
        for name in self._made:
            with contextlib.suppress(QgnnError):  # the others go all the same
                _end(name)
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in reversed(self._made):
            try:
                _run("ip", "netns", "del", name)
            except QgnnError as error:
                _LOG.warning("network namespace %s is left (%s); `ip netns del %s` removes it", name, error, name)
        self._made, self._processes = [], []
        shutil.rmtree(self._folder, ignore_errors=True)

    def _up(self) -> None:
        """A switch, and a cable to each host."""
        switch = self._add(None)
        _run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "br0", "up")
        hosts = [f"{self.address(i)} node{i}" for i in range(self.n)]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        for i in range(self.n):
            name, port = self._add(i), f"p{i}"
            (self._folder / str(i)).mkdir()
            _run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", switch)
            _run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
        if self._rate is not None:
            self.shape(self._rate)

    def _add(self, i: int | None) -> str:
        name = self._name(i)
        self._made.append(name)  # before it is there: a signal may come between
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return name

    def _name(self, i: int | None) -> str:
        return f"{self._tag}-{'switch' if i is None else i}"

    def _counter(self, i: int, which: str) -> int:
        # `ip netns exec` shows the namespace's own /sys.
        return int(_run("ip", "netns", "exec", self._name(i), "cat", f"/sys/class/net/eth0/statistics/{which}"))


def bits_per_second(rate: str) -> float:
    """What a rate as `tc` writes it means.

    Raises: InputError: not a number and kbit, mbit or gbit.

    >>> bits_per_second("100mbit")
    100000000.0
    """
    unit = rate.lstrip("0123456789.")
    try:
        value = float(rate.removesuffix(unit)) * _UNITS[unit]
        if not value > 0:
            raise ValueError
    except (ValueError, KeyError):
        raise InputError(f"rate {rate}: expected a number and kbit, mbit or gbit, as 100mbit") from None
    return value


def congestion_control() -> str:
    """TCP's, which namespaces inherit: how full it keeps a shaped link differs; empty where the system does not say."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def cannot(*, shaped: bool = False) -> str:
    """Why namespaces (with shaped links: `shaped`) cannot be made here; empty where they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "unshare", *(["tc"] if shaped else [])):
        if shutil.which(tool) is None:
            return f"network namespaces need `{tool}`, which is not installed"
    probe = f"q{os.getpid() % 100_000:x}-probe"
    what = "network namespaces cannot be made here"
    try:
        _run("ip", "netns", "add", probe)
        _run("ip", "netns", "exec", probe, "unshare", "--uts", "--mount", "true")
        _run("ip", "-n", probe, "link", "add", "v0", "type", "veth", "peer", "name", "v1")
        if shaped:
            what = "links cannot be shaped here (the kernel's token bucket, tbf, is missing)"
            _run("ip", "netns", "exec", probe, "tc", "qdisc", "add", "dev", "v0", "root", "tbf", "rate", "100mbit",
                 "burst", str(BURST_BYTES), "latency", QUEUE)
        return ""
    except (QgnnError, subprocess.TimeoutExpired) as error:
        return f"{what}: {error}"
    finally:
        subprocess.run(["ip", "netns", "del", probe], check=False, timeout=COMMAND_S, capture_output=True)


def _run(*command: str) -> str:
    # In a session of its own: a terminal sends Ctrl-C to all of the foreground's processes, and none must end half-way.
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False,
                              start_new_session=True)
    except subprocess.TimeoutExpired:
        raise QgnnError(f"{' '.join(command)}: not through within {COMMAND_S:g} s") from None
    if done.returncode:
        raise QgnnError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGHUP, which would leave hosts behind: nothing else removes them.

    What the block does has its own deadlines. Outside the main thread, where no signal arrives, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []  # a mask would be one thread's alone, and the signal another's
    before: dict[int, Any] = {}
    try:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[one] = signal.signal(one, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if came:
            signal.raise_signal(came[0])


def _end(name: str) -> None:
    """Kill what runs in a namespace that this process made."""
    end = time.monotonic() + END_S
    while time.monotonic() < end:
        pids = [int(pid) for pid in _run("ip", "netns", "pids", name).split()]
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
