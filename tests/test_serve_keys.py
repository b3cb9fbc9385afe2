"""Access and its limits: keys, quotas, addresses, origins, sizes."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import os
import stat
import time
import urllib.request
from ipaddress import ip_address

import pytest

from inkstream.cli import main
from inkstream.serve.api.fetch import fetch, is_public
from inkstream.serve.app import OPEN, build
from inkstream.serve.errors import Refused
from inkstream.serve.keys import Keys, add_key, is_signed, read_keys, remove_key, sign
from inkstream.serve.limits import Limits, Settings
from inkstream.types import InputError


@pytest.fixture(scope="module")
def keyed(tmp_path_factory, start_server):
    """A server with keys and an engine that draws nothing, and the keys by name."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = {
        "ann": add_key(folder / "keys.json", "ann", 0.0, pictures_per_day=4, queued=2),
        "bob": add_key(folder / "keys.json", "bob", 0.0, per_minute=2, priority=3),
        "root": add_key(folder / "keys.json", "root", 0.0, admin=True, priority=10),
    }
    served = start_server(Settings(folder, models=("pocket",), limits=Limits(queue=5)), engine="input()")
    yield served, {name: {"Authorization": f"Bearer {key}"} for name, key in keys.items()}
    served.stop()


def test_only_hashes_of_keys_are_stored_in_a_file_that_only_its_owner_reads(tmp_path):
    path = tmp_path / "keys.json"
    text = add_key(path, "ann", 1.0)
    assert text.split("_", 2)[2] not in path.read_text()
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    keys = Keys(path)
    assert keys.remembered(text) is None
    assert keys.check(text).name == "ann"
    assert keys.remembered(text).name == "ann"
    assert keys.check(text[:-1] + ("a" if text[-1] != "a" else "b")) is None
    assert keys.check("ink_00000000_" + "a" * 43) is None
    assert keys.check("something else") is None


def test_keys_are_made_and_removed_while_a_server_runs(tmp_path):
    path = tmp_path / "keys.json"
    keys = Keys(path)
    assert not keys
    text = add_key(path, "ann", 1.0)
    assert keys
    assert keys.check(text).name == "ann"
    remove_key(path, "ann")
    assert keys.remembered(text) is None
    assert keys.check(text) is None


def test_a_key_name_is_valid_and_used_once(tmp_path):
    add_key(tmp_path / "keys.json", "ann", 1.0)
    with pytest.raises(InputError, match="already"):
        add_key(tmp_path / "keys.json", "ann", 1.0)
    with pytest.raises(InputError, match="not a valid key name"):
        add_key(tmp_path / "keys.json", "a b", 1.0)
    with pytest.raises(InputError, match="the keys are ann"):
        remove_key(tmp_path / "keys.json", "bob")


def test_the_command_line_makes_lists_and_removes_keys(tmp_path, capsys):
    where = ["--data", str(tmp_path)]
    assert main(["serve", "keys", "add", "ann", "--per-minute=30", *where]) == 0
    text = capsys.readouterr().out.strip()
    assert Keys(tmp_path / "keys.json").check(text).per_minute == 30
    assert main(["serve", "keys", "list", "--json", *where]) == 0
    assert [key["name"] for key in json.loads(capsys.readouterr().out)] == ["ann"]
    assert main(["serve", "keys", "list", *where]) == 0
    assert text not in capsys.readouterr().out
    assert main(["serve", "keys", "remove", "ann", *where]) == 0
    assert read_keys(tmp_path / "keys.json") == []
    assert main(["serve", "keys", "remove", "ann", *where]) == 2


def test_an_address_that_others_reach_is_refused_without_a_key(tmp_path, capsys):
    for host in ("0.0.0.0", "192.168.1.4", "::", "example.org"):
        assert main(["serve", "--host", host, "--data", str(tmp_path)]) == 2
        assert "inkstream serve keys add" in capsys.readouterr().err
    add_key(tmp_path / "keys.json", "ann", 1.0)
    build(Settings(tmp_path, host="0.0.0.0", models=("pocket",))).state.service.store.close()


