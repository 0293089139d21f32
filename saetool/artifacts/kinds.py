"""Whose file a path is, from what can be seen without torch."""

from pathlib import Path

from saetool.artifacts import hub
from saetool.artifacts.container import FOREIGN_SUFFIXES, METADATA_KEY, read_table


def is_foreign(path: Path) -> bool:
    """Whether ``path``, where an SAE is wanted, is another library's: an address, a folder, a file of a kind that is
    never ours, or safetensors without our header."""
    if str(path) == "-":
        return False
    if hub.is_address(path) or path.is_dir() or path.suffix in FOREIGN_SUFFIXES:
        return True
    return path.suffix == ".safetensors" and path.is_file() and METADATA_KEY not in read_table(path)[1]
