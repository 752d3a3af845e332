import base64
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from prob_transformer import layer_margins
from prob_transformer.inference import result_tree
from prob_transformer.inspection import command
from prob_transformer.inspection.command import parse_layers
from prob_transformer.pretrained import load
from tests.helpers.error_lines import assert_refused

# Quotes, markup, a character of four tokens, a line end.
TEXT = '"a" <b>&\r\n😀 [x] \x00 end'
COUNT = len(TEXT.encode())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def run(loaded, text, tmp_path, monkeypatch):
    """The command on the tiny model, read once; gives the exit status and the output folder."""

    def run(*more, text=text, out=tmp_path / "out", loaded=loaded):
        monkeypatch.setattr(load, "load_pretrained", lambda _: loaded)
        given = ["inspect", "--model", "tiny", "--text", str(text), "--out", str(out), *more]
        return command.main(given), out

    return run


@pytest.fixture
def refused(run, tmp_path, capsys):
    """That a run ends with one line on standard error with the word, and nothing new in the folder."""

    def check(word, *more, **asked):
        assert run(*more, **asked)[0] == 2
        assert_refused(capsys, word)
        assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]

    return check


def test_page_and_file_hold_what_layer_margins_gives(run, loaded, capsys):
    status, out = run()
    told = capsys.readouterr()
    assert (status, told.err) == (0, "")
    assert "det<0" in told.out
    tokens = np.array(list(loaded.tokenizer.encode(TEXT).ids), np.int32)
    assert tokens.size == COUNT
    data = re.search(r'type="application/json">(.*?)</script>', (out / "inspect.html").read_text(encoding="utf-8"))
    data = json.loads(data[1])
    assert "".join(data["pieces"]) == TEXT
    assert data["pieces"][10:14] == ["😀", "", "", ""]
    page = np.frombuffer(base64.b64decode(data["logDet"]), "<f4").reshape(2, 4, COUNT)
    tree = result_tree.load(out / "inspect.nc")
    for index, (layer, inputs) in enumerate(loaded.decoder.layers(tokens)):
        expected = layer_margins(layer, inputs)
        np.testing.assert_array_equal(page[index], np.asarray(expected.log_det, np.float32))
        np.testing.assert_array_equal(tree["margins/sign"][index], expected.sign)
        np.testing.assert_array_equal(tree["margins/barrier"][index], expected.barrier)
    assert tree.attrs["model_sha256"] == loaded.sha256
    assert tree.attrs["command"].startswith("prob-transformer inspect --model tiny")
    assert json.loads(tree.attrs["configuration"])["values"] == "identity"
    assert sorted(path.name for path in out.iterdir()) == ["inspect.html", "inspect.nc"]


def test_layers_and_setting_are_as_asked(run, loaded):
    status, out = run("--layers", "1", "--values", "own", "--self-inclusive", "--tokens", "20")
    assert status == 0
    tree = result_tree.load(out / "inspect.nc")
    tokens = np.array(loaded.tokenizer.encode(TEXT).ids, np.int32)[:20]
    layer, inputs = list(loaded.decoder.layers(tokens))[1]
    expected = layer_margins(layer, inputs, values="own", self_inclusive=True)
    np.testing.assert_array_equal(tree["margins/log_det"], expected.log_det[None])
    assert tree["margins/layer"].values.tolist() == [1]
    assert "over the past and the position itself" in (out / "inspect.html").read_text(encoding="utf-8")


def test_a_second_run_replaces_its_files_and_no_others(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "inspect.html").write_text("old")
    assert run()[0] == 0
    assert "det J" in (out / "inspect.html").read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir()) == ["inspect.html", "inspect.nc", "notes.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


@pytest.mark.parametrize(
    ("content", "more", "word"),
    [
        (b"", [], "is empty"),
        (b" \n", [], "is empty"),
        (b"\xff\xfe", [], "is not UTF-8 (byte 0)"),
        (b"a", [], "has 1 token"),
        (b"a" * 33, [], "has 33 tokens, but at most 32 are looked at (the model's context is 32); pass --tokens 32"),
        (TEXT.encode(), ["--layers", "2"], "--layers: got '2', but the model has layers 0 to 1"),
        (
            TEXT.encode(),
            ["--layers", "0-999999999999"],
            "--layers: got '0-999999999999', but the model has layers 0 to 1",
        ),
        (TEXT.encode(), ["--layers", "x"], "--layers: got 'x'; pass all, or"),
        (TEXT.encode(), ["--tokens", "1"], "--tokens: got 1; pass 2 to 32"),
        (TEXT.encode(), ["--rows", "0"], "--rows: got 0"),
    ],
)
def test_bad_texts_and_options(refused, text, content, more, word):
    text.write_bytes(content)
    refused(word, *more)


def test_places_that_are_not_there_or_not_to_be_written(refused, text, tmp_path):
    refused("--text", text=tmp_path / "none")
    refused("--out", out=text)
    refused("--out", out=text / "below")
    refused("File name too long", out=tmp_path / ("long" * 100))
    refused("is not UTF-8", out=tmp_path / os.fsdecode(b"\xff"))


def test_a_folder_in_the_place_of_a_file_is_refused_before_the_other_file_is_replaced(run, tmp_path, capsys):
    (tmp_path / "out" / "inspect.nc").mkdir(parents=True)
    (tmp_path / "out" / "inspect.html").write_text("old")
    assert run()[0] == 2
    assert "inspect.nc is a folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "inspect.html").read_text() == "old"


def test_a_model_that_cannot_read_the_text_is_refused(refused, loaded):
    words = Tokenizer(models.WordLevel({"known": 0}, unk_token="[UNK]"))
    refused("the model's tokenizer refuses", loaded=loaded._replace(tokenizer=words))
    refused("its context is 1 token", loaded=loaded._replace(decoder=SimpleNamespace(context=1)))


def test_an_output_that_takes_nothing_is_said_in_one_line_and_the_files_are_there(model, text, tmp_path):
    given = ["inspect", "--model", str(model), "--text", str(text), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "prob_transformer", *given]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr
    assert b"No space left on device" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inspect.html", "inspect.nc"]


@pytest.mark.parametrize(
    ("raised", "status"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_run_that_ends_while_writing_leaves_nothing(run, tmp_path, monkeypatch, capsys, raised, status):
    def fail(tree, path):
        path.write_bytes(b"half")
        raise raised

    monkeypatch.setattr(command, "save", fail)
    assert run()[0] == status
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_run_killed_while_writing_leaves_nothing_at_its_place(tmp_path):
    killed = f"""
import os, signal
from pathlib import Path
from prob_transformer.inspection.command import _whole_folder
with _whole_folder(Path({str(tmp_path / "out")!r}), ("a",)) as folder:
    (folder / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert not os.path.lexists(tmp_path / "out")


def test_the_module_is_the_command():
    given = ["inspect", "--model", "none", "--text", __file__, "--out", "out"]
    command = [sys.executable, "-m", "prob_transformer", *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --model: none is not there; pass smollm2, a GGUF file or a Hugging Face folder.\n"


def test_ranges_of_layers():
    assert parse_layers("all", 3) == (0, 1, 2)
    assert parse_layers("3,0-1,1", 5) == (0, 1, 3)
    for text in ("", "1-", "-1", "2-1-0", "a-b", "1,,2", "3-1", "3-1,2"):
        with pytest.raises(ValueError, match="--layers: got"):
            parse_layers(text, 5)