def test_the_document_says_which_routes_ask_for_a_key(tmp_path):
    app = build(Settings(tmp_path, models=("pocket",)))
    app.state.service.store.close()
    paths = app.openapi()["paths"]
    asking = {path for path, operations in paths.items() if all("security" in one for one in operations.values())}
    assert {*paths} - asking == {"/healthz", "/readyz"}
    assert {*paths} - asking == {*paths} & {*OPEN}


def test_removing_the_last_key_does_not_open_a_running_server(tmp_path, start_server):
    add_key(tmp_path / "keys.json", "ann", 0.0)
    served = start_server(Settings(tmp_path, models=("pocket",)), engine="input()")
    assert served.ask("GET", "/v1/jobs")[0] == 401
    remove_key(tmp_path / "keys.json", "ann")
    assert served.ask("GET", "/v1/jobs")[0] == 401
    (tmp_path / "keys.json").unlink()
    assert served.ask("GET", "/v1/jobs")[0] == 401
    served.stop()


def test_no_redirect_uses_the_host_header(keyed):
    server, keys = keyed
    assert server.ask("GET", "/v1/jobs/", headers={**keys["ann"], "Host": "evil.example"})[0] == 404


def test_an_open_stream_of_a_removed_key_ends(tmp_path, start_server, monkeypatch):
    monkeypatch.setattr("inkstream.serve.queue.jobs.PING", 0.5)
    path = tmp_path / "keys.json"
    texts = {name: add_key(path, name, 0.0, admin=name == "root") for name in ("root", "bob")}
    served = start_server(Settings(tmp_path, models=("pocket",)), engine="input()")
    try:
        address = f"http://127.0.0.1:{served.port}/v1/events"
        asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {texts['root']}"})
        with urllib.request.urlopen(asked, timeout=30) as events:
            remove_key(path, "root")
            bob = {"Authorization": f"Bearer {texts['bob']}", "Content-Type": "application/json"}
            assert served.ask("POST", "/v1/jobs", b'{"prompt": "of bob"}', bob)[0] in (200, 201, 202)
            assert b"of bob" not in events.read()  # which ends
    finally:
        served.stop()


def test_a_websocket_at_an_unknown_path_is_closed(tmp_path):
    app = build(Settings(tmp_path, models=("pocket",)))
    app.state.service.store.close()
    told = []

    async def ask() -> None:
        async def send(message):
            told.append(message)

        async def receive():
            return {"type": "websocket.connect"}

        scope = {"type": "websocket", "path": "/v1/events", "headers": [(b"host", b"localhost")], "query_string": b""}
        await app(scope, receive, send)

    asyncio.run(ask())
    assert [message["type"] for message in told] == ["websocket.close"]


def test_a_request_without_a_valid_key_is_refused(keyed):
    server, keys = keyed
    for headers in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Bearer ink_00000000_" + "a" * 43}):
        status, found, body = server.ask("GET", "/v1/jobs", headers=headers)
        assert (status, body["error"]["type"]) == (401, "authentication_error")
        assert found["www-authenticate"] == "Bearer"
    assert server.ask("GET", "/healthz")[0] == 200
    assert server.ask("GET", "/v1/jobs", headers=keys["ann"])[0] == 200


def test_a_key_may_come_as_a_password_or_in_a_cookie(keyed):
    server, keys = keyed
    key = keys["ann"]["Authorization"].partition(" ")[2]
    basic = base64.b64encode(f"anyone:{key}".encode()).decode()
    assert server.ask("GET", "/v1/jobs", headers={"Authorization": f"Basic {basic}"})[0] == 200
    assert server.ask("GET", "/v1/jobs", headers={"Authorization": "Basic %%%"})[0] == 401
    status, found, _ = server.ask("POST", "/v1/session", headers=keys["ann"])
    assert status == 204
    assert "HttpOnly" in found["set-cookie"]
    assert "SameSite=strict" in found["set-cookie"]
    cookie = {"Cookie": found["set-cookie"].partition(";")[0]}
    assert server.ask("GET", "/v1/jobs", headers=cookie)[0] == 200
    foreign = {**cookie, "Origin": "https://evil.example"}
    assert server.ask("PATCH", "/v1/queue", {"paused": True}, foreign)[0] == 403
    remembered = {"Authorization": f"Basic {basic}", "Origin": "https://evil.example"}  # as browsers do
    assert server.ask("POST", "/v1/session", headers=remembered)[0] == 403
    assert server.ask("POST", "/v1/session", headers={**keys["ann"], "Origin": "https://evil.example"})[0] == 204


