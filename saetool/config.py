"""The options of each verb with their defaults, units and sources. No torch here."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """``saetool cache``."""

    out: str = "acts"
    hook: str = "blocks.8.hook_resid_post"
    """Site of the embedded model (SmolLM2-135M: 30 blocks, width 576); other models need one to be named."""
    ctx_len: int = 128
    """Tokens per context, BOS included. The paper: 128 (appendix A.5)."""
    tokens: int = 500_000
    """Tokens of the embedded corpus that are used, both splits together; other text is used whole."""
    bos: bool = True
    """Each context begins with the tokenizer's BOS token, if it has one."""
    keep_special: bool = False
    """Keep the rows of position 0 and of special tokens: attention sinks with many times the usual norm."""
    max_norm: float | None = None
    """Drop rows whose norm is above this multiple of the median norm: attention sinks besides position 0. In the
    embedded model 2% of the rows, nearly all " the", hold 40% of the variance, in one dimension; 3 drops them."""
    heldout: float = 0.1
    """Share of the documents that ``train`` never sees."""
    dtype: str = "bf16"
    """Of the model. Fixed, not chosen by device: a result must not depend on the machine."""
    store: str | None = None
    """How activations are stored; None: in the model's type."""
    center: bool = False
    """Subtract each row's mean over its dimensions, for SAEs of weights that TransformerLens has processed."""
    batch_size: int | None = None
    """In tokens, per forward pass; whole contexts are used. None: from memory."""
    shard_bytes: int = 64 * 1024 * 1024
    """Activations per shard, about. A shard is what an interrupted run can lose."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A named setting of ``saetool cache``; options given explicitly win."""

    model: str
    hook: str
    dataset: str
    tokens: int


PRESETS = {
    # Appendix A.5 of the paper. 300M tokens are 460 GB in bf16: give --tokens for less.
    "paper-gpt2": Preset(
        model="gpt2", hook="blocks.8.hook_resid_pre", dataset="Skylion007/openwebtext", tokens=300_000_000
    ),
}

DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp16": "float16", "float16": "float16", "fp32": "float32",
    "float32": "float32",
}  # fmt: skip
STORES = {**DTYPES, "int8": "int8"}


ARCHITECTURES = ("batchtopk", "topk", "relu", "jumprelu", "gated", "matryoshka")
SPARSE = ("batchtopk", "topk", "matryoshka")
"""Architectures with k active latents: the ones with AuxK and with decoder rows of unit norm."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """``saetool train``. ``None`` means: derived from width or length when the run starts, and then recorded."""

    arch: str = "batchtopk"
    k: int = 32
    """Active latents per token (batchtopk: on average). BatchTopK paper: 16, 32, 64."""
    latents: int = 2304
    """Dictionary size."""
    prefixes: tuple[int, ...] = ()
    """matryoshka: the nested widths, ascending, the last of them ``latents``."""
    tokens: int = 8_000_000
    """Length of the run, in tokens (activations); whole batches are used."""
    batch_size: int = 1024
    """In tokens. Smaller batches than the usual 4096 gave more agreement between seeds at equal tokens."""
    lr: float | None = None
    """Adam's learning rate; None: 2e-4·sqrt(16384/latents), as dictionary_learning (after Gao et al. 2024)."""
    warmup: float = 0.05
    """Share of the steps, or above 1 their number, over which the learning rate rises linearly from 0."""
    decay: float = 0.2
    """Share of the steps, or above 1 their number, at the end, over which it falls linearly to 0."""
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    """Largest norm of the gradient of all parameters together; 0: any. 1 as sae-lens and dictionary_learning: nearly
    every step is clipped, which evens out the batches. Held-out EV 0.823 → 0.829 (width 1152, k 32, 3M tokens)."""
    l1: float = 1.5
    """λ of relu and gated on inputs with E‖x‖² = d; weighted by decoder norm."""
    l0: float = 1.4
    """λ of jumprelu: loss per active latent, on inputs with E‖x‖² = d. The BatchTopK authors' 0.0018, which is for an
    error averaged over d = 768."""
    penalty: str = "l0"
    """jumprelu: l0, or tanh for Σ tanh(4 z ‖W_dec‖) (Circuits Updates, January 2025)."""
    sparsity_warmup: float = 0.05
    """Share or number of the steps over which λ rises linearly from 0 (Templeton et al. 2024: 5%)."""
    bandwidth: float | None = None
    """ε of jumprelu's rectangle kernel; None: 0.1, for inputs with E‖x‖² = d."""
    aux_alpha: float = 1 / 32
    """Weight of AuxK (topk, batchtopk, matryoshka): Gao et al. 2024, appendix A.2."""
    aux_scale: str = "plain"
    """What AuxK is multiplied by besides: plain 1, dead-share min(dead/k_aux, 1), variance 1/Σ‖e − ē‖²."""
    k_aux: int | None = None
    """Dead latents used by AuxK; None: the power of two nearest d/2 (Gao et al. 2024)."""
    dead_after: int | None = None
    """A latent is dead after so many tokens without firing; None: the smaller of 10M and a tenth of the run."""
    resample: int = 0
    """relu: tokens between resamplings of dead latents (Bricken et al. 2023); 0: none."""
    decoder_norm: str | None = None
    """unit: rows kept at norm 1, gradients projected; free: folded on save. None: free for relu and gated."""
    freeze_decoder: bool = False
    """Leave the decoder at its random start: a control."""
    b_dec_init: str = "mean"
    """mean of the activations, their geometric-median, or zero."""
    normalize: bool = True
    """Scale inputs to E‖x‖² = d while training; folded into the saved weights."""
    dtype: str = "fp32"
    """Of the matrix products of relu, jumprelu and gated; parameters and everything between stay float32."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named setting of ``saetool train``; options given explicitly win."""

    source: str
    options: dict[str, Any]
    differs: str
    """Where this trainer departs from the source even so."""


