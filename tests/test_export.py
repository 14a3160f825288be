"""Export: a text model in its other layout answers the same, and comes back byte for byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters import make_base
from transformers import AutoModelForCausalLM, GlmForCausalLM

from finetune.export.convert import export_model
from finetune.models.load import load_model
from finetune.training import checkpoint
from finetune.weights import tensors


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder: number format, shape and bytes as they lie on disk."""
    return {
        name: (info.dtype, info.shape, info.file.read_bytes()[info.start : info.end])
        for name, info in tensors(folder).items()
    }


@pytest.mark.parametrize("ratio", [1, 500, 10000])
def test_the_published_layout_answers_the_same_in_plain_transformers(
    tmp_path: Path, ratio: int
) -> None:
    base = make_base(tmp_path / "base", family="chatglm", rope_ratio=ratio)
    export_model(base, tmp_path / "hf", layout="hf")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(opened) is GlmForCausalLM
    assert opened.config.rope_parameters["rope_theta"] == 10000 * ratio
    ids = torch.randint(400, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_model(base)(input_ids=ids, use_cache=False).logits
        theirs = opened.eval()(input_ids=ids, use_cache=False).logits
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_there_and_back_every_tensor_has_the_bytes_it_had(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    base = (
        make_base(tmp_path / "base", dtype, family=family, num_attention_heads=8, head_dim=4)
        if family == "glm"
        else make_base(tmp_path / "base", dtype, family=family)
    )
    there, back = ("hf", "published") if family == "chatglm" else ("published", "hf")
    export_model(base, tmp_path / "there", layout=there)
    export_model(tmp_path / "there", tmp_path / "back", layout=back)
    assert stored_bytes(tmp_path / "back") == stored_bytes(base)
    assert checkpoint.verify(tmp_path / "there") == []
