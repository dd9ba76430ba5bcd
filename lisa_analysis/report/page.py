"""Jinja templates and assets -> one HTML document that needs nothing else."""

import base64
import functools
import hashlib
import unicodedata
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lisa_analysis.report.format import FILTERS


def render(template: str, context: Mapping[str, Any]) -> str:
    """Render `template` with styles, script and the policy that allows exactly that script."""
    script = _asset("report.js")
    return _environment().get_template(template).render(
        **context,
        style=Markup(_asset("report.css")),
        script=Markup(script),
        script_hash=_hash(script),
    )  # fmt: skip


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("lisa_analysis.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_clean,
    )
    environment.filters.update(FILTERS)
    return environment


@functools.cache
def _asset(name: str) -> str:
    return resources.files("lisa_analysis.report").joinpath("assets", name).read_text("utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _clean(value: Any) -> Any:
    """Replace what could disturb the page or deceive its reader although it is escaped.

    Control characters and lone surrogates are not HTML; directional overrides show a name in an
    order in which it is not written.
    """
    if not isinstance(value, str) or isinstance(value, Markup) or value.isascii():
        return value if not isinstance(value, str) or value.isprintable() else _visible(value)
    return _visible(value)


def _visible(text: str) -> str:
    if isinstance(text, Markup):
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "\ufffd"
        for c in text
    )
