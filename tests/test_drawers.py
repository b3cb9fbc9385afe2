"""What draws can come from outside the package: a Drawer behind a Router, and a family with a way of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import inkstream
from inkstream import Engine, Machine, Request, Router
from inkstream.clients.many import Drawn, draw_many
from inkstream.engine.drawing.complete import Complete
from inkstream.engine.drawing.flow import Job
from inkstream.engine.drawing.model import Model
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.engine.pictures.inputs import to_image, to_pixels
from inkstream.families import FAMILIES, SPECS
from inkstream.types import Done, Drawer, Event, Failed, InputError, Queued, Spec, Step, singles


class Painter:
    """A Drawer that paints one colour: what a program of somebody else's needs to write."""

    own = Spec(
        name="paint",
        family="",
        transformer=None,
        text_encoder=None,
        vae=None,
        steps=1,
        guidance=1,
        shift=1,
        title="One colour",
    )

    def submit(self, request: Request) -> Iterator[Event]:
        yield Queued(request)
        for index, one in enumerate(singles(request)):
            yield Done(Image.new("RGB", (8, 8), one.prompt), one, index, request.count, 0.0)

    def models(self) -> list[Spec]:
        return [self.own]

    def spec(self, name: str) -> Spec:
        if name != "paint":
            raise InputError(f"model {name} is not known: take paint")
        return self.own

    def remarks(self, request: Request) -> list[str]:
        return ["steps has no effect: paint dries at once"]

    def ran_on(self, name: str) -> dict[str, str]:
        return {"device": "a brush"}


@pytest.fixture
def router() -> Router:
    return Router(Engine(Machine("cpu")), {"paint": Painter()})


def test_a_router_sends_each_request_to_the_drawer_of_its_model(router, tiny_folder):
    small = Request(prompt="a fox", model=str(tiny_folder), width=32, height=32, steps=1, seed=1)
    drawer: Drawer = router
    (*_, drawn) = drawer.submit(small)
    assert isinstance(drawn, Done)
    assert np.array_equal(drawn.image, Engine(Machine("cpu")).generate(small).images[0])
    (*_, painted) = drawer.submit(Request(prompt="red", model="paint", seed=1))
    assert isinstance(painted, Done)
    assert painted.image.getpixel((0, 0)) == (255, 0, 0)
    assert drawer.spec("paint").title == "One colour"
    assert drawer.ran_on("paint") == {"device": "a brush"}
    assert drawer.ran_on(str(tiny_folder)) == {"device": "cpu", "dtype": "float32"}
    assert drawer.remarks(Request(prompt="red", model="paint")) == ["steps has no effect: paint dries at once"]


def test_a_router_offers_the_models_of_all_its_drawers_once(router):
    assert [spec.name for spec in router.models()] == [*SPECS, "paint"]
    assert [spec.name for spec in Router(Painter(), {"paint": Painter()}).models()] == ["paint"]


def test_a_model_that_no_drawer_knows_fails_as_the_other_drawer_says(router):
    (*_, last) = router.submit(Request(prompt="a fox", model="/nowhere"))
    assert isinstance(last, Failed)
    assert "/nowhere" in last.error
    with pytest.raises(InputError, match="model fox is not known: take paint"):
        Router(Painter(), {}).spec("fox")


def test_many_requests_go_through_a_router(router, tiny_folder):
    small = {"width": 32, "height": 32, "steps": 1, "seed": 1}
    wishes = [Request(prompt="red", model=model, **small) for model in ("paint", str(tiny_folder), "paint")]
    told = [(place, event) for place, event in draw_many(router, wishes, 2) if isinstance(event, Drawn)]
    assert sorted(place for place, _ in told) == [0, 1, 2]


# A family of upscalers --------------------------------------------------------------------------------------------


class Doubling:
    """A way without steps: the picture through the autoencoder, at twice its size."""

    def double(self, model: Model, request: Complete) -> torch.Tensor:
        assert request.start is not None
        pixels = to_pixels(request.start, request.width, request.height)[None].to(model.device)
        return F.interpolate(model.decode(model.family.encode_image(pixels)), scale_factor=2)[0]

    def phases(self, model: Model, request: Complete) -> Mapping[str, Callable[[], object]]:
        return {"picture": lambda: self.double(model, request)}

    def draw(self, job: Job) -> Iterator[Event]:
        with torch.inference_mode():
            for index, one in list(enumerate(singles(job.request)))[len(job.drawn) :]:
                image = to_image(self.double(job.model, one).cpu())
                yield Step(1, 1, index, job.request.count, 0.0, 0.0)
                job.drawn.append(Done(image, one.plain(), index, job.request.count, 0.0))
                yield job.drawn[-1]


@pytest.fixture
def doubler(monkeypatch, make_folder, tmp_path) -> Path:
    """A folder of the family `doubler`, which brings a way of its own."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    from toy import family, specs

    monkeypatch.setattr(family.Toy, "way", Doubling())
    monkeypatch.setitem(FAMILIES, "toy", "toy.family:Toy")
    return make_folder(tmp_path / "doubler", specs.TOY.tiny)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_family_of_upscalers_is_a_family_with_a_way_of_its_own(doubler, placement):
    picture = Image.effect_noise((32, 48), 60).convert("RGB")
    request = Request(prompt="sharp", image=picture, model=str(doubler), count=2, seed=3)
    engine = Engine(Machine("cpu", placement=placement))
    events = list(engine.submit(request))
    done = [event for event in events if isinstance(event, Done)]
    assert [event.image.size for event in done] == [(64, 96), (64, 96)]
    assert [event.request.seed for event in done] == [3, 4]
    assert sum(isinstance(event, Step) for event in events) == 2  # one each, none of a solver


def test_the_memory_of_such_a_family_is_counted_by_its_own_phases(doubler):
    engine = Engine(Machine("cpu"))
    picture = Image.new("RGB", (32, 48))
    small, large = (Request(prompt="x", image=picture, model=str(doubler), width=w, height=w) for w in (32, 128))
    peaks: Any = [engine.placing(request).plans(request)[0].phases["picture"] for request in (small, large)]
    assert peaks[1] > peaks[0]


def test_a_device_alone_is_no_machine(tiny_folder):
    for make in (inkstream.Engine, lambda machine: inkstream.load(tiny_folder, machine)):
        with pytest.raises(InputError, match=r"'cpu' is not a Machine: give Machine\('cpu'\)"):
            make("cpu")


def test_the_library_names_them():
    assert {"Client", "Engine", "Machine", "Router"} <= set(inkstream.__all__)
