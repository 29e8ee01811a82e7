"""The page of an explanation in a real browser, opened from disk with the network off: what is there to see and do."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest

from bigram_circuits.explanations.explanation import Atlas
from bigram_circuits.explanations.page import atlas_view, circuit_view
from bigram_circuits.report.blocks import Circuit, Opening, Section
from bigram_circuits.report.document import document
from tests.example_runs import HOSTILE
from tests.explanations.examples import atlas, example, prompt_example
from tests.report.test_pages import CONTRASTS

SHOWN = "Array.from(document.querySelectorAll('.node b')).map(one => one.textContent)"


@contextmanager
def opened(browser, path, **options):
    """A page, what it asked for, and what it complained of."""
    given = {"viewport": {"width": 1300, "height": 900}, "offline": True} | options
    context = browser.new_context(**given)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda one: requests.append(one.url))
    page.on("console", lambda line: complaints.append(line.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(path.as_uri())
    yield page, requests, complaints
    assert not complaints
    context.close()


@pytest.fixture(scope="module")
def bigram():
    return example()


@pytest.fixture(scope="module")
def path(bigram, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "bigram.html"
    bigram.to_html(path)
    return path


@pytest.fixture(scope="module")
def page(browser, path):
    with opened(browser, path) as (page, *_):
        yield page


@pytest.fixture
def fresh(page):
    """The page as it is at first."""
    page.mouse.move(1, 1)
    page.locator(".reset").click()
    return page


@pytest.mark.parametrize(("width", "theme"), [(1300, "dark"), (390, "light")])
def test_tokens_are_text_and_nothing_is_asked_for(browser, tmp_path, width, theme):
    made = prompt_example() if width == 390 else example()
    made = renamed(made, HOSTILE)
    made.to_html(tmp_path / "page.html")
    look = {"viewport": {"width": width, "height": 800}, "color_scheme": theme}
    with opened(browser, tmp_path / "page.html", **look) as (page, requests, _):
        assert requests == [(tmp_path / "page.html").as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("img, .drawn script").count() == 0
        assert any(HOSTILE in text for text in page.evaluate(SHOWN))
        page.locator(".node", has_text=HOSTILE).first.click()
        assert HOSTILE in page.locator(".panel h4").inner_text()
        page.locator(".reset").click()
        found = page.evaluate(CONTRASTS)
        assert len(found) > 60
        assert [one for one in found if one[0] < 4.5][:8] == []
        boxes = page.locator(".node").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect()).map(box => [box.left, box.top, box.right, box.bottom])"
        )
    assert 12 <= len(boxes) <= 20
    for one, other in itertools.combinations(boxes, 2):  # none lies on another one
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]


def renamed(made, token):
    """An explanation with another last token, wherever it is written."""
    last = made.prompt[-1]
    labels = {f"'{last}'": f"'{token}'"}
    units = {
        label: replace(known, drives=((token, 1.0),), promotes=((token, 1.0),)) for label, known in made.units.items()
    }
    return replace(
        made,
        prompt=(*made.prompt[:-1], token), predictions=((token, 0.5),), units=units,
        nodes=tuple(replace(node, label=labels.get(node.label, node.label)) for node in made.nodes),
        paths=tuple(
            replace(path, labels=tuple(labels.get(label, label) for label in path.labels)) for path in made.paths
        ),
    )  # fmt: skip


def covered(made, shown):
    """What the paths among some nodes add up to, each node's inputs followed one by one from the answer back."""
    nodes = {node.key: node for node in made.nodes if node.label in shown}

    def through(key):
        if nodes[key].kind in ("token", "position", "bias"):
            return 1.0
        entering = [edge for edge in made.edges if edge.target == key and edge.source in nodes]
        return sum(through(edge.source) * edge.flow for edge in entering) / nodes[key].flow

    return through("answer") * nodes["answer"].flow


def test_the_slider_shows_more_and_says_what_is_covered(fresh, bigram):
    slider, output = fresh.locator("input[type=range]"), fresh.locator("output")
    for n in (5, 16):
        slider.fill(str(n))
        shown = fresh.evaluate(SHOWN)
        assert len(shown) == n + 1
        strongest = sorted(bigram.nodes, key=lambda node: -abs(node.flow))[: n - 1]
        assert {node.label for node in strongest} <= {*shown}
        assert output.inner_text() == (
            f"{n} of 59; paths through them add up to {covered(bigram, shown):.2f} of 9.60".replace("-", "\u2212")
        )
    slider.fill("59")
    assert fresh.locator(".node").count() == 60
    assert fresh.locator(".stage path").count() == 300


