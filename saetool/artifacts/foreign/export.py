"""Writing an SAE as a folder that another library reads, proved by reading it back.

The folder also holds ``saetool.json``: our header, the hashes of the files, and the proof, in which the target
library's own formula on the written tensors gives what the SAE gives. By its key an up-to-date folder is recognised.
"""

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.artifacts.foreign import READERS, WRITERS, proof_record, refusal
from saetool.artifacts.foreign.find import find
from saetool.artifacts.foreign.imported import Asked
from saetool.core import proof
from saetool.core.sae import SAE
from saetool.errors import ArtifactError

RECORD = "saetool.json"


@dataclass(frozen=True)
class Exported:
    """What was written, or found up to date."""

    header: h.Header
    sha256: str
    """Of ``saetool.json``, which holds the other files' hashes."""
    proof: dict[str, Any]


def up_to_date(folder: Path, plan: h.Plan, *, overwrite: bool) -> Exported | None:
    """The folder's record if it is the one wanted. Raises ``ArtifactError`` if something else is in the way."""
    real = Path(os.path.realpath(folder))
    if str(folder) == "-":
        raise ArtifactError("-o -: an export is a folder, it cannot go to standard output", "give -o FOLDER")
    if real.exists() and not real.is_dir():
        raise ArtifactError(f"{folder}: is a file, and an export is a folder", "choose another output with -o")
    if not real.parent.is_dir():
        raise ArtifactError(f"{folder}: its folder {real.parent.name}/ does not exist", "make the folder first")
    if not os.access(real.parent, os.W_OK):
        raise ArtifactError(f"{folder}: its folder is not writable", "choose another output with -o")
    if not real.is_dir() or not any(real.iterdir()):
        return None
    if not (real / RECORD).is_file():
        raise ArtifactError(f"{folder}: is a folder with something else in it", "choose another output with -o")
    header, payload = container.read_json(real / RECORD)
    h.expect(header, h.EXPORT, str(folder / RECORD))
    if overwrite:
        return None
    if header.key != plan.key:
        raise writing.another(folder, plan, header)
    for name, sha256 in payload["files"].items():
        file = real / name
        if not file.is_file() or h.sha256_file(file) != sha256:
            raise ArtifactError(f"{folder / name}: is not the file that was exported", "pass --overwrite to replace it")
    return Exported(header, h.sha256_file(real / RECORD), payload["proof"])


def write(folder: Path, sae: SAE, source: h.Header, plan: h.Plan, target: str) -> Exported:
    """Write ``sae`` (whose header is ``source``) as ``target`` into ``folder``, which appears when it is proved."""
    real = Path(os.path.realpath(folder))
    partial = real.with_name(f".{real.name}.{secrets.token_hex(6)}.tmp")
    partial.mkdir()
    try:
        WRITERS[target](sae, source, partial)
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(writing.new_mode())  # safetensors' own writer makes files that their owner alone may read
        proved = _proved(partial, sae, target, folder)
        files = {p.relative_to(partial).as_posix(): h.sha256_file(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        record = {"format": target, "files": files, "proof": proof_record(proved)}
        header = plan.header(config={"format": target}, model=source.model, seed=source.seed, dtype="float32")
        sha256 = writing.write_json(partial / RECORD, header, record)
        if real.exists():
            shutil.rmtree(real)
        os.replace(partial, real)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(header, sha256, proof_record(proved))


def _proved(partial: Path, sae: SAE, target: str, folder: Path) -> proof.Proof:
    """The written files, read back: the target library's formula on them against ``sae``."""
    asked = Asked(format=target)
    imported = READERS[target](find(partial, str(folder), asked), asked)
    result = proof.prove(sae, imported.other, batch=imported.whole_batch)
    if not result.holds:
        raise ArtifactError(
            refusal(str(folder), imported.formula, result), "nothing was written; please report this SAE"
        )
    return result