RECIPES = {
    "batchtopk": Recipe(
        source="Bussmann et al. 2024 (arXiv 2412.06410), github.com/bartbussmann/BatchTopK config.py",
        options={
            **{"arch": "batchtopk", "k": 32, "latents": 12288, "tokens": 1_000_000_000, "batch_size": 4096},
            **{"lr": 3e-4, "warmup": 0.0, "decay": 0.0, "beta2": 0.99, "clip": 0.0, "b_dec_init": "zero"},
            **{"aux_alpha": 1 / 32, "k_aux": 512, "dead_after": 5 * 4096},
        },
        differs="inputs scaled to E‖x‖² = d, not standardised per token; b_enc is used; residual detached in AuxK",
    ),
    "paper-base": Recipe(
        source="Leask, Bussmann et al. 2025 (arXiv 2502.04878), appendix A.5: the GPT-2 SAEs of 768 to 98304 latents",
        options={
            **{"arch": "relu", "latents": "768,1536,3072,6144,12288,24576,49152,98304", "tokens": 300_000_000},
            **{"batch_size": 4096, "lr": 4e-4, "warmup": 5000.0, "decay": 0.0, "beta2": 0.99, "l1": 1.7},
            **{"sparsity_warmup": 0.0, "decoder_norm": "unit", "clip": 0.0, "b_dec_init": "geometric-median"},
            **{"dead_after": 5000 * 4096},
        },
        differs="theirs divides each token's error by its norm and averages over d, with λ 8e-5: 1.7 = 8e-5·768^1.5 is "
        "that for a token of mean norm; no ghost gradients",
    ),
    "meta-release": Recipe(
        source="the released meta-SAE of Leask, Bussmann et al. 2025 (its text: lr 1e-4, batch 4096, 2000 epochs)",
        options={
            **{"arch": "batchtopk", "k": 4, "latents": 2304, "tokens": 2000 * 16384, "batch_size": 16384},
            **{"lr": 1e-3, "warmup": 0.0, "decay": 0.0, "beta2": 0.99, "clip": 0.0, "b_dec_init": "zero"},
            **{"aux_alpha": 1 / 16, "k_aux": 512, "dead_after": 100 * 16384},
        },
        differs="AuxK uses pre-selection activations (theirs had none left); saetool meta trains on a decoder",
    ),
    "saelens": Recipe(
        source="sae-lens 6.54.12 defaults of BatchTopKTrainingSAE and its trainer",
        options={
            **{"arch": "batchtopk", "k": 100, "batch_size": 4096, "lr": 3e-4, "warmup": 0.0, "decay": 0.0},
            **{"clip": 1.0, "aux_alpha": 1.0, "aux_scale": "dead-share", "dead_after": 1000 * 4096},
            **{"b_dec_init": "zero", "normalize": False},
        },
        differs="unit decoder rows in place of values rescaled by their norms; k_aux a power of two near d/2, positive "
        "values only",
    ),
    "saelens-l1": Recipe(
        source="sae-lens 6.54.12 defaults of StandardTrainingSAE and its trainer",
        options={
            **{"arch": "relu", "l1": 1.0, "batch_size": 4096, "lr": 3e-4, "warmup": 0.0, "decay": 0.0, "clip": 1.0},
            **{"sparsity_warmup": 0.0, "decoder_norm": "free", "b_dec_init": "zero", "normalize": False},
            **{"dead_after": 1000 * 4096},
        },
        differs="decoder rows start at norm 1, not 0.1",
    ),
    "sparsify": Recipe(
        source="eai-sparsify 1.3.3 defaults with --optimizer adam",
        options={
            **{"arch": "topk", "k": 32, "batch_size": 65536, "warmup": 1000.0, "decay": 1.0, "clip": 0.0},
            **{"aux_alpha": 0.0},
            **{"dead_after": 10_000_000, "normalize": False},
        },
        differs="its default optimiser is signum; its encoder starts at U(±1/√d); the loss there is divided by the "
        "variance, which Adam does not see",
    ),
    "dictionary_learning": Recipe(
        source="dictionary-learning 0.1.0 defaults of BatchTopKTrainer",
        options={
            **{"arch": "batchtopk", "warmup": 1000.0, "decay": 0.0, "clip": 1.0, "aux_alpha": 1 / 32},
            **{"aux_scale": "variance", "dead_after": 10_000_000, "b_dec_init": "geometric-median", "normalize": False},
        },
        differs="k_aux a power of two near d/2, not d/2",
    ),
}


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """``saetool threshold``."""

    method: str = "mean-min"
    """The paper's eq. 8."""
    batches: int = 100
    """Batches of the train split whose minima are averaged (the paper does not say how many)."""
    batch_size: int | None = None
    """Tokens per batch; None: what the SAE was trained with."""
    fallback_batch_size: int = 4096
    """For an SAE that does not say."""
    precision: float = 0.05
    """Largest standard error of θ as a share of θ; from more the result is refused."""
    seed: int = 0


