"""One description per thing: a new score, method, family or row form is said in the fewest places.

Each test copies the package into an empty folder, adds a toy to the modules that it names and uses it
through the command line of the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pictures
import pytest
from rows import turns, write_rows

PACKAGE = Path(__file__).parents[1] / "finetune"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package in a folder of its own."""
    place = tmp_path / "copy"
    shutil.copytree(PACKAGE, place / "finetune", ignore=shutil.ignore_patterns("__pycache__"))
    return place


def edit(copy: Path, module: str, *changes: tuple[str, str]) -> None:
    """Replaces pieces of a module, each of which must be there."""
    file = copy / "finetune" / module
    text = file.read_text("utf-8")
    for before, after in changes:
        assert before in text, f"{module} holds no {before!r}"
        text = text.replace(before, after, 1)
    file.write_text(text, "utf-8")


def finetune(copy: Path, *words: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "finetune", *map(str, words)],
        cwd=copy, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(copy)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_a_score_is_one_entry_of_one_table(copy: Path) -> None:
    toy = """METRICS: tuple[Metric, ...] = (
    Metric("shouting", "share of replies that end so", better="lower", shown="headline",
           per_reply=lambda pair: 100.0 * pair.reply.endswith("!")),
"""
    edit(copy, "evaluation/scores/metrics.py", ("METRICS: tuple[Metric, ...] = (\n", toy))
    replies = [{"predict": "no!", "label": "no"}, {"predict": "yes", "label": "yes"}]
    calm = [{"predict": "no", "label": "no"}, {"predict": "yes", "label": "yes"}]
    for name, rows in (("loud", replies), ("calm", calm)):
        write_rows(copy / f"{name}.jsonl", rows)
    done = finetune(copy, "evaluate", "--predictions", "loud.jsonl", "--predictions", "calm.jsonl",
                    "--output", "out", "--json")  # fmt: skip
    report = json.loads(done.stdout)
    loud, _ = report["targets"]
    assert loud["scores"]["shouting"]["value"] == 50.0
    assert loud["scores"]["shouting"]["low"] is not None
    assert report["signatures"]["shouting"] == "share of replies that end so"
    assert "shouting" in {one["metric"] for one in report["comparisons"]}
    assert "calm has the lowest shouting" in done.stderr
    schema = json.loads(finetune(copy, "schema").stdout)
    names = schema["$defs"]["EvaluationSection"]["properties"]["best_metric"]["enum"]
    assert "shouting" in names


def test_a_row_form_is_a_name_and_one_entry_of_a_table(copy: Path) -> None:
    edit(copy, "config/row_formats.py", ('"auto",', '"auto", "shout",'))
    toy = """LAYOUTS: tuple[RowLayout, ...] = (
    RowLayout("shout", lambda row: "cry" in row, frozenset({"cry", "echo"}), lambda row: {"messages": [
        {"role": "user", "content": row["cry"]}, {"role": "assistant", "content": row["echo"]}]}),
"""
    edit(copy, "data/dialogue/formats.py", ("LAYOUTS: tuple[RowLayout, ...] = (\n", toy))
    write_rows(copy / "rows.jsonl", [{"cry": "hello", "echo": "HELLO"}])
    for words in ([], ["--format", "shout"]):
        done = finetune(copy, "data", "check", "rows.jsonl", *words, "--json")
        assert '"shout"' in done.stdout


def test_a_text_family_is_one_entry_of_one_table(copy: Path, tiny_glm: Path) -> None:
    toy = """

class ToyConfig(transformers.GlmConfig):
    model_type = "toy"


class ToyForCausalLM(GlmForCausalLM):
    config_class = ToyConfig


FAMILIES["toy"] = Family(
    "toy", "none", ToyConfig, ToyForCausalLM, **_split_layers("model")
)
"""
    families = copy / "finetune" / "models" / "families.py"
    families.write_text(families.read_text("utf-8") + toy, "utf-8")
    model = shutil.copytree(tiny_glm, copy / "toy")
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "toy"}), "utf-8")
    write_rows(copy / "rows.jsonl", [{"messages": turns("hello", "there")}])
    report = json.loads(
        finetune(copy, "evaluate", "toy", "--data", "rows.jsonl", "--max-new-tokens", "2", "--json").stdout
    )  # fmt: skip
    assert report["scores"]["loss"] > 0


