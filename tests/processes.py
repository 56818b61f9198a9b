"""Processes that tests start, follow and end."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from sdnb.launch.ranks import free_port

ROOT = Path(__file__).resolve().parent.parent

# It has loaded what trains, and computed nothing: what is forked from it is where `python -m` is after seconds.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "sdnb.launch.ranks",
        "sdnb.training.loop",
        "sdnb.launch.command_line",
        "sdnb.metrics.results",
        "accelerate.launchers",
    ]
)


class Forked:
    """What `subprocess.Popen` is for [sys.executable, "-m", module, …], forked from a process that has loaded sdnb."""

    def __init__(
        self, command, stdin=None, stdout=None, stderr=None, env=None, cwd=None, pass_fds=(), start_new_session=False
    ):
        python, how, module, *arguments = map(str, command)
        assert (python, how) == (sys.executable, "-m"), command
        self.args, self.stdin = command, None
        streams, ours = {}, []
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.PIPE:
                assert number == 0, "what is printed goes into a file"
                reading, writing = os.pipe()
                streams[number], self.stdin = reading, os.fdopen(writing, "wb")
                ours.append(reading)
            elif stream == subprocess.DEVNULL:
                streams[number] = os.open(os.devnull, os.O_RDWR)
                ours.append(streams[number])
            elif stream is not None:
                streams[number] = stream.fileno()
        given = _Descriptors({**streams, **{number: number for number in pass_fds}})
        self._process = _server.Process(
            target=_run, args=(module, arguments, dict(env or os.environ), str(cwd or Path.cwd()), given,
                               start_new_session),
        )  # fmt: skip
        self._process.start()
        self.pid = self._process.pid
        for descriptor in ours:
            os.close(descriptor)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()


class _Descriptors:
    """File descriptors by the numbers that they are to have in the new process."""

    def __init__(self, descriptors):
        self.descriptors = descriptors

    def __getstate__(self):
        return {number: multiprocessing.reduction.DupFd(descriptor) for number, descriptor in self.descriptors.items()}

    def __setstate__(self, sent):
        self.descriptors = {number: one.detach() for number, one in sent.items()}

    def move(self):
        # First all to numbers that none of them is to have.
        aside = {number: os.dup(descriptor) for number, descriptor in self.descriptors.items()}
        for number, descriptor in aside.items():
            os.dup2(descriptor, number)
            os.set_inheritable(number, True)


def _run(module, arguments, environment, folder, descriptors, own_session):
    end_with_parent()
    multiprocessing.set_start_method("fork", force=True)  # as Python has it on Linux; here it would be the server's
    if own_session:
        os.setsid()
    descriptors.move()
    sys.stdin = os.fdopen(0)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.filterwarnings("ignore", message=".*found in sys.modules", category=RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end_with_parent():
    """Have this process killed when the one that started it ends, however that does."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def processes_of(folder):
    """The processes that a run consists of: the folder is in their command line, or they have a file in it open."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            open_files = [Path(file.path) for file in process.open_files()]
            named = str(folder) in " ".join(process.cmdline())
            if process.pid != os.getpid() and (named or any(path.is_relative_to(folder) for path in open_files)):
                found.append(process)
    return found


def none_left(folder, within=10):
    """Whether the last of them ends within so many seconds."""
    end = time.time() + within
    while processes_of(folder):
        if time.time() > end:
            return False
        time.sleep(0.1)
    return True


def wait_for(condition, within=120):
    """What a condition gives as soon as it holds."""
    end = time.time() + within
    while not (found := condition()):
        assert time.time() < end, "it did not come"
        time.sleep(0.1)
    return found


@contextmanager
def two_ranks(flags, printed):
    """`python -m sdnb.train` with these flags as two ranks, each as `accelerate launch` starts it. What they print goes
    into a file."""
    port, running = str(free_port()), []
    try:
        with printed.open("w") as file:
            for rank in ("0", "1"):
                told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port, ACCELERATE_USE_CPU="true", ACCELERATE_MIXED_PRECISION="no")  # fmt: skip
                running.append(Forked([sys.executable, "-m", "sdnb.train", *flags], stdout=file, stderr=file,
                                      env={**os.environ, **told}, start_new_session=True))  # fmt: skip
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()