FOREIGN_ARCHITECTURES = ("groupmax", "matching_pursuit")
"""Of other libraries: read, and encoded with, but not trained."""

SAE_FORMATS = (
    "saelens", "sparsify", "dictionary_learning", "batchtopk", "openai", "llamascopium", "llama_scope", "gemma_scope",
    "gemma_scope_2", "qwen_scope", "goodfire",
)  # fmt: skip
"""Layouts of other libraries' SAEs that are read."""
SAE_TARGETS = ("saelens", "sparsify", "dictionary_learning", "batchtopk", "gemma_scope")
"""Layouts that are written."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """``saetool eval``."""

    split: str = "heldout"
    batch_size: int = 512
    """Tokens per batch; changes no result. On a CPU 512 keep the activations of a batch in its cache."""
    ce_tokens: int = 16_384
    """Tokens for the cross-entropies: one forward pass clean, two ablated, one per SAE."""
    ce_contexts: int = 8
    """Contexts per forward pass."""
    dtype: str = "bf16"
    """Of the language model."""


@dataclass(frozen=True, kw_only=True)
class StitchConfig:
    """``saetool stitch`` (paper, section 4)."""

    theta: float = 0.7
    """Cut-off of the decoder cosine, above -1 and up to 1: the paper's for GPT-2 (L1); 0.4 for Gemma Scope. Differs by
    family."""
    sweep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """Other cut-offs, for counts and group effects."""
    split: str = "heldout"
    order: str = "random"
    """Of the steps within a phase; random in the paper's Fig. 15, not stated for Fig. 5."""
    bias: str = "eq5"
    """The output bias along the way: eq. 5's mixture, or the small or the large SAE's."""
    repeats: int = 5
    """Random orders in which the novel and the reconstruction group are added (Fig. 15)."""
    match_up_to: int = 4096
    """Width up to which two SAEs of one width are matched one to one without being asked: some 10 s."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """``saetool meta``: a BatchTopK SAE on the unit-norm decoder rows of another (paper, section 5)."""

    latents: int | None = None
    """Meta-latents; None: ``ratio`` times the rows."""
    ratio: float = 3 / 64
    """Meta-latents per row where no number is given: the paper's (2304 for 49152). Follow-ups use 1/4, at which random
    directions are explained nearly as well when the parent is small."""
    k: int = 4
    """Active meta-latents per row, on average."""
    steps: int = 2000
    """The released meta-SAE's 2000 steps; the paper's text says 2000 epochs of batches of 4096."""
    epochs: int | None = None
    """Length in passes over the rows, in place of ``steps``."""
    batch_size: int = 16_384
    """Rows per step, or all of them where there are fewer."""
    replacement: bool = False
    """Draw each batch with replacement, in place of passing over shuffled rows."""
    lr: float = 1e-3
    beta2: float = 0.99
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    clip: float = 0.0
    aux_alpha: float = 1 / 16
    aux_scale: str = "plain"
    k_aux: int | None = None
    dead_after_steps: int = 100
    """A meta-latent is dead after so many batches without firing."""
    b_dec_init: str = "mean"
    normalize: bool = True
    """Scale the rows to ‖w‖² = d while training, which only moves Adam's step against the weights."""
    min_rate: float | None = None
    """Leave out latents that fire on this share of the tokens or less (the authors' combined meta-SAE: 1e-5)."""
    weighted: bool = False
    """Draw rows in proportion to how often their latents fire."""
    seed: int = 0


