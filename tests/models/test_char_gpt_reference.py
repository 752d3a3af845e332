"""The committed run of the character GPT: its size, and its recorded loss against plain NumPy."""

import json
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from models import corpus, wikipedia
from models.char_gpt.checkpoint import NAME, load_run, read_header
from models.char_gpt.commands import METRICS
from prob_transformer.transformer.weight_sites import PREFIX, weights_of
from theory_checks.truth.transformer import embed, forward

ROOT = Path(__file__).parents[2]
RUN = ROOT / "results/reference/char_gpt"
METRICS_OF_RUN = json.loads((RUN / METRICS).read_text(encoding="utf-8"))


def test_the_checkpoint_is_small_and_is_that_of_the_metrics():
    assert (RUN / NAME).stat().st_size <= 500_000
    header = read_header(RUN / NAME)
    assert header.step == header.config.steps == METRICS_OF_RUN["provenance"]["configuration"]["steps"]
    assert header.config.as_dict() == METRICS_OF_RUN["provenance"]["configuration"]
    assert header.corpus_sha256 == METRICS_OF_RUN["corpus"]["sha256"]


def test_the_recorded_loss_on_held_out_text_is_that_of_plain_numpy():
    model, config, vocabulary = load_run(RUN)
    text = corpus.load(wikipedia.prepare(ROOT / wikipedia.DEFAULT_PATH), config.context + 1)
    assert text.vocabulary == vocabulary
    weights = {name.removeprefix(f"{PREFIX}/"): np.asarray(x, np.float64) for name, x in weights_of(model).items()}
    # Windows of context + 1 characters that do not overlap, spread evenly over the validation text.
    available = len(text.validation) // (config.context + 1)
    windows = text.validation[: available * (config.context + 1)].reshape(available, -1)
    chosen = np.linspace(0, available - 1, config.evaluation_windows).round().astype(int)
    losses = []
    for window in windows[chosen]:
        logits, _ = forward(weights, embed(weights, window[:-1]))
        losses.append(-np.take_along_axis(log_softmax(logits, axis=-1), window[1:, None], -1).mean())
    recorded = METRICS_OF_RUN["clean_loss"]
    np.testing.assert_allclose(np.mean(losses), recorded["nats_per_character"], rtol=1e-5)
    np.testing.assert_allclose(np.std(losses, ddof=1) / 16, recorded["standard_error"], rtol=1e-4)
