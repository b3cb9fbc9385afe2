"""Remote models: each provider's dialect on loopback, what goes wrong there, costs, and a key that stays secret."""

from __future__ import annotations

import base64
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

import remote_providers
from inkstream import InputError, Machine, Remote, Request, Router
from inkstream.cli import main
from inkstream.cli.models import list_remote, print_remote
from inkstream.clients.remote import drawer as drawing
from inkstream.clients.remote.budget import Budget, money
from inkstream.clients.remote.catalogue import PROVIDERS, offer_of, offers
from inkstream.clients.remote.drawer import provider_of, remote_drawers
from inkstream.engine import wire
from inkstream.engine.pictures.metadata import describe
from inkstream.types import Done, Failed, Loading, Queued, Step
from remote_providers import DIALECTS, KEY, MODELS, Pretended

WISH = {"prompt": "a fox in the snow", "seed": 7}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path) -> None:
    """No waits, no keys, and no user's file of models."""
    for name in PROVIDERS:
        module = sys.modules[provider_of(name).draw.__module__]
        monkeypatch.delenv(provider_of(name).key_variable, raising=False)
        monkeypatch.delenv(provider_of(name).address_variable, raising=False)
        if hasattr(module, "POLL"):
            monkeypatch.setattr(module, "POLL", 0.01)
    monkeypatch.setattr(wire, "PAUSE", 0.01)
    monkeypatch.setattr(wire, "TICK", 0.05)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def provide(monkeypatch) -> Iterator[Callable[..., Pretended]]:
    """`provide("bfl", "busy")` is a provider that the environment names, with its key."""
    running: list[Pretended] = []

    def start(name: str, plays: str = "happy", key: str = KEY) -> Pretended:
        provider = Pretended(DIALECTS[name], plays)
        running.append(provider)
        monkeypatch.setenv(provider_of(name).address_variable, provider.address)
        monkeypatch.setenv(provider_of(name).key_variable, key)
        return provider

    yield start
    for provider in running:
        provider.stop()


def told(name: str, **wish) -> list:
    return list(Remote(MODELS[name]).submit(Request(**{**WISH, **wish})))


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_picture_comes_with_its_request_and_its_cost(name, provide):
    provider = provide(name)
    events = told(name)
    done = events[-1]
    assert isinstance(done, Done), done
    assert isinstance(events[0], Queued)
    assert any(isinstance(event, Step) for event in events)
    assert done.image.getpixel((0, 0)) == (0, 128, 128)
    assert (done.request.prompt, done.request.seed, done.request.model) == (WISH["prompt"], 7, MODELS[name])
    assert (done.request.width, done.request.height) == (1024, 1024)
    assert done.cost is not None
    assert 0 < done.cost < 0.1
    notice = next(event.note for event in events if isinstance(event, Loading) and event.note)
    assert "the prompt goes to 127.0.0.1" in notice
    assert "$" in notice
    assert WISH["prompt"] in json.dumps(provider.bodies[-1])
    assert provider.keys == [KEY] * len(provider.keys)


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_busy_provider_is_asked_again_as_it_says(name, provide):
    provider = provide(name, "busy")
    began = time.monotonic()
    assert isinstance(told(name)[-1], Done)
    assert provider.refused == 2
    assert time.monotonic() - began >= 1.0  # the first Retry-After


@pytest.mark.parametrize("name", ["bfl", "fal", "replicate"])
def test_a_slow_picture_is_polled_until_it_is_there(name, provide):
    provider = provide(name, "slow")
    events = told(name)
    assert isinstance(events[-1], Done)
    assert provider.polls == 4
    if name == "fal":
        assert [event.position for event in events if isinstance(event, Queued)] == [0, 2, 1, 0]


@pytest.mark.parametrize("name", PROVIDERS)
def test_refused_content_is_told_in_one_line(name, provide):
    provide(name, "moderation")
    last = told(name)[-1]
    assert isinstance(last, Failed)
    assert last.kind == "input"
    assert "refuses the content by its rules" in last.error
    assert "change the prompt or the pictures" in last.error


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_broken_picture_is_told_in_one_line(name, provide):
    provide(name, "broken")
    last = told(name)[-1]
    assert isinstance(last, Failed)
    assert "sent a file of 60 bytes that is no whole picture: ask for it again" in last.error


