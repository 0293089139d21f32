"""The Hugging Face hub: which commit a name stands for, and what a failing hub raises."""

from pathlib import Path

from saetool.errors import BackendError


def commit(name: str, kind: str, hint: str) -> str:
    """The commit of ``name`` (``org/name`` or ``org/name@revision``), of ``kind`` model or dataset.

    Asks the hub, or without a connection the local cache. Raises ``BackendError`` with ``hint`` if neither knows it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    repository, _, revision = name.partition("@")
    try:
        # Downloads nothing, and returns …/snapshots/<commit>.
        folder = snapshot_download(repository, repo_type=kind, revision=revision or None, allow_patterns=[])
    except (*network_errors(), ValueError) as error:
        raise BackendError(
            f"{name}: no such {kind} here, and the hub does not give it ({first_line(error)})", hint
        ) from None
    return Path(folder).name


def network_errors() -> tuple[type[Exception], ...]:
    """What a failing hub raises: ``OSError``, and the errors of its HTTP library (which has changed more than once, so
    they are taken from the bases of the hub's own error)."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception]
    return (OSError, *bases)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
