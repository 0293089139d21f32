"""JSON records whose long lists of numbers lie in a ``.st`` file beside them, once there are many.

A record is one JSON file up to ``INLINE`` numbers in lists. Above, each list of at least ``LONG`` numbers goes to
NAME.arrays.st as a tensor called by its place in the record, such as ``pairs.0.data.path.mse``, and NAME.json holds
``{"array": PLACE}`` in its stead and names the other file with its SHA-256 under ``arrays``. NAME.json is written last:
what it names is there. Reading puts the lists back, number for number.

A list is of floats (float64) or of integers (int64); with nulls in it, PLACE.known is 0 at each. A list of rows of
equal length is a tensor for each column: PLACE.0, PLACE.1 and so on.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saetool.artifacts import container, writing
from saetool.artifacts import header as h
from saetool.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

INLINE = 500_000
"""Numbers in the lists of a record that are still JSON: 10 MB, which take 0.7 s to write and 0.4 s to read."""
LONG = 1000
"""Numbers of a list that is worth a tensor."""

Columns = list[Sequence[Any]]


def beside(path: Path) -> Path:
    """The file for the long lists of the record at ``path``."""
    return path.with_suffix(".arrays.st")


def up_to_date(path: Path, plan: h.Plan, *, overwrite: bool) -> bool:
    """``writing.up_to_date`` of a record and of what lies beside it: false if that is lost or another one."""
    there = writing.up_to_date(path, plan, overwrite=overwrite)
    if str(path) != "-":
        writing.up_to_date(beside(path), _beside(plan), overwrite=overwrite)
    if not there:
        return False
    stated = _stated(path, container.read_json(path)[1])
    return stated is None or _matches(*stated)


def write(path: Path, plan: h.Plan, header: h.Header, payload: Mapping[str, Any]) -> str:
    """Write a record, and what is too long for it beside it; ``-``: all of it to standard output. Its SHA-256."""
    if str(path) == "-" or _count(payload) <= INLINE:
        sha256 = writing.write_json(path, header, payload)
        if str(path) != "-" and _is_ours(beside(path)):
            beside(path).unlink()  # of a longer record that was here before
        return sha256
    tensors: dict[str, Tensor] = {}
    short = _taken_out(payload, "", tensors)
    of_arrays = _beside(plan).header(config={}, model=header.model)
    stated = {"file": beside(path).name, "sha256": writing.write_tensors(beside(path), tensors, of_arrays)}
    return writing.write_json(path, header, {**short, "arrays": stated})


def read(path: Path) -> tuple[h.Header, dict[str, Any]]:
    """Header and payload of a record, with all of its lists; ``-`` reads standard input.

    Raises ``ArtifactError`` if what it names is not beside it, or is not the file that it was written with.
    """
    header, payload = container.read_json(path)
    stated = _stated(path, payload)
    if stated is None:
        return header, payload
    file = stated[0]
    if str(path) == "-":
        raise ArtifactError(f"standard input: its long lists are in {file.name}, beside the file it came from")
    if not file.is_file():
        raise ArtifactError(f"{path}: its long lists are in {file.name}, which is not beside it", "copy both")
    if not _matches(*stated):
        raise ArtifactError(f"{path}: its long lists were in another {file.name} than is there", "make both again")
    del payload["arrays"]
    try:
        return header, _put_back(payload, container.read_tensors(file, h.ARRAYS).tensors)
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error.message.replace(str(file), file.name)}", error.hint) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: its long lists do not fit {file.name} ({error})", "make both again") from None


def _beside(plan: h.Plan) -> h.Plan:
    return dataclasses.replace(plan, schema=h.ARRAYS)


def _stated(path: Path, payload: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The file that a record says its long lists are in, beside it, and that file's SHA-256."""
    stated = payload.get("arrays")
    if stated is None:
        return None
    if not isinstance(stated, dict) or not all(isinstance(stated.get(name), str) for name in ("file", "sha256")):
        raise ArtifactError(f"{path}: is damaged (it does not say where its long lists are)", "make it again")
    return path.parent / Path(stated["file"]).name, stated["sha256"]


