"""RL Zoo with sacv: registration, hyperparameters, search space, shared studies, errors in one sentence."""

import argparse
import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import yaml
from stable_baselines3 import SAC

from sb3_softvalue import SACV, cli

rl_zoo3 = pytest.importorskip("rl_zoo3", reason='RL Zoo is not installed: pip install "sb3_softvalue[zoo]"')
optuna = pytest.importorskip("optuna", reason="optuna is not installed")

# The zoo leaves files open, above all where it ends with an error
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PENDULUM = ["--algo", "sacv", "--env", "Pendulum-v1"]


class PruneSecond(optuna.pruners.BasePruner):
    """Prunes the second trial of a study."""

    def prune(self, study: Any, trial: Any) -> bool:
        return trial.number == 1


@pytest.fixture(autouse=True)
def _zoo_leaves_no_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The zoo patches Gymnasium, a front-end its process: what they change is put back after each test."""
    import sb3_softvalue.zoo.environment  # noqa: F401 (registers the environments)

    monkeypatch.chdir(tmp_path)
    for owner, name in (
        (gym.wrappers, "TimeLimit"),
        (gym.wrappers.common, "TimeLimit"),
        (gym.envs.registration, "TimeLimit"),
        (subprocess, "call"),
        (sys, "argv"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setitem(rl_zoo3.ALGOS, "sacv", SACV)
    environ = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environ)
    gc.collect()


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run ``sb3-softvalue`` with these arguments in this process."""

    def launch(*arguments: Any) -> None:
        monkeypatch.setattr(sys, "argv", ["sb3-softvalue", *map(str, arguments)])
        cli.main()

    return launch


@pytest.fixture
def trained(launch: Callable[..., None]) -> Path:
    """A short run on Pendulum-v1."""
    launch("train", *PENDULUM, "-n", 200, "-f", "logs", "--eval-freq", -1, "--num-threads", 1)
    return Path("logs/sacv/Pendulum-v1_1/Pendulum-v1.zip")


def manager(algo: str = "sacv", env_id: str = "Pendulum-v1", **kwargs: Any) -> Any:
    from rl_zoo3.exp_manager import ExperimentManager

    return ExperimentManager(argparse.Namespace(), algo, env_id, "logs", **kwargs)


def test_registering_again_changes_nothing() -> None:
    from rl_zoo3.exp_manager import ExperimentManager

    import sb3_softvalue.zoo

    before = (ExperimentManager.__init__, ExperimentManager._preprocess_hyperparams, dict(rl_zoo3.ALGOS))
    importlib.reload(sb3_softvalue.zoo)
    assert (ExperimentManager.__init__, ExperimentManager._preprocess_hyperparams, dict(rl_zoo3.ALGOS)) == before
    assert rl_zoo3.ALGOS["sacv"] is SACV and rl_zoo3.ALGOS["sac"] is SAC


def test_only_sacv_without_conf_file_has_our_hyperparameters() -> None:
    assert Path(manager().config).parent.name == "zoo"
    assert manager(config="mine.yml").config == "mine.yml"
    assert Path(manager("sac").config).parent.parent.name == "rl_zoo3"


def test_sacv_yml_has_the_entries_of_sac_yml_but_for_what_was_tuned() -> None:
    from sb3_softvalue.zoo.registration import HYPERPARAMS

    ours = yaml.safe_load(HYPERPARAMS.read_text())
    theirs = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml").read_text())
    newer = {"FetchReach-v4": "FetchReach-v1"}
    tuned = {"HalfCheetah-v5": {"action_prior": "normalized_uniform", "gradient_steps": 2}}
    for env_id, hyperparams in ours.items():
        assert hyperparams == theirs[newer.get(env_id, env_id.replace("-v5", "-v4"))] | tuned.get(env_id, {}), env_id


def test_learning_rates_of_sacv_may_be_schedules_too() -> None:
    rates = {"learning_rate": "lin_1e-3", "qf_learning_rate": 1e-4, "vf_learning_rate": "lin_3e-4"}
    hyperparams, *_ = manager()._preprocess_hyperparams({**rates, "ent_coef_learning_rate": None, "n_timesteps": 10})
    assert hyperparams["learning_rate"](0.5) == 5e-4
    assert hyperparams["qf_learning_rate"](0.5) == 1e-4
    assert hyperparams["vf_learning_rate"](0.5) == pytest.approx(1.5e-4)
    assert hyperparams["ent_coef_learning_rate"] is None


