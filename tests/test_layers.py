"""The layers hold: nothing imports upwards, families stay apart, the front ends start without torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

LAYERS = [["types", "flow", "disk", "quant", "pocket"], ["nn", "weights"], ["sampling", "families"], ["engine"],
          ["clients", "train", "evaluate", "bench", "serve", "advice"], ["cli"], ["__main__"]]  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
STRANGERS = [{"nn", "weights"}, {"sampling", "families"}]
"""Layers of one rank that do not know each other either."""
ROOMS = {
    "engine": ["pictures", "files", "drawing", "machine"],
    "serve": ["engines", "queue", "api"],
}
"""The rooms of a layer, low to high. Modules beside the rooms are above or below them; `circles` keeps them apart."""
FRONT_ENDS = ("clients", "serve", "cli")
WITHOUT_TORCH = ("inkstream", "inkstream.types", "inkstream.families", *(f"inkstream.{name}" for name in FRONT_ENDS))
SURROUNDINGS = {
    "os": {"environ", "environb", "getenv"},
    "sys": {"argv"},
    "time": {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time"},
    "datetime": {"datetime", "date"},
}
"""What only the engine and those above it may read: the environment, the command line, the clock."""

Sources = dict[str, str]
"""Module name -> its source; a package goes by its own name."""


def read_sources() -> Sources:
    sources = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        sources[name.removesuffix(".__init__")] = path.read_text()
    return sources


def imports(module: str, tree: ast.AST, is_package: bool) -> Iterator[tuple[str, ast.AST]]:
    """Every name a tree imports, absolute; `from a import b` gives a.b, which may be a module or a name in one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{origin}.{alias.name}", node


def imported_modules(sources: Sources, module: str, tree: ast.AST | None = None) -> set[str]:
    """Our own modules among what a module imports anywhere in it, or in one tree of it."""
    is_package = any(name.startswith(module + ".") for name in sources)
    found = set()
    for name, _ in imports(module, tree or ast.parse(sources[module]), is_package):
        while name and name not in sources:
            name = name.rpartition(".")[0]
        found |= {name} - {""}
    return found


def layer(module: str) -> str:
    """The layer of a module; of the front door itself, which loads its names on first use, ''."""
    return module.split(".")[1] if "." in module else ""


def upward_arrows(sources: Sources) -> list[str]:
    arrows = []
    for module in sources:
        here = layer(module)
        if not here:
            continue
        assert here in RANK, f"{module} lies in no layer"
        for target in imported_modules(sources, module):
            there = layer(target)
            if not there or there == here:
                continue
            if RANK[there] > RANK[here] or {here, there} in STRANGERS:
                arrows.append(f"{module} -> {target}")
    return arrows


def upward_arrows_between_rooms(sources: Sources) -> list[str]:
    def rank(module: str, house: str) -> int:
        parts = module.split(".")
        return ROOMS[house].index(parts[2]) if layer(module) == house and parts[2:] and parts[2] in ROOMS[house] else -1

    return [
        f"{module} -> {target}"
        for house in ROOMS
        for module in sources
        if (here := rank(module, house)) >= 0
        for target in imported_modules(sources, module)
        if rank(target, house) > here
    ]


def arrows_between_families(sources: Sources) -> list[str]:
    shared = ("flux_autoencoder", "nets", "parts", "qwen3_vl", "references", "scheduler")

    def family(module: str) -> str:
        parts = module.split(".")
        return parts[2] if len(parts) > 2 and parts[1] == "families" and parts[2] not in shared else ""

    return [
        f"{module} -> {target}"
        for module in sources
        if family(module)
        for target in imported_modules(sources, module)
        if family(target) not in ("", family(module))
    ]


def families_named_by_the_engine(sources: Sources) -> list[str]:
    words = re.compile(r"\b(zimage|flux\d?)\b", re.IGNORECASE)
    return [
        f"{module}: {line.strip()}"
        for module, source in sources.items()
        if layer(module) == "engine"
        for line in source.splitlines()
        if words.search(line)
    ]


