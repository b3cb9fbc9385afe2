"""What lies in deploy/ agrees with the program: options, folders, paths, arguments, names."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from inkstream.cli import app
from inkstream.cli.serve import serve
from inkstream.serve.api import native, status
from inkstream.serve.ray import ENGINES, Args

DEPLOY = Path(__file__).parent.parent / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
RAY: dict[str, Any] = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in text.splitlines() if line.strip()]


def understood(words: list[str]) -> dict[str, Any]:
    """What the command line makes of the words behind `inkstream serve`; it fails where it does not know one."""
    _, bound, _ = serve.parse_args(words, exit_on_error=False, print_error=False)
    return bound.arguments


def test_the_image_starts_a_server_on_the_folders_it_keeps_as_no_root():
    found = dict(instructions())
    assert json.loads(found["ENTRYPOINT"]) == ["inkstream"]
    first, *words = json.loads(found["CMD"])
    assert first == "serve"
    given = understood(words)
    kept = json.loads(found["VOLUME"])
    assert str(given["data"]) in kept
    assert str(given["api_key_file"].parent) in kept
    made = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert all(folder in made for folder in kept)
    assert re.search(r"HF_HOME=(\S+)", found["ENV"])[1] in kept  # type: ignore[index]
    assert found["USER"] == "inkstream"


def test_all_that_asks_whether_it_lives_asks_at_a_route_there_is():
    paths = {route.path for router in (status.router, native.router) for route in router.routes}  # type: ignore[attr-defined]
    asked = [json.dumps(COMPOSE["services"][name]["healthcheck"]["test"]) for name in COMPOSE["services"]]
    asked.append(next(rest for name, rest in instructions() if name == "HEALTHCHECK"))
    for text in asked:
        assert re.search(r":8400(/\w+)", text)[1] in paths  # type: ignore[index]


def test_compose_gives_every_service_the_same_server_and_one_of_them_the_card():
    services = COMPOSE["services"]
    for name, service in services.items():
        first, *words = service["command"]
        assert first == "serve"
        given = understood([re.sub(r"\$\{\w+:-(\w+)\}", r"\1", word) for word in words])
        mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
        assert set(mounts) == set(COMPOSE["volumes"])
        assert {str(given["data"]), str(given["api_key_file"].parent)} < set(mounts.values())
        assert service["profiles"] == [name]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    (device,) = services["gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "reservations" not in services["cpu"]["deploy"]["resources"]


def test_the_unit_starts_a_server_in_the_folder_the_system_makes_for_it():
    lines = dict(line.split("=", 1) for line in (DEPLOY / "inkstream.service").read_text().splitlines() if "=" in line)
    program, command, *words = shlex.split(lines["ExecStart"])
    assert Path(program).name == app.name[0]
    assert command == "serve"
    assert str(understood(words)["data"]) == f"/var/lib/{lines['StateDirectory']}"
    assert lines["Environment"] == f"HF_HOME=/var/cache/{lines['CacheDirectory']}"


def test_the_ray_service_gives_the_application_arguments_it_takes_and_names_that_it_has():
    spec = RAY["RayService"]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    args = Args.model_validate(application["args"])
    assert application["import_path"] == "inkstream.serve.ray:app"
    (server,) = application["deployments"]
    assert server["name"] != ENGINES
    assert spec["upgradeStrategy"] == {"type": "None"}

    head, (workers,) = spec["rayClusterConfig"]["headGroupSpec"], spec["rayClusterConfig"]["workerGroupSpecs"]
    assert json.loads(json.loads(head["rayStartParams"]["resources"])) == server["ray_actor_options"]["resources"]
    (container,) = head["template"]["spec"]["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in head["template"]["spec"]["volumes"]}
    assert args.key_file is not None
    assert "secret" in volumes[mounts[str(args.key_file.parent)]]
    claim = volumes[mounts[str(args.data)]]["persistentVolumeClaim"]["claimName"]
    assert claim == RAY["PersistentVolumeClaim"]["metadata"]["name"]

    assert (workers["minReplicas"], workers["maxReplicas"]) == (args.least_engines, args.most_engines)
    (engine,) = workers["template"]["spec"]["containers"]
    assert float(engine["resources"]["limits"]["nvidia.com/gpu"]) == args.gpus
    assert float(engine["resources"]["requests"]["cpu"]) == args.cpus


def test_the_ingress_leads_to_the_port_that_ray_listens_on():
    config = yaml.safe_load(RAY["RayService"]["spec"]["serveConfigV2"])
    (rule,) = RAY["Ingress"]["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    service = path["backend"]["service"]
    assert service["port"]["number"] == config["http_options"]["port"]
    assert service["name"] == f"{RAY['RayService']['metadata']['name']}-serve-svc"
