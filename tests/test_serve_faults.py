"""A killed process loses no accepted job and draws none twice. A client that leaves cancels the job it waits for."""

from __future__ import annotations

import asyncio
import http.client
import importlib.util
import io
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request as HTTPRequest
from PIL import Image

from inkstream.cli import main
from inkstream.serve.engines.process import EngineProcess
from inkstream.serve.errors import Refused
from inkstream.serve.keys import ANYONE
from inkstream.serve.limits import Limits, Settings
from inkstream.types import Request

HANGS = """import json, sys
print(json.dumps({'event': 'ready', 'seconds': 0}), flush=True)
sys.stdin.read()"""
"""An engine that accepts jobs and never sends a message about them."""
SCRIPT = Path(__file__).parent.parent / "scripts" / "serve_faults.py"


def engine(program: str) -> partial[EngineProcess]:
    """An engine that runs a Python program."""
    return partial(EngineProcess, command=(sys.executable, "-c", program))


def ordeal(folder: Path, seed: int) -> Any:
    spec = importlib.util.spec_from_file_location("serve_faults", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_faults"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module.Ordeal(folder, seed)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the engine in /proc")
def test_jobs_survive_the_death_of_the_engine_and_of_the_server(tmp_path):
    outcome = ordeal(tmp_path / "data", seed=3).run(clients=3, engine_kills=1, server_kills=1)
    assert outcome["problems"] == []
    assert outcome["pictures"] == 2 * outcome["jobs"]
    assert outcome["jobs"] >= 6  # each of the clients has two ahead
    assert outcome["at_work"] > 0


def test_an_engine_that_cannot_start_is_restarted_and_jobs_wait(tmp_path, until):
    from inkstream.serve.app import build

    async def live() -> tuple[int, str]:
        app = build(Settings(tmp_path, models=("pocket",)), make=engine("raise SystemExit(3)"))
        jobs = app.state.service.jobs
        async with app.router.lifespan_context(app):
            job = jobs.submit(ANYONE, Request(prompt="x", steps=1))
            while jobs.metrics.deaths._value.get() < 3:
                await asyncio.sleep(0.05)
            return int(jobs.metrics.deaths._value.get()), jobs.store.job(job.id).state

    assert asyncio.run(live()) == (3, "queued")


def test_a_server_whose_engine_cannot_be_made_ends_with_the_reason(tmp_path, capsys):
    words = ["serve", "--port=18411", f"--data={tmp_path}", "--model=pocket", "--dtype=int3"]
    assert main(words) == 2
    assert "int3" in capsys.readouterr().err.splitlines()[-1]


def test_a_picture_that_kills_every_engine_fails_its_job(tmp_path):
    from inkstream.serve.app import build
    from inkstream.serve.queue.jobs import DEATHS

    deadly = (
        "import json, sys; print(json.dumps({'event': 'ready', 'seconds': 0}), flush=True);"
        "[sys.exit(9) for line in sys.stdin if 'draw' in line]"
    )

    async def live() -> dict[str, Any]:
        settings = Settings(tmp_path, models=("pocket",), preload=False)
        app = build(settings, make=engine(deadly))
        jobs = app.state.service.jobs
        async with app.router.lifespan_context(app):
            job = jobs.submit(ANYONE, Request(prompt="x", steps=1))
            async for happening in jobs.follow(job.id):
                last = happening.data
            return last["error"]

    error = asyncio.run(live())
    assert f"died {DEATHS} times" in error["message"]
    assert error["type"] == "server_error"


def synchronous(server: Any) -> None:
    """Add a route that waits for its pictures, as OpenAI's routes do."""
    if any(getattr(route, "path", "") == "/v1/draw-and-wait" for route in server.app.routes):
        return
    jobs = server.service.jobs

    @server.app.post("/v1/draw-and-wait", include_in_schema=False)
    async def draw_and_wait(http: HTTPRequest) -> Any:
        request = Request.model_validate(await http.json())
        return await jobs.run(http, jobs.submit(ANYONE, request, waited=True))


def test_a_route_that_waits_answers_with_the_ended_job(server):
    synchronous(server)
    body = {"prompt": "a red circle", "width": 32, "height": 32, "steps": 1, "seed": 5}
    status, _, job = server.ask("POST", "/v1/draw-and-wait", body)
    assert (status, job["state"], job["pictures"][0]["seed"]) == (200, "succeeded", 5)