def statements_run_on_import(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements outside functions and outside `if TYPE_CHECKING`."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            pending += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            pending += [s for handler in getattr(node, "handlers", []) for s in handler.body]
        else:
            yield node


def path_to_torch(sources: Sources, module: str) -> list[str]:
    """The chain of modules through which importing this one imports torch; empty if it does not."""
    pending, seen = [[module]], set()
    while pending:
        path = pending.pop()
        here = path[-1]
        if here in seen:
            continue
        seen.add(here)
        parents = [here.rsplit(".", n)[0] for n in range(1, here.count(".") + 1)]
        pending += [[*path, parent] for parent in parents]
        is_package = any(name.startswith(here + ".") for name in sources)
        for statement in statements_run_on_import(ast.parse(sources[here])):
            if any(name.split(".")[0] == "torch" for name, _ in imports(here, statement, is_package)):
                return [*path, "torch"]
            pending += [[*path, target] for target in imported_modules(sources, here, statement)]
    return []


def reads_of_the_surroundings(sources: Sources) -> list[str]:
    found = []
    for module, source in sources.items():
        if RANK.get(layer(module), 9) >= RANK["engine"]:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names = [(node.value.id, node.attr)]
            elif isinstance(node, ast.ImportFrom):
                names = [(node.module, alias.name) for alias in node.names]
            else:
                continue
            found += [f"{module}:{node.lineno}: {a}.{b}" for a, b in names if b in SURROUNDINGS.get(a or "", ())]
    return found


def circles(sources: Sources) -> list[str]:
    """Modules that import each other, wherever in them; but for the front door, which loads its names on first use."""
    pending = {
        module: {target for target in imported_modules(sources, module) if layer(target) and target != module}
        for module in sources
        if layer(module)
    }
    while True:
        imported = {target for targets in pending.values() for target in targets}
        in_one = {m for m, targets in pending.items() if targets & pending.keys() and m in imported}
        if len(in_one) == len(pending):
            return sorted(pending)
        pending = {module: targets & in_one for module, targets in pending.items() if module in in_one}


REMEMBERED = {
    "inkstream.nn.gpu: fused_devices": "emptied by whoever wants all to be computed plainly: tests, and a user's trial",
}
"""What a module may hold that changes, beside what `lru_cache` and `cache` remember of functions."""
MUTABLE = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "WeakValueDictionary",
           "WeakKeyDictionary", "local", "Lock", "RLock", "Condition", "Event", "Queue", "SimpleQueue",
           "ContextVar"}  # fmt: skip
CHANGES = {"append", "appendleft", "add", "update", "pop", "popleft", "popitem", "clear", "setdefault", "extend",
           "insert", "remove", "discard", "sort", "reverse", "set", "put"}  # fmt: skip


