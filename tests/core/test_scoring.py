import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from saetool.core import ngram, scoring
from saetool.core.ngram import Entry

FLOATS = st.floats(-1e6, 1e6, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)


def flat(values: list[float]) -> np.ndarray:
    return np.array([values], dtype=np.float64)


# --- simulation ------------------------------------------------------------------------------------------------


@given(arrays(np.float64, st.tuples(st.integers(3, 40), st.just(2)), elements=FLOATS))
@settings(max_examples=200, deadline=None)
def test_correlations_equal_scipys(values: np.ndarray) -> None:
    y, p = values.T
    if np.ptp(y) == 0 or np.ptp(p) == 0:
        assert scoring.pearson(y, p) is None
        return
    assert scoring.pearson(y, p) == pytest.approx(stats.pearsonr(y, p).statistic, abs=1e-6)
    ours = scoring.pearson(scoring.ranks(y), scoring.ranks(p))
    assert ours == pytest.approx(stats.spearmanr(y, p).statistic, abs=1e-9)


def test_a_perfect_prediction_scores_one_everywhere() -> None:
    acts = np.array([[0.0, 2, 1], [4, 0, 0], [0, 0, 0]])
    result = scoring.simulation(acts, acts * 2.5, np.array([3, 3, 3]), scale=4.0)
    scores = (result.correlation, result.spearman, result.r2_zero, result.abs_dev_explained, result.correlation_example)
    assert scores == pytest.approx((1, 1, 1, 1, 1))
    assert result.null_reason is None
    assert (result.n_tokens, result.n_windows) == (9, 3)


@pytest.mark.parametrize(
    ("acts", "predictions", "length", "reason"),
    [
        ([0.0, 1, 2, 3], [5.0, 5, 5, 5], 4, "constant_prediction"),
        ([2.0, 2, 2, 2], [0.0, 1, 2, 3], 4, "constant_truth"),
        ([0.0, 1, 9, 9], [0.0, 1, 2, 3], 2, "too_few"),
    ],
)
def test_an_undefined_correlation_is_none_with_its_reason(acts, predictions, length, reason) -> None:
    result = scoring.simulation(flat(acts), flat(predictions), np.array([length]), scale=1.0)
    assert result.correlation is None
    assert result.spearman is None
    assert result.null_reason == reason


def test_a_window_without_tokens_left_over_changes_nothing() -> None:
    acts, p = np.array([[0.0, 1, 2], [3, 7, 7]]), np.array([[1.0, 0, 2], [4, -5, 5]])
    padded = scoring.simulation(acts, p, np.array([3, 1]), 3.0)
    y, q = np.array([0.0, 1, 2, 3]), np.array([1.0, 0, 2, 4])
    assert padded.correlation == pytest.approx(np.corrcoef(y, q)[0, 1])
    assert padded.r2_zero == pytest.approx(1 - ((y * 10 / 3 - q) ** 2).sum() / ((y * 10 / 3) ** 2).sum())
    assert padded.abs_dev_explained == pytest.approx(1 - np.abs(y * 10 / 3 - q).sum() / np.abs(y * 10 / 3).sum())
    assert padded.n_tokens == 4


def test_predicting_nothing_explains_nothing() -> None:
    result = scoring.simulation(flat([0, 1, 2]), flat([0, 0, 0]), np.array([3]), 2.0)
    assert (result.r2_zero, result.abs_dev_explained) == (0.0, 0.0)


def test_correlation_is_the_same_at_any_scale() -> None:
    g = np.random.default_rng(0)
    y, p = g.random(50), g.random(50)
    assert scoring.pearson(y * 1e-30, p * 1e30) == pytest.approx(scoring.pearson(y, p), abs=1e-12)


# --- summaries -------------------------------------------------------------------------------------------------


def test_undefined_scores_are_counted_and_cannot_raise_the_mean() -> None:
    summary = scoring.summarise([0.8, None, 0.6, None], seed=0)
    assert (summary.n, summary.n_null) == (2, 2)
    assert summary.mean == pytest.approx(0.7)
    assert summary.mean_null0 == pytest.approx(0.35)


def test_the_bootstrap_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(0.5, 0.2, 400)
    low, high = scoring.summarise(values.tolist(), seed=1).ci95
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.15)
    assert scoring.summarise(values.tolist(), seed=1).ci95 == (low, high)


def test_no_scores_make_an_empty_summary() -> None:
    assert scoring.summarise([], 0).mean is None
    assert scoring.summarise([None], 0).mean_null0 == 0.0


