"""What followed the longest match: numpy and Rust find the same, and it is what the definition says."""

import itertools

import numpy as np
import pytest

from nanochat.ops import recall
from nanochat.ops.recall import FOLLOWERS, LONGEST, SHORTEST, find, order_of
from rustbpe import matches

needs_rust = pytest.mark.skipif(matches.library() is None, reason="rustbpe was not compiled here")


def ints(values):
    return np.asarray(values, np.int32)


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
            given = text, order, tokens, bounds, *known
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
        np.testing.assert_array_equal(find(text, order, text), find(text, order, text, bounds_of(documents)))


def longest_matches(text, context, own):
    """By trying every position: the length, and what followed each match of this length."""
    longest, followed = 0, []
    for position in range(len(text) - 1):
        if own[0] <= position < own[1]:
            continue
        length = 0
        while (
            length < min(LONGEST, len(context), position + 1) and text[position - length] == context[-1 - length] >= 0
        ):
            length += 1
        if length > longest:
            longest, followed = length, []
        if length == longest:
            followed.append(text[position + 1])
    return (longest, followed) if longest >= SHORTEST else (0, [])


@pytest.mark.parametrize("in_rust", [pytest.param(True, marks=needs_rust), False])
@pytest.mark.parametrize("ranked", [False, True])
def test_the_longest_match_is_that_of_trying_every_position(ranked, in_rust, monkeypatch):
    if not in_rust:
        monkeypatch.setattr(matches, "library", lambda: None)
    rng = np.random.default_rng(1)
    for _ in range(200):
        # As many positions as are looked at in one direction; no two documents equal, else which is its own is open.
        documents, room = {}, recall.NEIGHBOURS
        while room > 0:
            document = (0, *rng.integers(1, 4, rng.integers(0, min(room, 12))).tolist())
            room -= len(document)
            documents[document] = None
        documents = [ints(document) for document in documents]
        text, order, rank = text_of(documents)
        bounds = bounds_of(documents)
        found = find(text, order, text, bounds, *((rank, bounds[:-1]) if ranked else ()))
        for begin, end in itertools.pairwise(bounds):
            for i in range(begin, end):
                length, followed = longest_matches(text, text[begin : i + 1], (begin, end) if ranked else (0, 0))
                many = min(FOLLOWERS, len(followed))
                kind = 1 + (length - SHORTEST) * FOLLOWERS + many - 1 if many else 0
                assert found[i, 0] == kind
                assert sorted(found[i, 1 : 1 + many]) == sorted(followed) or len(followed) > FOLLOWERS
                assert set(found[i, 1 : 1 + many]) <= set(followed)
                assert not found[i, 1 + many :].any()


@needs_rust
def test_arrays_that_do_not_fit_are_refused_and_no_other_memory_is_read():
    text, order, rank = text_of([ints([0, 1, 2, 3]), ints([0, 1, 2, 4])])
    tokens, bounds = ints([0, 1, 2, 3]), ints([0, 4])
    for wrong in ([], [0], [0, 3], [0, 5], [1, 4], [0, 3, 2, 4], [-1, 4], [0, -4], [2**31 - 1, 4]):
        with pytest.raises(ValueError, match="do not ascend"):
            matches.find(text, order, tokens, ints(wrong))
    for wrong in (order[1:], np.r_[order, order], text[:0]):
        with pytest.raises(ValueError, match="has no order"):
            matches.find(text, wrong, tokens, bounds)
    for short in ([], [1]):
        with pytest.raises(ValueError, match="has no order"):
            matches.find(ints(short), ints(short)[1:], tokens, bounds)
    for outside in (-1, len(order), 2**31 - 1, -(2**31)):
        for known in ((), (rank, ints([4]))):
            with pytest.raises(ValueError, match="not in the text"):
                matches.find(text, np.full_like(order, outside), tokens, bounds, *known)
        matches.find(text, order, tokens, bounds, np.full_like(rank, outside), ints([0]))  # beside it is nothing
    for wrong in ((rank[1:], ints([0])), (rank, ints([])), (rank, ints([0, 4]))):
        with pytest.raises(ValueError, match="another size"):
            matches.find(text, order, tokens, bounds, *wrong)
    for begin in (5, 2**31 - 1):
        with pytest.raises(ValueError, match="does not end in the text"):
            matches.find(text, order, tokens, bounds, rank, ints([begin]))


@needs_rust
def test_whatever_arrays_hold_is_survived():
    rng = np.random.default_rng(2)
    for _ in range(300):
        n = int(rng.integers(2, 60))
        low, high = [(-3, 70), (-(2**31), 2**31 - 1), (0, n - 1)][rng.integers(3)]
        text, tokens = (rng.integers(-2, 4, size).astype(np.int32) for size in (n, 30))
        order, rank = (rng.integers(low, high, n - 1).astype(np.int32) for _ in range(2))
        try:
            begins = rng.integers(low, high, 3).astype(np.int32)
            found = matches.find(text, order, tokens, ints([0, 10, 10, 30]), rank, begins)
        except ValueError:
            continue
        assert ((found[:, 0] >= 0) & (found[:, 0] <= recall.KINDS)).all()


@needs_rust
def test_other_arrays_are_made_contiguous_int32():
    text, order, rank = text_of([ints([0, 1, 2, 3]), ints([0, 1, 2, 4])])
    expected = matches.find(text, order, text[:4], ints([0, 4]), rank, ints([0]))
    wide = np.stack([text, text], axis=1).astype(np.int64)
    got = matches.find(wide[:, 0], order.astype(np.int64), wide[:4, 1], [0, 4], rank.tolist(), [0])
    np.testing.assert_array_equal(got, expected)
    assert matches.find(text, order, ints([]), ints([0])).shape == (0, 1 + FOLLOWERS)
