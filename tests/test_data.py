"""Batches are functions of their number, and what is drawn once is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inkstream.engine.machine.loader import load
from inkstream.pocket.captions import Wording
from inkstream.pocket.grammar import Grammar
from inkstream.pocket.scenes import is_held_out
from inkstream.train.data import (
    Captions,
    Data,
    Endless,
    Order,
    Preparing,
    Samples,
    crop,
    keep_captions,
    keep_latents,
    keep_pixels,
    keep_states,
    stress_of,
)
from inkstream.train.pictures import (
    HELD_OUT_FROM,
    Scenes,
    bucket_size,
    draw_all,
    nearest_size,
    open_source,
    with_trigger,
)
from inkstream.train.recipe import Data as Settings
from inkstream.types import InputError, Machine


def some_data(order: Order, counts=(50, 20), sizes=((64, 64), (96, 48)), captions_each=3) -> Data:
    """Latents whose first number is the picture's, with captions of 1 to 40 tokens."""
    rng = np.random.default_rng(0)
    samples, at = [], 0
    for count, (width, height) in zip(counts, sizes):
        indices = np.arange(at, at + count)
        images = np.zeros((count, 4, height // 8, width // 8), np.float16)
        images[:, 0, 0, 0] = indices
        samples.append(Samples((width, height), indices, images))
        at += count
    lengths = rng.integers(1, 40, at * captions_each + 1)
    ends = np.cumsum(lengths)
    firsts = np.arange(0, at * captions_each + 1, captions_each)
    return Data(samples, Captions(np.arange(ends[-1]), ends, firsts), order)


def order(**changes) -> Order:
    return Order(**{"batch": 8, "pieces": 2, "pool": 4, "seed": 7, "dropout": 0.1, **changes})


def test_a_batch_is_the_same_whatever_was_asked_before():
    one, other = some_data(order()), some_data(order())
    for number in range(30):
        one.place(number)
    for number in (29, 3, 17):
        a, b = one.place(number), other.place(number)
        assert a.samples == b.samples
        assert np.array_equal(a.rows, b.rows)
        assert np.array_equal(a.captions, b.captions)
    assert not np.array_equal(one.place(0).rows, some_data(order(seed=8)).place(0).rows)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_every_picture_comes_once_an_epoch_but_for_what_fills_the_last_batch(first, second, pieces, pool):
    data = some_data(order(pieces=pieces, pool=pool), counts=(first, second))
    seen = [set(), set()]
    total = 0
    for number in range(len(data)):
        place = data.place(number)
        assert len(place.rows) == data.batch_size(data.samples[place.samples])
        assert len(place.rows) % pieces == 0
        seen[place.samples] |= set(place.rows.tolist())
        total += len(place.rows)
    assert [len(rows) for rows in seen] == [first, second]
    assert total - first - second < sum(data.batch_size(samples) for samples in data.samples)


def test_two_epochs_differ_in_order_and_captions():
    data = some_data(order())
    first = [tuple(data.place(n).rows) for n in range(len(data))]
    second = [tuple(data.place(n + len(data)).rows) for n in range(len(data))]
    assert sorted(first) != sorted(second)


def test_the_pieces_of_a_batch_make_it_up():
    data = some_data(order())
    place = data.place(5)
    whole = data.load(place)
    parts = [data.load(place, slice(i, None, 2)) for i in range(2)]
    together = sorted(torch.cat([part.images[:, 0, 0, 0] for part in parts]).tolist())
    assert together == sorted(whole.images[:, 0, 0, 0].tolist())
    assert sorted(p for part in parts for p in part.prompts) == sorted(whole.prompts)


def test_a_caption_belongs_to_its_picture_and_the_share_dropped_is_empty():
    data = some_data(order(dropout=0.3), counts=(400, 4))
    empty = data.captions.firsts[-1]
    dropped = total = 0
    for number in range(len(data)):
        place = data.place(number)
        pictures = data.samples[place.samples].indices[place.rows]
        for picture, caption in zip(pictures, place.captions):
            assert caption == empty or caption // 3 == picture
            dropped, total = dropped + (caption == empty), total + 1
    assert dropped / total == pytest.approx(0.3, abs=0.07)


def test_samples_of_a_batch_are_of_like_length():
    def spread(pool):
        data = some_data(order(pool=pool, dropout=0.0), counts=(400, 8))
        lengths = [data.captions.lengths[data.place(n).captions] for n in range(len(data))]
        assert all((np.diff(of_batch) >= 0).all() for of_batch in lengths)
        return np.mean([of_batch.max() - of_batch.min() for of_batch in lengths])

    assert spread(16) < spread(1) / 5


def test_batches_of_larger_pictures_hold_fewer_of_them():
    data = some_data(order(batch=16, pieces=2), sizes=((64, 64), (128, 96)))
    assert [data.batch_size(samples) for samples in data.samples] == [16, 4]


@pytest.mark.parametrize(
    ("shape", "nearest"),
    [
        ((1000, 1000), (256, 256)),
        ((200, 200), (128, 128)),  # never enlarged
        ((50, 50), (128, 128)),  # unless there is nothing smaller
        ((1600, 900), (320, 192)),
        ((900, 1600), (192, 320)),
    ],
)
def test_a_picture_takes_the_size_of_its_shape_that_needs_no_enlarging(shape, nearest):
    assert nearest_size(shape, [(128, 128), (256, 256), (320, 192), (192, 320)]) == nearest


def last(making):
    told = list(making)
    return told[-1], [message for message in told if isinstance(message, Preparing)]


def test_pictures_are_drawn_once(tmp_path):
    scenes = Scenes(((32, 32), (48, 32)), Grammar(), Wording())
    _, told = last(keep_pixels(scenes, 5, tmp_path, workers=0))
    assert told[-1].done == 5
    again, told = last(keep_pixels(scenes, 5, tmp_path, workers=0))
    assert told == []
    assert [samples.images.shape for samples in again] == [(3, 32, 32, 3), (2, 32, 48, 3)]
    for samples in again:
        for index, image in zip(samples.indices, samples.images):
            assert np.array_equal(image, scenes.picture(int(index)))
    _, told = last(keep_pixels(Scenes(scenes.sizes, Grammar(text=0.0), Wording()), 5, tmp_path, workers=0))
    assert told != []


def test_drawing_that_is_cut_short_leaves_nothing_behind(tmp_path):
    scenes = Scenes(((16, 16),), Grammar(text=0.0), Wording())
    making = keep_pixels(scenes, 40, tmp_path, workers=0)
    assert next(making).done == 32
    making.close()
    assert list(tmp_path.iterdir()) == []


def test_workers_draw_the_same_pictures():
    scenes = Scenes(((16, 16),), Grammar(), Wording())
    drawn = list(draw_all(scenes, range(70), workers=2))
    assert len(drawn) == 70
    assert all(np.array_equal(drawn[i], scenes.picture(i)) for i in (0, 63, 69))


def test_latents_captions_and_states_are_those_of_the_model(tmp_path, tiny_folder):
    family = load(tiny_folder, Machine("cpu")).family
    scenes = Scenes(((32, 32),), Grammar(text=0.0), Wording())
    (samples,), _ = last(keep_latents(scenes, 3, tmp_path, 0, family, "key"))
    pixels = torch.from_numpy(scenes.picture(2)).permute(2, 0, 1)[None].float() / 255
    assert np.allclose(samples.images[2], family.encode_image(pixels)[0].numpy(), atol=0.05, rtol=0.01)
    captions, _ = last(keep_captions(scenes, 3, 2, tmp_path, family, "words"))
    assert captions[5] == family.tokens(scenes.captions(2, 2)[1])
    assert captions[6] == family.tokens("")
    states, told = last(keep_states(scenes, 3, captions, tmp_path, family, "encoder"))
    assert told != []
    alone = family.encode_tokens([captions[5]]).tokens
    kept = states[5]
    assert kept.lengths == (len(captions[5]),)
    assert torch.allclose(kept.tokens, alone, rtol=0.01, atol=0.02)
    place = Data([samples], captions, order()).place(0)
    batch = Data([samples], captions, order(batch=2, pieces=1), states).load(place)
    assert sum(batch.cond.lengths) == len(batch.cond.tokens)


def test_no_scene_that_is_trained_on_is_held_out():
    data = Settings(grammar={"text": 0.5})
    train, count = open_source(data)
    held_out, _ = open_source(data, "held_out")
    assert count == 20_000
    assert not any(is_held_out(train._scene(i)) for i in range(50))
    assert all(is_held_out(held_out._scene(i)) for i in range(50))
    assert held_out.first == HELD_OUT_FROM


def picture(path, size=(40, 40), colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_gives_pictures_with_the_captions_beside_them(tmp_path):
    picture(tmp_path / "a.png", (64, 32), "red")
    (tmp_path / "a.txt").write_text("a red one\n")
    picture(tmp_path / "deep" / "b.jpg", (32, 32), "blue")
    rows = [{"file_name": "deep/b.jpg", "text": text} for text in ("a blue one", "blue")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, count = open_source(Settings(source=str(tmp_path), sizes=((32, 32), (64, 32))))
    assert count == 2
    assert source.size(0) == (64, 32)
    assert source.captions(0, 4) == ["a red one"]
    assert source.captions(1, 4) == ["a blue one", "blue"]
    assert source.picture(0).shape == (32, 64, 3)
    assert source.picture(1).mean((0, 1)).round().tolist() == pytest.approx([0, 0, 254], abs=2)


def test_a_picture_is_cut_around_its_middle_not_squeezed(tmp_path):
    image = Image.new("RGB", (96, 32), "white")
    image.paste("black", (32, 0, 64, 32))
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("black between white")
    source, _ = open_source(Settings(source=str(tmp_path), sizes=((32, 32),)))
    assert source.picture(0).max() < 40


def test_captions_come_from_csv_files_and_the_trigger_stands_in_each(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "metadata.csv").write_text(
        'image,prompt\na.png,"a mug, red"\nb.png,[trigger] on a table\n', "utf-8-sig"
    )
    source, _ = open_source(Settings(source=str(tmp_path), sizes=((32, 32),), trigger="sks mug"))
    assert [source.captions(i, 4) for i in range(3)] == [["sks mug, a mug, red"], ["sks mug on a table"], ["sks mug"]]
    assert with_trigger("A photo of SKS mug", "sks mug") == "A photo of SKS mug"


def test_pictures_repeat_and_those_of_the_class_weigh_what_the_recipe_says(tmp_path):
    picture(tmp_path / "own" / "a.png", colour="red")
    for name in "bc":
        picture(tmp_path / "class" / f"{name}.png", colour="blue")
    (tmp_path / "class" / "c.txt").write_text("a blue mug")
    recipe = Settings(
        source=str(tmp_path / "own"), sizes=((32, 32),), trigger="sks", repeats=3,
        prior=str(tmp_path / "class"), prior_caption="a mug", prior_weight=0.5,
    )  # fmt: skip
    source, count = open_source(recipe)
    assert count == 3
    assert [source.captions(i, 1) for i in range(3)] == [["sks"], ["a mug"], ["a blue mug"]]
    stress = stress_of(source, count, None, 0.0)
    images = np.zeros((3, 4, 4, 4), np.float16)
    data = Data([Samples((32, 32), np.arange(3), images)], None, order(batch=1, pieces=1), stress=stress)
    rows = [int(row) for n in range(len(data)) for row in data.place(n).rows]
    assert sorted(rows) == [0, 0, 0, 1, 2]
    assert stress.weights.tolist() == [1.0, 0.5, 0.5]
    assert stress.prior.tolist() == [False, True, True]
    held, _ = open_source(replace(recipe, source=str(tmp_path / "class")), "held_out")
    assert set(held.repeats) == {1}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1000, 1000), (512, 512)),
        ((2000, 1000), (704, 352)),
        ((300, 200), (288, 192)),  # never larger than the picture
        ((200, 300), (192, 288)),
        ((64, 40), (64, 32)),
        ((4000, 40), (4000, 32)),
    ],
)
def test_a_bucket_is_no_larger_than_its_picture_or_the_first_size(shape, size):
    found = bucket_size(shape, (512, 512), 32)
    assert found == size
    assert found[0] <= shape[0]
    assert found[1] <= shape[1]
    assert found[0] * found[1] <= 512 * 512


