"""Whole runs with images: every method, two processes, evaluation, predictions, chat, merge."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pictures
import pytest
import runs
import torch
from closeness import LARGEST_LOGIT, SMOOTH_STEPS, additions, assert_trained_alike, rounding
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig

from finetune.chat.terminal import Session, Terminal, Voice
from finetune.errors import ConfigError
from finetune.evaluation.evaluate import evaluate
from finetune.export.merge import merge
from finetune.generation.load import open_model
from finetune.generation.predict import PredictOptions, predict
from finetune.models.chatglm.vision import VisionModel
from finetune.report.page import write_page
from finetune.training.arguments import Rates

METHODS = {
    "lora": {"kind": "lora", "rank": 4},
    "ptuning_v2": {"kind": "ptuning_v2", "num_virtual_tokens": 4},
    "full": {"kind": "full"},
}
TOWER = r"transformer\.vision\.transformer\.layers\.\d+\.(attention\.\w+|mlp\.fc\d)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    pictures.save_model(root / "model")
    (root / "model/preprocessor_config.json").write_text('{"size": 56}')
    pictures.write_dialogues(root, 12)
    return root


def settings(folder: Path, run_dir: Path, method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    data = folder / "rows.jsonl"
    options = {
        "model__freeze": ["vision"], "data__validation": str(data), "training__max_steps": 2,
        "evaluation__max_samples": 4,
    } | changes  # fmt: skip
    made = runs.config(folder / "model", data, run_dir, **options)
    made["method"] = method
    return made


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """A LoRA run of two steps in this process."""
    return runs.run_here(settings(folder, folder / "lora", METHODS["lora"]))


@pytest.mark.parametrize("name", ["full", "ptuning_v2"])
def test_a_frozen_tower_stays_as_it_is(folder: Path, tmp_path: Path, name: str) -> None:
    done = runs.run_here(
        settings(
            folder, tmp_path / "run", METHODS[name],
            training__activation_checkpointing=True, evaluation__generate=False,
        )
    )  # fmt: skip
    checkpoint = Path(done["checkpoint"])
    if name == "ptuning_v2":
        assert load_file(checkpoint / "adapter_model.safetensors").keys() == {"prompt_embeddings"}
        return
    before = load_file(folder / "model/model.safetensors")
    after = load_file(checkpoint / "model.safetensors")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        changed = not torch.equal(tensor, after[key])
        assert changed == ("vision" not in key and "inv_freq" not in key), key
    assert json.loads((checkpoint / "config.json").read_text())["vision_config"] == pictures.VISION
    assert (checkpoint / "preprocessor_config.json").read_text() == '{"size": 56}'


def test_adapter_keys_are_the_published_names(trained: dict[str, Any]) -> None:
    keys = load_file(Path(trained["checkpoint"]) / "adapter_model.safetensors").keys()
    modules = (
        "self_attention.query_key_value",
        "self_attention.dense",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    )
    assert keys == {
        f"base_model.model.transformer.encoder.layers.{layer}.{module}.lora_{half}.weight"
        for layer in range(2)
        for module in modules
        for half in "AB"
    }


def test_evaluating_afterwards_gives_the_scores_of_the_run(
    folder: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    report = evaluate(trained["checkpoint"], output=tmp_path / "out")
    assert report["scores"]["loss"] == trained["scores"]["loss"]
    after = (tmp_path / "out/predictions.jsonl").read_text()
    assert after == (folder / "lora/predictions-2.jsonl").read_text()
    assert "<|begin_of_image|><|endoftext|><|end_of_image|>" in after
    shown = write_page(tmp_path / "out").read_text(encoding="utf-8")
    found = re.search(r'"pictures": ?\["data:image/(\w+);base64,', shown)
    assert found, "the page shows no picture of the prompts"


def test_a_merged_model_sees_what_the_adapter_saw(
    folder: Path, trained: dict[str, Any], tmp_path: Path
) -> None:
    report = merge(Path(trained["checkpoint"]), tmp_path / "merged", check="full")
    sums = additions(AutoConfig.from_pretrained(tmp_path / "merged"), 64)
    assert report.largest_difference < rounding(sums, LARGEST_LOGIT)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        merged, base = tmp_path / "merged" / name, folder / "model" / name
        assert merged.read_bytes() == base.read_bytes()
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["vision_config"]["image_size"] == pictures.SIZE
    answers = [
        predict(
            target,
            [str(folder / "rows.jsonl")],
            tmp_path / f"{n}.jsonl",
            options=PredictOptions(6, 5),
        )
        for n, target in enumerate((trained["checkpoint"], str(tmp_path / "merged")))
    ]
    assert [answer["replies"] for answer in answers] == [12, 12]
    first, second = ((tmp_path / f"{n}.jsonl").read_text() for n in range(2))
    assert first == second
    assert json.loads(first.splitlines()[0])["messages"][0]["image"].endswith("images/red.png")


@pytest.mark.parametrize("name", METHODS)
def test_replies_of_a_batch_are_those_of_its_rows_after_every_method(
    folder: Path, tmp_path: Path, name: str
) -> None:
    done = runs.run_here(settings(folder, tmp_path / "run", METHODS[name], data__validation=None))
    said = []
    for size in (1, 5):
        out = tmp_path / f"{size}.jsonl"
        options = PredictOptions(6, size)
        predict(done["checkpoint"], [str(folder / "rows.jsonl")], out, options=options)
        said.append(out.read_text(encoding="utf-8"))
    assert said[0] == said[1]
    replies = [json.loads(line)["messages"][-1] for line in said[0].splitlines()]
    assert len(replies) == 12
    assert len({reply["content"] for reply in replies}) > 3


def test_predictions_depend_on_the_image(folder: Path) -> None:
    opened = open_model(folder / "model")
    ids = torch.tensor([[*range(5), pictures.BOI, *[0] * 4, pictures.EOI, 7]])
    with torch.no_grad():
        red, blue = (
            opened.model(input_ids=ids, pixel_values=torch.full((1, 3, 56, 56), value)).logits[
                0, -1
            ]
            for value in (-1.0, 1.0)
        )
    assert float((red - blue).abs().max()) > 1e-3


def test_the_chat_shows_an_image_with_the_next_message(folder: Path) -> None:
    opened = open_model(folder / "model")
    typed = io.StringIO(
        f"/image {folder}/images/none.png\n/image {folder}/images/red.png\nwhat is this\nand now\n"
        "/reset\nhello\n/quit\n"
    )
    shown = io.StringIO()
    session = Session(Voice(opened.model, opened.template, 3), Terminal(typed, shown))
    asked: list[Any] = []
    opened.model.register_forward_pre_hook(
        lambda model, args, kwargs: asked.append(kwargs), with_kwargs=True
    )
    session.run()
    asked = [kwargs for kwargs in asked if kwargs["input_ids"].shape[1] > 1]  # the prompts
    said = shown.getvalue()
    assert "error: " in said
    assert "none.png: there is no such file" in said
    assert "red.png, shown with your next message" in said
    # The image stays in the dialogue until it is reset.
    assert ["pixel_values" in kwargs for kwargs in asked] == [True, True, False]
    assert [(kwargs["input_ids"] == pictures.BOI).sum().item() for kwargs in asked] == [1, 1, 0]


def test_adapters_in_a_frozen_tower_are_refused(folder: Path, tmp_path: Path) -> None:
    method = METHODS["lora"] | {"target_modules": TOWER}
    with pytest.raises(ConfigError, match="freeze"):
        runs.run_here(settings(folder, tmp_path / "run", method))


def test_the_tower_is_adapted_on_request(folder: Path, tmp_path: Path) -> None:
    method = METHODS["lora"] | {"target_modules": TOWER}
    done = runs.run_here(
        settings(folder, tmp_path / "run", method, model__freeze=[], evaluation__generate=False)
    )
    weights = load_file(Path(done["checkpoint"]) / "adapter_model.safetensors")
    trained = [name for name in weights if "lora_B" in name and weights[name].any()]
    assert len(trained) == 2 * 4
    assert all(re.search(TOWER, name) for name in trained)


def test_tower_adapter_and_text_learn_at_rates_of_their_own(folder: Path, tmp_path: Path) -> None:
    made = settings(
        folder, tmp_path / "run", METHODS["full"], model__freeze=[], evaluation__generate=False
    )
    made["training"]["learning_rates"] = {"vision.transformer": 1e-9, "vision": 1e-4}
    done = runs.run_here(made)
    before = load_file(folder / "model/model.safetensors")
    after = load_file(Path(done["checkpoint"]) / "model.safetensors")
    # AdamW's second step, the first with a rate, moves every weight by about its rate.
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    for name, rate in (
        ("transformer.vision.transformer.layers.0.mlp.fc1.weight", 1e-9),
        ("transformer.vision.linear_proj.linear_proj.weight", 1e-4),
        ("transformer.encoder.layers.0.mlp.dense_4h_to_h.weight", 1e-2),
    ):
        assert rate / 10 <= moved[name] + 1e-9 <= rate * 10, name


def test_a_rate_for_weights_that_are_not_trained_is_refused() -> None:
    rates = Rates(1.0, {"vision": 0.5, "(": 1.0})
    with pytest.raises(ConfigError, match="'vision' is in the name of no weight") as found:
        rates.check(["transformer.encoder.layers.0.mlp.lora_A.weight"])
    assert "'(' is not a regex" in str(found.value)


@pytest.mark.parametrize(
    ("method", "freeze", "sharding"),
    [
        pytest.param("lora", ["vision"], {"zero_stage": 3}, id="lora under ZeRO-3"),
        pytest.param("full", [], None, id="everything, the tower too, data parallel"),
    ],
)
def test_two_processes_with_and_without_images_learn_like_one(
    folder: Path, tmp_path: Path, method: str, freeze: list[str], sharding: dict[str, int] | None
) -> None:
    # One dialogue with an image and one without: in every step each process has one of them.
    data = str(pictures.write_dialogues(tmp_path / "pair", 2))
    chosen = METHODS[method] | ({"dropout": 0.0} if method == "lora" else {})
    changes = {
        "model__freeze": freeze, "training__max_steps": 3, "training__learning_rate": 1e-3,
        "data__train": data, "data__validation": data, **SMOOTH_STEPS,
    }  # fmt: skip
    alone = settings(folder, tmp_path / "one", chosen, **changes, training__batch_size=2)
    one = runs.run_here(alone)
    shared = settings(folder, tmp_path / "two", chosen, **changes, training__batch_size=1)
    if sharding:
        shared["deepspeed"] = sharding
    two = runs.run_command(shared, tmp_path, processes=2)
    assert two.returncode == 0, two.stderr[-2000:]
    assert_trained_alike(tmp_path / "two", tmp_path / "one")
    said = [(tmp_path / run / "predictions-3.jsonl").read_text() for run in ("two", "one")]
    assert said[0] == said[1]
    assert one["steps"] == 3


def test_features_kept_on_disk_train_as_the_tower_does_which_then_rests(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = VisionModel.forward
    monkeypatch.setattr(
        VisionModel, "forward", lambda self, x: (seen.append(len(x)), forward(self, x))[1]
    )
    calls = []
    for name in ("tower", "first", "kept"):
        made = settings(
            folder, tmp_path / name, METHODS["lora"] | {"dropout": 0.0},
            data__cache_image_features=name != "tower", data__cache_dir=str(tmp_path / "cache"),
            data__loader_workers=int(name == "kept"), training__max_steps=6,
            evaluation__generate=False, data__validation=None, **SMOOTH_STEPS,
        )  # fmt: skip
        runs.run_here(made)
        calls.append(sum(seen))
        seen.clear()
    assert calls == [6, 3, 0]  # for every example; once for each picture; never again
    assert runs.adapter_hash(tmp_path / "kept", 6) == runs.adapter_hash(tmp_path / "first", 6)
    assert_trained_alike(tmp_path / "first", tmp_path / "tower")


def test_features_are_computed_again_for_another_picture_or_a_broken_file(
    folder: Path, tmp_path: Path
) -> None:
    rows = pictures.write_dialogues(tmp_path / "own", 3)
    made = settings(
        folder, tmp_path / "run", METHODS["lora"], data__train=str(rows), data__validation=None,
        data__cache_image_features=True, data__cache_dir=str(tmp_path / "cache"),
        training__max_steps=1,
    )  # fmt: skip
    runs.run_here(made)
    files = sorted((tmp_path / "cache/features").rglob("*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-8])
    Image.new("RGB", (9, 9), "pink").save(tmp_path / "own/images/red.png")
    runs.run_here(made | {"training": made["training"] | {"output_dir": str(tmp_path / "next")}})
    files = sorted((tmp_path / "cache/features").rglob("*.safetensors"))
    assert len(files) == 3
    assert all(load_file(file)["rows"].shape == (6, 32) for file in files[1:])


def test_features_of_a_tower_that_learns_are_not_kept(folder: Path, tmp_path: Path) -> None:
    made = settings(
        folder, tmp_path / "run", METHODS["full"], model__freeze=[],
        data__cache_image_features=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"the tower is trained.*model.freeze: \[vision\]"):
        runs.run_here(made)
