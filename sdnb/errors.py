"""Errors that a user can fix."""


class SdnbError(Exception):
    """Says what is wrong, where, and what to do. Shown without a traceback, also in a notebook."""

    def _render_traceback_(self) -> list[str]:
        # IPython calls this to show an exception.
        return [f"{type(self).__name__}: {self}"]


class ConfigError(SdnbError):
    """Settings that are misspelt, of the wrong type, out of range, or exclude each other."""


class ModelError(SdnbError):
    """A model that is missing or incomplete."""


class DataError(SdnbError):
    """A data set that is missing, or an example that cannot be used."""


class CacheError(SdnbError):
    """A cache folder that cannot be written."""


class Stopped(SdnbError):
    """A training that a signal has stopped in good order. `status` is the exit status for it: 128 + the signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RunError(SdnbError):
    """A run that cannot start or that failed, or a run folder that cannot be read."""
