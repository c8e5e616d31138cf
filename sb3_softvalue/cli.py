"""The command ``sb3-softvalue``."""

import sys


def main() -> None:
    """Run the front-end that the command line names: a report is written without RL Zoo, whose launcher knows all others."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["report"]:
        from sb3_softvalue import figures

        sys.exit(figures.main(arguments[1:]))
    try:
        from sb3_softvalue.zoo import launcher
    except ImportError as error:
        sys.exit(f"{error} Without it there is `sb3-softvalue report RUN_DIR`.")
    launcher.main()
