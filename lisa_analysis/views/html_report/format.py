"""Numbers, times and names as people read them: the template's filters."""

import math
import re
import unicodedata
from typing import Any

from markupsafe import Markup, escape

NOTHING = "–"
_MINUS = "\u2212"
_SECRET_KEY = re.compile(
    r"(?i)((?:[\w.-]*(?:token|secret|passw(?:or)?d|api[_-]?key|credential)[\w.-]*)"
    r"[\"']?\s*(?:[:=]|\s)\s*)(\"[^\"]*\"|'[^']*'|[^\s,}]+)"
)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|xox[abp]-|AKIA)[A-Za-z0-9_\-]{12,}")
# One letter, then a subscript: θ_t, W_0, θ_{t+1}; not the underscores of names.
_SUBSCRIPT = re.compile(r"(?<![^\W_])([^\W\d_])_(?:\{([^{}]+)\}|([^\W_]))(?![^\W])")
# Counts and settings that only sound like a secret.
_HARMLESS = re.compile(
    r"(?i)(max|num|pad|eos|bos|unk|n|seen|per)[_-]?\w*tokens?|tokens?_(seen|per)|tokenizer|tokens\b|token_id"
)


def number(value: Any, digits: int = 3) -> str:
    """Format with `digits` significant digits; powers of ten outside 1e-3 … 1e5.

    >>> number(0.012345), number(-2.5e-7), number(123456.0), number(None)
    ('0.0123', '−2.5×10⁻⁷', '1.23×10⁵', '–')
    """
    value = _float(value)
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{_MINUS if value < 0 else ''}∞"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 < exponent < 5:
        places = max(0, digits - 1 - exponent)
        text = f"{value:,.{places}f}"
        if places:
            text = text.rstrip("0").rstrip(".")
        return text.replace("-", _MINUS)
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    superscript = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa}×10{superscript}".replace("-", _MINUS)


def known(value: Any, digits: int = 3) -> str:
    """Format like `number` where NaN means that the value is unknown.

    >>> known(float("nan")), known(0.5)
    ('–', '0.5')
    """
    value = _float(value)
    return NOTHING if value is None or math.isnan(value) else number(value, digits)


def loss(value: Any) -> str:
    """Format a loss with three decimals, the last zeros too: a column of them lines up.

    >>> loss(2.34567), loss(3.35), loss(0.0012345)
    ('2.346', '3.350', '0.001234')
    """
    value = _float(value)
    if value is not None and 0.1 <= abs(value) < 1000:
        return f"{value:.3f}".replace("-", _MINUS)
    return known(value, 4)


def correlation(value: Any) -> str:
    """Format a number in [−1, 1] with two decimals.

    >>> correlation(0.7), correlation(-0.123), correlation(float("nan"))
    ('0.70', '−0.12', '–')
    """
    value = _float(value)
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:.2f}".replace("-", _MINUS)


def signed(value: Any) -> str:
    """Format a difference of losses with its sign and four decimals.

    >>> signed(0.01274), signed(-0.0043), signed(float("nan"))
    ('+0.0127', '−0.0043', '–')
    """
    value = _float(value)
    if value is None or math.isnan(value):
        return NOTHING
    return f"{value:+.4f}".replace("-", _MINUS)


def count(value: Any) -> str:
    """Format a whole number with separators.

    >>> count(1234567), count(None)
    ('1,234,567', '–')
    """
    value = _float(value)
    if value is None or not math.isfinite(value):
        return NOTHING
    return f"{round(value):,}".replace("-", _MINUS)


def percent(value: Any, digits: int = 2) -> str:
    """Format a share as a percentage.

    >>> percent(0.1234), percent(None)
    ('12 %', '–')
    """
    value = _float(value)
    return NOTHING if value is None else f"{number(100 * value, digits)} %"


def seconds(value: Any) -> str:
    """Format a duration.

    >>> seconds(0.25), seconds(75), seconds(7322), seconds(None)
    ('0.25 s', '1 min 15 s', '2 h 2 min', '–')
    """
    value = _float(value)
    if value is None or not math.isfinite(value):
        return NOTHING
    if value < 60:
        return f"{number(value)} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def size(value: Any) -> str:
    """Format bytes with binary prefixes.

    >>> size(1536), size(3 * 2**30), size(None)
    ('1.5 KiB', '3 GiB', '–')
    """
    value = _float(value)
    if value is None or not math.isfinite(value):
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{number(value)} {unit}"
        value /= 1024
    return f"{number(value)} TiB"


def with_bounds(value: Any, digits: int = 3) -> str:
    """Format anything with value, low and high; without bounds it says that data was too little.

    >>> from types import SimpleNamespace as N
    >>> with_bounds(N(value=0.5, low=0.4, high=0.61))
    '0.5 (0.4–0.61)'
    >>> with_bounds(N(value=0.5, low=None, high=None))
    '0.5 (no interval)'
    """
    if value is None:
        return NOTHING
    low, high = _float(value.low), _float(value.high)
    middle = number(value.value, digits)
    if middle == NOTHING:
        return middle
    if middle == "NaN":
        return NOTHING
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return f"{middle} (no interval)"
    return f"{middle} ({number(low, digits)}–{number(high, digits)})"


def as_datum(value: Any) -> str:
    """Format a datum for a table's CSV: digits that a program reads back; of an interval its value.

    >>> as_datum(0.1234567), as_datum(3.0), as_datum(float("nan")), as_datum("x")
    ('0.123457', '3', '', 'x')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    value = float(getattr(value, "value", value))
    return "" if math.isnan(value) else f"{value:.6g}"


def redact(text: Any) -> str:
    """Replace what looks like a secret by ``[redacted]``.

    >>> redact("--hub_token hf_abcdefghijklmnopqrst --max_tokens 5")
    '--hub_token [redacted] --max_tokens 5'
    """

    def replace(match: re.Match[str]) -> str:
        return match[0] if _HARMLESS.search(match[1]) else f"{match[1]}[redacted]"

    return _SECRET_VALUE.sub("[redacted]", _SECRET_KEY.sub(replace, str(text)))


def breakable(name: Any) -> Markup:
    """Escape a long dotted name and allow line breaks after its separators."""
    return Markup(re.sub(r"([./_])", r"\1<wbr>", str(escape(name))))


def clean(text: str) -> str:
    r"""Replace characters that could disturb the page or deceive its reader although escaped.

    Control characters and lone surrogates are not HTML; directional overrides show a name in an
    order in which it is not written.

    >>> clean("a\u202eb\x07")
    'a�b�'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "\ufffd"
        for c in text
    )


def formula(text: Any) -> Markup:
    """Escape a sentence and set the subscripts of its formulas.

    >>> print(formula("‖θ_{t+1} − θ_t‖ of lora_B <b>"))
    ‖θ<sub>t+1</sub> − θ<sub>t</sub>‖ of lora_B &lt;b&gt;
    """
    return Markup(_SUBSCRIPT.sub(r"\1<sub>\2\3</sub>", str(escape(clean(str(text))))))


def _float(value: Any) -> float | None:
    """Return `value` as a float, None when it is missing or no number."""
    if value is None or isinstance(value, str | bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


_ALL = (number, count, percent, seconds, size, with_bounds, as_datum, redact, breakable, formula)
FILTERS = {function.__name__: function for function in _ALL}
