"""The forms in which people have conversations, one record each: which form a record has, and its messages.

A form is recognised by its keys. Read are the forms of OpenAI (messages), ShareGPT, Alpaca, Dolly, Gemini, UltraChat,
TRL, LLaMA-Factory, Axolotl and Anthropic, questions with answers under many names, preference data (its good side),
what programs export (chat_exports.py), and text with the marks of a chat template.
"""

from __future__ import annotations

import itertools
import re
import string
from collections import Counter
from typing import Any

from nanochat.data.chat_exports import is_export, read_export
from nanochat.data.chat_media import MEDIA_KEYS, TAGS_TOO, is_about_images
from nanochat.data.chat_parts import ROLE_KEYS, as_messages, decoded, refuse_unfinished, usual_message
from nanochat.data.chat_templates import ROLE_OF, read_template, without_end_of_turn
from nanochat.data.json_stream import rows_of_lists
from nanochat.messages import BETWEEN, Message

TEXT_KEYS = ("content", "value", "text", "parts", "message", "utterance", "content_text")
LIST_KEYS = (
    *("messages", "conversations", "conversation", "dialogue", "dialog", "dialogs", "turns", "chat", "contents"),
    *("data", "items", "history", "thread", "utterances"),
)
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction", "systemInstruction", "systemPrompt")
# Questions and answers go by these names; a record with one of each is a conversation of two turns.
ASKED_KEYS = (
    *("instruction", "prompt", "question", "query", "input", "inputs", "problem", "user", "human", "q", "ask", "asked"),
    *("source_text", "input_text", "prompt_text", "user_message", "message_1", "question_text", "questions", "front"),
    *("frage", "fragen", "pregunta", "domanda", "pergunta", "vraag", "pytanie", "otázka", "kérdés", "întrebare"),
    *("fråga", "spørgsmål", "spørsmål", "kysymys", "soru", "pertanyaan", "soalan", "câu hỏi", "ερώτηση", "küsimus"),
    *("вопрос", "питання", "запитання", "въпрос", "שאלה", "سؤال", "السؤال", "سوال", "پرسش", "प्रश्न", "প্রশ্ন"),
    *("คำถาม", "问题", "提问", "問題", "質問", "问", "질문", "문제"),
)
ANSWER_KEYS = (
    *("output", "completion", "response", "answer", "outputs", "target", "targets", "solution", "assistant", "bot"),
    *("a", "reply", "gpt", "target_text", "output_text", "model_output", "assistant_message", "message_2", "answers"),
    *("generation", "answer_text", "back", "antwort", "antworten", "respuesta", "réponse", "reponse", "risposta"),
    *("resposta", "antwoord", "odpowiedź", "odpověď", "odpoveď", "válasz", "răspuns", "svar", "vastaus", "cevap"),
    *("yanıt", "jawaban", "jawapan", "trả lời", "câu trả lời", "απάντηση", "vastus", "ответ", "відповідь", "отговор"),
    *("תשובה", "جواب", "إجابة", "الإجابة", "الجواب", "پاسخ", "उत्तर"),
    *("উত্তর", "คำตอบ", "回答", "答案", "答", "답변", "답"),
)
CONTEXT_KEYS = ("context", "input", "passage", "document")
TEMPLATE_KEYS = ("text", "content", "conversation", "prompt", "input", "chosen", "formatted", "sample")
GOOD_KEYS = ("chosen", "preferred_output", "chosen_response", "response_j")
BAD_KEYS = ("rejected", "non_preferred_output", "response_k")
# Marks that say what must not be learned: such a value of one is "no".
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "learn", "label", "kto_tag")
WEIGHTS = ("weight", "loss_weight", "loss", "train", "training", "trainable", "learn")  # of these 1 means as usual
# Keys that say nothing about the meaning of a conversation.
HARMLESS = re.compile(
    r"(?!.*valid).*(id|ids|idx|index|hash|url|link|source|dataset|model|date|time|timestamp|lang|language|created.*|updated.*|tokens?"
    r"|count|num.*|category|topic|task|type|subset|license|name|title|metadata|meta|tags?"
    r"|redacted|hashed_ip|country|state|turn(_?(id|identifier|index|number|count))?|.*_slug|.*urls|plugin_.*|gizmo.*|moderation_.*|disabled_tool.*|memory_.*|voice|version|difficulty|subject|domain|_at|len|length|labels|emojis|toxicity|synthetic|finish_reason)",
    re.IGNORECASE,
)
_EMPTY: tuple[Any, ...] = (None, "", [], {})
UNUSED_KEY = "the key "
THINKING = "an answer with <think> in it, learned as it is"
BY_NUMBER = "an answer that is the number of an option, counted from 0"
_LETTERS = string.ascii_uppercase
SEVERAL = "several answers, of which the first is learned"
TURN_BY_TURN = "a list of questions and one of answers, taken turn by turn"
FRACTION = "a weight other than 0 and 1, taken for 1"
STRINGS = "array of strings"  # turns, or the texts of somebody who means no conversation
PREFERENCE = "preference data, of which the good side is learned"


