"""What a reference asks of a program."""

from __future__ import annotations

import ast
import builtins
import sys
from typing import Any

FORMATS = (
    "{'prompt', 'test', 'entry_point'}, {'tests': [code, ...], 'setup': code} or "
    "{'inputs': [text, ...], 'outputs': [text, ...]}"
)


def read_task(reference: Any) -> dict[str, Any] | None:
    """The reference with our names for its keys and no others; None if it has none of the known formats.

    Example:
        >>> read_task({"task_id": 7, "test_list": ["assert f() == 1"], "test_setup_code": ""})
        {'setup': '', 'tests': ['assert f() == 1']}
    """
    match reference:
        case {"prompt": str(prompt), "test": str(test), "entry_point": str(name)} if name.isidentifier():
            return {"prompt": prompt, "test": test, "entry_point": name}
        case {"tests": [_, *_] as tests} | {"test_list": [_, *_] as tests}:
            setup = reference.get("setup", reference.get("test_setup_code", ""))
            return {"setup": setup, "tests": list(tests)} if _texts([setup, *tests]) else None
        case {"inputs": [_, *_] as inputs, "outputs": [_, *_] as outputs} if len(inputs) == len(outputs):
            return {"inputs": list(inputs), "outputs": list(outputs)} if _texts([*inputs, *outputs]) else None
    return None


def _texts(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def undefined_names(code: str) -> tuple[set[str], set[str]]:
    """The names that ``code`` uses and does not define: those it wants from the program, and standard modules.

    The program must not stand in for what is ours: a builtin is the program's only where the code uses nothing else,
    and only one.

    Example:
        >>> undefined_names("assert math.isclose(half(len(text)), 2)")[0] == {"half", "text"}
        True
        >>> undefined_names("assert math.isclose(half(3), 1.5)")
        ({'half'}, {'math'})
        >>> undefined_names("assert sum(10, 15) == 6")
        ({'sum'}, set())
    """
    nodes = list(ast.walk(ast.parse(code)))
    used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    defined = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    for node in nodes:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)):
                defined.add(name)
            case ast.alias(name=name, asname=asname):
                defined.add(asname or name.partition(".")[0])
    missing = used - defined
    looked_into = {
        node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }
    modules = missing & looked_into & sys.stdlib_module_names
    ours = missing & set(dir(builtins))
    wanted = missing - modules - ours
    return wanted or (ours if len(ours) == 1 else set()), modules
