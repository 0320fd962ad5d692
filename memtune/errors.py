"""The errors of memtune: each message says what was got, what was expected and what to do."""


class MemtuneError(Exception):
    """Base of every error that memtune raises on purpose.

    Example:
        >>> try:
        ...     memtune.load("nowhere/at-all-adapter")
        ... except memtune.MemtuneError as error:
        ...     told = str(error)
    """


class ConfigError(MemtuneError, ValueError):
    """A setting has the wrong type or value, or does not fit the backbone or the other settings."""


class InputError(MemtuneError, ValueError):
    """Images, labels or a data set are not what the model takes."""


class UnsupportedBackboneError(MemtuneError, ValueError):
    """The model is not one whose blocks and roles are known, or lacks what the mode asks for."""


class CheckpointError(MemtuneError, ValueError):
    """An adapter folder is missing, incomplete, damaged or of an unknown format."""


class BackboneMismatchError(MemtuneError, ValueError):
    """An adapter was trained on another backbone than the one given."""


class HubError(MemtuneError, OSError):
    """The Hugging Face Hub could not be reached, refused, or does not have what was asked for."""
