import base64
import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from prob_transformer.inspection.html_page import MOST_TOKENS, inspection_page


class Elements(HTMLParser):
    """Every element with its attributes, and the text of scripts by id."""

    def __init__(self, html):
        super().__init__()
        self.seen, self.scripts, self.text = [("", {})], {}, ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attrs = self.seen[-1]
        if tag == "script":
            key = attrs.get("id", "page")
            self.scripts[key] = self.scripts.get(key, "") + data
        self.text += data


def page(inspection, title="t", facts={}):  # noqa: B006
    return Elements(inspection_page(inspection, title, facts))


def decoded(data, name, dtype, shape):
    return np.frombuffer(base64.b64decode(data[name]), dtype).reshape(shape)


def test_the_page_holds_the_numbers(made_up):
    data = json.loads(page(made_up).scripts["data"])
    assert data["pieces"] == list(made_up.pieces)
    assert (data["layers"], data["heads"], data["carriersEach"]) == ([3, 7], 1, 3)
    # The head that is most often past the boundary, where the page opens.
    assert data["worst"] == {"row": 0, "head": 0}
    flipped = replace(made_up, sign=made_up.sign[::-1], log_det=made_up.log_det[::-1])
    assert json.loads(page(flipped).scripts["data"])["worst"] == {"row": 1, "head": 0}
    np.testing.assert_array_equal(decoded(data, "sign", "<i1", (2, 1, 5)), made_up.sign)
    np.testing.assert_array_equal(decoded(data, "logDet", "<f4", (2, 1, 5)), made_up.log_det)
    np.testing.assert_array_equal(decoded(data, "carriers", "<u2", (2, 1, 5, 3)), made_up.carriers)
    shares = decoded(data, "shares", "<u1", (2, 1, 5, 3)) / 255
    np.testing.assert_allclose(shares, made_up.shares, rtol=0, atol=0.5 / 255)


def test_no_text_becomes_markup(made_up):
    plain = page(replace(made_up, pieces=tuple("abcde")))
    awkward = page(made_up, "<b>t</b>", {"Text": "<img src=x>"})
    names = [tag for tag, _ in awkward.seen if tag not in ("dt", "dd")]
    assert names == [tag for tag, _ in plain.seen]
    assert "<b>t</b>" in awkward.text
    assert "<img src=x>" in awkward.text
    # What a token says of a place to fill stays as it is.
    assert awkward.scripts["page"] == plain.scripts["page"]


def test_nothing_is_asked_for_elsewhere_and_controls_have_labels(made_up):
    seen = page(made_up).seen
    asking = {"src", "href", "action", "srcset", "poster", "data", "background"}
    assert not [(tag, attrs) for tag, attrs in seen if asking & set(attrs)]
    policies = [attrs["content"] for tag, attrs in seen if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies[0].startswith("default-src 'none'")
    labelled = {attrs["for"] for tag, attrs in seen if tag == "label"}
    assert {attrs["id"] for tag, attrs in seen if tag == "select"} == labelled == {"layer", "head"}
    assert [attrs["lang"] for tag, attrs in seen if tag == "html"] == ["en"]


def test_what_is_analysed_stands_in_the_page(made_up):
    text = " ".join(page(made_up).text.split())
    assert "It is not the residual block" in text
    assert "det J < 0 at 37.50% of all places" in text


def test_too_long_a_text_is_refused(made_up):
    with pytest.raises(ValueError, match=f"tokens: {MOST_TOKENS + 1} are too many"):
        page(replace(made_up, tokens=np.zeros(MOST_TOKENS + 1, int)))
