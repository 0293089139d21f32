"""Reading other people's files as if they were hostile: sizes are checked before anything is allocated, and no code
in a file is run.

    .safetensors    declared shapes against the file's size; a sharded file's index may name files beside it only
    .pt, .pth       PyTorch's zip format, entries stored (no compression, so no bomb), weights-only unpickling, shapes
                    looked at without data first
    .npz            declared shapes against the entries' sizes, these against the file's; no pickled objects
    .json           an object, of at most 10 MB
"""

import json
import math
import pickle
import stat
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from saetool.artifacts import container
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

REFUSED = "ask its author for a safetensors file, or leave it alone"
_MAX_JSON = 10_000_000
_MAX_PICKLE = 16_000_000
_MAX_RATIO = 20
"""Uncompressed over compressed bytes of an .npz: weights hardly compress, a bomb does thousandfold."""
_FLOATS = ("F64", "F32", "F16", "BF16")
Value = Any
"""What a .pt file may hold beside tensors: numbers, strings, None and dictionaries of them."""


def regular(path: Path) -> Path:
    """``path`` if it is an ordinary file (or a link to one); a pipe or a device would hang or never end."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        raise ArtifactError(f"{path}: is not a regular file", REFUSED)
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    size = regular(path).stat().st_size
    if size > _MAX_JSON:
        raise ArtifactError(f"{path}: {size} bytes, too large for a configuration", REFUSED)
    try:
        data = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: not JSON ({reason})", "is the file cut off? copy it again") from None
    if not isinstance(data, dict):
        raise ArtifactError(f"{path}: holds no object, and a configuration was expected", "is it the right file?")
    return data


def floats(tensors: dict[str, "Tensor"], path: Path) -> dict[str, "Tensor"]:
    """``tensors`` if all are floating point of 16 to 64 bits, or whole-number scalars (k, a step count)."""
    import torch

    allowed = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed and (tensor.dim() > 1 or tensor.dtype.is_complex):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ArtifactError(
                f"{path}: {name} is {kind}, and float16, bfloat16, float32 or float64 was expected", REFUSED
            )
    return tensors


# --- safetensors -----------------------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, "Tensor"]:
    """All tensors of a safetensors file, or of the files that ``NAME.safetensors.index.json`` lists."""
    from safetensors.torch import load_file

    index = path.with_name(path.name + ".index.json")
    parts = [path] if path.exists() or not index.exists() else indexed(index)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        table, _ = container.read_table(regular(part))
        for name, info in table.items():
            if info.dtype not in _FLOATS and len(info.shape) > 1:
                raise ArtifactError(f"{part}: {name} is {info.dtype}, and {', '.join(_FLOATS)} was expected", REFUSED)
        tensors |= load_file(part)
    return floats(tensors, path)


def indexed(index: Path) -> list[Path]:
    """The files of a sharded safetensors file. A name that leads out of the folder is refused."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise ArtifactError(f"{index}: has no weight_map of file names", "copy it again")
    for name in table.values():
        if not name or name in (".", "..") or Path(name).name != name or "\\" in name:
            raise ArtifactError(f"{index}: names {name!r}, which is not a file beside it", REFUSED)
    return [index.with_name(name) for name in sorted(set(table.values()))]


# --- PyTorch ---------------------------------------------------------------------------------------------------


def read_torch(path: Path) -> tuple[dict[str, "Tensor"], dict[str, Value]]:
    """Tensors and other values of a state dict saved by ``torch.save``; nested dictionaries get dotted names."""
    import torch

    _check_zip(regular(path))
    _declared(path)
    data = _load(path, "cpu")
    tensors: dict[str, Tensor] = {}
    values: dict[str, Value] = {}

    def collect(entries: dict[Any, Any], prefix: str, depth: int) -> None:
        for key, value in entries.items():
            name = f"{prefix}{key}"
            if isinstance(value, torch.Tensor):
                tensors[name] = value.detach().contiguous()
            elif isinstance(value, dict) and depth < 4:
                values.setdefault(name, {})
                collect(value, f"{name}.", depth + 1)
            else:
                values[name] = value

    collect(data, "", 0)
    return floats(tensors, path), values


