"""Greedy decoding with drafts and limits, on a decoder that follows a script."""

from contextlib import contextmanager

import numpy as np
import pytest

from coprs_deploy import demo
from coprs_deploy.bundle import POLICY_GRAPHS_DIRECTORY, read_manifest
from coprs_deploy.policy import PolicyRequest, StopReason, greedy
from coprs_deploy.policy.known_text import lookup_draft
from coprs_deploy.policy.openvino_policy.tokenizer import FileTokenizer
from coprs_deploy.policy.policy_tokens import PolicyTokens

PATH = demo.BUNDLE / POLICY_GRAPHS_DIRECTORY
PROMPT = read_manifest(demo.BUNDLE).policy.prompt
END = "<|im_end|>"
PROMPT_IDS = [3, 4, 5]
IMAGE = np.zeros((4, 4, 3), np.uint8)
TAIL = "</think> <REF_POS>"


class ScriptedDecoding:
    """Decoder that writes a script, and another token after anything that is not in the script.

    The hidden state of a token is its place in the response and the token itself.
    """

    num_cached_tokens = 0
    prompt_ids = PROMPT_IDS

    def __init__(self, script, on_pass):
        self.script, self.read, self.passes = script, [], []
        self.on_pass = on_pass

    def next_after(self, count):
        read = self.read[:count]
        return self.script[count] if read == self.script[:count] else 0

    def feed(self, tokens):
        self.on_pass()
        self.passes.append(list(tokens))
        start = len(self.read)
        self.read += tokens
        places = range(start, len(self.read))
        states = np.array([(place, self.read[place]) for place in places], np.float32)
        return [self.next_after(place + 1) for place in places], states

    def prefill(self, response=()):
        self.on_pass()
        self.read += response
        last = self.read[-1] if self.read else -1
        state = np.array((len(self.read) - 1, last), np.float32)
        return self.next_after(len(self.read)), state

    def drop(self, count):
        del self.read[-count:]


class ScriptedPolicy(greedy.GreedyPolicy):
    hidden_size = 2
    description = "scripted"
    _prompt = PROMPT

    def __init__(self, text, on_pass=lambda: None):
        self.tokens = PolicyTokens(FileTokenizer(PATH, None), PATH, 557)
        self.ids = self.encode(text)
        self.on_pass = on_pass

    def encode(self, text):
        return self.tokens.tokenizer(text, add_special_tokens=False)["input_ids"]

    @contextmanager
    def start(self, request):
        self.decoding = ScriptedDecoding(self.ids, self.on_pass)
        yield self.decoding

    def close(self):
        pass


def run(policy, **options):
    *deltas, result = policy.stream(PolicyRequest(IMAGE, "the cup", **options))
    assert "".join(delta.text for delta in deltas) == result.response.text
    # The decoder has read what was written, but an end token and what a budget left unread.
    read = policy.decoding.read
    assert read == list(result.token_ids)[: len(read)]
    places = result.response.reference_positions
    assert [int(place) for place, _ in result.concentrations] == list(places)
    assert {int(token) for _, token in result.concentrations} <= {policy.tokens.reference_id}
    return result


MATCH = "<think>The cup is at row2 col3.</think> <REF_POS>"
SEVERAL = MATCH + " <REF_POS> <REF_POS>" + END
NO_MATCH = "<think>The cup is nowhere.</think> nothing matches" + END


@pytest.mark.parametrize("text", [MATCH + END, SEVERAL, NO_MATCH, MATCH + " and" + END])
@pytest.mark.parametrize("max_targets", [1, 2, 5])
@pytest.mark.parametrize("lookup", [0, 3])
def test_drafts_change_nothing_but_the_number_of_passes(text, max_targets, lookup):
    policy = ScriptedPolicy(text)
    policy.drafts_tail = False
    plain = run(policy, max_targets=max_targets)
    policy.drafts_tail, policy.prompt_lookup_num_tokens = True, lookup
    drafted = run(policy, max_targets=max_targets)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stop_reason is plain.stop_reason
    assert np.array_equal(drafted.concentrations, plain.concentrations)
    has_reference = "<REF_POS>" in text
    assert drafted.num_passes < plain.num_passes if has_reference else True


def test_tail_and_each_separator_are_read_in_one_pass():
    policy = ScriptedPolicy(SEVERAL)
    result = run(policy, max_targets=3)
    end, space, reference = policy.encode(TAIL)
    assert policy.decoding.passes[-3:] == [
        [end, space, reference],
        [space, reference],
        [space, reference],
    ]
    assert result.stop_reason is StopReason.TARGETS_REACHED


