"""The JAX decoder held against transformers on PyTorch, both reading the same GGUF file: `make benchmark-smollm2`.

    python -m benchmarks.smollm2_logits [--out comparison.json]

Three Wikipedia passages of 512 tokens: largest difference of logits and of perplexities. Then 200 tokens that PyTorch
continues the first passage with, greedily: the decoder here continues alike exactly when its largest logit after
every one of them is at the next, so one forward pass tells.
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax
from tqdm import tqdm

from models import wikipedia
from models.cli import run
from prob_transformer.files import provenance, write_json
from prob_transformer.pretrained.gguf_file import read_gguf
from prob_transformer.pretrained.load import smollm2_path

ARTICLES = (0, 37, 90)
PASSAGE, PROMPT, CONTINUED = 512, 64, 200
LARGEST_DIFFERENCE, LARGEST_PERPLEXITY_DIFFERENCE = 2e-2, 1e-3


def passage(number: int) -> str:
    """The first 3000 characters of an article of the sample, its title first."""
    article = list(wikipedia.read_dump(wikipedia.dump_path()))[number]
    return f"{article.title}\n{wikipedia.clean(article.text)}"[:3000]


def nats_a_token(logits: Float[np.ndarray, "n V"], tokens: Int[np.ndarray, " n"]) -> float:
    """Mean cross-entropy of every token after the first, in float64."""
    log_probabilities = log_softmax(logits[:-1].astype(np.float64), axis=-1)
    return float(-log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].mean())


def _other_model(path: Path) -> tuple[Any, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed; run make benchmark-smollm2, which brings it.") from None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return torch, model.eval()


def compare() -> dict[str, Any]:
    """All figures of the module docstring. Raises ValueError if a package or file is missing."""
    path = smollm2_path()
    torch, other = _other_model(path)
    decoder, tokenizer = read_gguf(path)

    def other_logits(tokens: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n V"]:
        with torch.no_grad():
            return other(torch.tensor(tokens[None].astype(np.int64))).logits[0].numpy()

    passages = []
    for number in tqdm(ARTICLES, desc="passages"):
        tokens = np.asarray(tokenizer.encode(passage(number)).ids[:PASSAGE])
        ours, theirs = np.asarray(decoder(tokens)), other_logits(tokens)
        difference = nats_a_token(ours, tokens) - nats_a_token(theirs, tokens)
        passages.append(
            {
                "article": number,
                "largest_logit_difference": float(np.abs(ours - theirs).max()),
                "same_largest_logit": int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
                "tokens": len(tokens),
                "perplexity": math.exp(nats_a_token(ours, tokens)),
                "perplexity_difference": abs(math.expm1(difference)),
            }
        )
    prompt = np.asarray(tokenizer.encode(passage(ARTICLES[0])).ids[:PROMPT])
    with torch.no_grad():
        whole = other.generate(
            torch.tensor(prompt[None].astype(np.int64)),
            max_new_tokens=CONTINUED,
            min_new_tokens=CONTINUED,
            do_sample=False,
        )[0].numpy()
    # The other side keeps the end token from being chosen; here it must not win either.
    followed = np.asarray(decoder(whole)).argmax(-1)[PROMPT - 1 : -1] == whole[PROMPT:]
    return {"passages": passages, "greedy_tokens": int(followed.size), "greedy_tokens_same": int(followed.sum())}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smollm2_logits", description="Compare with PyTorch.")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    figures = compare()
    for row in figures["passages"]:
        print(
            f"article {row['article']}: largest logit difference {row['largest_logit_difference']:.1e}, same largest "
            f"logit at {row['same_largest_logit']} of {row['tokens']}, perplexity {row['perplexity']:.4f} "
            f"(relative difference {row['perplexity_difference']:.1e})"
        )
    print(f"greedy continuation: {figures['greedy_tokens_same']} of {figures['greedy_tokens']} tokens the same")
    if arguments.out is not None:
        write_json(arguments.out, {**figures, "provenance": provenance(None, {"articles": ARTICLES})})
    holds = figures["greedy_tokens_same"] == figures["greedy_tokens"] and all(
        row["largest_logit_difference"] < LARGEST_DIFFERENCE
        and row["perplexity_difference"] < LARGEST_PERPLEXITY_DIFFERENCE
        for row in figures["passages"]
    )
    return 0 if holds else 1


if __name__ == "__main__":
    run(main)