META_PRESETS = {
    "paper": Recipe(
        source="Leask, Bussmann et al. 2025 (arXiv 2502.04878), section 5: lr 1e-4, batches of 4096, 2000 epochs",
        options={
            **{"ratio": 3 / 64, "k": 4, "epochs": 2000, "batch_size": 4096, "lr": 1e-4, "decay": 0.0},
            **{"b_dec_init": "zero"},
        },
        differs="moments, AuxK and dead latents as in the released file, the text says nothing of them; rows scaled to "
        "‖w‖² = d",
    ),
    "released": Recipe(
        source="the released meta-SAE of Leask, Bussmann et al. 2025 and its configuration",
        options={
            **{"ratio": 3 / 64, "k": 4, "steps": 2000, "batch_size": 16_384, "lr": 1e-3, "decay": 0.0},
            **{"k_aux": 512, "b_dec_init": "zero", "normalize": False},
        },
        differs="AuxK uses pre-selection activations (theirs had none left); b_enc is used",
    ),
    "saebench": Recipe(
        source="SAEBench's meta_structure (Bussmann et al. 2025, appendix D.1), with sae-lens' BatchTopK trainer",
        options={
            **{"ratio": 0.25, "k": 4, "steps": 1500, "batch_size": 1024, "replacement": True, "lr": 5e-4},
            **{"beta2": 0.999, "decay": 0.0, "clip": 1.0, "aux_alpha": 1.0, "aux_scale": "dead-share"},
            **{"dead_after_steps": 1000, "b_dec_init": "zero", "normalize": False},
        },
        differs="rows of unit norm, theirs as they are; decoder rows start at norm 1, not 0.1, and keep it",
    ),
}


@dataclass(frozen=True, kw_only=True)
class AutointerpConfig:
    """``saetool autointerp``: what is explained and how it is scored. Windows are counted per latent."""

    latents: str = "200"
    """A number of random alive latents, all, a list of ids, or @FILE with ids. A meta-SAE: all."""
    on: str = "all"
    """Rows to read: heldout, train or all. The explainer's own held-out half is drawn by document in any case."""
    n_top: int = 5
    """Explaining: windows with the largest activations (the paper's 5 + 20)."""
    n_random: int = 20
    """Explaining: windows without any activation."""
    n_quantile: int = 0
    """Explaining: one window from each of so many quantiles of the other windows' peaks."""
    score_top: int = 5
    score_random: int = 20
    score_quantile: int = 0
    window: int = 32
    """Tokens per window."""
    split: float = 0.5
    """Share of the documents for explaining; scores come from the others."""
    skip_positions: int = 1
    """First positions of a context that no window shows: attention puts there what it has no place for."""
    negatives: str = "zero"
    """Random windows: zero, any or neighbours."""
    min_firing: int = 10
    """Windows with an activation that a latent must have; below it is too rare."""
    max_density: float = 0.5
    """Share of rows above which a latent is too dense."""
    table_size: int = 10
    """Tokens, and pairs of tokens, in an explanation."""
    candidates: int = 1
    """Descriptions asked for; the best on windows of a third part is kept."""
    granularity: str = "token"
    """Which correlation is the score: over tokens, or over windows (example)."""
    control: str = "shuffled"
    """shuffled: every score also with another latent's explanation; none."""
    max_missing: float = 0.2
    """Share of a latent's windows without an answer above which its score is undefined and the run fails."""
    temperature: float = 0.0
    """Of descriptions; predictions are always asked for at 0."""
    max_output_tokens: int = 400
    """Of one answer. Models that reason before they answer need more."""
    n_options: int = 5
    """Options per question of the multiple choice (paper, section 5.1: 1 right + 4 random)."""
    n_questions: int = 1000
    """Questions of the multiple choice, about random latents (paper: 1000)."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """``saetool autointerp``: the language model that explains and judges, and how it is reached."""

    backend: str = "offline"
    """offline (tables of tokens), openai, anthropic or local."""
    concurrency: int = 8
    """Calls under way at once."""
    timeout: float = 60.0
    """Seconds to wait for a connection, and for each piece of a reply."""
    max_retries: int = 6
    price_in: float = 0.0
    """Per million tokens sent."""
    price_out: float = 0.0
    """Per million tokens received."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """``saetool report``."""

    title: str = "Sparse autoencoder report"
    features: int = 200
    """Latents shown as cards, over all explanations."""
    pick: str = "mixed"
    """Which latents: mixed, top, worst, random, or @FILE."""
    contexts: int = 6
    """Windows of text on a card."""
    theme: str = "auto"
    """auto (as the reader's system), light or dark."""
    budget: str = "3MB"
    """Size that a page is kept near by fewer cards, where their number is not given."""
    max_size: str = "10MB"
    """The page's largest size; above it there are fewer cards."""
    seed: int = 0
