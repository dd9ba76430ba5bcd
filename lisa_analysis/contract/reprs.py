"""Small pieces of HTML with which objects show themselves in a notebook."""

import html
from collections.abc import Iterable, Sequence

# Jupyter sets the cells of every table flush right, which is for numbers, not for sentences.
_LEFT = ' style="text-align:left;vertical-align:top"'


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of two columns, name and value; rows without a value are left out."""
    body = "".join(
        f"<tr><th scope='row'{_LEFT}>{_text(name)}</th><td{_LEFT}>{_text(value)}</td></tr>"
        for name, value in rows
        if value is not None
    )
    return f"<table><tbody>{body}</tbody></table>"


def sentences(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of text, flush left; the second column names the row."""
    head = "".join(f"<th scope='col'{_LEFT}>{_text(heading)}</th>" for heading in headings)
    body = ""
    for row in rows:
        cells = [f"<td{_LEFT}>{_text(cell)}</td>" for cell in row]
        cells[1] = f"<th scope='row'{_LEFT}>{_text(row[1])}</th>"
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: object) -> str:
    return html.escape(str(value))
