"""HTML pages that need nothing but themselves, from the package's templates: whatever a page is given is escaped.

Light and dark, narrow and wide. A page holds its style, its script and its pictures, and its policy forbids it to load
or to run anything else: even text that were not escaped could do nothing.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from hf_freeze.files import write_whole

__all__ = ["TEMPLATES", "data_uri", "render_page", "write_page"]

TEMPLATES = Path(__file__).parent / "templates"


def write_page(path: Path, template: str, **values: Any) -> None:
    """Renders a page and writes it, whole or not at all; see `render_page`."""
    write_whole(path, render_page(template, **values))


def render_page(template: str, **values: Any) -> str:
    """The HTML of a template that extends layout.html. Strings among the values are text, never HTML.

    Args:
        template: The name of a file in `TEMPLATES`.
        values: What the template shows; `title` always. A name that the template needs and does not get is an error.

    >>> page = render_page("layers.html", title="<b>", texts="2 texts", pictures=[])
    >>> "<h1>&lt;b&gt;</h1>" in page, "://" in page
    (True, False)
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    values |= {"style": Markup(style), "script": Markup(script), "script_digest": digest}
    page = environment.get_template(template).render(values)
    return page.encode("utf-8", "replace").decode()  # half a surrogate pair, which JSON may hold, is no UTF-8


def data_uri(content: bytes, kind: str) -> str:
    """A picture as the address of an image, so that it lies in the page; in an SVG there, no script runs.

    >>> data_uri(b"<svg/>", "svg+xml")
    'data:image/svg+xml;base64,PHN2Zy8+'
    """
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
