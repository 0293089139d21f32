"""A cache of random tokens whose activations follow known rules, and the SAE that reads them off."""

from pathlib import Path

import torch

from saetool.artifacts import cache as cache_files
from saetool.artifacts import header as h
from saetool.artifacts.cache import Cache
from saetool.artifacts.cache_writer import CacheWriter
from saetool.core.sae import SAE

V, CTX, N_DOCUMENTS, CONTEXTS_PER_DOCUMENT = 24, 64, 60, 6
UNIGRAM, PAIR, RANDOM = range(0, 6), range(6, 12), range(12, 18)
DEAD, RARE, DENSE, ONE_DOCUMENT = 18, 19, 20, 21
D = 22
"""Latents, and width of the activations: latent j is coordinate j."""
STRINGS = [f" w{i}" for i in range(V)]


def pair_of(latent: int) -> tuple[int, int]:
    """The (previous token, token) on which a pair latent fires."""
    return latent, latent + 6


def planted_acts(tokens: torch.Tensor, documents: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Latent j fires on token j (unigram), on ``pair_of(j)`` (pair), or anywhere (random)."""
    n = len(tokens)
    acts = torch.zeros(n, D)
    strength = 1 + 0.05 * torch.rand(n, D, generator=g)
    previous = torch.cat([torch.tensor([-1]), tokens[:-1]])
    for j in UNIGRAM:
        acts[:, j] = (tokens == j) * strength[:, j]
    for j in PAIR:
        a, b = pair_of(j)
        acts[:, j] = ((previous == a) & (tokens == b)) * strength[:, j]
    for j in RANDOM:
        acts[:, j] = (torch.rand(n, generator=g) < 0.01) * (0.5 + torch.rand(n, generator=g))
    acts[torch.arange(3) * (n // 4), RARE] = 1.0
    acts[:, DENSE] = (torch.rand(n, generator=g) < 0.9).float()
    acts[(documents == 3) & (tokens == 0), ONE_DOCUMENT] = 1.0
    return acts


def planted_cache(path: Path, seed: int = 0, with_heldout: bool = True) -> Cache:
    """Documents of six contexts each; every fifth document held out. A context's first row is position 1."""
    g = torch.Generator().manual_seed(seed)
    n = N_DOCUMENTS * CONTEXTS_PER_DOCUMENT * CTX
    tokens = torch.randint(V, (n,), generator=g)
    contexts = torch.arange(n) // CTX
    documents = contexts // CONTEXTS_PER_DOCUMENT
    acts = planted_acts(tokens, documents, g)
    plan = h.Plan("cache", h.CACHE, {"made_for": "tests", "seed": seed, "n": n})
    writer = CacheWriter(path, plan)
    splits = {}
    held = (documents % 5 == 4) & with_heldout
    for split, mine in (("train", ~held), ("heldout", held)):
        rows = mine.nonzero().squeeze(1)
        for part in rows.split(16 * CTX):
            columns = {"tokens": tokens, "positions": torch.arange(n) % CTX + 1, "contexts": contexts}
            columns |= {"documents": documents}
            writer.add(split, {"acts": acts[part], **{name: t[part].int() for name, t in columns.items()}})
        n_documents = int(documents[rows].unique().numel())
        splits[split] = {"rows": len(rows), "contexts": len(rows) // CTX, "documents": n_documents, "tokens": len(rows)}
    model = {"id": "tests", "hook_name": "blocks.0.hook_resid_post", "hf_hook_name": "h.0", "width": D}
    writer.finish(plan.header(config={"d_in": D, "ctx_len": CTX}, model=model, dtype="float32"), splits, STRINGS)
    return cache_files.open_cache(path)


def planted_sae() -> SAE:
    """Latent j reads coordinate j."""
    return SAE(
        W_enc=torch.eye(D),
        b_enc=torch.zeros(D),
        W_dec=torch.eye(D),
        b_dec=torch.zeros(D),
        threshold=torch.full((D,), 0.1),
        arch="jumprelu",
        k=None,
        subtract_b_dec=False,
    )
