"""The supervised-token loss against the full-logits one, and packing against separate rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from closeness import additions, assert_close, assert_same_gradients, rounding
from peft import LoraConfig, get_peft_model
from tiny import VOCAB_SIZE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from finetune.models import loss as loss_module
from finetune.models.load import load_model
from finetune.models.packed_attention import pieces

FAMILIES = ("chatglm", "glm", "glm4")
Open = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def open_model(request: pytest.FixtureRequest) -> Open:
    loaded: dict[tuple[str, str], PreTrainedModel] = {}

    def open_(family: str, attention: str = "sdpa") -> PreTrainedModel:
        key = family, attention
        if key not in loaded:
            folder = request.getfixturevalue(f"tiny_{family}")
            loaded[key] = load_model(folder, dtype="float32", attention=attention)
        return copy.deepcopy(loaded[key])

    return open_


@pytest.fixture(autouse=True)
def _seven_positions_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", 7 * VOCAB_SIZE)


def batch(supervised: float = 0.5) -> dict[str, Tensor]:
    """Three right-padded rows; about `supervised` of the real tokens carry loss."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 370, (3, 18), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 11:], mask[2, 15:] = 0, 0
    chosen = torch.rand(ids.shape, generator=generator) < supervised
    labels = ids.masked_fill(~chosen | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def full_loss(
    logits: Tensor, labels: Tensor, weights: Tensor | None = None, num_items: float | None = None
) -> Tensor:
    """The textbook form: all logits, shifted by one, weighted mean over what is not -100."""
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    share = (labels[:, 1:] != -100).float().flatten()
    if weights is not None:
        share = share * weights[:, 1:].flatten()
    return (losses * share).sum() / (share.sum() if num_items is None else num_items)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def sums(model: PreTrainedModel) -> int:
    """Additions from a token of these batches to the mean of the losses."""
    return additions(model.config, 18) + 3 * 18


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", ["frozen", "trainable"])
@pytest.mark.parametrize("family", FAMILIES)
def test_value_and_gradients_equal_the_full_logits_loss(
    open_model: Open, family: str, head: str, weighted: bool
) -> None:
    model, inputs = open_model(family), batch()
    model.get_output_embeddings().weight.requires_grad_(head == "trainable")
    weights = torch.rand(inputs["labels"].shape) * 2 if weighted else None
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = full_loss(logits, inputs["labels"], weights)
    full = gradients(model, expected)
    ours = model(**inputs, loss_weights=weights)
    assert "logits" not in ours
    assert_close(ours.loss, expected, sums(model))
    assert_same_gradients(gradients(model, ours.loss), full, sums(model))
    assert ("lm_head.weight" in full or "transformer.output_layer.weight" in full) == (
        head == "trainable"
    )


@pytest.mark.parametrize("positions", [1, 3, 9, 10, 11, 1000])
def test_chunk_borders_do_not_change_the_loss(
    open_model: Open, monkeypatch: pytest.MonkeyPatch, positions: int
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", positions * VOCAB_SIZE)
    model, inputs = open_model("chatglm"), batch()
    labels = torch.full_like(inputs["labels"], -100)
    labels[0, 3:13] = inputs["input_ids"][0, 3:13]  # ten supervised positions
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = full_loss(logits, labels)
    ours = model(inputs["input_ids"], inputs["attention_mask"], labels=labels).loss
    assert_close(ours, expected, sums(model))


def test_the_sum_is_divided_by_the_given_number_of_items(open_model: Open) -> None:
    model, inputs = open_model("glm"), batch()
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = full_loss(logits, inputs["labels"], num_items=100.0)
    for number in (100, 100.0, torch.tensor(100)):
        ours = model(**inputs, num_items_in_batch=number).loss
        assert_close(ours, expected, sums(model))


@pytest.mark.parametrize("num_items", [None, 0, 5, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_supervised_tokens_the_loss_is_zero_and_every_weight_has_a_gradient(
    open_model: Open, family: str, num_items: Any
) -> None:
    model, inputs = open_model(family), batch(supervised=0.0)
    loss = model(**inputs, num_items_in_batch=num_items).loss
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert all(not gradient.any() for gradient in found.values())


def mean_of_bfloat16(labels: Tensor, loss: Tensor) -> float:
    """Of logits that are rounded to bfloat16 once, each token's on its own: their mean is nearer."""
    return rounding(1, loss.item(), torch.bfloat16) / int((labels[:, 1:] != -100).sum()) ** 0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_weights_stay_close_to_the_full_logits_loss(open_model: Open, family: str) -> None:
    model, inputs = open_model(family).bfloat16(), batch()
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = full_loss(logits, inputs["labels"])
    full = gradients(model, expected)
    ours = model(**inputs).loss
    assert ours.dtype is torch.float32
    assert abs((ours - expected).item()) <= mean_of_bfloat16(inputs["labels"], expected)
    for name, gradient in gradients(model, ours).items():
        assert gradient.dtype is torch.bfloat16
        alike = F.cosine_similarity(gradient.flatten().float(), full[name].flatten().float(), dim=0)
        assert alike > 1 - rounding(1, 1.0, torch.bfloat16) ** 2, name


@pytest.mark.parametrize("head", ["frozen", "trainable"])
def test_under_autocast_gradients_keep_the_dtype_of_the_weights(
    open_model: Open, head: str
) -> None:
    model, inputs = open_model("glm"), batch()
    model.lm_head.weight.requires_grad_(head == "trainable")
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        expected = full_loss(logits, inputs["labels"])
        ours = model(**inputs).loss
    full, found = gradients(model, expected), gradients(model, ours)
    assert abs((ours - expected).item()) <= mean_of_bfloat16(inputs["labels"], expected)
    for name, gradient in found.items():
        assert gradient.dtype is torch.float32
        alike = F.cosine_similarity(gradient.flatten(), full[name].flatten(), dim=0)
        assert alike > 1 - rounding(1, 1.0, torch.bfloat16) ** 2, name


def test_under_autocast_logits_are_those_of_its_format() -> None:
    head = loss_module.SupervisedHead(64, VOCAB_SIZE, bias=False)
    hidden = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden, targets=torch.arange(5), weights=None)
    logits = (hidden.bfloat16() @ head.weight.bfloat16().T).float()
    exact = F.cross_entropy(hidden @ head.weight.T, torch.arange(5), reduction="sum")
    rounded = F.cross_entropy(logits, torch.arange(5), reduction="sum")
    assert abs(found - rounded) < abs(exact - rounded) / 4


def test_float16_gradients_do_not_vanish_before_the_loss_scale() -> None:
    head = loss_module.SupervisedHead(8, VOCAB_SIZE, bias=False, dtype=torch.float16)
    hidden = torch.randn(5, 8, dtype=torch.float16, requires_grad=True)
    light = torch.full((5,), 1e-6)  # gradients near the smallest float16, 6e-8
    (head(hidden, targets=torch.arange(5), weights=light) * 2**24).backward()
    exact = hidden.detach().float().requires_grad_()
    losses = F.cross_entropy(exact @ head.weight.float().T, torch.arange(5), reduction="sum")
    (losses * 1e-6 * 2**24).backward()
    # Logits, their gradient and the product with the head are rounded to float16, each once.
    assert_close(hidden.grad, exact.grad, 3)


class _Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operations make, by the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, set[tuple[int, ...]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        shapes = {tuple(t.shape) for t in tree_leaves(result) if isinstance(t, Tensor)}
        self.made.setdefault(func.__name__.split(".")[0], set()).update(shapes)
        return result


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_tensor_holds_more_logits_than_one_chunk(
    open_model: Open, family: str, trained: bool
) -> None:
    model, inputs = open_model(family).train(), batch()
    model.get_output_embeddings().weight.requires_grad_(trained)
    model.get_input_embeddings().weight.requires_grad_(False)
    with _Shapes() as shapes:
        model(**inputs).loss.backward()
    wide = {shape for made in shapes.made.values() for shape in made if shape[-1:] == (VOCAB_SIZE,)}
    weight_transposed = (32, VOCAB_SIZE)  # a view
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    assert wide - {weight_transposed} == {(7, VOCAB_SIZE), (supervised % 7, VOCAB_SIZE)}


def test_the_gradient_of_a_narrow_head_is_made_in_parts_of_a_large_one() -> None:
    total = torch.zeros(151_552, 1)
    slope, rows = torch.ones(1, 151_552).bfloat16(), torch.ones(1, 1).bfloat16()
    with _Shapes() as shapes:
        loss_module._add_product(total, slope, rows)
    assert max(shape[0] for shape in shapes.made["mm"]) < 151_552 / 3
    assert bool((total == 1).all())


def test_evaluation_makes_no_gradient_of_a_trainable_head(open_model: Open) -> None:
    model, inputs = open_model("glm").eval(), batch()
    with torch.no_grad(), _Shapes() as shapes:
        loss = model(**inputs).loss
    assert not loss.requires_grad
    makers = {name for name, made in shapes.made.items() if (VOCAB_SIZE, 32) in made}
    assert makers <= {"detach"}  # a view


@pytest.mark.parametrize("wrapping", ["lora", "copy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_that_peft_wrapped_gives_the_full_logits_loss(
    open_model: Open, family: str, wrapping: str
) -> None:
    name = "output_layer" if family == "chatglm" else "lm_head"
    targets = [name] if wrapping == "lora" else ["dense" if family == "chatglm" else "o_proj"]
    config = LoraConfig(
        r=2, target_modules=targets, modules_to_save=[name] if wrapping == "copy" else None
    )
    model, inputs = get_peft_model(open_model(family), config), batch()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected = full_loss(logits, inputs["labels"])
    full = gradients(model, expected)
    ours = model(**inputs).loss
    assert_close(ours, expected, sums(model))
    assert_same_gradients(gradients(model, ours), full, sums(model))


LENGTHS = (5, 9, 4)


def packed_row() -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels and restarting positions of two packed rows of three documents each."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 370, (2, sum(LENGTHS)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)
    return ids, ids.clone(), positions


@pytest.mark.parametrize("mode", ["training", "checkpointed", "evaluation"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_give_the_loss_and_gradients_of_separate_ones(
    open_model: Open, family: str, attention: str, mode: str
) -> None:
    model = open_model(family, attention).train(mode != "evaluation")
    ids, labels, positions = packed_row()
    parts = list(zip(ids.split(LENGTHS, 1), labels.split(LENGTHS, 1), strict=True))
    items = sum(2 * (length - 1) for length in LENGTHS)  # a first token is never predicted
    separate = sum(model(i, labels=y, num_items_in_batch=items).loss for i, y in parts)
    expected = gradients(model, separate)
    if mode == "checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    packed = model(ids, position_ids=positions, labels=labels).loss
    assert_close(packed, separate, sums(model))
    assert_same_gradients(gradients(model, packed), expected, sums(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_give_the_logits_of_separate_ones(open_model: Open, family: str) -> None:
    model = open_model(family)
    ids, _, positions = packed_row()
    packed = model(ids, position_ids=positions).logits
    separate = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], dim=1)
    assert_close(packed, separate, sums(model))


@pytest.mark.parametrize(
    ("piece", "longest"), [(1024, 18), (14, 14), (6, 9)], ids=["one piece", "two", "a piece each"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_over_a_packed_row_is_no_wider_than_a_piece(
    open_model: Open, family: str, piece: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(family)
    ids, _, positions = packed_row()
    separate = torch.cat([model(part).logits for part in ids.split(LENGTHS, 1)], dim=1)
    plain, widths = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        widths.append(query.shape[2])
        return plain(query, *args, **kwargs)

    monkeypatch.setattr("finetune.models.packed_attention.PIECE", piece)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    packed = model(ids, position_ids=positions).logits
    assert_close(packed, separate, sums(model))
    assert max(widths) == longest


def test_a_piece_ends_with_the_last_document_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.models.packed_attention.PIECE", 5)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[0, [0, 2, 4, 5, 11]] = True
    starts[1, 0] = True
    found = pieces(starts)
    assert [part[:3] for part in found] == [(0, 0, 5), (0, 5, 11), (0, 11, 12), (1, 0, 12)]
    assert [part[3] is None for part in found] == [False, True, True, True]
    assert found[0][3].int().tolist() == [[[
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1],
    ]]]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_with_a_cache_are_refused(open_model: Open, family: str) -> None:
    ids, _, positions = packed_row()
    with pytest.raises(ValueError, match="use_cache=False"):
        open_model(family)(ids, position_ids=positions, use_cache=True)


@pytest.mark.parametrize("family", ["glm", "glm4"])
def test_without_labels_the_model_is_the_stock_one(
    open_model: Open, family: str, request: pytest.FixtureRequest
) -> None:
    stock_class = {"glm": transformers.GlmForCausalLM, "glm4": transformers.Glm4ForCausalLM}[family]
    stock = stock_class.from_pretrained(request.getfixturevalue(f"tiny_{family}"))
    model, inputs = open_model(family), batch()
    mask = inputs["attention_mask"]
    ours = model(inputs["input_ids"], mask, output_hidden_states=True)
    theirs = stock(inputs["input_ids"], mask, output_hidden_states=True)
    assert torch.equal(ours.logits, theirs.logits)  # the same shapes through the same kernels
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    assert ours.past_key_values.get_seq_length() == 18
    one = model(inputs["input_ids"], mask, logits_to_keep=1).logits
    assert_close(one, theirs.logits[:, -1:], sums(model))
    prompt = {"input_ids": inputs["input_ids"][:1], "attention_mask": mask[:1]}
    assert torch.equal(
        model.generate(**prompt, max_new_tokens=5), stock.generate(**prompt, max_new_tokens=5)
    )


def test_labels_that_are_shifted_already_take_their_weights_along(open_model: Open) -> None:
    model, inputs = open_model("glm"), batch()
    weights = torch.rand(inputs["labels"].shape)
    moved = {
        "shift_labels": F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100),
        "loss_weights": F.pad(weights[:, 1:], (0, 1)),
    }
    with torch.no_grad():
        own = model(**inputs, labels=batch()["labels"], loss_weights=weights).loss
        assert torch.equal(model(**inputs, **moved).loss, own)
        assert not torch.equal(model(**inputs, shift_labels=moved["shift_labels"]).loss, own)