def _matches(file: Path, sha256: str) -> bool:
    return file.is_file() and h.sha256_file(file) == sha256


def _is_ours(file: Path) -> bool:
    try:
        return file.is_file() and container.read_header(file).schema == h.ARRAYS
    except ArtifactError:
        return False


def _count(value: Any) -> int:
    """Entries of all lists that are no lists or objects themselves."""
    if isinstance(value, Mapping):
        return sum(_count(inner) for inner in value.values())
    if not isinstance(value, list):
        return 0
    if not set(map(type, value)) & {list, dict}:
        return len(value)
    return sum(_count(inner) if isinstance(inner, (list, dict)) else 1 for inner in value)


def _taken_out(value: Any, place: str, tensors: dict[str, "Tensor"]) -> Any:
    """``value`` with its long lists in ``tensors``."""
    if isinstance(value, Mapping):
        return {name: _taken_out(inner, _below(place, name), tensors) for name, inner in value.items()}
    if not isinstance(value, list):
        return value
    columns, is_table = _columns(value)
    if columns is None:
        return [_taken_out(inner, _below(place, i), tensors) for i, inner in enumerate(value)]
    for i, column in enumerate(columns):
        for name, tensor in _tensors(column, _below(place, i) if is_table else place):
            tensors[name] = tensor
    return {"array": place, **({"columns": len(columns)} if is_table else {})}


def _below(place: str, name: object) -> str:
    return f"{place}.{name}" if place else str(name)


def _columns(values: list[Any]) -> tuple[Columns | None, bool]:
    """The columns of a long list of numbers (one column) or of rows of numbers; whether it is of rows.

    None for what is short or something else.
    """
    if not values or not isinstance(values[0], list):
        return ([values] if len(values) >= LONG and _is_numeric(values) else None), False
    width = len(values[0])
    if len(values) * width < LONG or len(values) < width or set(map(type, values)) != {list}:
        return None, True
    columns = list(zip(*values, strict=True)) if set(map(len, values)) == {width} else []
    return (columns if columns and all(map(_is_numeric, columns)) else None), True


def _is_numeric(values: Sequence[Any]) -> bool:
    """All floats or all integers, but for nulls."""
    return set(map(type, values)) - {type(None)} in ({float}, {int})


def _tensors(values: Sequence[Any], place: str) -> Iterator[tuple[str, "Tensor"]]:
    """The numbers, and which of them are: an undefined one is null in JSON, and 0 here."""
    import numpy as np
    import torch

    of = set(map(type, values))
    if of == {int}:
        yield place, torch.from_numpy(np.array(values, dtype=np.int64))
        return
    if int in of:
        known = np.array([v is not None for v in values])
        numbers = np.array([v or 0 for v in values], dtype=np.int64)
    else:
        numbers = np.array(values, dtype=np.float64)  # null is NaN
        known = np.isfinite(numbers)
        numbers[~known] = 0.0
    yield place, torch.from_numpy(numbers)
    if not known.all():
        yield f"{place}.known", torch.from_numpy(known.astype(np.uint8))


def _put_back(value: Any, tensors: Mapping[str, "Tensor"]) -> Any:
    if isinstance(value, list):
        return [_put_back(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"array"}:
        return _values(value["array"], tensors)
    if set(value) == {"array", "columns"}:
        columns = [_values(f"{value['array']}.{i}", tensors) for i in range(value["columns"])]
        return [list(row) for row in zip(*columns, strict=True)]
    return {name: _put_back(inner, tensors) for name, inner in value.items()}


def _values(place: str, tensors: Mapping[str, "Tensor"]) -> list[Any]:
    values = tensors[place].tolist()
    if (mask := tensors.get(f"{place}.known")) is None:
        return values
    return [v if known else None for v, known in zip(values, mask.tolist(), strict=True)]