def test_hover_pin_expand_hide_and_reset(fresh, bigram):
    node = fresh.locator(".node", has_text="L1N").first
    label = node.locator("b").inner_text()
    known = next(one for one in bigram.nodes if one.label == label)
    assert fresh.locator(".panel").inner_text().startswith("Most likely next")
    node.hover()
    told = fresh.locator(".panel").inner_text()
    for words in (label, "An MLP neuron in layer 1.", f"{known.flow:+.2f}", "Driven by", "' of'", "Raises", "Lowers"):
        assert words.replace("-", "\u2212") in told
    edges = [edge for edge in bigram.edges if known.key in (edge.source, edge.target)]
    assert 0 < fresh.locator(".stage path.hot").count() <= len(edges)
    fresh.mouse.move(1, 1)
    assert fresh.locator(".stage path.hot").count() == 0
    node.click()
    fresh.mouse.move(1, 1)
    assert fresh.locator(".node.pinned b").inner_text() == label
    assert fresh.locator(".stage path.hot").count() > 0
    before = {*fresh.evaluate(SHOWN)}
    fresh.get_by_role("button", name="Expand").click()
    more = {*fresh.evaluate(SHOWN)} - before
    ends = {edge.source if edge.target == known.key else edge.target: abs(edge.flow) for edge in edges}
    hidden = [one for one in sorted(ends, key=lambda key: -ends[key]) if one.split("@")[0] not in before]
    assert more == {key.split("@")[0] for key in hidden[:3]}
    fresh.get_by_role("button", name="Hide").click()
    assert {*fresh.evaluate(SHOWN)} == (before | more) - {label}
    fresh.locator(".reset").click()
    assert {*fresh.evaluate(SHOWN)} == before
    fresh.locator(".panel button.row").first.click()  # the strongest path, with its nodes
    assert {*bigram.paths[0].labels} <= {*fresh.evaluate(SHOWN)}
    assert fresh.locator(".stage path.hot").count() >= len(bigram.paths[0].labels) - 2


def test_a_search_marks_the_nodes_that_a_token_is_in(fresh, bigram):
    fresh.locator(".find").fill(" COURSE")
    words = {label: {token for token, _ in (*one.drives, *one.promotes)} for label, one in bigram.units.items()}
    wanted = {one.label for one in bigram.nodes if " course" in words.get(one.label, ())}
    found = {*fresh.locator(".node.found b").all_inner_texts()}
    assert found
    assert found <= wanted
    assert f"{len(wanted)} match" in fresh.locator("output").inner_text()
    fresh.locator(".find").fill("")
    assert fresh.locator(".node.found").count() == 0


def test_the_keyboard_goes_along_the_strongest_edges(fresh, bigram):
    keys = {node.key: node for node in bigram.nodes}
    focused = "document.activeElement.querySelector('b').textContent"
    fresh.locator(".reset").focus()
    fresh.keyboard.press("Tab")
    assert fresh.evaluate(focused) == "' the'"
    shown = {*fresh.evaluate(SHOWN)}
    fresh.keyboard.press("ArrowLeft")
    into = [edge for edge in bigram.edges if edge.target == "answer" and keys[edge.source].label in shown]
    strongest = keys[max(into, key=lambda edge: abs(edge.flow)).source].label
    assert fresh.evaluate(focused) == fresh.locator(".panel h4").inner_text() == strongest
    fresh.keyboard.press("Enter")
    assert fresh.locator(".node.pinned b").inner_text() == fresh.evaluate(focused) == strongest
    fresh.keyboard.press("e")
    assert fresh.locator(".node").count() == 17 + 3
    fresh.keyboard.press("ArrowRight")
    fresh.keyboard.press("ArrowDown")
    last = fresh.evaluate(focused)
    fresh.keyboard.press("h")
    assert last not in fresh.evaluate(SHOWN)
    fresh.keyboard.press("Escape")
    assert fresh.locator(".node").count() == 17
    assert fresh.locator(".node.pinned").count() == 0


def test_a_print_has_the_picture_and_the_tables(fresh):
    fresh.emulate_media(media="print")
    assert fresh.locator(".stage").evaluate("one => one.getBoundingClientRect().width") <= 661
    for name in ("Strongest paths", "Nodes"):
        assert fresh.locator(f"table[aria-label='{name}']").is_visible()
    assert not fresh.locator(".tools").is_visible()
    fresh.emulate_media(media="screen")


