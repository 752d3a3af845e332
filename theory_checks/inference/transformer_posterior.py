"""MAP, Laplace and NUTS of one small transformer: `python -m theory_checks.inference.transformer_posterior --out FILE`.

Known to all methods are embeddings, norms and the prior stage; section "free" measures what happens where they are not.
`--page docs/transformer_posterior.md` puts the tables of the committed result between the markers of the page. Exit
status 2 for bad input.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from scipy.stats import ks_2samp, kurtosis, skew

from benchmarks.result_file import ROOT, measure_or_publish
from benchmarks.result_tables import Column, Section, at_most, markdown
from models import cli
from prob_transformer.inference import nuts
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.laplace.result import LaplaceResult
from prob_transformer.inference.map import MapResult
from prob_transformer.inference.nuts_sampler import LARGEST_R_HAT, NutsResult
from prob_transformer.transformer import Transformer
from prob_transformer.transformer.weight_sites import PREFIX
from theory_checks.inference.laplace_against_nuts import marginal
from theory_checks.inference.small_transformer import (
    CONFIG,
    KNOWN,
    NARROW,
    QUICK,
    Sizes,
    Task,
    functionals,
    log_scores,
    searched,
    task,
)
from theory_checks.inference.transformer_evidence import SECTION as EVIDENCE
from theory_checks.pages import fill

RESULT = ROOT / "results" / "reference" / "transformer_posterior.json"


def sampled(one: Task, sizes: Sizes, warmup: int, draws: int) -> NutsResult:
    """Chains of the model from random starts."""
    return nuts(
        sizes.seed, one.model, model_args=(one.texts,), model_kwargs=one.given, warmup=warmup, draws=draws,
        chains=sizes.chains, max_tree_depth=sizes.max_tree_depth, target_accept=sizes.target_accept, predictive=False,
        progress=False,
    )  # fmt: skip


def functionals_of(
    chains: NutsResult, one: Task, texts: Int[Array, "K n"]
) -> dict[str, Float[np.ndarray, "chain draw k"]]:
    """The functionals of texts at all draws of NUTS."""
    shape = chains.sample_stats["diverging"].shape
    found = one.at_draws(partial(functionals, texts=texts), _flat(chains))
    return {name: np.asarray(values).reshape(*shape, -1) for name, values in found.items()}


def _flat(chains: NutsResult) -> dict[str, Float[np.ndarray, "D ..."]]:
    return {name: x.reshape(-1, *x.shape[2:]) for name, x in chains.posterior.items()}


def linearised(fit: LaplaceResult, one: Task, texts: Int[Array, "K n"]) -> dict[str, tuple[Array, Array]]:
    """Mean and standard deviation (k,) of every functional made linear in the free weights at the mode."""
    flat, unravel = ravel_pytree(fit.mean)

    def of(z: Float[Array, " w"]) -> dict[str, Float[Array, " k"]]:
        return functionals(one.transformer(unravel(z)), texts)

    centre, slopes = jax.jit(of)(flat), jax.jit(jax.jacrev(of))(flat)
    return {name: (centre[name], jnp.sqrt(jnp.diag(fit.precision.covariance_of(slopes[name])))) for name in centre}


class Fitted(NamedTuple):
    """What three methods find of one posterior: the modes, Laplace's Gaussian at the lowest, and draws of both."""

    one: Task
    modes: list[MapResult]
    fit: LaplaceResult
    gaussian: dict[str, Float[Array, "D ..."]]
    chains: NutsResult


@cache
def fitted(sizes: Sizes) -> Fitted:
    """MAP, Laplace and NUTS of the model whose embeddings, norms and prior stage are known."""
    one = task(sizes.seed, sizes.sequences, sizes.held_out)
    modes = searched(one, sizes)
    fit = laplace(modes[0])
    gaussian = fit.sample(jax.random.key(sizes.seed), sizes.laplace_draws)
    return Fitted(one, modes, fit, gaussian, sampled(one, sizes, sizes.warmup, sizes.draws))


def _spread(name: str, entries: Float[np.ndarray, " k"]) -> dict[str, float]:
    return {f"{name}_median": float(np.median(entries)), f"{name}_largest": float(entries.max())}


