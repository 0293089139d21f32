"""Page → one self-contained HTML file: no network, strict content security policy, everything escaped.

Styles and script are inlined and allowed by their hashes alone; data for the script are JSON blocks in which ``<``,
``>`` and ``&`` are written as escapes, so that no text can end a block or begin a comment. Equal input, equal bytes.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from saetool.artifacts import header as h
from saetool.errors import ArtifactError
from saetool.report.lettering import visible
from saetool.report.sections import Page

LAYOUT = 4
"""Rises when the page's form changes, so that an older page is made anew."""
_HEADER = re.compile(rb'<script type="application/json" id="saetool">(.*?)</script>', re.DOTALL)
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Form:
    """How a page looks and behaves, whatever it shows."""

    theme: str = "auto"
    """auto (as the reader's system), light or dark."""
    scripted: bool = True
    """Whether the page carries its script (values under the pointer, sorting, search, theme switch)."""


def render(page: Page, header: h.Header, form: Form | None = None, *, autoescape: bool = True) -> bytes:
    """The page as HTML (UTF-8), ``header`` inside it as its first JSON block.

    ``autoescape=False`` exists for the test that shows that escaping is what keeps hostile text harmless.
    """
    form = form or Form()
    loader = jinja2.PackageLoader("saetool.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=autoescape, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "json": _json_block}
    static = files("saetool.report") / "static"
    style = (static / "report.css").read_text("utf-8")
    script = (static / "report.js").read_text("utf-8")
    scripts = f"'{_hash(script)}'" if form.scripted else "'none'"
    html = environment.get_template("page.html").render(
        page=page,
        theme=form.theme,
        scripted=form.scripted,
        policy=Markup(
            f"default-src 'none'; script-src {scripts}; style-src '{_hash(style)}'; img-src data:; "
            "base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        script=Markup(script),
        header=header.to_json(),
        record=page.record(),
    )
    return _SURROGATES.sub("\N{REPLACEMENT CHARACTER}", html).encode("utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _json_block(value: Any) -> Markup:
    """JSON that is safe between script tags, whatever strings it holds."""
    text = h.canonical(h.finite(value))
    for character in ("<", ">", "&", "\u2028", "\u2029"):
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(_SURROGATES.sub(lambda m: f"\\u{ord(m.group()):04x}", text))


def read_header(data: bytes, where: str) -> h.Header:
    """The header in a page's bytes. Raises ``ArtifactError`` if it is no page of ours."""
    found = _HEADER.search(data)
    if found is None:
        raise ArtifactError(f"{where}: an HTML file that saetool report did not write")
    try:
        return h.parse(json.loads(found.group(1)), where)
    except ValueError:
        raise ArtifactError(f"{where}: its saetool header is damaged (not JSON)") from None
