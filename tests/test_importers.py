"""Suites of others, read from files in the formats that they are published in; and our own suites of prompts."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from inkstream.evaluate import importers
from inkstream.evaluate.importers import IMPORTERS
from inkstream.evaluate.suites import about_suite, open_suite
from inkstream.types import InputError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_geneval_is_read_with_its_tags_as_groups(tmp_path):
    row = {"tag": "two_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow and a car"}
    (case,) = open_suite(f"geneval:{write(tmp_path / 'evaluation_metadata.jsonl', lines(row))}")
    assert (case.prompt, case.group, case.text) == ("a photo of a cow and a car", "two_object", None)


def test_longtext_is_read_with_the_texts_to_write(tmp_path):
    row = {"category": "sign", "length": "short", "prompt": "一块路牌", "text": ["湖景 2公里", "慢行"], "prompt_id": 3}
    (case,) = open_suite(f"longtext:{write(tmp_path / 'text_prompts_zh.jsonl', lines(row))}")
    assert (case.prompt, case.group, case.text) == ("一块路牌", "sign", "湖景 2公里\n慢行")


def test_dpg_is_read_from_its_folder_and_from_its_table(tmp_path):
    for number, text in ((10, "ten"), (2, "two\nlines"), (0, "nought")):
        write(tmp_path / "prompts" / f"{number}.txt", text)
    assert [case.prompt for case in open_suite(f"dpg:{tmp_path / 'prompts'}")] == ["nought", "two lines", "ten"]
    table = 'item_id,text,keywords,proposition_id\na,"two, dogs",,1\na,"two, dogs",,2\nb,a cat,,1\n'
    assert [case.prompt for case in open_suite(f"dpg:{write(tmp_path / 'dpg.csv', table)}")] == ["two, dogs", "a cat"]


def test_cvtg_is_read_from_a_file_with_or_without_annotations_and_from_its_folder(tmp_path):
    fine = {"data_list": [{"index": 0, "prompt": "'A' on a sign", "carrier_list": ["sign"], "sentence_list": ["A"]}]}
    one = write(tmp_path / "CVTG" / "2.json", json.dumps(fine))
    combined = write(tmp_path / "CVTG" / "2_combined.json", json.dumps({"0": "'A' on a sign"}))
    write(tmp_path / "CVTG-Style" / "3.json", json.dumps(fine))
    assert [case.group for case in open_suite(f"cvtg:{one}")] == ["2 texts"]
    assert open_suite(f"cvtg:{combined}") == open_suite(f"cvtg:{one}")
    assert [case.group for case in open_suite(f"cvtg:{tmp_path}")] == ["CVTG 2", "CVTG-Style 3"]


def test_oneig_is_read_in_both_languages(tmp_path):
    english = 'category,id,prompt_en,type,prompt_length,class\nPortrait,000,"a man, old",NP,short,None\n'
    chinese = "category,id,prompt_cn,class\nPortrait,000,一位老人,\n"
    for text, wanted in ((english, "a man, old"), (chinese, "一位老人")):
        (case,) = open_suite(f"oneig:{write(tmp_path / 'one.csv', text)}")
        assert (case.prompt, case.group) == (wanted, "Portrait")


@pytest.mark.parametrize("kind", IMPORTERS)
def test_another_file_is_refused_in_one_line_that_says_where_the_right_one_is(kind, tmp_path):
    for text in ("", "{}", "not json", '{"a": 1}\n', "a,b\n1,2\n"):
        with pytest.raises(InputError, match=re.escape(IMPORTERS[kind].place)):
            open_suite(f"{kind}:{write(tmp_path / 'other.json', text)}")
    with pytest.raises(InputError, match="cannot be read"):
        open_suite(f"{kind}:{tmp_path / 'missing.json'}")


def test_the_licence_is_told_and_whether_the_hash_is_the_known_one(tmp_path, monkeypatch):
    path = write(tmp_path / "mine.jsonl", lines({"tag": "one", "prompt": "a cow"}))
    assert "licence MIT" in about_suite(f"geneval:{path}")
    assert "another version, or changed" in about_suite(f"geneval:{path}")
    known = {hashlib.sha256(path.read_bytes()).hexdigest(): "that commit"}
    monkeypatch.setitem(importers.IMPORTERS, "geneval", replace(IMPORTERS["geneval"], hashes=known))
    assert "is that of that commit" in about_suite(f"geneval:{path}")
    assert "not known here" in about_suite(f"dpg:{path}")
    assert "no commercial use" in about_suite(f"oneig:{path}")
    assert about_suite("pocket") == about_suite(str(path)) == ""


@pytest.mark.parametrize("name", ["posters", "products", "characters", "scenes"])
def test_our_suites_have_as_many_english_prompts_as_chinese_ones(name):
    cases = open_suite(name)
    english = [case for case in cases if case.group == "English"]
    assert len(cases) >= 40
    assert len(english) * 2 == len(cases)
    assert len({case.prompt for case in cases}) == len(cases)
    for case in cases:
        assert bool(re.search("[\u4e00-\u9fff]", re.sub('["“][^"”]*["”]', "", case.prompt))) == (
            case.group == "Chinese"
        )
        assert all(line in case.prompt for line in (case.text or "").splitlines())
    assert (name == "posters") == all(case.text for case in cases)


def test_a_text_file_has_a_prompt_a_line(tmp_path):
    path = write(tmp_path / "mine.txt", "a fox\n\n一只狐狸\n")
    assert [case.prompt for case in open_suite(str(path))] == ["a fox", "一只狐狸"]
