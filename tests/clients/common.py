"""What the client programs share. They run in an environment of their own, against a server that a test has started."""

import sys

BASE = sys.argv[1]  # .../v1
MODEL = "any-name"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The sky"},
    {"role": "assistant", "content": "is blue"},
    {"role": "user", "content": "And sea"},
]
PARAMETERS = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