def test_schedule_of_a_learning_rate_is_followed_and_survives_playing(launch: Callable[..., None]) -> None:
    launch("train", *PENDULUM, "-n", 200, "-f", "logs", "--eval-freq", -1, "-params", "vf_learning_rate:'lin_1e-3'")
    model = SACV.load("logs/sacv/Pendulum-v1_1/Pendulum-v1.zip")
    assert model.value.optimizer.param_groups[0]["lr"] < 1e-4
    launch("enjoy", *PENDULUM, "-f", "logs", "--no-render", "-n", 10)


@pytest.mark.parametrize("her", [False, True])
@pytest.mark.parametrize("temperature", ["auto", "fixed"])
def test_search_space_and_converter_agree(temperature: str, her: bool) -> None:
    from sb3_softvalue.zoo.search_space import convert_sacv_params, sample_sacv_params

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.enqueue_trial({"temperature": temperature, "temperature_value": 0.25})
    trial = study.ask()
    sampled = sample_sacv_params(trial, 1, 1, {"using_her_replay_buffer": her, "her_kwargs": {}})
    assert convert_sacv_params(trial.params) == sampled
    assert sampled["ent_coef"] == {"auto": "auto_0.25", "fixed": 0.25}[temperature]
    assert ("replay_buffer_kwargs" in sampled) == her
    if not her:
        assert SACV("MlpPolicy", "Pendulum-v1", **sampled).vf_learning_rate == trial.params["vf_learning_rate"]


