"""That machines notice each other's end, over the loopback interface."""

import queue
import socket
import time
from contextlib import suppress

import pytest
from processes import wait_for

from sdnb.errors import Stopped
from sdnb.machine.links import Links

SECONDS = 10


class Machine:
    def __init__(self):
        self.lost = queue.Queue()
        self.links = Links(lambda machine, what: self.lost.put((machine, what)))

    def ends(self):
        """As when the system closes the connections of a killed process."""
        self.links._over.acquire(blocking=False)  # it tells nobody
        for connection in self.links._connections:
            with suppress(OSError):  # the other end has ended
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def machines():
    """Three that are connected."""
    made = [Machine() for _ in range(3)]
    port = made[0].links.listen(3)
    with socket.create_connection(("127.0.0.1", port)) as scan:
        scan.sendall(b"GET / HTTP/1.1\r\n\r\n")  # another program: it is no machine
    for number in (1, 2):
        made[number].links.connect(number, "127.0.0.1", port)
    wait_for(lambda: len(made[0].links._connections) == 2)
    return made


def test_all_learn_of_a_machine_that_ends(machines):
    machines[2].ends()
    host = socket.gethostname()
    for machine in machines[:2]:
        assert machine.lost.get(timeout=SECONDS) == (2, f"machine 2 ({host}, 127.0.0.1) has ended")


def test_all_learn_of_the_end_of_machine_0(machines):
    machines[0].ends()
    for machine in machines[1:]:
        assert machine.lost.get(timeout=SECONDS) == (0, "machine 0 (127.0.0.1) has ended")


@pytest.mark.parametrize("first", [0, 1])
def test_a_machine_that_says_goodbye_is_not_lost(machines, first):
    """It has trained, or was stopped; the others end a little later."""
    with pytest.raises(Stopped), machines[first].links:
        raise Stopped("by SIGTERM", 143)
    machines[first].ends()
    for machine in machines:
        with machine.links:
            pass
        machine.ends()
    time.sleep(0.2)  # they read in threads
    assert [machine.lost.qsize() for machine in machines] == [0, 0, 0]


def test_an_error_is_no_goodbye(machines):
    with pytest.raises(OSError), machines[1].links:
        raise OSError
    machines[1].ends()
    assert machines[2].lost.get(timeout=SECONDS)[0] == 1
