"""Imports between folders go one way; all imports are checked."""

import ast
import re
from pathlib import Path

import pytest

import kvq_calib

PACKAGE = Path(kvq_calib.__file__).parent
#: The parts in order: one may import those before it, never those after it.
ORDER = [
    *("errors", "files", "progress", "native"),
    *("schema", "codec", "fit", "model", "data", "artifact"),
    *("calibrate", "runtime", "evaluate", "integrations", "cli"),
]
#: Neighbours that share what stands before both, and nothing else.
APART = [("calibrate", "runtime")]


def modules():
    return {
        ".".join(("kvq_calib", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(
            ".__init__"
        ): file
        for file in PACKAGE.rglob("*.py")
    }


def imports(file, known):
    """Modules of the package that a file names in any import, wherever it stands; those for types alone too."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = (f"{node.module}.{alias.name}" for alias in node.names)
            names = [name if name in known else node.module for name in inner]
        else:
            assert not (isinstance(node, ast.ImportFrom) and node.level), f"{file}: relative import"
            continue
        found |= {name for name in names if name in known}
    return found - {"kvq_calib"}


def part_of(module):
    return module.split(".")[1] if "." in module else ""


def import_graph():
    known = modules()
    return {name: imports(file, known) for name, file in known.items()}


def test_every_part_has_its_place():
    assert {part_of(name) for name in modules()} - {""} == set(ORDER)


def test_no_import_runs_upwards():
    upwards = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        if part_of(name)
        for other in others
        if ORDER.index(part_of(other)) > ORDER.index(part_of(name))
    ]
    assert not upwards


@pytest.mark.parametrize("pair", APART)
def test_neighbours_do_not_import_each_other(pair):
    crossing = [
        f"{name} imports {other}"
        for name, others in import_graph().items()
        for other in others
        if part_of(name) != part_of(other) and {part_of(name), part_of(other)} == set(pair)
    ]
    assert not crossing


def test_no_circle_of_imports():
    graph = import_graph()
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


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
        called = {ast.unparse(node.func) for node in calls}
        assert not called & {
            "torch.load",
            "pickle.load",
            "pickle.loads",
            "pickle.Unpickler",
            "eval",
            "exec",
        }, name


#: Outside model/: caches, which transformers only takes where they are classes of its own.
CACHES = ("runtime.cache", "evaluate.recall", "evaluate.generate", "evaluate.rivals.")


def test_transformers_is_known_to_one_folder():
    for name, file in modules().items():
        part = name.removeprefix("kvq_calib.")
        if part.startswith(("model.", *CACHES)):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not any(alias.name.split(".")[0] == "transformers" for alias in node.names), name
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != "transformers", name


#: Private names of transformers and torch; all that is used of them stands in one module.
FOREIGN = {
    "_global_mapping",
    "_local_mapping",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_orig_mod",
}


def test_private_names_of_other_libraries_stand_in_one_module():
    for name, file in modules().items():
        if name.endswith(".model.compat"):
            continue
        code = ast.parse(file.read_text(encoding="utf-8"))
        attributes = [ast.unparse(node) for node in ast.walk(code) if isinstance(node, ast.Attribute)]
        assert not [found for found in attributes if re.match(r"torch\._[^_]", found)], name
        assert not [found for found in attributes if found.rsplit(".", 1)[-1] in FOREIGN], name
        strings = {node.value for node in ast.walk(code) if isinstance(node, ast.Constant)}
        assert not strings & (FOREIGN | {"past_key_values", "tokens_to_remove"}), name
