"""The decoder layer by layer; its logits are held against transformers in test_foreign.py."""

import numpy as np
import pytest

from prob_transformer import decoder_margins
from prob_transformer.pretrained.huggingface import read_folder
from prob_transformer.pretrained.llama import LlamaConfig, Rope
from tests.helpers.foreign_models import LLAMA3, llama_folder


def test_scaled_rotary_positions_follow_their_published_rules():
    # Wavelengths 2 pi / frequency: below 32 / 4 kept, above 32 / 1 divided by the factor, blended between.
    plain = 500.0 ** (-np.arange(0, 8, 2) / 8)
    wavelengths = 2 * np.pi / plain
    assert [(wavelengths < 8).sum(), (wavelengths > 32).sum()] == [1, 2]
    blend = (32 / wavelengths - 1) / 3
    scaled = np.where(wavelengths > 32, plain / 8, (1 - blend) * plain / 8 + blend * plain)
    scaled = np.where(wavelengths < 8, plain, scaled)
    llama3 = Rope(**LLAMA3, original_max_position_embeddings=32)
    for rope, frequencies in ((llama3, scaled), (Rope(type="linear", factor=2.0), plain / 2)):
        found = LlamaConfig(head_dim=8, rope_theta=500.0, rope_scaling=rope).frequencies()
        np.testing.assert_allclose(found, frequencies, rtol=1e-14)


def test_each_layer_is_handed_out_with_its_inputs_and_has_margins(tmp_path):
    decoder, tokenizer = read_folder(llama_folder(tmp_path))
    tokens = np.array(tokenizer.encode("Two words.").ids)
    assert tokenizer.decode(tokens) == "Two words."
    found = list(decoder_margins(decoder.layers(tokens)))
    assert [layer.sign.shape for layer in found] == [(4, 10)] * 2
    _, inputs = next(decoder.layers(tokens))
    embedded = np.asarray(decoder.token_embedding)[tokens]
    size = np.sqrt(np.square(embedded).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(inputs, embedded / size * np.asarray(decoder.blocks[0].attention_norm.gain), rtol=1e-5)
    with pytest.raises(ValueError, match="33 do not fit the context of 32; pass a shorter text"):
        decoder(np.zeros(33, int))
