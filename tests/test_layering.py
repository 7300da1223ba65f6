"""The parts import each other one way only; a walk over the imports holds it."""

import ast
from pathlib import Path

import pytest

import kvq_calib

PACKAGE = Path(kvq_calib.__file__).parent
#: No file of the first part may import the second, directly or through others.
FORBIDDEN = [
    ("calibrate", "runtime"),
    ("runtime", "calibrate"),
    ("runtime", "fit"),
    ("runtime", "evaluate"),
    ("calibrate", "evaluate"),
    ("fit", "runtime"),
    ("data", "calibrate"),
    ("data", "runtime"),
    *((shared, part) for shared in ("spec", "packing", "quantizer", "artifact") for part in ("calibrate", "runtime", "evaluate", "fit", "data")),
]  # fmt: skip


def modules():
    return {
        ".".join(("kvq_calib", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): file
        for file in PACKAGE.rglob("*.py")
    }


def imports(file, known):
    """Modules of the package that a file names in any import, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
            continue
        found |= {name for name in names if name in known}
    return found - {"kvq_calib"}


def reachable(start, graph):
    seen, todo = set(), list(start)
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += graph[module]
    return seen


def part_of(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize(("part", "other"), FORBIDDEN)
def test_parts_do_not_reach_each_other(part, other):
    known = modules()
    graph = {name: imports(file, known) for name, file in known.items()}
    start = [name for name in known if part_of(name) == part]
    assert start
    crossed = sorted(name for name in reachable(start, graph) if part_of(name) == other)
    assert not crossed, f"{part} reaches {crossed}"


def test_no_module_names_a_model_family():
    families = (
        "llama",
        "mistral",
        "qwen",
        "gemma",
        "phi3",
        "neox",
        "olmo",
        "granite",
        "cohere",
        "smollm",
        "ernie",
    )
    allowed = {"memory"}  # shapes of published models, by name, for its tables
    for name, file in modules().items():
        if name.rsplit(".", 1)[-1] in allowed:
            continue
        code = ast.parse(file.read_text(encoding="utf-8"))
        words = {
            getattr(node, attribute).lower()
            for node in ast.walk(code)
            for attribute in ("id", "attr", "module")
            if isinstance(getattr(node, attribute, None), str)
        }
        assert not [word for word in words for family in families if family in word], name


def test_nothing_unpickles():
    for name, file in modules().items():
        code = ast.parse(file.read_text(encoding="utf-8"))
        calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
        called = {
            ast.unparse(node.func)
            for node in calls
            # The importer of another project's pickles may load tensors, with code forbidden.
            if not (name.endswith(".kvquant") and "weights_only=True" in ast.unparse(node))
        }
        assert not called & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec"}, name