def test_a_key_sees_its_own_jobs_and_an_admins_sees_all(keyed):
    server, keys = keyed
    body = {"prompt": "x", "width": 32, "height": 32, "steps": 1}
    job = server.ask("POST", "/v1/jobs", body, keys["ann"])[2]
    assert (job["key"], job["state"]) == ("ann", "queued")
    assert server.ask("GET", f"/v1/jobs/{job['id']}", headers=keys["bob"])[0] == 404
    assert server.ask("DELETE", f"/v1/jobs/{job['id']}", headers=keys["bob"])[0] == 404
    assert server.ask("GET", "/v1/jobs", headers=keys["bob"])[2]["jobs"] == []
    assert server.ask("GET", "/v1/queue", headers=keys["bob"])[2]["queued"] == []
    assert server.ask("GET", f"/v1/jobs/{job['id']}", headers=keys["root"])[2] == job
    assert server.ask("PATCH", "/v1/queue", {"paused": False}, keys["ann"])[0] == 403
    assert server.ask("GET", "/metrics", headers=keys["ann"])[0] == 403
    assert b"inkstream_queue_jobs" in server.ask("GET", "/metrics", headers=keys["root"])[2]
    assert server.ask("DELETE", f"/v1/jobs/{job['id']}", headers=keys["ann"])[2]["state"] == "cancelled"


def test_a_key_cannot_use_the_uploads_of_another_key(keyed):
    import io

    from PIL import Image

    server, keys = keyed
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    a, b = (server.ask("POST", "/v1/uploads", buffer.getvalue(), keys[name])[2]["id"] for name in ("ann", "bob"))
    assert a != b
    assert server.ask("GET", f"/v1/uploads/{a}", headers=keys["ann"])[0] == 200
    assert server.ask("GET", f"/v1/uploads/{a}", headers=keys["bob"])[0] == 404
    body = {"prompt": "x", "image": f"upload:{a}", "steps": 1}
    assert server.ask("POST", "/v1/jobs", body, keys["root"])[0] == 202
    status, _, answer = server.ask("POST", "/v1/jobs", body, keys["bob"])
    assert (status, answer["error"]["code"]) == (400, "no_upload")


def test_quota_rate_priority_and_queue_limits_are_enforced(keyed):
    server, keys = keyed
    for job in server.ask("GET", "/v1/queue", headers=keys["root"])[2]["queued"]:
        server.ask("DELETE", f"/v1/jobs/{job['id']}", headers=keys["root"])
    body = {"prompt": "x", "width": 32, "height": 32, "steps": 1}

    def ask(name, **more):
        status, headers, answer = server.ask("POST", "/v1/jobs", {**body, **more}, keys[name])
        assert ("retry-after" in headers) == (status == 429)
        return answer["state"] if status == 202 else answer["error"]["code"]

    assert ask("ann", count=5) == "insufficient_quota"
    assert [ask("ann", count=3), ask("ann"), ask("ann")] == ["queued", "queued", "queue_full"]
    status, _, answer = server.ask("POST", "/v1/jobs", {**body, "priority": 4}, keys["bob"])
    assert (status, answer["error"]["param"]) == (403, "priority")
    assert [ask("bob", priority=3), ask("bob"), ask("bob")] == ["queued", "queued", "rate_limit_exceeded"]
    assert [ask("root"), ask("root")] == ["queued", "queue_full"]