def state_of_modules(sources: Sources) -> list[str]:
    """What modules remember between calls: names that functions bind anew or change, and whatever is made to be.

    A table (SOLVERS) is named in capitals, and nobody changes it.
    """
    found = []
    for module, source in sources.items():
        tree = ast.parse(source)
        bound = {name: value for node in tree.body for name, value in bindings(node)}
        found += [f"{module}: {name}" for name, value in bound.items() if is_state(name, value)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                found += [f"{module}: {name}" for name in node.names]
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                own = names_of(function)
                found += [f"{module}: {name}" for name in changed(function) if name in bound and name not in own]
    return sorted({name for name in found if name not in REMEMBERED})


def bindings(node: ast.stmt) -> Iterator[tuple[str, ast.expr | None]]:
    """Names that a statement of a module binds, and to what."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        if isinstance(target, ast.Name) and isinstance(node, ast.Assign | ast.AnnAssign):
            yield target.id, node.value


def is_state(name: str, value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        made = value.func.attr if isinstance(value.func, ast.Attribute) else getattr(value.func, "id", "")
        return made in MUTABLE and (not name.isupper() or made not in ("dict", "list", "set"))
    containers = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    return isinstance(value, containers) and name.lstrip("_").islower() and not name.startswith("__")


def names_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """What is a function's own: parameters, and what it binds."""
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return stored | {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}


def changed(function: ast.AST) -> Iterator[str]:
    """Names whose value, not binding, is changed in a function."""
    for node in ast.walk(function):
        places: list[ast.expr] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            places = [node.func.value]
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            places = [node.value]
        yield from (place.id for place in places if isinstance(place, ast.Name))


def test_no_import_runs_back_up_the_layers():
    assert upward_arrows(read_sources()) == []


def test_no_import_runs_back_up_the_rooms_of_a_layer():
    sources = read_sources()
    assert upward_arrows_between_rooms(sources) == []
    assert all(f"inkstream.{house}.{room}" in sources for house, rooms in ROOMS.items() for room in rooms)


def test_families_do_not_import_each_other():
    assert arrows_between_families(read_sources()) == []


def test_the_engine_names_no_family():
    assert families_named_by_the_engine(read_sources()) == []


def test_no_modules_import_each_other():
    assert circles(read_sources()) == []


def test_no_module_remembers_anything_between_calls_but_what_is_declared():
    sources = read_sources()
    assert state_of_modules(sources) == []
    for declared in REMEMBERED:
        module, _, name = declared.partition(": ")
        assert name in {bound for node in ast.parse(sources[module]).body for bound, _ in bindings(node)}


def test_front_ends_types_and_the_table_of_models_are_imported_without_torch():
    sources = read_sources()
    modules = [name for name in sources if name in WITHOUT_TORCH or layer(name) in FRONT_ENDS]
    assert "inkstream.types" in modules
    assert "inkstream.families" in modules
    assert [path for module in modules if (path := path_to_torch(sources, module))] == []


def test_nothing_below_the_engine_reads_the_environment_the_command_line_or_the_clock():
    assert reads_of_the_surroundings(read_sources()) == []


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (upward_arrows, "inkstream.nn.rope", "from inkstream.engine.drawing import model"),
        (upward_arrows, "inkstream.types", "def f():\n    from inkstream.nn.rope import rotate"),
        (upward_arrows, "inkstream.weights.files", "import inkstream.nn.rope"),
        (upward_arrows, "inkstream.sampling.masks", "from ..engine.drawing import model"),
        (upward_arrows, "inkstream.engine.drawing.model", "from inkstream import cli"),
        (upward_arrows_between_rooms, "inkstream.engine.files.sources", "import inkstream.engine.machine.fit"),
        (arrows_between_families, "inkstream.families.flux1.model", "from inkstream.families.zimage import model"),
        (arrows_between_families, "inkstream.families.flux1.model", "from ..zimage.model import Block"),
        (families_named_by_the_engine, "inkstream.engine.drawing.model", 'if spec.family == "zimage": pass'),
        (state_of_modules, "inkstream.nn.rope", "from contextvars import ContextVar\nX = ContextVar('x')"),
        (state_of_modules, "inkstream.nn.rope", "chosen = 'auto'\ndef f(name):\n    global chosen\n    chosen = name"),
        (state_of_modules, "inkstream.nn.rope", "KNOWN = {}\ndef f(name):\n    KNOWN[name] = 1"),
        (state_of_modules, "inkstream.nn.rope", "KNOWN: list[int] = []\ndef f(n):\n    KNOWN.append(n)"),
        (state_of_modules, "inkstream.nn.rope", "seen = set()"),
        (state_of_modules, "inkstream.nn.rope", "LOCK = threading.Lock()"),
        (state_of_modules, "inkstream.nn.rope", "class A:\n    pass\nX = A()\ndef f():\n    X.chosen = 1"),
        (reads_of_the_surroundings, "inkstream.nn.rope", "import os\nx = os.environ.get('X')"),
        (reads_of_the_surroundings, "inkstream.weights.files", "from time import time"),
    ],
)
def test_each_rule_catches_what_breaks_it(rule, module, source):
    tree = [
        "nn.rope",
        "engine",
        "engine.drawing.model",
        "engine.machine.fit",
        "cli",
        "families.zimage",
        "families.zimage.model",
    ]
    others = dict.fromkeys(("inkstream", *(f"inkstream.{name}" for name in tree)), "")
    assert rule(others) == []
    assert len(rule({**others, module: source})) == 1


def test_a_circle_is_found_and_who_only_imports_one_is_not_in_it():
    sources = {"inkstream": "", "inkstream.nn": ""} | {
        f"inkstream.nn.{name}": f"def f():\n    from inkstream.nn import {other}"
        for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("d", "a"))
    }
    sources["inkstream.nn.c"] += "\nfrom inkstream.nn import e"
    sources["inkstream.nn.e"] = "import torch"
    assert circles(sources) == ["inkstream.nn.a", "inkstream.nn.b", "inkstream.nn.c"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch", True),
        ("from torch.nn import functional", True),
        ("from inkstream.nn.rope import rotate", True),
        ("class A:\n    import torch", True),
        ("try:\n    pass\nexcept ImportError:\n    import torch", True),
        ("def f():\n    import torch", False),
        ("if TYPE_CHECKING:\n    import torch", False),
        ("import torchlight", False),
    ],
)
def test_torch_is_found_through_other_modules_but_not_inside_functions(source, found):
    sources = {"inkstream": "", "inkstream.nn": "", "inkstream.nn.rope": "import torch", "inkstream.cli": source}
    assert bool(path_to_torch(sources, "inkstream.cli")) == found
