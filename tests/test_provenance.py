"""Pictures carry the marks of their profile: in the pixels, in the metadata, signed; and each is verified."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from inkstream.cli import main
from inkstream.engine.pictures.metadata import encode_picture, save_picture
from inkstream.engine.pictures.provenance import AIGC, add_label, mark_of, verify_provenance
from inkstream.engine.pictures.signing import FOLDER, verify_signature
from inkstream.engine.pictures.watermark import _codewords, add_mark, read_mark
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample
from inkstream.types import InputError, ProvenanceName, Request, Saving

REQUEST = Request(prompt="a fox", seed=1)
MARK = 0xC0FFEE


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDER, str(tmp_path / "provenance"))
    return tmp_path / "provenance"


@pytest.fixture
def certificate(folder, capsys):
    pytest.importorskip("c2pa", reason="needs the extra provenance")
    assert main(["provenance", "init", "--producer", "Studio Ink"]) == 0
    assert capsys.readouterr().out == f"{folder / 'certificate.pem'}\n"
    return folder


def scene(number: int = 0, side: int = 256) -> Image.Image:
    return render(sample(Grammar(), number, "any"), side)


def saved(path, provenance: ProvenanceName, image=None, metadata="full"):
    save_picture(image or scene(), path, REQUEST, saving=Saving(metadata, provenance))
    return str(path)


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


# The invisible mark


def test_two_words_of_the_code_differ_in_eight_places_or_more():
    words = _codewords().astype(int)
    apart = (24 - words[:64] @ words.T) // 2
    assert sorted(np.unique(apart)) == [0, 8, 12, 16, 24]


@pytest.mark.parametrize("image", [scene(1), scene(2, 128), Image.new("RGB", (300, 200), "white")])
def test_the_mark_survives_jpeg_80_and_resizing_to_three_quarters(image):
    marked = add_mark(image, MARK)
    small = marked.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.LANCZOS)
    assert [read_mark(one) for one in (marked, as_jpeg(marked, 80), small, as_jpeg(small, 80))] == [MARK] * 4
    error = np.mean((np.asarray(marked, float) - np.asarray(image, float)) ** 2)
    assert 10 * np.log10(255**2 / error) > 42  # dB


def test_a_picture_without_a_mark_has_none():
    pictures = [scene(number) for number in range(20)]
    pictures += [Image.effect_noise((200, 200), 80), Image.new("RGB", (96, 96), "black")]
    assert [read_mark(picture) for picture in pictures] == [None] * 22


def test_the_mark_keeps_transparency():
    image = scene().convert("RGBA")
    image.putalpha(77)
    marked = add_mark(image, MARK)
    assert marked.getchannel("A").getextrema() == (77, 77)


# The label


@pytest.mark.parametrize("size", [(128, 128), (1024, 768), (300, 900)])
def test_the_label_is_at_least_a_twentieth_of_the_shorter_side_high(size):
    changed = np.asarray(add_label(Image.new("RGB", size, (90, 90, 90)))).min(-1)
    rows, columns = np.nonzero(changed > 200)
    assert rows.max() - rows.min() + 1 >= 0.05 * min(size)
    assert rows.min() > size[1] * 0.8
    assert columns.max() < size[0]


def test_a_reader_reads_the_label():
    pytest.importorskip("rapidocr", reason="needs the extra ocr")
    from inkstream.engine.pictures.ocr import lines_in

    read = "".join(line.text for line in lines_in(add_label(Image.new("RGB", (640, 640), (90, 120, 90)))))
    assert read == "AI生成"


def test_a_picture_without_room_for_the_label_is_refused():
    with pytest.raises(InputError, match="16x16 has no room for the label of provenance cn"):
        encode_picture(Image.new("RGB", (16, 16)), "PNG", REQUEST, saving=Saving(provenance="cn"))


# Profiles


def test_basic_changes_no_pixel_and_is_the_default(tmp_path):
    save_picture(scene(), tmp_path / "a.png", REQUEST)
    assert verify_provenance(str(tmp_path / "a.png")) == {"digital_source_type": "trainedAlgorithmicMedia"}
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == scene().tobytes()


def test_none_leaves_no_mark_but_the_request(tmp_path, capsys):
    path = saved(tmp_path / "a.png", "none")
    assert verify_provenance(path) == {}
    assert main(["info", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["prompt"] == "a fox"


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_cn_has_label_metadata_and_mark(name, tmp_path):
    facts = verify_provenance(saved(tmp_path / name, "cn"))
    assert set(facts) == {"digital_source_type", "aigc", "invisible_mark"}
    assert facts["aigc"] == {"Label": "1", "ContentProducer": "inkstream", "ProduceID": facts["invisible_mark"]}


def test_the_aigc_property_has_the_seven_keys_of_the_standard_in_order(tmp_path):
    data = encode_picture(scene(), "PNG", REQUEST, saving=Saving(provenance="cn")).decode("latin-1")
    inside = data.partition("<TC260:AIGC>")[2].partition("</TC260:AIGC>")[0]
    assert list(json.loads(inside)) == list(AIGC)
    assert 'xmlns:TC260="http://www.tc260.org.cn/ns/AIGC/1.0/"' in data


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_eu_signs_and_a_changed_byte_shows(name, certificate, tmp_path):
    path = saved(tmp_path / name, "eu")
    facts = verify_provenance(path)
    assert set(facts) == {"digital_source_type", "invisible_mark", "c2pa"}
    assert facts["c2pa"]["state"] == "valid"
    assert facts["c2pa"]["signed_by"] == "Studio Ink"
    assert facts["c2pa"]["problems"] == "signingCredential.untrusted"
    data = bytearray((tmp_path / name).read_bytes())
    data[-30] ^= 1
    (tmp_path / name).write_bytes(data)
    kind = {"a.png": "PNG", "a.jpg": "JPEG", "a.webp": "WEBP"}[name]
    assert verify_signature(bytes(data), kind)["state"] == "invalid"


def test_info_shows_all_marks(certificate, tmp_path, capsys):
    path = saved(tmp_path / "a.png", "eu")
    assert main(["info", path]) == 0
    shown = capsys.readouterr().out
    assert "trainedAlgorithmicMedia" in shown
    assert " valid\n" in shown
    assert "invisible mark:" in shown


def test_a_picture_of_ours_in_another_format_is_not_marked_twice(tmp_path):
    path = saved(tmp_path / "a.png", "cn")
    with Image.open(path) as image:
        image.load()
    again = encode_picture(image, "WEBP", REQUEST, lossless=True, saving=Saving(provenance="cn"), marked=True)
    with Image.open(io.BytesIO(again)) as copy:
        assert copy.convert("RGB").tobytes() == image.tobytes()


def test_the_same_request_has_the_same_mark():
    assert mark_of("x") == mark_of("x") != mark_of("y")


# The command line


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--provenance", "eu"], "certificate.pem is not in its folder: make one with inkstream provenance init"),
        (["--provenance", "cn", "--metadata", "none"], "metadata none leaves out the marks of provenance cn"),
        (["--provenance", "us"], "us"),
    ],
)
def test_wrong_profiles_are_told_before_anything_is_drawn(words, line, capsys, tmp_path):
    pytest.importorskip("c2pa", reason="needs the extra provenance")
    assert main(["generate", "a star", "-o", str(tmp_path / "a.png"), *words]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_without_the_extra_signing_is_refused_and_verifying_says_so(certificate, tmp_path, monkeypatch):
    from inkstream.engine.pictures import signing

    path = saved(tmp_path / "a.png", "eu")
    monkeypatch.setattr(signing, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install 'inkstream\[provenance\]'"):
        encode_picture(scene(), "PNG", REQUEST, saving=Saving(provenance="eu"))
    assert "not verified: pip install" in verify_provenance(path)["c2pa"]["state"]


def test_a_key_is_not_overwritten_and_only_its_owner_reads_it(certificate, capsys):
    assert (certificate / "key.pem").stat().st_mode & 0o077 == 0
    assert main(["provenance", "init"]) == 2
    assert "has a key already and is not overwritten" in capsys.readouterr().err
    assert main(["provenance", "init", "--producer", "", "-o", str(certificate / "x")]) == 2
    assert "is not a name of 1 to 64" in capsys.readouterr().err
