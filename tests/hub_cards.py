"""What the Hub checks of a model card's metadata."""

import re

import yaml

FRONT_MATTER = re.compile(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---(\r\n|\n|$)")
# The metadata of a model card that the Hub checks. The keys at the top may be missing; a string may stand for a list.
CARD = {
    "license": str,
    "library_name": str,
    "pipeline_tag": str,
    "tags": [str],
    "datasets": [str],
    "model-index": [
        {
            "name": str,
            "results": [
                {
                    "task": {"type": str},
                    "dataset": {"name": str, "type": str},
                    "metrics": [{"type": str, "value": object}],
                }
            ],
        }
    ],
}


def _problems(value, schema, where: str) -> list[str]:
    """What is wrong with a card's metadata, in the Hub's words."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f'"{where}" must be an object']
        known = [(f"{where}.{key}", key, inner) for key, inner in schema.items()]
        missing = [f'"{name}" is required' for name, key, _ in known if key not in value]
        return missing + [p for name, key, inner in known if key in value for p in _problems(value[key], inner, name)]
    if isinstance(schema, list):
        if schema == [str] and isinstance(value, str):
            return []
        if not isinstance(value, list):
            return [f'"{where}" must be an array']
        return [p for i, item in enumerate(value) for p in _problems(item, schema[0], f"{where}[{i}]")]
    return [] if isinstance(value, schema) else [f'"{where}" must be a {"string" if schema is str else schema}']


def card_metadata(content: str) -> tuple[dict, list[str]]:
    """The metadata at the top of a README.md, and what is wrong with it."""
    match = FRONT_MATTER.search(content)
    if match is None:
        return {}, []
    try:
        metadata = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {}, [f"YAML metadata: {error}"]
    if metadata is None:
        return {}, []
    if not isinstance(metadata, dict):
        return {}, ["YAML metadata must be an object"]
    problems = [p for key in CARD if key in metadata for p in _problems(metadata[key], CARD[key], key)]
    if not re.fullmatch(r"[a-z0-9.\-]+", str(metadata.get("license", "unknown"))):
        problems.append('"license" must be one of those that the Hub knows')
    return metadata, problems