@pytest.mark.parametrize("name", ["bfl", "dashscope", "fal", "replicate"])
def test_an_expired_address_is_told_in_one_line(name, provide):
    provide(name, "expired")
    last = told(name)[-1]
    assert isinstance(last, Failed)
    assert "the address of the picture" in last.error
    assert "has expired: ask for the picture again" in last.error


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_wrong_key_is_told_without_the_key(name, provide):
    provide(name, key="sk-wrong-but-secret")
    last = told(name)[-1]
    assert isinstance(last, Failed)
    assert f"does not accept the key (the key *** is wrong): check {provider_of(name).key_variable}" in last.error
    assert "sk-wrong" not in last.error


@pytest.mark.parametrize("name", PROVIDERS)
def test_without_a_key_nothing_is_sent(name, provide, monkeypatch):
    provider = provide(name)
    monkeypatch.delenv(provider_of(name).key_variable)
    last = told(name)[-1]
    assert isinstance(last, Failed)
    assert f"set {provider_of(name).key_variable}, or run keyring set inkstream" in last.error
    assert provider.paths == []


@pytest.mark.parametrize("name", PROVIDERS)
def test_another_program_at_the_address_is_told_in_one_line(name, provide):
    provide(name, "garbage")
    last = told(name)[-1]
    assert isinstance(last, Failed)
    assert "\n" not in last.error


@pytest.mark.parametrize("name", PROVIDERS)
def test_no_network_is_told_at_once(name, provide):
    provider = provide(name)
    provider.stop()
    began = time.monotonic()
    last = told(name)[-1]
    assert isinstance(last, Failed)
    assert "cannot be reached" in last.error
    assert "check the network" in last.error
    assert time.monotonic() - began < 30


def test_a_key_does_not_go_over_the_network_in_the_clear_nor_to_another_host(provide, monkeypatch):
    provider = provide("bfl")
    monkeypatch.setenv("BFL_BASE_URL", "http://example.com")
    assert "unencrypted: take an https address" in told("bfl")[-1].error
    monkeypatch.setenv("BFL_BASE_URL", provider.address)

    def elsewhere(given: Pretended, asked: remote_providers.Asked) -> remote_providers.Answer:
        return 200, "application/json", json.dumps({"id": "a", "polling_url": "https://evil.example/x"}).encode()

    provider.dialect = elsewhere
    assert "evil.example, which is not its own host" in told("bfl")[-1].error


def test_a_host_of_the_same_owner_gets_the_key():
    assert wire._same_owner("https://api.eu.bfl.ai/v1/get_result", "https://api.bfl.ai")
    assert not wire._same_owner("https://api.bfl.ai.evil.example/", "https://api.bfl.ai")
    assert not wire._same_owner("http://api.bfl.ai/v1", "https://api.bfl.ai")
    assert not wire._same_owner("https://xbfl.ai/v1", "https://api.bfl.ai")


def test_references_go_along_and_set_the_size(provide, tmp_path):
    Image.new("RGB", (640, 320), "orange").save(tmp_path / "start.png")
    wish = {"reference": [str(tmp_path / "start.png")], "seed": 1, "prompt": "make it blue"}
    provider = provide("bfl")
    done = told("bfl", **wish)[-1]
    body = provider.bodies[0]
    assert Image.open(io.BytesIO(base64.b64decode(body["input_image"]))).size == (640, 320)
    assert (body["width"], body["height"], body["seed"]) == (640, 320, 1)
    assert done.request.reference == (str(tmp_path / "start.png"),)
    provider = provide("openai")
    assert isinstance(told("openai", **wish)[-1], Done)
    assert provider.paths == ["POST /images/edits"]
    assert b'name="image[]"; filename=' in provider.bodies[0]
    provider = provide("replicate")
    assert isinstance(told("replicate", **wish)[-1], Done)
    assert provider.bodies[-1]["input"]["input_images"] == [f"{provider.address}/v1/files/f"]
    assert (
        "takes no reference: leave reference out"
        in list(Remote("fal:z-image-turbo").submit(Request(**wish, model="fal:z-image-turbo")))[-1].error
    )
    many = {**wish, "reference": [str(tmp_path / "start.png")] * 9}
    assert "9 references are too many for bfl:flux-2-pro: give 8" in told("bfl", **many)[-1].error


