"""Jinja templates and assets -> one HTML document that needs nothing else."""

import base64
import functools
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lisa_analysis.views.html_report.format import FILTERS, clean


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
        loader=PackageLoader("lisa_analysis.views.html_report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters.update(FILTERS)
    return environment


@functools.cache
def _asset(name: str) -> str:
    return (
        resources.files("lisa_analysis.views.html_report")
        .joinpath("assets", name)
        .read_text("utf-8")
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _finalize(value: Any) -> Any:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