def test_a_rate_limit_recovers_with_time(tmp_path):
    add_key(tmp_path / "keys.json", "bob", 0.0, per_minute=2)
    keys = Keys(tmp_path / "keys.json")
    (key,) = keys.all()
    keys.spend(key, 100.0)
    keys.spend(key, 100.0)
    with pytest.raises(Refused) as refused:
        keys.spend(key, 110.0)
    assert refused.value.retry_after == 20
    keys.spend(key, 130.0)


def test_a_signature_opens_one_path_until_its_time():
    signature = sign("secret", "/v1/pictures/p1/file", 1000)
    assert is_signed("secret", "/v1/pictures/p1/file", "1000", signature, 999.0)
    assert not is_signed("secret", "/v1/pictures/p1/file", "1000", signature, 1001.0)
    assert not is_signed("secret", "/v1/pictures/p1/file", "1001", signature, 999.0)
    assert not is_signed("secret", "/v1/pictures/p2/file", "1000", signature, 999.0)
    assert not is_signed("other", "/v1/pictures/p1/file", "1000", signature, 999.0)


def test_a_signed_path_needs_no_key_and_any_other_path_does(keyed):
    server, _ = keyed
    path = server.service.jobs.signed("/v1/pictures/p1/file")
    assert server.ask("GET", path)[0] == 404  # the signature is accepted, but there is no such picture
    assert server.ask("GET", path.replace("p1", "p2"))[0] == 401
    assert server.ask("DELETE", path)[0] == 401


def test_without_keys_only_this_machines_own_names_are_answered(server):
    assert server.ask("GET", "/v1/jobs", headers={"Host": f"localhost:{server.port}"})[0] == 200
    assert server.ask("GET", "/v1/jobs", headers={"Host": f"[::1]:{server.port}"})[0] == 200
    status, _, body = server.ask("GET", "/v1/jobs", headers={"Host": "evil.example"})
    assert (status, body["error"]["type"]) == (403, "permission_error")


def test_pages_of_other_sites_cannot_change_anything(server):
    body = {"prompt": "x", "steps": 1, "width": 32, "height": 32}
    assert server.ask("POST", "/v1/jobs", body, {"Origin": "https://evil.example"})[0] == 403
    assert server.ask("POST", "/v1/jobs", body, {"Origin": "null"})[0] == 403
    status, _, job = server.ask("POST", "/v1/jobs", body, {"Origin": f"http://127.0.0.1:{server.port}"})
    assert status == 202
    server.ended(job)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    status, _, body = server.ask("POST", "/v1/uploads", b"x" * (5 << 20))
    assert (status, body["error"]["type"]) == (413, "invalid_request_error")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    pieces = (b"x" * (1 << 20) for _ in range(6))  # chunked, so there is no Content-Length
    try:
        connection.request("POST", "/v1/uploads", pieces, encode_chunked=True, headers={"Transfer-Encoding": "chunked"})
        assert connection.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError):  # it may also hang up on us
        pass
    finally:
        connection.close()


def test_a_body_that_does_not_arrive_is_refused(tmp_path, start_server):
    served = start_server(Settings(tmp_path, models=("pocket",), limits=Limits(body_seconds=0.2)), engine="input()")
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    connection.putrequest("POST", "/v1/uploads")
    connection.putheader("Content-Length", "100")
    connection.endheaders()
    began = time.monotonic()
    assert connection.getresponse().status == 408
    assert time.monotonic() - began < 10
    connection.close()
    served.stop()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_private_addresses_are_told_from_public_ones_however_they_are_written(address, public):
    assert is_public(ip_address(address)) == public


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/x.png", "http://localhost/x.png", "http://[::1]/x.png", "http://2130706433/x.png", "ftp://a/x",
     "http://example.org:22/x", "http://user@example.org/x", "http://10.0.0.1/x", "https:///x", "http://[::ffff:7f00:1]/"],
)  # fmt: skip
def test_pictures_are_fetched_from_no_private_address(url):
    with pytest.raises(Refused) as refused:
        fetch(url)
    assert refused.value.status == 400
