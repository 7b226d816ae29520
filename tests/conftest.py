"""How the tests are shared out to the workers of `pytest -n 2 --dist loadgroup`: the tests of a file stay together, as they share servers."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    "Notebooks share nothing, so each goes to whoever is free: they come last, and both workers end together."
    for item in items:
        if item.path.name != "test_notebooks.py":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
