"""Continuous batching: which requests share a forward, their order, and that pictures do not depend on the batch."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inkstream
from inkstream.engine.drawing.batch import ABREAST, Alone, Ask, Batch, Drawing, tokens_of, within
from inkstream.engine.drawing.model import Leg, Run
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.nn.around import NOTHING
from inkstream.nn.forward import Sample
from inkstream.nn.heap import give_back_freed_memory, keep_freed_memory
from inkstream.sampling.solvers import SOLVERS
from inkstream.types import Conditioning, Done, Event, Failed, InputError, Loading, Queued, Request, Step

# The batch alone, with a family whose velocity leads straight to the picture -----------------------------------------


class Straight:
    """A family with a known flow. It records which requests were answered in one forward."""

    def __init__(self, fails: Callable[[Sequence[str]], bool] = lambda names: False):
        self.forwards: list[str] = []  # for each forward the names of its requests
        self.fails = fails

    def answer(self, samples: Sequence[Sample]) -> list[torch.Tensor]:
        names = [sample.prepared for sample in samples]
        if self.fails(names):
            raise ValueError("no answer to " + "".join(sorted(set(names))))
        self.forwards.append("".join(sorted(set(names))))
        return [(sample.x - ord(sample.prepared)) / sample.t for sample in samples]


def start(name: str, steps: int, entries: int = 1) -> Run:
    """A run whose picture is the character code of its name. With two entries it is guided."""
    request = Request(guidance=1.0 if entries == 1 else 2.0, steps=steps)
    noise = torch.full((1, 2, 2), 0.5)
    solver = SOLVERS["euler"](noise, [1 - i / steps for i in range(steps + 1)])
    return Run(request, solver, [Leg(1.0, NOTHING, [name] * entries)], steps, noise)


def drawing(family: Straight, name: str, steps: int, tokens: int = 1, entries: int = 1, model: list | None = None):
    """The drawing of such a run. model: its last entry is the loaded one; a name in the other case needs another."""
    yield Loading("prompt")
    if model is not None and model[-1] != name.isupper():
        yield Alone()
        model.append(name.isupper())
        yield Loading("model")
    run = start(name, steps, entries)
    try:
        for step in range(1, steps + 1):
            yield Ask(family, run, tokens)  # type: ignore[arg-type]
            yield Step(step, steps, 0, 1, 0.0, 0.0)
    finally:
        family.forwards.append(f"{name} left")
    shown = round(run.result.mean().item())
    yield Done(Image.new("L", (1, 1), shown), run.request, 0, 1, 0.0)


def begin(batch: Batch, made: Drawing) -> Iterator[Event]:
    """The events of a drawing, after its first one has been read."""
    events = batch.join(made)
    assert next(events) == Loading("prompt")
    return events


def forwards(family: Straight) -> list[str]:
    return [names for names in family.forwards if not names.endswith("left")]


def picture(events: Iterator[Event]) -> str:
    """The name that the picture of the last event stands for."""
    *_, last = events
    assert isinstance(last, Done)
    return chr(last.image.getpixel((0, 0)))


def test_requests_share_forwards_until_each_ends():
    family, batch = Straight(), Batch()
    reading = [begin(batch, drawing(family, name, steps)) for name, steps in (("a", 2), ("b", 4), ("c", 3))]
    assert [picture(events) for events in reading] == ["a", "b", "c"]
    assert family.forwards == ["a", "abc", "a left", "bc", "bc", "c left", "b", "b left"]


def test_reading_one_request_drives_all():
    family, batch = Straight(), Batch()
    first, second = (begin(batch, drawing(family, name, 3)) for name in "ab")
    assert picture(second) == "b"
    made = len(forwards(family))
    assert picture(first) == "a"
    assert len(forwards(family)) == made  # all forwards of the first request have run


def test_a_single_request_is_drawn_only_as_far_as_it_is_read():
    family, batch = Straight(), Batch()
    events = batch.join(drawing(family, "a", 5))
    assert family.forwards == []
    kinds = [type(next(events)) for _ in range(3)]
    assert kinds == [Loading, Step, Step]
    assert family.forwards == ["a", "a"]


def test_a_new_request_joins_at_the_next_step():
    family, batch = Straight(), Batch()
    first = begin(batch, drawing(family, "a", 4))
    assert [next(first).step for _ in range(2)] == [1, 2]
    second = begin(batch, drawing(family, "b", 1))
    assert picture(second) == "b"
    assert picture(first) == "a"
    assert forwards(family) == ["a", "a", "a", "ab"]


def test_a_closed_request_leaves_the_next_forward_and_the_others_continue():
    family, batch = Straight(), Batch()
    first, second = (begin(batch, drawing(family, name, 4)) for name in "ab")
    next(first)
    next(second)
    next(first)
    first.close()
    assert "a left" in family.forwards
    assert picture(second) == "b"
    assert "a" not in "".join(family.forwards[family.forwards.index("a left") + 1 :])


def test_a_close_during_a_forward_takes_effect_after_it():
    entered, go_on = threading.Event(), threading.Event()

    def hold(names: Sequence[str]) -> bool:
        if len(names) == 2:
            entered.set()
            assert go_on.wait(10)
        return False

    family, batch = Straight(hold), Batch()
    first, second = (begin(batch, drawing(family, name, 2)) for name in "ab")
    with ThreadPoolExecutor(1) as thread:
        shown = thread.submit(picture, second)
        assert entered.wait(10)
        first.close()
        assert "a left" not in family.forwards
        go_on.set()
        assert shown.result() == "b"
    left = family.forwards.index("a left")
    assert family.forwards[left - 1] == "ab"
    assert "a" not in "".join(family.forwards[left + 1 :])


def test_every_thread_gets_its_own_picture():
    family, batch = Straight(), Batch()
    names = "abcdefgh"
    with ThreadPoolExecutor(len(names)) as threads:
        shown = threads.map(lambda name: picture(batch.join(drawing(family, name, 20 + ord(name) % 3))), names)
        assert "".join(shown) == names
    assert batch.ahead(shares=False) == 0


def test_an_error_in_a_forward_fails_only_the_faulty_request():
    family, batch = Straight(lambda names: "b" in names), Batch()
    reading = {name: begin(batch, drawing(family, name, 3)) for name in "abc"}
    with pytest.raises(ValueError, match="no answer to b"):
        list(reading["b"])
    assert [picture(reading[name]) for name in "ac"] == ["a", "c"]
    assert "ac" in forwards(family)


def test_an_error_in_a_drawing_fails_only_its_request():
    def broken() -> Drawing:
        yield Loading("prompt")
        raise InputError("no such picture")

    family, batch = Straight(), Batch()
    first, second = begin(batch, drawing(family, "a", 2)), begin(batch, broken())
    with pytest.raises(InputError, match="no such picture"):
        list(second)
    assert picture(first) == "a"


def test_a_forward_that_was_too_large_is_not_tried_again():
    tried = []

    def too_many(names: Sequence[str]) -> bool:
        tried.append(len(names))
        return len(names) > 3

    family, batch = Straight(too_many), Batch()
    reading = [begin(batch, drawing(family, name, 4)) for name in "abcd"]
    assert "".join(map(picture, reading)) == "abcd"
    assert tried.count(4) == 1
    assert 3 in tried


def test_a_request_that_does_not_fit_waits_for_the_next_forward():
    family, batch = Straight(), Batch(within(6))
    reading = [begin(batch, drawing(family, name, 2, tokens, entries)) for name, tokens, entries in
               (("a", 4, 1), ("b", 2, 1), ("c", 2, 2), ("d", 9, 1))]  # fmt: skip
    assert "".join(map(picture, reading)) == "abcd"
    sizes = {"a": 4, "b": 2, "c": 4, "d": 9}
    assert all(sum(sizes[name] for name in names) <= 6 or names == "d" for names in forwards(family))
    assert "ab" in forwards(family)


def test_equal_requests_are_fifo():
    family, batch = Straight(), Batch(within(1))
    reading = [begin(batch, drawing(family, name, 3)) for name in "abc"]
    assert "".join(map(picture, reading)) == "abc"
    assert "".join(forwards(family)) == "aaabbbccc"


def test_a_small_request_passes_a_large_one():
    family, batch = Straight(), Batch(within(1))
    large = begin(batch, drawing(family, "L", 100, tokens=8))
    for _ in range(10):
        next(large)
    small = begin(batch, drawing(family, "s", 4))
    assert picture(small) == "s"
    assert forwards(family)[10:].count("L") <= 2
    assert picture(large) == "L"


def test_a_large_request_does_not_starve_behind_small_ones():
    family, batch = Straight(), Batch(within(1))
    large = begin(batch, drawing(family, "L", 10, tokens=8))
    waiting = [begin(batch, drawing(family, "s", 4)) for _ in range(2)]
    for _ in range(200):
        waiting.append(begin(batch, drawing(family, "s", 4)))
        picture(waiting.pop(0))
    assert forwards(family).count("L") == 10
    assert picture(large) == "L"


def test_a_request_for_another_model_waits_for_earlier_ones_and_later_ones_wait_for_it():
    family, batch, model = Straight(), Batch(), [False]
    first, second = (
        begin(batch, drawing(family, "a", 3, model=model)),
        begin(batch, drawing(family, "B", 2, model=model)),
    )
    third = begin(batch, drawing(family, "c", 2, model=model))
    assert picture(third) == "c"
    assert forwards(family) == ["a", "a", "a", "B", "B", "c", "c"]
    assert [picture(first), picture(second)] == ["a", "B"]
    assert model == [False, True, False]


def test_requests_that_arrive_before_their_model_is_loaded_load_it_once():
    family, batch, model = Straight(), Batch(), [None]
    reading = [begin(batch, drawing(family, name, 3, model=model)) for name in "abc"]
    assert "".join(map(picture, reading)) == "abc"
    assert model == [None, False]
    assert "abc" in forwards(family)


def test_the_number_of_concurrent_requests_is_limited():
    family, batch = Straight(), Batch()
    names = [chr(ord("A") + i) for i in range(ABREAST + 3)]
    reading = [batch.join(drawing(family, name, 2)) for name in names]
    assert [picture(events) for events in reading] == names
    assert max(map(len, forwards(family))) <= ABREAST


def test_ahead_counts_requests_only_if_a_new_one_must_wait():
    family, batch = Straight(), Batch()
    assert batch.ahead(shares=False) == 0
    events = begin(batch, drawing(family, "a", 2))
    assert (batch.ahead(shares=True), batch.ahead(shares=False)) == (0, 1)
    events.close()
    assert batch.ahead(shares=False) == 0


def test_a_run_counts_the_tokens_of_picture_text_and_references():
    latents = torch.zeros(16, 8, 12)
    solver, legs = SOLVERS["euler"](latents, [1.0, 0.0]), [Leg(1.0, NOTHING, ["x"])]
    run = Run(Request(width=96, height=64, guidance=1.0), solver, legs, 1, latents)
    cond = Conditioning(torch.zeros(12, 4), (7, 5), references=(torch.zeros(16, 8, 8), torch.zeros(16, 4, 4)))
    assert tokens_of(run, cond, 16) == 24 + 7 + 16 + 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library can be told")
def test_freed_memory_is_reused_without_page_faults():
    import resource  # only on Unix

    def use() -> None:
        held = [torch.ones(2**20) for _ in range(10)]  # 4 MiB each
        held.clear()

    keep_freed_memory()
    use()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        use()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20 * 1024  # pages; without it 200 * 1024


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no other C library can be told")
def test_freed_memory_is_returned_to_the_system_on_request():
    def taken() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep_freed_memory()
    give_back_freed_memory()
    before = taken()
    held = [torch.ones(2**20) for _ in range(20)]  # 4 MiB each
    held.clear()
    assert taken() - before > 40 * 2**20  # kept
    give_back_freed_memory()
    assert taken() - before < 10 * 2**20


# The engine over real models at tiny size -------------------------------------------------------------------------

MIXED = [
    {"prompt": "a red circle", "width": 64, "height": 48, "steps": 2, "guidance": 1.0},
    {"prompt": "a blue square on the left", "width": 32, "height": 32, "steps": 5, "guidance": 4.0},
    {"prompt": "x", "width": 96, "height": 64, "steps": 3, "guidance": 3.0, "solver": "heun"},
    {"prompt": "a red circle", "width": 64, "height": 48, "steps": 2, "guidance": 5.0, "negative_prompt": "dull"},
    {"prompt": "words " * 20, "width": 48, "height": 48, "steps": 4, "guidance": 2.0, "guidance_until": 0.5},
    {"prompt": "two", "width": 64, "height": 64, "steps": 3, "solver": "euler_ancestral", "cfg_normalization": 1.0},
    {"prompt": "three", "width": 32, "height": 64, "steps": 4, "schedule": "beta", "solver": "res_multistep"},
    {"prompt": "four", "width": 64, "height": 32, "steps": 6, "guidance": 4.0, "count": 2},
]


@pytest.fixture(scope="module")
def engine(tiny_base_folder):
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    list(engine.load(str(tiny_base_folder)))
    return engine


@pytest.fixture(scope="module")
def mixed(tiny_base_folder, tmp_path_factory) -> list[Request]:
    across, down = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 48))
    photo = Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))
    mask = Image.fromarray(np.pad(np.full((24, 32), 255, np.uint8), ((12, 12), (16, 16))))
    pictures = [{"prompt": "five", "image": photo, "strength": 0.5, "steps": 6},
                {"prompt": "six", "image": photo, "mask": mask, "steps": 3}]  # fmt: skip
    return [Request(model=str(tiny_base_folder), seed=i, **fields) for i, fields in enumerate([*MIXED, *pictures])]


def counted(engine, draw: Callable[[], object]) -> list[int]:
    """The number of samples of every forward that `draw` makes."""
    sizes = []
    hook = engine.model.family.transformer.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    try:
        draw()
    finally:
        hook.remove()
    return sizes


def in_threads(engine, requests: Sequence[Request]) -> list[inkstream.Result]:
    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(engine.generate, requests))


def apart(one: Image.Image, other: Image.Image) -> float:
    """PSNR in decibels; infinite if all pixels are equal."""
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def test_a_picture_drawn_in_a_batch_equals_the_one_drawn_alone(engine, mixed):
    alone = [engine.generate(request) for request in mixed]
    together: list[inkstream.Result] = []
    sizes = counted(engine, lambda: together.extend(in_threads(engine, mixed)))
    assert max(sizes) > 4
    for request, one, other in zip(mixed, alone, together, strict=True):
        assert one.requests == other.requests
        for a, b in zip(one.images, other.images, strict=True):
            assert apart(a, b) >= 50, request  # a rounding or two of 255: products of other shapes sum in another order


def test_forwards_of_the_same_shapes_give_bit_identical_pictures(engine, mixed):
    """The order in a batch changes nothing. Only the shapes in one matrix product can change the rounding."""
    twins = [mixed[1].model_copy(update={"seed": seed}) for seed in (3, 4)]
    with_others = [turn_by_turn(engine, order) for order in (twins, twins[::-1])]
    assert apart(with_others[0][0], with_others[1][1]) == float("inf")
    assert apart(with_others[0][1], with_others[1][0]) == float("inf")


def turn_by_turn(engine, requests: Sequence[Request]) -> list[Image.Image]:
    """The pictures of requests whose iterators one thread reads in turn, event by event."""
    shown: dict[int, Image.Image] = {}
    reading = dict(enumerate(map(engine.submit, requests)))
    while reading:
        for i, events in list(reading.items()):
            event = next(events, None)
            if event is None:
                del reading[i]
            elif isinstance(event, Done):
                shown[i] = event.image
            assert not isinstance(event, Failed), event
    return [shown[i] for i in range(len(requests))]


def test_iterators_read_in_turn_by_one_thread_share_forwards(engine, mixed):
    shown: list[Image.Image] = []
    sizes = counted(engine, lambda: shown.extend(turn_by_turn(engine, mixed[:5])))
    assert max(sizes) > 4
    for request, image in zip(mixed, shown):
        assert apart(image, engine.generate(request).images[0]) >= 50


def test_flux2_pictures_of_different_sizes_and_references_share_a_forward(make_folder, tmp_path):
    folder = make_folder(tmp_path / "tiny-flux2-klein", KLEIN_4B.tiny)
    engine = inkstream.Engine(inkstream.Machine("cpu"))
    photo = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    sizes = [
        {"width": 64, "height": 64},
        {"width": 96, "height": 32},
        {"width": 32, "height": 64, "reference": (photo,)},
    ]
    wishes = [Request(prompt="x" * i, model=str(folder), seed=i, steps=2 + i, **size) for i, size in enumerate(sizes)]
    list(engine.load(str(folder)))
    shown: list[Image.Image] = []
    assert max(counted(engine, lambda: shown.extend(turn_by_turn(engine, wishes)))) == 3
    for wish, image in zip(wishes, shown):
        assert apart(image, engine.generate(wish).images[0]) >= 50


def test_a_request_has_the_same_event_order_as_alone(engine, mixed):
    with ThreadPoolExecutor(3) as threads:
        several = list(threads.map(lambda request: list(engine.submit(request)), mixed[-3:]))
    for request, events in zip(mixed[-3:], several):
        alone = list(engine.submit(request))
        assert [type(event) for event in events] == [type(event) for event in alone]
        assert [(e.step, e.index, e.t) for e in events if isinstance(e, Step)] == [
            (e.step, e.index, e.t) for e in alone if isinstance(e, Step)
        ]


def test_a_request_that_cannot_be_drawn_fails_alone(engine, mixed):
    bad = [mixed[0].model_copy(update={"width": 100}), mixed[0].model_copy(update={"image": "nowhere.png"})]
    last: list[Event] = []

    def read(request: Request) -> Event:
        *_, event = engine.submit(request)
        return event

    with ThreadPoolExecutor(4) as threads:
        last = list(threads.map(read, [mixed[0], *bad, mixed[1]]))
    assert [type(event) for event in last] == [Done, Failed, Failed, Done]
    assert "width 100" in last[1].error
    assert "nowhere.png" in last[2].error


def test_non_finite_values_fail_only_their_request(engine, mixed):
    transformer = engine.model.family.transformer

    def spoil(module, args, out):  # spoils every request of this size
        return [x * float("nan") if x.shape[-2:] == (4, 4) else x for x in out]

    hook = transformer.register_forward_hook(spoil)
    try:
        with ThreadPoolExecutor(3) as threads:
            last = list(threads.map(lambda request: list(engine.submit(request))[-1], mixed[:3]))
    finally:
        hook.remove()
    assert [type(event) for event in last] == [Done, Failed, Done]
    assert "not finite" in last[1].error


def test_closing_one_iterator_does_not_affect_the_others(engine, mixed):
    first, second = engine.submit(mixed[1].model_copy(update={"steps": 50})), engine.submit(mixed[2])
    for _ in range(4):
        next(first), next(second)
    first.close()
    sizes = counted(engine, lambda: list(second))
    assert set(sizes) == {2}  # the two samples of its guidance
    assert engine.generate(mixed[0]).images


def test_a_text_is_encoded_once_for_all_requests(engine, mixed):
    calls = []
    hook = engine.model.family.text_encoder.register_forward_hook(lambda *a: calls.append(1))
    wish = {"prompt": "only here", "negative_prompt": "not there", "guidance": 3.0}
    try:
        in_threads(engine, [mixed[0].model_copy(update={**wish, "seed": i}) for i in range(4)])
    finally:
        hook.remove()
    assert len(calls) == 2


def test_a_request_that_waits_for_another_model_reports_its_place(engine, mixed, tiny_folder):
    events = engine.submit(mixed[1])
    while not isinstance(next(events), Step):
        pass
    assert next(engine.submit(mixed[0])) == Queued(mixed[0], 0)
    other = mixed[0].model_copy(update={"model": str(tiny_folder)})
    assert next(engine.submit(other)) == Queued(other, 1)
    events.close()


def test_an_unread_request_does_not_block_the_next_model(engine, mixed, tiny_folder):
    wishes = [mixed[1], mixed[1].model_copy(update={"model": str(tiny_folder), "guidance": 1.0})]
    unread = engine.submit(wishes[0])
    while not isinstance(next(unread), Step):
        pass
    alone = [engine.generate(wishes[1]).images[0], list(unread)[-1].image]
    together = in_threads(engine, wishes)
    assert apart(together[0].images[0], alone[1]) == float("inf")
    assert apart(together[1].images[0], alone[0]) == float("inf")
