"""Answers that must have a form: JSON, JSON of a schema, one of some texts, a regular expression.

    grammars = Grammars(tokenizer)
    sampling = Sampling(constraint=grammars.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}}))

At each step only those tokens may be sampled after which the answer can still be completed in the room it has, so even
a model that knows nothing ends with a whole value. The other modules here make it so: `schema` reads JSON Schema,
`values` says how a value is written, `language` is an automaton of bytes, `token_masks` walks tokens through it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nanochat.generate.grammar.characters import plain_character
from nanochat.generate.grammar.language import Language, Languages, TooComplex
from nanochat.generate.grammar.patterns import pattern_language, writer
from nanochat.generate.grammar.schema import SUPPORTED, BadSchema, SchemaReader
from nanochat.generate.grammar.token_masks import GrammarConstraint, TokenTree
from nanochat.generate.grammar.values import JsonValues

__all__ = ["SUPPORTED", "BadSchema", "GrammarConstraint", "Grammars"]

KEPT = 32  # constraints, with what they have learned about the tokens
MOST_STATES = 50_000  # a constraint that has met more is made anew: each takes about 2 KB
MOST_STATES_OF_ALL = 200_000  # the constraint that was used longest ago goes first


class ByteTokenizer(Protocol):
    """The part of a tokenizer that constraints need."""

    def get_vocab_size(self) -> int:
        """The number of tokens."""

    def get_special_tokens(self) -> set[str]:
        """The names of the tokens that no text has."""

    def encode_special(self, name: str) -> int:
        """The id of one of them."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids."""


class Grammars:
    """Makes constraints for a tokenizer, and keeps the last ones: each is compiled once. Any thread may use it."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._tree: TokenTree | None = None
        self._made: OrderedDict[tuple[str, str], GrammarConstraint] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: dict[str, Any] | bool) -> GrammarConstraint:
        """JSON that satisfies a schema of draft 2020-12, in the part of it that `SUPPORTED` lists.

        Raises:
            ValueError: (BadSchema) it is wrong, not supported, or nothing satisfies it.
        """
        try:
            key = json.dumps(schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise BadSchema(f"the JSON schema is no JSON: {error}") from None
        if isinstance(schema, dict):  # its own address: no reference needs it, for those to other places are refused
            schema = {name: value for name, value in schema.items() if name != "$id"}
        return self._get("schema", key, lambda space: JsonValues(space, SchemaReader(schema)).value(schema))

    def choice(self, texts: Sequence[str]) -> GrammarConstraint:
        """One of some texts.

        Raises:
            ValueError: there are none, or one is empty.
        """
        if not texts or not all(texts):
            raise ValueError("a choice needs texts to choose from, none of them empty")
        options = [text.encode("utf-8", "replace") for text in texts]
        return self._get("choice", json.dumps(list(texts)), lambda space: space.texts(options))

    def regex(self, pattern: str) -> GrammarConstraint:
        """Texts that match a regular expression from end to end (see nanochat.generate.grammar.patterns).

        Raises:
            ValueError: (PatternError) it is wrong or not supported.
        """
        return self._get(
            "regex",
            pattern,
            lambda space: pattern_language(space, pattern, writer(space, plain_character), whole=True),
        )

    def _get(self, kind: str, key: str, make: Callable[[Languages], Language]) -> GrammarConstraint:
        with self._lock:
            found = self._made.get((kind, key))
            if found is None or found.states > MOST_STATES:
                space = Languages()
                try:
                    found = GrammarConstraint(space, make(space), self._token_tree())
                except RecursionError:
                    raise TooComplex from None
            self._made[kind, key] = found
            self._made.move_to_end((kind, key))
            while len(self._made) > 1 and (len(self._made) > KEPT or self._states() > MOST_STATES_OF_ALL):
                self._made.popitem(last=False)
            return found

    def _states(self) -> int:
        return sum(constraint.states for constraint in self._made.values())

    def _token_tree(self) -> TokenTree:
        if self._tree is None:
            special = {self._tokenizer.encode_special(name) for name in self._tokenizer.get_special_tokens()}
            size = self._tokenizer.get_vocab_size()
            token_bytes = [b"" if token in special else self._tokenizer.decode_bytes([token]) for token in range(size)]
            self._tree = TokenTree(token_bytes, self._tokenizer.encode_special("<|assistant_end|>"))
        return self._tree
