"""The one exception that sdnb raises for what a user can put right."""


class SdnbError(Exception):
    """Says what is wrong, where, and what to do. Shown without a traceback, in a notebook too."""

    def _render_traceback_(self) -> list[str]:
        # IPython's hook for an exception that knows best how to show itself.
        return [f"{type(self).__name__}: {self}"]


class ConfigError(SdnbError):
    """Settings that are misspelt, of the wrong type, out of range, or that exclude each other."""


class ModelError(SdnbError):
    """A model that is not there, or not complete."""


class DataError(SdnbError):
    """A data set that is not there, or an example in it that cannot be used."""


class CacheError(SdnbError):
    """A cache folder that cannot be written."""


class RunError(SdnbError):
    """A run that cannot start, that failed, or a run folder that cannot be read."""