class NotAConversation(ValueError):
    """A record of a form that is not known, or without what its form needs."""


class Marked(ValueError):
    """A record that is marked as not to be learned."""


class AboutImages(ValueError):
    """A conversation about something that is no text."""


def is_off(value: Any) -> bool:
    """True if the value of a mark says that something must not be learned."""
    return str(value).strip().lower() in ("0", "0.0", "-1", "-1.0", "false", "no")


def is_message(value: Any) -> bool:
    """True of one message of a conversation, in any form: an array of them is one conversation."""
    if not isinstance(value, dict):
        return isinstance(value, str | int | float)
    value = usual_message(value)
    return is_export(value) or (
        _first(value, ROLE_KEYS) is not None and _first(value, (*TEXT_KEYS, "tool_calls", "function_call")) is not None
    )


def read_chat_record(record: Any, columns: tuple[str, str] | None) -> tuple[str, list[Message], Counter[str]]:
    """(name of its form, messages, counts of what was left out or guessed) of a record; messages as they are there.

    Args:
        record: a value of JSON, or a row of a table as a dict.
        columns: the names of question and answer, where the user has said them.

    Raises:
        NotAConversation: its form is not known; names its keys.
        Marked: it must not be learned.
        UnfinishedAnswer: it has only a part of an answer.
        AboutImages: it names files of images or sounds, and its text refers to them.
    """
    used, notes = set[str](), Counter[str]()
    if isinstance(record, list):
        form, messages = _read_list(record, notes)
        return STRINGS if form == "list of turns" else form, messages, notes
    if not isinstance(record, dict):
        raise NotAConversation(f"expected an object or a list of messages, found {record!r:.60}")
    refuse_unfinished(record)
    record = {key: value for key, value in record.items() if value is not None and isinstance(key, str)}
    for key in ("definition", "Definition"):  # of Super-NaturalInstructions; that of a word is another thing
        texts = record.get(key)
        is_task = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        of_task = is_task or any({key, *pair} <= record.keys() for pair in (("inputs", "targets"), ("input", "output")))
        if of_task and columns is None and not _first(record, SYSTEM_KEYS):
            record["system"] = record.pop(key)
    for mark in MARKS:
        if mark in record and is_off(record[mark]):
            raise Marked(f"marked as not to be learned ({mark}: {record[mark]})")
    try:
        form, messages = _read_dict(record, columns, notes, used)
    except NotAConversation as error:
        lowered = _lowered(record)
        if columns is not None or lowered == record:
            raise
        record, used, notes = lowered, set(), Counter()  # what was noted on the way to the error is void
        try:
            form, messages = _read_dict(record, columns, notes, used)
        except NotAConversation:
            raise error from None
    if any(record.get(key) for key in MEDIA_KEYS) and is_about_images(messages, TAGS_TOO):
        raise AboutImages
    for key in record:
        if key not in used and key not in MARKS and record[key] not in ("", [], {}) and not HARMLESS.fullmatch(key):
            notes[f"{UNUSED_KEY}{key!r}, which is not used"] += 1
    return form, messages, notes