@pytest.mark.parametrize("budget", range(1, 14))
def test_token_budget_is_exact_with_drafts(budget):
    policy = ScriptedPolicy(SEVERAL)
    policy.prompt_lookup_num_tokens = 5
    result = run(policy, max_targets=9, max_new_tokens=budget)
    assert len(result.token_ids) == min(budget, len(policy.ids))


REPEATED = "<think>The cup is at row2 col3. The cup is at row2 col3, the cup.</think> <REF_POS>"


TWICE = "<think>The cup is at row2 col3. The cup is at row2 col3.</think> <REF_POS>"


@pytest.mark.parametrize("text", [REPEATED, TWICE])
@pytest.mark.parametrize("count", range(1, 18))
def test_reasoning_budget_is_exact_with_drafts_by_lookup(text, count):
    policy = ScriptedPolicy(text + END)
    expected = run(policy, max_reasoning_tokens=count)
    policy.prompt_lookup_num_tokens = 5
    found = run(policy, max_reasoning_tokens=count)
    assert found.token_ids == expected.token_ids
    assert found.stop_reason is expected.stop_reason
    if count > 12:
        assert found.num_passes < expected.num_passes


@pytest.mark.parametrize("count", [0, 1, 4])
def test_reasoning_budget_forces_the_tail_after_so_many_tokens(count):
    policy = ScriptedPolicy(MATCH + END)
    result = run(policy, max_reasoning_tokens=count)
    begun = policy.tokens.tokenizer.decode(policy.ids[: 1 + count])
    assert result.response.text == begun + TAIL
    assert result.stop_reason is StopReason.REASONING_BUDGET
    assert len(result.concentrations) == 1
    assert result.num_passes == (0 if count == 0 else 1 + count)  # the last reads the tail too


@pytest.mark.parametrize(
    "text",
    [
        MATCH + END,
        NO_MATCH,
        "<think>The cup is" + END,
        "The cup</think> is" + END,
        END,
        "<think>The <REF_POS> cup</think> is" + END,
    ],
)
@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("max_targets", [1, 3])
def test_a_limited_request_always_has_a_mask(text, count, max_targets):
    result = run(ScriptedPolicy(text), max_reasoning_tokens=count, max_targets=max_targets)
    assert 1 <= len(result.concentrations) <= max_targets
    assert result.response.text.endswith("<REF_POS>")


@pytest.mark.parametrize("rest", ["", " is nowhere"])
def test_a_limited_request_whose_draft_ends_the_reasoning_has_a_mask(rest, monkeypatch):
    policy = ScriptedPolicy("<think>The cup</think>" + rest + END)
    monkeypatch.setattr(ScriptedDecoding, "prompt_ids", policy.encode("<think>The cup</think>"))
    policy.prompt_lookup_num_tokens = 5
    result = run(policy, max_reasoning_tokens=50)
    assert len(result.concentrations) == 1
    assert result.response.reasoning == "The cup"


@pytest.mark.parametrize("text", ["<think>" + 60 * " <" + "</think> <REF_POS>", 60 * "\n"])
@pytest.mark.parametrize("budget", [4, 5, 20])
def test_a_limited_request_has_a_mask_within_its_token_budget_whatever_it_writes(text, budget):
    result = run(ScriptedPolicy(text), max_reasoning_tokens=50, max_new_tokens=budget)
    assert len(result.token_ids) == budget
    assert len(result.concentrations) == 1


def test_a_limit_that_is_not_reached_changes_nothing():
    policy = ScriptedPolicy(MATCH + END)
    expected = run(policy)
    found = run(policy, max_reasoning_tokens=50)
    assert found.token_ids == expected.token_ids
    assert found.stop_reason is StopReason.TARGETS_REACHED


def test_limited_request_writes_further_targets_only_while_the_policy_would():
    assert (
        len(run(ScriptedPolicy(SEVERAL), max_reasoning_tokens=50, max_targets=9).concentrations)
        == 3
    )
    result = run(ScriptedPolicy(SEVERAL), max_reasoning_tokens=2, max_targets=9)
    assert len(result.concentrations) == 1  # the script does not go on after this reasoning
    assert result.stop_reason is StopReason.REASONING_BUDGET


def test_token_budget_without_room_for_the_tail_is_refused():
    with pytest.raises(ValueError, match=r"max_new_tokens is 3; .* at least 4 are needed"):
        run(ScriptedPolicy(MATCH), max_reasoning_tokens=5, max_new_tokens=3)
    result = run(ScriptedPolicy(MATCH), max_reasoning_tokens=5, max_new_tokens=4)
    assert result.response.text == "<think></think> <REF_POS>"


