"""How `pytest -n 2` shares the tests out: those of a file stay with one worker, as they share servers, homes and their order."""

import pytest
from xdist.scheduler import LoadScopeScheduling


class ByFile(LoadScopeScheduling):
    "Files whole, the largest first; notebooks share nothing, so each goes to whoever is free, and both workers end together."

    def _split_scope(self, nodeid):
        file = nodeid.partition("::")[0]
        return nodeid if file.endswith("test_notebooks.py") else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "Not `--dist loadgroup`: xdist 3.8 writes the group where pytest 9 does not look, and takes files apart."
    return ByFile(config, log)
