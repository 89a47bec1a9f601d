import pytest

from textenv.cli import imported


@pytest.fixture(autouse=True)
def modules_that_are_remembered():
    """What one test imports by name is no matter of the runs of the next."""
    yield
    imported.clear()
