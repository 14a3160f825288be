"""A prefix in every attention layer: as PEFT opens it, under recomputation, padding, packing and the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import additions, assert_close
from peft import PeftModel
from safetensors.torch import load_file

from finetune.artifacts.base_record import BaseRecord
from finetune.artifacts.weights import model_fingerprint
from finetune.config.schema import PTuningV2Method
from finetune.errors import ConfigError, ModelError
from finetune.methods import prefix_init, ptuning_v2
from finetune.models.load import load_model

FAMILIES = ("chatglm", "glm", "glm4")
N = 5


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    return folder


def tuned(base: Path, *, projection: bool = False, **options: Any) -> torch.nn.Module:
    """A model whose prefix weighs enough to be noticed."""
    torch.manual_seed(1)
    section = PTuningV2Method(num_virtual_tokens=N, prefix_projection=projection)
    model = ptuning_v2.attach(load_model(base, **options), section)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 4 if "key_value" in name else 0.5)
    return model.eval()


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of ids; the second has three tokens of padding on its right."""
    ids = torch.randint(0, 370, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


def sums(model: torch.nn.Module) -> int:
    """Additions from a token of these rows, behind the prefix, to its logits."""
    return additions(model.config, N + 9)


def save(model: torch.nn.Module, base: Path, folder: Path) -> Path:
    folder.mkdir()
    ptuning_v2.save(model, folder, base=BaseRecord(str(base), None, model_fingerprint(base)))
    return folder


def test_a_fresh_prefix_is_the_base_with_its_text_in_front(base: Path) -> None:
    ids, _ = padded()
    text = [371, 9, 60, 200, 17]
    model = ptuning_v2.attach(
        load_model(base), PTuningV2Method(num_virtual_tokens=N), start_ids=text
    )
    together = torch.cat([torch.tensor([text]).expand(2, N), ids], 1)
    with torch.no_grad():
        expected = load_model(base)(together).logits[:, N:]
        assert_close(model(ids).logits, expected, sums(model))


def test_every_key_and_value_is_trained_in_a_unit_of_about_its_own_size(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [371, 9, 60, 200, 17]
    section = PTuningV2Method(num_virtual_tokens=N)
    # As in a real model: large keys, small values, the first token's smallest of all.
    sizes = torch.logspace(-2, 1, N)[None, None, :, None] * torch.tensor([2.0, 0.1])[:, None, None, None]  # fmt: skip
    starts = [start * sizes for start in prefix_init.activations(load_model(base), text)]
    monkeypatch.setattr(prefix_init, "activations", lambda *_: starts)
    model = ptuning_v2.attach(load_model(base), section, start_ids=text)
    prefixes = [m for m in model.modules() if isinstance(m, ptuning_v2.Prefix)]
    for prefix, start in zip(prefixes, starts, strict=True):
        assert torch.equal(prefix(), start)
        own = prefix.key_value.square().mean(-1).sqrt()
        assert own.min() > 2**-0.51
        assert own.max() < 2**0.51
        assert torch.equal(torch.frexp(prefix.unit).mantissa, torch.full_like(prefix.unit, 0.5))
    # A step of the optimizer is a share of what is there, for the smallest as for the largest.
    optimizer = torch.optim.AdamW([p.key_value for p in prefixes], lr=0.1, weight_decay=0)
    for prefix in prefixes:
        prefix.key_value.grad = torch.ones_like(prefix.key_value)
    optimizer.step()
    for prefix, start in zip(prefixes, starts, strict=True):
        share = (start - prefix()).square().mean(-1).sqrt() / start.square().mean(-1).sqrt()
        assert share.min() > 0.1 * 2**-0.51
        assert share.max() < 0.1 * 2**0.51
    adapter = save(model, base, tmp_path / "adapter")
    fresh = ptuning_v2.attach(load_model(base), section)  # of noise, with other units
    ptuning_v2.restore(fresh, adapter)
    assert all(
        torch.equal(value, dict(fresh.state_dict())[name])
        for name, value in model.state_dict().items()
    )
    (adapter / ptuning_v2.PREFIX_UNITS).unlink()  # a checkpoint of before there were units
    ptuning_v2.restore(fresh, adapter)
    for old, new in zip(prefixes, (m for m in fresh.modules() if isinstance(m, ptuning_v2.Prefix)), strict=True):  # fmt: skip
        assert torch.equal(new(), old())
        assert torch.equal(new.unit, torch.ones_like(new.unit))


@pytest.mark.parametrize("projection", [False, True])
def test_peft_opens_the_saved_adapter_with_the_same_logits(
    base: Path, tmp_path: Path, projection: bool
) -> None:
    model = tuned(base, projection=projection)
    adapter = save(model, base, tmp_path / "adapter")
    peft_model = PeftModel.from_pretrained(load_model(base), adapter).eval()
    ids, mask = padded()
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask).logits
        theirs = peft_model(input_ids=ids, attention_mask=mask).logits
        untuned = load_model(base)(input_ids=ids, attention_mask=mask).logits
    assert_close(ours[mask.bool()], theirs[mask.bool()], sums(model))
    assert (ours - untuned)[mask.bool()].abs().max() > 0.5, "the prefix had no effect"


@pytest.mark.parametrize("projection", [False, True])
def test_recomputed_activations_give_the_same_gradients(base: Path, projection: bool) -> None:
    ids, mask = padded()

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model = tuned(base, projection=projection).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(g is not None and g.abs().max() > 0 for g in found)
        return [g for g in found if g is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)  # by the same kernels


def test_only_the_prefix_is_trained(base: Path) -> None:
    names = [name for name, p in tuned(base).named_parameters() if p.requires_grad]
    assert len(names) == 2
    assert all(name.endswith(".prefix.key_value") for name in names)


def test_left_and_right_padding_give_what_a_row_alone_gives(base: Path) -> None:
    model = tuned(base)
    ids, _ = padded()
    row, pad = ids[:1, :6], torch.full((1, 3), 370)
    real, hole = torch.ones(1, 6, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad():
        alone = model(input_ids=row).logits
        right = model(
            input_ids=torch.cat([row, pad], 1), attention_mask=torch.cat([real, hole], 1)
        ).logits[:, :6]
        left = model(
            input_ids=torch.cat([pad, row], 1),
            attention_mask=torch.cat([hole, real], 1),
            position_ids=torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4, 5]]),
        ).logits[:, 3:]
    assert_close(right, alone, sums(model))
    assert_close(left, alone, sums(model))


