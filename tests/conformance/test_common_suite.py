"""Without transformers' common tests a developer's run goes on, and CI fails."""

import common_suite
import pytest


@pytest.fixture(autouse=True)
def nothing_to_be_had(monkeypatch):
    def fetch():
        raise RuntimeError("the source distribution cannot be fetched")

    monkeypatch.setattr(common_suite, "fetch", fetch)


@pytest.mark.parametrize("value", [None, "", "false", "0"])
def test_elsewhere_they_are_skipped(monkeypatch, value):
    monkeypatch.delenv("CI", raising=False)
    if value is not None:
        monkeypatch.setenv("CI", value)
    with pytest.raises(pytest.skip.Exception, match="cannot be fetched"):
        common_suite.load("test_modeling_common")


@pytest.mark.parametrize("value", ["true", "1"])
def test_in_ci_they_are_an_error(monkeypatch, value):
    monkeypatch.setenv("CI", value)
    with pytest.raises(RuntimeError, match="cannot be fetched"):
        common_suite.load("test_modeling_common")
