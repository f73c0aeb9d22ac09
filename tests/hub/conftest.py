"""A Hub on the loopback address for each test, and a client that waits for nothing.

The client reads its settings from the environment when it is imported, which tests/conftest.py has done by now with
HF_HUB_OFFLINE=1. Both versions of it look the settings up in `constants` at each call, so they are replaced there.
"""

from types import SimpleNamespace

import huggingface_hub
import pytest
from example_runs import train
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http
from server import Hub


@pytest.fixture
def waits(monkeypatch):
    """The waits of the client before it repeats a request, in seconds. They take no time."""
    waited = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def hub(monkeypatch, waits):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)  # that of the developer's own login
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()  # the client's connections are of before
    with Hub() as hub:
        # Of clients that are given no address.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.endpoint + template.removeprefix(constants._HF_DEFAULT_ENDPOINT),
        )
        yield hub
    huggingface_hub.close_session()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of each workload, by task; trained when it is first asked for."""

    class Trained(dict):
        def __missing__(self, task):
            self[task] = train(task, tmp_path_factory.mktemp("trained") / task)
            return self[task]

    return Trained()


@pytest.fixture
def logged_in(hub, monkeypatch):
    """The token is where users have it: in the environment."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
