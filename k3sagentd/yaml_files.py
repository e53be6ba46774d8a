# SPDX-License-Identifier: Apache-2.0
"""YAML with drop-ins, merged as K3s merges its own (K3S.md 5); used for its files and for ours.

The base file, then ``<file>.d/*.yaml`` and ``*.yml`` by name. The last value wins; ``key+``
appends to a list. Each value remembers its file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from k3sagentd.errors import ConfigError
from k3sagentd.files import read_bounded

SIZE_LIMIT_BYTES = 1024 * 1024
SUFFIXES = (".yaml", ".yml")
"""Of drop-ins; the conditions of ``k3sagentd.service`` name the same."""

QUOTES = re.compile(r"(undefined alias|constructor for the tag|undefined tag handle) .*", re.DOTALL)
"""Where PyYAML's messages repeat what stands in the file: a secret that begins with ``*`` or ``!``
and is not in quotes."""
OPTION = "a text, a number, true or false, or a list of these"
"""What K3s takes as the value of an option: it makes command line arguments of its files (K3s,
pkg/configfilearg), and anything else becomes an argument that means nothing."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: PyYAML keeps the last, and nobody sees it."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, "a key is no text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {key} stands twice", key_node.start_mark
            )
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def is_option(value: Any) -> bool:
    """Whether K3s takes ``value``, which stands in YAML, as that of an option: ``OPTION``."""
    items = value if isinstance(value, list) else [value]
    return all(isinstance(item, str | int | float) for item in items)


@dataclass(frozen=True, slots=True)
class Merged:
    """Merged values, and which file each comes from."""

    values: dict[str, Any]
    origins: dict[str, Path]
    files: tuple[Path, ...]

    def file_of(self, key: str) -> Path:
        """The file that set ``key``, or the first one."""
        return self.origins.get(key, self.files[0])

    def inner(self, key: str) -> Merged:
        """The mapping at ``key``, empty where there is none."""
        value = self.values.get(key)
        inner = value if isinstance(value, dict) else {}
        return Merged(inner, {name: self.file_of(key) for name in inner}, self.files)


def files_of(base: Path) -> list[Path]:
    """``base``, where it is there, and its drop-ins, in the order in which they are read."""
    directory = base.with_name(f"{base.name}.d")
    inside = directory.iterdir() if directory.is_dir() else ()
    return [
        *([base] if base.exists() else []),
        *sorted(file for file in inside if file.suffix in SUFFIXES),
    ]


def merge(base: Path, *, without: Path | None = None) -> Merged:
    """Read and merge ``base`` and its drop-ins, but ``without`` one; raises ConfigError."""
    values: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    files = [file for file in files_of(base) if file != without]
    for file in files:
        for key, value in load(file).items():
            name = key.removesuffix("+")
            if key != name:
                value = [*_list(values.get(name)), *_list(value)]
            values[name] = value
            origins[name] = file
    return Merged(values, origins, tuple(files))


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def load(file: Path) -> dict[str, Any]:
    """One file's mapping; raises ConfigError."""
    try:
        data = yaml.load(read_bounded(file.resolve(), SIZE_LIMIT_BYTES), Loader=_Loader)  # noqa: S506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" in line {mark.line + 1}" if mark else ""
        problem = QUOTES.sub(r"\1", str(error.problem))
        raise ConfigError(f"{file}: {problem}{line}; allowed: valid YAML") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML ({error})") from error
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, AttributeError):
        # PyYAML's own, for a date or number that is none; it would show the value.
        raise ConfigError(
            f"{file}: a value has the form of a date or a number and is none; allowed: valid YAML; "
            "put it in quotes"
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{file}: the file is {type(data).__name__}; allowed: a mapping")
    return data
