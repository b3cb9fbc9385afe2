"""The engine on a real model at tiny size: requests, seeds, pictures in, cancelling, the guard against overflow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import inkstream
from inkstream.engine.drawing.complete import complete
from inkstream.families.zimage.specs import TURBO
from inkstream.types import Done, Failed, InputError, Loading, Queued, Request, Step

SIZE = {"width": 64, "height": 48, "steps": 2}


@pytest.fixture(scope="module")
def engine(tiny_folder):
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    list(engine.load(str(tiny_folder)))
    return engine


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    across, down = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 48))
    Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8)).save(path)
    return path


def wish(folder, **fields) -> Request:
    return Request(**{"prompt": "a red circle", "model": str(folder), "seed": 7, **SIZE, **fields})


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_the_events_of_a_request_come_in_order(engine, tiny_folder):
    events = list(engine.submit(wish(tiny_folder, count=2)))
    kinds = [type(e) for e in events]
    assert kinds == [Queued, Loading, Step, Step, Done, Step, Step, Done]
    steps = [e for e in events if isinstance(e, Step)]
    assert [(s.index, s.step, s.steps) for s in steps] == [(0, 1, 2), (0, 2, 2), (1, 1, 2), (1, 2, 2)]
    assert [s.t for s in steps[:2]] == [1.0, 0.75]


def test_a_start_picture_is_decoded_once_for_all_pictures_of_a_request(engine, tiny_folder, photo, monkeypatch):
    opened, open_file = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **kinds: opened.append(1) or open_file(*args, **kinds))
    request = Request(prompt="x", model=str(tiny_folder), image=photo, steps=1, count=2)
    assert [(r.width, r.height) for r in engine.generate(request).requests] == [(64, 48)] * 2
    assert len(opened) == 1


def test_each_picture_of_a_count_equals_its_own_single_run(engine, tiny_folder):
    together = engine.generate(wish(tiny_folder, count=3))
    assert [r.seed for r in together.requests] == [7, 8, 9]
    for image, request in zip(together.images, together.requests):
        assert request.count == 1
        assert np.array_equal(pixels(image), pixels(engine.generate(request).images[0]))
    assert not np.array_equal(pixels(together.images[0]), pixels(together.images[1]))


def test_the_requests_of_a_result_are_complete(engine, tiny_folder):
    request = engine.generate(Request(prompt="x", model=str(tiny_folder), width=32, height=32, steps=1)).requests[0]
    assert request.seed is not None
    assert (request.guidance, request.solver, request.schedule, request.shift) == (1.0, "euler", "simple", 3.0)
    assert Request.model_validate_json(request.model_dump_json()) == request


def test_sampling_together_agrees_with_drawing_one_by_one(tiny_base_folder):
    model = inkstream.load(tiny_base_folder)
    request = Request(prompt="one", negative_prompt="two", guidance=3, width=64, height=48, steps=3, seed=5, count=2)
    cond = model.encode(request)
    assert len(cond) == 2
    together = model.sample(request, cond)
    for i in range(2):
        alone = model.sample(request.model_copy(update={"seed": 5 + i, "count": 1}), cond)
        assert torch.allclose(alone[0], together[i], atol=1e-4)


@pytest.mark.parametrize("solver", inkstream.types.SolverName.__args__)
def test_every_solver_draws_and_counts_its_evaluations(engine, tiny_folder, solver):
    events = list(engine.submit(wish(tiny_folder, solver=solver, steps=3)))
    steps = [e for e in events if isinstance(e, Step)]
    assert steps[-1].step == steps[-1].steps == len(steps)
    assert isinstance(events[-1], Done)


@pytest.mark.parametrize("schedule", inkstream.types.ScheduleName.__args__)
def test_every_schedule_draws(engine, tiny_folder, schedule):
    assert engine.generate(wish(tiny_folder, schedule=schedule, steps=3)).images[0].size == (64, 48)


def test_guidance_doubles_the_prompts_only_where_it_is_on(tiny_base_folder):
    model = inkstream.load(tiny_base_folder)
    request = complete(
        Request(prompt="x", guidance=4, steps=4, shift=1, seed=0, width=32, height=32, guidance_until=0.4), model.spec
    )
    run = model.start(request, model.encode(request), None)
    counts = []
    while run.query is not None:
        counts.append(len(run.entries()))
        run.answer([[torch.zeros_like(run.query.x)] * counts[-1]])
    assert counts == [2, 2, 2, 1]  # t = 1, 0.75, 0.5 and then 0.25, below the interval


def test_closing_the_iterator_cancels_at_the_next_step(engine, tiny_folder):
    calls = []
    hook = engine.model.family.transformer.register_forward_hook(lambda *a: calls.append(1))
    try:
        events = engine.submit(wish(tiny_folder, steps=50))
        for event in events:
            if isinstance(event, Step) and event.step == 2:
                break
        events.close()
    finally:
        hook.remove()
    assert len(calls) == 2
    assert engine.generate(wish(tiny_folder)).images  # and the engine goes on


def test_two_requests_may_be_read_turn_by_turn(engine, tiny_folder):
    alone = engine.generate(wish(tiny_folder)).images[0]
    events = list(zip(engine.submit(wish(tiny_folder)), engine.submit(wish(tiny_folder, seed=8))))
    assert np.array_equal(pixels(events[-1][0].image), pixels(alone))


def test_strength_one_equals_drawing_from_the_same_noise(engine, tiny_folder, photo):
    plain = engine.generate(wish(tiny_folder)).images[0]
    from_picture = engine.generate(wish(tiny_folder, image=photo, strength=1)).images[0]
    assert np.array_equal(pixels(plain), pixels(from_picture))


def test_strength_decides_how_many_steps_are_taken(engine, tiny_folder, photo):
    for strength, expected in ((1.0, 10), (0.6, 6), (0.05, 1), (0.0, 0)):
        events = list(engine.submit(wish(tiny_folder, image=photo, steps=10, strength=strength)))
        assert sum(isinstance(e, Step) for e in events) == expected, strength


def test_a_request_with_a_picture_takes_the_pictures_size(engine, tiny_folder, photo):
    request = Request(prompt="x", model=str(tiny_folder), image=photo, steps=1, seed=0)
    assert engine.generate(request).images[0].size == (64, 48)


def test_outside_the_mask_the_picture_is_untouched_and_inside_it_is_not(engine, tiny_folder, photo, tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[8:40, 16:48] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    done = engine.generate(wish(tiny_folder, image=photo, mask=tmp_path / "mask.png")).images[0]
    before, after = pixels(Image.open(photo).convert("RGB")), pixels(done)
    assert np.array_equal(before[mask == 0], after[mask == 0])
    assert (before[20:28, 28:36] != after[20:28, 28:36]).any()


def test_a_picture_given_in_memory_equals_the_same_one_on_disk(engine, tiny_folder, photo):
    by_path = engine.generate(wish(tiny_folder, image=photo, strength=0.5)).images[0]
    with Image.open(photo) as opened:
        in_memory = engine.generate(wish(tiny_folder, image=opened.convert("RGB"), strength=0.5)).images[0]
    assert np.array_equal(pixels(by_path), pixels(in_memory))


def test_previews_come_small_and_resemble_what_the_autoencoder_shows(tiny_folder):
    engine = inkstream.Engine(inkstream.Machine("cpu"), previews=True)
    steps = [e for e in engine.submit(wish(tiny_folder)) if isinstance(e, Step)]
    assert all(s.preview is not None and s.preview.mode == "RGB" for s in steps)
    assert min(steps[0].preview.size) >= 64


def test_the_preview_map_finds_a_linear_autoencoder_exactly():
    """Where latents are linear in the colours, the fitted map gives the colours back."""
    from inkstream.engine.pictures.preview import fit_preview

    class Linear:
        def encode_image(self, pixels):
            small = torch.nn.functional.avg_pool2d(pixels, 8)
            return torch.cat([2 * small[:, :1] - small[:, 1:2] + 0.3, small + 1, small.flip(1)], dim=1)

    colour = torch.tensor([0.2, 0.6, 0.9]).view(1, 3, 1, 1).expand(1, 3, 128, 128)
    for size in range(40):  # how memory lies decides how a matrix product rounds, and so did the map
        moved = torch.zeros(1 + 97 * size)
        shown = pixels(fit_preview(Linear(), torch.device("cpu"))(Linear().encode_image(colour)[0]))
        assert np.abs(shown - np.array([0.2, 0.6, 0.9]) * 255).max() <= 1, len(moved)


def test_a_dtype_that_overflows_is_named_instead_of_a_black_picture(tiny_folder):
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    list(engine.load(str(tiny_folder)))
    engine.model.family.transformer.layers[0].feed_forward.w2.weight.mul_(float("inf"))
    engine.model.dtype = torch.float16
    last = list(engine.submit(wish(tiny_folder)))[-1]
    assert isinstance(last, Failed)
    assert last.kind == "input"
    assert "float16" in last.error
    assert "bf16" in last.error


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"width": 100}, ["width 100", "96 or 112"]),
        ({"height": 1000}, ["height 1000", "992 or 1008"]),
        ({"mask": "m.png"}, ["mask", "image"]),
        ({"strength": 0.5}, ["strength", "image"]),
        ({"image": "nowhere.png"}, ["nowhere.png"]),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(fields, words):
    with pytest.raises(InputError) as caught:
        complete(Request(prompt="x", **fields), TURBO)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words)


def test_noise_of_the_wrong_shape_is_named(tiny_folder):
    model = inkstream.load(tiny_folder)
    request = wish(tiny_folder)
    with pytest.raises(InputError, match="64x48"):
        model.sample(request, model.encode(request), noise=torch.zeros(1, 16, 8, 8))
