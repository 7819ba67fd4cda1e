"""pydantic-ai: two system prompts, streams, structured output by a tool and by a schema, a tool of its own."""

import asyncio

from common import BASE, MODEL
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=BASE, api_key="key")
chat, responses = OpenAIChatModel(MODEL, provider=provider), OpenAIResponsesModel(MODEL, provider=provider)
short = {"temperature": 0, "max_tokens": 12}


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


def talk(model):
    agent = Agent(model, system_prompt=("Be brief.", "Be kind."), model_settings=short)
    first = agent.run_sync("The sky")
    second = agent.run_sync("And sea", message_history=first.all_messages())
    return [first.output, second.output]


def stream(model):
    async def run():
        agent = Agent(model, system_prompt=("Be brief.", "Be kind."), model_settings=short)
        async with agent.run_stream("The sky") as result:
            return "".join([piece async for piece in result.stream_text(delta=True, debounce_by=None)])

    return asyncio.run(run())


def person(model, output_type):
    settings = {"temperature": 0, "max_tokens": 60}
    return Agent(model, output_type=output_type, model_settings=settings).run_sync("Who?").output.model_dump()


CHECKS = {
    "chat": lambda: talk(chat),
    "stream": lambda: stream(chat),
    "responses": lambda: talk(responses),
    "responses stream": lambda: stream(responses),
    "by a tool": lambda: person(chat, Person),
    "by a schema": lambda: person(chat, NativeOutput(Person)),
    "responses by a tool": lambda: person(responses, Person),
    "responses by a schema": lambda: person(responses, NativeOutput(Person)),
}