def test_unfinished_pictures_are_previews(provide):
    provider = provide("openai")
    events = list(Remote("openai:gpt-image-2", previews=True).submit(Request(**WISH)))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(step.step, step.steps) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert [step.preview is not None for step in steps] == [True, True, False]
    assert provider.bodies[0]["partial_images"] == 2
    assert events[-1].cost == pytest.approx((10 * 5 + 1000 * 30) / 1e6)


def test_what_a_provider_makes_of_the_prompt_is_kept(provide):
    provide("dashscope")
    assert told("dashscope")[-1].told == ""
    done = told("dashscope", upsample=True)[-1]
    assert done.told == "a fox, written out"
    assert done.cost == pytest.approx(0.03)
    provide("bfl")
    assert told("bfl")[-1].told == "a fox, written out"


@pytest.mark.parametrize(
    ("model", "wish", "said"),
    [
        (
            "bfl:flux-2-pro",
            {"width": 500},
            "width 500 is not a multiple of 16, as .* needs: take 496 or 512",
        ),
        (
            "bfl:flux-2-pro",
            {"width": 4096, "height": 2048},
            "out of the range of .*: take .* to 4 megapixels",
        ),
        ("bfl:flux-2-pro", {"steps": 8}, "takes no steps: leave steps out, or draw with a local model"),
        ("bfl:flux-2-pro", {"loras": ["x"]}, "takes no loras: leave loras out"),
        ("bfl:flux-2-pro", {"negative_prompt": "x"}, "takes no negative_prompt"),
        ("bfl:flux-3-image", {"width": 512, "height": 512}, "512x512 is no size of bfl:flux-3-image: take about 1 or"),
        ("bfl:flux-3-image", {"width": 2048, "height": 256}, "has no ratio of bfl:flux-3-image: take one of 21:9"),
        ("openai:gpt-image-1-mini", {"width": 512}, "512x1024 is no size of .*: take 1024x1024, 1536x1024, 1024x1536"),
        (
            "openai:gpt-image-2",
            {"width": 3840, "height": 1024},
            "too long for .*: take sides up to 1:3",
        ),
        ("bfl:flux-2-pro", {"prompt": " "}, "there is no prompt"),
    ],
)
def test_what_a_model_does_not_take_is_refused_by_name(model, wish, said):
    with pytest.raises(InputError, match=said):
        Remote(model).generate(Request(**{"prompt": "a fox", **wish}))


def test_a_model_without_seeds_draws_and_says_so(provide):
    provide("openai")
    remote = Remote("openai:gpt-image-2")
    wish = Request(**WISH)
    assert isinstance(list(remote.submit(wish))[-1], Done)
    said = ["seed has no effect: openai:gpt-image-2 takes no seed and draws another picture each time"]
    assert remote.remarks(wish) == said


def test_an_unknown_model_is_told_with_the_nearest():
    with pytest.raises(InputError, match=r"bfl:flux2-pro is not a known remote model: take bfl:flux-2-pro"):
        Remote("bfl:flux2-pro")


def test_a_ratio_and_a_resolution_stand_for_a_size(provide):
    provider = provide("bfl")
    done = list(Remote("bfl:flux-3-image").submit(Request(prompt="a fox", width=2720, height=1536)))[-1]
    assert provider.bodies[0] == {"prompt": "a fox", "aspect_ratio": "16:9", "resolution": "2k", "grounding": False}
    assert isinstance(done, Done)


# Costs ----------------------------------------------------------------------------------------------------------------


def test_prices_are_those_of_the_providers_examples():
    def price(name: str, size: tuple[int, int], references=()) -> float:
        return offer_of(name).price.estimate(size, references)

    assert price("bfl:flux-2-pro", (1024, 1024)) == pytest.approx(0.03)
    assert price("bfl:flux-2-pro", (1024, 1024), [(1024, 1024)]) == pytest.approx(0.045)
    assert price("bfl:flux-2-pro", (1440, 1440)) == pytest.approx(0.045)
    assert price("bfl:flux-2-klein-9b", (1024, 1024), [(1024, 1024)]) == pytest.approx(0.017)
    assert price("fal:z-image-turbo", (2048, 2048)) == pytest.approx(0.02)
    assert all(offer.source and offer.date for offer in offers().values())