def _read_dict(
    record: dict[str, Any], columns: tuple[str, str] | None, notes: Counter[str], used: set[str]
) -> tuple[str, list[Message]]:
    if columns is not None:
        asked, answer = columns
        if asked not in record or answer not in record:
            raise NotAConversation(f"has no {asked!r} and {answer!r} (it has: {_keys(record)})")
        used |= {asked, answer, *SYSTEM_KEYS}
        return f"{asked}/{answer}", [*_system(record), *_pair(record[asked], record[answer], notes)]
    if (export := read_export(record, notes, used)) is not None:
        if not export[1]:
            raise NotAConversation("no messages with text")
        return export
    if isinstance(record.get("segments"), list) and all(isinstance(part, dict) for part in record["segments"]):
        used.add("segments")
        return "segments", _read_segments(record["segments"], notes)
    good, bad = _first(record, GOOD_KEYS), _first(record, BAD_KEYS)
    if good is not None and (bad is not None or _first(record, LIST_KEYS) is not None or _first(record, ASKED_KEYS)):
        notes[PREFERENCE] += 1
        used |= {good, *BAD_KEYS}
        return "preference", _read_preference(record, good, notes, used)
    for key in LIST_KEYS:
        value = decoded(record.get(key))
        if isinstance(value, dict):  # {"role": ["user", ...], "content": ["Hi", ...]}
            rows = rows_of_lists(value)
            value = rows if all(is_message(row) for row in rows) else value
        if isinstance(value, list) and value and not (key == "history" and _first(record, ANSWER_KEYS)):
            is_asked = {"question_id", "category"} <= record.keys() and all(isinstance(turn, str) for turn in value)
            if key == "turns" and is_asked:
                raise NotAConversation("questions one after the other, without answers")  # MT-bench
            used |= {key, *SYSTEM_KEYS}
            form, messages = _read_list(value, notes)
            speakers = record.get("speakers")
            if form == "list of turns" and isinstance(speakers, list) and len(speakers) == len(messages):
                used.add("speakers")
                _take_turns(messages, speakers)
            if messages and messages[-1]["role"] == "user" and (beside := _first(record, ANSWER_KEYS)):
                said = as_messages(decoded(record[beside]), "assistant")
                if not isinstance(said, bool | dict) and said not in ("", []):
                    used.add(beside)
                    messages = _joined(messages, _pair("", said, notes)[1:])
            return _list_form(key, form), [*_system(record, messages), *messages]
    for name in TEMPLATE_KEYS:
        if name in ASKED_KEYS and _first(record, ANSWER_KEYS):
            continue  # a question that may quote a dialogue
        if isinstance(record.get(name), str) and (found := read_template(record[name], notes=notes)):
            used.add(name)
            return found
    return _read_pair(record, notes, used)


# --- lists of messages ------------------------------------------------------------------------------------------------


def _read_list(values: list[Any], notes: Counter[str]) -> tuple[str, list[Message]]:
    """(form, messages) of a list that is one conversation."""
    if not values:
        raise NotAConversation("an empty list of messages")
    if all(isinstance(value, str) for value in values):
        roles = ("user", "assistant")
        return "list of turns", [{"role": roles[i % 2], "content": text} for i, text in enumerate(values)]
    if all(isinstance(value, list) for value in values):
        return "list of pairs", [m for pair in values for m in _history_pair(pair)]
    if not all(isinstance(value, dict) for value in values):
        raise NotAConversation("a list of things of different kinds")
    if any(is_message(value) for value in values):
        return ("sharegpt" if "from" in values[0] else "messages"), [_message(value, notes) for value in values]
    messages: list[Message] = []
    for value in values:
        form, pair = _read_pair(value, notes, set())
        messages += pair
    return f"list of {form}", messages


def _take_turns(messages: list[Message], speakers: list[Any]) -> None:
    """Give what two people say to user and assistant; the first who speaks is the user."""
    if len(set(map(str, speakers))) > 2:
        raise NotAConversation("more than two speakers")
    for message, who in zip(messages, speakers, strict=True):
        message["role"] = "user" if who == speakers[0] else "assistant"


def _list_form(key: str, form: str) -> str:
    if form == "messages":
        return {"messages": "messages", "contents": "gemini"}.get(key, f"{key} (role, content)")
    return "ultrachat" if form == "list of turns" and key == "data" else form


def _history_pair(pair: Any) -> list[Message]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str | None) for text in pair):
        raise NotAConversation("a list that is no pair of question and answer")
    return [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]


def _message(value: dict[str, Any], notes: Counter[str]) -> Message:
    """A message of any form with nanochat's names; its role stays as it is if it is not known."""
    value = {key: v for key, v in usual_message(value).items() if v is not None}
    role_key, text_key = _first(value, ROLE_KEYS), _first(value, TEXT_KEYS)
    said = value.get(role_key) if role_key else None
    if isinstance(said, dict):  # {"author": {"role": "user"}}
        said = said.get("role") or said.get("name")
    role = ROLE_OF.get(str(said).strip().lower(), str(said))
    content = value.get(text_key) if text_key else None
    if role == "call":  # ShareGPT with tools
        call = decoded(content)
        calls = call if isinstance(call, list) else [call]
        return {"role": "assistant", "content": None, "tool_calls": [{"function": c} for c in calls]}
    message: Message = {"role": role, "content": str(content) if isinstance(content, int | float) else content}
    for key in ("tool_calls", "function_call", "tool_call_id", "tool_use_id"):
        if value.get(key):
            message[key] = value[key]
    for mark in MARKS:
        if mark in value and is_off(value[mark]):
            message["weight"] = 0
        elif mark in WEIGHTS and mark in value and str(value[mark]).strip().lower() not in ("1", "1.0", "true", "yes"):
            notes[FRACTION] += 1
    for key in value.keys() - {role_key, text_key, *message, *MARKS}:
        if value[key] not in ("", [], {}) and not HARMLESS.fullmatch(key):
            notes[f"{UNUSED_KEY}{key!r} of a message, which is not used"] += 1
    return message


