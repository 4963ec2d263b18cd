"""The modules at the top import one another in one order, and extras only through the doors that are listed here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("model", "lora", "data", "vladva", "eval", "train")  # each may import only those before it
DOORS = {  # functions that reach into extras when they are called
    "model.parse_config",
    "data.image_processor",
    "train.open_data",
    "train.with_triples",
    "train.report",
}


def imported(node):
    """The modules that a statement imports, or a call of importlib.import_module stands for ("extras": their names are data)."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.split(".")[0]}
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
        return {"extras"}
    return set()


def uses(name):
    """{(function or class, or "" at top level, module that it imports)} of a module of ORDER."""
    return {
        ("" if node is inside else getattr(node, "name", ""), module)
        for node in ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")).body
        for inside in ast.walk(node)
        for module in imported(inside)
    }


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_before_it(name):
    assert {module for _, module in uses(name)} & set(ORDER) <= set(ORDER[: ORDER.index(name)])


def test_extras_are_reached_through_the_doors_alone():
    assert DOORS == {
        f"{name}.{function}"
        for name in ORDER
        for function, module in uses(name)
        if module == "extras"
    }
