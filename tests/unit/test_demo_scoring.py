"""What the demo counts as a right answer."""

import pytest

from cli.demo.scoring import is_exact, parsed, score

WANTED = {"category": "billing", "priority": "high", "product": None, "is_new": True}
RIGHT = '{"category":"billing","priority":"high","product":null,"is_new":true}'


def test_the_object_wanted_is_right_in_any_order_and_spacing():
    assert is_exact(RIGHT, WANTED)
    assert is_exact(' {"is_new": true, "product": null, "priority": "high", "category": "billing"}\n', WANTED)


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT.replace("billing", "Billing"),
        RIGHT.replace("null", '"null"'),
        RIGHT.replace("true", "1"),
        RIGHT.replace("true", '"true"'),
        RIGHT.replace(',"is_new":true', ""),
        RIGHT.replace("}", ',"note":"x"}'),
    ],
)
def test_another_value_type_or_key_is_wrong_but_still_json(answer: str):
    assert parsed(answer) is not None
    assert not is_exact(answer, WANTED)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Sure! " + RIGHT,
        f"```json\n{RIGHT}\n```",
        RIGHT[:-1],
        RIGHT + RIGHT,
        RIGHT.replace("true", "True"),
        RIGHT.replace("null", "NaN"),
        f"[{RIGHT}]",
        "42",
        "[" * 100_000,
    ],
)
def test_what_a_program_could_not_read_is_not_valid_json(answer: str):
    assert parsed(answer) is None
    assert not is_exact(answer, WANTED)


def test_a_score_counts_tickets_and_keys():
    half_right = RIGHT.replace("billing", "defect")
    result = score([(RIGHT, WANTED), (half_right, WANTED), ("no idea", WANTED), ('{"priority":"high"}', WANTED)])
    assert (result.tickets, result.exact, result.valid_json) == (4, 1, 3)
    assert result.right == {"category": 1, "priority": 3, "product": 2, "is_new": 2}
    assert (result.exact_rate, result.valid_json_rate) == (0.25, 0.75)


def test_a_missing_key_is_not_taken_for_null():
    """`product` is null here, and an answer that leaves it out has not said so."""
    assert score([('{"category":"billing"}', WANTED)]).right["product"] == 0


def test_nothing_to_score_is_an_error_and_not_a_perfect_result():
    with pytest.raises(ValueError, match="no answers to score"):
        score([])
