"""A contender of a speed measurement: worker.py in a process of its own, which works each time it is asked to."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


class Contender:
    """
    :param work: "updates", "learn" or "products"
    :param algo: "sac", "tqc", "sbx" or "sacv-" with an execution
    :param settings: command line of worker.py
    :param python: of the environment that has the algorithm
    """

    def __init__(self, work: str, algo: str, settings: dict[str, Any], python: str = sys.executable):
        flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        # What earlier runs have compiled must not help: a preparation costs what it costs on a new machine
        self.cache = tempfile.TemporaryDirectory()
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [python, "-m", "benchmarks.speed.worker", work, "--algo", algo, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": self.cache.name, "PYTHONPATH": path},
        )

    def read(self) -> dict[str, Any]:
        """:return: the next message"""
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"{' '.join(map(str, self.process.args))} failed:\n{self.process.stderr.read()}")

    def ask(self, command: str) -> dict[str, Any]:
        """
        :param command: what to do next
        :return: the message when it is done
        """
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.read()

    def seconds_each(self, times: int) -> float:
        """
        :param times: how often to do the work, about
        :return: the mean time it takes
        """
        answer = self.ask(str(times))
        return answer["seconds"] / answer["times"]

    def end(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.communicate()
        self.cache.cleanup()