def test_a_client_that_leaves_stops_its_job_within_one_step(server, until):
    synchronous(server)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"prompt": "a red circle", "width": 128, "height": 128, "steps": 50, "count": 8}
    connection.request("POST", "/v1/draw-and-wait", json.dumps(body), {"Content-Type": "application/json"})
    running = server.service.store.active
    until(lambda: any(job.state == "running" and job.total == 8 for job in running()))
    (job,) = (job for job in running() if job.total == 8)
    events = server.events(f"/v1/jobs/{job.id}/events")
    assert next(data["step"] for _, name, data in events if name == "step") < 50
    connection.close()
    assert [name for _, name, _ in events][-1] == "cancelled"
    steps = [data["step"] for _, name, data in events if name == "step"]
    assert len(steps) < 50
    until(lambda: not server.service.jobs.drawing.runs)
    assert server.service.store.job(job.id).state == "cancelled"
    assert server.service.store.pictures_of(job.id) == []


def test_a_job_that_takes_too_long_fails_with_the_reason(tmp_path, start_server):
    served = start_server(Settings(tmp_path, models=("pocket",), limits=Limits(seconds=0.1)), engine=HANGS)
    done = served.ended(served.draw())
    assert done["state"] == "failed"
    assert "more than 0.1 s" in done["error"]["message"]
    served.stop()


def test_an_engine_that_does_not_stop_a_run_is_killed(tmp_path, start_server, until, monkeypatch):
    monkeypatch.setattr("inkstream.serve.queue.drawing.GRACE", 0.1)
    served = start_server(Settings(tmp_path, models=("pocket",)), engine=HANGS)
    job = served.draw()
    until(lambda: served.ask("DELETE", f"/v1/jobs/{job['id']}")[2]["started"])
    until(lambda: b"inkstream_engine_deaths_total 1.0" in served.ask("GET", "/metrics")[2])
    assert served.ask("GET", f"/v1/jobs/{job['id']}")[2]["state"] == "cancelled"
    served.stop()


def test_a_stopping_server_ends_its_streams_and_the_next_one_draws_its_jobs(tmp_path, start_server, until):
    served = start_server(Settings(tmp_path, models=("pocket",)), engine=HANGS)
    job = served.draw()
    events = served.events(f"/v1/jobs/{job['id']}/events")
    until(lambda: served.ask("GET", f"/v1/jobs/{job['id']}")[2]["state"] == "running")
    served.stop()
    assert {name for _, name, _ in events} <= {"queued", "loading"}
    again = start_server(Settings(tmp_path, models=("pocket",)), engine="input()")
    waiting = again.ask("GET", f"/v1/jobs/{job['id']}")[2]
    assert (waiting["state"], waiting["position"]) == ("queued", 0)
    again.stop()


def test_a_missing_upload_fails_only_its_own_job(server):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(buffer, "PNG")
    upload = server.ask("POST", "/v1/uploads", buffer.getvalue())[2]
    server.ask("PATCH", "/v1/queue", {"paused": True})
    job, other = server.draw(image=f"upload:{upload['id']}"), server.draw()
    for file in server.service.store.uploads.glob(f"{upload['id']}*"):
        file.unlink()
    server.ask("PATCH", "/v1/queue", {"paused": False})
    assert "upload it again" in server.ended(job)["error"]["message"]
    assert server.ended(other)["state"] == "succeeded"


def test_only_requests_that_wait_for_a_stopping_server_are_refused(tmp_path):
    from inkstream.serve.app import build

    async def live() -> int:
        app = build(Settings(tmp_path, models=("pocket",)), make=engine("input()"))
        jobs = app.state.service.jobs

        async def never() -> dict[str, str]:
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async with app.router.lifespan_context(app):
            job = jobs.submit(ANYONE, Request(prompt="x", steps=1), waited=True)
            waiting = asyncio.create_task(jobs.run(HTTPRequest({"type": "http"}, never), job))  # type: ignore[arg-type]
            await asyncio.sleep(0.2)
            jobs.feed.close()
            with pytest.raises(Refused) as refused:
                await waiting
            assert jobs.store.job(job.id).state == "queued"
            return refused.value.status

    assert asyncio.run(live()) == 503


def test_an_engine_that_has_drawn_before_it_dies_is_restarted_at_once():
    draws = "import json; print(json.dumps({'event': 'picture'}), flush=True)"

    async def deaths_of(program: str, seconds: float) -> int:
        deaths = []
        kept = EngineProcess({}, lambda message: None, lambda: deaths.append(1), (sys.executable, "-S", "-c", program))
        kept.start()
        await asyncio.sleep(seconds)
        await kept.stop()
        return len(deaths)

    assert asyncio.run(deaths_of(draws, 3.0)) > asyncio.run(deaths_of("pass", 3.0)) + 3
