"""Every formula the page uses, by the name it is used under."""

from saetool.artifacts import header as h
from saetool.report.blocks import Glossary, Section, Term
from saetool.report.collect import Found

_COMMON = (
    Term("SAE", "z = σ(W_enc·(x − b_dec) + b_enc),  x̂ = W_dec·z + b_dec", "x: one activation; z: the latents."),
    Term("decoder direction", "d_i = row i of W_dec, unit norm", "What latent i writes; cosines compare these."),
)
_TERMS = {
    h.EVAL: (
        Term("MSE (mse)", "Σ‖x − x̂‖² / n", "Squared error summed over dimensions, mean over n tokens."),
        Term("mse_mean", "MSE / d", "The same per dimension."),
        Term("L0", "mean over tokens of |{i : z_i > 0}|", "Active latents per token."),
        Term(
            "EV (explained_variance)",
            "1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²",
            "Sums over all tokens first, one ratio at the end; x̄ is the mean of the evaluated tokens.",
        ),
        Term(
            "EV, legacy (explained_variance_legacy)",
            "mean over tokens of 1 − ‖x − x̂‖² / ‖x − x̄‖²",
            "One ratio a token, then the mean: what older tools call explained variance.",
        ),
        Term("FVU", "1 − EV", "Fraction of variance unexplained."),
        Term(
            "CE recovered",
            "1 − (CE(spliced) − CE(clean)) / (CE(ablated) − CE(clean))",
            "Share of the loss an ablation costs that the SAE keeps; ablated: zeros, or the mean activation.",
        ),
        Term("dead", "|{i : z_i = 0 on every evaluated token}|", "Latents that never fired."),
        Term(
            "KL", "Σ_v q_v·(log q_v − log p_v)", "q: the model's own predictions; p: with x̂ in place. Mean over tokens."
        ),
        Term("c_dec", "mean over pairs i < j of |cos(d_i, d_j)|", "How much decoder rows overlap."),
        Term(
            "recovery bound",
            "K·ln(N/K)",
            "K: mean L0; N: latents alive. So many measurements (the width d) determine a K-sparse code among N, up to "
            "a constant that is not known and is taken as 1 here.",
        ),
        Term("95% interval", "2.5% to 97.5% of 1000 resamples", "Documents are drawn with replacement."),
        Term("density", "share of tokens with z_i > 0", "How often a latent fires."),
    ),
    h.SAE: (
        Term(
            "θ of a BatchTopK SAE",
            "mean over batches of min { z : z kept by BatchTopK, z > 0 }",
            "Turns the selection over a batch into a threshold for single tokens.",
        ),
    ),
    h.STITCH: (
        Term(
            "max cosine", "max_j cos(d_large,i, d_small,j)", "How close a latent of the large SAE comes to a small one."
        ),
        Term(
            "novel / reconstruction",
            "max cosine < θ / max cosine ≥ θ",
            "New to the small SAE, or a version of what it has.",
        ),
        Term(
            "effect of a latent",
            "MSE(small + latent) − MSE(small)",
            "Added alone, with the activations it has in its own SAE; the small SAE's bias.",
        ),
        Term("group effect", "MSE(small + group) / MSE(small) − 1", "A whole group added at once."),
        Term(
            "stitched SAE",
            "x̂ = α·b_small + (1 − α)·b_large + Σ z_l·d_l,  α = |L_small| / (|L_small| + |L_large|)",
            "The sum runs over the latents included from both SAEs.",
        ),
        Term(
            "component",
            "connected part of the graph with an edge where cosine ≥ θ",
            "Small and large latents that are exchanged together.",
        ),
        Term(
            "AUC",
            "P(max cosine of a harmful latent > that of a helpful one)",
            "How well max cosine alone predicts the sign of the effect; 0.5 is chance.",
        ),
        Term("seed control", "a pair of one width, two seeds", "What differs here differs by chance alone."),
    ),
    h.META: (
        Term(
            "variance explained (meta-SAE)",
            "1 − Σ‖w − ŵ‖² / Σ‖w − w̄‖²",
            "Over the parent's unit-norm decoder rows w, about their mean.",
        ),
        Term("random directions", "rows drawn evenly from the sphere", "A dictionary without any structure."),
        Term("shuffled coordinates", "each coordinate permuted over the rows", "Keeps the coordinates' distributions."),
    ),
    h.EXPLANATIONS: (
        Term("correlation r", "Pearson(y, p)", "True and predicted activations over the tokens of all score windows."),
        Term("balanced accuracy", "(TP/(TP + FN) + TN/(TN + FP)) / 2", "Of detection and fuzzing; 0.5 is chance."),
        Term("strength", "10·y / scale, 0 … 10", "What descriptions predict; cards show it as an activation again."),
        Term("shuffled control", "r with another latent's description", "Near 0 if scores mean anything."),
        Term(
            "Wilson interval",
            "(p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n),  z = 1.96",
            "95 % interval of a share p seen in n questions.",
        ),
        Term("chance (multiple choice)", "1 / number of options", "What guessing gives."),
    ),
}


def glossary(found: Found) -> Section:
    """The terms that belong to the kinds of artifacts on the page."""
    terms = list(_COMMON)
    for schema, mine in _TERMS.items():
        if found.of(schema):
            terms += mine
    return Section("glossary", "Glossary", "Every formula used on this page.", [Glossary(terms)])
