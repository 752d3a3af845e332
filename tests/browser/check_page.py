"""Looks at an inspection page in a real headless browser, with real keys and a real pointer.

    python -m tests.browser.check_page [FILE.html] [--screenshots FOLDER]

Without a file, the page of a tiny random model on an awkward text is made and looked at. Needs a Chromium on the PATH.
Ends with status 1 and the failed check's name if the page is not as it should be.
"""

import argparse
import base64
import contextlib
import io
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.browser.chromium import Page, browser

_WINDOWS = {"desktop": (1280, 900, False), "phone": (360, 800, True)}
_AWKWARD = (
    'He said "no" & left.\n\n<script>document.title="gone"</script> </script> <i>x</i> \\ \' é 😀\t漢字 \u202eabc\0 end'
)
# Of large bold text and all other, by the Web Content Accessibility Guidelines at level AA.
_CONTRAST = 4.5


def require(holds: bool, what: str) -> None:
    if not holds:
        raise SystemExit(f"error: {what}")
    print(f"  {what}")


def numbers_of(html: str) -> dict[str, Any]:
    """What the page holds, decoded: its JSON with arrays (L, H, n)."""
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)
    if found is None:
        raise SystemExit("error: no data in the page")
    data = json.loads(found[1])
    shape = (len(data["layers"]), data["heads"], len(data["pieces"]))
    for name, dtype in (("sign", "<i1"), ("logDet", "<f4"), ("carriers", "<u2"), ("shares", "<u1")):
        data[name] = np.frombuffer(base64.b64decode(data[name]), dtype).reshape(*shape, -1)
    return data | {"sign": data["sign"][..., 0], "logDet": data["logDet"][..., 0]}


def expected_classes(sign: np.ndarray, log_det: np.ndarray) -> list[tuple[int, bool]]:
    """Level of shading and frame of every token of one head."""
    count = sign.size - 1
    rank = np.empty(count, int)
    rank[np.argsort(log_det[1:], kind="stable")] = np.arange(count)
    levels = [3 - sum(r >= np.ceil(q * count) for q in (0.02, 0.05, 0.1)) for r in rank]
    return [(0, False), *zip(levels, (sign[1:] < 0).tolist(), strict=True)]


def shown_classes(page: Page) -> list[tuple[int, bool]]:
    names = page.evaluate("[...document.querySelectorAll('#text > span')].map((s) => s.className)")
    return [(int((re.search(r"level(\d)", name) or "00")[1]), "negative" in name.split()) for name in names]


def token_in_focus(page: Page) -> int:
    """Its number, -1 where another element is in focus."""
    return int(re.sub(r"^\D.*", "-1", page.evaluate("document.activeElement.id").removeprefix("t")) or -1)


def details(page: Page) -> str:
    return page.evaluate("document.getElementById('token').textContent")


