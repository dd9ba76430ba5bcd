"""The report in a real browser: nothing leaves the page, everything works, axe finds nothing.

Needs Chromium (Debian: ``apt-get install chromium``) and the development extra; without them
the tests are skipped and say so.
"""

import csv
import io
import os
import shutil
from xml.etree import ElementTree

import numpy as np
import pytest
from helpers_runs import write_run
from matplotlib import pyplot

import lisa_analysis as la

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt-get install chromium)"),
]
# One page at a time: the tests share a browser, not its pages.
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports")
    runs = [
        write_run(folder / "lisa", steps=30),
        write_run(folder / "lora", steps=20, method="lora", n_layers=4, nan_at=20),
    ]
    run = la.load(runs[0])
    probabilities = la.sampling_probabilities(la.importance(run), activated_layers=2)
    one, two = folder / "one.html", folder / "two.html"
    la.report(run, probabilities=probabilities).save(one)
    la.report(runs).save(two)
    return {"one": one, "two": two}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Open a report; what it requests and complains of is collected on the page object."""
    contexts = []

    def open_report(path, **options):
        context = browser.new_context(accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.requested, page.complaints = [], []
        page.on("request", lambda request: page.requested.append(request.url))
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", ["one", "two"])
def test_no_request_leaves_the_page_and_nothing_complains(reports, open_page, name):
    page = open_page(reports[name])
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.mouse.wheel(0, 20_000)
    page.wait_for_timeout(200)
    outside = [url for url in page.requested if not url.startswith("data:")]
    assert outside == [reports[name].as_uri()]
    assert page.complaints == []


def test_the_policy_stops_foreign_scripts_and_requests(reports, open_page, tmp_path):
    html = reports["one"].read_text(encoding="utf-8")
    injected = "<script>window.broken = 1</script><img src='https://example.com/x.png'>"
    path = tmp_path / "injected.html"
    path.write_text(html.replace("<footer>", f"{injected}<footer>"), encoding="utf-8")
    page = open_page(path)
    assert page.evaluate("window.broken") is None
    assert len([c for c in page.complaints if "Content Security Policy" in c]) == 2


@pytest.mark.parametrize(("name", "scheme"), [("one", "light"), ("one", "dark"), ("two", "light")])
def test_axe_finds_no_violation(reports, open_page, name, scheme):
    page = open_page(reports[name], color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    results = axe.Axe().run(page)
    assert results.violations_count == 0, results.generate_report()


def column(page, table, index):
    cells = page.locator(f"#{table} tbody tr td:nth-child({index})").all_text_contents()
    return [float(cell) if cell else None for cell in cells]


def test_tables_sort_with_keyboard_and_say_so(reports, open_page):
    page = open_page(reports["one"])
    page.locator("#r0-profile details summary").press("Enter")
    button = page.locator("#r0-profile-data th button", has_text="score")
    button.press("Enter")
    head = page.locator("#r0-profile-data th", has_text="score")
    assert head.get_attribute("aria-sort") == "descending"
    known = [score for score in column(page, "r0-profile-data", 3) if score is not None]
    assert known == sorted(known, reverse=True)
    assert "Sorted by score, descending" in page.locator("#live").text_content()
    button.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert page.locator("#r0-profile-data th[aria-sort]").count() == 1
    known = [score for score in column(page, "r0-profile-data", 3) if score is not None]
    assert known == sorted(known)


def test_rows_are_filtered(reports, open_page):
    page = open_page(reports["one"])
    page.locator("#r0-profile details summary").click()
    rows = page.locator("#r0-profile-data tbody tr:visible")
    everything = rows.count()
    page.locator("#r0-profile details .filter").fill("layers.1")
    assert rows.count() == 3  # layers 1, 10 and 11
    page.locator("#r0-profile details .filter").fill("")
    assert rows.count() == everything


def test_csv_is_the_table_as_shown(reports, open_page, tmp_path):
    page = open_page(reports["one"])
    page.locator("#r0-profile details summary").click()
    with page.expect_download() as waiting:
        page.locator("#r0-profile button.csv").click()
    assert waiting.value.suggested_filename == "r0-profile-data.csv"
    waiting.value.save_as(tmp_path / "data.csv")
    rows = list(csv.reader(io.StringIO((tmp_path / "data.csv").read_text(encoding="utf-8"))))
    profile = la.importance(la.load(reports["one"].parent / "lisa"))
    frame = profile.to_frame()
    assert rows[0][:3] == ["layer", "name", "score"]
    assert [row[1] for row in rows[1:13]] == frame["name"].tolist()
    assert [row[2] for row in rows[1:13]] == [f"{v:.6g}" if v == v else "" for v in frame["score"]]


def test_csv_starts_no_formula(open_page, tmp_path):
    run = write_run(tmp_path / "run", steps=4, n_layers=2, method="full", layer_prefix='=1+1,"x"')
    page = open_page(la.report(run).save(tmp_path / "report.html"))
    page.locator("#r0-profile details summary").click()
    with page.expect_download() as waiting:
        page.locator("#r0-profile button.csv").click()
    rows = list(csv.reader(io.StringIO(waiting.value.path().read_text(encoding="utf-8"))))
    assert rows[1][1] == '\'=1+1,"x".0'
    assert float(rows[1][2]) > 0


def test_a_layer_lights_up_in_every_figure_and_table(reports, open_page):
    page = open_page(reports["one"])
    drawn = page.evaluate(
        "[...document.querySelectorAll('#r0-profile svg [data-layer]')].map(e => e.dataset.layer)"
    )
    kept, passing = drawn[0], drawn[1]  # layers that were never drawn have no bar
    page.locator("#layer").select_option(kept)
    lit = page.evaluate(
        "[...document.querySelectorAll('[data-layer].on')].map(e => e.closest('figure').id)"
    )
    assert {"r0-profile", "r0-grad_norm", "r0-update_norm", "r0-schedule"} <= set(lit)
    assert page.locator(f"[data-layer].on:not([data-layer='{kept}'])").count() == 0
    page.locator(f"#r0-grad_norm svg [data-layer='{passing}'] path").hover(force=True)
    assert page.locator(f"#r0-profile .broad [data-layer='{passing}'].on").count() == 1
    page.locator("h1").hover()
    assert page.locator(f"#r0-profile .broad [data-layer='{kept}'].on").count() == 1
    page.locator("#layer").select_option("")
    assert page.locator("[data-layer].on").count() == 0


def test_theme_is_switched_and_remembered(reports, open_page):
    page = open_page(reports["one"], color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(paper)
    page.locator("#theme").click()
    dark = page.evaluate(paper)
    assert dark != light
    page.reload()
    assert page.evaluate(paper) == dark
    assert page.locator("#theme").text_content() == "Light"


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_page_never_scrolls_sideways(reports, open_page, width):
    page = open_page(reports["one"], viewport={"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_paper_is_light_and_without_controls_and_data_tables(reports, open_page):
    page = open_page(reports["one"], color_scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("nav.bar").is_hidden()
    assert page.locator("details.data:visible").count() == 0
    assert page.locator("#r0-profile .broad svg").is_visible()
    assert page.locator("#r0-profile .slim svg").is_hidden()


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_report_is_at_most_six_sheets(reports, open_page, tmp_path, name):
    page = open_page(reports[name])
    page.pdf(path=tmp_path / "page.pdf", format="A4", prefer_css_page_size=True)
    sheets = (tmp_path / "page.pdf").read_bytes().count(b"/Type /Page\n")
    assert 1 <= sheets <= 6


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_first_screen_holds_answer_picture_and_next_step(reports, open_page, name):
    page = open_page(reports[name], viewport={"width": 1280, "height": 800})
    for part in ("#verdict h2", "#verdict .broad svg", "#verdict .next"):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 800, part
    order = page.evaluate("[...document.querySelectorAll('main > section')].map(s => s.id)")
    assert order[:2] == ["verdict", "findings"]


def tip(page):
    return page.locator("#tip").text_content() if page.locator("#tip").is_visible() else None


def test_values_are_read_by_the_pointer(reports, open_page):
    page = open_page(reports["one"], viewport={"width": 1280, "height": 1000})
    profile = la.importance(la.load(reports["one"].parent / "lisa"))
    known = [i for i, row in enumerate(profile) if row.score == row.score]
    for layer in (known[0], known[-1]):
        bar = page.locator(f"#r0-profile .broad [data-layer='{layer}']").first
        bar.hover(force=True)
        said = tip(page)
        assert said.startswith(f"layer {layer}, {profile[layer].name}: ×")
        relative = profile[layer].score / profile.scores[known].mean()
        assert float(said.split("×")[1].split()[0]) == pytest.approx(relative, rel=6e-3)
    page.locator("h1").hover()
    assert tip(page) is None


def test_values_are_read_by_the_keyboard(reports, open_page):
    page = open_page(reports["one"], viewport={"width": 1280, "height": 1000})
    picture = page.locator("#r0-profile .broad")
    picture.focus()
    page.keyboard.press("ArrowRight")
    assert tip(page).startswith("layer 1, ")
    assert page.locator("#live").text_content() == tip(page)
    page.keyboard.press("End")
    assert tip(page).startswith("layer 11, ")
    page.keyboard.press("Escape")
    assert tip(page) is None
    # Pictures over layers and columns go up and down as well; layer 0 is at the bottom.
    page.locator("#r0-schedule .picture").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert tip(page).startswith("layer 1, active after step ")
    assert tip(page).endswith((": 0", ": 1"))


def test_pictures_are_kept_as_svg_and_png(reports, open_page):
    page = open_page(reports["one"], color_scheme="dark")
    page.locator("#r0-kinds details summary").click()
    with page.expect_download() as waiting:
        page.locator("#r0-kinds .save-svg").click()
    assert waiting.value.suggested_filename == "r0-kinds.svg"
    svg = ElementTree.fromstring(waiting.value.path().read_text(encoding="utf-8"))
    assert svg.tag.endswith("svg")
    assert "var(" not in waiting.value.path().read_text(encoding="utf-8")
    with page.expect_download() as waiting:
        page.locator("#r0-kinds .save-png").click()
    data = waiting.value.path().read_bytes()
    assert data.startswith(b"\x89PNG")
    image = pyplot.imread(io.BytesIO(data))
    assert image.shape[1] > 1500
    assert len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 20  # the colours are there
    assert page.complaints == []


def test_a_narrow_screen_has_a_picture_of_its_own(reports, open_page):
    page = open_page(reports["one"], viewport={"width": 390, "height": 800})
    assert page.locator("#r0-profile .broad").is_hidden()
    box = page.locator("#r0-profile .slim svg").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    page.locator("#r0-profile .slim").focus()
    page.keyboard.press("ArrowRight")
    assert tip(page).startswith("layer 1, ")


def test_without_script_everything_is_readable(reports, open_page):
    page = open_page(reports["one"], java_script_enabled=False)
    assert page.locator("#layer").is_hidden()
    page.locator("#r0-profile details summary").click()
    assert page.locator("#r0-profile-data tbody tr").first.is_visible()
    assert page.locator("#r0-profile .broad svg").is_visible()


def test_notebook_frame_works_in_its_sandbox(reports, open_page, tmp_path):
    html = la.report(reports["one"].parent / "lisa")._repr_html_()
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><meta charset='utf-8'>{html}", encoding="utf-8")
    page = open_page(path)
    frame = page.frame_locator("iframe")
    frame.locator("#theme").click()
    frame.locator("#layer").select_option("2")
    assert frame.locator("[data-layer='2'].on").count() > 3
    assert page.complaints == []