def test_more_than_the_most_is_refused_before_anything_is_sent(provide):
    provider = provide("bfl")
    last = list(Remote("bfl:flux-2-pro", Machine(max_cost=0.1)).submit(Request(**WISH, count=4)))[-1]
    assert last.error == (
        "4 pictures of bfl:flux-2-pro would take about $0.12: max_cost is $0.10, raise it or draw less"
    )
    assert provider.paths == []


def test_drawers_share_a_budget_that_counts_what_was_billed(provide):
    provide("bfl")
    drawers = remote_drawers(["bfl:flux-2-pro", "bfl:flux-2-max"], Machine(max_cost=0.1))
    router = Router(drawers["bfl:flux-2-pro"], drawers)
    assert isinstance(list(router.submit(Request(**WISH, model="bfl:flux-2-pro")))[-1], Done)  # billed with $0.045
    last = list(router.submit(Request(**WISH, model="bfl:flux-2-max")))[-1]
    assert "would take about $0.07, and $0.045 are spent: max_cost is $0.10" in last.error


def test_a_budget_is_a_sum_of_money():
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="is not a sum of money"):
            Budget(wrong)
    assert [money(x) for x in (0.03, 0.0027, 12.5, 0, 0.045)] == ["$0.03", "$0.0027", "$12.50", "$0.00", "$0.045"]


def test_a_user_adds_models_and_changes_prices(tmp_path, provide):
    own = tmp_path / "data" / "inkstream" / "remote.toml"
    own.parent.mkdir(parents=True)
    own.write_text(
        '[fal.mine]\nmodel = "me/mine"\ntitle = "Mine"\nlicence = "mine"\nprice = { picture = 0.5 }\n'
        'source = "a bill"\ndate = 2026-12-01\n'
    )
    provider = provide("fal")
    assert list(Remote("fal:mine").submit(Request(prompt="a fox")))[-1].cost == 0.5
    assert provider.paths[0] == "POST /me/mine"
    own.write_text("[fal.mine]\nprise = 1\n")
    with pytest.raises(InputError, match="fal:mine has the unknown field prise"):
        offers()
    own.write_text("[fal.mine\n")
    with pytest.raises(InputError, match="cannot be read"):
        offers()


def test_closing_the_iterator_cancels_at_the_provider(provide, until):
    provider = provide("fal", "slow")
    with closing(Remote("fal:z-image-turbo").submit(Request(**WISH))) as events:
        for event in events:
            if isinstance(event, Queued) and event.position:
                break
    until(lambda: any(path.startswith("PUT") for path in provider.paths), 10)


def test_a_picture_that_never_comes_is_given_up(provide, monkeypatch):
    provider = provide("bfl", "slow")
    monkeypatch.setattr(provider, "waits", lambda: True)
    monkeypatch.setattr(drawing, "TIME", 0.3)
    assert "did not draw within" in told("bfl")[-1].error


# The command line -----------------------------------------------------------------------------------------------------


def test_generate_draws_with_a_remote_model_and_keeps_the_cost(provide, tmp_path, capsys):
    provide("bfl")
    words = ["generate", "a fox", "-m", "bfl:flux-2-pro", "-s", "7", "-o", str(tmp_path / "fox.png")]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "fox.png")
    assert "the prompt goes to 127.0.0.1; a picture of bfl:flux-2-pro: about $0.03" in said.err
    assert "$0.045" in said.err  # as billed
    facts = describe(str(tmp_path / "fox.png"))
    assert facts["cost_usd"] == 0.045
    assert facts["told"] == "a fox, written out"
    assert facts["request"]["model"] == "bfl:flux-2-pro"


