"""The options of the `data` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.forgetting import ReplaySection
from finetune.config.row_formats import RowFormat
from finetune.config.section import NonNegative, Positive, Section, Share


class Source(Section):
    """One training or validation source."""

    path: str
    """A file, a glob or a folder; relative to the working directory."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often its rows are seen per epoch: 2.0 twice, 0.5 a seeded half of them."""

    format: RowFormat = "auto"
    """The layout of its rows; `auto` detects it per file."""

    columns: dict[str, str] = {}
    """Other names that its columns have, ours first: `{instruction: question, output: answer}`."""

    max_rows: Positive | None = None
    """At most this many of its dialogues, the first ones."""


class Columns(Section):
    """Column names of prompt/response rows when they are not the usual ones."""

    prompt: str
    """The column with the user's text."""

    response: str
    """The column with the reply."""


class DataSection(Section):
    """Where dialogues come from and how they become examples."""

    train: str | list[str | Source]
    """Training files: a path, a glob, a folder, a data set of a hub (`hf://owner/name`, `ms://owner/name`, with `@revision` and `/files` behind it), or a list of these or of `{path, weight, format}`."""

    replay: ReplaySection | None = None
    """Mix in replies of the untuned model to general prompts, generated once before the first step and kept in the cache; `{}` takes the defaults."""

    validation: str | list[str | Source] | None = None
    """Held-out files, for the validation loss and for generation; same forms as `train`. Or a share such as `5%` that is held out of `train`, whole groups at a time."""

    streaming: bool = False
    """Training rows are read and tokenised while the model trains, shard by shard, and are nowhere kept: for sets larger than the disk. Needs `training.max_steps`; held-out files are prepared as ever."""

    shuffle_buffer: Positive = 10_000
    """With `streaming`: rows that are shuffled together, and held in memory (at most about 32 million characters of text)."""

    group_by: str | None = None
    """With a share for `validation`: the column whose value makes a group, such as a customer or a document. By default dialogues that ask the same are a group."""

    stop: Literal["first", "all"] | None = None
    """With it the sources' weights are shares of the mixture: an epoch ends when the `first` source is used up, or when `all` are, the smaller ones repeated. By default a weight says how often rows are seen per epoch."""

    temperature: Annotated[float, Field(ge=1)] | None = None
    """With `stop`: shares follow the sources' sizes to the power of 1 / temperature, times their weights; 1 mixes by size, more evens them out."""

    deduplicate: Literal["exact", "near"] | None = None
    """Training examples that repeat an earlier or a held-out one are left out: those with the same tokens, or also `near` ones (MinHash over runs of five tokens, 80 % alike; needs the extra `near`)."""

    format: RowFormat = "auto"
    """The layout of the rows of every source that does not say its own."""

    columns: Columns | None = None
    """Column names for `format: pairs` when they are not prompt/response, content/summary or the like."""

    ignore_columns: list[str] = []
    """Columns, and keys of messages, that are meant to stay unread; text in any other one that is not read is counted and named."""

    turns: Literal["strict", "merge"] = "strict"
    """`strict` refuses two messages of one side in a row, a reply that opens the dialogue, and a system message in the middle; `merge` joins and takes them."""

    calls_in_text: Literal["text", "read", "error"] = "text"
    """Tool calls that are written into a reply's text (`<tool_call>`, `name` and a JSON object, ReAct, `[f(x=1)]`): trained as text and counted, read as calls, or refused."""

    reasoning: Literal["keep", "drop", "require"] = "keep"
    """Reasoning of replies, in a key of its own or as `<think>…</think>`: trained, left out, or required of every reply."""

    max_length: Positive = 2048
    """Longest example in tokens, stop tokens included."""

    train_on: Literal["every_reply", "last_reply"] = "every_reply"
    """Which replies carry loss; a message's own `train` wins over it."""

    on_too_long: Literal["drop_oldest_turns", "drop", "error"] = "drop_oldest_turns"
    """What happens to a dialogue over `max_length`: nothing is ever cut inside a message."""

    on_bad_row: Literal["error", "skip"] = "error"
    """`error` lists every bad row and stops; `skip` leaves them out, counted and named."""

    max_bad_rows: Share = 0.01
    """With `on_bad_row: skip`, the share of bad rows above which the run stops all the same."""

    max_overlap: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """The share of held-out dialogues that may be in the training data too; above it the run stops. By default they are only counted and named."""

    image_root: str | None = None
    """The folder that image paths are relative to and stay under; by default that of each data file."""

    cache_image_features: bool = False
    """What a frozen vision tower makes of each training image is kept under `cache_dir` (13 MB an image for GLM-4V-9B) and computed only once."""

    packing: bool = False
    """Several dialogues share a row of `max_length` tokens, blind to each other."""

    group_by_length: bool = True
    """Batches of similar length: less padding, same examples per epoch. Without effect when packing."""

    loader_workers: NonNegative = 0
    """Processes that load batches ahead of the trainer."""

    cache_dir: str | None = None
    """Where tokenised data is kept; by default `$FINETUNE_CACHE` or `~/.cache/glm4-finetune`."""


def held_out_share(validation: str | list[str | Source] | None) -> float | None:
    """0.05 for `5%`; None for files."""
    if not isinstance(validation, str) or not validation.endswith("%"):
        return None
    try:
        share = float(validation[:-1]) / 100
    except ValueError:
        return None
    return share if 0 < share < 1 else None
