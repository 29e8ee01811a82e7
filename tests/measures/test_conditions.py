import re

import torch

import bigram_circuits as bc
from bigram_circuits.analysis.conditions import conditions
from bigram_circuits.measures.conditions import (
    COMPARED,
    CONDITIONS,
    DRAWN,
    SINGLE,
    colour_of,
    condition_of,
    label_of,
)


def test_every_list_of_conditions_is_of_the_table():
    names = {condition_of(name, noun) for name in (*SINGLE, *DRAWN) for noun in ("subnetwork", "circuit")}
    assert names == set(CONDITIONS)
    assert set(COMPARED) <= set(CONDITIONS)
    assert all(re.fullmatch("#[0-9A-F]{6}", one.colour) and one.meaning for one in CONDITIONS.values())


def test_analyses_compare_the_conditions_of_the_table():
    some = bc.Subnetwork({"blocks.0.mlp.W_in": torch.arange(24).view(4, 6) % 2 == 0})
    assert tuple(conditions(some)) == COMPARED
    assert tuple(conditions(None)) == COMPARED[:1]


def test_a_name_that_is_no_condition_stays_as_it_is():
    assert label_of("full") == "full model"
    assert label_of("target") == "target"
    assert (colour_of("random 0"), colour_of("full L0H1")) == (CONDITIONS["random"].colour, CONDITIONS["full"].colour)
    assert colour_of("target") is None
    assert colour_of("") is None
