"""Meshes that accelerate refuses on a CPU: its check is lifted in the launched process. 2 ranks, gloo."""

from pathlib import Path

import pytest
from cases import gnp, result_of, run_cases
from mesh_worker import make_decoder
from runs import LOG_TOLERANCE, WEIGHTS_TOLERANCE, reference_run
from tiny import relative_distance


pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "mesh_worker.py"
CASES = {
    f"tp-{'tied' if tied else 'untied'}-accumulation{accumulation}-alpha{alpha}": {
        "tied": tied,
        "distributed": {"tp_size": 2, "tp_plan": "auto"},
        "args": gnp(alpha, gradient_accumulation_steps=accumulation),
    }
    for tied in (False, True)
    for accumulation, alpha in ((2, 0.8), (1, 1.0))
}


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return run_cases(CASES, tmp_path_factory.mktemp("meshes"), worker=WORKER)


@pytest.mark.parametrize("name", CASES)
def test_tensor_parallelism_alone_matches_the_reference(results, name):
    """Both ranks see each micro-batch: to the reference they are one."""
    case, result = CASES[name], result_of(results, name)
    accumulation, alpha = case["args"]["gradient_accumulation_steps"], case["args"]["gnp_alpha"]
    model = make_decoder(case["tied"])
    start, expected, reference_logs = reference_run("llama", accumulation, alpha=alpha, model=model)
    distance = relative_distance(result["weights"], expected, start)
    print(f"{distance:.1e} of the distance travelled")
    assert distance < WEIGHTS_TOLERANCE
    for log in ("loss", "gnp_grad_norm", "gnp_perturbed_loss"):
        assert result["logs"][log] == pytest.approx([entry[log] for entry in reference_logs], rel=LOG_TOLERANCE), log