def _of_nuts(draws: Float[np.ndarray, "c d k"]) -> dict[str, Any]:
    flat = draws.reshape(-1, draws.shape[-1])
    return {
        "method": "NUTS",
        "entries": draws.shape[-1],
        "r_hat": float(np.max(split_gelman_rubin(draws))),
        "ess": float(np.min(effective_sample_size(draws))),
        "sd": float(flat.std(0, ddof=1).mean()),
        **_spread("skewness", np.abs(skew(flat))),
        **_spread("kurtosis", kurtosis(flat)),
    }


def _against(
    method: str, mean: Any, sd: Any, draws: Float[np.ndarray, "c d k"], distances: Float[np.ndarray, " k"]
) -> dict[str, Any]:
    """A method's means and standard deviations of the entries of a quantity next to those of the draws of NUTS."""
    true_mean, true_sd = draws.mean((0, 1)), draws.std((0, 1), ddof=1)
    ratio = np.asarray(sd) / true_sd
    return {
        "method": method,
        **_spread("apart", np.abs(np.asarray(mean) - true_mean) / true_sd),
        "ratio_smallest": float(ratio.min()),
        **_spread("ratio", ratio),
        **_spread("distance", distances),
    }


def compared(
    draws: Float[np.ndarray, "c d k"], gaussian: Float[np.ndarray, "D k"], linear: tuple[Any, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row a method for one quantity, and the marginals of two entries, at median and largest distance.

    `linear` are means and standard deviations (k,) of the linearised Gaussian, whose distances these are. MAP has no
    standard deviation; its mean is that of the linearised Gaussian.
    """
    entries = range(draws.shape[-1])
    marginals = [marginal("", "", (float(linear[0][k]), float(linear[1][k])), draws[..., k]) for k in entries]
    distances = np.array([row["distance"] for row in marginals])
    of_sampled = np.array([ks_2samp(draws[..., k].ravel(), gaussian[:, k]).statistic for k in entries])
    order, kept = np.argsort(distances), []
    for label, k in (("median distance", order[len(order) // 2]), ("largest distance", order[-1])):
        counts, _ = np.histogram(gaussian[:, k], marginals[k]["histogram"]["edges"])
        kept.append(marginals[k] | {"coordinate": label, "sampled": (counts / len(gaussian)).tolist()})
    rows = [
        _of_nuts(draws),
        _against("Laplace, sampled", gaussian.mean(0), gaussian.std(0, ddof=1), draws, of_sampled),
        _against("Laplace, linearised; MAP its mean", *linear, draws, distances),
    ]
    return rows, kept


def run_functionals(sizes: Sizes) -> dict[str, Any]:
    """Means and deviations of the functionals by all methods, and the shape of the posterior."""
    one, modes, fit, gaussian, chains = fitted(sizes)
    texts = one.held_out[: sizes.compared, :-1]
    of_gaussian = one.at_draws(partial(functionals, texts=texts), gaussian)
    rows, targets, marginals = [], [], []
    linear = linearised(fit, one, texts)
    for name, draws in functionals_of(chains, one, texts).items():
        found, entries = compared(draws, np.asarray(of_gaussian[name]), linear[name])
        targets.append(at_most(f"NUTS, {name}: largest R-hat", found[0]["r_hat"], LARGEST_R_HAT))
        rows += [{"quantity": name, **row} for row in found]
        marginals += [row | {"model": name} for row in entries]
    stats, most = chains.sample_stats, 2**sizes.max_tree_depth - 1
    weights = max(float(np.max(r_hat)) for r_hat in chains.r_hat.values())
    ends = ", ".join(f"{mode.objective:.2f} ({mode.status.name.lower()})" for mode in modes)
    layers = range(one.given["config"].layers)
    queries = ", ".join(f"{np.abs(fit.mean[f'{PREFIX}/blocks[{layer}].query']).max():.1e}" for layer in layers)
    return {
        "setting": (
            f"{fit.precision.size} free weights; {sizes.sequences} texts of {one.texts.shape[1]} tokens; "
            f"{sizes.compared} held-out texts; NUTS: {sizes.chains} chains of {sizes.draws} draws after {sizes.warmup} "
            f"of warm-up, at most {most} steps a draw; {sizes.laplace_draws} draws of Laplace's Gaussian, whose "
            "precision is the whole Hessian"
        ),
        "rows": rows,
        "targets": targets,
        "marginals": marginals,
        "notes": [
            f"NUTS: {int(stats['diverging'].sum())} divergences; largest R-hat of a weight {weights:.3f}; "
            f"{(stats['num_steps'] >= most).mean():.0%} of the draws took all the steps allowed.",
            f"Negative log joint at the ends of {sizes.starts} searches for the mode, in nats: {ends}. Its mean over "
            f"the draws of NUTS: {stats['potential_energy'].mean():.2f}.",
            f"Largest entry of W_Q, without its sign, at the lowest mode, by layer: {queries}.",
        ],
    }


def run_predictive(sizes: Sizes) -> dict[str, Any]:
    """The loss of held-out texts by all methods, each next to that of NUTS on the same texts."""
    one, _, fit, gaussian, chains = fitted(sizes)
    score = partial(log_scores, texts=one.held_out)

    def mixture(draws: Any) -> Float[np.ndarray, " M"]:
        scores = one.at_draws(score, draws)
        return np.asarray(logsumexp(scores, axis=0)) - np.log(len(scores))

    probit = fit.linearised("tokens", model_args=(one.held_out,), model_kwargs=one.given).probit_probabilities()
    of_probit = np.take_along_axis(np.log(probit), np.asarray(one.held_out)[:, 1:, None], -1).sum((1, 2))
    by_method = {
        "NUTS": mixture(_flat(chains)),
        "Laplace, sampled": mixture(gaussian),
        "Laplace, linearised (probit)": of_probit,
        "MAP": np.asarray(score(one.transformer(fit.mean))),
        "the weights that drew the texts": np.asarray(score(one.transformer(one.truth))),
    }
    tokens, rows = one.held_out.shape[1] - 1, []
    for method, scores in by_method.items():
        row = {"method": method, "nats": float(-scores.mean() / tokens)}
        if method != "NUTS":
            more = (by_method["NUTS"] - scores) / tokens
            row |= {"more": float(more.mean()), "standard_error": float(more.std(ddof=1) / np.sqrt(len(more)))}
        rows.append(row)
    return {"setting": f"{sizes.held_out} held-out texts", "rows": rows, "targets": [], "notes": []}


def _of_width(known: str, one: Task, modes: list[MapResult], chains: NutsResult, compared: int) -> dict[str, Any]:
    found = functionals_of(chains, one, one.held_out[:compared, :-1])
    return {
        "width": one.given["config"].width,
        "known": known,
        "weights": sum(np.size(value) for value in modes[0].parameters.values()),
        "converged": f"{sum(mode.converged for mode in modes)} of {len(modes)}",
        "gradient": float(min(mode.gradient_norm for mode in modes)),
        "variance": float(smallest_variance(one.transformer(modes[0].parameters), one.texts)),
        "step_size": float(np.median(chains.sample_stats["step_size"][:, -1])),
        "divergences": int(chains.sample_stats["diverging"].sum()),
        **{name: float(np.max(split_gelman_rubin(draws))) for name, draws in found.items()},
    }


def run_free(sizes: Sizes) -> dict[str, Any]:
    """Searches and chains with every weight free, and with embeddings and norms known, at two widths."""
    rows = []
    for config, is_free in ((NARROW, True), (NARROW, False), (CONFIG, True)):
        one = task(sizes.seed, sizes.sequences, sizes.held_out, config)
        one = one.with_free(list(one.truth)) if is_free else one
        modes, chains = searched(one, sizes, sizes.free_steps), sampled(one, sizes, sizes.free_warmup, sizes.free_draws)
        rows.append(_of_width("none" if is_free else ", ".join(KNOWN), one, modes, chains, sizes.compared))
    full = fitted(sizes)
    rows.append(_of_width(", ".join(KNOWN), full.one, full.modes, full.chains, sizes.compared))
    return {
        "setting": (
            f"{sizes.starts} searches of at most {sizes.free_steps} steps; NUTS: {sizes.chains} chains of "
            f"{sizes.free_draws} draws after {sizes.free_warmup} of warm-up; the last row is the model of the first "
            "table, with its searches and chains"
        ),
        "rows": rows,
        "targets": [],
        "notes": [],
    }


def smallest_variance(transformer: Transformer, texts: Int[Array, "N m"]) -> Float[Array, ""]:
    """The smallest variance over coordinates of what an attention's norm or the final norm reads in the texts."""

    def of_text(text: Int[Array, " m"]) -> Float[Array, ""]:
        streams = [transformer.embed(text[:-1])]
        for block in transformer.blocks:
            streams.append(block(streams[-1])[0])
        return jnp.stack(streams).var(-1).min()

    return jax.jit(jax.vmap(of_text))(texts).min()


FUNCTIONALS = Section(
    "functionals",
    "Logits and det J on held-out texts",
    "NUTS is the reference. Its skewness, without the sign, and its excess kurtosis are 0 for a Gaussian. The means of "
    "the other methods differ from its means by so many of its standard deviations, and their standard deviations are "
    "divided by its own. The distance is the largest between a marginal distribution function and that of NUTS. Each "
    "is taken over the entries of the quantity. Sampled: the quantity at draws of Laplace's Gaussian of the weights. "
    "Linearised: the quantity made linear in the weights at the mode; its mean is the value at MAP.",
    (
        Column("quantity", "quantity", "text"),
        Column("method", "method", "text"),
        Column("entries", "entries", "count"),
        Column("r_hat", "largest R-hat", "number"),
        Column("ess", "smallest effective sample size", "number"),
        Column("sd", "mean sd", "number"),
        Column("skewness_median", "skewness, median", "number"),
        Column("skewness_largest", "skewness, largest", "number"),
        Column("kurtosis_median", "excess kurtosis, median", "number"),
        Column("kurtosis_largest", "excess kurtosis, largest", "number"),
        Column("apart_median", "means apart in sd, median", "number"),
        Column("apart_largest", "means apart, largest", "number"),
        Column("ratio_smallest", "sd over that of NUTS, smallest", "error"),
        Column("ratio_median", "sd ratio, median", "number"),
        Column("ratio_largest", "sd ratio, largest", "number"),
        Column("distance_median", "distance, median", "number"),
        Column("distance_largest", "distance, largest", "number"),
    ),
    run_functionals,
    apart="entries",
)
PREDICTIVE = Section(
    "predictive",
    "Predictions of held-out texts",
    "The loss is -log p of the predicted tokens, p averaged over draws where a method has draws. The differences are "
    "paired by text.",
    (
        Column("method", "method", "text"),
        Column("nats", "loss, nats a token", "number"),
        Column("more", "more than NUTS", "number"),
        Column("standard_error", "standard error of the difference", "number"),
    ),
    run_predictive,
)
FREE = Section(
    "free",
    "With every weight free, and at another width",
    "The smallest variance is that over coordinates of what a norm reads in the texts, where the search of the lowest "
    "potential ended; the norm adds 1e-5 to it.",
    (
        Column("width", "width", "count"),
        Column("known", "known", "text"),
        Column("weights", "free weights", "count"),
        Column("converged", "searches that converged", "text"),
        Column("gradient", "smallest gradient norm", "error"),
        Column("variance", "smallest variance", "error"),
        Column("step_size", "step size of NUTS", "error"),
        Column("divergences", "divergences", "count"),
        *(Column(name, f"R-hat, {name}", "number") for name in ("attention logits", "output logits", "det J")),
    ),
    run_free,
)
SECTIONS = (FUNCTIONALS, PREDICTIVE, EVIDENCE, FREE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments; ValueError for bad ones."""
    return measure_or_publish(
        arguments, "python -m theory_checks.inference.transformer_posterior", "MAP, Laplace and NUTS.", SECTIONS,
        lambda quick, seed: (QUICK if quick else Sizes())._replace(seed=seed), RESULT,
        lambda path, result: fill(path.read_text(encoding="utf-8"), markdown(result, SECTIONS)),
    )  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
