"""The evaluation harness: suites, drawing in batches, measures with known answers, reports, the command."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

import inkstream
from inkstream.cli import main
from inkstream.cli.terminal import Terminal
from inkstream.engine.pictures.inputs import to_pixels
from inkstream.engine.pictures.ocr import open_reader
from inkstream.engine.pictures.sheet import GRAY, GREEN, RED, TILE, edge_of
from inkstream.evaluate import judge, measures, ocr, report, run
from inkstream.evaluate.grades import Marks, grade
from inkstream.evaluate.report import Judged, Row
from inkstream.evaluate.run import Job, Settings
from inkstream.evaluate.suites import FACTS, SUITES, Case, digest, open_suite, read_suite, thin
from inkstream.evaluate.variety import PROPERTIES, open_things, spread, variety
from inkstream.families.zimage.specs import BASE
from inkstream.pocket.captions import STATES
from inkstream.pocket.draw import render
from inkstream.pocket.edits import EDIT_KINDS
from inkstream.pocket.scenes import Background, Scene, Thing, is_held_out
from inkstream.pocket.wishes import read_wish
from inkstream.pocket.writer import write
from inkstream.types import InputError, Request, Step

EDGE, ACROSS = edge_of(TILE), TILE + 2 * edge_of(TILE)  # of a tile in the contact sheet
FIRST_FILTER = -0.0209336  # a weight of the fixed random network: distances of old records hold while it does
SMALL = Settings(seeds=2, steps=2, guidance=2.0, width=32, height=32)


@pytest.fixture(scope="module")
def model(tiny_base_folder):
    return inkstream.load(tiny_base_folder, inkstream.Machine("cpu"))


@pytest.fixture(scope="module")
def pocket() -> list[Case]:
    return open_suite("pocket")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(run.open_picture(path)).astype(int)


# Suites


def test_suite_pocket_is_two_hundred_held_out_prompts_of_every_kind(pocket):
    assert len(pocket) == len(set(pocket)) == 200
    assert all(case.scene is not None and is_held_out(case.scene) for case in pocket)
    groups = Counter(case.group for case in pocket)
    assert groups == {stratum.group: stratum.count for stratum in SUITES["pocket"]}
    for case in pocket:
        length = len(case.text or "")
        if case.group.startswith("English"):
            assert case.group == f"English {'1-3' if length < 4 else '4-6' if length < 7 else '7+'}"
            assert any(case.text in quoted for quoted in case.prompt.replace("“", '"').replace("”", '"').split('"'))
    assert 0.2 < np.mean([not case.prompt.isascii() for case in pocket if case.group != "Chinese"]) < 0.45


def test_a_suite_is_the_same_in_every_run(pocket):
    assert digest(open_suite("pocket")) == digest(pocket)
    assert digest(pocket[1:]) != digest(pocket)


def test_strings_of_a_suite_hardly_come_twice(pocket):
    texts = Counter(case.text.casefold() for case in pocket if case.text and len(case.text) > 1)
    assert max(texts.values()) <= 4
    assert len(texts) > 50


def test_suites_of_typed_prompts_have_the_same_groups_and_no_prompt_in_common():
    people, people2 = open_suite("people"), open_suite("people2")
    assert (len(people), len(people2)) == (300, 160)
    assert {case.group for case in people} == {case.group for case in people2}
    prompts = [case.prompt.casefold() for case in (*people, *people2)]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.slow
def test_every_scene_of_suite_people_passes_the_graders():
    for number, case in enumerate(open_suite("people")):
        marks = grade(render(case.scene, 128), case.scene, case.stated, case.open_colour)
        assert Judged(Path(), number, 0, case.group, marks).right, case.prompt


def test_scenes_of_suite_people2_pass_the_graders():
    for number, case in enumerate(open_suite("people2")[::4]):
        marks = grade(render(case.scene, 256), case.scene, case.stated, case.open_colour)
        assert Judged(Path(), number, 0, case.group, marks).right, case.prompt


def test_a_file_is_read_a_case_a_line(tmp_path, pocket):
    path = tmp_path / "mine.jsonl"
    scene = next(case.scene for case in pocket if case.text)
    lines = [
        {"prompt": "a lighthouse in fog"},
        {"prompt": "写着“春”", "text": "春", "group": "hanzi", "width": 64, "height": 32},
        {"prompt": "a scene", "scene": scene.to_json(), "stated": ["place"]},
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), "utf-8")
    first, second, third = open_suite(str(path))
    assert first == Case("a lighthouse in fog")
    assert second == Case("写着“春”", "hanzi", text="春", width=64, height=32)
    assert third.scene == scene
    assert third.text == scene.writings[0].text
    assert third.stated == {"place"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("not json", "line 2: "),
        ("[1]", "not a JSON object"),
        ("{}", "prompt is missing"),
        ('{"prompt": " "}', "prompt ' '"),
        ('{"prompt": 3}', "prompt 3"),
        ('{"prompt": "a", "txt": "b"}', "'txt' is not known"),
        ('{"prompt": "a", "text": 3}', "text 3"),
        ('{"prompt": "a", "width": 7}', "width 7"),
        ('{"prompt": "a", "height": "tall"}', "height 'tall'"),
        ('{"prompt": "a", "stated": ["mood"]}', "mood"),
        ('{"prompt": "a", "scene": {"kind": "things"}}', "background"),
        (
            '{"prompt": "a", "scene": {"kind": "things", "background": {"kind": "flat", "colours": ["mauve"], '
            '"across": false}, "things": [], "writings": [], "relation": null}}',
            "mauve",
        ),
    ],
)
def test_a_line_that_is_no_case_is_named(tmp_path, line, said):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(InputError, match="line 2") as caught:
        read_suite(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_suite_edits_judges_the_asked_change_and_all_that_stays(model, tmp_path):
    cases = open_suite("edits")
    assert Counter(case.group for case in cases) == dict.fromkeys(EDIT_KINDS, 20)
    for number in range(3, 120, 17):
        case = cases[number]
        for name, scene in (("after", case.edit.after), ("before", case.edit.before)):
            render(scene, 128).save(tmp_path / f"{name}.png")
        after, before = (judge.judge(tmp_path / f"{name}.png", number, 0, case) for name in ("after", "before"))
        assert (after.right, after.marks.asked, after.marks.kept) == (True, True, True)
        assert (before.right, before.marks.asked) == (False, False)
    with pytest.raises(InputError, match="takes no references: leave them out, or take a model that does"):
        run.plan(model, {0: cases[0]}, SMALL)
    assert digest([replace(cases[0], edit=None)]) != digest(cases[:1])


def test_unknown_suites_missing_files_and_empty_ones_are_refused(tmp_path):
    with pytest.raises(InputError, match="no suite fox: take pocket, text, edits, people, people2, posters,"):
        open_suite("fox")
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read"):
        open_suite(str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match="holds no prompt"):
        open_suite(str(tmp_path / "empty.jsonl"))


def test_a_limit_takes_prompts_from_everywhere_under_their_own_numbers(pocket):
    few = thin(pocket, 20)
    assert len(few) == 20
    assert all(pocket[number] is case for number, case in few.items())
    assert len({case.group for case in few.values()}) == len(SUITES["pocket"])
    assert list(thin(pocket, None)) == list(thin(pocket, 999)) == list(range(200))


def test_facts_are_those_that_captions_state():
    assert set(FACTS) == set().union(*STATES.values())


# Drawing


def test_pictures_of_a_batch_are_those_drawn_alone(model, tmp_path):
    cases = dict(enumerate([Case("a red circle"), Case("a blue square", width=48)]))
    jobs = run.plan(model, cases, SMALL)
    assert [(job.case, job.seed) for job in jobs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [job.request.seed for job in jobs] == [0, 1, 1000, 1001]
    steps = list(run.draw(model, jobs, tmp_path))
    assert [(s.step, s.steps, s.index, s.count) for s in steps] == [(1, 2, 3, 4), (2, 2, 3, 4)]
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    engine._model, engine._name = model, "tiny"
    for job in jobs:
        alone = engine.generate(job.request.model_copy(update={"model": "tiny"})).images[0]
        assert alone.size == (job.request.width, 32)
        assert np.abs(np.asarray(alone).astype(int) - pixels(job.path(tmp_path))).max() <= 1
    assert np.abs(pixels(jobs[0].path(tmp_path)) - pixels(jobs[1].path(tmp_path))).max() > 5


def test_what_is_drawn_is_not_drawn_again(model, tmp_path):
    jobs = run.plan(model, {7: Case("a red circle"), 9: Case("a blue square")}, SMALL)
    list(run.draw(model, jobs, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    assert len(before) == 4
    assert list(run.draw(model, jobs, tmp_path)) == []
    lost = jobs[2].path(tmp_path)
    first = pixels(lost)
    lost.unlink()
    steps = list(run.draw(model, jobs, tmp_path))
    assert [(s.index, s.count) for s in steps] == [(3, 4), (3, 4)]
    assert np.abs(pixels(lost) - first).max() <= 1
    kept = {path: path.stat().st_mtime_ns for path in before if path != lost}
    assert kept.items() <= before.items()


def test_closing_keeps_the_batches_that_are_done(model, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "MOST", 2)
    jobs = run.plan(model, dict(enumerate([Case("one"), Case("two"), Case("three")])), SMALL)
    drawing = run.draw(model, jobs, tmp_path)
    for step in drawing:
        if step.index == 3:  # the second batch has begun
            break
    drawing.close()
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["0000-0.png", "0000-1.png"]


def test_a_batch_holds_as_much_as_there_is_room_for(monkeypatch):
    monkeypatch.setattr(run, "ROOM", 10)
    monkeypatch.setattr(run, "MOST", 3)
    assert list(run.pack([4, 4, 4, 20, 1, 1, 1, 1], lambda n: n)) == [[4, 4], [4], [20], [1, 1, 1], [1]]
    assert list(run.pack([], lambda n: 1)) == []
    assert run.tokens(Request(width=64, height=32, guidance=1.0), BASE) == 8
    assert run.tokens(Request(width=64, height=32, guidance=3.0), BASE) == 16


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"settings": Settings(steps=4)}, "steps 8, not 4"),
        ({"model": "another"}, "model tiny, not another"),
        ({"name": "text"}, "suite pocket, not text"),
        ({"cases": [Case("b")]}, "cases"),
    ],
)
def test_a_folder_holds_one_evaluation_only(tmp_path, other, said):
    ours = {"name": "pocket", "model": "tiny", "cases": [Case("a")], "settings": Settings(steps=8)}
    run.claim(tmp_path / "new", **ours)
    run.claim(tmp_path / "new", **ours)
    run.claim(tmp_path / "new", **{**ours, "settings": Settings(seeds=9, steps=8)})  # more pictures of the same
    with pytest.raises(InputError, match=said):
        run.claim(tmp_path / "new", **{**ours, **other})


def test_pictures_of_other_weights_under_the_same_name_are_not_taken_over(tmp_path):
    weights = tmp_path / "model" / "transformer" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"one")
    ours = {"name": "pocket", "model": str(tmp_path / "model"), "cases": [Case("a")], "settings": Settings()}
    run.claim(tmp_path / "out", **ours)
    run.claim(tmp_path / "out", **ours)
    weights.write_bytes(b"other")
    with pytest.raises(InputError, match="weights"):
        run.claim(tmp_path / "out", **ours)


# Measures


def test_the_frechet_distance_of_a_set_to_itself_is_nothing():
    vectors = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert measures.frechet_distance(vectors, vectors) == pytest.approx(0, abs=1e-9)
    assert measures.frechet_distance(vectors, vectors.flip(0)) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_two_gaussians_is_that_of_the_formula():
    m, n = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, -2.0])
    a, b = torch.diag(torch.tensor([1.0, 4.0, 9.0])), torch.diag(torch.tensor([4.0, 4.0, 1.0]))
    assert measures.frechet_of_gaussians((m, a), (n, b)) == pytest.approx(9 + 16 + (1 - 2) ** 2 + (3 - 1) ** 2)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    turned = [(turn @ mean, turn @ cov @ turn.T) for mean, cov in ((m, a), (n, b))]
    assert measures.frechet_of_gaussians(*turned) == pytest.approx(30, abs=1e-4)


def test_the_frechet_distance_of_samples_nears_that_of_their_gaussians():
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(20_000, 4, generator=generator) for _ in range(2))
    assert measures.frechet_distance(a, 2 * b + 1) == pytest.approx(4 * 1 + 4 * 1, rel=0.05)


def test_features_are_fixed_and_tell_pictures_apart():
    picture = render(open_suite("pocket")[0].scene, 64)
    seen = measures.features([picture, picture.filter(ImageFilter.GaussianBlur(3)), picture])
    assert seen.shape == (3, 16, 64)
    assert torch.equal(seen[0], seen[2])
    assert (seen[0] - seen[1]).abs().max() > 0.1
    assert torch.equal(measures.features([picture.resize((256, 256), Image.Resampling.NEAREST)])[0], seen[0])
    measures._filters.cache_clear()
    assert torch.equal(measures.features([picture])[0], seen[0])
    assert float(measures._filters()[0][0, 0, 0, 0]) == pytest.approx(FIRST_FILTER, abs=1e-6)
    assert measures.features([]).shape == (0, 16, 64)


def test_worse_pictures_are_further_from_the_true_ones(pocket):
    truths = [render(case.scene, 64) for case in pocket[:80]]
    true = measures.features(truths).flatten(0, 1)
    apart = []
    for radius in (1, 3, 8):
        blurred = [picture.filter(ImageFilter.GaussianBlur(radius)) for picture in truths]
        apart.append(measures.frechet_distance(measures.features(blurred).flatten(0, 1), true))
    assert 0 < apart[0] < apart[1] < apart[2]


def test_diversity_is_nothing_for_a_model_that_ignores_its_seed_and_one_for_one_that_ignores_its_prompt():
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randn(20, 1, 4, 8, generator=generator)
    same = prompts.expand(20, 3, 4, 8).flatten(0, 1)
    groups = [i for i in range(20) for _ in range(3)]
    assert measures.diversity(same, groups) == pytest.approx(0, abs=1e-6)
    assert measures.diversity(torch.randn(60, 4, 8, generator=generator), groups) == pytest.approx(1, abs=0.05)
    assert measures.diversity(same[::3], groups[::3]) is None
    assert measures.diversity(same[:3], groups[:3]) is None


OPEN = ("a star", "two red circles", "a cat", "a blue heart on a white background", "一个圆")


def by_the_renderer(prompt: str, seed: int) -> Image.Image:
    scene = write(prompt, seed).scene
    assert scene is not None
    return render(scene, 128)


@pytest.mark.slow
def test_diversity_against_the_renderer_is_one_for_its_own_pictures():
    found = variety([(prompt, seed, by_the_renderer(prompt, seed)) for prompt in OPEN for seed in range(4)])
    assert {name: own.ratio for name, own in found.items()} == dict.fromkeys([*PROPERTIES, "all"], 1.0)
    assert {name: own.prompts for name, own in found.items()} == {
        "place": 4, "size": 5, "colour": 2, "background": 4, "all": 15,
    }  # fmt: skip
    assert all(own.pictures == 4 * own.prompts for own in found.values())


@pytest.mark.slow
def test_diversity_against_the_renderer_is_near_one_for_its_pictures_of_other_seeds():
    asked = [(prompt, seed) for prompt in OPEN for seed in range(12)]
    assert 0.85 < variety([(p, seed, by_the_renderer(p, seed + 1000)) for p, seed in asked])["all"].ratio < 1.15


def test_diversity_against_the_renderer_is_nothing_if_all_seeds_give_one_picture():
    found = variety([(prompt, seed, by_the_renderer(prompt, 1)) for prompt in OPEN for seed in range(4)])
    assert {own.ratio for own in found.values()} == {0.0}
    assert set(found) == {*PROPERTIES, "all"}


def test_diversity_against_the_renderer_tells_which_property_the_seeds_change():
    def moved(seed: int) -> Image.Image:
        thing = Thing("star", "red", "medium", (0.2, 0.5, 0.8)[seed % 3], 0.5, 0.25)
        return render(Scene("things", Background("flat", ("white",)), (thing,)), 128)

    found = variety([("a star", seed, moved(seed)) for seed in range(6)])
    theirs = [write("a star", seed).scene for seed in range(6)]
    places = [scene.things[0].place for scene in theirs if scene]
    assert found["place"].ratio == pytest.approx(12 / 15 / spread(places))  # 3 of 15 pairs have one place
    assert (found["size"].ratio, found["colour"].ratio, found["background"].ratio) == (0, 0, 0)


def test_wrong_pictures_texts_and_single_pictures_add_no_diversity():
    wrong = [("a star", seed, by_the_renderer("a circle", seed)) for seed in range(4)]
    texts = [('a sign "OPEN"', seed, by_the_renderer('a sign "OPEN"', seed)) for seed in range(4)]
    assert variety([*wrong, *texts, ("a star", 9, by_the_renderer("a star", 9))]) == {}


def test_what_a_prompt_states_is_not_open():
    assert open_things(read_wish("a large red star on the left, on a white background")) == {}
    assert open_things(read_wish("a red star left of a circle")) == {
        "size": {"star", "circle"}, "colour": {"circle"}, "background": set(),
    }  # fmt: skip
    assert "place" not in open_things(read_wish("three cats"))
    assert open_things(read_wish("a small cat and a dog at the top"))["place"] == {"cat"}


def test_a_spread_is_the_share_of_pairs_that_differ():
    assert (spread("aaaa"), spread("aabb"), spread("abcd")) == (0, 4 / 6, 1)


def test_the_held_out_loss_of_a_model_that_answers_nothing_is_the_velocitys_own_square(tiny_base_folder, pocket):
    silent = inkstream.load(tiny_base_folder, inkstream.Machine("cpu"))
    for name, weight in silent.family.transformer.named_parameters():
        if "final_layer.linear" in name:
            weight.zero_()
    pictures = [render(case.scene, 32) for case in pocket[:3]]
    found = measures.held_out_loss(silent, pictures, [case.prompt for case in pocket[:3]], seed=5)
    wanted = []
    for i, picture in enumerate(pictures):
        image = silent.family.encode_image(to_pixels(picture, 32, 32)[None])[0]
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(5 + i))
        wanted.append(float((noise - image).square().mean()))
    assert list(found) == list(measures.SIGMAS)
    for loss in found.values():
        assert loss == pytest.approx(np.mean(wanted), rel=1e-5)


def test_the_held_out_loss_is_the_same_in_any_batching(model, pocket, monkeypatch):
    pictures = [render(case.scene, 32 + 16 * (i % 2), 32) for i, case in enumerate(pocket[:3])]
    prompts = [case.prompt for case in pocket[:3]]
    together = measures.held_out_loss(model, pictures, prompts)
    monkeypatch.setattr(run, "MOST", 1)
    assert measures.held_out_loss(model, pictures, prompts) == pytest.approx(together, rel=1e-4)
    assert measures.held_out_loss(model, [], []) == {}


def test_psnr_of_one_level_in_255():
    a, b = (Image.new("RGB", (8, 8), (v, v, v)) for v in (100, 101))
    assert measures.psnr(a, b) == pytest.approx(20 * math.log10(255))
    assert measures.psnr(a, a) == math.inf


# Reports


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (95, 100, 0.8882, 0.9785), (0, 0, 0, 1)],
)
def test_wilsons_interval_is_that_of_the_tables(right, count, low, high):
    assert report.wilson(right / max(count, 1), count) == pytest.approx((low, high), abs=1e-4)


def marks(**given) -> Marks:
    names = [*report.QUESTIONS, "characters", "ned", "script", "length"]
    return Marks(**{**dict.fromkeys(names), **given})


def judged(case: int, group: str, found: Marks | None, reading=None) -> Judged:
    return Judged(Path(f"{case}.png"), case, 0, group, found, reading)


def test_shares_count_only_what_was_asked():
    all_judged = [
        judged(0, "things", marks(objects=True, colours=False)),
        judged(1, "things", marks(objects=True, colours=True)),
        judged(2, "words", marks(text_exact=True, characters=1.0, ned=1.0, script="latin", length=2)),
        judged(3, "words", marks(text_exact=False, characters=0.5, ned=0.4, script="latin", length=6)),
        judged(4, "words", marks(text_exact=False, characters=0.0, ned=0.0, script="hanzi", length=3)),
    ]
    rows = {(row.measure, row.group): row for row in report.shares(all_judged)}
    found = {key: (round(row.value, 4), row.pictures) for key, row in rows.items()}
    assert found["objects", "all"] == (1.0, 2)
    assert found["colours", "all"] == (0.5, 2)
    assert found["all right", "all"] == (0.4, 5)
    assert found["all right", "things"] == (0.5, 2)
    assert found["text exact", "all"] == (0.3333, 3)
    assert found["text exact", "English 1-3"] == (1.0, 1)
    assert found["text exact", "English 1-6"] == (0.5, 2)
    assert found["characters right", "English 1-6"] == (0.625, 2)  # 2 and 3 of 8 letters
    assert found["text exact", "Chinese"] == (0.0, 1)
    assert ("relation", "all") not in rows
    assert ("text exact", "English 7+") not in rows
    assert (rows["colours", "all"].low, rows["colours", "all"].high) == report.wilson(0.5, 2)


def test_a_picture_that_nothing_can_judge_is_neither_right_nor_wrong():
    assert judged(0, "a", None).right is None
    assert report.shares([judged(0, "a", None)]) == []
    assert judged(0, "a", None, ocr.Reading(("A",), True, 1.0)).right is True
    assert judged(0, "a", marks(objects=False), ocr.Reading(("A",), True, 1.0)).right is False


def test_the_table_shows_every_number_with_its_interval():
    rows = [
        Row("drawn", "count", "all", 0.5, 0.2366, 0.7634, 10),
        Row("drawn", "text exact", "Chinese", 1.0, 0.7225, 1.0, 10),
        Row("drawn", "Frechet distance", "all", 12.3456, pictures=20),
        Row("truth", "count", "all", 1.0, 0.7225, 1.0, 10),
    ]
    lines = report.table(rows)
    assert [line.split() for line in lines] == [
        ["drawn", "95%", "interval", "pictures"],
        ["count", "50.0%", "23.7%", "-", "76.3%", "10"],
        ["text", "exact,", "Chinese", "100.0%", "72.2%", "-", "100.0%", "10"],
        ["Frechet", "distance", "12.35", "20"],
        [],
        ["truth", "95%", "interval", "pictures"],
        ["count", "100.0%", "72.2%", "-", "100.0%", "10"],
    ]
    assert len({len(line) for line in lines if line}) == 1


def test_a_sweep_is_a_line_for_each_setting():
    rows = [
        Row("2 steps", "count", "all", 0.5, 0.2, 0.8, 10),
        Row("2 steps", "Frechet distance", "all", 3.21, pictures=10),
        Row("4 steps", "count", "all", 0.9, 0.6, 1.0, 10),
        Row("4 steps", "count", "Chinese", 0.1, 0.0, 0.5, 10),
    ]
    assert [line.split() for line in report.matrix(rows, ["count", "relation", "Frechet distance"])] == [
        ["sweep", "count", "Frechet", "distance"], ["2", "steps", "50.0%", "3.21"], ["4", "steps", "90.0%"],
    ]  # fmt: skip


def test_the_sheet_of_a_report_frames_right_pictures_green_and_wrong_ones_red(tmp_path):
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "blue.png")
    marks = [Marks(), Marks(count=0.0), Marks(count=1.0)]
    judged = [Judged(tmp_path / "blue.png", 0, seed, "plain", mark) for seed, mark in enumerate(marks)]
    report.write_sheet([*judged, Judged(tmp_path / "blue.png", 0, 3, "plain")], {0: "blue"}, tmp_path / "sheet.png")
    sheet = pixels(tmp_path / "sheet.png")
    frames = [tuple(sheet[EDGE - 2, i * ACROSS + ACROSS // 2]) for i in range(4)]
    assert frames == [GREEN, RED, GREEN, GRAY]


# The second reader


def test_distances_of_words_are_those_of_levenshtein():
    pairs = [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("春节", "春天", 1), ("a", "a", 0)]
    for a, b, apart in pairs:
        assert ocr.distance(a, b) == ocr.distance(b, a) == apart


@pytest.mark.parametrize(
    ("lines", "wanted", "exact", "ned"),
    [
        (["HELLO"], ["HELLO"], True, 1.0),
        (["he ll0"], ["HELLO"], True, 1.0),
        (["1I1"], ["lil"], True, 1.0),
        (["HELP"], ["HELLO"], False, 0.6),
        ([], ["HELLO"], False, 0.0),
        (["NEW", "YEAR"], ["NEW YEAR"], True, 1.0),
        (["noise", "OK"], ["OK"], True, 1.0),
        (["OK"], ["OK", "ABCD"], False, 2 / 6),
        (["新年快东"], ["新年快乐"], False, 0.75),
    ],
)
def test_a_reading_is_compared_up_to_case_spaces_and_look_alikes(lines, wanted, exact, ned):
    found = ocr.compare(lines, wanted)
    assert found.exact == exact
    assert found.ned == pytest.approx(ned)


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    open_reader.cache_clear()
    with pytest.raises(InputError, match=r"pip install 'inkstream\[ocr\]'"):
        ocr.read(Image.new("RGB", (8, 8)), "A")


@pytest.mark.filterwarnings("ignore")
def test_the_second_reader_reads_true_pictures(pocket):
    open_reader.cache_clear()
    case = next(case for case in pocket if case.group == "English 4-6")
    assert ocr.read(render(case.scene, 128), case.text).exact


# Judging


def test_true_pictures_are_judged_right(pocket, tmp_path):
    for number, case in thin(pocket, 10).items():
        path = tmp_path / f"{number}.png"
        render(case.scene, 128).save(path)
        assert judge.judge(path, number, 0, case).right is True, case.prompt
        Image.new("RGB", (128, 128), "white").save(path)
        assert judge.judge(path, number, 0, case).right is False


def test_a_sweep_is_drawn_at_each_of_its_settings(model, pocket, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "STEPS", (1, 2))
    monkeypatch.setattr(judge, "GUIDANCE", (1.0, 2.5))
    rows = judge.judge_sweep(model, thin(pocket, 2), SMALL, tmp_path, lambda event: None)
    assert list(dict.fromkeys(row.of for row in rows)) == ["1 steps", "2 steps", "guidance 1", "guidance 2.5"]
    for name in ("1-steps", "2-steps", "guidance-1", "guidance-2.5"):
        assert len(list((tmp_path / "sweep" / name / "pictures").iterdir())) == 2


# The command


@pytest.fixture(scope="module")
def scenes(pocket, tmp_path_factory) -> str:
    """A suite of our own: four scenes, that of a text among them."""
    path = tmp_path_factory.mktemp("suite") / "scenes.jsonl"
    lines = [{"prompt": case.prompt, "scene": case.scene.to_json()} for case in (*pocket[:3], pocket[150])]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.fixture
def words(tiny_base_folder, scenes, tmp_path):
    return [
        "eval", str(tiny_base_folder), "--suite", scenes, "--steps", "2", "--guidance", "2", "-W", "32", "-H", "32",
        "--device", "cpu", "-o", str(tmp_path / "out"),
    ]  # fmt: skip


def without(words: list[str], *options: str) -> list[str]:
    """A command without these options and their values."""
    dropped = {i for option in options for i in (words.index(option), words.index(option) + 1)}
    return [word for i, word in enumerate(words) if i not in dropped]


def test_the_command_prints_a_table_and_writes_a_record_a_sheet_and_pictures(words, tmp_path, capsys):
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("drawn")
    for measure in ("all right", "object and colour", "diversity over seeds", "Frechet distance", "held-out loss"):
        assert measure in shown.out
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["pictures", "report.json", "report.png", "run.json"]
    assert len(list((out / "pictures").iterdir())) == 8
    record = json.loads((out / "report.json").read_text())
    first, *rows = record["rows"]
    assert (first["prompts"], first["seeds"]) == (4, 2)
    assert (first["steps"], first["guidance"], first["width"]) == (2, 2.0, 32)
    assert record["command"].startswith("inkstream eval ")
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows if "low" in row)
    with Image.open(out / "report.png") as sheet:
        assert sheet.width == 8 * ACROSS


def test_the_same_command_again_draws_nothing_and_finds_the_same(words, tmp_path, capsys, monkeypatch):
    assert main([*words, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    shown = []
    monkeypatch.setattr(Terminal, "show", lambda self, event: shown.append(event))
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert not any(isinstance(event, Step) for event in shown)


def test_no_upsample_draws_prompts_as_they_are_and_stands_in_the_command(words, tmp_path, capsys):
    assert main([*without(words, "-o"), "-o", str(tmp_path / "out"), "--no-upsample", "--limit", "1"]) == 0
    record = json.loads((tmp_path / "out" / "report.json").read_text())
    assert record["rows"][0]["upsample"] is False
    assert record["command"].endswith("--no-upsample --limit 1")
    jobs = [run.plan(inkstream.load("pocket", inkstream.Machine("cpu")), {0: Case("a star")}, Settings(upsample=up))
            for up in (None, False)]  # fmt: skip
    assert [job.request.upsample for (job, _) in jobs] == [True, False]


def test_pictures_of_another_adapter_are_not_taken_for_those_of_this_one(tmp_path):
    one, cases = tmp_path / "one.safetensors", [Case("a star")]
    one.write_bytes(b"1")
    run.claim(tmp_path, "people", "pocket", cases, Settings(loras=(str(one),)))
    run.claim(tmp_path, "people", "pocket", cases, Settings(seeds=3, loras=(str(one),)))
    one.write_bytes(b"22")
    with pytest.raises(InputError, match="holds an evaluation with loras"):
        run.claim(tmp_path, "people", "pocket", cases, Settings(loras=(str(one),)))


def test_interrupted_it_says_what_is_there_and_goes_on_from_it(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "MOST", 2)

    def interrupt(self, event):
        if isinstance(event, Step) and event.index == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Terminal, "show", interrupt)
        assert main(words) == 130
    assert "stopped; 4 of 8 pictures are in" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 4
    assert main(words) == 0
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 8


def test_the_ceiling_judges_true_pictures_and_reconstructions_and_draws_nothing(words, tmp_path, capsys):
    assert main([*without(words, "-W", "-H"), "-W", "128", "-H", "128", "--ceiling", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {(row["of"], row["measure"]): row for row in document["rows"] if row["group"] == "all"}
    assert rows["truth", "all right"]["value"] == 1.0
    assert rows["reconstruction", "all right"]["value"] < 1.0  # its autoencoder is random
    assert rows["reconstruction", "PSNR in dB"]["value"] < 15
    folders = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert folders == ["ceiling.json", "ceiling.png", "reconstruction", "truth"]


def test_prompts_of_ones_own_are_drawn_even_where_nothing_can_judge_them(words, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a lighthouse"}\n{"prompt": "a fox", "width": 48}\n')
    words = [*without(words, "--suite"), "--suite", str(path)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "diversity over seeds" in shown.out
    assert "nothing was graded" in shown.err
    assert main([*words, "--ceiling"]) == 2
    assert "no prompt of this suite has a scene" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seeds", "0"], "--seeds 0"),
        (["--limit", "0"], "--limit 0"),
        (["--suite", "fox"], "no suite fox"),
        (["--steps", "0"], "--steps 0 is too small"),
        (["-H", "40"], "height 40 is not a multiple of 16"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(words, more, said, capsys):
    assert main([*without(words, *(option for option in more[::2] if option in words)), *more]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_jobs_keep_their_seed_whatever_the_limit(model, pocket):
    few, all_ = (run.plan(model, thin(pocket, limit), SMALL) for limit in (5, None))
    wanted: dict[tuple[int, int], Job] = {(job.case, job.seed): job for job in all_}
    assert all(wanted[job.case, job.seed] == job for job in few)
    assert len({job.request.seed for job in all_}) == len(all_)
