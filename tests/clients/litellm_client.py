"""LiteLLM: chat and text, whole and streamed."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no look at the internet

import litellm
from common import BASE, MODEL, PARAMETERS, TALK

litellm.drop_params = False
litellm.telemetry = False
WHO = [{"role": "user", "content": "Who?"}]
TOOL = {"type": "function", "function": {"name": "person", "parameters": PARAMETERS}}


def chat(messages, **more):
    return litellm.completion(
        model=f"openai/{MODEL}", api_base=BASE, api_key="key", messages=messages, temperature=0, max_tokens=12, **more
    )


def text(prompt, **more):
    return litellm.text_completion(
        model=f"text-completion-openai/{MODEL}",
        api_base=BASE,
        api_key="key",
        prompt=prompt,
        temperature=0,
        max_tokens=5,
        **more,
    )


CHECKS = {
    "chat": lambda: chat(TALK).choices[0].message.content,
    "stream": lambda: "".join(chunk.choices[0].delta.content or "" for chunk in chat(TALK, stream=True)),
    "text": lambda: text("The sky").choices[0].text,
    "text stream": lambda: "".join(chunk.choices[0].text or "" for chunk in text("The sky", stream=True)),
    "two prompts": lambda: [choice.text for choice in text(["The sky", "Rivers"]).choices],
    "tool": lambda: (
        litellm.completion(
            model=f"openai/{MODEL}",
            api_base=BASE,
            api_key="key",
            messages=WHO,
            tools=[TOOL],
            tool_choice="required",
            max_tokens=60,
        )
        .choices[0]
        .message.tool_calls[0]
        .function.arguments
    ),
    "responses": lambda: (
        litellm.responses(
            model=f"openai/{MODEL}", api_base=BASE, api_key="key", input="The sky", temperature=0, max_output_tokens=20
        )
        .output[0]
        .content[0]
        .text
    ),
}
