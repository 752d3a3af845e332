"""What a command that generates text says, writes and draws: the text's likelihood, and the margins it was read at.

Margins of a generated token are those of the position it was predicted from, the one before it: of every layer and
head, det J and sigma_min(J) of J = I - Cov_alpha(u, k) W_Q / sqrt(p), over the strict past, each head alone with
identity values. A position sees nothing that comes after it, so `margins_of_text` reads the finished text once.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from prob_transformer._extras import require
from prob_transformer._validation import require_seed
from prob_transformer.attention import Attention
from prob_transformer.files import atomic_path, require_ending, require_writable, write_json
from prob_transformer.kernels.block_triangular import margins_of_columns, query_basis
from prob_transformer.margins import layer_margins
from prob_transformer.transformer.window_margins import columns_of_heads

# Fields of `prob_transformer.transformer.Generated` as NumPy arrays.
Found = Mapping[str, np.ndarray]
# Positions whose matrices are worked on at once: more of them leave the cache of a CPU.
_BLOCK = 32
# Layers of a deeper model are told apart by colour.
_STYLES = ("-", "--", ":", "-.")


def add_options(parser: argparse.ArgumentParser, unit: str, length: int) -> None:
    """The options of drawing, and of the files that are written; `unit` is what a token is called."""
    parser.add_argument("--prompt", required=True, help=f"what the text begins with, at least one {unit}")
    parser.add_argument("--length", type=int, default=length, help=f"{unit}s to generate (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help=f"draw among the k likeliest {unit}s (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a JSON file for text, log-probabilities and margins")
    parser.add_argument("--figure", type=Path, help="a PNG file for the margins along the text")


def require_options(options: argparse.Namespace, unit: str) -> None:
    """Raises ValueError, or MissingExtraError, for what can be refused before a model is read."""
    require_seed("--seed", options.seed, "the draws")
    if not options.prompt:
        raise ValueError(f"--prompt: is empty; pass at least one {unit}.")
    # With endings of their own neither can take the place of the other, nor of weights.
    for name, ending in (("json", ".json"), ("figure", ".png")):
        path = getattr(options, name)
        if path is not None:
            require_ending(f"--{name}: {path}", path, (ending,))
            require_writable(f"--{name}: {path}", path)
    if options.figure is not None:
        require("inspect", "matplotlib")


@contextmanager
def in_names_of_options(others: Mapping[str, str]) -> Iterator[None]:
    """A ValueError inside gets the option in place of the argument; `others` are options with names of their own."""
    try:
        yield
    except ValueError as error:
        argument, _, rest = str(error).partition(":")
        options = {name: "--" + name.replace("_", "-") for name in ("temperature", "top_k", "length", "prompt")}
        raise ValueError(f"{(options | dict(others)).get(argument, argument)}:{rest}") from None


@jax.jit
def _conditioning(layer: Attention, inputs: Float[Array, "n d"], positions: Int[Array, " b"]) -> Float[Array, "H b"]:
    def of_head(head: Int[Array, ""]) -> Float[Array, " b"]:
        alone = layer.head_alone(head)
        columns = columns_of_heads(alone, query_basis(alone.query), inputs, positions)
        return margins_of_columns(columns[0]).conditioning

    return lax.map(of_head, jnp.arange(layer.heads))


def margins_of_text(
    layers: Iterable[tuple[Attention, Float[Any, "n d"]]],
    positions: Int[np.ndarray, " N"],
    after_layer: Callable[[], object] = lambda: None,
) -> dict[str, Float[np.ndarray, "L H N"]]:
    """`sign` and `log_det` of det J in nats, and `conditioning`, sigma_min(J), all (L, H, N), at N positions of a text.

    `layers` are pairs of a layer and its normalised inputs, read one after the other. Determinants are those of
    `layer_margins`; sigma_min(J) is computed in the type of the inputs. Raises ValueError as `layer_margins`.
    """
    # The last position once more fills the last block.
    filled = np.pad(positions, (0, -len(positions) % _BLOCK), mode="edge").reshape(-1, _BLOCK)
    found = list[tuple[np.ndarray, ...]]()
    for layer, inputs in layers:
        margins = layer_margins(layer, inputs, positions=positions.tolist())
        blocks = [np.asarray(_conditioning(layer, inputs, block)) for block in filled]
        conditioning = np.concatenate(blocks, axis=1)[:, : len(positions)]
        found.append((np.asarray(margins.sign), np.asarray(margins.log_det), conditioning))
        after_layer()
    return dict(zip(("sign", "log_det", "conditioning"), map(np.stack, zip(*found, strict=True)), strict=True))


def summary(found: Found, unit: str) -> str:
    """One sentence on the likelihood of the text and one on its margins."""
    log_det = np.asarray(found["log_det"], np.float64)
    layer, head, position = np.unravel_index(log_det.argmin(), log_det.shape)
    return (
        f"{len(found['tokens'])} {unit}s, on average {-found['log_probs'].mean():.3f} nats each under the model. "
        f"det J <= 0 at {(found['sign'] <= 0).mean():.2%} of the places; the smallest |det J| is "
        f"{np.exp(log_det[layer, head, position]):.3g}, in layer {layer}, head {head}, at {unit} {position}; the "
        f"smallest sigma_min(J) is {found['conditioning'].min():.3g}."
    )


def _plain(values: np.ndarray) -> Any:
    """Nested lists, null for log|det J| where det J = 0: JSON has no infinity."""
    plain = values.astype(object)
    plain[np.isneginf(values)] = None
    return plain.tolist()


def write_files(
    options: argparse.Namespace,
    texts: Sequence[tuple[Found, Sequence[str]]],
    unit: str,
    record_of_origin: Callable[[dict[str, Any]], dict[str, Any]],
    are_draws: bool = False,
) -> None:
    """Write the files of --json and --figure, of one text with its pieces, or of all `texts` if they are draws.

    `record_of_origin` makes of the options what stands first in the JSON. The figure shows the first text.
    """
    if options.json is not None:
        asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        margins = f"of the strict past, each head alone with identity values; axes: layer, head, {unit}"
        records = [
            {"text": "".join(pieces), **{name: _plain(values) for name, values in found.items()}}
            for found, pieces in texts
        ]
        of_texts = {"draws": records} if are_draws else records[0]
        write_json(options.json, {**record_of_origin(asked), "prompt": options.prompt, "margins": margins, **of_texts})
    if options.figure is not None:
        _draw(*texts[0], unit, options.figure)


def _draw(found: Found, pieces: Sequence[str], unit: str, path: Path) -> None:
    """The smallest |det J| and sigma_min(J) over heads of every layer along the text, as a PNG file."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Any = figure.subplots(2, sharex=True)
    layers = len(found["sign"])
    for layer, (log_det, sign, conditioning) in enumerate(
        zip(found["log_det"], found["sign"], found["conditioning"], strict=True)
    ):
        line: dict[str, Any] = {"linestyle": _STYLES[layer % 4], "linewidth": 1, "label": f"layer {layer}"}
        if layers > len(_STYLES):
            # Dark layers are the first.
            line |= {"linestyle": "-", "color": colormaps["viridis"](layer / (layers - 1))}
            line["label"] = line["label"] if layer in (0, layers // 2, layers - 1) else None
        axes[0].semilogy(np.exp(log_det.min(0)), **line)
        axes[1].semilogy(conditioning.min(0), **line)
        negative = np.flatnonzero((sign <= 0).any(0))
        axes[0].plot(negative, np.exp(log_det.min(0))[negative], "k|", markersize=7)
    axes[0].set(ylabel="|det J|", title="smallest over the heads of a layer; ticks: det J <= 0 in some head")
    axes[1].set(ylabel="sigma_min(J)", xlabel=f"generated {unit}")
    axes[0].legend(frameon=False)
    if len(pieces) <= 100:
        names = [repr(piece)[1:-1] for piece in pieces]
        rotation = 90 if any(len(name) > 2 for name in names) else 0
        axes[1].set_xticks(range(len(pieces)), names, fontsize=6, family="monospace", rotation=rotation)
    with atomic_path(path) as temporary, warnings.catch_warnings():
        # A box stands for a character that the font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=150)
