"""The page with a slider, in a browser; and every page of the site: links, pictures, headings.

The site is built beforehand (`sphinx-build examples/gallery site`), and `PPVAE_SITE` is its folder.
The browser is Chromium: `PPVAE_CHROMIUM`, or the one of the system.
"""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

if not os.environ.get("PPVAE_SITE"):
    pytest.skip("PPVAE_SITE names no built site", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

SITE = Path(os.environ["PPVAE_SITE"]).resolve()
PAGES = sorted(SITE.rglob("*.html"))
EXPLORE = SITE / "explore" / "index.html"
CHROMIUM = os.environ.get("PPVAE_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
NUMBERS = {"rate": "rate", "distortion": "distortion", "ELBO": "elbo", "loss": "loss"}
SVG_SIZE, LEFT, RIGHT, TOP, BOTTOM = 320, 42, 310, 12, 280  # the axes, in the pictures' own units


# ---- the browser


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens a page of the site; at the end nothing may have failed on it."""
    contexts, wrong = [], []

    def open_page(path=EXPLORE, width=1200, **options):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: wrong.append(m.text) if m.type in WORSE else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: wrong.append(request.url) if far(request) else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not wrong


WORSE = ("error", "warning")


def far(request):
    """Whether something is asked of a network."""
    return urlsplit(request.url).scheme not in ("file", "data", "blob")


# ---- what the page was given, and what it shows


def sent():
    """The numbers that the page was given."""
    text = re.search(r'id="explore-data">(.*?)</script>', EXPLORE.read_text(), re.S)[1]
    return json.loads(text)


DATA = sent()
FITS = [(f, k) for f in DATA["families"] for k in range(len(DATA["betas"]))]


def fit_of(family, index):
    fits = DATA["families"][family]
    return fits[min(index, len(fits) - 1)]


def choose(page, family, index):
    page.check(f"input[name=family][value={family}]")
    page.fill("#explore-beta", str(index))


def written(value):
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def numbers(page):
    return {key: page.text_content(f"#explore-{name}") for name, key in NUMBERS.items()}


def places(page, picture, selector):
    """Positions on the axes of a picture, by its ticks, in the units of these."""
    script = """([picture, selector]) => {
      const svg = document.querySelector(picture), box = svg.getBoundingClientRect();
      const unit = box.width / 320;
      const ticks = [...svg.querySelectorAll("text")].filter((t) => /^[−\\d]+$/.test(t.textContent)
        && !t.closest(".code"));
      const value = (t) => Number(t.textContent.replace("−", "-"));
      const xs = ticks.filter((t) => t.getAttribute("text-anchor") === "middle");
      const ys = ticks.filter((t) => t.getAttribute("text-anchor") === "end");
      const line = (list, key, off) => {
        const at = (t) => Number(t.getAttribute(key)) + off;
        const [a, b] = [list[0], list[list.length - 1]];
        return (p) => value(a) + ((p - at(a)) / (at(b) - at(a))) * (value(b) - value(a));
      };
      const x = line(xs, "x", 0), y = line(ys, "y", -4);
      return [...svg.querySelectorAll(selector)].map((node) => {
        const m = node.getCTM(), s = svg.getCTM();
        const inner = s.inverse().multiply(m);
        const per = (x(1) - x(0));
        return { x: x(inner.e), y: y(inner.f), digit: node.parentNode.textContent,
                 xx: (inner.a ** 2 + inner.c ** 2) * per ** 2,
                 xy: -(inner.a * inner.b + inner.c * inner.d) * per ** 2,
                 yy: (inner.b ** 2 + inner.d ** 2) * per ** 2 };
      });
    }"""
    return page.evaluate(script, [picture, selector])


def pixels(page, canvas):
    """The images of a row, as the page was given them."""
    script = """(canvas) => {
      const c = document.querySelector(canvas), all = [];
      const p = c.getContext("2d").getImageData(0, 0, c.width, 8).data;
      for (let k = 0; 9 * k < c.width; k++) {
        let image = "";
        for (let i = 0; i < 64; i++) {
          const at = 4 * ((i >> 3) * c.width + 9 * k + (i & 7));
          image += Math.round((255 - p[at]) / 17).toString(16);
        }
        all.push(image);
      }
      return all;
    }"""
    return page.evaluate(script, canvas)


def check(page, family, index):
    """Everything on the page is that of one fit."""
    fit, beta = fit_of(family, index), DATA["betas"][index]
    assert page.text_content("#explore-price") == f"{beta:g}"
    assert page.get_attribute("#explore-beta", "aria-valuetext") == f"beta {beta:g}"
    assert numbers(page) == {key: written(fit[key]) for key in NUMBERS.values()}
    check_codes(places(page, "#explore-codes", ".code .sd"), fit)
    point = places(page, "#explore-plane", ".point")[0]
    seen = page.is_visible("#explore-plane .point")
    assert seen == (fit["rate"] is not None)
    if seen:
        assert abs(point["x"] - fit["rate"]) < 0.01
        assert abs(point["y"] - fit["distortion"]) < 0.01
    assert page.text_content("#explore-plane .name").startswith(family)
    assert pixels(page, "#explore-back") == fit["back"]
    assert pixels(page, "#explore-drawn") == fit["drawn"]
    for part in ("codes", "plane", "back", "drawn"):
        words = page.get_attribute(f"#explore-{part}", "aria-label")
        assert f"nder {family} at beta {beta:g}" in words
    words = page.get_attribute("#explore-plane", "aria-label")
    assert written(fit["distortion"]) in words


def check_codes(drawn, fit):
    """Means and covariances are where the axes say; the ten are drawn last, above the others."""
    few = set(DATA["ten"])
    order = sorted(range(len(DATA["digit"])), key=lambda i: i in few)
    assert len(drawn) == len(order)
    for i, shape in zip(order, drawn, strict=True):
        (x, y), (sx, sy) = fit["mean"][i], fit["sd"][i]
        assert shape["digit"] == str(DATA["digit"][i])
        assert abs(shape["x"] - x / 100) < 0.005 and abs(shape["y"] - y / 100) < 0.005
        xy = fit["correlation"][i] / 100 * sx * sy / 1e4
        for got, wanted in [("xx", sx**2 / 1e4), ("xy", xy), ("yy", sy**2 / 1e4)]:
            assert abs(shape[got] - wanted) < 1e-3, (i, got)


def test_every_family_and_price_shows_its_own_fit(visit):
    page = visit()
    check(page, "mean_scale", DATA["betas"].index(1))  # where it starts
    for family, index in FITS:
        choose(page, family, index)
        check(page, family, index)


def test_the_keyboard_moves_it_and_the_focus_is_seen(visit):
    page = visit()
    start = DATA["betas"].index(1)
    page.focus("#explore-beta")
    page.keyboard.press("ArrowRight")
    check(page, "mean_scale", start + 1)
    page.keyboard.press("Home")
    check(page, "mean_scale", 0)
    outline = "(node) => getComputedStyle(node).outlineStyle + getComputedStyle(node).outlineWidth"
    assert page.eval_on_selector("#explore-beta", outline) == "solid3px"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowDown")
    check(page, "full_rank", 0)
    assert page.evaluate("document.activeElement.value") == "full_rank"
    assert page.eval_on_selector("input:focus", outline) == "solid3px"


def test_controls_and_numbers_have_names_for_a_screen_reader(visit):
    page = visit()
    assert page.get_by_role("slider", name=re.compile("Price of a nat: beta")).count() == 1
    group = page.get_by_role("group", name="Family")
    assert group.get_by_role("radio").count() == len(DATA["families"])
    for family in DATA["families"]:
        assert group.get_by_role("radio", name=family, exact=True).count() == 1
    assert page.get_attribute("#explore-numbers", "aria-live") == "polite"
    for part in ("codes", "plane", "data-row", "back", "drawn"):
        assert page.get_attribute(f"#explore-{part}", "role") == "img"


def test_alternative_texts_follow_the_state(visit):
    page, told = visit(), {}
    for family, index in [("mean_scale", 0), ("mean_scale", 6), ("deterministic", 0)]:
        choose(page, family, index)
        for part in ("codes", "plane", "back", "drawn"):
            told.setdefault(part, set()).add(page.get_attribute(f"#explore-{part}", "aria-label"))
    assert {part: len(texts) for part, texts in told.items()} == dict.fromkeys(told, 3)
    choose(page, "mean_scale", 2)
    fit = fit_of("mean_scale", 2)
    width = sum(map(sum, fit["sd"])) / (2 * len(fit["sd"])) / 100
    assert f"a width of {width:.2f}" in page.get_attribute("#explore-codes", "aria-label")
    right = [
        (int(a, 16) > 7) == (int(b, 16) > 7)
        for back, image in zip(fit["back"], DATA["images"], strict=True)
        for a, b in zip(back, image, strict=True)
    ]
    words = page.get_attribute("#explore-back", "aria-label")
    assert f"{sum(right) / 10:.1f} of 64 pixels" in words


def test_motion_only_where_it_is_wanted(browser):
    for wanted, duration in [("reduce", "0s"), ("no-preference", "0.25s")]:
        with browser.new_context(reduced_motion=wanted) as context:
            page = context.new_page()
            page.goto(EXPLORE.as_uri())
            style = "(node) => getComputedStyle(node).transitionDuration"
            assert page.eval_on_selector(".explore .code", style) == duration


# ---- a phone, the dark, and without JavaScript


def test_a_phone_shows_it_without_scrolling_sideways_and_in_letters_to_be_read(visit):
    page = visit(width=360)
    for family in ("mean_only", "deterministic", "full_rank"):
        choose(page, family, 0)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate(FARTHEST) <= 360  # what is cut off would not scroll, either
        sizes = page.evaluate(
            """[...document.querySelectorAll(".explore *")].filter((n) => n.getClientRects().length
              && [...n.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim()))
              .map((n) => [n.textContent, parseFloat(getComputedStyle(n).fontSize)
                * (n.ownerSVGElement ? n.ownerSVGElement.getScreenCTM().a : 1)])"""
        )
        assert len(sizes) > 100
        assert not [row for row in sizes if row[1] < 11]
    tops = page.evaluate(
        """[...document.querySelectorAll(".explore-ticks span")].map((n) => {
          const r = n.getBoundingClientRect(); return [r.left, r.right]; })"""
    )
    assert all(a[1] < b[0] for a, b in zip(tops, tops[1:], strict=False))  # apart
    assert tops[0][0] >= 0 and tops[-1][1] <= 360


FARTHEST = """Math.max(...[...document.querySelectorAll(".explore *")]
  .filter((n) => !n.ownerSVGElement).map((n) => n.getBoundingClientRect().right))"""

CONTRAST = """(theme) => {
  document.body.dataset.theme = theme;
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const linear = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => 0.2126 * linear(c[0]) + 0.7152 * linear(c[1]) + 0.0722 * linear(c[2]);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const c = rgb(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > 0.5) return c;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(".explore *")].filter((n) => n.getClientRects().length
      && [...n.childNodes].some((c) => c.nodeType === 3 && c.textContent.trim())).map((n) => {
    const style = getComputedStyle(n), ink = rgb(n.ownerSVGElement ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(n))].sort((u, v) => v - u);
    return [n.textContent, (a + 0.05) / (b + 0.05)];
  });
}"""


@pytest.mark.parametrize("theme", ["light", "dark", "auto"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_letters_stand_out_from_the_ground(visit, theme, scheme):
    """By 4.5 to 1: what WCAG 2.2 asks for (success criterion 1.4.3)."""
    page = visit(color_scheme=scheme)
    rows = page.evaluate(CONTRAST, theme)
    assert len(rows) > 100
    assert not [row for row in rows if row[1] < 4.5]
    wanted = theme if theme != "auto" else scheme
    grounds = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", grounds)[:3])) < 380) == (wanted == "dark")


def rows_of_table():
    """The cells of the table under the widget."""
    parts = re.search(r"<tbody>(.*?)</tbody>", EXPLORE.read_text(), re.S)[1]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in parts.split("</tr>")]
    return [[cell.strip() for cell in row] for row in cells if row]


def test_the_table_has_the_numbers_of_the_widget():
    told = {(family, beta): rest for family, beta, *rest in rows_of_table()}
    assert len(told) == sum(map(len, DATA["families"].values()))
    for family, fits in DATA["families"].items():
        for fit in fits:
            beta = "any" if family == "noise_only" else f"{fit['beta']:g}"
            wanted = ["-" if fit[k] is None else f"{fit[k]:.2f}" for k in NUMBERS.values()]
            assert told[family, beta] == wanted, family


def test_the_data_keep_what_the_numbers_mean():
    """The ELBO is minus rate and distortion, the loss has beta between them; all rounded once."""
    for fits in DATA["families"].values():
        for fit in fits:
            if fit["rate"] is not None:
                assert abs(fit["elbo"] + fit["rate"] + fit["distortion"]) < 0.0101
                loss = fit["distortion"] + fit["beta"] * fit["rate"]
                assert abs(fit["loss"] - loss) < 0.0101 + 0.005 * fit["beta"]
    assert EXPLORE.stat().st_size < 1_500_000


def test_without_javascript_there_are_a_word_and_the_table(visit):
    word = "The pictures need JavaScript"
    assert not visit().get_by_text(word).is_visible()
    page = visit(java_script_enabled=False)
    assert not page.is_visible("#explore")
    assert page.get_by_text(word).is_visible()
    assert page.get_by_role("row").count() > 40
    link = page.get_by_role("link", name="All the numbers", exact=True).first
    assert page.locator(link.get_attribute("href")).count() == 1


# ---- every page of the site


class Reader(HTMLParser):
    """Of one page: where it leads, what it names, pictures without words, levels of headings."""

    def __init__(self, path):
        super().__init__()
        self.targets, self.names, self.mute, self.levels = [], set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        told = dict(attrs)
        self.names |= {told[key] for key in ("id", "name") if told.get(key)}
        self.targets += [told[key] for key in ("href", "src") if told.get(key)]
        if tag == "img" and not (told.get("alt") or "").strip():
            self.mute.append(told.get("src", "")[:80])
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))

    handle_startendtag = handle_starttag


READ = {path: Reader(path) for path in PAGES}


def name_of(path):
    return str(path.relative_to(SITE))


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_and_pictures_of_a_page_lead_somewhere(path):
    for target in READ[path].targets:
        parts = urlsplit(target)
        if parts.scheme or parts.netloc:
            continue
        file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        assert file.is_file(), target
        if parts.fragment and file in READ:
            assert unquote(parts.fragment) in READ[file].names, target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_pictures_have_words_and_headings_are_in_order(path):
    page = READ[path]
    assert not page.mute
    if path.name == "search.html":  # its heading is made by its script
        return
    assert page.levels.count(1) == 1 and page.levels[0] == 1
    assert all(b <= a + 1 for a, b in zip(page.levels, page.levels[1:], strict=False))


def test_every_page_opens_without_an_error(visit):
    assert len(PAGES) > 3
    for path in PAGES:
        visit(path).close()
