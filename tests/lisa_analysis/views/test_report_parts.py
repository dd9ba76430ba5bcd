"""The report's parts: number formats, redaction, SVG conversion, tables."""

import doctest
import importlib
import math
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lisa_analysis.metrics.layer_grid import LayerGrid
from lisa_analysis.metrics.thinning import Series
from lisa_analysis.views.html_report import format as fmt
from lisa_analysis.views.html_report import svg
from lisa_analysis.views.html_report.figure import canvas
from lisa_analysis.views.html_report.tables import (
    TABLE_COLUMNS,
    frame_table,
    grid_table,
    series_table,
)
from lisa_analysis.views.plots import style


@pytest.mark.parametrize("module", ["views.html_report.format", "views.plots.style"])
def test_examples_in_the_documentation_hold(module):
    result = doctest.testmod(importlib.import_module(f"lisa_analysis.{module}"))
    assert result.attempted > 3
    assert result.failed == 0


@given(st.floats(-1e300, 1e300))
def test_numbers_are_shown_to_three_digits(value):
    text = fmt.number(value).replace(",", "").replace("\N{MINUS SIGN}", "-")
    if "×10" in text:
        mantissa, power = text.split("×10")
        power = power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
        text = f"{mantissa}e{power}"
    assert math.isclose(float(text), value, rel_tol=6e-3, abs_tol=1e-320)


@pytest.mark.parametrize("value", [None, "text", True, object()])
def test_what_is_no_number_is_a_dash(value):
    for formatter in (fmt.number, fmt.count, fmt.seconds, fmt.size, fmt.percent):
        assert formatter(value) == "–"


@pytest.mark.parametrize(
    "text",
    ["--api_key=abc123", "password: hunter2", "HF_TOKEN=xyz", "hub_token: 'se cret'",
     '{"aws_secret_access_key": "abc"}', "x hf_abcdefghijklmnopqrstuv y", "sk-abcdefghijklmnop"],
)  # fmt: skip
def test_secrets_are_replaced(text):
    shown = fmt.redact(text)
    assert "[redacted]" in shown
    for secret in ("abc123", "hunter2", "xyz", "se cret", '"abc"', "hf_", "sk-"):
        assert secret not in shown


@pytest.mark.parametrize(
    "text", ["max_tokens: 512", "num_tokens=3", "tokenizer: llama", "eos_token: </s>", "tokens: 5"]
)
def test_settings_that_only_sound_secret_stay(text):
    assert fmt.redact(text) == text


def picture(slug="a", title="T", description="D", names=()):
    with svg.ink(slug):
        ax = canvas(4, 2)
        bar = ax.bar([0, 1], [1, 2], color=style.SERIES[0])
        bar[1].set_gid("layer-1")
        ax.plot([0, 1], [1, 2], color=style.MUTED)
        ax.set_title("a < b & c")
        return svg.to_svg(ax, slug, title, description, names)


def test_svg_takes_the_colours_of_the_page():
    text = picture()
    assert "#010203" not in text
    assert "currentColor" in text
    assert style.SERIES[0] not in text
    assert "var(--series-0)" in text
    assert "var(--muted-mark)" in text


def test_svg_has_no_prolog_metadata_style_or_size():
    text = picture()
    assert text.startswith("<svg viewBox=")
    for gone in ("<?xml", "<!DOCTYPE", "<metadata", "<style", "<!--", 'width="288'):
        assert gone not in text
    assert "a &lt; b &amp; c" in text


def test_ids_of_two_pictures_differ():
    first, second = (set(re.findall(r'\bid="([^"]+)"', picture(slug))) for slug in "ab")
    assert first
    assert not first & second
    for reference in re.findall(r"(?:url\(|href=\")#([^)\"]+)", picture("a")):
        assert reference in first


def test_same_picture_gives_the_same_bytes():
    assert picture() == picture()


def test_title_description_and_layer_names_are_escaped():
    text = picture(title="<t>", description='"d"&', names=("x", "<l>\u202e"))
    assert '<title id="a-title">&lt;t&gt;</title>' in text
    assert "&#34;d&#34;&amp;</desc>" in text
    assert 'data-layer="1"><title>layer 1 · &lt;l&gt;\ufffd</title>' in text


def test_cells_keep_the_raw_value_when_the_text_differs():
    frame = pd.DataFrame({"layer": [0, 1], "score": [0.123456789, np.nan], "name": ["a", "b"]})
    columns = [("name", "name"), ("score", "score", fmt.number), ("absent", "absent")]
    table = frame_table("c", frame, columns, layer="layer")
    assert [column.title for column in table.columns] == ["name", "score"]
    assert [column.numeric for column in table.columns] == [False, True]
    shown = [(cell.text, cell.value) for cell in table.rows[0]]
    assert shown == [("a", None), ("0.123", "0.123457")]
    assert table.layers == (0, 1)


def test_grid_table_picks_columns_evenly_and_says_so():
    values = np.arange(200.0).reshape(2, 100)
    bad = np.zeros((2, 100), dtype=bool)
    bad[1, 0] = True
    table = grid_table("c", LayerGrid("x", np.arange(1, 101), values, bad))
    assert len(table.columns) == TABLE_COLUMNS + 1
    assert "24 of 100 columns" in table.caption
    assert table.columns[1].title == "step 1"
    assert table.columns[-1].title == "step 100"
    assert table.rows[1][1].text == "non-finite"


def test_series_table_shows_extremes_only_where_points_were_merged():
    x = np.array([1.0, 2.0])
    plain = series_table("c", [("a", Series(x, x, x, x, 1))])
    assert [column.title for column in plain.columns] == ["step", "value"]
    merged = series_table("c", [("a", Series(x, x - 1, x, x + 1, 5)), ("b", Series(x, x, x, x, 1))])
    assert [c.title for c in merged.columns] == ["series", "step", "mean", "smallest", "largest"]
    assert [cell.text for cell in merged.rows[0]] == ["a", "1", "1", "0", "2"]
