"""``saetool autointerp``: what latents stand for, in words, and how well the words predict them."""

from pathlib import Path
from typing import Annotated

import typer

from saetool.commands import autointerp_backend as backends
from saetool.commands import autointerp_meta, autointerp_run
from saetool.commands.autointerp_job import META_PANEL as META
from saetool.commands.autointerp_job import SCORERS, Job, check, explainer_for, parse_latents, parse_scorers
from saetool.commands.checks import check_encodes
from saetool.config import AutointerpConfig as Defaults
from saetool.config import BackendConfig
from saetool.console import Console
from saetool.errors import ConfigError
from saetool.options import DebugFlag, Device, DryRun, Json, Log, Overwrite, Quiet, Seed

EXPLAIN, SCORE, MODEL, FILES = "Explaining", "Scoring", "Language model", "Files"


def autointerp(
    sae: Annotated[Path, typer.Argument(help="The SAE, or a meta-SAE (with --labels).")],
    acts: Annotated[
        Path | None,
        typer.Option(help="The activation cache, or latents as delphi stores them.", show_default="acts"),
    ] = None,
    latents: Annotated[
        str | None,
        typer.Option(
            help="So many random alive ones, all, a list (1,5,9; one alone: 7,) or @FILE with ids.",
            show_default=f"{Defaults.latents}; all of a meta-SAE",
        ),
    ] = None,
    on: Annotated[
        str, typer.Option(help="Rows to read: all, train, or heldout (which the SAE never saw).")
    ] = Defaults.on,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = Defaults.window,
    split: Annotated[
        float, typer.Option(help="Share of the documents for explaining; the others are for scoring.")
    ] = Defaults.split,
    skip_positions: Annotated[
        int, typer.Option(help="First positions of a context that no window shows.")
    ] = Defaults.skip_positions,
    negatives: Annotated[
        str, typer.Option(help="Random windows: zero, any, or neighbours (where similar latents fire).")
    ] = Defaults.negatives,
    min_firing: Annotated[
        int, typer.Option(help="Skip a latent with fewer windows that hold an activation.")
    ] = Defaults.min_firing,
    max_density: Annotated[
        float, typer.Option(help="Skip a latent that is active on a larger share of rows.")
    ] = Defaults.max_density,
    explainer: Annotated[
        str | None,
        typer.Option(
            help="ngram (a table of tokens) or llm.",
            show_default="llm with a --backend, else ngram",
            rich_help_panel=EXPLAIN,
        ),
    ] = None,
    n_top: Annotated[
        int, typer.Option(help="Windows with the largest activations.", rich_help_panel=EXPLAIN)
    ] = Defaults.n_top,
    n_random: Annotated[int, typer.Option(help="Random windows.", rich_help_panel=EXPLAIN)] = Defaults.n_random,
    n_quantile: Annotated[
        int, typer.Option(help="Windows over the range of activations, one a quantile.", rich_help_panel=EXPLAIN)
    ] = Defaults.n_quantile,
    table_size: Annotated[
        int, typer.Option(help="Tokens, and pairs of tokens, in a table.", rich_help_panel=EXPLAIN)
    ] = Defaults.table_size,
    candidates: Annotated[
        int, typer.Option(help="Descriptions to choose from, on documents of their own.", rich_help_panel=EXPLAIN)
    ] = Defaults.candidates,
    explanations: Annotated[
        Path | None,
        typer.Option(help="Score these descriptions (JSONL: latent, description) instead.", rich_help_panel=EXPLAIN),
    ] = None,
    scorer: Annotated[
        str, typer.Option(help=f"Some of {', '.join(SCORERS)}, by commas.", rich_help_panel=SCORE)
    ] = "simulate",
    simulate: Annotated[
        str | None,
        typer.Option(
            help="Predictions come from the json that the model writes, or from logprob, its probabilities.",
            show_default="logprob with --backend local, else json",
            rich_help_panel=SCORE,
        ),
    ] = None,
    granularity: Annotated[
        str, typer.Option(help="Correlate over every token, or over windows (example).", rich_help_panel=SCORE)
    ] = Defaults.granularity,
    score_top: Annotated[int, typer.Option(help="As --n-top.", rich_help_panel=SCORE)] = Defaults.score_top,
    score_random: Annotated[int, typer.Option(help="As --n-random.", rich_help_panel=SCORE)] = Defaults.score_random,
    score_quantile: Annotated[
        int, typer.Option(help="As --n-quantile.", rich_help_panel=SCORE)
    ] = Defaults.score_quantile,
    control: Annotated[
        str, typer.Option(help="shuffled: score another latent's explanation too; none.", rich_help_panel=SCORE)
    ] = Defaults.control,
    max_missing: Annotated[
        float, typer.Option(help="Fail if more of a latent's windows get no answer.", rich_help_panel=SCORE)
    ] = Defaults.max_missing,
    labels: Annotated[
        list[Path] | None,
        typer.Option(help="Explanations of a parent's latents (.jsonl); once a parent.", rich_help_panel=META),
    ] = None,
    parent: Annotated[
        list[Path] | None,
        typer.Option(
            help="An SAE that the meta-SAE was made from; once a parent.",
            show_default="beside it",
            rich_help_panel=META,
        ),
    ] = None,
    n_options: Annotated[
        int, typer.Option(help="Options per question of multiple choice and intruder test.", rich_help_panel=META)
    ] = Defaults.n_options,
    n_questions: Annotated[
        int, typer.Option(help="Questions of the multiple choice.", rich_help_panel=META)
    ] = Defaults.n_questions,
    backend: Annotated[
        str,
        typer.Option(
            help="offline, openai (and all that speak its protocol), anthropic or local.", rich_help_panel=MODEL
        ),
    ] = BackendConfig.backend,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name at the service; local: hub id, folder or .gguf.",
            show_default="local: the embedded one",
            rich_help_panel=MODEL,
        ),
    ] = None,
    scorer_model: Annotated[
        str | None, typer.Option(help="Another model to judge.", show_default="--model", rich_help_panel=MODEL)
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="Address of the service.",
            show_default="OPENAI_BASE_URL, ANTHROPIC_BASE_URL, the maker's",
            rich_help_panel=MODEL,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of descriptions.", rich_help_panel=MODEL)] = Defaults.temperature,
    max_output_tokens: Annotated[
        int, typer.Option(help="Limit of one answer.", rich_help_panel=MODEL)
    ] = Defaults.max_output_tokens,
    extra_body: Annotated[
        str | None, typer.Option(help="JSON object added to every request.", rich_help_panel=MODEL)
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Calls at once.", rich_help_panel=MODEL)] = BackendConfig.concurrency,
    rpm: Annotated[float | None, typer.Option(help="Most requests a minute.", rich_help_panel=MODEL)] = None,
    tpm: Annotated[float | None, typer.Option(help="Most tokens a minute.", rich_help_panel=MODEL)] = None,
    timeout: Annotated[
        float, typer.Option(help="Seconds to wait for a reply.", rich_help_panel=MODEL)
    ] = BackendConfig.timeout,
    max_retries: Annotated[
        int, typer.Option(help="Further tries of a call.", rich_help_panel=MODEL)
    ] = BackendConfig.max_retries,
    max_calls: Annotated[int | None, typer.Option(help="Stop after so many calls.", rich_help_panel=MODEL)] = None,
    max_cost: Annotated[float | None, typer.Option(help="Stop before this cost.", rich_help_panel=MODEL)] = None,
    price_in: Annotated[
        float, typer.Option(help="Per million tokens sent.", rich_help_panel=MODEL)
    ] = BackendConfig.price_in,
    price_out: Annotated[
        float, typer.Option(help="Per million tokens received.", rich_help_panel=MODEL)
    ] = BackendConfig.price_out,
    call_cache: Annotated[
        Path | None,
        typer.Option(help="Where answers are kept.", show_default="OUT.calls.sqlite", rich_help_panel=MODEL),
    ] = None,
    cache_only: Annotated[
        bool, typer.Option("--cache-only", help="Make no call: kept answers alone.", rich_help_panel=MODEL)
    ] = False,
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Allow http to other machines.", rich_help_panel=MODEL)
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Whose tokens latents of delphi are of.", rich_help_panel=FILES)
    ] = None,
    export: Annotated[
        str | None, typer.Option(help="neuronpedia: also write OUT.neuronpedia.jsonl.", rich_help_panel=FILES)
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            help="Explanations and scores; windows go beside them, as .windows.st.",
            rich_help_panel=FILES,
        ),
    ] = Path("explanations.jsonl"),
    overwrite: Overwrite = False,
    seed: Seed = Defaults.seed,
    device: Device = "auto",
    log: Log = None,
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: DebugFlag = False,
) -> None:
    """Explain latents, and score the explanations on documents they were not made from.

    Without a language model an explanation is a table of words, tokens (between quotation marks) and pairs of
    tokens with strengths from 0 to 10. With a --backend it is a description. Its score is the correlation of
    predicted and true activations over all tokens of the scoring windows; another latent's explanation on the same
    windows is the control, and the table of tokens the floor. Keys are read from OPENAI_API_KEY and
    ANTHROPIC_API_KEY. Answers are kept: an interrupted run goes on where it was. --dry-run says how many calls
    there will be, how many tokens, and what they cost.

    A meta-SAE's latents are labelled from the explanations of the latents they are active on, and tested by multiple
    choice: which latent is it, given its meta-latents?

    Example: saetool autointerp sae-threshold.st --acts acts --latents 200 -o explanations.jsonl
    """
    config = Defaults(
        on=on, n_top=n_top, n_random=n_random, n_quantile=n_quantile,
        score_top=score_top, score_random=score_random, score_quantile=score_quantile,
        window=window, split=split, skip_positions=skip_positions, negatives=negatives,
        min_firing=min_firing, max_density=max_density, table_size=table_size, candidates=candidates,
        granularity=granularity, control=control, max_missing=max_missing,
        temperature=temperature, max_output_tokens=max_output_tokens,
        n_options=n_options, n_questions=n_questions, seed=seed,
    )  # fmt: skip
    asked = backends.Backend(
        backend, model, scorer_model,
        simulate or (backends.LOGPROB if backend == backends.LOCAL else backends.JSON),
        base_url, backends.parse_extra_body(extra_body), concurrency, rpm, tpm, timeout, max_retries,
        max_calls, max_cost, price_in, price_out, call_cache, cache_only, allow_http,
    )  # fmt: skip
    backends.check(asked)
    kind = explainer_for(explainer, asked.offline, explanations)
    check(config, out, kind, asked.by_probability, export)
    console = Console(quiet=quiet, as_json=json_)
    from saetool.artifacts import sae as sae_files

    file = sae_files.load(sae)
    check_encodes(file, "explain")
    is_meta = file.is_meta
    wanted = parse_latents(latents or ("all" if is_meta or explanations else Defaults.latents), file.sae.d_sae)
    scorers = () if is_meta else parse_scorers(scorer, asked.offline)
    job = Job(
        console, file, wanted, config, out, overwrite, dry_run,
        asked, kind, scorers, device, log, export, explanations, tokenizer,
    )  # fmt: skip
    if is_meta:
        for name, value in (("--acts", acts), ("--explanations", explanations), ("--export", export)):
            if value is not None:
                raise ConfigError(f"{sae}: is a meta-SAE, which reads decoder rows and no {name}", f"leave {name} out")
        if not labels:
            raise ConfigError(
                f"{sae}: is a meta-SAE: its labels are made from its parent's", "pass --labels BASE.jsonl"
            )
        autointerp_meta.run(job, sae, labels, parent or [])
        return
    for name, value in (("--labels", labels), ("--parent", parent)):
        if value:
            raise ConfigError(f"{name}: {sae} is no meta-SAE", "they are made by: saetool meta")
    autointerp_run.run(job, acts or Path("acts"))
