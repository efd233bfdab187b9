"""What a sweep file may write for a field."""

import pytest

from tune_spaces.domains import Choice, Fixed, Grid, LogUniform, RandInt, SpaceError, Uniform, parse_domain


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        ({"uniform": [0, 1]}, Uniform(low=0, high=1)),
        ({"loguniform": [1e-6, 1e-4]}, LogUniform(low=1e-6, high=1e-4)),
        ({"randint": [1, 8]}, RandInt(low=1, high=8)),
        ({"choice": [["base"], ["base", "movie"]]}, Choice(values=(["base"], ["base", "movie"]))),
        ({"grid": [None, 0.1]}, Grid(values=(None, 0.1))),
        (0.2, Fixed(value=0.2)),
        (["base", "movie"], Fixed(value=["base", "movie"])),
        ({"type": "entropy", "phi_star": "auto"}, Fixed(value={"type": "entropy", "phi_star": "auto"})),
        (None, Fixed(value=None)),
    ],
)
def test_a_domain_is_parsed_and_anything_else_is_a_fixed_value(value: object, domain: object) -> None:
    assert parse_domain(value) == domain


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"unifrom": [0, 1]}, ["did you mean 'uniform'"]),
        ({"choices": [1, 2]}, ["did you mean 'choice'"]),
        ({"uniform": [1, 0]}, ["low < high", "[1, 0]"]),
        ({"uniform": [1, 1]}, ["low < high"]),
        ({"uniform": 3}, ["[low, high]", "try {uniform:"]),
        ({"uniform": [0, 1, 2]}, ["[low, high]"]),
        ({"uniform": ["a", 1]}, ["valid number"]),
        ({"uniform": [0, float("inf")]}, ["finite"]),
        ({"loguniform": [0, 1]}, ["above 0", "uniform"]),
        ({"randint": [0.5, 2]}, ["integer"]),
        ({"choice": []}, ["no values"]),
        ({"choice": "dpo"}, ["takes a list", "{choice: [dpo]}"]),
        ({"grid": [0.1, 0.1]}, ["twice"]),
        ({"uniform": [0, 1], "log": True}, ["must be the only key", "log"]),
    ],
)
def test_a_bad_domain_is_refused_with_the_remedy(value: object, words: list[str]) -> None:
    with pytest.raises(SpaceError) as error:
        parse_domain(value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_domain_reads_well() -> None:
    texts = [
        str(parse_domain(value))
        for value in ({"loguniform": [1e-6, 0.5]}, {"grid": [["a", "b"], None, True]})
    ]
    assert texts == ["1e-06 to 0.5, log", "a + b | none | true, in turn"]
