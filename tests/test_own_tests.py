"""The generated project's own tests: the longest of all, in a file of their own."""

import sys

import pytest
from test_generated import passed, run

pytestmark = pytest.mark.slow


def test_the_project_s_own_tests_pass(bake):
    """A project whose tests fail on the day it is made. The count guards against passing by absence."""
    done = run(bake(project="own-tests"), sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
    assert passed(done) > 550
