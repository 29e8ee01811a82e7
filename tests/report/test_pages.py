"""Pages in a real browser, opened from disk with the network off: what a reader sees and can do."""

from contextlib import contextmanager
from dataclasses import replace

import pytest

import bigram_circuits as bc
from tests.example_runs import HOSTILE, hostile_atlas, make_run, measured, results, save_stricter, stricter

DRAWN = """
(() => {
  const visible = kind => Array.from(document.querySelectorAll(kind)).filter(box => !box.closest('.part:not([open])'));
  return visible('.chart').every(box => box.querySelector('.plot-container')) &&
    visible('.view').every(box => box.querySelector('.colored-tokens, canvas'));
})()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a run in whose names, tokens and path there is markup."""
    folder = tmp_path_factory.mktemp("report") / "a <b>run & more"
    run = make_run(folder, metrics=measured(), found=results(), name=f"model {HOSTILE}", atlas=hostile_atlas())
    return bc.write_report(save_stricter(folder, stricter(run.mask)))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """The page about two such runs."""
    folder = tmp_path_factory.mktemp("comparison")
    runs = [make_run(folder / name, metrics=measured(), found=results(), name=HOSTILE) for name in "ab"]
    save_stricter(runs[0].path, stricter(runs[0].mask))
    return bc.write_comparison({f"{run.path.name} {HOSTILE}": run for run in runs}, folder / "comparison.html")


