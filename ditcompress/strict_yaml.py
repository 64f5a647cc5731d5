"""YAML that says what it means: no aliases, no duplicate keys, 1e-4 is a number."""

from __future__ import annotations

import re
from typing import Any

import yaml

from .errors import DitcompressError, printable

MOST_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML without aliases and duplicate keys, with 1e-4 as a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key)
            if not isinstance(name, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is not text", key.start_mark)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name!r} stands twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


def read_yaml(text: str, where: str) -> Any:
    """One YAML document by the strict loader; E202 with the line on any fault."""
    if len(text) > MOST_BYTES:
        raise DitcompressError("E202", where, f"{len(text)} bytes, more than 1 MB", "a recipe is a short text file")
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}, line {mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error) or "nested too deeply"
        raise DitcompressError("E202", place, printable(problem), "correct the YAML") from None
