"""The small mistakes that `scripts/evidence/mutate.py` makes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "evidence"))

import mutate
from mistakes import mistakes
from mutate import Mutation

SOURCE = '''
def f(a: "x < 1", b=True):
    """No 1 < 2 here."""
    if a < len("你好") and not b:
        log(f"{a + 1}")
    return folder / NAME if b else max(a + 1, 2)
'''


def test_every_kind_of_mistake_is_made_where_it_stands_and_none_in_texts() -> None:
    made = mistakes(SOURCE)
    said = {(one.old, one.new) for one in made}
    assert said == {
        ("True", "False"),
        ('a < len("你好") and not b', '(a < len("你好") or not b)'),
        ('a < len("你好") and not b', '(not (a < len("你好") and not b))'),
        ('a < len("你好")', 'a <= len("你好")'),
        ('a < len("你好")', 'a > len("你好")'),
        ("not b", "(b)"),
        ('log(f"{a + 1}")', "pass"),
        ("b", "(not (b))"),
        ("max", "min"),
        ("a + 1", "(a - 1)"),
        ("1", "2"),
        ("2", "3"),
    }
    for one in made:
        changed = Mutation("f.py", one.old, one.new, one.line, one.column).applied(SOURCE)
        compile(changed, "f.py", "exec")
        assert changed != SOURCE


def test_a_text_of_a_list_must_stand_in_the_file_once() -> None:
    assert Mutation("f.py", "a < len", "a > len").applied(SOURCE) == SOURCE.replace(
        "a < len", "a > len"
    )
    with pytest.raises(SystemExit, match="2 × 'a . 1', not 1".replace(".", r"\+")):
        Mutation("f.py", "a + 1", "a").applied(SOURCE)


def test_the_tests_of_a_module_come_before_those_of_its_room() -> None:
    found = mutate.tests_of("finetune/serving/requests/fields.py", room_too=True)
    assert found[0] == "tests/test_serving_chats.py"
    assert "tests/test_serving_engine.py" in found
    assert "tests/test_lora.py" not in found
