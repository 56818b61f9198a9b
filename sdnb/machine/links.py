"""Notices that another machine of the run is gone.

Machine 0 has a TCP connection to one rank of each other machine. Nothing is sent through it while the run goes on. When
the rank at the other end is killed, its system closes the connection. When its machine or the network is gone, the
keep-alive probes of the system here get no answer. The collective operations of NCCL and gloo would wait much longer.
"""

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from sdnb.errors import Stopped

_GOODBYE = "goodbye"
_CONNECT_SECONDS = 10.0
# How long a machine may be silent. Machine 0 decides first which one is lost, and tells the others.
_PATIENCE_OF_MACHINE_0, _PATIENCE_OF_OTHERS = 30, 40
_PROBES = 5


class Links:
    """The connections of a machine. `lost` is called, in a thread, with the number of the first machine that is lost,
    and a sentence about it. To leave the context without an error, or with Stopped, says goodbye to the others."""

    def __init__(self, lost: Callable[[int, str], None]) -> None:
        self._lost, self._connections, self._over = lost, list[socket.socket](), threading.Lock()

    def __enter__(self) -> "Links":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if (error is None or isinstance(error, Stopped)) and self._over.acquire(blocking=False):
            self._tell(_GOODBYE)

    def listen(self, machines: int) -> int:
        """On machine 0: accept a connection of each other machine, while the caller goes on. Returns the port."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=both)
        threading.Thread(target=self._accept, args=(server, machines - 1), daemon=True).start()
        return server.getsockname()[1]

    def connect(self, machine: int, address: str, port: int) -> None:
        """On another machine: connect to machine 0. Raises OSError."""
        connection = socket.create_connection((address, port), _CONNECT_SECONDS)
        connection.sendall(f"{machine} {socket.gethostname()}\n".encode())
        self._watch(connection, connection.makefile(), 0, address, _PATIENCE_OF_OTHERS)

    def _accept(self, server: socket.socket, others: int) -> None:
        with server:
            while len(self._connections) < others:
                connection, (address, *_) = server.accept()
                connection.settimeout(_CONNECT_SECONDS)
                with suppress(OSError, ValueError):  # a port scan, and no machine of this run
                    lines = connection.makefile()
                    machine, host = lines.readline().split()
                    where = f"{host}, {address.removeprefix('::ffff:')}"
                    self._watch(connection, lines, int(machine), where, _PATIENCE_OF_MACHINE_0)

    def _watch(self, connection: socket.socket, lines: TextIO, machine: int, where: str, patience: int) -> None:
        connection.settimeout(None)
        pause = patience // (_PROBES + 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, patience - _PROBES * pause), (socket.TCP_KEEPINTVL, pause),
            (socket.TCP_KEEPCNT, _PROBES),
        ):  # fmt: skip
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connections.append(connection)
        threading.Thread(target=self._wait, args=(lines, machine, f"machine {machine} ({where})"), daemon=True).start()

    def _wait(self, lines: TextIO, machine: int, name: str) -> None:
        heard, what = "", f"{name} has ended"
        try:
            heard = lines.readline().strip()
        except ConnectionResetError:
            pass
        except OSError:
            what = f"{name} cannot be reached any more"
        if heard == _GOODBYE:
            return
        if heard:  # machine 0 has lost another machine
            number, what = heard.split(maxsplit=1)
            machine = int(number)
        if self._over.acquire(blocking=False):
            self._tell(f"{machine} {what}")
            self._lost(machine, what)

    def _tell(self, line: str) -> None:
        for connection in self._connections:
            with suppress(OSError):  # it is gone, too
                connection.sendall(f"{line}\n".encode())
