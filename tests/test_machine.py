"""A Machine's options come to the engine from the library, the command line, the server and Ray alike."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from pydantic import ValidationError

from inkstream import Machine, load
from inkstream.cli import main
from inkstream.cli.machine import Anywhere, make_engine
from inkstream.engine.machine.placement import PHASES
from inkstream.families import FAMILIES, family_of
from inkstream.serve import app
from inkstream.serve.engines.worker import make_engine as make_workers_engine
from inkstream.serve.ray import Args
from inkstream.types import InputError

ALL = Machine(
    "cpu", "bf16", "8GiB", "parked", "sdpa", True, True, "t5.safetensors", "ae.safetensors", "loras", "nets", "nets2",
    ("a:0.5", "b"), "cards", "http://127.0.0.1:7", "http://127.0.0.1:9/v1", "qwen3", 0.5,
)  # fmt: skip


def test_every_option_has_a_value_here_that_is_not_its_default():
    defaults = asdict(Machine())
    assert [name for name, value in asdict(ALL).items() if value == defaults[name]] == []


def test_the_server_hands_every_option_on(monkeypatch, tmp_path):
    settings = []

    def build(given):
        settings.append(given)
        raise InputError("no server is needed here")

    monkeypatch.setattr(app, "build", build)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loras").mkdir()
    for file in (ALL.text_encoder, ALL.vae, "loras/a.safetensors", "loras/b.safetensors"):
        (tmp_path / file).touch()
    words = ["--device=cpu", "--dtype=bf16", "--memory=8GiB", "--placement=parked", "--attention=sdpa", "--compile",
             "--commercial-only", "--text-encoder=t5.safetensors", "--vae=ae.safetensors", "--lora-folder=loras",
             "--control-folder=nets", "--upscaler-folder=nets2", "--merge-lora=a:0.5", "--merge-lora=b",
             "--wildcards=cards", "--text-encoder-server=http://127.0.0.1:7",
             "--enhancer=http://127.0.0.1:9/v1", "--enhancer-model=qwen3", "--max-cost=0.5"]  # fmt: skip
    assert main(["serve", f"--data={tmp_path}", *words]) == 2
    assert settings[0].machine == ALL
    engine = make_workers_engine(asdict(settings[0].machine))
    assert engine.machine == ALL
    assert engine.previews


def test_ray_takes_the_options_as_a_table_or_as_json():
    assert Args.model_validate({"data": "x", "machine": asdict(ALL)}).machine == ALL
    assert Args.model_validate({"data": "x", "machine": '{"device": "cpu", "compile": true}'}).machine == Machine(
        "cpu", compile=True
    )
    assert Args.model_validate({"data": "x"}).machine == Machine()
    for wrong in ("cpu", '{"devise": "cpu"}'):
        with pytest.raises(ValidationError, match="machine"):
            Args.model_validate({"data": "x", "machine": wrong})


def test_the_command_line_hands_every_option_on():
    machine = make_engine(Anywhere(**asdict(ALL))).machine
    assert {name: getattr(machine, name) for name in asdict(ALL)} == asdict(ALL)


def test_the_attention_comes_to_the_transformer(tiny_folder):
    for name in ("auto", "sdpa"):
        transformer = load(tiny_folder, Machine("cpu", attention=name)).family.transformer
        assert transformer.attention_by == name


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine("cpu", attention="flash3"), "attention flash3 is not available on cpu: .* Or take auto"),
        (Machine("cpu", attention="quick"), "attention quick is not known: take auto, sdpa"),
        (Machine("cpu", memory="lots"), "'lots' is not a memory size: write it like 4GiB"),
        (Machine("cpu", placement="here"), "placement here is not known: take resident, parked, streamed"),
        (Machine("cpu", "int3"), "dtype int3 is not supported: take float32"),
        (Machine("abacus"), "device abacus is not known: take cpu, cuda"),
    ],
)
def test_an_option_that_cannot_be_had_is_named_with_the_remedy(machine, said):
    with pytest.raises(InputError, match=said):
        make_engine(machine)


def test_attention_kernels_are_tried_out_only_where_one_is_asked_for(monkeypatch):
    tried = []
    monkeypatch.setattr("inkstream.nn.attention.backends_on", lambda device: tried.append(device) or ("sdpa",))
    make_engine(Machine("cpu"))
    assert tried == []
    make_engine(Machine("cpu", attention="sdpa"))
    assert tried != []


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_works_in_phases_that_there_are(name):
    phases = {part: part_of.phases for part, part_of in family_of(name).parts.items()}
    assert all(set(own) <= set(PHASES) and own for own in phases.values()), phases
    assert phases["transformer"] == ("steps",)
    assert phases["vae"] == ("prompt", "picture")  # it encodes pictures to start from