# --- multiple choice -------------------------------------------------------------------------------------------


def test_tied_options_share_the_point() -> None:
    similarities = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.0, 0.0, 0.0], [0.3, 0.1, 0.8]])
    answers = scoring.choose(similarities, np.array([0, 1, 2, 0]))
    assert answers.points.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 0])
    assert answers.chosen.tolist() == [0, -1, -1, 2]


def test_what_float32_cannot_tell_apart_is_a_tie() -> None:
    noise = np.random.default_rng(0).normal([0.3, 0.3, 0.2999], 1e-8, (50, 3))
    answers = scoring.choose(noise, np.zeros(50, dtype=int))
    assert (answers.chosen == -1).all() and (answers.points == 1 / 2).all()


def test_random_similarities_answer_at_chance() -> None:
    g = np.random.default_rng(0)
    answers = scoring.choose(g.random((4000, 5)), g.integers(0, 5, 4000))
    low, high = scoring.wilson(answers.points.sum(), 4000, z=3.29)
    assert low < 0.2 < high


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (10, 10), (33, 100), (700, 1000)])
def test_the_wilson_interval_equals_scipys(correct: int, n: int) -> None:
    theirs = stats.binomtest(correct, n).proportion_ci(method="wilson")
    assert scoring.wilson(float(correct), n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


# --- tables ----------------------------------------------------------------------------------------------------


def brute_table(tokens, acts, lengths, scale):
    """Strength of every token and every pair, by counting."""
    sums, counts = {}, {}
    for row, values, n in zip(tokens.tolist(), acts.tolist(), lengths.tolist(), strict=True):
        for i in range(n):
            for key in [(None, row[i])] + ([(row[i - 1], row[i])] if i else []):
                sums[key] = sums.get(key, 0) + values[i]
                counts[key] = counts.get(key, 0) + 1
    return {k: min(10, round(10 * sums[k] / (counts[k] + 0.5) / scale)) for k in sums}


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_strengths_are_shrunken_means_and_predictions_are_looked_up(seed: int) -> None:
    g = np.random.default_rng(seed)
    tokens, lengths = g.integers(0, 6, (4, 7)), g.integers(1, 8, 4)
    acts = g.random((4, 7)) * (g.random((4, 7)) < 0.4)
    expected = brute_table(tokens, acts, lengths, 1.0)
    table = ngram.build(tokens, acts, lengths, 100, 1.0)
    for entry in table:
        assert entry.strength == expected[entry.previous, entry.token]
    alone = {t: s for (p, t), s in expected.items() if p is None and s > 0}
    assert {e.token: e.strength for e in table if e.previous is None} == alone
    for p, t, s in table:
        assert p is None or abs(s - alone.get(t, 0)) >= 2
    lookup = {(p, t): s for p, t, s in table}
    predicted = ngram.predict(table, tokens, lengths)
    for i in range(4):
        for j in range(7):
            want = lookup.get((None, int(tokens[i, j])), 0)
            if j:
                want = lookup.get((int(tokens[i, j - 1]), int(tokens[i, j])), want)
            assert predicted[i, j] == (want if j < lengths[i] else 0)


def test_a_table_keeps_the_tokens_with_the_largest_sums() -> None:
    tokens = np.array([[0, 1, 2, 1, 2, 3]])
    acts = np.array([[9.0, 5, 8, 5, 8, 0]])
    table = ngram.build(tokens, acts, np.array([6]), 2, 9.0)
    assert [e.token for e in table if e.previous is None] == [2, 1]


def test_a_pair_is_told_from_its_token() -> None:
    tokens = np.array([[7, 3, 5, 3, 6, 3], [7, 3, 1, 3, 2, 3], [7, 3, 8, 3, 9, 3]])
    acts = np.where((np.roll(tokens, 1, 1) == 7) & (tokens == 3), 1.0, 0.0)
    table = ngram.build(tokens, acts, np.array([6, 6, 6]), 10, 1.0)
    assert Entry(7, 3, 9) in table
    predicted = ngram.predict(table, tokens, np.array([6, 6, 6]))
    assert predicted[:, 1].tolist() == [9, 9, 9]
    assert predicted[:, 3:].max() <= 3


def test_a_description_says_all_that_the_table_says_and_hides_no_character() -> None:
    strings = {1: " Einstein", 2: "instein", 3: "Al", 4: "bert", 5: 'a"\n\u202eb\u00a0'}
    table = (Entry(None, 1, 10), Entry(None, 2, 9), Entry(3, 4, 4), Entry(None, 5, 1))
    text = ngram.describe(table, strings.__getitem__)
    assert text == 'Einstein 10; instein 9; "a\\"\\n\\u202eb\\u00a0" 1; after "Al": "bert" 4'
    assert ngram.describe((), strings.__getitem__) == "no token and no pair of tokens stands out"


# --- detection -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 2.0, 5.0, 7.5, 10.0])), min_size=1, max_size=30))
@settings(max_examples=100, deadline=None)
def test_detection_equals_counting_by_hand(answers: list[tuple[bool, float]]) -> None:
    truth, certainty = np.array([a for a, _ in answers]), np.array([c for _, c in answers])
    found = scoring.detection(truth, certainty)
    said = [(a, c >= 5) for a, c in answers]
    assert (found.tp, found.fp, found.fn, found.tn) == tuple(
        said.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False))
    )
    assert found.accuracy == pytest.approx(np.mean([a == b for a, b in said]))
    pairs = [(c > d) + (c == d) / 2 for a, c in answers for b, d in answers if a and not b]
    if truth.all() or not truth.any():
        assert found.balanced_accuracy is found.auc is None
    else:
        assert found.auc == pytest.approx(np.mean(pairs))
        shares = [np.mean([b == a for a, b in said if a == kind]) for kind in (True, False)]
        assert found.balanced_accuracy == pytest.approx(np.mean(shares))
    if found.mcc is not None:
        assert found.mcc == pytest.approx(np.corrcoef([a for a, _ in said], [b for _, b in said])[0, 1])


