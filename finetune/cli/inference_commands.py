"""`finetune predict | chat | serve`: a model at work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune import console
from finetune.artifacts.resolve import model_in
from finetune.cli.data_commands import Columns, Format, ImageRoot, Json, Rows
from finetune.cli.export_commands import Base
from finetune.cli.inputs import DeviceMap, Overwrite, check_output_file
from finetune.errors import ConfigError

using_app = typer.Typer()

Target = Annotated[
    str,
    typer.Argument(help="A run, a checkpoint, an adapter, a merged model, or a base model."),
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", min=1, help="Prompts generated at once, per process.")
]
JsonSchema = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Every reply is JSON under the schema in this file."),
]
Quantization = Annotated[
    Literal["nf4"] | None,
    typer.Option("--quantization", help="nf4: weights in 4 bits, a quarter of the memory."),
]
RequireCall = Annotated[
    bool, typer.Option("--require-call", help="A dialogue with tools is answered with a call.")
]
More = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=TARGET]...", help="Further models, and what clients call them."),
]
SaveTo = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Where the page saves votes (votes.jsonl) and dialogues as training rows (rows.jsonl).",
    ),
]
Temperature = Annotated[
    float, typer.Option(metavar="X", min=0, help="0 always takes the likeliest token.")
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0,
        max=1,
        help="Draw from the likeliest tokens of this probability together.",
    ),
]
TopK = Annotated[
    int, typer.Option(metavar="N", min=0, help="Draw from so many of the likeliest tokens; 0: all.")
]
MinP = Annotated[
    float,
    typer.Option(
        metavar="X",
        min=0,
        max=1,
        help="Draw tokens that have this part of the likeliest one's probability.",
    ),
]
PresencePenalty = Annotated[
    float,
    typer.Option(metavar="X", min=-2, max=2, help="Taken off tokens that stand in the reply."),
]
FrequencyPenalty = Annotated[
    float,
    typer.Option(
        metavar="X",
        min=-2,
        max=2,
        help="Taken off tokens for each time that they stand in the reply.",
    ),
]
RepetitionPenalty = Annotated[
    float, typer.Option(metavar="X", help="Above 1: tokens of prompt and reply come less often.")
]
CHAT_TOP_P = 0.8
"""Nucleus of sampling, as in the generation_config.json of glm-4-9b-chat."""
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest reply in tokens.")]


@using_app.command()
def predict(
    target: Target,
    data: Annotated[
        list[str], typer.Option(metavar="FILE", help="File, glob or folder; repeatable.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The JSONL file to write.")],
    base: Base = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    max_new_tokens: MaxNewTokens = 512,
    batch_size: BatchSize = 64,
    backend: Annotated[
        Literal["transformers", "vllm"],
        typer.Option(help="Who generates; vllm has an environment of its own."),
    ] = "transformers",
    columns: Columns = None,
    format: Format = "auto",
    image_root: ImageRoot = None,
    rows: Rows = None,
    json_schema: JsonSchema = None,
    require_call: RequireCall = False,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of drawn tokens.")] = 0,
    num_replies: Annotated[
        int, typer.Option(metavar="N", min=1, help="Replies to each dialogue, drawn one by one.")
    ] = 1,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write replies to the dialogues of a file.

    The same command again goes on where a killed one stopped.
    """
    with console.json_output(as_json) as emit:
        check_output_file(output)
        target = model_in(target)
        from finetune.generation.dialogues import RowOptions
        from finetune.generation.predict import PredictOptions
        from finetune.generation.predict import predict as run
        from finetune.generation.settings import Placement, Sampling
        from finetune.generation.structured import read_form

        options = PredictOptions(
            max_new_tokens,
            batch_size,
            backend,
            RowOptions(columns, format, image_root, tuple(rows or ())),
            form=read_form(json_schema, must_call=require_call),
            placement=Placement(device_map, quantization),
            sampling=Sampling(
                temperature,
                1.0 if top_p is None else top_p,
                top_k,
                min_p,
                presence_penalty,
                frequency_penalty,
                repetition_penalty,
            ),
            seed=seed,
            num_replies=num_replies,
        )
        emit(run(target, data, output, base=base, options=options, overwrite=overwrite))


