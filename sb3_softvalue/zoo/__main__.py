"""``python -m sb3_softvalue.zoo <front-end> …``, the same as ``sb3-softvalue <front-end> …``."""

from sb3_softvalue.zoo.launcher import main

if __name__ == "__main__":
    main()
