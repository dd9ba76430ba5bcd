"""What a notebook shows of a training run."""

import re
import xml.etree.ElementTree as ET

from lisa_train.trainer.progress_html import loss_svg, progress_page


def parse(fragment: str) -> ET.Element:
    return ET.fromstring(f"<page>{fragment.replace('<br>', '<br/>')}</page>")


def test_bar_and_line_say_how_far_the_run_is() -> None:
    page = parse(
        progress_page(3, 12, {"loss": "2.5", "layers": "0,7"}, [], [(2, 2.25)], "9 s left")
    )
    bar = next(page.iter("progress"))
    assert (bar.get("value"), bar.get("max")) == ("3", "12")
    line = next(page.iter("span")).text
    assert line == "step 3/12 · loss 2.5 · layers 0,7 · held-out loss 2.250 · 9 s left"


def test_facts_are_text_and_never_markup() -> None:
    assert "<img" not in progress_page(0, 1, {"loss": "<img src=x>"}, [], [], "")


def test_points_stand_where_their_step_and_loss_put_them() -> None:
    page = parse(loss_svg([(1, 4.0), (2, 3.0), (4, 2.0)], [(4, 3.0)], total=4))
    points = [
        tuple(map(float, point.split(",")))
        for point in next(page.iter("polyline")).get("points", "").split()
    ]
    (x1, y1), (x2, y2), (x4, y4) = points
    assert x4 - x2 == 2 * (x2 - x1)  # two steps are twice as wide as one
    assert y4 - y2 == y2 - y1 > 0  # equal falls in loss, downwards
    x, y = map(float, re.findall(r"M([\d.]+) ([\d.]+)", next(page.iter("path")).get("d", ""))[0])
    assert (x, y + 5) == (x4, y2)  # the diamond's centre: the same loss at the last step
    assert [text.text for text in page.iter("text")][:2] == ["4.00", "2.00"]


def test_nothing_measured_draws_nothing_and_one_loss_draws_one_tick() -> None:
    assert loss_svg([], [], total=10) == ""
    texts = [text.text for text in parse(loss_svg([(1, 2.0)], [], total=10)).iter("text")]
    assert texts[0] == "2.00"
    assert texts.count("2.00") == 1
