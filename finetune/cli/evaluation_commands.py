"""`finetune evaluate`: models on held-out dialogues, scored and compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finetune import console
from finetune.artifacts.resolve import models_in
from finetune.cli.data_commands import Columns, ImageRoot, Json, Rows
from finetune.cli.inference_commands import JsonSchema, Quantization, RequireCall
from finetune.cli.inputs import DeviceMap, Overwrite
from finetune.cli.report_commands import say_report, say_votes, until_over
from finetune.config.row_formats import RowFormat
from finetune.errors import ConfigError

if TYPE_CHECKING:
    from finetune.report.requirements import Requirement

evaluation_app = typer.Typer(rich_markup_mode=None)

Replies = Literal["every_reply", "last_reply"]
Definition = Literal["default", "demo", "llamafactory"]


@evaluation_app.command()
def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            help="Runs (all their checkpoints), checkpoints, adapters, merged or base models."
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Held-out file, glob or folder; repeatable. By default those of the run.",
        ),
    ] = None,
    include_base: Annotated[
        bool, typer.Option("--include-base", help="Also evaluate the base model.")
    ] = False,
    predictions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Replies made elsewhere, scored as they are; repeatable."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="For evaluation.json and predictions/; by default beside the target.",
        ),
    ] = None,
    replies: Annotated[
        Replies | None, typer.Option(help="Which replies of a dialogue to generate.")
    ] = None,
    generate: Annotated[
        bool | None,
        typer.Option("--generate/--no-generate", help="Ask for replies, or only for the loss."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Longest reply in tokens.")
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="At most N replies, the same ones each time."),
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(metavar="N", help="Prompts generated at once, or `auto`.")
    ] = None,
    backend: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="What generates the replies; vllm in an environment of its own."),
    ] = "transformers",
    endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="openai:MODEL@URL",
            help="A server of OpenAI's API that has the one model named and replies for it.",
        ),
    ] = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    definition: Annotated[
        Definition, typer.Option(help="How BLEU and ROUGE are computed; docs/metrics.md.")
    ] = "default",
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your own metric: texts of reply and reference -> a number; repeatable.",
        ),
    ] = None,
    regression_data: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="A general set; its loss tells what was forgotten."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Tasks of lm-evaluation-harness, or glm4-base, glm4-chat, multilingual, "
            "calls:FOLDER, writing:LENGTHS; docs/evaluation.md.",
        ),
    ] = None,
    needle: Annotated[
        str | None,
        typer.Option(
            metavar="LENGTHS", help="Hide a sentence in texts of these lengths, such as 4k..128k."
        ),
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where data sets of tasks lie, as OWNER/NAME."),
    ] = None,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0, help="Above 0 tokens are drawn, with --seed.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Sampling seed.")] = 0,
    columns: Columns = None,
    format: Annotated[
        RowFormat | None,
        typer.Option(metavar="NAME", help="The layout of the rows; by default the run's."),
    ] = None,
    image_root: ImageRoot = None,
    rows: Rows = None,
    json_schema: JsonSchema = None,
    require_call: RequireCall = False,
    check_schema: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Count the replies that are JSON under this schema."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="openai:MODEL@URL",
            help="A model that says which of two replies is better; docs/metrics.md.",
        ),
    ] = None,
    bert_score: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="An encoder that tells how alike reply and reference are."
        ),
    ] = None,
    votes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Score votes that `serve --page` saved, and nothing else; repeatable.",
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Such as `rouge-l >= 45` or `not worse than base on rouge-l`; repeatable. Exit "
            "code 8 when one is not met.",
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="Again for every new checkpoint of the runs named, until they are over."
        ),
    ] = False,
    old_base: Annotated[bool, typer.Option("--base", hidden=True)] = False,
    old_general: Annotated[list[str] | None, typer.Option("--general", hidden=True)] = None,
    old_unit: Annotated[str | None, typer.Option("--bleu-unit", hidden=True)] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Score models on held-out dialogues and compare them.

    What is not said here is as in the run that saved the (first) model, so that the numbers are
    those of its training. What was generated before is not generated again.
    """
    changes = {
        "generate": generate,
        "replies": replies,
        "max_new_tokens": max_new_tokens,
        "max_samples": max_samples,
        "batch_size": _batch_size(batch_size),
        "columns": columns,
        "format": format,
        "image_root": image_root,
        "options": rows,
    }
    with console.json_output(as_json) as emit:
        if votes:
            emit(say_votes(votes, targets, data, predictions))
            return
        from finetune.report.requirements import check_names, read_requirements

        requirements = read_requirements(require or ())
        definition = _renamed(definition, old_base, old_general, old_unit)
        from finetune.evaluation.evaluate import BackendChoice, Options
        from finetune.evaluation.evaluate import evaluate as run
        from finetune.evaluation.scores.added import ByModels
        from finetune.evaluation.scoring import Scoring
        from finetune.generation.settings import Placement
        from finetune.generation.structured import read_form, read_schema

        form = read_form(json_schema, must_call=require_call)
        schema = read_schema(check_schema, "--check-schema") if check_schema else form.schema
        options = Options(
            with_base=include_base or old_base,
            predictions=tuple(predictions or ()),
            scoring=Scoring(definition, tuple(metric or ()), schema),
            by_models=ByModels(judge or "", bert_score or ""),
            general=(*(regression_data or ()), *(old_general or ())),
            tasks=(*(tasks or ()), *([f"needle:{needle}"] if needle else [])),
            tasks_data=str(tasks_data) if tasks_data else None,
            temperature=temperature,
            seed=seed,
            form=form,
            overwrite=overwrite,
            placement=Placement(device_map, quantization),
            by=BackendChoice(backend, endpoint or ""),
        )

        if not options.tasks:
            check_names(requirements, options.scoring.names)

        def evaluated(models: list[str]) -> dict[str, Any]:
            made = run(models, data or (), output=output, changes=changes, options=options)
            if console.is_rank0():
                say_report(Path(made["output"]))
            return made

        if watch:
            found = until_over(targets or (), evaluated)
        else:
            found = evaluated(models_in(targets or ()))
        emit(found)
        if requirements and console.is_rank0():
            _check_requirements(Path(found["output"]), requirements)


def _batch_size(text: str | None) -> int | str | None:
    """The number, `auto`, or None where nothing is said."""
    if text in (None, "auto"):
        return text
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"--batch-size must be a whole number above 0, or auto; got {text!r}")
    return int(text)


def _check_requirements(folder: Path, requirements: Sequence[Requirement]) -> None:
    from finetune.evaluation.schema import read_evaluation
    from finetune.report.requirements import check_requirements

    for line in check_requirements(read_evaluation(folder), requirements):
        console.say(line)


def _renamed(
    definition: Definition, base: bool, general: Sequence[str] | None, unit: str | None
) -> Definition:
    """The definition that is meant, with a word about every option that goes by another name now."""
    if base:
        console.warn("--base is now --include-base")
    if general:
        console.warn("--general is now --regression-data")
    if unit is None:
        return definition
    console.warn("--bleu-unit is now --definition: `character` is llamafactory, `word` is demo")
    if unit not in ("word", "character"):
        raise ConfigError(f"--bleu-unit: must be word or character, got {unit!r}")
    return "llamafactory" if unit == "character" else "demo"
