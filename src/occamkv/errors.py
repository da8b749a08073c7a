"""The errors of occamkv. Each message says what was given, what is allowed and what to do."""


class OccamError(Exception):
    """Base class of every error that occamkv raises on purpose."""


class UnsupportedFormat(OccamError, ValueError):
    """A method or format was asked for something it cannot store."""


class UnsupportedInput(OccamError, ValueError):
    """A tensor or an argument has a shape, dtype or value that is not allowed. No state was changed."""


class CacheMismatch(OccamError, ValueError):
    """A cache was used with another model, batch size or dtype than it holds. No state was changed."""


class UnsupportedModel(OccamError, ValueError):
    """A model, or the part of it that was to be changed, cannot be handled; the message says why."""


class NothingQuantized(OccamError):
    """Not one layer of the model can be packed, so a packed cache would be an ordinary cache."""


class BackendUnavailable(OccamError):
    """No backend takes this format on this device; the message lists each refusal."""
