"""A whole run's artifacts with made-up but plausible values: the shapes of a real one, in a second and without a model.

Three widths and a second seed of the middle one; decoders have real cosine structure (a wider SAE holds noisy copies
of the narrower one's rows), so that edges, components and shares fit together; effects, curves and scores are drawn.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import synthetic_parts as parts
import torch

from saetool.artifacts import header as h
from saetool.artifacts import writing

D, THETA = 48, 0.7
MODEL = {"id": "SmolLM2-135M", "revision": None, "hook_name": "blocks.9.hook_resid_post", "width": D}
WORDS = (
    *(" the", " of", " said", " bank", " prices", " rose", " Einstein", " physics", " theory", " rugby", " Ireland"),
    *(" league", " match", " phone", " mobile", " app", " Android", " market", " shares", " per", " cent", " vote"),
    *(" party", " film", " award", " actor", " music", " album", " song", " he", " she", " it", " was", " by", "."),
    *(",", "\n", " year", " last", " quarter", " new", " town", " rain", " cat", " mat", " scored", "\t", " <<b>>"),
)
DESCRIPTIONS = (
    "famous physicists, strongest on “Einstein”",
    "rugby and the leagues it is played in",
    "mobile phones and their systems",
    "share prices rising or falling",
    "elections and the people who stand in them",
    "awards for films and actors",
    "the word after “per”, mostly “cent”",
    "ends of sentences before a line break",
)


class SyntheticRun:
    """Writes the artifacts one after the other into ``folder``; every method returns the path it wrote."""

    def __init__(self, folder: Path, words: Sequence[str] = WORDS, said: tuple[str, ...] = DESCRIPTIONS):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.words, self.said = folder, list(words), said
        self.rng = np.random.default_rng(7)
        self.inputs: dict[str, h.Input] = {}
        self.headers: dict[str, h.Header] = {}
        self.decoders: dict[str, np.ndarray] = {}

    def plan(self, verb: str, schema: str, options: dict[str, Any], *names: str, roles: dict[str, str] | None = None):
        inputs = []
        for name in names:
            one = self.inputs[name]
            inputs.append(h.Input((roles or {}).get(name, one.role), one.name, one.sha256, one.schema))
        return h.Plan(verb, schema, options, inputs, [self.headers[name] for name in names])

    def _wrote(self, path: Path, role: str, header: h.Header, sha256: str) -> Path:
        self.inputs[path.name] = h.Input(role, path.name, sha256, header.schema)
        self.headers[path.name] = header
        return path

    def cache(self) -> Path:
        folder = self.folder / "acts"
        folder.mkdir()
        plan = self.plan("cache", h.CACHE, {"model": MODEL["id"], "tokens": 500_000})
        header = plan.header(config={"d_in": D, "ctx_len": 128, "bos": "prepend"}, model=MODEL, dtype="float32")
        writing.write_json(folder / "vocabulary.json", header, {"strings": self.words})
        top = [[i, word, 900 - i] for i, word in enumerate(self.words[:5])]
        payload = {
            "shards": [], "splits": {"heldout": {"rows": 50_000}, "train": {"rows": 450_000}},
            "statistics": parts.STATISTICS, "profile": {**parts.PROFILE, "top_tokens": top},
        }  # fmt: skip
        sha256 = writing.write_json(folder / "manifest.json", header, payload)
        self._wrote(folder, "acts", header, sha256)
        return folder

    def sae(self, name: str, width: int, seed: int, basis: np.ndarray) -> Path:
        """An SAE whose decoder is ``basis`` plus noise, with a threshold that was estimated."""
        rows = basis[:width] + 0.09 * np.random.default_rng([seed, width]).normal(size=(width, D))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        self.decoders[name] = rows
        minima = (0.61 + 0.03 * self.rng.normal(size=100)).round(5).tolist()
        facts = {
            "method": "mean-min",
            "value": float(np.mean(minima)),
            "n_batches": 100,
            "batch_size": 1024,
            "standard_error": 0.003,
            "asked_l0": 12,
            "l0_estimation": 12.1,
            "l0_heldout": 12.34,
            "minima": minima,
        }
        options = {"arch": "batchtopk", "k": 12, "latents": width, "lr": 2e-3, "seed": seed}
        plan = self.plan("train", h.SAE, options, "acts")
        config = {**options, "d_in": D, "d_sae": width, "inference": "jumprelu", "threshold": facts}
        header = plan.header(config=config, model=MODEL, seed=seed, dtype="float32")
        tensors = {"W_dec": torch.tensor(rows, dtype=torch.float32), "W_enc": torch.tensor(rows.T.copy()).float()}
        path = self.folder / name
        return self._wrote(path, "sae", header, writing.write_tensors(path, tensors, header))

    def saes(self) -> list[Path]:
        basis = self.rng.normal(size=(256, D))
        basis /= np.linalg.norm(basis, axis=1, keepdims=True)
        for i in range(64, 256, 3):  # every third later row is a variation of an earlier one: a split latent
            basis[i] = 0.86 * basis[i % 64] + 0.5 * basis[i]
        return [
            self.sae("sae-64.st", 64, 0, basis),
            self.sae("sae-128.st", 128, 0, basis),
            self.sae("sae-128-seed1.st", 128, 1, basis),
            self.sae("sae-256.st", 256, 0, basis),
        ]

    def train_log(self) -> Path:
        records = []
        for name, rows in self.decoders.items():
            for i in range(200):
                left = math.exp(-i / 25)
                mse = (60 - 4 * math.log2(len(rows) / 64)) * (1 + 6 * left) + self.rng.normal() * 0.6
                step, width = 40 * (i + 1), len(rows)
                common = {"sae": name, "latents": width, "step": step, "tokens": 1024 * step, "lr": 1e-3}
                dead = int(width * 0.1 * math.exp(-(((i - 60) / 30) ** 2)))
                loss = None if i == 77 else mse / D
                records.append(
                    {**common, "loss": loss, "mse": mse, "l0": 12 + 0.05 * self.rng.normal(), "dead": dead, "aux": 0.0}
                )
        path = self.folder / "train.jsonl"
        header = self.plan("train", h.TRAIN_LOG, {"saes": list(self.decoders)}, "acts").header()
        return self._wrote(path, "log", header, writing.write_jsonl(path, header, records))

    def eval(self) -> Path:
        saes = []
        for name, rows in self.decoders.items():
            width = len(rows)
            mse = 72.0 - 6.1 * math.log2(width / 64) + (0.31 if "seed" in name else 0.0)
            ev = 1 - mse / 576
            counts = (width * np.array([0.02, 0.05, 0.1, 0.2, 0.25, 0.2, 0.1, 0.06])).astype(int).tolist()
            metrics = {
                "l0": 12.1 + 0.2 * self.rng.random(), "l1": 33.0, "mse": mse, "mse_mean": mse / D,
                "explained_variance": ev, "explained_variance_legacy": ev - 0.04, "frac_variance_explained": ev + 0.001,
                "fvu": 1 - ev, "cossim": 0.93, "l2_ratio": 0.94, "relative_reconstruction_bias": 1.01,
                "frac_alive": 1 - 2 / width, "dead": 2 if width > 64 else 0,
            }  # fmt: skip
            ce = {
                "n_tokens": 20_000, "ce_loss_without_sae": 3.21, "ce_loss_with_sae": 3.6 - 0.1 * math.log2(width / 64),
                "ce_loss_with_zero_ablation": 9.87, "ce_loss_with_mean_ablation": 7.41,
                "ce_loss_score_zero": 0.9414 + 0.01 * math.log2(width / 64), "ce_loss_score_mean": None,
            }  # fmt: skip
            edges = [round(-4 + 0.5 * i, 6) for i in range(9)]
            saes.append(
                {"name": name, "sha256": self.inputs[name].sha256, "arch": "batchtopk", "inference": "jumprelu",
                 "k": 12, "d_sae": width, "metrics": metrics, "density": {"log10_edges": edges, "counts": counts},
                 "ce": ce | {"kl_div_with_sae": 0.4}, **parts.eval_parts(metrics, D, width)}
            )  # fmt: skip
        header = self.plan("eval", h.EVAL, {"split": "heldout", "tokens": None}, *self.decoders, "acts").header(
            model=MODEL
        )
        path = self.folder / "eval.json"
        payload = {"split": "heldout", "n_tokens": 50_000, "saes": saes}
        return self._wrote(path, "eval", header, writing.write_json(path, header, payload))

    def stitch(self) -> Path:
        ladder = [("sae-64.st", "sae-128.st"), ("sae-128.st", "sae-256.st"), ("sae-128.st", "sae-128-seed1.st")]
        pairs = [self._pair(small, large) for small, large in ladder]
        saes = [
            {"name": n, "sha256": self.inputs[n].sha256, "d_sae": len(r), "arch": "batchtopk", "seed": 0}
            for n, r in self.decoders.items()
        ]
        header = self.plan("stitch", h.STITCH, {"theta": THETA}, *self.decoders, "acts").header(model=MODEL)
        path = self.folder / "stitch.json"
        exchange = parts.bias_exchange(["sae-64.st", "sae-128.st", "sae-256.st"])
        payload = {"theta": THETA, "saes": saes, "pairs": pairs, "bias_exchange": exchange}
        return self._wrote(path, "stitch", header, writing.write_json(path, header, payload))

    def _pair(self, small: str, large: str) -> dict[str, Any]:
        a, b = self.decoders[small], self.decoders[large]
        cosine = b @ a.T
        best, nearest = cosine.max(1), cosine.argmax(1)
        novel = int((best < THETA).sum())
        edges = [[int(j), int(i), float(cosine[i, j])] for i, j in zip(*np.nonzero(cosine >= THETA), strict=True)]
        shapes = component_shapes(edges)
        matched = len({e[0] for e in edges})
        null = (self.rng.normal(size=(len(b), D)) @ a.T / math.sqrt(D)).max(1) / 1.0
        sweep, groups = [], []
        for theta in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            n = int((best < theta).sum())
            sweep.append({"theta": theta, "novel": n, "novel_share": n / len(b), "components": len(a) - n // 9,
                          "unmatched_small": int((cosine.max(0) < theta).sum()), "largest_component": 9})  # fmt: skip
            groups.append({"theta": theta, "n_novel": n, "n_reconstruction": len(b) - n,
                           "novel_delta": -0.05 + 2.5 * max(theta - 0.55, 0) ** 2,
                           "reconstruction_delta": 0.6 + 4 * max(0.9 - theta, 0)})  # fmt: skip
        effect = np.sign(best - 0.66 + 0.1 * self.rng.normal(size=len(b))) * 10 ** self.rng.normal(-2.2, 0.7, len(b))
        components, unmatched = sum(s[2] for s in shapes), len(a) - matched
        mse0, mse1 = 72.0 - 6.1 * math.log2(len(a) / 64), 71.2 - 6.1 * math.log2(len(b) / 64)
        down = mse0 - np.cumsum(np.abs(self.rng.normal(0.02, 0.01, novel)))
        rest = components + unmatched
        back = np.linspace(down[-1] if novel else mse0, mse1, rest + 1)[1:] + 0.05 * self.rng.normal(size=rest)
        mse = np.concatenate([[mse0], down, back])
        mse[-1] = mse1
        l0 = np.concatenate([[12.1], 12.1 + np.linspace(0, 4, novel), np.linspace(16.1, 12.2, rest)])
        n_latents = [len(a) + i for i in range(novel + 1)]
        n_latents += np.linspace(len(a) + novel, len(b), rest + 1)[1:].round().astype(int).tolist()
        data = {
            "split": "heldout", "n_tokens": 50_000, "mse_small": mse0, "mse_large": mse1, "l0_small": 12.1,
            "l0_large": 12.2, "dead_small": 0, "dead_large": 2,
            "effects": {"delta_mse": effect.tolist(), "firing_rate": [0.01] * len(b)},
            "auc": 0.913, "best_theta": 0.66, "best_balanced_accuracy": 0.84, "groups": groups,
            "path": {"order": "random", "bias": "eq5", "theta": THETA, "n_add_steps": novel,
                     "n_swap_steps": components, "mse": mse.tolist(), "l0": l0.tolist(), "n_latents": n_latents},
        }  # fmt: skip
        pair = {
            "small": small, "large": large, "small_sha256": self.inputs[small].sha256,
            "large_sha256": self.inputs[large].sha256, "n_small": len(a), "n_large": len(b), "novel": novel,
            "reconstruction": len(b) - novel, "novel_share": novel / len(b), "reconstruction_share": 1 - novel / len(b),
            "unmatched_small": unmatched, "components": components, "component_shapes": shapes,
            "largest_components": [s[:2] for s in shapes][:10],
            "max_cosine": {"mean": float(best.mean()), "median": float(np.median(best)), "sd": float(best.std()),
                           "values": best.tolist()},
            "nearest": nearest.tolist(), "mean_max_cosine_of_small": float(cosine.max(0).mean()), "edges": edges,
            "sweep": sweep, "null": {"max_cosine_mean": float(null.mean()), "max_cosine_q99": 0.49,
                                     "reconstruction_share": 0.0},
            "null_shuffled": {"max_cosine_mean": 0.33, "max_cosine_q99": 0.55, "reconstruction_share": 0.0},
            "matching": parts.matching() if len(a) == len(b) else None,
        }  # fmt: skip
        return pair | {"data": data | parts.pair_parts(self.rng, pair, data)}

    def meta(self) -> Path:
        n, parent = 12, "sae-256.st"
        options = {"arch": "batchtopk", "k": 4, "latents": n}
        names, roles = (parent, "sae-64.st"), {parent: "parent", "sae-64.st": "compare"}
        plan = self.plan("meta", h.SAE, options, *names, roles=roles)
        st = self.folder / "meta.st"
        rows = self.rng.normal(size=(n, D))
        header = plan.header(
            config={**options, "d_in": D, "d_sae": n, "hook": "decoder"}, model={"hook_name": "decoder"}
        )
        self._wrote(st, "sae", header, writing.write_tensors(st, {"W_dec": torch.tensor(rows).float()}, header))
        record = self.plan("meta", h.META, options, *names, roles=roles).header(seed=0)
        indices = [sorted(self.rng.choice(n, 4, replace=False).tolist()) for _ in range(256)]
        weights = [(0.1 + 0.4 * self.rng.random(4)).round(6).tolist() for _ in range(256)]
        payload = {
            "parent": {"name": parent, "sha256": self.inputs[parent].sha256, "d_sae": 256}, "n_rows": 256, "k": 4,
            "d_sae": n, "threshold": 0.153, "variance_explained": {"threshold_mode": 0.512, "train_mode": 0.534},
            "mean_active": 4.02, "dead": 1, "unexplained_rows": 3,
            "controls": [{"name": "random_directions", "variance_explained": 0.083, "mean_active": 4.0},
                         {"name": "shuffled_coordinates", "variance_explained": -0.021, "mean_active": 3.9}],
            "decompositions": {"latents": list(range(256)), "indices": indices, "weights": weights},
        }  # fmt: skip
        small = {"name": "sae-64.st", "sha256": self.inputs["sae-64.st"].sha256}
        payload |= parts.meta_parts(256, n, small, payload["parent"])
        path = self.folder / "meta.json"
        return self._wrote(path, "meta", record, writing.write_json(path, record, payload))

    def explanations(self) -> Path:
        """Descriptions of 40 latents of the widest SAE with windows, and of the meta-latents with a multiple choice."""
        n_windows, w, wanted = 8, 24, list(range(0, 240, 6))
        n = n_windows * len(wanted)
        tokens = self.rng.integers(0, len(self.words), size=(n, w))
        acts = np.where(self.rng.random((n, w)) < 0.12, 5 * self.rng.random((n, w)), 0.0)
        role = np.tile([0, 0, 0, 2, 3, 3, 3, 5], len(wanted))
        acts[(role == 2) | (role == 5)] = 0
        strings = {str(i): s for i, s in enumerate(self.words)}
        plan = self.plan("autointerp", h.WINDOWS, {"latents": "40"}, "sae-256.st", "acts")
        header = plan.header(config={"strings": strings}, model=MODEL, seed=0)
        tensors = {
            "tokens": tokens.astype(np.int32), "acts": acts.astype(np.float32),
            "pred": (acts * 1.6 + (role == 5)[:, None]).astype(np.float32),
            "pred_valid": (role >= 3).astype(np.uint8), "latent": np.repeat(wanted, n_windows).astype(np.int32),
            "role": role.astype(np.uint8), "source": np.zeros((n, 2), np.int32), "length": np.full(n, w, np.int32),
        }  # fmt: skip
        windows = self.folder / "explanations.windows.st"
        sha256 = writing.write_tensors(windows, {k: torch.from_numpy(v) for k, v in tensors.items()}, header)
        self._wrote(windows, "windows", header, sha256)
        records = []
        for i, latent in enumerate(wanted):
            r = None if i % 13 == 12 else float(np.clip(self.rng.normal(0.72, 0.2), -1, 1))
            reason = "constant_prediction" if r is None else None
            simulate = {"correlation": r, "null_reason": reason, "spearman": r, "shuffled": 0.05 * self.rng.normal()}
            records.append(
                {"latent": latent, "status": "scored", "reason": None, "description": self.said[i % len(self.said)],
                 "explainer": "ngram", "density": 0.01, "max_act": 5.0, "scale": 5.0, "n": {},
                 "windows": [8 * i, 8 * i + 8],
                 "scores": {"simulate": simulate, "detect": {"value": 0.5 + i / 100, "shuffled": 0.5}}}
            )  # fmt: skip
        records.append({"latent": 241, "status": "skipped", "reason": "dead", "description": None, "density": 0.0})
        values = [r["scores"]["simulate"]["correlation"] for r in records[:-1]]
        known = [v for v in values if v is not None]
        summary = {"simulate": {"n": len(known), "mean": float(np.mean(known)), "mean_null0": sum(known) / len(values),
                                "median": float(np.median(known)), "ci95": [0.66, 0.78],
                                "control_mean": 0.004},
                   "detect": {"n": 40, "n_null": 0, "mean": 0.695, "median": 0.695, "ci95": [0.66, 0.73],
                              "control_mean": 0.5, "control_n": 40, "floor_mean": 0.61, "chance": 0.5},
                   "intruder": {"n": 38, "n_null": 2, "mean": 0.48, "median": 0.4, "ci95": [0.41, 0.55],
                                "chance": 0.2}}  # fmt: skip
        plan = self.plan("autointerp", h.EXPLANATIONS, {"latents": "40"}, "sae-256.st", "acts")
        header = plan.header(config={"summary": summary, "windows_sha256": sha256, "complete": True}, seed=0)
        path = self.folder / "explanations.jsonl"
        return self._wrote(path, "labels", header, writing.write_jsonl(path, header, records))

    def meta_explanations(self) -> Path:
        records = [
            {"latent": i, "status": "explained", "reason": None, "description": self.said[(i + 3) % len(self.said)],
             "members": [[6 * j, 0.5 - 0.1 * j] for j in range(3)], "max_act": 0.6, "scores": {}}
            for i in range(12)
        ]  # fmt: skip
        choice = {"n": 40, "accuracy": 0.425, "chance": 0.2, "wilson95": [0.285, 0.578], "ties": 3}
        summary = {"choice": {**choice, "control_accuracy": 0.21, "control_wilson95": [0.12, 0.34], "control_n": 40}}
        plan = self.plan("autointerp", h.EXPLANATIONS, {"scorer": "choice"}, "meta.st", "explanations.jsonl")
        header = plan.header(config={"summary": summary, "complete": True}, seed=0)
        path = self.folder / "meta-explanations.jsonl"
        return self._wrote(path, "labels", header, writing.write_jsonl(path, header, records))

    def write(self) -> list[Path]:
        """The whole run: every artifact, in the pipeline's order."""
        paths = [self.cache(), *self.saes(), self.train_log(), self.eval(), self.stitch(), self.meta()]
        return [*paths, self.folder / "meta.st", self.explanations(), self.meta_explanations(),
                self.folder / "explanations.windows.st"]  # fmt: skip


def component_shapes(edges: list[list[Any]]) -> list[list[int]]:
    """[small, large, count] of the connected components, by repeated merging of sets."""
    groups: list[set[tuple[int, int]]] = []
    for small, large, _ in edges:
        mine = {(0, small), (1, large)}
        touching = [g for g in groups if g & mine]
        groups = [g for g in groups if not g & mine] + [mine.union(*touching)]
    counts = Counter((sum(s == 0 for s, _ in g), sum(s == 1 for s, _ in g)) for g in groups)
    return [[a, b, n] for (a, b), n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
