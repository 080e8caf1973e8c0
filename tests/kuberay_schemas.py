"""KubeRay's own schemas of its manifests, as JSON Schema, and how `data/kuberay/` was made of them.

    python tests/kuberay_schemas.py ray.io_rayclusters.yaml ray.io_rayjobs.yaml

What is kept of a custom resource definition is version v1 of its schema, without descriptions and defaults, and parts that occur again and
again (a pod's spec, above all) are said once. What is added is that unknown fields are refused, since Kubernetes drops them without a word.
Rules in CEL (`x-kubernetes-validations`) are not in it, and no webhook was asked.
"""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

FOLDER = Path(__file__).parent / "data" / "kuberay"
LEFT_OUT = ("description", "default", "nullable")
WORTH_A_NAME = 120  # bytes of JSON; what is shorter is repeated


def schema_of(kind: str) -> Schema:
    """The JSON Schema of a kind, such as "RayJob"."""
    found = json.loads((FOLDER / f"{kind.lower()}.json").read_text())
    assert isinstance(found, dict)
    return found


def mapped(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """A schema with each part of it, one level down, changed."""
    found = dict(schema)
    if "properties" in schema:
        found["properties"] = {name: change(part) for name, part in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            found[key] = change(schema[key])
    return found


def trimmed(schema: Schema) -> Schema:
    """A structural schema as JSON Schema that refuses unknown fields."""
    found = mapped(schema, trimmed)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return {key: value for key, value in found.items() if key not in LEFT_OUT and not key.startswith("x-kubernetes-")}


def said_once(schema: Schema) -> Schema:
    """The same schema with each part that occurs more than once under `$defs`."""
    counts: Counter[str] = Counter()

    def count(part: Schema) -> Schema:
        text = json.dumps(part, sort_keys=True)
        counts[text] += 1
        return part if counts[text] > 1 else mapped(part, count)

    def name(part: Schema) -> Schema:
        known = names.get(json.dumps(part, sort_keys=True))
        return {"$ref": f"#/$defs/{known}"} if known is not None else mapped(part, name)

    count(schema)
    often = [text for text, times in counts.items() if times > 1 and len(text) > WORTH_A_NAME]
    names = {text: f"part{number}" for number, text in enumerate(often)}
    return {**mapped(schema, name), "$defs": {names[text]: mapped(json.loads(text), name) for text in often}}


def main(paths: list[str]) -> None:
    for path in paths:
        definition = yaml.load(Path(path).read_text(), Loader=yaml.CSafeLoader)
        (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
        schema = said_once(trimmed(version["schema"]["openAPIV3Schema"]))
        kind = definition["spec"]["names"]["kind"]
        (FOLDER / f"{kind.lower()}.json").write_text(json.dumps(schema, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
