"""One import of the published implementations for all reference tests."""

import pytest


@pytest.fixture(scope="session")
def stock():
    from reference.oracle import stock as load

    return load()
