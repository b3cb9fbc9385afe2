"""The OpenAPI document against its server: no 5xx answers and no undeclared answers."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image

from conftest import write_lora_folder
from inkstream.engine.files.cards import write_card
from inkstream.families import CARD
from inkstream.families.zimage.specs import BASE
from inkstream.serve.limits import Limits, Settings
from inkstream.types import Machine

schemathesis = pytest.importorskip("schemathesis", reason="THE DOCUMENT WAS NOT TRIED: pip install schemathesis")
from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402

CHECKED = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
           "response_headers_conformance"]  # fmt: skip
ENDLESS = "/v1/events"
DRAWN = {"model": "quick", "prompt": "x", "size": "32x32", "n": 1, "stream": False}
EASY: dict[str, dict[str, Any]] = {
    "/v1/jobs": {"model": "quick", "prompt": "x", "width": 32, "height": 32, "count": 1, "steps": 1, "grid": None,
                 "image": None, "mask": None, "reference": [], "strength": None, "upsample": False},
    "/v1/images/generations": DRAWN | {"output_compression": None, "partial_images": None, "steps": 1,
                                       "upsample": False},
    "/sdapi/v1/txt2img": {"prompt": "x", "width": 32, "height": 32, "steps": 1, "batch_size": 1, "n_iter": 1,
                          "sampler_name": None, "sampler_index": None, "scheduler": None, "override_settings": None},
}  # fmt: skip
"""Changes to a valid body that make it quick to draw."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory, start_server, make_folder) -> Iterator[Any]:
    """A server with one very quick model, and at least one job, picture and upload in its store."""
    spec = replace(BASE.tiny, steps=1, guidance=1.0, size=(32, 32))
    folder = make_folder(tmp_path_factory.mktemp("models") / "quick", spec)
    (folder / CARD).write_text(json.dumps(write_card(spec)))
    limits = Limits(pictures=2, steps=3, pixels=64 * 64, queue=4, body_bytes=1 << 20, prompt=500)
    loras = write_lora_folder(tmp_path_factory.mktemp("loras"))
    Image.new("RGB", (32, 32), "gold").save(loras / "styles" / "bold.png")
    machine = Machine(lora_folder=str(loras))
    data = tmp_path_factory.mktemp("schema")
    served = start_server(Settings(data, models=(f"quick={folder}",), limits=limits, machine=machine))
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(buffer, "PNG")
    job = served.ended(served.draw(model="quick"))
    served.there = {
        "/v1/jobs/": job["id"],
        "/v1/pictures/": job["pictures"][0]["id"],
        "/v1/images/": job["pictures"][0]["id"],
        "/v1/uploads/": served.ask("POST", "/v1/uploads", buffer.getvalue())[2]["id"],
        "/v1/models/": "quick",
        "/v1/loras/": "styles/bold",
    }
    yield served
    served.stop()


@pytest.fixture(scope="module")
def document(quick) -> dict[str, Any]:
    return quick.ask("GET", "/openapi.json")[2]


def complaints(served: Any, document: dict[str, Any], mode: Any, examples: int, only: str = "") -> dict[str, str]:
    """Operation -> the fault of an answer. Half of the requests use ids that exist."""
    found = {}
    load_all_checks()
    checks = CHECKS.get_by_names(CHECKED)
    for operation in (result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()):
        if operation.path == ENDLESS or not operation.path.startswith(only):
            continue

        @settings(max_examples=examples, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(case=operation.as_strategy(mode), easy=st.booleans())
        def tries(case: Any, easy: bool) -> None:
            if easy and case.path_parameters:
                name = next((there for path, there in served.there.items() if case.path.startswith(path)), None)
                case.path_parameters |= dict.fromkeys(case.path_parameters.keys() & {"id", "name"}, name)
            if easy and isinstance(case.body, dict):
                case.body |= EASY.get(case.path, {})
            answer = case.call(base_url=f"http://127.0.0.1:{served.port}", timeout=60)
            if case.path == "/v1/queue":
                served.ask("PATCH", "/v1/queue", {"paused": False})  # or all that is asked for waits
            case.validate_response(answer, checks=checks)

        try:
            tries()
        except Unsatisfiable:
            assert mode is schemathesis.GenerationMode.NEGATIVE  # there is nothing to it that could be wrong
        except BaseExceptionGroup as group:
            found[operation.label] = ascii("; ".join(str(one) for one in group.exceptions))
        except Exception as error:
            found[operation.label] = ascii(str(error))  # half a surrogate pair in a report would end its reader
    return found


def test_valid_requests_get_declared_answers(quick, document):
    assert complaints(quick, document, schemathesis.GenerationMode.POSITIVE, examples=6) == {}
    states = {job["state"] for job in quick.ask("GET", "/v1/jobs?limit=500")[2]["jobs"]}
    assert "succeeded" in states


def test_invalid_requests_are_refused_as_declared(quick, document):
    assert complaints(quick, document, schemathesis.GenerationMode.NEGATIVE, examples=5) == {}


def test_an_undeclared_answer_is_found(quick, document):
    told = copy.deepcopy(document)
    del told["paths"]["/v1/jobs/{id}"]["get"]["responses"]["404"]
    told["components"]["schemas"]["Queue"]["properties"]["paused"] = {"type": "string"}
    positive = schemathesis.GenerationMode.POSITIVE
    assert "404" in complaints(quick, told, positive, 6, "/v1/jobs/{id}")["GET /v1/jobs/{id}"]
    assert "paused" in complaints(quick, told, positive, 2, "/v1/queue")["GET /v1/queue"]


@pytest.mark.parametrize("path", ["/comfyui/api/upload/image", "/v1/images/edits"])
def test_a_form_that_cannot_be_read_is_refused(quick, path):
    form = b'--x\r\n[]: form-data; name="image"\r\n\r\n1\r\n--x--\r\n'
    assert quick.ask("POST", path, form, {"Content-Type": "multipart/form-data; boundary=x"})[0] == 400
