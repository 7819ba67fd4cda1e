"""The command `llm`: a prompt, streamed and not, a conversation that goes on, a schema."""

import os
import tempfile
from pathlib import Path

from common import BASE

folder = Path(tempfile.mkdtemp())
(folder / "extra-openai-models.yaml").write_text(
    f"""
- {{model_id: tiny, model_name: tiny, api_base: {BASE}, api_key_name: tiny, supports_schema: true}}
- {{model_id: tiny-text, model_name: tiny, api_base: {BASE}, api_key_name: tiny, completion: true}}
"""
)
(folder / "keys.json").write_text('{"tiny": "key"}')
os.environ["LLM_USER_PATH"] = str(folder)

from click.testing import CliRunner  # noqa: E402
from llm.cli import cli  # noqa: E402

SHORT = ("-o", "temperature", "0", "-o", "max_tokens")


def llm(*args):
    done = CliRunner().invoke(cli, args)
    if done.exit_code:
        raise RuntimeError(done.output[-300:])
    return done.stdout.removesuffix("\n")


CHECKS = {
    "stream": lambda: llm("-m", "tiny", "-s", "Be brief.", *SHORT, "12", "The sky"),
    "goes on": lambda: llm("-c", *SHORT, "12", "And sea"),
    "whole": lambda: llm("-m", "tiny", "--no-stream", "-s", "Be brief.", *SHORT, "12", "The sky"),
    "text": lambda: llm("-m", "tiny-text", *SHORT, "5", "The sky"),
    "schema": lambda: llm("-m", "tiny", *SHORT, "60", "--schema", "age int", "--no-stream", "Who?"),
}
