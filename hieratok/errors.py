"""The exceptions people meet. Each message names what is wrong and what to do about it."""


class HieratokError(Exception):
    """Base of every error this package raises on purpose; the command line prints it without a traceback."""


class ConfigError(HieratokError, ValueError):
    """A field or key of a configuration is unknown, mistyped or inconsistent with another."""


class DataError(HieratokError):
    """A data set cannot be read, is empty, or holds more bad images than it may."""


class CheckpointError(HieratokError):
    """A checkpoint or model folder is missing, incomplete, corrupt or of another run."""


class NonFiniteError(HieratokError):
    """A loss or gradient norm became NaN or infinite; raised before the optimizer's step."""


class ProtocolError(HieratokError, ValueError):
    """A metric was asked for under conditions in which its value would mean nothing."""


class MissingDependencyError(HieratokError, ImportError):
    """An optional library is needed; the message holds the command that installs it."""
