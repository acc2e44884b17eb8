"""The page of refusals is what the code says, and every line of it says what is allowed."""

import pathlib

import bad_inputs
import pytest

PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'refusals.md'


@pytest.fixture(scope='module')
def page(tmp_path_factory):
  return bad_inputs.table(tmp_path_factory.mktemp('bad'))


def test_the_page_is_that_of_the_code(page):
  assert page == PAGE.read_text(), 'write it again: python tests/bad_inputs.py > docs/refusals.md'


def test_each_is_refused_in_one_line_that_says_what_is_allowed(tmp_path):
  found = list(bad_inputs.messages(tmp_path))
  assert len(found) >= 60
  for _, what, said in found:
    assert 'allowed: ' in said and '\n' not in said, (what, said)
