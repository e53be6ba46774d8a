# SPDX-License-Identifier: Apache-2.0
"""The core imports nothing that has a clock, a socket or a die in it."""

import ast
from pathlib import Path

import pytest

import k3sagentd.core

FILES = sorted(Path(k3sagentd.core.__file__).parent.glob("*.py"))
ALLOWED = {
    *("__future__", "collections", "dataclasses", "enum", "functools", "hashlib", "hmac", "math"),
    *("operator", "re", "typing"),
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_imports(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            own = name == "k3sagentd.core" or name.startswith("k3sagentd.core.")
            assert own or name.split(".")[0] in ALLOWED, f"{file.name} imports {name}"