class FakeClock:
    """Time that passes by a given number of seconds in each pass of the decoder."""

    def __init__(self, monkeypatch, seconds):
        self.now, self.seconds = 1000.0, seconds
        monkeypatch.setattr(greedy.time, "perf_counter", lambda: self.now)

    def advance(self):
        self.now += self.seconds


LONG = "<think>" + "The cup is at row2 col3. " * 30 + "</think> <REF_POS>"


@pytest.mark.parametrize("budget_s", [3.0, 7.5, 20.0])
def test_deadline_ends_the_reasoning_as_late_as_possible(monkeypatch, budget_s):
    clock = FakeClock(monkeypatch, 0.5)
    policy = ScriptedPolicy(LONG, clock.advance)
    for _ in range(2):  # the second time the duration of the tail is known
        due = clock.now + budget_s
        result = run(policy, reasoning_deadline=due)
        assert result.stop_reason is StopReason.DEADLINE
        assert len(result.concentrations) == 1
        assert clock.now <= due
    assert due - clock.now < 0.5 + 1e-6  # another token would not have fitted


def test_reader_of_the_text_does_not_count_as_time_of_the_prefill(monkeypatch):
    clock = FakeClock(monkeypatch, 0.5)
    policy = ScriptedPolicy(MATCH + END, clock.advance)
    for event in policy.stream(PolicyRequest(IMAGE, "the cup", max_reasoning_tokens=0)):
        clock.now += 10
        result = event
    assert result.prefill_ms == pytest.approx(500)


def test_deadline_that_has_passed_after_the_prefill_still_has_a_mask(monkeypatch):
    clock = FakeClock(monkeypatch, 5.0)
    result = run(ScriptedPolicy(LONG, clock.advance), reasoning_deadline=clock.now + 1)
    assert result.response.text == "<think></think> <REF_POS>"
    assert result.stop_reason is StopReason.DEADLINE


@pytest.mark.parametrize("budget_s", [5.0, 5.5, 6.0, 6.5, 7.0, 20.0])
def test_deadline_also_ends_the_naming_of_targets(monkeypatch, budget_s):
    clock = FakeClock(monkeypatch, 0.5)
    policy = ScriptedPolicy(SEVERAL, clock.advance)
    for _ in range(2):  # the second time the duration of the tail is known
        due = clock.now + budget_s
        result = run(policy, reasoning_deadline=due, max_targets=3)
        assert clock.now <= due
        assert len(result.concentrations) >= 1
    assert len(result.concentrations) == 3 or due - clock.now < 1.0


def test_deadline_with_time_to_spare_changes_nothing(monkeypatch):
    clock = FakeClock(monkeypatch, 0.5)
    policy = ScriptedPolicy(MATCH + END, clock.advance)
    result = run(policy, reasoning_deadline=clock.now + 1000)
    assert result.stop_reason is StopReason.TARGETS_REACHED
    assert result.response.text == MATCH


def test_lookup_draft_copies_what_followed_the_longest_and_latest_match():
    assert lookup_draft([1, 2, 3, 9, 2, 3, 4, 1, 2, 3], 2) == [9, 2]
    assert lookup_draft([2, 3, 5, 7, 3, 6, 3], 5) == [6, 3]
    assert lookup_draft([1, 2, 3], 4) == []
    assert lookup_draft([], 4) == lookup_draft([1], 4) == []


def test_reasoning_limit_counts_neither_the_opening_nor_the_end():
    request = PolicyRequest(IMAGE, "the cup", max_reasoning_tokens=3)
    limit = greedy.ReasoningLimit(request, 100, greedy.RunningEstimate(), lambda: 0.0)
    counts = []
    for piece in ("<", "think", ">", "The", " cup", "</", "think", ">", " ", "<REF_POS>"):
        limit.add(piece)
        counts.append((limit.num_tokens, limit.is_reasoning))
    assert [count for count, _ in counts] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    assert [reasoning for _, reasoning in counts] == [True] * 7 + [False] * 3


def test_reasoning_limit_counts_what_only_began_like_the_end():
    request = PolicyRequest(IMAGE, "the cup", max_reasoning_tokens=9)
    limit = greedy.ReasoningLimit(request, 100, greedy.RunningEstimate(), lambda: 0.0)
    counts = []
    for piece in ("<think>", "a", " <", " <", "</", "b", "</", "think", ">", " "):
        limit.add(piece)
        counts.append(limit.num_tokens)
    assert counts == [0, 1, 1, 2, 3, 5, 5, 5, 5, 5]