def test_without_a_script_there_are_sentences_and_tables(browser, path, bigram):
    with opened(browser, path, java_script_enabled=False) as (page, *_):
        assert "all its numbers are in the tables below" in page.locator("noscript").inner_text()
        assert page.locator(".says").inner_text().startswith("After ' of', GPT-2 small")
        assert page.locator("table[aria-label='Nodes'] tbody tr").count() == len(bigram.nodes)
        assert not page.locator(".drawn").is_visible()


TIMES = """
() => {
  const slider = document.querySelector('input[type=range]');
  const timed = act => {
    const start = performance.now();
    act();
    document.body.offsetHeight;
    return performance.now() - start;
  };
  const all = () => document.querySelectorAll('.node');
  const send = (one, kind, more) => one.dispatchEvent(new (kind === 'keydown' ? KeyboardEvent : PointerEvent)(
    kind, {bubbles: true, pointerType: 'mouse', ...more}));
  return {
    slider: timed(() => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }),
    hover: timed(() => send(all()[20], 'pointerover')),
    pin: timed(() => send(all()[20], 'click')),
    key: timed(() => { all()[20].focus(); send(all()[20], 'keydown', {key: 'ArrowRight'}); }),
    expand: timed(() => send(all()[30], 'dblclick')),
    hide: timed(() => send(all()[30], 'keydown', {key: 'h'})),
    reset: timed(() => document.querySelector('.reset').click()),
  };
}
"""


def test_every_interaction_is_quick(fresh):
    times = fresh.evaluate(TIMES)
    assert max(times.values()) < 500, times  # milliseconds, on a busy machine


def test_an_atlas_shows_one_token_at_a_time_and_a_finger_does(browser, tmp_path):
    made = atlas(listed=14, most_edges=30)
    made.to_html(tmp_path / "atlas.html")
    look = {"viewport": {"width": 390, "height": 800}, "has_touch": True}
    with opened(browser, tmp_path / "atlas.html", **look) as (page, *_):
        assert page.locator("table[aria-label='All tokens of the atlas'] tbody tr").count() == 5
        page.locator(".find").fill("in")
        assert page.locator(".chips button:visible").all_inner_texts() == ["' in'"]
        page.locator(".find").press("Enter")
        assert page.locator(".says").inner_text().startswith("After ' in', GPT-2 small")
        labels = [" → ".join(path.labels) for path in made.explanations[1].paths]
        assert page.locator("table[aria-label='Strongest paths'] tbody th").all_inner_texts() == labels
        assert {*page.evaluate(SHOWN)} == {node.label for node in made.explanations[1].nodes}
        node = page.locator(".node", has_text="L0N").first
        node.tap()
        assert page.locator(".panel h4").inner_text() == node.locator("b").inner_text()
        assert page.locator(".node.pinned").count() == 0
        node.tap()
        assert page.locator(".node.pinned").count() == 1
        assert "Among the strongest nodes after" in page.locator(".panel").inner_text()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_atlas_of_two_hundred_tokens_is_small(bigram):
    bare = replace(bigram, terms={}, units={})
    many = tuple(replace(bare, prompt=(f" token{at}",)) for at in range(200))
    text = Atlas("Many", many, tuple(range(200)), bigram.units).to_html()
    assert len(text.encode()) < 10_000_000


def test_a_report_holds_pictures_and_the_script_once(browser, tmp_path, bigram):
    views = [circuit_view(bigram), atlas_view(atlas(listed=10, most_edges=20))]
    sections = [Section("one", "One", blocks=[Circuit(f"Picture {at}", "Says.", one) for at, one in enumerate(views)])]
    text = document(Opening("A page", "asked", "answer"), sections, "The end.")
    assert text.count("querySelectorAll('.circuit')") == 1
    (tmp_path / "report.html").write_text(text)
    with opened(browser, tmp_path / "report.html") as (page, *_):
        assert page.locator(".circuit .stage").count() == 2
        assert page.locator(".circuit").nth(0).locator(".node").count() == 17
        assert page.locator(".circuit").nth(1).locator(".node").count() == 11
        assert page.evaluate("document.documentElement.scrollWidth") <= 1300
    assert "circuit .stage" not in document(Opening("A page", "asked", "answer"), [], "The end.").split("</style>")[1]


def test_an_empty_atlas_is_refused():
    with pytest.raises(ValueError, match="the atlas is empty: there is no token to show"):
        Atlas("Nothing", (), ()).to_html()
