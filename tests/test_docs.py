"""The pages say what the code does: options, links, commands."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from inkstream.cli import app
from inkstream.cli.generate import NAMES, Wish
from inkstream.engine.files.cards import write_card
from inkstream.engine.files.licences import FREE
from inkstream.families import SPECS
from inkstream.types import Request

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

LIFE = ROOT / "docs" / "life-of-a-request.md"
NAMED = r"`(?:src/inkstream/)?([\w/]+\.py)(?::([\w.]+))?`"
"""A file of the package, and mostly a function in it."""


def renderer():
    spec = importlib.util.spec_from_file_location("render_docs", ROOT / "scripts" / "render_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_command_line_is_what_the_code_renders():
    assert (ROOT / "docs" / "cli.md").read_text() == renderer().render(), "run python scripts/render_docs.py"


def test_the_table_of_models_is_what_the_code_renders():
    page = (ROOT / "docs" / "models.md").read_text()
    assert page.partition(renderer().KNOWN)[2] == renderer().models(), "run python scripts/render_docs.py"


def test_the_tables_of_what_was_measured_are_the_records():
    for page in (path.read_text() for path in PAGES):
        assert page == renderer().fill(page, ROOT / "benchmarks" / "records"), "run python scripts/render_docs.py"


def test_the_page_of_the_models_names_every_key_of_a_card_and_every_ability():
    page = (ROOT / "docs" / "models.md").read_text()
    abilities = {ability for spec in SPECS.values() for ability in spec.abilities}
    assert [name for name in (*write_card(SPECS["z-image"]), *abilities, *FREE) if name not in page] == []


def test_every_field_of_a_request_is_an_option_of_generate_with_its_description():
    options = {argument.name: argument for argument in renderer().arguments("generate")}
    for name, field in Request.model_fields.items():
        option = options[NAMES.get(name) or "--" + name.replace("_", "-")]
        assert option.parameter.help == field.description
        assert option.field_info.default == field.default


def test_options_do_not_leak_into_the_request_itself():
    assert list(Wish.model_fields) == list(Request.model_fields)
    assert not any(field.kw_only for field in Request.model_fields.values())


def test_every_option_says_what_it_means():
    render = renderer()
    silent = [
        f"{command} {argument.name}"
        for command in render.commands()
        for argument in render.arguments(command)
        if not argument.parameter.help
    ]
    assert silent == []


def test_ci_runs_the_test_command_of_the_readme_and_the_slow_tests_too():
    command = re.search(r"pip install -e '\.\[dev,parity\]' && (.+?)  +# tests", (ROOT / "README.md").read_text())
    assert command is not None
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == f"{command[1]} -m ''"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_our_own_files_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_life_of_a_request_names_files_and_functions_that_there_are():
    steps = re.findall(r"^(\d+)\. (.*?)(?=^\d+\. |^## )", LIFE.read_text(), re.DOTALL | re.MULTILINE)
    assert [int(number) for number, _ in steps] == [*range(1, 5), *range(1, 7), *range(7, 22)]  # A, B, and from there
    assert [number for number, text in steps if not re.search(NAMED, text)] == []
    assert [":".join(named) for named in re.findall(NAMED, LIFE.read_text()) if not is_there(*named)] == []
    assert not is_there("engine/drawing/model.py", "Model.no_such_function")
    assert not is_there("engine/no_such_file.py", "")


def is_there(file: str, name: str) -> bool:
    """Whether a file of the package defines a function or a class, or a class's function as `Class.function`."""
    path = ROOT / "src" / "inkstream" / file
    if not path.is_file():
        return False
    body: list[ast.stmt] = ast.parse(path.read_text()).body
    for part in filter(None, name.split(".")):
        found = next((node for node in body if getattr(node, "name", None) == part), None)
        if found is None:
            return False
        body = getattr(found, "body", [])
    return True


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/tutorial.md", "docs/tutorial.zh.md"])
def test_the_commands_shown_to_newcomers_are_understood(page):
    found = r"^(?:pip install .* && |echo .* \| )?(inkstream (?:'[^'\n]*'|\"[^\"\n]*\"|[^|#'\"\n])+)"
    lines = [line for line in re.findall(found, (ROOT / page).read_text(), re.MULTILINE) if " keys " not in line]
    assert len(lines) > 1
    for line in lines:
        words = shlex.split(line)[1:]
        command, _, _ = app.parse_args(
            ["--prompt=-" if word == "-" else word for word in words], exit_on_error=False, print_error=False
        )
        assert command.__name__ == {"eval": "evaluate", "serve": "run"}.get(words[0], words[0])
