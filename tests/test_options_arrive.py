"""Every option of every command arrives, under its own name, at the function that does the work.

Each command is started with all its options at values of their own; the function is replaced by one that
tells what it was given. So no option is lost, swapped with its neighbour, or always the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import CONFIG

from finetune.cli.commands import app
from finetune.language import language

ROWS = "--columns Q A --format messages --image-root pictures --rows turns=merge --rows text=t"
READ = {"columns": ("Q", "A"), "format": "messages", "image_root": "pictures"}
OPTIONS = READ | {"options": ["turns=merge", "text=t"]}
SAMPLING = "--temperature 0.5 --top-p 0.6 --top-k 7 --min-p 0.08 --presence-penalty 0.9 --frequency-penalty 1.1 --repetition-penalty 1.2"  # fmt: skip
SAMPLED = {
    "temperature": 0.5, "top_p": 0.6, "top_k": 7, "min_p": 0.08, "presence_penalty": 0.9,
    "frequency_penalty": 1.1, "repetition_penalty": 1.2,
}  # fmt: skip
PLACED = "--device-map auto --quantization nf4"
PLACEMENT = {"placement.device_map": "auto", "placement.quantization": "nf4"}


def under(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{name}.{key}": value for key, value in values.items()}


CASES: list[tuple[str, str, dict[str, Any]]] = [
    (
        f"predict model --data d1 --data d2 --output out.jsonl --base b {PLACED} --max-new-tokens 21 "
        f"--batch-size 22 --backend vllm {ROWS} --json-schema schema.json --require-call {SAMPLING} "
        "--seed 23 --num-replies 24 --overwrite",
        "finetune.generation.predict.predict",
        {"target": "model", "data": ["d1", "d2"], "output": "out.jsonl", "base": "b", "overwrite": True}
        | under("options", {"max_new_tokens": 21, "batch_size": 22, "backend": "vllm", "seed": 23, "num_replies": 24} | PLACEMENT)
        | under("options.sampling", SAMPLED)
        | under("options.rows", READ | {"rows": ("turns=merge", "text=t")})
        | {"options.form.schema": '{"type": "object"}', "options.form.must_call": True},
    ),
    (
        "replay model --output out.jsonl --prompts p1 --prompts p2 --max-new-tokens 21 --overwrite",
        "finetune.generation.replay.check_replay_output",
        {"section.prompts": ["p1", "p2"], "section.max_new_tokens": 21, "model": "model", "output": "out.jsonl", "overwrite": True},
    ),
    (
        f"chat model --base b {PLACED} --system be --max-new-tokens 21 {SAMPLING} --seed 0",
        "finetune.chat.terminal.chat",
        {"target": "model", "base": "b", "system": "be", "max_new_tokens": 21, "seed": 0} | PLACEMENT | under("sampling", SAMPLED),
    ),
    (
        f"chat model two=model --web --base b {PLACED} --system be --max-new-tokens 21 {SAMPLING} --seed 0 --save-to kept",
        "finetune.serving.serve.serve",
        {"targets": {"model": "model", "two": "model"}, "base": "b", "options.port": 0, "options.page.folder": "kept", "options.page.system": "be", "options.host": "127.0.0.1"}
        | under("options", PLACEMENT) | under("options.page.sampling", SAMPLED | {"max_tokens": 21, "seed": 0}),
    ),
    (
        f"serve model two=model --base b {PLACED} --host h --port 21 --name n --api-key-file k --allow-host a1 "
        "--allow-host a2 --max-new-tokens 22 --context 23 --batch-size 24 --max-requests 25 --max-request-mb 26 "
        "--history strict --strict --watch w1 --watch w2 --page --save-to kept",
        "finetune.serving.serve.serve",
        {"targets": {"n": "model", "two": "model"}, "base": "b"}
        | under("options", {
            "host": "h", "port": 21, "api_key_file": "k", "allow_hosts": ("a1", "a2"), "max_new_tokens": 22,
            "context": 23, "batch_size": 24, "max_requests": 25, "max_request_mb": 26, "history": "strict",
            "strict": True, "watch": ("w1", "w2"), "page.folder": "kept", "page.system": ""} | PLACEMENT),
    ),
    (
        f"bench model --lengths 1k,2k --new-tokens 21 --base b {PLACED}",
        "finetune.evaluation.tasks.speed.bench",
        {"target": "model", "lengths": [1024, 2048], "new_tokens": 21, "base": "b"} | PLACEMENT,
    ),
    (
        f"data check f1 f2 --model m --max-length 21 {ROWS}",
        "finetune.data.preview.report.check",
        {"paths": ["f1", "f2"], "model": "m", "max_length": 21} | under("rows", OPTIONS),
    ),
    (
        f"data show f --model m --index 0 {ROWS}",
        "finetune.data.preview.report.show",
        {"path": "f", "model": "m", "index": 0, "line": None} | under("rows", OPTIONS),
    ),
    (
        f"data show f --model m --line 21 {ROWS}",
        "finetune.data.preview.report.show",
        {"index": None, "line": 21},
    ),
    (f"data tokens f --model m {ROWS}", "finetune.data.preview.report.tokens", {"path": "f", "model": "m"} | under("rows", OPTIONS)),
    (
        "data split f1 --output out --share 0.25 --group-by g --columns Q A --format messages --image-root pictures --rows turns=merge --overwrite",
        "finetune.data.reading.split.split",
        {"output": "out", "part.share": 0.25, "part.held_out": True, "part.group_by": "g", "overwrite": True, "reading.rules.turns": "merge", "reading.images.root": "pictures", "reading.columns": ("Q", "A")},
    ),
    (
        "data prepare run.yaml training.seed=21 --shard 2/3",
        "finetune.data.examples.ahead.prepare_ahead",
        {"seed": 21, "shard": "2/3", "section.train": "no-such-file.jsonl", "model.path": "some/model"},
    ),
    ("migrate old.yaml --output out.yaml --model m --data d", "finetune.config.migrate.migrate", {"path": "old.yaml", "model": "m", "data": "d"}),
    (
        "plan run.yaml training.seed=21 --gpu 24GB --gpus 2 --peak 100 --share 0.3 --no-bf16",
        "finetune.cli.config_commands.planned",
        {"config.training.seed": 21}
        | under("gpu", {"bytes": 24_000_000_000, "number": 2, "peak_flops": 1e14, "share": 0.3, "native_bf16": False}),
    ),
    (
        "merge model:0.5 out --output out --base b --dtype float16 --force --check full --device-map auto",
        "finetune.export.merge.merge",
        {"adapter": [("model", 0.5), ("out", 1.0)], "out": "out", "base": "b", "dtype": "float16", "force": True, "check": "full", "device_map": "auto"},
    ),
    ("merge model --output out --no-check", "finetune.export.merge.merge", {"check": "none"}),
    (
        "export model --layout hf --output out --base b --new-base nb --check full",
        "finetune.export.convert.export",
        {"source": "model", "layout": "hf", "out": "out", "base": "b", "new_base": "nb", "check": "full"},
    ),
    ("export model --layout hf --output out --no-check", "finetune.export.convert.export", {"check": "none"}),
    (
        "push model --repo me/x --yes --public --base o/b",
        "finetune.export.push.push",
        {"source": "model", "repo": "me/x", "send": True, "public": True, "base": "o/b"},
    ),
    ("push model --repo me/x", "finetune.export.push.push", {"send": False, "public": False, "base": None}),
    ("report model --format csv --language zh", "finetune.evaluation.schema.read_evaluation", {"folder": "model", "language": "zh"}),
    ("runs model", "finetune.report.runs.find_runs", {"folder": "model"}),
    ("status model", "finetune.report.status.read_status", {"folder": "model"}),
    ("board model --port 21 --every 22", "finetune.report.board.serve", {"folder": "model", "port": 21, "every": 22.0}),
    ("board model --output run.yaml --overwrite", "finetune.report.board.write", {"folder": "model", "output": "run.yaml"}),
    ("compare model --output out --overwrite", "finetune.report.compare.compare", {"output": "out", "overwrite": True}),
    (
        f"evaluate model some/model --data d1 --data d2 --include-base --predictions p --output out --replies last_reply --no-generate "
        "--max-new-tokens 21 --max-samples 22 --batch-size 23 --backend vllm --endpoint openai:m@http://x/v1 "
        f"{PLACED} --definition demo --metric m:f --regression-data r --tasks t1 --needle 4k --tasks-data td "
        f"--temperature 0.5 --seed 24 {ROWS} --json-schema schema.json --require-call --check-schema other.json "
        "--judge j --bert-score s --overwrite",
        "finetune.evaluation.evaluate.evaluate",
        {"targets": ["model", "some/model"], "data": ["d1", "d2"], "output": "out"}
        | under("changes", {"generate": False, "replies": "last_reply", "max_new_tokens": 21, "max_samples": 22, "batch_size": 23} | OPTIONS)
        | under("options", {
            "with_base": True, "predictions": ("p",), "scoring.definition": "demo", "scoring.own": ("m:f",),
            "scoring.schema": '{"type": "array"}', "by_models.judge": "j", "by_models.bert_score": "s",
            "general": ("r",), "tasks": ("t1", "needle:4k"), "tasks_data": "td", "temperature": 0.5, "seed": 24,
            "form.schema": '{"type": "object"}', "form.must_call": True, "overwrite": True,
            "by.backend": "vllm", "by.endpoint": "openai:m@http://x/v1"} | PLACEMENT),
    ),
    (
        "evaluate model --generate --batch-size auto --json-schema schema.json",
        "finetune.evaluation.evaluate.evaluate",
        {"changes.generate": True, "changes.batch_size": "auto", "options.scoring.schema": '{"type": "object"}', "options.with_base": False},
    ),
    ("evaluate model --watch", "finetune.report.watching.until_over", {"runs": ["model"]}),
    ("evaluate --votes v1 --votes v2", "finetune.evaluation.scores.votes.score_votes", {"paths": ["v1", "v2"]}),
    ("evaluate model --require rouge-l>=45", "finetune.report.requirements.read_requirements", {"texts": ["rouge-l>=45"]}),
    ("evaluate model --base --general r --bleu-unit word", "finetune.evaluation.evaluate.evaluate", {"options.with_base": True, "options.general": ("r",), "options.scoring.definition": "demo"}),
    ("evaluate model --bleu-unit character", "finetune.evaluation.evaluate.evaluate", {"options.scoring.definition": "llamafactory"}),
    (
        "init --data d --model m --gpus 2 --gpu 24GB --output out.yaml",
        "finetune.cli.init.draft",
        {"data": "d", "model": "m", "gpu.bytes": 24_000_000_000, "gpu.number": 2, "output": "out.yaml"},
    ),
    ("doctor --online", "finetune.cli.doctor.examine", {"hub": True}),
    ("launch -n 3 --nnodes=2 run.yaml a.b=1", "finetune.cli.launch.launch", {"processes": "3", "words": ["--nnodes=2", "run.yaml", "a.b=1"]}),
    ("train run.yaml training.seed=21 --dry-run --trust-checkpoint", "finetune.training.run.dry_run", {"config.training.seed": 21, "trust_checkpoint": True}),
    ("train run.yaml training.seed=21 --trust-checkpoint", "finetune.training.run.train", {"config.training.seed": 21, "trust_checkpoint": True}),
]  # fmt: skip
ELSEWHERE = {
    "train": {"show_config"}, "schema": {"markdown"}, "completion": {"shell"}, "help": {"topic"},
}  # fmt: skip
"""What is no argument of one function; tests of their own ask these."""


class ArrivedError(Exception):
    """The function was called."""


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what is read before the work begins."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(CONFIG)
    Path("schema.json").write_text('{"type": "object"}')
    Path("other.json").write_text('{"type": "array"}')
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    monkeypatch.setenv("FINETUNE_LANG", "en")
    monkeypatch.setattr("finetune.cli.commands.check_inputs", lambda loaded: None)
    monkeypatch.setattr("finetune.report.runs.read_run", lambda path: path)
    monkeypatch.setattr("finetune.report.terminal.show_differences", lambda found: None)
    return tmp_path


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value by its path; a path of the disk as text."""
    if dataclasses.is_dataclass(value):
        inner = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif hasattr(value, "model_dump"):
        inner = value.model_dump()
    elif isinstance(value, Mapping) and place != "targets":
        inner = dict(value)
    else:
        yield place, plain(value)
        return
    for name, one in inner.items():
        yield from flat(one, f"{place}.{name}" if place else name)


def plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(map(plain, value))
    return str(value) if isinstance(value, Path) else value


def arrived(words: str, function: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the function is given by a command."""
    module, _, name = function.rpartition(".")
    signature = inspect.signature(getattr(import_module(module), name))
    found: dict[str, Any] = {}

    def tell(*given: Any, **named: Any) -> None:
        bound = signature.bind(*given, **named)
        bound.apply_defaults()
        found.update(flat(bound.arguments), language=language())
        raise ArrivedError

    monkeypatch.setattr(function, tell)
    with pytest.raises(ArrivedError):
        typer.main.get_command(app).main(words.split(), standalone_mode=False)
    return found


@pytest.mark.parametrize(("words", "function", "expected"), CASES, ids=lambda v: str(v)[:30])
def test_what_is_said_on_the_command_line_arrives_under_its_name(
    words: str,
    function: str,
    expected: dict[str, Any],
    there: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = arrived(words, function, monkeypatch)
    assert {name: found.get(name, "nothing") for name in expected} == expected


def test_no_option_is_left_out_above() -> None:
    """Of every command all options are in one of its lines."""
    said: dict[str, set[str]] = {}
    for words, _, _ in CASES:
        command, rest = words.split()[0], words.split()[1:]
        command = f"data {rest.pop(0)}" if command == "data" else command
        said.setdefault(command, set()).update(rest)
    for name, command in commands():
        for parameter in command.params:
            if parameter.param_type_name != "option" or parameter.name in ELSEWHERE.get(
                name, set()
            ):
                continue
            if parameter.name in ("help", "as_json"):
                continue
            ways = {*parameter.opts, *parameter.secondary_opts}
            assert ways & said.get(name, set()), f"{name}: {parameter.opts}"


def commands() -> Iterator[tuple[str, Any]]:
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            yield from ((f"{name} {own}", one) for own, one in inner.items())


@pytest.mark.parametrize(("temperature", "top_p"), [("0", 1.0), ("0.5", 0.8)])
def test_a_chat_draws_from_the_nucleus_of_glm_4_only_where_it_draws(
    temperature: str, top_p: float, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = arrived(f"chat model --temperature {temperature}", "finetune.chat.terminal.chat", monkeypatch)  # fmt: skip
    assert found["sampling.top_p"] == top_p
    found = arrived(f"predict model --data d --output o --temperature {temperature}", "finetune.generation.predict.predict", monkeypatch)  # fmt: skip
    assert found["options.sampling.top_p"] == 1.0


OPENED = {
    "predict run --data d --output o": ("finetune.generation.predict.predict", "target", "run@7"),
    "chat run": ("finetune.chat.terminal.chat", "target", "run@7"),
    "chat run two=b --web": ("finetune.serving.serve.serve", "targets", {"run": "run@7", "two": "b@7"}),
    "serve run two=b": ("finetune.serving.serve.serve", "targets", {"run": "run@7", "two": "b@7"}),
    "bench run": ("finetune.evaluation.tasks.speed.bench", "target", "run@7"),
    "evaluate run b": ("finetune.evaluation.evaluate.evaluate", "targets", ["run@7", "b@7"]),
}  # fmt: skip


@pytest.mark.parametrize("words", OPENED)
def test_a_run_is_opened_as_its_checkpoint_by_every_command(
    words: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in ("inference", "bench"):
        monkeypatch.setattr(f"finetune.cli.{room}_commands.model_in", lambda run: f"{run}@7")
    monkeypatch.setattr("finetune.cli.evaluation_commands.models_in", lambda runs: [f"{run}@7" for run in runs])  # fmt: skip
    function, name, wanted = OPENED[words]
    assert arrived(words, function, monkeypatch)[name] == wanted


def test_a_page_is_served_where_it_is_asked_for(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(words: str) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            return arrived(words, "finetune.serving.serve.serve", patch)

    assert served("serve model")["options.page"] is None
    assert served("serve model --page")["options.page.folder"] is None
    web = served("chat model --web --temperature 0.5")
    assert (web["options.page.sampling.top_p"], web["options.page.system"]) == (0.8, "")
    assert "options.page.sampling.seed" not in web, "other replies each time"


COUNTS = (
    "batch-size", "context", "gpus", "line", "max-length", "max-new-tokens", "max-request-mb", "max-requests", "max-samples", "num-replies",
    "every", "peak",
)  # fmt: skip
BOUNDS: dict[str, tuple[float | None, float | None]] = {
    **{f"--{name}": (1, None) for name in COUNTS},
    **{f"--{name}": (0, None) for name in ("index", "top-k", "temperature")},
    **{f"--{name}": (0, 1) for name in ("min-p", "top-p")},
    **{f"--{name}": (-2, 2) for name in ("presence-penalty", "frequency-penalty")},
    "--new-tokens": (2, None), "--port": (0, 65535), "plan --share": (0.01, 1), "evaluate --seed": (0, None), "evaluate --batch-size": (None, None),
}  # fmt: skip
"""The least and the most that an option takes: of nothing there is nothing to do, a port has 16 bits."""


def test_a_number_out_of_its_bounds_is_refused_by_the_name_of_its_option() -> None:
    seen = set()
    for name, command in commands():
        for parameter in command.params:
            kind = re.sub(r"float\d+", "", str(parameter.type_descriptor.annotation))
            key = next((k for k in (f"{name} {parameter.opts[0]}", parameter.opts[0]) if k in BOUNDS), "")  # fmt: skip
            if "int" not in kind and "float" not in kind:
                continue
            least, most = BOUNDS.get(key, (None, None))
            seen.add(key)
            step = 1 if "int" in kind else 0.001
            tried = [(end, True) for end in (least, most) if end is not None]
            tried += [(least - step, False)] if least is not None else [(-7, True)]
            tried += [(most + step, False)] if most is not None else [(10**6, True)]
            for value, fine in tried:
                try:
                    command.make_context(name, [f"{parameter.opts[0]}={value}"])
                    said = ""
                except typer.BadParameter as error:
                    said = error.format_message()
                assert (parameter.opts[0] in said) is not fine, (name, parameter.opts, value, said)
    assert seen - {""} == BOUNDS.keys() - {"evaluate --batch-size"}