def _check_zip(path: Path) -> None:
    """Raise unless ``path`` is PyTorch's zip format, each entry stored as it is, within the file's size."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        raise ArtifactError(
            f"{path}: is not in PyTorch's zip format (a bare pickle, or damaged)",
            "torch.save of PyTorch 1.6 or newer writes it; bare pickles are not read",
        ) from None
    size = path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ArtifactError(f"{path}: has compressed entries, and torch.save stores them as they are", REFUSED)
    total = sum(entry.file_size for entry in entries)
    if total > size:
        raise ArtifactError(f"{path}: its entries claim {total} bytes in a file of {size}", REFUSED)
    pickles = [entry.file_size for entry in entries if entry.filename.endswith("data.pkl")]
    if not pickles or max(pickles) > _MAX_PICKLE:
        raise ArtifactError(f"{path}: has no data.pkl of reasonable size", REFUSED)


def _load(path: Path, device: str) -> dict[Any, Any]:
    import torch

    try:
        data = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        what = "needs code to be run" if "nsupported" in text or "GLOBAL" in text else "is no plain state dict"
        raise ArtifactError(
            f"{path}: {what}, and only tensors and plain values are read; nothing of it was run", REFUSED
        ) from None
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, MemoryError,
            RecursionError, OverflowError, AssertionError) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise ArtifactError(f"{path}: is damaged ({reason})", "copy it again") from None
    if not isinstance(data, dict):
        raise ArtifactError(
            f"{path}: holds a {type(data).__name__}, and a state dict (names and tensors) was expected", REFUSED
        )
    return data


def _declared(path: Path) -> None:
    """Raise if the tensors in ``path`` claim more bytes than it has. Looked at on the meta device: without data."""
    import torch

    size, total = path.stat().st_size, 0
    stack: list[Any] = list(_load(path, "meta").values())
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack.extend(value.values())
        elif isinstance(value, torch.Tensor):
            if value.layout != torch.strided:
                raise ArtifactError(f"{path}: has sparse tensors, and plain ones were expected", REFUSED)
            total += max(value.numel() * value.element_size(), value.untyped_storage().nbytes())
            if total > 2 * size:  # two names of one tensor are fair
                raise ArtifactError(f"{path}: its tensors claim more than {total} bytes in a file of {size}", REFUSED)


# --- NumPy -----------------------------------------------------------------------------------------------------


def read_npz(path: Path) -> dict[str, "Tensor"]:
    """The arrays of an ``.npz`` file; declared sizes are checked before a byte of data is unpacked."""
    import numpy as np
    import torch

    size = regular(path).stat().st_size
    arrays: dict[str, Tensor] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > _MAX_RATIO * size:
                raise ArtifactError(f"{path}: a file of {size} bytes that unpacks to {total}", REFUSED)
            for entry in entries:
                with archive.open(entry) as file:
                    array = _read_array(file, entry, path)
                arrays[entry.filename.removesuffix(".npy")] = torch.from_numpy(np.ascontiguousarray(array))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError, ValueError, EOFError, SyntaxError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise ArtifactError(f"{path}: not a readable .npz file ({reason})", "copy it again") from None
    return floats(arrays, path)


def _read_array(file: IO[bytes], entry: zipfile.ZipInfo, path: Path) -> Any:
    """One array, read only if its declared shape and type fill exactly the entry's declared size."""
    import numpy as np

    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file, max_header_size=10_000)
    if dtype.hasobject:
        raise ArtifactError(f"{path}: {entry.filename} holds pickled objects; nothing of it was run", REFUSED)
    if dtype.kind not in "fiub":
        raise ArtifactError(f"{path}: {entry.filename} is {dtype}, and floating point was expected", REFUSED)
    wanted = math.prod(shape) * dtype.itemsize
    if wanted != entry.file_size - file.tell():
        raise ArtifactError(
            f"{path}: {entry.filename} is declared as {list(shape)} {dtype}, and has {entry.file_size} bytes", REFUSED
        )
    data = file.read(wanted)
    if len(data) != wanted:
        raise ArtifactError(f"{path}: {entry.filename} is cut off", "copy it again")
    array = np.frombuffer(data, dtype=dtype).reshape(shape[::-1] if fortran else shape)
    return (array.T if fortran else array).astype(dtype.newbyteorder("="))
