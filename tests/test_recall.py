"""What followed the longest matches: numpy and Rust find the same, and it is what the definition says."""

import itertools

import numpy as np
import pytest

from nanochat.ops import recall
from nanochat.ops.recall import (
    FOLLOWERS,
    KINDS,
    LEVEL,
    LEVELS,
    LONGEST,
    SHORTEST,
    WINDOW,
    find,
    order_of,
    weights_of,
)
from rustbpe import matches

needs_rust = pytest.mark.skipif(matches.library() is None, reason="rustbpe was not compiled here")


def ints(values):
    return np.asarray(values, np.int32)


def weights_for(text):
    """Of tokens in a short text: different ones, so that every level occurs."""
    return ints(np.random.default_rng(len(text)).integers(0, 20, max(int(np.max(text, initial=0)), 0) + 1))


def text_of(documents):
    """Documents behind each other: the text, its order and its rank."""
    text = ints(np.concatenate(documents))
    order = order_of(text)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return text, order, rank


def begins_in(text, documents):
    """Where documents stand in a text of documents that begin with 0; −1: nowhere."""
    starts = [*np.flatnonzero(text == 0).tolist(), len(text)]
    stands = {text[a:b].tobytes(): a for a, b in itertools.pairwise(starts)}
    return ints([stands.get(document.tobytes(), -1) for document in documents])


def bounds_of(documents):
    return ints(np.cumsum([0, *map(len, documents)]))


def random_documents(rng, most=12):
    """Of few tokens, each begun by 0; some equal, some the beginning of another, some of nothing but the 0."""
    vocabulary, documents = rng.integers(2, 6), []
    for _ in range(rng.integers(2, most)):
        kind = rng.integers(4) if documents else 0
        if kind < 2:
            documents.append(ints([0, *rng.integers(1, vocabulary, rng.integers(0, 40))]))
        else:
            other = documents[rng.integers(len(documents))]
            documents.append(other[: rng.integers(1, len(other) + 1)] if kind == 2 else other)
    return documents


def wanted_documents(rng, documents):
    """To look up: those of the text, others, nothing, and some with −1 where there is no token."""
    chosen = [documents[i] for i in rng.integers(0, len(documents), 4)]
    chosen += [ints([]), ints([0, *rng.integers(1, 6, 20)]), ints([-1] * 7 + [0, 1, 2, 1]), ints([])]
    holes = np.concatenate(documents)
    holes[rng.random(len(holes)) < 0.2] = -1
    chosen.append(holes)
    return [chosen[i] for i in rng.permutation(len(chosen))]


@needs_rust
@pytest.mark.parametrize("ranked", [False, True])
def test_rust_finds_what_numpy_finds(ranked, monkeypatch):
    rng = np.random.default_rng(0)
    for _ in range(60):
        documents = random_documents(rng)
        text, order, rank = text_of(documents)
        for looked_up in (documents, wanted_documents(rng, documents)):
            tokens, bounds = ints(np.concatenate(looked_up)), bounds_of(looked_up)
            known = (rank, begins_in(text, looked_up)) if ranked else ()
            given = text, order, weights_for(text), tokens, bounds, *known
            ours = matches.find(*given)
            with monkeypatch.context() as patch:
                patch.setattr(matches, "library", lambda: None)
                expected = find(*given)
            assert ours.dtype == expected.dtype == np.int32
            np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("in_rust", [pytest.param(True, marks=needs_rust), False])
def test_no_context_reaches_beyond_the_token_that_begins_a_document(in_rust, monkeypatch):
    """With and without bounds the same: a row of several documents is looked up as if each were alone."""
    if not in_rust:
        monkeypatch.setattr(matches, "library", lambda: None)
    rng = np.random.default_rng(3)
    for _ in range(40):
        documents = random_documents(rng)
        text, order, _ = text_of(documents)
        weights = weights_for(text)
        alone = find(text, order, weights, text, bounds_of(documents))
        np.testing.assert_array_equal(find(text, order, weights, text), alone)


