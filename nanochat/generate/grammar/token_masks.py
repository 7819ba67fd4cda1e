"""Which tokens may come next: a tokenizer's tokens walked through the automaton of a language.

The tokens form a tree of bytes. A state's mask is found by walking the whole tree once from that state, level by level,
with arrays; it is then kept, for every answer with the same language. A token may cross from one part of the language
into the next (`"}` ends a string and an object): the walk doesn't mind.

Shapes: V vocabulary, S states.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nanochat.generate.grammar.language import NEVER, Language, Languages, TooComplex

Ints = npt.NDArray[np.int32]
KEPT_BYTES = 64 << 20  # of the masks of one language; the one that was used longest ago goes first
MOST_NEW_STATES = 10_000  # made to find one mask: about half a second
LONGEST = 1 << 16  # bytes of a shortest answer
_DEAD = 0  # the state that nothing leads out of; state i of a language has the number i + 1 in the table


class TokenTree:
    """The bytes of all tokens as a tree.

    Args:
        token_bytes: of each token, (V,); empty: it can't be a part of a text (special tokens).
        end: the token that ends an answer.

    Raises:
        ValueError: a byte is no token by itself, so that some texts could not be written.
    """

    def __init__(self, token_bytes: Sequence[bytes], end: int) -> None:
        self.end, self.token_bytes = end, list(token_bytes)
        self.by_bytes = {text: token for token, text in enumerate(token_bytes) if text}
        if any(bytes([value]) not in self.by_bytes for value in range(256)):
            raise ValueError("constrained answers need a tokenizer with a token for each of the 256 bytes")
        self.longest = max(map(len, self.by_bytes))
        # Nodes are numbered level by level, the children of each one after the other: so they are a range.
        nodes: dict[bytes, int] = {b"": 0}
        below: dict[bytes, list[bytes]] = {}
        for path in sorted({text[:n] for text in self.by_bytes for n in range(1, len(text) + 1)}):
            below.setdefault(path[:-1], []).append(path)
        first_child, children, value = [], [], [0]
        order = [b""]
        for path in order:  # grows while it is walked
            found = below.get(path, [])
            first_child.append(len(order))
            children.append(len(found))
            for child in found:
                nodes[child] = len(order)
                order.append(child)
                value.append(child[-1])
        self.first_child, self.children = np.array(first_child, np.int32), np.array(children, np.int32)
        self.value = np.array(value, np.int32)  # the byte on the edge to each node
        self.node = np.array([nodes[text] for text in token_bytes], np.int32)  # (V,) where each token ends

    def tokens_of(self, text: bytes) -> list[int]:
        """The fewest tokens that make up a text."""
        best: list[tuple[int, int]] = [(0, 0)]  # for each place: how many tokens lead there, and where the last began
        for end in range(1, len(text) + 1):
            starts = range(max(0, end - self.longest), end)
            best.append(min((best[i][0] + 1, i) for i in starts if text[i:end] in self.by_bytes))
        tokens, end = [], len(text)
        while end:
            start = best[end][1]
            tokens.append(self.by_bytes[text[start:end]])
            end = start
        return tokens[::-1]


@dataclass(frozen=True)
class NextTokens:
    """The tokens that may come in a state."""

    needs: npt.NDArray[np.int32]
    """(V,) bytes that are needed after each token to complete the answer; NEVER where it may not come."""
    most: int
    """The largest of those that are not NEVER."""
    allowed: Tensor
    """(V,) bool: True where needs is not NEVER."""


class TokenMasks:
    """The masks of one language for one tokenizer.

    Args:
        space: made the language.
        start: the language.
        tree: the tokens.
    """

    def __init__(self, space: Languages, start: Language, tree: TokenTree) -> None:
        self.space, self.start, self.tree = space, start, tree
        self._table: Ints = np.zeros((64, 256), np.int32)  # (S, 256): where each byte leads
        self._known = np.zeros(64, bool)  # (S,): which rows of it are filled
        self._masks: OrderedDict[int, NextTokens] = OrderedDict()
        self._kept = max(16, KEPT_BYTES // (5 * len(tree.node)))
        self._lock = threading.RLock()  # one engine per card, each in its thread, may share it

    def state(self, language: Language) -> int:
        """Its number in the table."""
        return language.index + 1

    def step(self, language: Language, token: int) -> Language:
        """The language that is left after a token that may come."""
        with self._lock:
            for value in self.tree.token_bytes[token]:
                language = next(rest for mask, rest in language.edges if mask >> value & 1)
            return language

    def can_go_on(self, language: Language) -> bool:
        """True if `language` has a string beside the empty one."""
        with self._lock:
            return any(rest.least < NEVER for _, rest in language.edges)

    def next_tokens(self, language: Language) -> NextTokens:
        """The tokens that may come where `language` is left to be written."""
        with self._lock:
            return self._next_tokens(language)

    def _next_tokens(self, language: Language) -> NextTokens:
        state = self.state(language)
        if state in self._masks:
            self._masks.move_to_end(state)
            return self._masks[state]
        reached = self._walk(state)  # (nodes,)
        states, place = np.unique(reached, return_inverse=True)
        least = np.array([NEVER if s == _DEAD else self.space.states[s - 1].least for s in states.tolist()], np.int32)
        needs = least[place.reshape(-1)][self.tree.node]  # (V,)
        needs[self.tree.node == 0] = NEVER  # special tokens
        if language.nullable:
            needs[self.tree.end] = 0
        allowed = needs < NEVER
        found = NextTokens(needs, int(needs[allowed].max(initial=0)), torch.from_numpy(allowed))
        self._masks[state] = found
        if len(self._masks) > self._kept:
            self._masks.popitem(last=False)
        return found

    def _walk(self, start: int) -> Ints:
        """The state in which each node of the tree ends, from a state on."""
        tree = self.tree
        reached = np.zeros(len(tree.value), np.int32)
        nodes, states = np.zeros(1, np.int32), np.array([start], np.int32)
        most = len(self.space.states) + MOST_NEW_STATES
        while len(nodes):
            if len(self.space.states) > most:  # everybody's next token waits for this mask
                raise TooComplex
            self._fill(np.unique(states))
            counts = tree.children[nodes]
            ends = np.cumsum(counts)
            # The children of all nodes: for each node the range that begins at its first child.
            ranges = np.arange(ends[-1], dtype=np.int32) - np.repeat(ends - counts, counts)
            children = np.repeat(tree.first_child[nodes], counts) + ranges
            led = self._table[np.repeat(states, counts), tree.value[children]]
            alive = led != _DEAD
            nodes, states = children[alive], led[alive]
            reached[nodes] = states
        return reached

    def _fill(self, states: Ints) -> None:
        for state in states.tolist():
            if state < len(self._known) and self._known[state]:
                continue
            edges = self.space.states[state - 1].edges
            highest = max([state, *(self.state(rest) for _, rest in edges)])
            if highest >= len(self._known):
                more = max(highest + 1, 2 * len(self._known)) - len(self._known)
                self._table = np.concatenate([self._table, np.zeros((more, 256), np.int32)])
                self._known = np.concatenate([self._known, np.zeros(more, bool)])
            for mask, rest in edges:
                self._table[state, _bytes_of(mask)] = self.state(rest)
            self._known[state] = True


class AnswerState:
    """How far one answer has come (see nanochat.generate.sampling.ConstraintState)."""

    def __init__(self, masks: TokenMasks, plan: list[int]) -> None:
        self._masks, self._left = masks, masks.start
        self._plan = plan  # tokens of the shortest answer, as long as it was followed

    @property
    def can_end(self) -> bool:
        """True if what was written is complete."""
        return self._left.nullable

    @property
    def can_go_on(self) -> bool:
        """True if more may follow."""
        return self._masks.can_go_on(self._left)

    def allowed(self, room: int) -> Tensor:
        """The tokens that may come next, (V,) bool: after each the answer can be completed within `room` tokens."""
        found = self._masks.next_tokens(self._left)
        if found.most < room:
            return found.allowed
        # A byte is a token at least, so what needs no more bytes than there is room for tokens can be completed. Where
        # not even the start does, only the shortest answer's own tokens can be relied on, until one of them leads to
        # where the bytes are enough; from there on they always are.
        allowed = torch.from_numpy(found.needs < room)
        if self._plan:
            allowed[self._plan[0]] = True
        return allowed

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        if token != self._masks.tree.end:
            self._left = self._masks.step(self._left, token)
            self._plan = self._plan[1:] if self._plan[:1] == [token] else []


class GrammarConstraint:
    """Answers of one language, for one tokenizer (see nanochat.generate.sampling.Constraint).

    Raises:
        ValueError: the language has no strings, or none that is short enough.
    """

    def __init__(self, space: Languages, language: Language, tree: TokenTree) -> None:
        if language.least >= NEVER:
            raise ValueError(
                "no answer satisfies all that is asked of its form (values may be 24 deep within each other)"
            )
        if language.least > LONGEST:
            raise ValueError(f"the shortest answer of the asked form has {language.least} bytes, the most is {LONGEST}")
        self._masks = TokenMasks(space, language, tree)
        self.shortest = space.shortest(language)
        self._plan = tree.tokens_of(self.shortest)

    @property
    def states(self) -> int:
        """The states that were met so far: what it takes in memory."""
        return len(self._masks.space.states)

    @property
    def least_tokens(self) -> int:
        """The tokens of the shortest answer that is known."""
        return max(1, len(self._plan))

    def start(self) -> AnswerState:
        """The state of a new answer."""
        return AnswerState(self._masks, self._plan)


def _bytes_of(mask: int) -> Any:
    """The members of a set of bytes, as an index."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(mask.to_bytes(32, "little"), np.uint8), bitorder="little"))
