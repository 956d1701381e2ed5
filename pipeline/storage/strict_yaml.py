"""YAML in which no mapping has a key twice. PyYAML takes the last of them."""

from typing import Any

import yaml


class _NoDuplicates:
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
                if (key.tag, key.value) in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: the key {key.value} is given twice")
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)  # type: ignore[misc, no-any-return]


class _Safe(_NoDuplicates, yaml.SafeLoader):
    pass


class _Texts(_NoDuplicates, yaml.BaseLoader):
    pass


MERGE = "tag:yaml.org,2002:merge"


def load(text: str | bytes) -> Any:
    """Parse YAML to Python values. Raises yaml.YAMLError."""
    return yaml.load(text, _Safe)


def load_texts(text: str | bytes) -> Any:
    """Parse YAML with all values as text: other loaders read 1:8 as 68. Raises yaml.YAMLError."""
    return yaml.load(text, _Texts)
