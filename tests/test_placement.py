"""A model whose layers lie apart, or in 4 bits, answers in every command that opens one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import command_line
import pytest
import runs
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook

from finetune.errors import ConfigError
from finetune.export import parity
from finetune.generation.load import Models, open_model
from finetune.generation.settings import Placement
from finetune.models.load import load_model

FAMILIES = ("chatglm", "glm", "glm4")
QUESTION = '{"messages": [{"role": "user", "content": "the quick fox"}]}\n'


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths 64 divides, as 4 bits need it on a CPU."""
    import tiny

    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    return tiny.save_model(tmp_path_factory.mktemp("wide") / "model", "glm", **sizes)


def replies(model: Any, template: Any, ids: list[list[int]]) -> list[tuple[int, ...]]:
    from finetune.generation.generate import generate

    found = generate(model, template, ids, max_new_tokens=6, batch_size=2)
    return [reply.ids for reply in found]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_fetched_one_by_one_give_the_same_replies_and_loss(
    family: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"tiny_{family}")
    opened = open_model(folder)
    ids = torch.randint(10, 300, (2, 12), generator=torch.Generator().manual_seed(3))
    prompts = [row.tolist()[:n] for row, n in zip(ids.repeat(2, 1), (12, 9, 7, 5), strict=True)]
    with torch.no_grad():
        expected = opened.model(input_ids=ids, labels=ids).loss
        answers = replies(opened.model, opened.template, prompts)
        # As accelerate shares a model out: every module's inputs move to where its weights are.
        apart = load_model(folder)
        cpu_offload(apart, execution_device="cpu")
        assert any(isinstance(getattr(m, "_hf_hook", None), AlignDevicesHook) for m in apart.modules())  # fmt: skip
        assert apart(input_ids=ids, labels=ids).loss == expected
    assert any(w.is_meta for w in apart.parameters())
    model = load_model(folder, device_map="auto")
    assert replies(model, opened.template, prompts) == answers


def test_a_model_over_all_accelerators_is_for_one_process(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="leave torchrun out"):
        Models(Placement(device_map="auto")).open(tiny_glm)


def test_the_commands_open_a_model_in_4_bits_and_shared_out(wide: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    data = tmp_path / "asked.jsonl"
    data.write_text(QUESTION, encoding="utf-8")
    answers = {}
    for options in ([], ["--quantization", "nf4", "--device-map", "auto"]):
        output = tmp_path / f"replies{len(options)}.jsonl"
        code = command_line.exit_code(
            "predict", str(wide), "--data", str(data), "--output", str(output),
            "--max-new-tokens", "4", *options,
        )  # fmt: skip
        assert code == 0
        answers[len(options)] = json.loads(output.read_text(encoding="utf-8"))
    assert answers[0].keys() == answers[4].keys()
    held = runs.write_dialogues(tmp_path / "held.jsonl", 3)
    losses = {}
    for name in ("plain", "nf4"):
        options = ["--quantization", "nf4"] if name == "nf4" else []
        code = command_line.exit_code(
            "evaluate", str(wide), "--data", str(held), "--no-generate",
            "--output", str(tmp_path / name), *options,
        )  # fmt: skip
        assert code == 0
        found = json.loads((tmp_path / name / "evaluation.json").read_text(encoding="utf-8"))
        losses[name] = json.dumps(found["models"] if "models" in found else found["targets"])
    assert losses["plain"] != losses["nf4"]  # neither is the other's, kept under one key


def test_an_adapter_is_opened_on_a_base_in_4_bits(wide: Path, tmp_path: Path) -> None:
    bits = pytest.importorskip("bitsandbytes")
    data = runs.write_dialogues(tmp_path / "train.jsonl", 4)
    runs.run_here(runs.config(wide, data, tmp_path / "run", training__max_steps=1))
    opened = Models(Placement(quantization="nf4")).open(tmp_path / "run/checkpoint-1")
    kinds = {type(module).__mro__[1] for module in opened.model.modules()}
    held = [w for w in opened.model.parameters() if isinstance(w, bits.nn.Params4bit)]
    assert held
    assert kinds
    assert replies(opened.model, opened.template, [[5, 6, 7]])


def test_the_full_check_of_a_merge_runs_shared_out(
    tiny_glm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def loading(folder: Path, **options: Any) -> Any:
        asked.append(options)
        return load_model(folder, **options)

    monkeypatch.setattr(parity, "load_model", loading)
    assert parity.check_parity(tiny_glm, [], tiny_glm, device_map="auto") == 0.0
    assert asked == [{"device_map": "auto"}] * 2