def test_saying_no_to_everything_is_worth_half() -> None:
    found = scoring.detection(np.array([True] * 4 + [False] * 10), np.zeros(14))
    assert found.balanced_accuracy == 0.5
    assert found.accuracy == found.trivial_accuracy == pytest.approx(10 / 14)
    assert found.mcc is None


ENTRIES = st.tuples(st.none() | st.integers(0, 5), st.integers(0, 5), st.integers(0, 10)).map(lambda e: Entry(*e))


STRINGS = st.text(min_size=1, max_size=4) | st.sampled_from([" ab", "ab", "Ab", " AB", " after", "After", "x", " X"])


@given(st.lists(ENTRIES, max_size=8), st.lists(STRINGS, min_size=6, max_size=6, unique=True), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_a_description_says_what_the_table_predicts(entries: list[Entry], strings: list[str], seed: int) -> None:
    table = tuple({(e.previous, e.token): e for e in entries}.values())
    text = ngram.describe(table, strings.__getitem__, lambda token: ["longer", 'w"ord'] if token % 2 else [])

    def word(asked: str) -> list[int]:
        return [i for i, s in enumerate(strings) if ngram.word_of(s) == ngram.word_of(asked)]

    again = ngram.parse(text, lambda s: [strings.index(s)], word)
    assert again is not None
    tokens, lengths = np.random.default_rng(seed).integers(0, 6, (40, 5)), np.full(40, 5)
    words = ngram.alike(strings)
    want = ngram.predict(table, tokens, lengths, words)
    assert (ngram.predict(again, tokens, lengths, words) == want).all()


def test_a_word_speaks_for_spellings_that_were_never_seen() -> None:
    strings = [" during", "During", " during", " May", " may", "s", "S", "x"]
    words = ngram.alike(strings)
    assert words.tolist() == [0, 0, 0, 3, 3, 5, 6, 7]
    # " during" fires, "During" was never shown; " May" fires, " may" does not; "s" fires, and "S" is another letter.
    tokens = np.array([[0, 3, 4, 5, 7, 7]])
    acts = np.array([[9.0, 9, 0, 9, 0, 0]])
    table = ngram.build(tokens, acts, np.array([6]), 10, 9.0, words)
    assert ngram.predict(table, np.array([[1, 3, 4, 5, 6, 7]]), np.array([6]), words).tolist() == [[7, 7, 0, 7, 0, 0]]
    assert ngram.describe(table, strings.__getitem__) == 'during 7; May 7; "s" 7; " may" 0'
    assert (ngram.predict(table, tokens, np.array([6])) == ngram.predict(table, tokens, np.array([6]), words)).all()


@pytest.mark.parametrize("text", ["the word two", '" two"', '" two" 11', '" two" 3; and more', "", '"a" 3 "b" 4'])
def test_other_text_is_no_table(text: str) -> None:
    assert ngram.parse(text, lambda s: [0], lambda s: [0]) is None