def test_generate_says_what_it_would_cost_and_sends_nothing(provide, tmp_path, capsys):
    provider = provide("bfl")
    words = ["generate", "a fox", "-m", "bfl:flux-2-pro", "-c", "3", "-o", str(tmp_path)]
    assert main([*words, "--dry-run"]) == 0
    assert "$0.09" in capsys.readouterr().out
    assert main([*words, "--max-cost", "0.05"]) == 2
    assert "3 pictures of bfl:flux-2-pro would take about $0.09: max_cost is $0.05" in capsys.readouterr().err
    assert main([*words, "--commercial-only"]) == 2
    assert "does not allow commercial use" in capsys.readouterr().err
    assert provider.paths == []


def test_batch_draws_with_remote_models_within_its_cost(provide, tmp_path, capsys):
    provider = provide("fal")
    (tmp_path / "rows.txt").write_text("a fox\na hare\n")
    words = ["batch", str(tmp_path / "rows.txt"), "-m", "fal:z-image-turbo", "--out", str(tmp_path / "out")]
    assert main([*words, "--max-cost", "0.009"]) == 2
    assert "2 remote pictures would take about $0.01: max_cost is $0.009" in capsys.readouterr().err
    assert provider.paths == []
    assert main([*words, "--max-cost", "0.01"]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_models_are_listed_apart(capsys, monkeypatch):
    monkeypatch.setenv("FAL_KEY", KEY)
    print_remote(list_remote())
    said = capsys.readouterr().out
    assert "drawn by others, only if named" in said
    assert "BFL_API_KEY is not set" in said
    assert "FAL_KEY is set" in said
    assert "bfl:flux-2-pro: about $0.03 for 1024x1024" in said
    assert KEY not in said


# The server, and the key ----------------------------------------------------------------------------------------------


def test_a_server_draws_with_a_remote_model_that_its_owner_named_and_the_key_is_nowhere(
    provide, tmp_path, start_server, capfd, caplog
):
    from inkstream.serve.limits import Settings

    caplog.set_level("DEBUG")
    provider = provide("bfl")
    served = start_server(Settings(tmp_path / "server", models=("pocket", "bfl:flux-2-pro"), preload=False))
    try:
        job = served.ended(served.draw(model="bfl:flux-2-pro", width=256, height=256, steps=None))
        assert job["state"] == "succeeded", job
        assert any("the prompt goes to 127.0.0.1" in line for line in job["remarks"])
        picture = served.ask("GET", job["pictures"][0]["url"])[2]
        assert b"cost_usd" in picture
        assert len(served.ask("GET", "/v1/models")[2]["data"]) == 2
        status, _, refused = served.ask("POST", "/v1/jobs", {"prompt": "x", "model": "bfl:flux-2-pro", "steps": 4})
        assert (status, "takes no steps" in refused["error"]["message"]) == (400, True)
        status, _, refused = served.ask("POST", "/v1/jobs", {"prompt": "x", "model": "bfl:flux-2-max"})
        assert status == 404
        provider.plays = "moderation"
        failed = served.ended(served.draw(model="bfl:flux-2-pro", width=256, height=256, steps=None))
        assert "refuses the content" in failed["error"]["message"]
    finally:
        served.stop()
    written = b"".join(path.read_bytes() for path in Path(tmp_path / "server").rglob("*") if path.is_file())
    said = capfd.readouterr()
    assert len(written) > 1000
    for text in (written.decode("latin-1"), said.out, said.err, caplog.text, json.dumps([job, failed, refused])):
        assert KEY not in text
        assert base64.b64encode(KEY.encode()).decode() not in text


def test_the_key_is_in_no_picture_manifest_error_or_repr(provide, tmp_path, capfd):
    provide("bfl")
    (tmp_path / "rows.txt").write_text("a fox\n")
    assert main(["batch", str(tmp_path / "rows.txt"), "-m", "bfl:flux-2-pro", "--out", str(tmp_path / "out")]) == 0
    for plays in remote_providers.PLAYS[2:]:
        provide("bfl", plays)
        main(["--debug", "generate", "a fox", "-m", "bfl:flux-2-pro", "-o", str(tmp_path / f"{plays}.png")])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    said = capfd.readouterr()
    assert "Traceback" in said.err  # --debug shows where, not what
    assert KEY not in written.decode("latin-1") + said.out + said.err
    remote = Remote("bfl:flux-2-pro")
    assert KEY not in repr(remote._peer()) + repr(remote) + str(vars(remote))
