"""The errors that a user can cause. Each carries one line that names the cause and the remedy."""


class CoreskipError(ValueError):
    """A user's mistake: wrong model, wrong plan, wrong text, wrong option. Nothing was patched or written."""


class PlanError(CoreskipError):
    """A Plan that cannot be read, or that does not belong to the model at hand."""
