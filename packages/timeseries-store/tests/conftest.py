import pytest
from icos_fl_timeseries_store.testing import running_store


@pytest.fixture(scope="session")
def dataclay_settings(tmp_path_factory):
    with running_store(tmp_path_factory.mktemp("store")) as settings:
        yield settings