@pytest.mark.parametrize("cached", [False, True])
def test_beside_a_prefix_padding_on_the_left_is_not_counted_as_positions(
    tiny_chatglm: Path, cached: bool
) -> None:
    """Without a prefix only distances between tokens count, and one more in front would go unseen."""
    model = tuned(tiny_chatglm)
    row, pad = padded()[0][:1, :6], torch.full((1, 3), 370)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        alone = model(input_ids=row).logits
        left = model(torch.cat([pad, row], 1), attention_mask=mask, use_cache=cached)
        assert_close(left.logits[:, 3:], alone, sums(model))
        if cached:
            longer = torch.cat([row, row[:, :1]], 1)
            more = torch.cat([mask, mask[:, -1:]], 1)
            said = model(row[:, :1], attention_mask=more, past_key_values=left.past_key_values)
            assert_close(said.logits[:, -1], model(longer).logits[:, -1], sums(model))


@pytest.mark.parametrize("piece", [1024, 4])
def test_packed_documents_see_the_prefix_and_not_each_other(
    base: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.models.packed_attention.PIECE", piece)
    model = tuned(base)
    ids, _ = padded()
    first, second = ids[:1, :4], ids[1:, :5]
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat([first, second], 1),
            position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
            use_cache=False,
        ).logits
        alone = [model(input_ids=document).logits for document in (first, second)]
    assert_close(packed[:, :4], alone[0], sums(model))
    assert_close(packed[:, 4:], alone[1], sums(model))


