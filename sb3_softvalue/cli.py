"""The command ``sb3-softvalue``."""

import sys


def main() -> None:
    """Run the front-end that the command line names. ``report`` needs no RL Zoo; its launcher knows all others."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["report"]:
        from sb3_softvalue import figures

        sys.exit(figures.main(arguments[1:]))
    try:
        from sb3_softvalue.zoo import launcher
    except ImportError as error:
        only_report = f"{error} Without it, `sb3-softvalue report RUN_DIR` is the only front-end (see `report --help`)."
        if arguments in ([], ["-h"], ["--help"]):
            print(f"usage: sb3-softvalue report RUN_DIR [RUN_DIR ...]\n\n{only_report}")
            return
        sys.exit(only_report)
    launcher.main()
