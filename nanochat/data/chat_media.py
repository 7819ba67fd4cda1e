"""Images, sounds and files in conversations: what the model does not get, so that nothing is learned about it."""

from __future__ import annotations

import re
from typing import Any

from nanochat.messages import Message

# Where LLaMA-Factory, LLaVA and others have an image, a video or a sound; some are tags of HTML where no file is named.
_MARKS = re.compile(r"<(?:image|ImageHere)>|<\|(?:vision_start|image_pad|image|audio)\|>")
TAGS_TOO = re.compile(rf"{_MARKS.pattern}|<(?:video|audio|img)>")
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
# The same as a part of a message: its type (OpenAI's, Anthropic's, that of transformers), or its key (Gemini's).
_PART = re.compile(
    r"(?:input_|output_)?(?:image|video|audio|file|document)(?:_url|_file|_asset_pointer)?|inline_?data|file_?data",
    re.I,
)


def is_about_images(messages: list[Message], marks: re.Pattern[str] = _MARKS) -> bool:
    """True if a message has an image, a video, a sound or a file, or one of the user a mark that stands for one."""
    return any(_is_medium(m.get("content"), marks if m.get("role") == "user" else None) for m in messages)


def _is_medium(content: Any, marks: re.Pattern[str] | None) -> bool:
    if isinstance(content, str):
        return marks is not None and marks.search(content) is not None
    if isinstance(content, list):
        return any(_is_medium(part, marks) for part in content)
    if not isinstance(content, dict):
        return False
    kind = content.get("type")
    named = [kind] if kind else [key for key, value in content.items() if value]
    # A result of a tool has parts of its own.
    return any(_PART.fullmatch(str(name)) for name in named) or any(
        _is_medium(content.get(key), marks) for key in ("text", "content")
    )