def _system(record: dict[str, Any], messages: list[Message] | None = None) -> list[Message]:
    """The system message that stands beside the turns; none if they have one of their own."""
    key = _first(record, SYSTEM_KEYS)
    text = record[key] if key else None
    if isinstance(text, dict):  # Gemini
        text = text.get("parts") or text.get("text")
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = BETWEEN.join(text)
    if not text or (messages and messages[0]["role"] == "system"):
        return []
    return [{"role": "system", "content": text}]


def _read_segments(segments: list[dict[str, Any]], notes: Counter[str]) -> list[Message]:
    """The messages of Axolotl's input_output form: pieces of one text, labelled whether they are learned."""
    pieces = [(str(part.get("text") or ""), not is_off(part.get("label"))) for part in segments]
    if found := read_template("".join(text for text, _ in pieces), notes=notes):
        learned = "\n".join(text for text, label in pieces if label)
        for message in found[1]:
            if message["role"] == "assistant" and message["content"] not in learned:
                message["weight"] = 0
        return found[1]
    plain = [(re.sub(r"</?s>|<\|(?:begin|end)_?of_?text\|>", "", text).strip(), label) for text, label in pieces]
    return [{"role": "assistant" if label else "user", "content": text} for text, label in plain if text]


# --- questions with answers -------------------------------------------------------------------------------------------


def _read_pair(record: dict[str, Any], notes: Counter[str], used: set[str]) -> tuple[str, list[Message]]:
    """(form, messages) of a record with a question and its answer."""
    keys: dict[str, str] = {}
    for key in record:  # of "Question" and "question" the first that is not empty
        if record.get(keys.setdefault(key.strip().lower(), key)) in _EMPTY:
            keys[key.strip().lower()] = key
    low = {key: record[name] for key, name in keys.items()}
    answer = _first(low, ANSWER_KEYS)
    asked = next((key for key in ASKED_KEYS if key in low and key != answer), None)
    if asked is None or answer is None:
        raise NotAConversation(f"no known form of a conversation (its keys: {_keys(record)})")
    if answer == "answer" and isinstance(low.get("solution"), str) and len(low["solution"]) > len(str(low[answer])):
        answer = "solution"  # how it is found, and not only what comes of it
    context = next((key for key in CONTEXT_KEYS if key in low and key not in (asked, answer)), None)
    used |= {keys[key] for key in (asked, answer, context) if key} | {*SYSTEM_KEYS, "history"}
    question, said = low[asked], low[answer]
    if choices := _choices(record):
        texts, labels, under = choices
        used |= set(under)
        notes[BY_NUMBER] += str(said).strip().isdecimal() and said not in texts and str(said).strip() not in labels
        question, said = _with_choices(question, said, texts, labels)
    if context and str(low[context]).strip() and isinstance(question, str):
        # Alpaca and Dolly say what to do first; a question about a passage stands behind it.
        parts = [question, str(low[context])] if asked == "instruction" else [str(low[context]), question]
        question = BETWEEN.join(part for part in parts if part.strip())
    history = low.get("history") or []
    before = [m for pair in history for m in _history_pair(pair)] if isinstance(history, list) else []
    form = {("instruction", "output"): "alpaca", ("instruction", "response"): "dolly"}.get((asked, answer))
    return form or f"{asked}/{answer}", [*_system(record), *before, *_pair(question, said, notes)]


def _pair(question: Any, answer: Any, notes: Counter[str]) -> list[Message]:
    """The messages of a question and its answer; TRL has lists of messages for both."""
    question, answer = as_messages(decoded(question), "user"), as_messages(decoded(answer), "assistant")
    if isinstance(question, int | float):
        question = str(question)
    lists = isinstance(question, list) and isinstance(answer, list) and len(question) == len(answer) > 1
    if lists and all(isinstance(said, str) for said in (*question, *answer)):  # turn by turn, in two lists
        notes[TURN_BY_TURN] += 1
        return [m for pair in zip(question, answer, strict=True) for m in _history_pair(list(pair))]
    before = _read_list(question, notes)[1] if isinstance(question, list) else [{"role": "user", "content": question}]
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return _joined(before, _read_list(answer, notes)[1])
    if isinstance(question, str):
        if found := read_template(question + " ", whole=True, notes=notes):
            before = found[1]
            answer = without_end_of_turn(answer, found[0]) if isinstance(answer, str) else answer
        else:
            before = [{"role": "user", "content": question.strip()}]
    return [*before, {"role": "assistant", "content": _answer_text(answer, notes)}]


