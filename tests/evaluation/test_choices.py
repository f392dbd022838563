"""One pass per question gives what one pass per choice gives."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny import VOCAB
from torchtune_kd.errors import UserError
from torchtune_kd.evaluation.choices import Question, encode_question, question_of, score_questions


def alone(candidate, context, whole):
    """The log-likelihood of ``whole`` behind its first ``context`` ids by a pass of its own; whether it is greedy."""
    ids = torch.tensor(whole)
    logits = F.linear(candidate.states(ids[None, :-1]), *candidate.head)[0].double()
    log_probs = logits.log_softmax(-1)[context - 1 :]
    wanted = ids[context:]
    greedy = bool((log_probs.argmax(-1) == wanted).all())
    return float(log_probs.gather(-1, wanted[:, None]).sum()), greedy


def ids(length):
    return st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=length)


@pytest.mark.parametrize("name", ["teacher", "untrained"])
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(ids(20), st.lists(ids(6), min_size=2, max_size=4)), min_size=1, max_size=4), st.integers(1, 3)
)
def test_a_tree_is_one_pass_per_choice(candidates, name, drawn, batch_size):
    """Questions of different lengths in one batch, hence padding; choices of one id; grouped queries."""
    candidate = candidates[name]
    wholes = [(len(context), [context + choice for choice in choices]) for context, choices in drawn]
    found = score_questions(candidate, [question_of(*pair) for pair in wholes], batch_size)
    for scores, (length, whole) in zip(found, wholes, strict=True):
        expected = [alone(candidate, length, ids) for ids in whole]
        values = [value for value, _ in expected]
        assert [score.log_likelihood for score in scores] == pytest.approx(values, abs=1e-4, rel=1e-5)
        assert [score.is_greedy for score in scores] == [greedy for _, greedy in expected]


def test_log_likelihoods_agree_within_1e_5(candidates):
    """Take a model whose logits are of order one, as a trained one's are."""
    context, choices = [5, 6, 7, 8], [[1, 2, 3], [9], [1, 2, 4, 5]]
    (scores,) = score_questions(candidates["teacher"], [question_of(4, [context + choice for choice in choices])])
    for score, choice in zip(scores, choices, strict=True):
        assert abs(score.log_likelihood - alone(candidates["teacher"], 4, context + choice)[0]) < 1e-5


def test_the_likeliest_continuation_is_greedy(candidates):
    candidate, context = candidates["teacher"], [5, 6, 7]
    for _ in range(2):
        logits = F.linear(candidate.states(torch.tensor([context])), *candidate.head)
        context = [*context, int(logits[0, -1].argmax())]
    (scores,) = score_questions(candidate, [question_of(3, [context, [5, 6, 7, 0, 0]])])
    assert [score.is_greedy for score in scores] == [True, False]


def test_choices_that_do_not_fit_together_take_several_passes(candidates):
    """The model takes 64 ids: four choices of 20 behind a context of 10."""
    candidate, context = candidates["teacher"], list(range(10))
    choices = [[20 + number] * 20 for number in range(4)]
    (scores,) = score_questions(candidate, [question_of(10, [context + choice for choice in choices])])
    expected = [alone(candidate, 10, context + choice)[0] for choice in choices]
    assert [score.log_likelihood for score in scores] == pytest.approx(expected, abs=1e-4)


def test_a_context_that_is_too_long_is_cut_from_the_left(candidates):
    """As lm-eval does: nothing is predicted from the last id, so 64 ids before it fit."""
    candidate, context = candidates["teacher"], [number % 50 for number in range(100)]
    (scores,) = score_questions(candidate, [question_of(100, [[*context, 1, 2], [*context, 3]])])
    short, _ = alone(candidate, 63, [*context[-63:], 1, 2])
    assert scores[0].log_likelihood == pytest.approx(short, abs=1e-4)


def test_a_choice_longer_than_the_model_is_refused(candidates):
    with pytest.raises(UserError, match="less than 64 tokens"):
        score_questions(candidates["teacher"], [question_of(1, [[0] + [1] * 70, [0, 2]])])


class Joining:
    """A tokenizer that joins "a" and "b" into one id, as byte-pair encodings do across a boundary."""

    bos_id, eos_id = None, 9

    def encode(self, text, add_bos=True, add_eos=True):
        return [int(word) for word in text.replace("ab", "3 ").replace("a", "1 ").replace("b", "2 ").split()]


def test_ids_that_join_context_and_choice_are_scored_with_the_choice():
    """ "aa" is [1, 1], "aab" [1, 3] and "aaa" [1, 1, 1]: what "b" changes in the context counts as context."""
    question = encode_question(Joining(), "aa", ["bb", "ab"])
    assert question == Question([1], [[3, 2], [1, 3]], [1, 1])


def test_an_empty_context_is_the_end_of_another_text():
    assert encode_question(Joining(), "", ["a", "b"]) == Question([9], [[1], [2]], [0, 0])


def test_white_space_at_the_end_of_a_context_belongs_to_the_choices(tokenizer):
    one, two = (encode_question(tokenizer, *pair) for pair in (("a b ", ["c", "d"]), ("a b", [" c", " d"])))
    assert one == two


def test_a_choice_without_a_token_is_refused(tokenizer):
    with pytest.raises(UserError, match="adds none"):
        encode_question(tokenizer, "a", ["", "b"])
