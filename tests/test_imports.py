"""The modules at the top import one another in one order, and reach extras through doors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("model", "lora", "data", "vladva", "eval", "train")  # each may import only those before it
DOORS = {  # the functions that reach into extras when they are called
    "model.parse_config",  # an architecture, by the name that ARCHITECTURES gives it
    "eval.open_data",  # the rendered scenes
    "eval.main",  # embeddings of other systems
    "eval.report",  # the picture of a run
    "train.train",  # models over one GPU
    "data.read_adapter",  # an adapter in peft's format
}


def imported(node):
    """Modules that a node of the syntax tree imports, or could import by a name."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        return {node.module.split(".")[0]}
    if isinstance(node, ast.Attribute) and node.attr == "import_module":
        return {"extras"}  # the module's name is a variable there
    if isinstance(node, ast.Name) and node.id in ("import_module", "__import__", "exec"):
        return {"extras"}
    return set()


def uses(source):
    """{(function or class, or "" at the top level, module that it imports)} of a source text."""
    pairs = set()
    for statement in ast.parse(source).body:
        name = getattr(statement, "name", "")
        for node in ast.walk(statement):
            for module in imported(node):
                pairs.add(("" if node is statement else name, module))
    return pairs


def names_of_extras(source):
    """{(variable or function at the top level, string)} of strings that name a module of extras.

    Not docstrings, which may name them, and not what a door imports.
    """
    named = set()
    for statement in ast.parse(source).body:
        docstrings = set()
        for node in ast.walk(statement):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                docstrings.add(node.value)
        owner = getattr(statement, "name", "")
        if isinstance(statement, ast.Assign):
            owner = ast.unparse(statement.targets[0])
        for node in ast.walk(statement):
            text = node.value if isinstance(node, ast.Constant) else None
            if isinstance(text, str) and "extras" in text and node not in docstrings:
                named.add((owner, text))
    return named


def read(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def too_late(name, source):
    """Modules of ORDER that a module imports although they come after it."""
    return {module for _, module in uses(source)} & set(ORDER[ORDER.index(name) :])


def doors(sources):
    """Functions that reach into extras, of {module: source}."""
    reaching = set()
    for name, source in sources.items():
        for function, module in uses(source):
            if module == "extras":
                reaching.add(f"{name}.{function}")
    return reaching


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_before_it(name):
    assert not too_late(name, read(name))


def test_extras_are_reached_through_the_doors_alone():
    assert doors({name: read(name) for name in ORDER}) == DOORS


def test_only_the_table_of_architectures_names_a_module_of_extras():
    """The door in model.py imports what this table says, so the table has to be in sight here."""
    for name in ORDER:
        owners = {owner for owner, _ in names_of_extras(read(name))}
        assert owners == ({"ARCHITECTURES"} if name == "model" else set()), name


def test_a_module_that_breaks_the_order_or_opens_another_door_is_seen():
    """Each rule above is broken once: a test that nothing can fail guards nothing."""
    broken = read("data") + "\n\ndef f():\n    from train import Steps\n"
    assert too_late("data", broken) == {"train"}
    assert too_late("eval", read("eval") + "\nimport eval\n") == {"eval"}
    for line in (
        "from extras.scenes import render",
        "import extras",
        "importlib.import_module(name)",
        "__import__(name)",
    ):
        broken = f"{read('lora')}\n\ndef f(name):\n    {line}\n"
        assert doors({"lora": broken}) == {"lora.f"}, line
        assert doors({"lora": f"{read('lora')}\n{line}\n"}) == {"lora."}, line
    assert names_of_extras('NAME = "extras.scenes"\n') == {("NAME", "extras.scenes")}
    assert names_of_extras('def f():\n    """See extras/scenes.py."""\n') == set()
