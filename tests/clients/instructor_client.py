"""instructor: a pydantic model from an answer, in its modes."""

import instructor
import openai
from common import BASE, MODEL
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=150)


client = openai.OpenAI(base_url=BASE, api_key="key")


def person(mode):
    asking = instructor.from_openai(client, mode=mode)
    messages = [{"role": "user", "content": "Who?"}]
    return asking.chat.completions.create(
        model=MODEL, messages=messages, response_model=Person, max_retries=0, temperature=0, max_tokens=60
    ).model_dump()


def partial():
    asking = instructor.from_openai(client)
    messages = [{"role": "user", "content": "Who?"}]
    *_, last = asking.chat.completions.create_partial(
        model=MODEL, messages=messages, response_model=Person, max_retries=0, temperature=0, max_tokens=60
    )
    return last.model_dump()


CHECKS = {
    "tools": lambda: person(instructor.Mode.TOOLS),
    "json schema": lambda: person(instructor.Mode.JSON_SCHEMA),
    "partial": partial,
}
