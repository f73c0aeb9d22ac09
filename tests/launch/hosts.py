"""Two hosts on one machine: network namespaces, each with an address and a host name of its own, joined by a veth pair."""

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from launchers import ROOT, environment

ADDRESSES = ("10.77.0.1", "10.77.0.2")


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def no_hosts():
    """Why there can be no two hosts here, or None."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "needs ip (iproute2) and unshare (util-linux)"
    name = f"try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    _ip("netns", "delete", name)
    return None


class TwoHosts:
    """A context: `names` are host names that resolve on both; at its end all processes on the hosts are killed."""

    def __init__(self):
        self.names = tuple(f"agr{os.getpid()}-{i}" for i in (1, 2))
        self._links = tuple(f"v{os.getpid()}-{i}" for i in (1, 2))
        self._stack = ExitStack()

    def __enter__(self):
        with ExitStack() as stack:
            for host, name in enumerate(self.names):
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "delete", name)
                stack.callback(self.kill_processes, host)
                # What `ip netns exec` shows as /etc/hosts. Without names torchrun's rendezvous waits for ever.
                folder = Path("/etc/netns", name)
                folder.mkdir(parents=True)
                stack.callback(shutil.rmtree, folder)
                known = [f"{address} {host}" for address, host in zip(ADDRESSES, self.names, strict=True)]
                (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
            _ip("link", "add", self._links[0], "type", "veth", "peer", "name", self._links[1])
            for name, link, address in zip(self.names, self._links, ADDRESSES, strict=True):
                _ip("link", "set", link, "netns", name)
                _ip("-n", name, "address", "add", f"{address}/30", "dev", link)
                _ip("-n", name, "link", "set", link, "up")
                _ip("-n", name, "link", "set", "lo", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._stack.close()

    def kill_processes(self, host):
        """All that runs on host 0 or 1, as a power cut does."""
        pids = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], check=True, capture_output=True, text=True
        ).stdout.split()
        for pid in pids:
            try:
                os.kill(int(pid), 9)
            except ProcessLookupError:
                continue

    def command(self, host, command):
        """`command` as it is to be started on host 0 or 1."""
        name = self.names[host]
        on_host = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name]
        return [*on_host, *map(str, command)]

    def start(self, host, command, log, **values):
        """A process on host 0 or 1; what it prints goes into the file `log`."""
        with open(log, "w") as file:
            return subprocess.Popen(
                self.command(host, command), cwd=ROOT, env=environment(**values), stdout=file, stderr=file
            )

    def pull_cable(self):
        _ip("-n", self.names[0], "link", "set", self._links[0], "down")

    def plug_in_cable(self):
        _ip("-n", self.names[0], "link", "set", self._links[0], "up")