def test_the_loss_counts_where_the_mask_is_white(tmp_path, tiny_folder):
    family = load(tiny_folder, Machine("cpu", "fp32")).family
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (0, 0, 16, 32))
    (tmp_path / "own").mkdir()
    image.save(tmp_path / "own" / "a.png")
    (tmp_path / "own" / "a.txt").write_text("half")
    grid = family.latent_shape(32, 32)[1:]
    source, count = open_source(Settings(source=str(tmp_path / "own"), sizes=((32, 32),), mask="alpha"))
    (alpha,) = stress_of(source, count, family, 0.25).masks
    assert np.allclose(alpha[:, : grid[1] // 2], 1)
    assert np.allclose(alpha[:, grid[1] // 2 :], 0.25)
    (tmp_path / "masks").mkdir()
    with pytest.raises(InputError, match=r"holds no a.png: add it, white where it counts"):
        open_source(Settings(source=str(tmp_path / "own"), sizes=((32, 32),), mask=str(tmp_path / "masks")))
    image.getchannel("A").save(tmp_path / "masks" / "a.jpg")
    drawn, _ = open_source(Settings(source=str(tmp_path / "own"), sizes=((32, 32),), mask=str(tmp_path / "masks")))
    (mask,) = stress_of(drawn, 1, family, 0.25).masks
    assert np.allclose(mask, alpha, atol=0.05)
    Image.new("L", (32, 32)).save(tmp_path / "masks" / "a.jpg")
    with pytest.raises(InputError, match=r"the mask of .*a.png is black everywhere"):
        stress_of(drawn, 1, family, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "holds no picture"),
        (lambda root: (root / "c.csv").write_text("file_name,text\na.png\n"), "c.csv line 2 has no file_name and text"),
        (lambda root: (root / "c.jsonl").write_text("{"), "c.jsonl line 1 is not JSON"),
        (lambda root: picture(root / "a.png"), "a.png has no caption: write it into a.txt"),
        (lambda root: ((root / "a.png").write_bytes(b"no"), (root / "a.txt").write_text("x")), "cannot be read"),
        (lambda root: (root / "c.jsonl").write_text('{"file": 1}'), "c.jsonl line 1 has no file_name and text"),
    ],
)
def test_a_folder_that_cannot_be_learnt_from_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        open_source(Settings(source=str(tmp_path)))


def test_a_key_of_the_grammar_or_the_wording_that_is_not_there_is_named():
    with pytest.raises(InputError, match="shape"):
        open_source(Settings(grammar={"shape": 3}))
    with pytest.raises(InputError, match=r"\[data.wording\] has no key dence"):
        open_source(Settings(wording={"dence": 1.0}))
    with pytest.raises(InputError, match=r"\[data.wording\] dense = 7: give a share"):
        open_source(Settings(wording={"dense": 7}))


def test_crops_are_those_of_their_seeds_and_prefer_what_shows_something():
    pixels = torch.zeros(4, 3, 64, 64)
    pixels[:, :, :32, :32] = torch.rand(4, 3, 32, 32)
    cut = crop(pixels, 32, [1, 2, 3, 4])
    assert cut.shape == (4, 3, 32, 32)
    assert torch.equal(cut[2], crop(pixels[2:3], 32, [3])[0])
    busy = sum(piece.std() > 0.06 for piece in crop(pixels[:1].expand(200, -1, -1, -1), 32, range(200)))
    once = sum(piece.std() > 0.06 for piece in crop(pixels[:1].expand(200, -1, -1, -1), 32, range(200), tries=1))
    assert once < busy


def test_scenes_without_end_never_come_twice():
    scenes = Scenes(((16, 16),), Grammar(text=0.0), Wording())
    data = Endless(scenes, order(batch=4))
    rows = [data.place(n).rows.tolist() for n in range(3)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    batch = data.load(data.place(1), slice(1, None, 2)).images
    assert torch.equal(batch[1], torch.from_numpy(scenes.picture(7).copy()).permute(2, 0, 1).float() / 127.5 - 1)