METHOD = """

class IA3Method(MethodSection):
    \"\"\"Learned scales of keys, values and inner activations.\"\"\"

    kind: Literal["ia3"] = "ia3"


Method = Annotated[LoraMethod | PTuningV2Method | FullMethod | IA3Method, Field(discriminator="kind")]
"""
CODE = """
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def attach(model, section, **_):
    targets = r"model\\.layers\\.\\d+\\.self_attn\\.(k_proj|v_proj)"
    return get_peft_model(model, IA3Config(target_modules=targets, feedforward_modules=[], task_type="CAUSAL_LM"))


def is_attached(model):
    return isinstance(model, PeftModel) and model.peft_config["default"].peft_type == "IA3"


def matched_modules(model):
    return {"scales": sum("ia3_l" in name for name, _ in model.named_parameters())}


def save(model, folder, *, base, state_dict):
    state = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS, {"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base.path, True
    config.save_pretrained(folder)
    base.write(folder, method="ia3")


def restore(model, folder):
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))


def load_adapter(model, folder):
    return PeftModel.from_pretrained(model, folder).eval()


def detach(model):
    return model.unload()
"""


def test_a_method_is_a_section_a_record_and_a_module(copy: Path, tiny_glm: Path) -> None:
    edit(copy, "config/schema.py", ("\nMethod = Annotated[LoraMethod | PTuningV2Method | FullMethod, Field(discriminator=\"kind\")]\n", METHOD))  # fmt: skip
    edit(copy, "methods/__init__.py", ("    for method in (\n", '    for method in (\n        Method("ia3", "adapter", peft_type="IA3"),\n'))  # fmt: skip
    (copy / "finetune" / "methods" / "ia3.py").write_text(CODE, "utf-8")
    write_rows(copy / "rows.jsonl", [{"messages": turns("hello", "there")}] * 4)
    (copy / "run.yaml").write_text(
        f"model: {{path: {tiny_glm}, dtype: float32}}\n"
        "data: {train: rows.jsonl, validation: rows.jsonl}\n"
        "method: {kind: ia3}\ntraining: {output_dir: run, max_steps: 2, report_to: []}\n"
        "evaluation: {generate: false}\n"
    )
    finetune(copy, "train", "run.yaml")
    report = json.loads(finetune(copy, "evaluate", "run", "--no-generate", "--json").stdout)
    [target] = report["targets"]
    assert (target["kind"], target["step"]) == ("adapter", 2)
    assert report["scores"]["loss"] > 0


def test_a_family_with_images_is_two_entries(copy: Path) -> None:
    toy = """

class ToyConfig(ChatGLMConfig):
    model_type = "toyv"


class ToyModel(ChatGLMForConditionalGeneration):
    config_class = ToyConfig


FAMILIES["toyv"] = replace(
    FAMILIES["chatglm"], model_type="toyv", config_class=ToyConfig, model_class=ToyModel
)
"""
    families = copy / "finetune" / "models" / "families.py"
    text = families.read_text("utf-8").replace("import dataclass", "import dataclass, replace")
    families.write_text(text + toy, "utf-8")
    edit(copy, "data/chat/tokenizer.py", ('    "chatglm": lambda', '    "toyv": lambda _, config: image_spec(config),\n    "chatglm": lambda'))  # fmt: skip
    model = pictures.save_model(copy / "toy")
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "toyv"}), "utf-8")
    data = pictures.write_dialogues(copy / "data", 2, every=1)
    done = finetune(copy, "evaluate", "toy", "--data", data, "--no-generate", "--json")
    assert json.loads(done.stdout)["scores"]["loss"] > 0
    rows = finetune(copy, "data", "tokens", data, "--model", "toy").stdout.splitlines()
    assert max(len(json.loads(row)["input_ids"]) for row in rows) > 10