@using_app.command()
def replay(
    model: Annotated[str, typer.Argument(help="The untuned model that a run starts from.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the replies to this file.")
    ] = None,
    prompts: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Your prompts in place of ours; repeatable."),
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Let a model answer the prompts of data.replay.

    Training does it by itself and then finds the replies in the cache.
    """
    with console.json_output(as_json) as emit:
        if output is not None:
            check_output_file(output)
        from finetune.config.forgetting import ReplaySection
        from finetune.generation.replay import check_replay_output, replay_of, write_replay

        section = ReplaySection(prompts=prompts, max_new_tokens=max_new_tokens)
        if output is not None:
            check_replay_output(section, model, output, overwrite=overwrite)
        files = replay_of(section, model, None)
        console.say(
            f"{files.replies} replies, {files.cut} left out that did not end: {files.train.parent}"
        )
        if output is not None:
            write_replay(files, output)
        emit(
            {
                "train": str(files.train),
                "held_out": str(files.held_out),
                "replies": files.replies,
                "cut": files.cut,
            }
        )


@using_app.command()
def chat(
    target: Target,
    more: More = None,
    base: Base = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="The system message.")] = None,
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = 0,
    min_p: MinP = 0.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of drawn tokens; by default others each time.")
    ] = None,
    web: Annotated[
        bool,
        typer.Option("--web", help="In a browser, several models side by side, on a free port."),
    ] = False,
    save_to: SaveTo = None,
) -> None:
    """Talk to models in the terminal, or in a browser.

    With a temperature --top-p is 0.8, unless you say otherwise.
    """
    from finetune.generation.settings import Placement, Sampling

    if top_p is None:
        top_p = CHAT_TOP_P if temperature else 1.0
    how = Sampling(
        temperature,
        top_p,
        top_k,
        min_p,
        presence_penalty,
        frequency_penalty,
        repetition_penalty,
    )
    if web:
        from finetune.serving.page.html import PageOptions
        from finetune.serving.serve import ServeOptions
        from finetune.serving.serve import serve as run_page

        targets = _by_name(target, None, more or ())
        sampling = {"max_tokens": max_new_tokens, **how.by_request_field}
        sampling |= {} if seed is None else {"seed": seed}
        page = PageOptions(save_to, system or "", sampling)
        placement = Placement(device_map, quantization)
        run_page(targets, base=base, options=ServeOptions(port=0, page=page, placement=placement))
        return
    if more or save_to is not None:
        raise ConfigError("further models and --save-to are for the page: add --web")
    target = model_in(target)
    from finetune.chat.terminal import chat as run

    run(
        target,
        base=base,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=how,
        seed=seed,
        placement=Placement(device_map, quantization),
    )


@using_app.command()
def serve(
    target: Target,
    more: More = None,
    base: Base = None,
    device_map: DeviceMap = None,
    quantization: Quantization = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but this machine's own needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None,
        typer.Option(help="The first model's id for clients; by default its folder's name."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the API key; else FINETUNE_API_KEY."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A further Host name of requests; repeatable."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Longest reply where a request names none.")
    ] = 1024,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Bound on prompt and reply; at most the model's."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests answered at once.")
    ] = 8,
    max_requests: Annotated[
        int, typer.Option(metavar="N", min=1, help="Requests taken, waiting ones included.")
    ] = 64,
    max_request_mb: Annotated[
        int, typer.Option(metavar="N", min=1, help="Largest request in MiB.")
    ] = 16,
    history: Annotated[
        Literal["lenient", "strict"],
        typer.Option(help="strict refuses dialogues that training data could not hold."),
    ] = "lenient",
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse fields that nobody knows.")
    ] = False,
    watch: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="RUN",
            help="A run that is training: its newest checkpoint is served by its name; repeatable.",
        ),
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Also serve a page to try the models side by side.")
    ] = False,
    save_to: SaveTo = None,
) -> None:
    """Answer OpenAI's completions over HTTP."""
    targets = _by_name(target, name, more or ())
    if save_to is not None and not page:
        raise ConfigError("--save-to is for the page: add --page")
    from finetune.generation.settings import Placement
    from finetune.serving.page.html import PageOptions
    from finetune.serving.serve import ServeOptions
    from finetune.serving.serve import serve as run

    options = ServeOptions(
        host=host,
        port=port,
        api_key_file=api_key_file,
        allow_hosts=tuple(allow_host or ()),
        max_new_tokens=max_new_tokens,
        context=context,
        batch_size=batch_size,
        max_requests=max_requests,
        max_request_mb=max_request_mb,
        history=history,
        strict=strict,
        placement=Placement(device_map, quantization),
        watch=tuple(watch or ()),
        page=PageOptions(save_to) if page else None,
    )
    run(targets, base=base, options=options)


def _by_name(target: str, name: str | None, more: Sequence[str]) -> dict[str, str]:
    """Id -> model; ConfigError for a further one without a name, or two of one name."""
    found = {name or Path(target).name: model_in(target)}
    for text in more:
        own, sign, path = text.partition("=")
        if not sign or not own or not path:
            raise ConfigError(f"{text!r}: write a further model as NAME=TARGET")
        if own in found:
            raise ConfigError(
                f"{text!r}: another model is called {own!r}; choose another name, or rename the first with --name"
            )
        found[own] = model_in(path)
    return found