def check_tree(page: Page, data: dict[str, Any]) -> None:
    """What a screen reader is told."""
    nodes = [node for node in page.call("Accessibility.getFullAXTree")["nodes"] if not node.get("ignored")]
    named = {(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if "role" in node}
    for role, name in (("combobox", "Layer"), ("combobox", "Head"), ("listbox", "Text"), ("list", "Legend")):
        require((role, name) in named, f"a screen reader finds the {role} {name!r}")
    options = page.evaluate("[...document.querySelectorAll('#text > [role=option]')].map((s) => s.ariaLabel)")
    require(len(options) == len(data["pieces"]) and all(options), "every token is an option with a name")
    require(
        any("negative" in name for name in options) == any(n for _, n in shown_classes(page)), "names tell the sign"
    )
    require(page.evaluate("document.getElementById('token').ariaLive") == "polite", "details are a live region")


def check_text(page: Page, data: dict[str, Any]) -> None:
    shown = page.evaluate("document.getElementById('text').textContent")
    # Line ends, tabs, lone spaces and control characters have signs of their own.
    plain = re.sub(r"[\s⏎⇥␣·�\0-\x1f]", "", shown)
    whole = re.sub(r"[\s·�\0-\x1f]", "", "".join(data["pieces"]))
    require(plain == whole, "the text is shown whole, with nothing of it taken for markup")
    require(page.evaluate("document.querySelectorAll('script').length") == 2, "no script but the page's own")


def check_keys(page: Page, data: dict[str, Any]) -> None:
    for _ in range(10):
        if page.evaluate("document.activeElement.getAttribute('role')") == "option":
            break
        page.press("Tab")
    start = token_in_focus(page)
    worst = (data["worst"]["row"], data["worst"]["head"])
    order = np.argsort(data["logDet"][worst][1:], kind="stable") + 1
    require(start == order[0], "Tab reaches the token closest to the boundary")
    last = len(data["pieces"]) - 1
    for key, token, words, what in (
        ("ArrowDown", order[1], "", "arrow down goes to the next closest token"),
        ("Home", 0, "no past", "Home goes to the first token, which has no past"),
        ("ArrowRight", 1, "Token 1 ", "arrow right goes on by one"),
        ("End", last, "barrier", "End goes to the last token, whose details give the barrier"),
        ("ArrowRight", last, "det J", "nothing is beyond the last token, whose details give the margin"),
    ):
        page.press(key)
        require(token_in_focus(page) == token and words in details(page), what)
    page.press("Home")
    page.evaluate("scrollTo(0, 0)")
    covered = 0
    for _ in range(min(last, 100)):
        page.press("ArrowRight")
        covered += page.evaluate(
            "document.activeElement.getBoundingClientRect().bottom > "
            "document.getElementById('details').getBoundingClientRect().top + 1"
        )
    require(not covered, "the details never cover the token in focus")


def check_choice(page: Page, data: dict[str, Any]) -> None:
    def choose(place: tuple[int, ...]) -> None:
        """By keys; the first choice of both lists is all layers and heads together."""
        for name, presses in zip(("layer", "head"), place, strict=True):
            page.evaluate(f"document.getElementById('{name}').focus()")
            page.press("Home")
            for _ in range(presses):
                page.press("ArrowDown")

    worst = (data["worst"]["row"], data["worst"]["head"])
    layers, heads, count = data["logDet"].shape
    for place, presses, chosen in (
        (worst, None, "the worst layer and head, where the page opens"),
        ((0, 0), (1, 1), "layer and head 0, chosen by keys"),
        ((layers - 1, heads - 1), (layers, heads), "the last layer and head, chosen by keys"),
    ):
        if presses is not None:
            choose(presses)
        expected = expected_classes(data["sign"][place], data["logDet"][place])
        require(shown_classes(page) == expected, f"shades and frames are those of {chosen}")
    choose((0, 0))
    flat, signs = data["logDet"].reshape(-1, count), data["sign"].reshape(-1, count)
    sign = signs[flat.argmin(0), np.arange(count)]
    together = expected_classes(sign, flat.min(0))
    require(shown_classes(page) == together, "over all layers and heads, each token's closest")


def check_pointer(page: Page, data: dict[str, Any]) -> None:
    token = next(i for i, piece in enumerate(data["pieces"]) if i > 2 and piece.strip())
    page.evaluate(f"document.getElementById('t{token}').scrollIntoView({{block: 'center'}})")
    box = page.evaluate(f"(b => [b.x + b.width / 2, b.y + b.height / 2])(t{token}.getBoundingClientRect())")
    page.point(*box)
    require(details(page).startswith(f"Token {token} "), "the details follow the pointer")
    row, head = re.search(r"layer (\d+), head (\d+)", details(page)).groups()
    place = (data["layers"].index(int(row)), int(head), token)
    told = [int(s) for s in re.findall(r"% token (\d+)", details(page))]
    expected = [int(c) for c, share in zip(data["carriers"][place], data["shares"][place], strict=True) if share]
    require(told == expected and max(expected) <= token, "the details name the carriers, none of them later")
    marked = page.evaluate("[...document.querySelectorAll('.carrier')].map((s) => s.id).filter((id) => id)")
    require(sorted(marked) == sorted(f"t{c}" for c in set(expected)), "and the text marks them")


def _luminance(colour: str) -> float:
    channels = np.array([float(c) for c in re.findall(r"[\d.]+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def check_contrast(page: Page) -> None:
    for name in ("level1", "level2", "level3"):
        pair = page.evaluate(
            f"(s => [s.color, s.backgroundColor])(getComputedStyle(document.querySelector('.sample.{name}')))"
        )
        dark, light = sorted(map(_luminance, pair))
        ratio = (light + 0.05) / (dark + 0.05)
        require(ratio >= _CONTRAST, f"text on {name} has contrast {ratio:.1f}")


def check_quiet(page: Page, url: str) -> None:
    requests = {e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"}
    require(requests == {url}, "the page asks for nothing but itself")
    troubles = [e["params"] for e in page.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")]
    require(not troubles, f"no error in the console {troubles or ''}".rstrip())


def check(path: Path, screenshots: Path | None) -> None:
    data, url = numbers_of(path.read_text(encoding="utf-8")), path.resolve().as_uri()
    with browser() as page:
        for window, size in _WINDOWS.items():
            for scheme in ("light", "dark"):
                print(f"{window}, {scheme}:")
                page.window(*size, scheme)
                page.open(url)
                wide = page.evaluate("document.documentElement.scrollWidth")
                require(wide <= size[0], f"{wide} pixels wide in a window of {size[0]}")
                check_contrast(page)
                if screenshots is not None:
                    screenshots.mkdir(parents=True, exist_ok=True)
                    page.screenshot(screenshots / f"{window}-{scheme}.png")
            check_text(page, data)
            check_tree(page, data)
            check_keys(page, data)
            check_choice(page, data)
            check_pointer(page, data)
        check_quiet(page, url)


@contextlib.contextmanager
def tiny_page() -> Iterator[Path]:
    """The page of a random model of the Llama family: one token a byte, and one that is markup."""
    from prob_transformer.__main__ import main
    from tests.helpers.foreign_models import with_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = with_tokenizer(
            lambda tokenizer: tokenizer.add_tokens(["<i>x</i>"]), max_position_embeddings=256, vocab_size=261
        )
        make(folder / "tiny")
        (folder / "text.txt").write_bytes(_AWKWARD.encode())
        asked = ["--model", str(folder / "tiny"), "--text", str(folder / "text.txt"), "--out", str(folder / "out")]
        with contextlib.redirect_stdout(io.StringIO()):
            status = main(["inspect", *asked])
        require(status == 0, "the page of a tiny model is made")
        yield folder / "out" / "inspect.html"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.browser.check_page", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", help="the page; without it, that of a tiny random model")
    parser.add_argument("--screenshots", type=Path, help="folder for a screenshot of every window and colour scheme")
    arguments = parser.parse_args()
    with contextlib.nullcontext(arguments.file) if arguments.file else tiny_page() as path:
        check(path, arguments.screenshots)
    print("the page is as it should be")


if __name__ == "__main__":
    sys.exit(main())
