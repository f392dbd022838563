"""Tasks without a network: what is asked, and what a file must hold."""

import json

import pytest

from torchtune_kd.errors import UserError
from torchtune_kd.evaluation.runner import over_choices
from torchtune_kd.evaluation.tasks import Item, check_task, items_of, read_items
from torchtune_kd.evaluation.tasks.items import items_fingerprint


def test_cities_have_one_right_answer_among_four_countries():
    items = items_of("cities")
    assert len(items) > 300
    dubai = next(item for item in items if item.context == "The city of Dubai is in the country of")
    assert dubai.choices[dubai.answer] == " United Arab Emirates"
    for item in items:
        assert len(set(item.choices)) == 4 and item.context == item.context.rstrip()
    # the place of the answer tells nothing
    assert all(0.15 < sum(item.answer == place for item in items) / len(items) < 0.35 for place in range(4))
    assert items_fingerprint(items) == items_fingerprint(items_of("cities"))


def test_mmlu_dev_has_most_of_the_questions():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'torchtune-kd[evaluate]'")
    items = items_of("mmlu_dev")
    assert len(items) >= 270
    assert all(len(item.choices) == 4 and item.context.endswith("\nAnswer:") for item in items)
    group = next(item for item in items if "Every element of a group generates a cyclic subgroup" in item.context)
    assert group.choices[group.answer] == " True, False"


def test_a_file_of_ones_own(tmp_path):
    file = tmp_path / "own.jsonl"
    lines = [
        {"context": "2 + 2 = ", "choices": ["3", "4"], "answer": "4"},
        {"context": "Red and", "choices": [" blue", "\ngreen"], "answer": 0},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_items(file) == [Item("2 + 2 =", (" 3", " 4"), 1), Item("Red and", (" blue", "\ngreen"), 0)]
    assert items_of(str(file)) == read_items(file)


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "is empty"),
        ("{", "line 1 of .* is none"),
        ('{"context": "a", "choices": ["b", "c"]}', "`context`, `choices` and `answer`"),
        ('{"context": " ", "choices": ["b", "c"], "answer": 0}', "a text under `context`"),
        ('{"context": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ('{"context": "a", "choices": ["b", "c"], "answer": "d"}', "right answer among the 2 choices of line 1"),
        ('{"context": "a", "choices": ["b", "c"], "answer": 2}', "index from 0 to 1, got 2"),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "got True"),
    ],
)
def test_a_file_that_is_no_task_says_where(tmp_path, content, said):
    (tmp_path / "own.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        read_items(tmp_path / "own.jsonl")


def test_an_unknown_task_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean `cities`"):
        check_task("citys")
    with pytest.raises(UserError, match="is no file"):
        check_task(str(tmp_path / "nope.jsonl"))
    check_task("lm_eval:hellaswag")


def test_accuracy_and_bits_per_byte_by_hand():
    """Two questions: the first is right, the second only per byte, since its right answer is the longer one."""
    items = [Item("a", (" x", " yy"), 0), Item("b", (" z", " wwww"), 1)]
    acc, acc_norm, bits = over_choices(items, [[-1.0, -2.5], [-1.0, -2.0]])
    assert (acc.value, acc.items) == (0.5, [1.0, 0.0])
    assert (acc_norm.value, acc_norm.items) == (1.0, [1.0, 1.0])
    assert bits.items == pytest.approx([1 / 0.6931472, 0.5 / 0.6931472])
