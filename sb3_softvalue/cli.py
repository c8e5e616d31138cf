"""The command ``sb3-softvalue``."""

import sys


def main() -> None:
    """Run the front-end named on the command line. ``report`` works without RL Zoo, all others need it."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["report"]:
        from sb3_softvalue import figures

        sys.exit(figures.main(arguments[1:]))
    try:
        from sb3_softvalue.zoo import launcher
    except ImportError as error:
        only_report = f"{error} Without it, only `sb3-softvalue report RUN_DIR` is available (see `report --help`)."
        if arguments in ([], ["-h"], ["--help"]):
            print(f"usage: sb3-softvalue report RUN_DIR [RUN_DIR ...]\n\n{only_report}")
            return
        sys.exit(only_report)
    launcher.main()
