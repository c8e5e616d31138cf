"""The benchmark of learning on a Ray cluster that loses a node."""

import threading
import time

import pytest

from tests.learning_helpers import without_times

ray = pytest.importorskip("ray", reason="Ray, which is an extra of its own, is not installed")
pytest.importorskip("tqdm", reason="the benchmark's progress bar is not installed")
from benchmarks.learning.run import run_in_process  # noqa: E402  (only where Ray is installed)
from benchmarks.learning.sweep import Sweep, on_ray  # noqa: E402  (only where Ray is installed)
from benchmarks.learning.tasks import Run  # noqa: E402  (only where Ray is installed)

SMALL = {"learning_starts": 100, "batch_size": 8, "buffer_size": 5000, "policy_kwargs": {"net_arch": [8]}}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray itself
def test_lost_node(tmp_path):
    """Two nodes with room for one run each, of which one is killed amid its run: every run is complete, and once."""
    from ray.cluster_utils import Cluster

    runs = [Run("small", "Pendulum-v1", 4000, 100, algorithm, seed, SMALL) for seed in (0, 1) for algorithm in ("sac", "sacv")]
    path = tmp_path / "ray" / "small.csv"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        sweep = Sweep(runs, path.parent)
        failures: list[str] = []
        runner = on_ray(cluster.address, threads=1)
        driver = threading.Thread(target=lambda: failures.extend(sweep.execute(runner, len(runs))))
        driver.start()

        def begun() -> set[str]:
            return {f"{algorithm} {seed}" for _, algorithm, seed, *_ in without_times(path)[1:]}

        while len(begun()) < 2:
            assert driver.is_alive()
            time.sleep(0.1)
        text = path.read_text()
        assert len(begun()) == 2 and ",4000," not in text, "each node is amid a run of its own"
        cluster.remove_node(nodes[1], allow_graceful=False)
        driver.join()
        assert failures == []
        assert [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]].count(1) == 1
    finally:
        ray.shutdown()
        cluster.shutdown()

    lines = without_times(path)
    assert [cells[1:4] for cells in lines[1:]] == [
        [run.algorithm, str(run.seed), str(steps)]
        for run in sorted(runs, key=lambda run: (run.algorithm, run.seed))
        for steps in run.evaluations
    ]
    # The same evaluations as without Ray, those of the lost run too
    assert Sweep(runs, tmp_path / "local").execute(run_in_process, 2) == []
    assert lines == without_times(tmp_path / "local" / "small.csv")
