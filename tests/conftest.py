import hypothesis
import pytest

from textenv.cli import imported

# The same examples in every run: one that fails here fails for everybody.
hypothesis.settings.register_profile("seeded", derandomize=True)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(autouse=True)
def modules_that_are_remembered():
    """What one test imports by name is no matter of the runs of the next."""
    yield
    imported.clear()