def _joined(question: list[Message], answer: list[Message]) -> list[Message]:
    """The messages of both, once where the answer repeats the question, as LangGraph's does."""
    return answer if answer[: len(question)] == question else [*question, *answer]


def _choices(record: dict[str, Any]) -> tuple[list[str], list[str], list[str]] | None:
    """(the options of a question with several, their labels, the keys that they stand under), None if it has none."""
    for key in ("choices", "options"):
        value = decoded(record.get(key))
        texts: Any = value
        labels: Any = None
        if isinstance(value, dict):  # ARC: {"text": [...], "label": [...]}
            texts, labels = value.get("text"), value.get("label")
            if texts is None and value.keys() <= set(_LETTERS):
                labels = sorted(value)
                texts = [value[label] for label in labels]
        if isinstance(texts, list) and 1 < len(texts) <= len(_LETTERS) and all(isinstance(text, str) for text in texts):
            fits = isinstance(labels, list) and len(labels) == len(texts)
            return texts, [str(label) for label in labels] if fits else list(_LETTERS[: len(texts)]), [key]
    letters = list(itertools.takewhile(lambda x: isinstance(record.get(x), str | int | float), _LETTERS))
    return ([str(record[x]) for x in letters], letters, letters) if len(letters) > 1 else None


def _with_choices(question: Any, answer: Any, choices: list[str], labels: list[str]) -> tuple[Any, Any]:
    """Question and answer of a question with several options: both with the options as a person would read them."""
    if not isinstance(question, str):
        return question, answer
    lines = [f"{label}. {text}" for label, text in zip(labels, choices, strict=True)]
    said = str(answer).strip()
    at = next((i for i, label in enumerate(labels) if label.upper() == said.upper()), -1)
    if at < 0 and said.isdecimal():
        at = int(said)
    asked = question if all(text in question for text in choices) else "\n".join([question, *lines])
    return asked, lines[at] if 0 <= at < len(lines) and said not in choices else answer


def _answer_text(answer: Any, notes: Counter[str]) -> Any:
    if isinstance(answer, dict) and isinstance(answer.get("text"), list):  # SQuAD
        answer = answer["text"]
    if isinstance(answer, list) and answer and all(isinstance(text, str) for text in answer):
        notes[SEVERAL] += len(answer) > 1
        answer = answer[0]
    if isinstance(answer, int | float):
        return str(answer)
    return answer.strip() if isinstance(answer, str) else answer


def _read_preference(record: dict[str, Any], good: str, notes: Counter[str], used: set[str]) -> list[Message]:
    """The conversation with the preferred answer."""
    answer = decoded(record[good])
    if isinstance(answer, dict):
        answer = [answer]
    listed: str | None = next(
        (key for key in LIST_KEYS if isinstance(decoded(record.get(key)), list) and record[key]), None
    )
    asked = listed or _first(record, ASKED_KEYS)
    if asked is not None:
        used |= {asked, *SYSTEM_KEYS}
    before: Any = record.get(asked) if asked else None
    if isinstance(before, dict):  # OpenAI: {"input": {"messages": [...]}}
        before = before.get("messages")
    if isinstance(answer, list):
        messages = _read_list(answer, notes)[1]
        if len(messages) > 1 or before is None:  # the whole conversation stands in it
            return [*_system(record, messages), *messages]
        return [*_system(record), *_pair(before, answer, notes)]
    if isinstance(answer, str) and (found := read_template(answer, notes=notes)):
        return found[1]
    if before is None:
        raise NotAConversation(f"an answer without a question (its keys: {_keys(record)})")
    return [*_system(record), *_pair(before, answer, notes)]


# --- small helpers ----------------------------------------------------------------------------------------------------


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """The first of these keys that the record has."""
    return next((key for key in keys if record.get(key) is not None), None)


def _lowered(value: Any) -> Any:
    """The same with all keys in lower case."""
    if isinstance(value, dict):
        low: dict[str, Any] = {}
        for key, inner in value.items():  # of "Content" and "content" the first that is not empty
            if low.get(str(key).lower()) in _EMPTY:
                low[str(key).lower()] = _lowered(inner)
        return low
    return [_lowered(inner) for inner in value] if isinstance(value, list) else value


def _keys(record: dict[str, Any]) -> str:
    return ", ".join(f"{key:.30}" for key in list(record)[:12]) or "none"
