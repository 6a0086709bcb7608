"""Which objectives train a trunk that goes on with a text."""

import pytest
from awkward import CASES

from objectives import CausalLM, MaskedLM, Phases, PrefixLM, RandomTokens, Weighted

MASKED = MaskedLM(select=RandomTokens(rate=0.2))
LEFT_TO_RIGHT = {"clm", "clm, hybrid", "meap", "cm3", "gpt_bert", "dpo", "experts", "grpo", "emo", "seq2seq"}


@pytest.mark.parametrize("name", CASES)
def test_continues(name):
    """Those that predict a next token from those before it."""
    objective = CASES[name].objective
    if isinstance(objective, Weighted | Phases):
        return
    expected = "prefix" if name == "prefix_lm" else "causal" if name in LEFT_TO_RIGHT else None
    assert objective.continues == expected


def test_of_several_the_first_that_does():
    """In a sum and over phases."""
    assert Weighted(parts={"a": MASKED}).continues is None
    assert Weighted(parts={"a": MASKED, "b": PrefixLM(), "c": CausalLM()}).continues == "prefix"
    assert Phases(parts={"a": CausalLM(), "b": MASKED}, lengths=(1, 2)).continues == "causal"
