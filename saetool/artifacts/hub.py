"""The Hugging Face hub: ``hf://owner/repository[@revision]/path``, and what a failing hub raises.

huggingface_hub does the work, and so HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT hold. Only the files of one
SAE are downloaded, into the hub's own cache.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from saetool.errors import ArtifactError, BackendError, ConfigError

_EXAMPLE = "example: hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"


@dataclass(frozen=True)
class Address:
    """One place in one repository."""

    repository: str
    revision: str | None
    path: str
    """Folder or file in it; empty: the whole repository."""


def is_address(path: Path | str) -> bool:
    """Whether ``path`` is an ``hf://`` address (``Path`` makes one slash of two)."""
    return str(path).startswith("hf:/")


def parse(text: str) -> Address:
    """The address in ``text``. Raises ``ConfigError`` if it is none, or leads out of the repository."""
    parts = [part for part in text.removeprefix("hf:").split("/") if part]
    if len(parts) < 2 or any(part in (".", "..") or "\\" in part for part in parts):
        raise ConfigError(f"{text}: not hf://owner/repository[@revision]/path", _EXAMPLE)
    name, _, revision = parts[1].partition("@")
    if not all(re.fullmatch(r"[\w.-]+", part) for part in (parts[0], name)) or (revision == "" and "@" in parts[1]):
        raise ConfigError(f"{text}: not hf://owner/repository[@revision]/path", _EXAMPLE)
    return Address(f"{parts[0]}/{name}", revision or None, "/".join(parts[2:]))


def described(text: str, local: Path) -> dict[str, str]:
    """What a header says of an address: repository, path, and the commit that ``local``, its snapshot, is of."""
    address = parse(text)
    folders = local.parts
    at = folders.index("snapshots") + 1 if "snapshots" in folders else len(folders)
    return {"repository": address.repository, "path": address.path, "commit": "".join(folders[at : at + 1])}


def fetch(text: str) -> Path:
    """The local path of what the address ``text`` names: downloaded, or from the hub's cache when offline.

    Raises ``BackendError`` if the hub does not give it, ``ArtifactError`` if there are several SAEs at it.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    address = parse(text)
    shown = str(text) if "://" in str(text) else str(text).replace("hf:/", "hf://", 1)
    disable_progress_bars()
    try:
        if constants.HF_HUB_OFFLINE:
            root = snapshot_download(
                address.repository, revision=address.revision, local_files_only=True, allow_patterns=[]
            )
        else:
            names = HfApi().list_repo_files(address.repository, revision=address.revision)
            wanted = _wanted(names, address.path, shown)
            root = snapshot_download(address.repository, revision=address.revision, allow_patterns=wanted)
    except (*network_errors(), ValueError) as error:
        raise BackendError(
            f"{shown}: not here, and the hub does not give it ({first_line(error)})",
            "check the name and the connection (HF_TOKEN for private repositories); a local folder needs no hub",
        ) from None
    place = Path(root) / address.path
    if not place.exists():
        raise BackendError(
            f"{shown}: no such file or folder in the repository's copy here",
            "without HF_HUB_OFFLINE it would be downloaded",
        )
    return place


def _wanted(names: list[str], path: str, shown: str) -> list[str]:
    """The files to download for the SAE at ``path``: its weights and the small files that explain them."""
    from saetool.artifacts.container import FOREIGN_SUFFIXES
    from saetool.artifacts.foreign.find import LAYOUTS, several

    if path in names:
        folder = path.rpartition("/")[0]
        beside = [f"{folder}/{n}".lstrip("/") for n in ("cfg.json", "config.json", "hyperparams.json")]
        return [_literal(n) for n in [path, *(b for b in beside if b in names)]]
    prefix = f"{path}/" if path else ""
    inside = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    weights = {w for _, _, w, _ in LAYOUTS}
    homes = sorted(
        {n.removesuffix(w).rstrip("/") for n in inside for w in weights if n == w or n.endswith(f"/{w}")}
        | {n for n in inside if "/" not in n and n.endswith(FOREIGN_SUFFIXES) and n not in weights}
    )
    if not homes:
        found = ", ".join(sorted({n.split("/")[0] for n in inside})[:8]) or "nothing"
        raise ArtifactError(f"{shown}: no SAE that saetool can read (there is {found})", _EXAMPLE)
    if len(homes) > 1:
        raise several(shown, homes)
    home = f"{prefix}{homes[0]}".rstrip("/")
    small = {n for _, needs, _, more in LAYOUTS for n in (*needs, *more)}
    known = {f"{home}/{n}".lstrip("/") for n in (*small, *weights, *(f"{w}.index.json" for w in weights))}
    above = {f"{home.rpartition('/')[0]}/config.json".lstrip("/")}
    return [_literal(n) for n in names if n in known | above or n == home]


def _literal(name: str) -> str:
    """``name`` as a pattern that matches itself alone."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def network_errors() -> tuple[type[Exception], ...]:
    """What a failing hub raises: ``OSError``, and the errors of its HTTP library (which has changed more than once, so
    they are taken from the bases of the hub's own error)."""
    from huggingface_hub.errors import HfHubHTTPError

    bases = [c for c in HfHubHTTPError.__mro__ if issubclass(c, Exception) and c is not Exception]
    return (OSError, *bases)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
