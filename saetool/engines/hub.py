"""The Hugging Face hub: which commit a name stands for, and what a failing hub raises."""

from pathlib import Path

from saetool.artifacts.hub import first_line, network_errors
from saetool.errors import BackendError

__all__ = ["commit", "first_line", "network_errors"]


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
