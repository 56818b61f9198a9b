"""What differs between the versions of the libraries, from those of early 2024 to today's: known here alone."""

from __future__ import annotations


def first_failure(error: Exception) -> tuple[int, int]:
    """The rank that failed first, and its exit code (a signal's number with a minus), from what accelerate's
    notebook_launcher raises: accelerate before 1.0 starts ranks with torch's `start_processes`, later with its elastic
    agent. Anything else is raised again."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.multiprocessing import ProcessExitedException

    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        return rank, failure.exitcode
    if isinstance(error, ProcessExitedException):
        return error.error_index, error.exit_code
    raise error
