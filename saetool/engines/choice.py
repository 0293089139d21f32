"""Meta-latents: labels from the latents they are active on, and the multiple choice that tests them.

(Leask et al., arXiv 2502.04878, section 5.1.) The inputs of a meta-SAE are the unit decoder rows of its parent. A
meta-latent's members are the parent's latents on which it is active; its table is the mean of the unit-length token
tables of the strongest labelled ones.

Multiple choice by tables: a latent's profile is the sum of its meta-latents' tables, weighted by activation; of its
own table and a few random latents' tables, the one with the largest cosine to the profile is the answer. Tables are
compared as text: by tokens, by words whatever their case and spaces, and by pieces of two to four letters, so that
" bank" is near "banking". By tokens alone nearly half of the questions had no overlap at all, and were ties.

The profiles are made *without* any of the options: with the latent asked about in it the question would answer itself,
and with another option in it that one would be favoured (leaving out only the right one put the control at 16% where
chance is 20%). Where several SAEs were parents, a latent's like in another one stays in: such questions are easier,
and their accuracy is not to be compared with that of a single parent. Control: the profile of another latent, none of
the options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from saetool.core import ngram, scoring
from saetool.core.ngram import Table

N_MEMBERS = 5
"""Member latents that make a meta-latent's label, as in the paper's public app."""
N_PROFILE = 20
"""Member latents that the tables' profile of a meta-latent is made of."""
WORD, PIECE = 1.0, 0.3
"""Weights of a word, and of each of its pieces, beside 1 for the token itself."""


@dataclass(frozen=True)
class Tables:
    """Unit-length token tables of the parent's latents."""

    unit: sparse.csr_array
    """[n_parent, n_tokens]; a row of zeros for a latent without a table."""
    token: Int[np.ndarray, " n_tokens"]
    """Token id of each column."""
    text: sparse.csr_array
    """[n_parent, n_features] of unit length: tokens, words and pieces of words."""
    labelled: Int[np.ndarray, " m"]
    """Latents with a table, rising."""

    def only(self, latents: Int[np.ndarray, " m"]) -> "Tables":
        """With these of the labelled latents alone."""
        return Tables(self.unit, self.token, self.text, np.intersect1d(self.labelled, latents))


@dataclass(frozen=True)
class Label:
    """What is said of one meta-latent."""

    latent: int
    reason: str | None
    """dead (active on no latent), unlabelled (on none with a table), or None."""
    table: Table
    members: tuple[tuple[int, float], ...]
    """The strongest labelled members and their activations; without any labelled one, the strongest."""
    n_members: int
    max_act: float


@dataclass(frozen=True)
class Questions:
    """One row a question of the multiple choice."""

    latent: Int[np.ndarray, " q"]
    options: Int[np.ndarray, "q o"]
    """Latents to choose from, in random order."""
    right: Int[np.ndarray, " q"]
    """The column of ``latent`` in ``options``."""
    answers: scoring.Answers
    control: scoring.Answers
    """Answers from the profile of another latent."""
    control_latent: Int[np.ndarray, " q"]
    n_unexplained: int
    """Labelled latents without any active meta-latent, which cannot be asked about."""


def token_tables(tables: Mapping[int, Table], n_parent: int, strings: Mapping[int, str] | None = None) -> Tables:
    """Tables as vectors over tokens: a token's largest strength, with or without a previous token, unit length.

    Tokens of the same word are one, the first of them. Without the tokens' ``strings``, tables are compared by tokens
    alone.
    """
    strongest: dict[tuple[int, int], int] = {}
    same = _same_words(strings or {})
    for latent, table in tables.items():
        for entry in table:
            place = (latent, same.get(entry.token, entry.token))
            strongest[place] = max(strongest.get(place, 0), entry.strength)
    places = [(latent, token, s) for (latent, token), s in strongest.items() if s > 0]
    row, ids, value = (np.array(x, dtype=np.int64) for x in (zip(*places, strict=True) if places else ((), (), ())))
    token, column = np.unique(ids, return_inverse=True)
    matrix = sparse.csr_array((value.astype(np.float64), (row, column)), shape=(n_parent, len(token)))
    spelled = sparse.csr_array(matrix @ _spelling(token, strings)) if strings is not None else matrix
    return Tables(_unit(matrix), token, _unit(spelled), np.unique(row))


def _same_words(strings: Mapping[int, str]) -> dict[int, int]:
    """For each token the first one that is the same word."""
    ids = sorted(strings)
    first = ngram.alike([strings[i] for i in ids]).tolist()
    return {token: ids[i] for token, i in zip(ids, first, strict=True)}


def _spelling(token: Int[np.ndarray, " t"], strings: Mapping[int, str]) -> sparse.csr_array:
    """[n_tokens, n_features]: each token as itself, its word, and the word's pieces (edges of the word marked)."""
    found: list[dict[str, float]] = []
    for one in token.tolist():
        word = strings.get(one, "").strip().lower()
        features = {f"t{one}": 1.0}
        if word:
            features[f"w{word}"] = WORD
            edged = f"\x02{word}\x03"
            for n in (2, 3, 4):
                for i in range(len(edged) - n + 1):
                    features[f"p{edged[i : i + n]}"] = features.get(f"p{edged[i : i + n]}", 0.0) + PIECE
        found.append(features)
    columns = {name: i for i, name in enumerate(sorted({name for features in found for name in features}))}
    places = [(i, columns[name], weight) for i, features in enumerate(found) for name, weight in features.items()]
    row, column, value = zip(*places, strict=True) if places else ((), (), ())
    return sparse.csr_array((np.array(value, dtype=np.float64), (row, column)), shape=(len(token), len(columns)))