def test_pruned_trials_and_every_trial_id(launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from rl_zoo3.exp_manager import ExperimentManager

    monkeypatch.setattr(ExperimentManager, "_create_pruner", lambda manager, name: PruneSecond())
    study = ["--storage", "study.log", "--study-name", "test"]
    short = ["-n", 120, "--eval-episodes", 1, "-f", "logs", "--num-threads", 1]
    launch("train", *PENDULUM, "-optimize", *study, *short, "--n-trials", 3, "--n-evaluations", 2, "--n-startup-trials", 2)
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend("study.log"))
    trials = optuna.load_study(study_name="test", storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    for trial in trials:
        launch("train", *PENDULUM, *study, *short, "--trial-id", trial.number, "--eval-freq", -1)
        capsys.readouterr()
        model = SACV.load(f"logs/sacv/Pendulum-v1_{trial.number + 2}/Pendulum-v1.zip")
        assert model.ent_coef == trial.user_attrs["ent_coef"]
        assert model.batch_size == trial.user_attrs["batch_size"]
    with pytest.raises(SystemExit, match="has no trial 7 of a study 'test'"):
        launch("train", *PENDULUM, *study, *short, "--trial-id", 7)


def test_shared_study_counts_and_repeats_the_trial_of_a_dead_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    from sb3_softvalue.zoo import shared_study

    def study() -> Any:
        return optuna.create_study(storage="ignored", study_name="test", load_if_exists=True)

    with shared_study.create_shared_study("study.log", max_total_trials=3):
        with pytest.warns(UserWarning, match="supposed to be used with"):
            dead = study().ask()
        dead.suggest_float("x", 0.0, 1.0)
        monkeypatch.setattr(shared_study, "GRACE_SECONDS", -1)
        survivor = study()
        survivor.optimize(lambda trial: trial.suggest_float("x", 0.0, 1.0))
    states = [trial.state.name for trial in survivor.trials]
    assert states == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    assert survivor.trials[1].params == dead.params


def test_played_models_have_a_replay_buffer_of_one(launch: Callable[..., None], trained: Path, capsys: Any) -> None:
    launch("enjoy", *PENDULUM, "-f", "logs", "--no-render", "-n", 210)
    assert "Episode Length 200" in capsys.readouterr().out
    assert rl_zoo3.ALGOS["sacv"].load(trained).replay_buffer.buffer_size == 1


def test_parallel_training_trains_sacv() -> None:
    from rl_zoo3.callbacks import ParallelTrainCallback

    model = SACV("MlpPolicy", "Pendulum-v1", train_freq=(1, "episode"), batch_size=16)
    callback = ParallelTrainCallback(gradient_steps=2)
    model.learn(700, callback=callback)
    assert type(callback._model) is SACV
    assert callback._model._n_updates > 0


def test_videos_without_display(launch: Callable[..., None], trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "MUJOCO_GL"):
        monkeypatch.delenv(name, raising=False)
    launch("record_video", *PENDULUM, "-f", "logs", "-n", 5)
    assert os.environ["MUJOCO_GL"] == "egl"
    assert list(trained.parent.glob("videos/*.mp4"))


def test_push_to_hub_uploads(launch: Callable[..., None], trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class OfflineApi:
        def create_repo(self, **kwargs: Any) -> str:
            return kwargs["repo_id"]

        def snapshot_download(self, repo_id: str, local_dir: Path) -> None:
            local_dir.mkdir(parents=True)

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
            uploaded.extend(sorted(path.name for path in folder_path.iterdir()))

    uploaded: list[str] = []
    monkeypatch.setattr(huggingface_hub, "HfApi", OfflineApi)
    launch("push_to_hub", *PENDULUM, "-f", "logs", "-orga", "nobody", "--no-render")
    assert {"README.md", "args.yml", "config.yml", "sacv-Pendulum-v1.zip", "results.json"} <= set(uploaded)
    assert "- name: SACV" in Path("hub/sacv-Pendulum-v1/README.md").read_text()


WRONG = {
    "environment": (["train", "--algo", "sacv", "--env", "Pendulun-v1"], "you maybe meant Pendulum-v1"),
    "package": (["train", *PENDULUM, "--gym-packages", "nowhere"], "No module named 'nowhere': install it"),
    "conf-file": (["train", *PENDULUM, "--conf-file", "mistyped.yml"], "No such file or directory: 'mistyped.yml'"),
    "action space": (["train", "--algo", "sacv", "--env", "CartPole-v1"], "The algorithm only supports"),
    "parameter": (["train", *PENDULUM, "-params", "temperature:3"], "unexpected keyword argument 'temperature'"),
    "string": (["train", *PENDULUM, "-params", "learning_rate:lin_3e"], "quote a string twice"),
    "agent": (["enjoy", *PENDULUM, "-f", "nowhere", "--no-render"], "folder was not found"),
    "display": (["enjoy", *PENDULUM, "-f", "nowhere"], "There is no display: add --no-render"),
    "plot": (["plot_train", "-a", "sacv", "-e", "Pendulum-v1", "-f", "nowhere"], "No such file or directory"),
    "database": (
        ["train", *PENDULUM, "-optimize", "--storage", "sqlite:////nowhere/study.db", "--study-name", "test"],
        "the study's storage cannot be used",
    ),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG)
def test_errors_are_one_sentence(
    arguments: list[str], sentence: str, launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SystemExit) as error:
        launch(*arguments)
    assert str(error.value).startswith(f"sb3-softvalue {arguments[0]}: ")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_errors_in_foreign_code_keep_their_traceback(launch: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(gym.Env):
        action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        observation_space = action_space

        def reset(self, **kwargs: Any) -> Any:
            raise ValueError("broken")

    monkeypatch.setitem(gym.registry, "Broken-v0", gym.envs.registration.EnvSpec("Broken-v0", Broken))
    with pytest.raises(ValueError, match="broken"):
        launch("train", "--algo", "sacv", "--env", "Broken-v0", "-n", 1)
    with pytest.raises(FileNotFoundError):
        launch("--traceback", "train", *PENDULUM, "--conf-file", "mistyped.yml")


def test_record_training_without_ffmpeg_is_one_sentence(
    launch: Callable[..., None], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(SystemExit, match="record_training needs ffmpeg"):
        launch("record_training", *PENDULUM, "-f", "logs")


def test_resume(launch: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume begins, continues, and says when all is done."""
    from rl_zoo3.exp_manager import ExperimentManager

    learn = ExperimentManager.learn
    for n_timesteps, said in (
        (150, "Checkpoint at step 150"),
        (220, "from step 150"),
        (220, "All 220 steps are done"),
    ):
        # Each launch is a process of its own
        monkeypatch.setattr(ExperimentManager, "learn", learn)
        launch("train", *PENDULUM, "-f", "logs", "--eval-freq", -1, "--resume", "kept", "-n", n_timesteps, "--num-threads", 1)
        assert said in capsys.readouterr().out
    assert len(list(Path("kept").glob("checkpoint-*"))) == 2


@pytest.mark.parametrize("arguments", [["--resume"], ["--resume", "-n", "5"]])
def test_resume_needs_a_folder(arguments: list[str], launch: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch("train", *PENDULUM, *arguments)
    assert "train: error: argument --resume: expected one argument" in capsys.readouterr().err


def test_resume_is_for_off_policy_algorithms(
    launch: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_zoo3.exp_manager import ExperimentManager

    learn = ExperimentManager.learn
    for algorithm, n_timesteps in (("sac", 50), ("sac", 60)):
        monkeypatch.setattr(ExperimentManager, "learn", learn)
        launch(
            "train", "--algo", algorithm, *PENDULUM[2:], "-f", "logs", "--eval-freq", -1, "-n", n_timesteps, "--resume=kept"
        )
    assert "from step 50" in capsys.readouterr().out
    monkeypatch.setattr(ExperimentManager, "learn", learn)
    with pytest.raises(SystemExit, match="--resume works with off-policy algorithms only, not with ppo"):
        launch("train", "--algo", "ppo", *PENDULUM[2:], "-f", "logs", "-n", 5, "--resume=kept")
