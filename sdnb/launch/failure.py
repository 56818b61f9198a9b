"""Why a rank failed, in words for the user."""

import signal
import traceback
from pathlib import Path

from sdnb.errors import RunError, SdnbError
from sdnb.run import folder as run_folder
from sdnb.settings.config import TrainConfig


def details_of(error: Exception, config: TrainConfig | None) -> str:
    """The message of an error that the user can mend, else the traceback. If memory ran out, it names the settings that
    help. Call it where the exception is handled."""
    if isinstance(error, SdnbError):
        return str(error)
    from sdnb.launch import memory  # it loads torch, which a misspelt flag need not wait for
    from sdnb.machine.device import ran_out_of_memory

    if config is None or not ran_out_of_memory(error):
        return traceback.format_exc()
    first_line = str(error).partition("\n")[0] or type(error).__name__
    return f"memory ran out: {first_line}\n{memory.advice_after_running_out(config)}"


def write_down(folder: Path, rank: int, what: str, details: str) -> int:
    """Write a rank's failure into the run folder. Returns the exit status of its process: 1, or the system's number of
    the error if nothing can be written there, as on a full disk."""
    try:
        run_folder.fail(folder, rank, what, details)
    except RunError as error:
        return getattr(error.__cause__, "errno", None) or 1
    return 1


def how_it_was_killed(number: int) -> str:
    """For a process that a signal ended."""
    by = "SIGKILL, sent by a user, or by the system because memory ran out" if number == signal.SIGKILL else ""
    return f"was killed by {by or signal.Signals(number).name}"


def advice_when_killed(number: int, config: TrainConfig) -> str:
    """A line about memory if the system may have ended the process for lack of it, else nothing."""
    from sdnb.launch import memory

    return f"If it was memory: {memory.advice_after_running_out(config)}\n" if number == signal.SIGKILL else ""