def _unit(matrix: sparse.csr_array) -> sparse.csr_array:
    norms = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    return sparse.csr_array(sparse.diags_array(1 / np.where(norms > 0, norms, 1)) @ matrix)


def strongest_members(
    z: Float[np.ndarray, "n_parent n_meta"], among: Int[np.ndarray, " m"], n: int
) -> Int[np.ndarray, "n_meta n"]:
    """The ``n`` latents ``among`` with the largest activations of each meta-latent; −1 where there are fewer."""
    order = np.argsort(-z[among], axis=0, kind="stable")[:n]
    members = np.where(np.take_along_axis(z[among], order, 0) > 0, among[order], -1).T
    return np.pad(members, ((0, 0), (0, n - members.shape[1])), constant_values=-1)


def label(z: Float[np.ndarray, "n_parent n_meta"], tables: Tables, latents: Sequence[int], size: int) -> list[Label]:
    """The labels of meta-latents ``latents``: the ``size`` tokens with the largest mean, strongest 10."""
    best = strongest_members(z, tables.labelled, N_MEMBERS)
    out = []
    for latent in latents:
        column = z[:, latent]
        n, mine = int((column > 0).sum()), best[latent][best[latent] >= 0]
        reason = None if len(mine) else ("unlabelled" if n else "dead")
        shown = mine if len(mine) else np.argsort(-column, kind="stable")[: min(n, N_MEMBERS)]
        members = tuple((int(m), float(column[m])) for m in shown)
        table: Table = ()
        if len(mine):
            mean = tables.unit[mine].sum(axis=0) / len(mine)
            order = np.lexsort((tables.token, -mean))[:size]
            strength = np.rint(ngram.LEVELS * mean[order] / mean.max()).astype(int)
            table = tuple(
                ngram.Entry(None, int(tables.token[i]), int(s)) for i, s in zip(order, strength, strict=True) if s
            )
        out.append(Label(latent, reason, table, members, n, float(column.max(initial=0))))
    return out


def _profiles(
    z: Float[np.ndarray, "n_parent n_meta"],
    best: Int[np.ndarray, "n_meta n"],
    tables: Tables,
    source: Int[np.ndarray, " q"],
    without: Int[np.ndarray, "q o"],
) -> sparse.csr_array:
    """Unit profiles [q, n_features]: of the meta-latents active on ``source``, made without the latents ``without``.

    ``best`` holds so many more members than ``N_PROFILE`` as may have to be left out.
    """
    question, meta = np.nonzero(z[source] > 0)
    members = best[meta]
    usable = (members >= 0) & (members[:, :, None] != without[question][:, None, :]).all(axis=2)
    usable &= np.cumsum(usable, axis=1) <= N_PROFILE
    weight = z[source][question, meta] / np.maximum(usable.sum(axis=1), 1)
    pair, place = np.nonzero(usable)
    weights = sparse.csr_array(
        (weight[pair], (question[pair], members[pair, place])), shape=(len(source), tables.text.shape[0])
    )
    return _unit(sparse.csr_array(weights @ tables.text))


def ask(
    z: Float[np.ndarray, "n_parent n_meta"], tables: Tables, n_questions: int, n_options: int, seed: int
) -> Questions:
    """The multiple choice over up to ``n_questions`` random latents that have a table and an active meta-latent.

    ``n_options`` must not exceed the number of latents with a table.
    """
    generator = np.random.default_rng(seed)
    active = (z[tables.labelled] > 0).any(axis=1)
    askable = tables.labelled[active]
    latent = np.sort(generator.permutation(askable)[:n_questions])
    n = len(latent)
    options, right, control = (np.zeros(s, dtype=np.int64) for s in ((n, n_options), n, n))
    for i, one in enumerate(latent.tolist()):
        picked = generator.choice(tables.labelled, n_options, replace=False)  # n_options − 1 others are among them
        others = picked[picked != one][: n_options - 1]
        right[i] = generator.integers(n_options)
        options[i] = np.insert(others, right[i], one)
        donors = generator.choice(askable, min(n_options + 1, len(askable)), replace=False)
        donors = donors[~np.isin(donors, options[i])]
        control[i] = donors[0] if len(donors) else -1
    best = strongest_members(z, tables.labelled, N_PROFILE + n_options)

    def similarities(source: Int[np.ndarray, " q"]) -> Float[np.ndarray, "q o"]:
        profiles = _profiles(z, best, tables, source, options)
        columns = [profiles.multiply(tables.text[options[:, o]]).sum(axis=1) for o in range(n_options)]
        return np.stack(columns, axis=1)

    # A latent without any donor is its own control's donor with no meta-latents: an all-way tie.
    return Questions(
        latent,
        options,
        right,
        scoring.choose(similarities(latent), right),
        scoring.choose(similarities(np.maximum(control, 0)) * (control >= 0)[:, None], right),
        control,
        int(len(tables.labelled) - active.sum()),
    )


def by_meta_latent(
    z: Float[np.ndarray, "n_parent n_meta"], questions: Questions, answered: Bool[np.ndarray, " q"] | None = None
) -> tuple[Float[np.ndarray, " n_meta"], Int[np.ndarray, " n_meta"]]:
    """Points, and questions ``answered`` (None: all), of the latents on which each meta-latent is active."""
    mine = slice(None) if answered is None else answered
    active = z[questions.latent[mine]] > 0
    return questions.answers.points[mine] @ active, active.sum(axis=0)
