"""What programs of others ask of the classes of the published layout, and what they then get."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from closeness import additions, assert_close
from datasets import Dataset
from peft import PrefixTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GlmConfig,
    Trainer,
    TrainingArguments,
)
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding

from finetune.models.chatglm.configuration import ChatGLMConfig
from finetune.models.chatglm.layers import RotaryEmbedding
from finetune.models.chatglm.modeling import HiddenOutput
from finetune.models.load import load_model
from finetune.models.loss import supervised_places

IDS = torch.tensor([[372, 374, 5, 6, 7, 8, 9, 10], [372, 374, 11, 12, 13, 14, 15, 16]])


@pytest.fixture
def model(tiny_chatglm: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_chatglm).eval()


def test_generate_takes_embeddings(model: Any) -> None:
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    embeds = model.get_input_embeddings()(IDS)
    replies = model.generate(inputs_embeds=embeds, **options)
    assert replies.equal(model.generate(IDS, **options)[:, IDS.shape[1] :])


def test_peft_sizes_a_prefix_by_the_groups_and_config_json_stays_as_published(
    model: Any, tiny_chatglm: Path, tmp_path: Path
) -> None:
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    mask = torch.ones_like(IDS)
    assert tuned(input_ids=IDS, attention_mask=mask).logits.shape == (2, 8, 400)
    tuned.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=2)
    heads, size = model.config.multi_query_group_num, model.config.kv_channels
    assert tuned.prompt_encoder["default"].embedding.weight.shape == (4, 2 * 2 * heads * size)
    model.config.save_pretrained(tmp_path)
    written, published = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tiny_chatglm)
    )
    assert written.keys() - published.keys() <= {"transformers_version", "dtype", "use_cache"}
    fresh = json.loads(ChatGLMConfig(num_layers=2).to_json_string())
    assert fresh["multi_query_group_num"] == 2
    assert not {"num_key_value_heads", "head_dim", "num_hidden_layers"} & fresh.keys()


def test_a_config_has_what_every_config_has() -> None:
    assert ChatGLMConfig().bos_token_id is None
    assert ChatGLMConfig().vision_config is None


def test_the_tower_is_described_by_a_config(tmp_path: Path) -> None:
    import pictures

    folder = pictures.save_model(tmp_path / "glm4v")
    config = AutoConfig.from_pretrained(folder)
    assert config.vision_config.hidden_size == config.vision_config["hidden_size"] == 16
    assert config.vision_config.num_attention_heads == 2
    config.vision_config.dropout_prob = 0.1
    config.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved/config.json").read_text())["vision_config"]
    assert written == pictures.VISION | {"dropout_prob": 0.1}
    assert list(written) == list(pictures.VISION)
    made = ChatGLMConfig(vision_config=pictures.VISION, boi_token_id=1, eoi_token_id=2)
    again = json.loads(made.to_json_string())["vision_config"]
    assert again == pictures.VISION


@torch.no_grad()
def test_evaluation_has_logits_beside_the_loss_and_training_makes_those_that_are_read(
    model: Any,
) -> None:
    logits = model(IDS).logits
    evaluated = model(IDS, labels=IDS)
    assert evaluated.logits.equal(logits)
    assert type(evaluated) is HiddenOutput
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert_close(evaluated.loss, expected, additions(model.config, 8) + 400)
    head, calls = model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda *_: calls.append(1))
    for is_training, has_gradient in [(False, True), (True, True), (True, False)]:
        with torch.set_grad_enabled(has_gradient):
            trained = model.train(is_training)(IDS, labels=IDS, logits_to_keep=3)
            calls.clear()
            assert list(trained) == ["loss"]
            assert len(trained.to_tuple()) == 1
            assert not calls  # nothing is made that nobody has read
            assert trained.logits is trained.logits
            assert torch.allclose(trained.logits, logits[:, -3:], atol=1e-5)
            assert calls == [1]
            assert trained.logits.requires_grad is has_gradient
    hook.remove()


def test_logits_read_behind_a_training_step_are_of_its_number_format(model: Any) -> None:
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(IDS, labels=IDS)
    assert trained.logits.dtype is torch.bfloat16
    assert model(IDS, labels=IDS).logits.dtype is torch.float32


def test_training_and_evaluation_here_keep_nothing_to_make_logits_from(model: Any) -> None:
    step = model.train()(IDS, labels=IDS, supervised=supervised_places(IDS))
    with torch.no_grad():
        evaluated = model.eval()(IDS, labels=IDS, supervised=supervised_places(IDS))
    for output in (step, evaluated):
        assert output.logits is None
        assert output.make_logits is None
    other = model(IDS, head_loss=lambda head, hidden: hidden.sum())
    assert other.logits is None
    assert model(IDS, labels=IDS, return_dict=False)[0].dim() == 0


def test_predict_and_compute_metrics_of_transformers_see_the_logits(
    model: Any, tmp_path: Path
) -> None:
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist()])
    shapes = []

    def count(predicted: Any) -> dict[str, float]:
        shapes.append(np.shape(predicted.predictions))
        return {"hits": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}

    options = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, options, compute_metrics=count)
    assert trainer.predict(data).predictions.shape == (2, 8, 400)
    assert "eval_hits" in trainer.evaluate(data)
    assert shapes == [(2, 8, 400)] * 2


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
def test_shift_labels_are_what_each_position_predicts(model: Any, rows: int) -> None:
    ids = IDS[:rows]
    shifted = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], dim=1)
    expected = model(ids, labels=ids).loss
    assert model(ids, shift_labels=shifted).loss.equal(expected)
    assert model(ids, labels=torch.flip(ids, [1]), shift_labels=shifted).loss.equal(expected)
    last = torch.full_like(ids, -100)
    last[:, -1] = 7  # a shard of a longer row: its last place has a target too
    logits = model(ids).logits[:, -1]
    wanted = torch.nn.functional.cross_entropy(logits, last[:, -1])
    assert_close(model(ids, shift_labels=last).loss, wanted, additions(model.config, 8) + 400)


@torch.no_grad()
def test_shift_labels_of_packed_documents_do_not_reach_into_the_next(model: Any) -> None:
    ids, positions = IDS[:1], torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    shifted = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)
    packed = {"position_ids": positions, "use_cache": False}
    expected = model(ids, labels=ids, **packed).loss
    assert model(ids, shift_labels=shifted, **packed).loss.equal(expected)


def test_a_decoder_is_its_own_encoder(model: Any) -> None:
    assert model.get_encoder() is model
    assert model.base_model.get_encoder() is model.base_model


@torch.no_grad()
def test_automodel_generates_and_has_the_last_hidden_state(tiny_chatglm: Path) -> None:
    model = AutoModel.from_pretrained(tiny_chatglm)
    out = model(IDS)
    assert out.last_hidden_state.shape == (2, 8, 32)
    assert model.get_output_embeddings()(out.last_hidden_state).equal(out.logits)
    assert out[0] is out.logits
    assert model(IDS, return_dict=False)[0].equal(out.logits)
    assert model.generate(IDS, max_new_tokens=1, output_logits=True, return_dict_in_generate=True).logits[0].shape[1] == tiny.VOCAB_SIZE  # fmt: skip


SCALED = {
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions_are_those_of_transformers_glm(kind: str) -> None:
    sizes = {"num_attention_heads": 4, "hidden_size": 32}
    ours = ChatGLMConfig(
        **sizes, kv_channels=8, seq_length=16, rope_ratio=3, rope_parameters=dict(SCALED[kind])
    )
    theirs = GlmConfig(
        **sizes, head_dim=8, max_position_embeddings=16,
        rope_parameters=SCALED[kind] | {"rope_theta": 30000.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    rotations = RotaryEmbedding(ours), GlmRotaryEmbedding(theirs)
    for length in (10, 40, 10):  # within what was trained, beyond it, and back
        positions = torch.arange(length)[None]
        found, expected = (rotation(torch.zeros(1), positions) for rotation in rotations)
        for mine, other in zip(found, expected, strict=True):
            assert mine.equal(other[..., : mine.shape[-1]])


@torch.no_grad()
def test_a_model_with_scaled_positions_is_saved_and_opened(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_chatglm, tmp_path / "scaled")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": SCALED["yarn"]}))
    plain, scaled = load_model(tiny_chatglm), load_model(folder)
    assert not torch.allclose(scaled(IDS).logits, plain(IDS).logits, atol=1e-3)
    scaled.save_pretrained(tmp_path / "saved")
    assert load_model(tmp_path / "saved")(IDS).logits.equal(scaled(IDS).logits)
    written = json.loads((tmp_path / "saved/config.json").read_text())
    assert written["rope_parameters"]["rope_type"] == "yarn"
    assert "rope_parameters" not in json.loads(plain.config.to_json_string())
