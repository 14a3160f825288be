"""Export: a text model in its other layout answers the same, and comes back byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from adapters import make_adapter, make_base, weights_of
from closeness import LARGEST_LOGIT, additions, assert_close, rounding
from command_line import exit_code
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GlmForCausalLM

from finetune.artifacts.weights import tensors
from finetune.errors import ConfigError, ModelError, SpaceError
from finetune.export.convert import export, export_model
from finetune.models.load import load_model
from finetune.storage import folders


def stored_bytes(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a folder: number format, shape and bytes as they lie on disk."""
    return {
        name: (info.dtype, info.shape, info.file.read_bytes()[info.start : info.end])
        for name, info in tensors(folder).items()
    }


@pytest.mark.parametrize("ratio", [1, 500, 10000])
def test_what_was_published_answers_the_same_in_plain_transformers(
    tmp_path: Path, ratio: int
) -> None:
    base = make_base(tmp_path / "base", family="chatglm", rope_ratio=ratio)
    report = export_model(base, tmp_path / "hf", layout="hf", check="full")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(opened) is GlmForCausalLM
    assert opened.config.rope_parameters["rope_theta"] == 10000 * ratio
    assert_same_answers(load_model(base), opened)
    assert report.largest_difference is not None
    assert report.largest_difference < rounding(additions(opened.config, 300), LARGEST_LOGIT)


