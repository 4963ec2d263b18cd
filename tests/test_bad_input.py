"""A sample of the bad inputs of bad_input.py, which says what is checked and runs all of them.

Not here: mutants of images, and what takes long (python tests/bad_input.py, by hand).
"""

import bad_input
import pytest

CASES = bad_input.all_cases()
BAD = [case for case in CASES if case.expected != "accepted"]
SAMPLE = BAD[:: len(BAD) // 40][:40]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bad_input.make_world(tmp_path_factory.mktemp("bad_input"))


def test_the_generator_makes_hundreds_of_different_cases_for_all_commands():
    assert len({(case.kind, case.label, case.command) for case in CASES}) == len(CASES) > 500
    assert {case.command for case in CASES if case.expected == "refused"} == {*bad_input.COMMANDS}


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: f"{case.kind} {case.label:.40}")
def test_a_bad_input_ends_in_one_line_and_nothing_is_lost(case, world, tmp_path):
    ending = bad_input.run_case(case, world, tmp_path / "case")
    assert bad_input.problem(case, ending) is None
