"""`adafuse serve` with other families, one of them with its ranks on two machines, as far as vLLM knows."""

import pytest
from servers import check_both, running


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("family", "machines"), [("gemma3", 1), ("qwen3", 2)])
def test_both_models(family, machines, tmp_path):
    with running(tmp_path, family=family, machines=machines) as another:
        check_both(another)