def test_the_glm_layout_answers_the_same_as_published(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    base = make_base(tmp_path / "base", rope_parameters=rope, rms_norm_eps=1e-5)
    export_model(base, tmp_path / "published", layout="published")
    config = json.loads((tmp_path / "published/config.json").read_text())
    assert (config["rope_ratio"], config["layernorm_epsilon"]) == (500, 1e-5)
    opened = AutoModelForCausalLM.from_pretrained(base).eval()
    assert_same_answers(load_model(tmp_path / "published"), opened)


def assert_same_answers(one: Any, other: Any) -> None:
    """The logits are alike over a text that is long enough for a wrong theta to show."""
    ids = torch.randint(400, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pair = [model(input_ids=ids, use_cache=False).logits for model in (one, other)]
    assert_close(*pair, additions(other.config, 300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["chatglm", "glm"])
def test_there_and_back_every_tensor_has_the_bytes_it_had(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", dtype, family=family)
    there, back = ("hf", "published") if family == "chatglm" else ("published", "hf")
    export_model(base, tmp_path / "there", layout=there)
    export_model(tmp_path / "there", tmp_path / "back", layout=back)
    assert stored_bytes(tmp_path / "back") == stored_bytes(base)
    for folder in (tmp_path / "there", tmp_path / "back"):
        assert folders.verify(folder) == []
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        found = tensors(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["torch_dtype"] == str(dtype).removeprefix("torch.")
        assert index["weight_map"] == {name: info.file.name for name, info in found.items()}
        assert index["metadata"]["total_size"] == sum(info.size for info in found.values())


def test_the_unused_buffer_comes_back_even_when_nobody_kept_it(
    tmp_path: Path, glm4_assets: Path
) -> None:
    published = glm4_assets / "golden/glm4v/glm4_text_tiny"
    export_model(published, tmp_path / "hf", layout="hf")
    weights = load_file(tmp_path / "hf/model.safetensors")
    save_file(weights, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    export_model(tmp_path / "hf", tmp_path / "back", layout="published")
    assert stored_bytes(tmp_path / "back") == stored_bytes(published)


def test_a_tied_model_gets_an_output_matrix_of_its_own(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", tie_word_embeddings=True)
    export_model(base, tmp_path / "out", layout="published")
    weights = weights_of(tmp_path / "out")
    head = weights["transformer.output_layer.weight"]
    assert torch.equal(head, weights["transformer.embedding.word_embeddings.weight"])


MESSAGES = [
    {"role": "user", "content": "北京 the quick fox?"},
    {"role": "assistant", "content": "hello <|user|> there"},
    {"role": "user", "content": "and then"},
]


def test_tokenizer_template_and_stops_come_along_where_only_tokenizer_model_was(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base", family="chatglm", tiktoken=True, eos_token_id=tiny.PAD_ID)
    (base / "chat_template.jinja").unlink()
    (base / "generation_config.json").unlink()
    export_model(base, tmp_path / "hf", layout="hf", check="none")
    export_model(tmp_path / "hf", tmp_path / "back", layout="published", check="none")
    hf = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = hf.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    assert ids[:2] == [tiny.CONTROL_IDS["[gMASK]"], tiny.CONTROL_IDS["<sop>"]]
    for folder in (base, tmp_path / "back"):
        same = AutoTokenizer.from_pretrained(folder)
        assert same.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"] == ids
    for folder in (tmp_path / "hf", tmp_path / "back"):
        for name in ("config.json", "generation_config.json"):
            values = json.loads((folder / name).read_text())
            assert (values["eos_token_id"], values["pad_token_id"]) == (tiny.EOS_IDS, tiny.PAD_ID)
    assert not list((tmp_path / "hf").glob("*.py"))
    assert "auto_map" not in (tmp_path / "hf/tokenizer_config.json").read_text()
    kept = (tmp_path / "back/tokenizer.model").read_bytes()
    assert kept == (base / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    ("change", "layout", "reason"),
    [
        ({"model_type": "glm4"}, "published", "0414 models"),
        ({"model_type": "glm", "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4,
          "partial_rotary_factor": 0.5}}, "published", "rope_type is 'yarn'"),
        ({"model_type": "glm", "hidden_act": "gelu"}, "published", "hidden_act is 'gelu'"),
        ({"model_type": "glm", "num_key_value_heads": 1}, "published", "the config says 8"),
        ({"model_type": "glm"}, "hf", "is in the hf layout already"),
        ({"model_type": "chatglm", "vision_config": {"image_size": 8}}, "hf", "GLM-4V"),
        ({"model_type": "chatglm", "rmsnorm": False}, "hf", "not a GLM-4 model"),
        ({"model_type": "chatglm", "quantization_config": {"bits": 4}}, "hf", "quantised"),
    ],
)  # fmt: skip
def test_what_the_other_layout_cannot_say_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], layout: Any, reason: str
) -> None:
    base = make_base(tmp_path / "base", family=change["model_type"])
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((ModelError, ConfigError), match=reason):
        export_model(base, tmp_path / "out", layout=layout)
    assert {f.name for f in tmp_path.iterdir()} == {"base"}


def test_a_checkpoint_without_one_of_its_matrices_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=1)
    file = base / "model-00001-of-00001.safetensors"
    for lost, reason in (("q_proj.weight", "no .*q_proj"), ("v_proj.bias", "no .*v_proj.bias")):
        weights = load_file(file)
        save_file({n: t for n, t in weights.items() if lost not in n}, file)
        with pytest.raises(ModelError, match=reason):
            export_model(base, tmp_path / "out", layout="published")
        save_file(weights, file)
    for odd in ("q_proj.weight", "k_proj.weight", "v_proj.bias"):
        other = {n: t.bfloat16() if odd in n else t for n, t in weights.items()}
        save_file(other, file)
        with pytest.raises(ModelError, match=r"q, k and v of .* have different dtypes"):
            export_model(base, tmp_path / "out", layout="published")
    save_file({n: t for n, t in weights.items() if "embed_tokens" not in n}, file)
    with pytest.raises(ModelError, match=r"has no model\.embed_tokens\.weight; copy it again"):
        export_model(base, tmp_path / "out", layout="published")
    save_file({n: t.double() if "embed_tokens" in n else t for n, t in weights.items()}, file)
    with pytest.raises(ModelError, match="F64"):
        export_model(base, tmp_path / "out", layout="published")


def test_too_small_a_disk_is_said_before_the_first_byte_of_an_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base")
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(folders, "staged", None)
    with pytest.raises(SpaceError, match="nothing was written"):
        export_model(base, tmp_path / "out", layout="published")


def test_the_command_exports_models_and_adapters_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base", family="chatglm")
    adapter = make_adapter(tmp_path / "adapter", base)
    for words in (
        ("base", "hf", "hf"),
        ("hf", "published", "back"),
        ("adapter", "hf", "lora-hf", "--new-base", str(tmp_path / "hf")),
        ("lora-hf", "published", "lora-back"),
    ):
        source, layout, out, *more = words
        places = [str(tmp_path / source), "--output", str(tmp_path / out)]
        assert exit_code("export", "--layout", layout, *places, *more, "--check", "full") == 0
    said = capsys.readouterr().out
    assert "largest difference of the logits" in said
    assert "names no base" in said
    assert stored_bytes(tmp_path / "back") == stored_bytes(base)
    before, after = (f / "adapter_model.safetensors" for f in (adapter, tmp_path / "lora-back"))
    assert load_file(before).keys() == load_file(after).keys()
    assert exit_code("export", str(base), "--layout", "hf", "--output", str(tmp_path / "hf")) == 2
    with pytest.raises(ConfigError, match="whole model"):
        export(str(base), tmp_path / "new", layout="hf", base=str(base))
