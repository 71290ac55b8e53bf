"""T5 as a text encoder, compared with transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from glance_trt.export.families import stored, t5
from glance_trt.export.families.t5_modules import T5TextEncoder
from glance_trt.export.weights import component_tensors

CONFIG: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def model() -> T5EncoderModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = T5EncoderModel(T5Config(**CONFIG)).eval()
        bias = made.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias.data = torch.randn(bias.shape)  # as trained: one that tells distances apart
    return made


@pytest.mark.parametrize("length", [1, 2, 77, 300])
def test_every_pair_of_tokens_has_the_bias_of_transformers(model: T5EncoderModel, length: int) -> None:
    """300 tokens are more than the 128 up to which distances are told apart."""
    attention = model.encoder.block[0].layer[0].SelfAttention
    with torch.no_grad():
        expected = attention.compute_bias(length, length)
        found = _ours(model, length).position_bias()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [5, 160])
def test_embeddings_are_those_of_transformers(model: T5EncoderModel, length: int) -> None:
    ids = torch.randint(0, 40, (3, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
        found = _ours(model, length)(ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_embedding_is_one_weight_under_either_name(model: T5EncoderModel, name: str, tmp_path: Path) -> None:
    """transformers writes the first, and checkpoints have either or both."""
    embedding = model.shared.weight.detach()
    others = {key: value for key, value in model.state_dict().items() if value.data_ptr() != embedding.data_ptr()}
    save_file({**others, name: embedding.clone()}, tmp_path / "model.safetensors")
    names = [key.removeprefix("encoder.") for key in _ours(model, 5).state_dict()]
    found = stored(_Family(), names, component_tensors(tmp_path), tmp_path)  # type: ignore[arg-type]
    assert len(found) == len(others) + 1
    assert torch.equal(found["encoder.embed_tokens.weight"].read(), embedding)


class _Family:
    aliases = staticmethod(t5.aliases)


def _ours(model: T5EncoderModel, length: int) -> T5TextEncoder:
    """Of a copy, for it takes the model apart."""
    copy = T5EncoderModel(T5Config(**CONFIG)).eval()
    copy.load_state_dict(model.state_dict())
    return T5TextEncoder(copy, length)