def test_generation_with_a_cache_and_padding_equals_peft_and_recomputation(
    base: Path, tmp_path: Path
) -> None:
    model = tuned(base)
    ids, _ = padded()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    cached = model.generate(input_ids=ids[:1], attention_mask=torch.ones(1, 9), **options)
    adapter = save(model, base, tmp_path / "adapter")
    peft_model = PeftModel.from_pretrained(load_model(base), adapter).eval()
    theirs = peft_model.generate(input_ids=ids[:1], attention_mask=torch.ones(1, 9), **options)
    assert cached.tolist() == theirs.tolist()
    row = ids[:1]
    for _ in range(6):
        with torch.no_grad():
            logits = model(input_ids=row, use_cache=False).logits
        row = torch.cat([row, logits[:, -1:].argmax(-1)], 1)
    assert cached.tolist() == row.tolist()
    batch = torch.cat([torch.full((1, 2), 370), ids[:1, 2:]], 1)
    both = torch.cat([ids[:1], batch])
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7])
    together = model.generate(input_ids=both, attention_mask=mask, **options)[:, 9:]
    short = model.generate(input_ids=ids[:1, 2:], attention_mask=torch.ones(1, 7), **options)
    assert together.tolist() == [cached[0, 9:].tolist(), short[0, 7:].tolist()]


def test_eager_attention_equals_sdpa(base: Path) -> None:
    ids, mask = padded()
    models = [tuned(base, attention=name) for name in ("sdpa", "eager")]
    with torch.no_grad():
        sdpa, eager = (
            model(input_ids=ids, attention_mask=mask).logits[mask.bool()] for model in models
        )
    assert_close(sdpa, eager, sums(models[0]))


@pytest.mark.parametrize("projection", [False, True])
def test_a_saved_prefix_restores_for_training_and_loads_for_generation(
    base: Path, tmp_path: Path, projection: bool
) -> None:
    model = tuned(base, projection=projection)
    adapter = save(model, base, tmp_path / "adapter")
    section = PTuningV2Method(num_virtual_tokens=N, prefix_projection=projection)
    fresh = ptuning_v2.attach(load_model(base), section)
    ptuning_v2.restore(fresh, adapter)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert torch.equal(weight, dict(fresh.named_parameters())[name]), name
    ids, mask = padded()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        opened = ptuning_v2.load_adapter(load_model(base), adapter)
        assert torch.equal(opened(input_ids=ids, attention_mask=mask).logits, expected)


def test_the_full_size_prefix_has_the_published_number_of_parameters(
    tiny_chatglm: Path, tmp_path: Path
) -> None:
    # FACTS of the published model: 40 layers x 2 x 2 groups x 128 x 512 virtual tokens = 10,485,760;
    # here 2 layers x 2 x 2 groups x 8 x 5.
    model = tuned(tiny_chatglm)
    adapter = save(model, tiny_chatglm, tmp_path / "adapter")
    flat = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"]
    assert flat.shape == (N, 2 * 2 * 2 * 8)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == flat.numel()


def test_a_prefix_of_another_length_is_refused(tiny_glm: Path, tmp_path: Path) -> None:
    adapter = save(tuned(tiny_glm), tiny_glm, tmp_path / "adapter")
    other = ptuning_v2.attach(load_model(tiny_glm), PTuningV2Method(num_virtual_tokens=N + 1))
    with pytest.raises(ModelError, match="num_virtual_tokens"):
        ptuning_v2.restore(other, adapter)


def test_an_attention_that_cannot_take_a_prefix_is_refused(tiny_glm: Path) -> None:
    model = load_model(tiny_glm)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="attention: sdpa"):
        ptuning_v2.attach(model, PTuningV2Method())
