"""LangChain: a chat model and a text model, whole, streamed, in a batch, and with structured output."""

from common import BASE, MODEL, PARAMETERS
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI

chat = ChatOpenAI(base_url=BASE, api_key="key", model=MODEL, temperature=0, max_tokens=12)
asking = ChatOpenAI(base_url=BASE, api_key="key", model=MODEL, temperature=0)
responses = ChatOpenAI(base_url=BASE, api_key="key", model=MODEL, temperature=0, max_tokens=12, use_responses_api=True)
text = OpenAI(base_url=BASE, api_key="key", model=MODEL, temperature=0, max_tokens=5)
TALK = [
    SystemMessage("Be brief."),
    HumanMessage("The sky"),
    AIMessage("is blue"),
    HumanMessage("And"),
    HumanMessage("sea"),
]
CALL = {"id": "1", "name": "calculator", "args": {"expression": "6*7"}}
TOOLS = [HumanMessage("The sky"), AIMessage("", tool_calls=[CALL]), ToolMessage("42", tool_call_id="1")]
SCHEMA = {"title": "person", "description": "A person.", **PARAMETERS}

CHECKS = {
    "chat": lambda: chat.invoke(TALK).content,
    "stream": lambda: "".join(chunk.content for chunk in chat.stream(TALK)),
    "system last": lambda: chat.invoke([HumanMessage("The sky"), SystemMessage("Be brief.")]).content,
    "tool message": lambda: chat.invoke(TOOLS).content,
    "responses": lambda: responses.invoke(TALK).text,
    "responses stream": lambda: "".join(chunk.text for chunk in responses.stream(TALK)),
    "batch": lambda: [answer.content for answer in chat.batch([[HumanMessage(f"The sky {i}")] for i in range(8)])],
    "text": lambda: text.invoke("The sky"),
    "text stream": lambda: "".join(text.stream("The sky")),
    "20 prompts": lambda: [found[0].text for found in text.generate([f"The sky {i}" for i in range(20)]).generations],
    "json schema": lambda: asking.with_structured_output(SCHEMA, method="json_schema").invoke("Who?"),
    "function": lambda: asking.with_structured_output(SCHEMA, method="function_calling").invoke("Who?"),
    "logprobs": lambda: len(
        chat.bind(logprobs=True, top_logprobs=2).invoke(TALK).response_metadata["logprobs"]["content"]
    ),
}