def every_match(text, weights, context, own):
    """By trying every position: (length, token that followed, level) of each match, the longest first."""
    matches = []
    for position in range(len(text) - 1):
        length = 0
        while (
            length < min(LONGEST, len(context), position + 1) and text[position - length] == context[-1 - length] >= 0
        ):
            length += 1
        if length < SHORTEST or own[0] <= position < own[1]:
            continue
        before, at = set(), position - length
        while text[at + 1] != text[0] and at >= 0 and text[at] != text[0] and position - length - at < WINDOW:
            before.add(text[at])
            at -= 1
        shared = sum(weights[token] for token in before & set(context[-WINDOW:]))
        matches.append((length, int(text[position + 1]), min(int(shared) // LEVEL, LEVELS - 1)))
    return sorted(matches, reverse=True)


def unpacked(row):
    """(length, token, level) of each match in a row that was found."""
    kinds, tokens = row % KINDS, row // KINDS
    return [
        (length, token, level)
        for length, token, level in zip(kinds // LEVELS, tokens, kinds % LEVELS, strict=True)
        if length
    ]


@pytest.mark.parametrize("in_rust", [pytest.param(True, marks=needs_rust), False])
@pytest.mark.parametrize("ranked", [False, True])
def test_the_longest_matches_are_those_of_trying_every_position(ranked, in_rust, monkeypatch):
    if not in_rust:
        monkeypatch.setattr(matches, "library", lambda: None)
    rng = np.random.default_rng(1)
    for _ in range(40):
        # As many positions as are looked at in one direction; no two documents equal, else which is its own is open.
        documents, room = {}, recall.NEIGHBOURS
        while room > 0:
            document = (0, *rng.integers(1, 4, rng.integers(0, min(room, 12))).tolist())
            room -= len(document)
            documents[document] = None
        documents = [ints(document) for document in documents]
        text, order, rank = text_of(documents)
        bounds, weights = bounds_of(documents), weights_for(text)
        found = find(text, order, weights, text, bounds, *((rank, bounds[:-1]) if ranked else ()))
        for begin, end in itertools.pairwise(bounds):
            for i in range(begin, end):
                expected = every_match(text, weights, text[begin : i + 1], (begin, end) if ranked else (0, 0))
                ours = unpacked(found[i])
                assert [m[0] for m in ours] == [m[0] for m in expected[:FOLLOWERS]]
                if len(expected) <= FOLLOWERS:
                    assert sorted(ours, reverse=True) == expected
                assert set(ours) <= set(expected)


@pytest.mark.parametrize("in_rust", [pytest.param(True, marks=needs_rust), False])
def test_a_subject_is_that_of_a_window_and_of_one_document(in_rust, monkeypatch):
    """In documents longer than a window; with and without the first tokens as context only."""
    if not in_rust:
        monkeypatch.setattr(matches, "library", lambda: None)
    rng = np.random.default_rng(4)
    documents = [ints([0, *rng.integers(1, 60, n)]) for n in (300, 7, 400, 2)]
    documents[2][200:300] = np.where(rng.random(100) < 0.8, documents[0][100:200], documents[2][200:300])
    text, order, rank = text_of(documents)
    weights, bounds = ints(rng.integers(0, 4, 60)), bounds_of(documents)
    found = find(text, order, weights, text, bounds, rank, bounds[:-1])
    levels = set()
    for begin, end in itertools.pairwise(bounds):
        for i in range(begin, end):
            expected = every_match(text, weights, text[begin : i + 1], (begin, end))
            assert sorted(unpacked(found[i]), reverse=True) == expected
            levels |= {level for _, _, level in expected}
    assert len(levels) > 8
    for skip in (0, 1, 127, 300, 308, 500, len(text)):
        np.testing.assert_array_equal(find(text, order, weights, text, bounds, rank, bounds[:-1], skip), found[skip:])


def test_rare_tokens_say_what_a_text_is_about():
    text = ints([0] * 10 + [1] * 4000 + [2] * 20 + [3] * 10 + [4])
    assert weights_of(text).tolist() == [2, 0, 1, 2, 5]  # 4041 // (200 · how often), its bits


@needs_rust
def test_arrays_that_do_not_fit_are_refused_and_no_other_memory_is_read():
    text, order, rank = text_of([ints([0, 1, 2, 3]), ints([0, 1, 2, 4])])
    tokens, bounds, weights = ints([0, 1, 2, 3]), ints([0, 4]), weights_for(text)
    for wrong in ([], [0], [0, 3], [0, 5], [1, 4], [0, 3, 2, 4], [-1, 4], [0, -4], [2**31 - 1, 4]):
        with pytest.raises(ValueError, match="do not ascend"):
            matches.find(text, order, weights, tokens, ints(wrong))
    for wrong in (order[1:], np.r_[order, order], text[:0]):
        with pytest.raises(ValueError, match="has no order"):
            matches.find(text, wrong, weights, tokens, bounds)
    for short in ([], [1]):
        with pytest.raises(ValueError, match="has no order"):
            matches.find(ints(short), ints(short)[1:], weights, tokens, bounds)
    for outside in (-1, len(order), 2**31 - 1, -(2**31)):
        for known in ((), (rank, ints([4]))):
            with pytest.raises(ValueError, match="not in the text"):
                matches.find(text, np.full_like(order, outside), weights, tokens, bounds, *known)
        matches.find(
            text, order, weights, tokens, bounds, np.full_like(rank, outside), ints([0])
        )  # beside it is nothing
    for wrong in ((rank[1:], ints([0])), (rank, ints([])), (rank, ints([0, 4]))):
        with pytest.raises(ValueError, match="another size"):
            matches.find(text, order, weights, tokens, bounds, *wrong)
    for begin in (5, 2**31 - 1):
        with pytest.raises(ValueError, match="does not end in the text"):
            matches.find(text, order, weights, tokens, bounds, rank, ints([begin]))


@needs_rust
def test_whatever_arrays_hold_is_survived():
    rng = np.random.default_rng(2)
    for _ in range(300):
        n = int(rng.integers(2, 60))
        low, high = [(-3, 70), (-(2**31), 2**31 - 1), (0, n - 1)][rng.integers(3)]
        text, tokens = (rng.integers(-2, 4, size).astype(np.int32) for size in (n, 30))
        order, rank = (rng.integers(low, high, n - 1).astype(np.int32) for _ in range(2))
        weights = rng.integers(low, high, rng.integers(0, 6)).astype(np.int32)
        try:
            begins = rng.integers(low, high, 3).astype(np.int32)
            matches.find(text, order, weights, tokens, ints([0, 10, 10, 30]), rank, begins)
        except ValueError:
            continue


@needs_rust
def test_other_arrays_are_made_contiguous_int32():
    text, order, rank = text_of([ints([0, 1, 2, 3]), ints([0, 1, 2, 4])])
    weights = weights_for(text)
    expected = matches.find(text, order, weights, text[:4], ints([0, 4]), rank, ints([0]))
    wide = np.stack([text, text], axis=1).astype(np.int64)
    got = matches.find(wide[:, 0], order.astype(np.int64), weights.tolist(), wide[:4, 1], [0, 4], rank.tolist(), [0])
    np.testing.assert_array_equal(got, expected)
    assert matches.find(text, order, weights, ints([]), ints([0])).shape == (0, FOLLOWERS)
