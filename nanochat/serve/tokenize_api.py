"""POST /tokenize, /detokenize and GET /tokenizer_info, for clients of llama-server and of vLLM (lm_eval is one)."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from nanochat.serve.answers import Service
from nanochat.serve.errors import RequestError
from nanochat.serve.schemas import Text


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text ("content" for llama-server, "prompt" for vLLM), or a conversation."""

    content: Text | None = None
    prompt: Text | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1)
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    """Begin with bos; default: for a prompt, as /v1/completions does."""
    parse_special: bool | None = None
    """A text that is nothing but the name of a special token is that token; null: yes."""
    with_pieces: bool | None = False
    return_token_strs: bool | None = False


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]]


def add_tokenize_routes(app: FastAPI, service: Service) -> None:
    """Add the routes. An answer has the fields of either server."""
    tokenizer = service.tokenizer

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        if body.messages is not None:
            tokens, _, _ = await service.chat_prompt(body.messages, None, forget=False)
        elif (text := body.content if body.content is not None else body.prompt) is not None:
            wanted = body.add_special if body.add_special is not None else body.add_special_tokens
            if body.parse_special is not False and text in tokenizer.get_special_tokens():
                tokens = [tokenizer.encode_special(text)]
            else:
                tokens = await run_in_threadpool(tokenizer.encode, text)
            if wanted if wanted is not None else body.content is None:
                tokens = [tokenizer.get_bos_token_id(), *tokens]
        else:
            raise RequestError(400, "there is no text: give content, prompt or messages", param="content")
        answer: dict[str, Any] = {"tokens": tokens, "count": len(tokens), "max_model_len": service.pool.context_length}
        pieces = [tokenizer.id_to_token(token) for token in tokens]
        if body.return_token_strs:
            answer["token_strs"] = pieces
        if body.with_pieces:
            answer["tokens"] = [{"id": token, "piece": piece} for token, piece in zip(tokens, pieces, strict=True)]
        return answer

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        return {
            "tokenizer_class": "RustBPETokenizer",
            "bos_token": tokenizer.id_to_token(tokenizer.get_bos_token_id()),
            "eos_token": "<|assistant_end|>",
            "vocab_size": tokenizer.get_vocab_size(),
            "model_max_length": service.pool.context_length,
        }

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        try:
            text = await run_in_threadpool(tokenizer.decode, body.tokens)
        except ValueError as error:
            raise RequestError(400, str(error), param="tokens") from error
        return {"content": text, "prompt": text}
