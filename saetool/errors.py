"""Errors a user can cause. Each is one line of what was found, and a hint of what to do."""


class SaetoolError(Exception):
    """Anything that ends a command with one line instead of a traceback.

    ``message`` says which file, what was found and what was expected; ``hint`` says what to do next.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ArtifactError(SaetoolError):
    """A file is missing, damaged, of another kind, or cannot be written."""


class ConfigError(SaetoolError):
    """Options that cannot work, alone or together (exit code 2: a usage error)."""

    exit_code = 2


class BackendError(SaetoolError):
    """A model, tokenizer, dataset or other outside service could not be had."""