@contextmanager
def shown(browser, path, width=1100, theme="light", *, opened=True):
    """A page with all its sections open when it is drawn, what it asked for, and what it complained of."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme, offline=True)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda one: requests.append(one.url))
    page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(path.as_uri())
    if opened:
        page.evaluate("document.querySelectorAll('.part').forEach(one => { one.open = true; })")
    wait(page, DRAWN)
    yield page, requests, complaints
    context.close()


@pytest.fixture(scope="module")
def opened(browser, report):
    with shown(browser, report) as page:
        yield page


@pytest.mark.parametrize(("width", "theme"), [(1100, "dark"), (390, "light")])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_everything_is_drawn_and_nothing_is_asked_for(browser, request, name, width, theme):
    path = request.getfixturevalue(name)
    with shown(browser, path, width, theme) as (page, requests, complaints):
        assert not complaints
        assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
        assert page.locator(".chart svg.main-svg").count() >= page.locator(".chart").count() > 5
        assert page.locator(".tokens .colored-tokens").count() == (2 * 3 if name == "report" else 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert blank_charts(page) == []


def blank_charts(page):
    """Titles of the charts that show no mark."""
    return page.locator(".chart").evaluate_all(
        "boxes => boxes.filter(box => !box.querySelector('.trace path, .hm image, .bars path, .point'))"
        ".map(box => box.getAttribute('aria-label'))"
    )


CONTRASTS = """
() => {
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const pen = canvas.getContext('2d', {willReadFrequently: true});
  const pixel = (layers, filter) => {  // of colours on top of each other, as a filter shows them
    pen.filter = 'none';
    layers.forEach(one => { pen.fillStyle = one; pen.fillRect(0, 0, 1, 1); });
    if (filter !== 'none') {
      const copy = new OffscreenCanvas(1, 1);
      copy.getContext('2d').drawImage(canvas, 0, 0);
      pen.filter = filter;
      pen.drawImage(copy, 0, 0);
    }
    return Array.from(pen.getImageData(0, 0, 1, 1).data).slice(0, 3);
  };
  const luminance = rgb => rgb.map(x => x / 255).map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => {
    const [dark, light] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (light + 0.05) / (dark + 0.05);
  };
  const found = [];
  for (const element of document.body.querySelectorAll('*')) {
    const own = Array.from(element.childNodes).filter(one => one.nodeType === 3 && one.textContent.trim());
    const style = getComputedStyle(element);
    if (!own.length || ['SCRIPT', 'NOSCRIPT', 'STYLE'].includes(element.tagName) || !element.getClientRects().length ||
        style.visibility === 'hidden' || style.opacity === '0') { continue; }
    let filter = 'none';
    const grounds = [];
    for (let at = element; at; at = at.parentElement) {
      const here = getComputedStyle(at);
      grounds.unshift(here.backgroundColor);
      if (here.filter !== 'none') { filter = here.filter; }
    }
    const inGraphic = element.closest('svg') !== null;
    const ink = inGraphic ? style.fill : style.color;
    let backs = [grounds];
    const chart = element.closest('.chart');
    if (chart && element.closest('.hm, .heatmap-label, .heatmaplayer')) {  // words on the colours of a map
      backs = chart._fullLayout.coloraxis.colorscale.map(([, colour]) => [colour]);
    }
    for (const back of backs) {
      const contrast = ratio(pixel([...back, ink], filter), pixel(back, filter));
      found.push([contrast, ink, back.join(' '), filter, element.tagName, own[0].textContent.trim().slice(0, 30)]);
    }
  }
  return found;
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_every_text_can_be_read_on_its_background(browser, request, name, theme):
    with shown(browser, request.getfixturevalue(name), theme=theme) as (page, *_):
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        found = page.evaluate(CONTRASTS)
    assert len(found) > 300
    assert {one[4] for one in found} >= {"text", "TD", "P", "H2", "A"}
    assert [one for one in found if one[0] < 4.5][:8] == []


def test_links_and_markup_of_plotly_are_shown_as_they_are(browser, tmp_path):
    """Plotly turns `<a href>` in any string it draws into a link, unless it is escaped."""
    link = '<a href="https://example.invalid/x">click</a>'
    run = make_run(tmp_path / "run", metrics=measured(), found=linked(link), name=f"model {link}")
    pages = {
        "report": bc.write_report(run),
        "comparison": bc.write_comparison({f"one {link}": run, f"two {link}": run}, tmp_path / "comparison.html"),
    }
    for name, path in pages.items():
        with shown(browser, path) as (page, *_):
            assert page.locator("svg a").count() == 0
            assert page.locator("main a").count() == 0
            drawn = page.locator(".chart svg text").evaluate_all("all => all.map(one => one.textContent)")
            assert any("<a href" in words for words in drawn), name


def linked(link):
    """Results in which every name, axis, unit and title is a link."""

    def named(result):
        quantities = tuple(replace(one, unit=link) for one in result.quantities)
        changed = {"title": f"{result.title} {link}", "quantities": quantities}
        for axis in ("axis", "row_axis", "column_axis", "subject"):
            if hasattr(result, axis):
                changed[axis] = f"{getattr(result, axis)} {link}"
        for axis in ("points", "columns", "names"):
            if hasattr(result, axis) and result.title not in ("Of attention",):
                changed[axis] = tuple(f"{one} {link}" for one in getattr(result, axis))
        if hasattr(result, "conditions") and "attention" not in result.title:
            changed["conditions"] = tuple(
                one if one in ("full", "subnetwork", "target") else f"{one} {link}" for one in result.conditions
            )
        return replace(result, **changed)

    return {name: named(result) for name, result in results().items() if name not in ("by_head", "concentration")}


@pytest.fixture(scope="module")
def closed(browser, report):
    """The page as it is at first."""
    with shown(browser, report, width=1200, opened=False) as (page, _, complaints):
        yield page
        assert not complaints


def test_the_first_screen_is_one_screen(closed):
    closed.evaluate("document.querySelector('h1').textContent = 'Which few weights are enough?'")  # it had a long name
    last = closed.locator(".checks").evaluate("one => one.getBoundingClientRect().bottom")
    assert 500 < last < 800
    assert closed.locator("header .preview svg").is_visible()
    assert HOSTILE[:9] in closed.locator("header .preview").inner_text()  # markup in a token is text


def test_sections_open_when_asked_for_and_are_drawn_then(closed):
    charts = closed.locator("#layers .chart")
    assert charts.count() > 3
    assert closed.locator("#layers .plot-container").count() == 0
    assert not closed.locator("#layers").is_visible()
    assert closed.locator("#controls .plot-container").is_visible()
    closed.locator("nav a", has_text="Layer by layer").click()
    wait(closed, "document.querySelectorAll('#layers .plot-container').length > 3")
    assert charts.first.is_visible()
    widths = charts.evaluate_all("all => all.map(one => one.querySelector('.main-svg').clientWidth)")
    assert min(widths) > 800
    top = "document.querySelector('#layers').getBoundingClientRect().top"
    wait(closed, f"0 <= {top} && {top} < 200")  # it scrolls there
    closed.locator("summary", has_text="Layer by layer").click()
    assert not closed.locator("#layers").is_visible()


def test_what_a_number_means_shows_on_touch_and_by_keyboard(closed):
    words, pointed = closed.locator("dt abbr"), closed.locator("#pointed")
    words.nth(1).focus()
    assert pointed.inner_text() == words.nth(1).get_attribute("title")
    closed.keyboard.press("Escape")
    assert pointed.is_hidden()
    closed.keyboard.press("Tab")
    assert pointed.inner_text() == words.nth(2).get_attribute("title")
    closed.locator("#controls th abbr", has_text="KL").first.click()
    assert pointed.inner_text().startswith("Mean KL divergence")


def test_a_print_opens_all_sections_and_then_closes_them(closed):
    count = closed.locator(".part:not([open])").count()
    assert count > 10
    closed.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert closed.locator(".part:not([open])").count() == 0
    wait(closed, DRAWN)
    closed.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert closed.locator(".part:not([open])").count() == count


def wait(page, condition):
    """Wait until an expression is true; the page's policy forbids Playwright's own way of waiting."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"not in 30 seconds: {condition}")


def test_a_print_has_the_settings_and_the_versions(opened):
    page, *_ = opened
    page.emulate_media(media="print")
    for caption in ("Settings and hashes", "Date and versions", "Subnetwork and controls"):
        assert page.locator(f"table[aria-label='{caption}']").is_visible()
    page.emulate_media(media="screen")


def test_attention_patterns_are_not_blank(opened):
    page, *_ = opened
    page.locator(".attention canvas").last.scroll_into_view_if_needed()
    page.wait_for_timeout(1200)  # its own animation
    colours = page.locator(".attention canvas").evaluate_all(
        """canvases => canvases.map(canvas => {
          const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
          return new Set(Array.from({length: pixels.length / 4}, (_, i) => pixels.slice(4 * i, 4 * i + 3).join())).size;
        })"""
    )
    assert colours
    assert all(count > 3 for count in colours)


@pytest.mark.parametrize("how", ["hover", "click"])
def test_pointing_at_a_token_tells_what_each_expected(opened, how):
    page, *_ = opened
    token = page.locator("#read .colored-tokens > span").nth(1)
    token.scroll_into_view_if_needed()
    assert page.locator("#pointed").is_hidden()
    getattr(token, how)()
    told = page.locator("#pointed").inner_text()
    for words in (
        "The full model: 0.",
        "The subnetwork: 0.",
        "The bigram: 0.",
        "40%",
        f"“{HOSTILE.replace(' ', '·')}”",
    ):
        assert words in told
    page.mouse.move(1, 1)
    assert page.locator("#pointed").is_hidden()


def test_numbers_can_be_opened_under_every_chart(opened):
    page, *_ = opened
    details = page.locator("main details:not(.part)")
    assert details.count() > 15
    details.first.locator("summary").click()
    assert details.first.locator("table").is_visible()


def test_words_from_data_stand_as_text(opened):
    page, _, complaints = opened
    assert page.locator("b", has_text="run & more").count() == 0
    assert HOSTILE in page.locator("h1").inner_text()
    assert HOSTILE in page.locator("#read .colored-tokens").first.inner_text().replace("\N{NO-BREAK SPACE}", " ")
    assert page.locator("main img").count() == 0
    assert not complaints


def test_a_dark_page_is_dark_and_a_print_is_light(opened):
    page, *_ = opened
    lightness = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(lightness) < 150
    page.emulate_media(media="print")
    assert page.evaluate(lightness) == 3 * 255
    assert len(page.pdf()) > 50_000
    page.emulate_media(media="screen", color_scheme="light")
