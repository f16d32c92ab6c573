"""The errors and warnings that noisewise raises; every message quotes the offending value and says what to do."""

import importlib
from types import ModuleType

__all__ = ["InvalidInput", "MissingExtra", "NoisewiseError", "NoisewiseWarning", "RunFolderError", "require"]


class NoisewiseError(Exception):
    """Base class of every error that noisewise raises on purpose."""


class InvalidInput(NoisewiseError, ValueError):
    """An argument, target or start that cannot work; raised before any long work begins."""


class RunFolderError(NoisewiseError):
    """A run folder or saved file of another class, schema or configuration, or one that is damaged."""


class MissingExtra(NoisewiseError, ImportError):
    """An optional library is not installed; the message carries the pip line that mends it."""


class NoisewiseWarning(UserWarning):
    """A result that stands on weak ground; the message names the remedy."""


def require(module: str, extra: str) -> ModuleType:
    """Import and return `module`, or raise `MissingExtra` with the pip line of `extra`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise MissingExtra(
            f"{name} is not installed ({error}); install it with: pip install 'noisewise[{extra}]'"
        ) from error
