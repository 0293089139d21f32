"""openai/sparse_autoencoder: one ``.pt`` state dict, ``pre_bias``, ``encoder.weight`` [F, d], ``latent_bias``,
``decoder.weight`` [d, F], and the activation's name and state.

TopK models read inputs that are layer-normalised token by token (that is how their code tells: by the activation).
The file does not say its hook: --hook.
"""

from saetool.artifacts.foreign import files
from saetool.artifacts.foreign.imported import (
    Asked,
    Found,
    Imported,
    exact,
    float32,
    named,
    oriented,
    refuse,
    take,
    whole_k,
)
from saetool.core import peers
from saetool.core.sae import SAE


def read(found: Found, asked: Asked) -> Imported:
    """The SAE of an OpenAI checkpoint."""
    t, values = files.read_torch(found.weights)
    take(t, found, "pre_bias", "encoder.weight", "latent_bias")
    if "decoder.linear.weight" in t or "decoder.weight" not in t:  # tied: the decoder is the encoder transposed
        t["decoder.weight"] = t["encoder.weight"].T.contiguous()
    d, f = len(t["pre_bias"]), len(t["latent_bias"])
    t = oriented(t, found, asked, "encoder.weight", "decoder.weight", d, f, enc_rows="linear", bare=False)
    activation = str(values.get("activation", "ReLU"))
    if activation not in ("ReLU", "TopK"):
        raise refuse(found, f"activation {activation!r}, whose activations may be negative", "saetool reads ReLU, TopK")
    k = None
    if activation == "TopK":
        after = str(values.get("activation_state_dict.postact_fn", "ReLU"))
        if after != "ReLU":
            raise refuse(found, f"TopK followed by {after}, whose activations may be negative", "saetool reads ReLU")
        stored = t.get("activation_state_dict.k")
        k = whole_k(
            asked.k or (float(stored) if stored is not None else values.get("activation_state_dict.k")), found, f
        )
    sae = SAE(
        **float32(
            W_enc=t["encoder.weight"].T, b_enc=t["latent_bias"], W_dec=t["decoder.weight"].T, b_dec=t["pre_bias"]
        ),
        threshold=None,
        arch="relu" if k is None else "topk",
        k=k,
        subtract_b_dec=True,
        normalization="none" if k is None else "per_token",
    )
    return Imported(
        sae=sae,
        formula=named(peers.openai, k=k),
        other=exact(t, peers.openai, k=k),
        settings={"activation": activation},
    )
