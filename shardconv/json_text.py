"""JSON that people can read: indented, with lists of numbers on one line, however long."""

import json
import re

# A list with nothing but numbers and the like in it, and a list of such lists; strings have no line breaks, so none is touched.
PLAIN = re.compile(r'\[\n[^\[\]{}"]*\]')
NESTED = re.compile(r'\[\n(?:\s*\[[^\[\]{}"\n]*\],?)+\s*\]')


def json_text(value: object) -> str:
    """A value as JSON text.

    >>> print(json_text({"shape": [2, 3], "points": [[0.5, 1.0], [2.0, None]], "names": ["a"]}))
    {
      "shape": [2, 3],
      "points": [[0.5, 1.0], [2.0, null]],
      "names": [
        "a"
      ]
    }
    """
    text = json.dumps(value, indent=2)
    for pattern in (PLAIN, NESTED):
        text = pattern.sub(lambda found: re.sub(r"\s*\n\s*", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text)
    return text
