"""RL Zoo's front-ends with sacv, each in a process of its own, and the files that each promises."""

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml

pytest.importorskip("rl_zoo3", reason='RL Zoo is not installed: pip install "sb3_softvalue[zoo]"')

# imageio leaves the pipes of its ffmpeg open
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

SCRIPT = Path(sys.executable).with_name("sb3-softvalue")
HYPERPARAMS = Path(__file__).parents[1] / "sb3_softvalue" / "zoo" / "sacv.yml"
PENDULUM = ["--algo", "sacv", "--env", "Pendulum-v1"]
# No display, and one thread for each process
ENVIRON = {name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL")}
ENVIRON["OMP_NUM_THREADS"] = "1"
ENVIRON["PYTHONPATH"] = str(Path(__file__).parent)


def run(folder: Path, *command: Any) -> str:
    """Run a command in a folder; it has to succeed."""
    process = subprocess.run(
        [str(word) for word in command], cwd=folder, env=ENVIRON, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.returncode == 0, process.stdout
    return process.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where sacv was trained on Pendulum-v1 for 1000 steps."""
    folder = tmp_path_factory.mktemp("zoo")
    run(folder, SCRIPT, "train", *PENDULUM, "-n", 1000, "--eval-freq", 500, "--save-freq", 500, "--seed", 0, "-f", "logs")
    run_folder = folder / "logs" / "sacv" / "Pendulum-v1_1"
    for name in ("Pendulum-v1.zip", "best_model.zip", "rl_model_500_steps.zip", "evaluations.npz", "0.monitor.csv"):
        assert (run_folder / name).is_file(), name
    return folder


def frames(video: Path) -> np.ndarray:
    """All frames of a video, shape (n, height, width, 3)."""
    imageio = pytest.importorskip("imageio.v3", reason="imageio is not installed")
    pictures = np.stack(list(imageio.imiter(video)))
    gc.collect()
    return pictures


def test_enjoy(folder: Path) -> None:
    assert "Mean reward:" in run(folder, SCRIPT, "enjoy", *PENDULUM, "-f", "logs", "--exp-id", 1, "--no-render", "-n", 400)


def test_train_continues(folder: Path) -> None:
    before = folder / "logs" / "sacv" / "Pendulum-v1_1" / "Pendulum-v1.zip"
    output = run(folder, SCRIPT, "train", *PENDULUM, "-i", before, "-n", 200, "--eval-freq", -1, "-f", "continued")
    assert "Loading pretrained agent" in output
    assert (folder / "continued" / "sacv" / "Pendulum-v1_1" / "Pendulum-v1.zip").is_file()


def test_optimize_and_train_a_trial(folder: Path) -> None:
    study = [*PENDULUM, "--storage", "study.log", "--study-name", "test", "-f", "tuned", "-n", 300]
    run(folder, SCRIPT, "train", *study, "-optimize", "--n-trials", 4, "--n-evaluations", 2, "--eval-episodes", 1)
    [report] = (folder / "tuned" / "sacv").glob("report_*.csv")
    assert len(report.read_text().splitlines()) == 5
    assert "Loading from Optuna study" in run(folder, SCRIPT, "train", *study, "--trial-id", 3, "--eval-freq", -1)
    assert list((folder / "tuned" / "sacv").glob("Pendulum-v1_*/Pendulum-v1.zip"))


def test_record_video(folder: Path) -> None:
    run(folder, SCRIPT, "record_video", *PENDULUM, "-f", "logs", "--exp-id", 1, "-n", 50, "-o", "film")
    [video] = (folder / "film").glob("final-model-sacv-Pendulum-v1-*.mp4")
    # A red pendulum on white that moves
    pictures = frames(video).astype(int)
    assert len(pictures) >= 50
    assert (pictures[0][..., 0] - pictures[0][..., 2] > 60).sum() > 500
    assert np.abs(pictures[0] - pictures[20]).max() > 60


def test_record_training(folder: Path) -> None:
    run(folder, SCRIPT, "record_training", *PENDULUM, "-f", "logs", "--exp-id", 1, "-n", 50, "--gif")
    videos = folder / "logs" / "sacv" / "Pendulum-v1_1" / "videos"
    # Two checkpoints, the last and the best model
    assert len(frames(videos / "training.mp4")) >= 4 * 50
    assert (videos / "training.gif").is_file()


def test_record_video_of_a_mujoco_task(folder: Path) -> None:
    pytest.importorskip("mujoco", reason='MuJoCo is not installed: pip install "sb3_softvalue[mujoco]"')
    cheetah = ["--algo", "sacv", "--env", "HalfCheetah-v5", "-f", "cheetah"]
    output = run(folder, SCRIPT, "train", *cheetah, "-n", 3000, "--eval-freq", -1)
    assert "('learning_starts', 10000)" in output and "sb3_softvalue/zoo/sacv.yml" in output
    run(folder, SCRIPT, "record_video", *cheetah, "-n", 30, "-o", "cheetah_film")
    [video] = (folder / "cheetah_film").glob("*.mp4")
    pictures = frames(video).astype(int)
    # A chequered floor under a blue sky, not one colour
    assert pictures[0].std() > 20
    assert np.abs(pictures[0] - pictures[20]).max() > 60


def test_plots(folder: Path) -> None:
    run(folder, SCRIPT, "plot_train", "-a", "sacv", "-e", "Pendulum-v1", "-f", "logs", "-w", 2)
    assert (folder / "plot_train-1.png").is_file()
    for algo in ("sac", "sacv"):
        for seed in (0, 1):
            short = ["-n", 400, "--eval-freq", 200, "--eval-episodes", 2, "--seed", seed, "-f", "compared"]
            run(folder, SCRIPT, "train", "--algo", algo, "--env", "Pendulum-v1", *short)
    results = run(folder, SCRIPT, "all_plots", "-a", "sac", "sacv", "-e", "Pendulum-v1", "-f", "compared", "-o", "results")
    assert "SACV" in results and (folder / "results.pkl").is_file()
    run(folder, SCRIPT, "plot_from_file", "-i", "results.pkl", "--rliable", "-vs", "-iqm", "-o", "scores.svg")
    assert (folder / "scores.svg").is_file()
    assert len(list(folder.glob("plot_from_file-*.png"))) >= 5


def test_benchmark_reaches_sacv(folder: Path) -> None:
    run(folder, SCRIPT, "benchmark", "--log-dir", "logs", "--no-hub", "-n", 400, "--benchmark-dir", "table")
    assert "|sacv" in (folder / "table" / "benchmark.md").read_text()


def test_the_zoo_itself_does_not_change(folder: Path) -> None:
    output = run(
        folder,
        sys.executable,
        "-m",
        "rl_zoo3.train",
        "--algo",
        "sac",
        "--env",
        "Pendulum-v1",
        "-n",
        200,
        "--eval-freq",
        -1,
        "-f",
        "own",
    )
    assert "rl_zoo3/hyperparams/sac.yml" in output
    process = subprocess.run([sys.executable, "-m", "rl_zoo3.train", *PENDULUM], env=ENVIRON, text=True, capture_output=True)
    assert process.returncode == 2 and "invalid choice: 'sacv'" in process.stderr


def installed(task: str) -> bool:
    """Whether the simulator of a task is there. Not imported here: Box2D's module crashes where warnings are errors."""
    simulator = gym.spec(task).entry_point.split(".")[2] if task in gym.registry else ""
    module = {"box2d": "Box2D", "mujoco": "mujoco"}.get(simulator)
    return module is None or importlib.util.find_spec(module) is not None


ENTRIES = [name for name in yaml.safe_load(HYPERPARAMS.read_text()) if name != "default"]
PAPER = ["HalfCheetah-v5", "Ant-v5", "Hopper-v5", "Walker2d-v5", "Humanoid-v5"]
CONF_FILES = [
    *((task, []) for task in ENTRIES),
    *((task, ["--conf-file", f"sb3_softvalue.zoo.{name}"]) for name in ("paper", "paper_hard") for task in PAPER),
]


@pytest.mark.parametrize(
    ("task", "conf_file"), CONF_FILES, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_every_entry_trains(task: str, conf_file: list[str], tmp_path: Path) -> None:
    if not installed(task):
        pytest.skip(f"{task} is not installed here")
    short = ["-n", 200, "--eval-freq", -1, "-params", "learning_starts:100", "buffer_size:1000"]
    run(
        tmp_path,
        SCRIPT,
        "train",
        "--algo",
        "sacv",
        "--env",
        task,
        "-f",
        "logs",
        *conf_file,
        "--gym-packages",
        "goal_env",
        *short,
    )
    assert (tmp_path / "logs" / "sacv" / f"{task}_1" / f"{task}.zip").is_file()


def test_her_agent_is_played(tmp_path: Path) -> None:
    reach = ["--algo", "sacv", "--env", "FetchReach-v4", "-f", "logs", "--gym-packages", "goal_env"]
    run(tmp_path, SCRIPT, "train", *reach, "-n", 200, "--eval-freq", -1, "-params", "learning_starts:100", "buffer_size:1000")
    assert "Success rate" in run(tmp_path, SCRIPT, "enjoy", *reach, "--no-render", "-n", 100)
