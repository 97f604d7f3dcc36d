"""Arbitrary instructions: a result that can be sent and saved, or an error that is ours."""

import json
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coprs_deploy.errors import InstructionError
from coprs_deploy.prompts import MAX_INSTRUCTION_CHARS
from coprs_deploy.runtime import CoPRS

IMAGE = np.zeros((40, 60, 3), dtype=np.uint8)

SPECIAL = (
    "<REF_POS>",
    "<think>",
    "</think>",
    "<|image_pad|>",
    "<|im_end|>",
    "{instruction}",
    "</s>",
)

PIECES = st.one_of(
    st.text(st.characters(), max_size=20),  # surrogates included
    st.text(st.characters(categories=["Cc", "Cf", "Cs", "Co", "Cn", "Mn", "Zs"]), max_size=20),
    st.sampled_from(SPECIAL),
)
INSTRUCTIONS = st.builds(
    lambda pieces, times: "".join(pieces) * times,
    st.lists(PIECES, max_size=6),
    st.sampled_from([1, 1, 1, 2, 50, 500, 30_000]),
)


@pytest.fixture(scope="module")
def coprs(tiny_bundle):
    with CoPRS.load(tiny_bundle) as opened:
        yield opened


def expected_error(instruction):
    """Return a pattern of the error that an instruction must give; None for a result."""
    if len(instruction) > MAX_INSTRUCTION_CHARS:
        return "characters, the limit is 20,000"
    if not instruction.strip():
        return "the instruction is empty"
    if re.search("[\ud800-\udfff]", instruction):
        return "half a surrogate pair"
    return None


@pytest.mark.fuzz
@given(instruction=INSTRUCTIONS)
@example("\ud83d\ude00")
@example("\0")
@example("a" * MAX_INSTRUCTION_CHARS)
def test_segment_any_instruction_gives_a_result_or_an_error_of_its_own(coprs, instruction):
    expected = expected_error(instruction)
    try:
        result = coprs.segment(IMAGE, instruction, max_new_tokens=1)
    except InstructionError as error:
        assert re.search(expected or "the prompt has .* tokens, the limit is", str(error))
        assert len(str(error)) < 400
        str(error).encode()
    else:
        assert expected is None
        assert result.instruction == instruction
        sent = json.dumps(result.to_json(), ensure_ascii=False).encode()
        assert json.loads(sent)["instruction"] == instruction
