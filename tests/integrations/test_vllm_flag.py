"""Real vLLM on the CPU, changed so that it reads `flashnorm_folded` by itself, with the plugin (`make test-vllm`)."""

import pytest

import flashnorm
from integrations.conftest import FINAL, Results, assert_same, config_changed, job, needs_vllm, run_jobs, source

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("vllm")
    original = source(folder, "llama")
    flashnorm.convert(original, folder / "folded")
    flashnorm.convert(original, folder / "norms kept", keep_norms=True)
    flashnorm.convert(original, folder / "final kept", keep=["final"])
    config_changed(folder / "folded", folder / "flag alone", leave_the_flag)
    first = job("source", original, patch="read_the_flag")
    forms = ("folded", "norms kept", "final kept", "flag alone")
    return run_jobs(folder, [first, *(job(form, folder / form) for form in forms)], timeout=900)


def leave_the_flag(config: dict[str, object]) -> None:
    del config["flashnorm"], config["flash_norm"]


@pytest.mark.parametrize("form", ["folded", "norms kept", "final kept", "flag alone"])
def test_the_plugin_decides(results: Results, form: str) -> None:
    """The norms that the config names have no weight, and a final norm that stays has its own."""
    assert_same(results[form], results["source"])
    assert results[form]["vectors"] == ([FINAL] if form == "final kept" else [])
