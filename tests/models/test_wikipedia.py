import bz2
import json

import pytest

from models import wikipedia

PAGE = """<page><title>{title}</title><ns>{namespace}</ns>{redirect}<revision><text>{text}</text></revision></page>"""


def page(title, text, namespace=0, redirect=False):
    mark = f'<redirect title="{title}" />' if redirect else ""
    return PAGE.format(
        title=title, text=text.replace("&", "&amp;").replace("<", "&lt;"), namespace=namespace, redirect=mark
    )


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        ("'''Bold''' and ''italic''.", "Bold and italic."),
        ("A [[link]] and a [[target|shown]] one.", "A link and a shown one."),
        ('Before<ref name="a">Source, [[link]].</ref> after<ref name="a" />.', "Before after."),
        ("One<!-- a comment\nover lines --> two.", "One two."),
        ("[[File:Tree.jpg|thumb|A [[tree]] with ''leaves''.]]Text.", "Text."),
        ("[[Image:Tree.jpg|100px]]Text.", "Text."),
        ("Text.[[Category:Trees]]\n[[de:Baum]]\n[[zh-min-nan:X]]", "Text."),
        ("See [[:Category:Trees]].", "See :Category:Trees."),
        ("{{Infobox|name={{nested|x}}}}Text.", "Text."),
        ("Let <math>x_1 < y</math> be.", "Let be."),
        ("<gallery>\nFile:a.jpg|One\n</gallery>Text.", "Text."),
        ('{| class="wikitable"\n! head\n|-\n| cell <ref>x</ref>\n|}\nText.', "Text."),
        ("== Heading ==\nText.\n\n\n\nMore.", "Heading\nText.\n\nMore."),
        ("__NOTOC__Text&nbsp;here &amp; there.", "Text here & there."),
    ],
)
def test_markup_is_stripped_and_prose_is_kept(wikitext, text):
    assert wikipedia.clean(wikitext) == text


def test_only_articles_that_are_not_redirects_are_read(tmp_path):
    pages = [page("Kept", "Text."), page("Moved", "x", redirect=True), page("Talk:Kept", "x", 1), page("Also", "More.")]
    dump = tmp_path / "dump.bz2"
    dump.write_bytes(bz2.compress(f"<mediawiki>{''.join(pages)}</mediawiki>".encode()))
    assert list(wikipedia.read_dump(dump)) == [("Kept", "Text."), ("Also", "More.")]


def test_the_text_is_made_once_and_made_again_when_it_was_changed(tmp_path, monkeypatch):
    reads = []

    def few(path):
        reads.append(path)
        return [wikipedia.Article("One", "'''First'''."), wikipedia.Article("Two", "Second.")]

    monkeypatch.setattr(wikipedia, "read_dump", few)
    out = tmp_path / "text.txt"
    for _ in range(2):
        assert wikipedia.prepare(out).read_text() == "One\nFirst.\fTwo\nSecond."
    assert len(reads) == 1
    assert json.loads(out.with_suffix(".json").read_text())["dump_sha256"] == wikipedia.DUMP_SHA256
    out.write_text("spoiled")
    assert wikipedia.prepare(out).read_text().startswith("One\n")
    assert len(reads) == 2
    out.with_suffix(".json").write_text("{cut off")
    assert wikipedia.prepare(out).read_text().startswith("One\n")
    assert len(reads) == 3


def test_the_sample_in_the_wheel_is_the_known_one_with_106_articles():
    articles = list(wikipedia.read_dump(wikipedia.dump_path()))
    assert len(articles) == 106
    assert articles[0].title == "Anarchism"
    assert "{{" not in wikipedia.clean(articles[-1].text)


def test_a_foreign_wheel_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(wikipedia, "DUMP_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"corpus: enwiki.* is cut off or not the file.* corpus extra.* pass --corpus"):
        wikipedia.dump_path()
