"""Machines to train on together: network namespaces of this one, with a switch between them."""

from __future__ import annotations

import fcntl
import os
import random
import selectors
import shutil
import struct
import subprocess
import threading
from contextlib import ExitStack, contextmanager

import psutil
import pytest

MACHINES = 4
# <linux/if_tun.h>: set up an interface that carries whole frames, and nothing before them
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_TO_ALL = 1  # a bit of the first byte of an address
_MTU = 1500


class Network:
    """Machines with the addresses 10.77.0.10, 10.77.0.11, … The interface of each is a TAP device, and the switch, a
    thread of this process, reads the frames that one sends and writes them to the others. It can lose some at random,
    and all of those from and to a machine: no namespace is told, as if a cable were pulled."""

    def __init__(self) -> None:
        self.loss, self.unplugged, self.lost = 0.0, set(), 0
        self.name, self._taps, self._found = f"sdnb{os.getpid()}", [], {}
        self._random, self._over = random.Random(7), threading.Event()

    def namespace(self, machine):
        return f"{self.name}-{machine}"

    def address(self, machine):
        return f"10.77.0.{10 + machine}"

    def inside(self, machine, *command):
        """The command as it runs on that machine."""
        return ["ip", "netns", "exec", self.namespace(machine), *map(str, command)]

    def processes(self, machine):
        found = subprocess.run(["ip", "netns", "pids", self.namespace(machine)], capture_output=True, text=True)
        return [psutil.Process(int(pid)) for pid in found.stdout.split()]

    def plug(self, machine):
        namespace, tap = self.namespace(machine), f"{self.name}.{machine}"
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        self._taps.append(device)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", tap.encode(), _IFF_TAP | _IFF_NO_PI))
        for command in (
            f"ip link set {tap} netns {namespace} name eth0",
            f"ip -n {namespace} address add {self.address(machine)}/24 dev eth0",
            f"ip -n {namespace} link set eth0 up mtu {_MTU}",
            f"ip -n {namespace} link set lo up",
        ):
            subprocess.run(command.split(), check=True)

    def forward(self):
        """Until `stop`."""
        with selectors.DefaultSelector() as ready:
            for machine, device in enumerate(self._taps):
                ready.register(device, selectors.EVENT_READ, machine)
            while not self._over.is_set():
                for key, _ in ready.select(timeout=0.2):
                    self._pass_on(key.data, os.read(key.fd, _MTU + 100))

    def _pass_on(self, machine, frame):
        to, by = frame[:6], frame[6:12]
        self._found[by] = machine
        others = [one for one in range(len(self._taps)) if one != machine]
        for other in others if frame[0] & _TO_ALL or to not in self._found else [self._found[to]]:
            if self._random.random() < self.loss:
                self.lost += 1
            elif not {machine, other} & self.unplugged:
                try:
                    os.write(self._taps[other], frame)
                except OSError:  # the machine's queue is full
                    self.lost += 1

    def stop(self):
        self._over.set()
        for device in self._taps:
            os.close(device)


@contextmanager
def network():
    """The machines, which are removed at the end with all their processes. Skips the test where that is not allowed."""
    if not (shutil.which("ip") and os.access("/dev/net/tun", os.W_OK)):
        pytest.skip("needs ip, and write access to /dev/net/tun")
    made = Network()
    with ExitStack() as at_end:
        for machine in range(MACHINES):
            name = made.namespace(machine)
            added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if added.returncode:
                pytest.skip(f"network namespaces need root: {added.stderr.strip()}")
            at_end.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
            at_end.callback(lambda machine=machine: [process.kill() for process in made.processes(machine)])
        at_end.callback(made.stop)
        for machine in range(MACHINES):
            made.plug(machine)
        switch = threading.Thread(target=made.forward, daemon=True)
        switch.start()
        at_end.callback(switch.join)
        at_end.callback(made._over.set)
        yield made
