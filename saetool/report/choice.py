"""Which latents get a card: those asked for, and, smaller, the latents that their cards speak of."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saetool.errors import ConfigError
from saetool.report.relatives import Key, Relatives
from saetool.report.run import Explained, Look, Run, score
from saetool.report.splits import members_of_examples
from saetool.report.thinning import thinned

Record = dict[str, Any]


@dataclass(frozen=True)
class Shelf:
    """The latents of one SAE that have a card, in order of number."""

    sae: str
    """The hash that stands for the SAE."""
    name: str
    explained: Explained | None
    latents: tuple[tuple[int, Record | None, bool], ...]
    """(latent, its record if it was explained, whether it was asked for itself)."""
    n_records: int

    @property
    def n_asked(self) -> int:
        return sum(asked for _, _, asked in self.latents)


@dataclass(frozen=True)
class Chosen:
    """Every card of the page."""

    shelves: tuple[Shelf, ...]
    relatives: Relatives

    def anchors(self) -> Mapping[Key, str]:
        """The place of every latent that has a card."""
        return {(s.sae, n): f"latent-{i}-{n}" for i, s in enumerate(self.shelves) for n, _, _ in s.latents}


def choose_cards(run: Run) -> Chosen:
    """Latents of every explanations file by ``run.look``, then up to half as many relatives: most linked, then closest.

    Raises ``ConfigError`` if a latent that was listed has no explanation.
    """
    relatives = Relatives(run)
    files = [e for e in run.explanations if e.records]
    look = run.look
    if look.features < 1 or not files:
        return Chosen((), relatives)
    if look.listed is not None:
        _check(look, files)
    sizes = _shares(look.features, [len(_eligible(e, look)) for e in files])
    asked: dict[Key, None] = {}
    records: dict[Key, Record] = {}
    names: dict[str, tuple[str, Explained | None]] = {}
    for explained, n in zip(files, sizes, strict=True):
        sae = run.identity(explained.sae_sha256)
        names.setdefault(sae, (explained.sae_name, explained))
        for record in explained.records:
            records.setdefault((sae, record["latent"]), record)
        for record in choose(explained, n, look):
            asked[sae, record["latent"]] = None
    kin: Counter[Key] = Counter()
    closest: dict[Key, float] = {}
    for key in asked:
        for relation in relatives.of(key):
            for n, value in relation.found:
                if relation.sae and (other := (relation.sae, n)) not in asked:
                    kin[other] += 1
                    closest[other] = max(value, closest.get(other, value))
    drawn = dict.fromkeys(k for k in members_of_examples(run) if k not in asked)
    ranked = sorted(kin, key=lambda k: (-kin[k], k not in records, -closest[k], k))
    ranked = [*drawn, *(k for k in ranked if k not in drawn)][: max(len(drawn), look.features // 2)]
    for sae, _ in ranked:
        names.setdefault(sae, (relatives.name(sae), None))
    shelves = []
    for sae, (name, explained) in names.items():
        mine = sorted(n for s, n in [*asked, *ranked] if s == sae)
        latents = tuple((n, records.get((sae, n)), (sae, n) in asked) for n in mine)
        if latents:
            shelves.append(Shelf(sae, name, explained, latents, len(explained.records) if explained else 0))
    return Chosen(tuple(shelves), relatives)


def _shares(n: int, sizes: Sequence[int]) -> list[int]:
    """``n`` over files of these sizes as evenly as they allow."""
    out, left = [0] * len(sizes), n
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for place, i in enumerate(order):
        out[i] = min(
            sizes[i], -(-left // (len(order) - place)) if place + 1 == len(order) else left // (len(order) - place)
        )
        left -= out[i]
    return out


def _eligible(explained: Explained, look: Look) -> list[Record]:
    """The records of a file that may get a card, by latent."""
    records = sorted(explained.records, key=lambda r: r["latent"])
    if look.listed is None:
        return records
    wanted = {n for name, n in look.listed if name in ("", explained.sae_name)}
    return [r for r in records if r["latent"] in wanted]


def _check(look: Look, files: Sequence[Explained]) -> None:
    for name, latent in look.listed or ():
        if not any(name in ("", e.sae_name) and any(r["latent"] == latent for r in e.records) for e in files):
            known = ", ".join(f"{e.sae_name} ({len(e.records)} latents)" for e in files)
            raise ConfigError(
                f"--pick {look.pick}: latent {f'{name}:' if name else ''}{latent} is in no explanations file",
                f"explained are latents of {known}",
            )


def choose(explained: Explained, n: int, look: Look) -> list[Record]:
    """``n`` records of a file, in order of latent.

    top, worst: by score; random: drawn with the seed; mixed: a third the best scored, a third the worst, the rest
    evenly by number.
    """
    records = _eligible(explained, look)
    if len(records) <= n:
        return records
    scored = [(r, s) for r in records if (s := score(r, "simulate", "correlation")) is not None]
    ranked = [r for r, _ in sorted(scored, key=lambda p: (-p[1], p[0]["latent"]))]
    rest = [r for r in records if r.get("description") or r.get("windows")]
    if look.listed is not None:
        picked = records[:n]
    elif look.pick == "random":
        picked = random.Random(f"{look.seed} {explained.sae_sha256}").sample(
            rest or records, min(n, len(rest or records))
        )
    elif look.pick in ("top", "worst"):
        unscored = [r for r in records if score(r, "simulate", "correlation") is None]
        picked = ((ranked if look.pick == "top" else ranked[::-1]) + unscored)[:n]
    else:
        third = min(n // 3, len(ranked) // 2)
        picked = ranked[:third] + ranked[len(ranked) - third :]
        taken = {r["latent"] for r in picked}
        rest = [r for r in rest if r["latent"] not in taken]
        picked += thinned(rest, max(n - len(picked), 2))[: n - len(picked)]
    return sorted(picked, key=lambda r: r["latent"])
