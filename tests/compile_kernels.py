"""``python -m tests.compile_kernels``: nano starts once in each type, so that its kernels are compiled and kept.

On a fresh clone a dozen servers would otherwise start side by side, each compiling all of them for itself, and be late.
"""

from deploy.local import LocalDeployment
from deploy.settings import ServeSettings, model_directory


def main() -> None:
    for dtype in ("auto", "float32"):
        options = {"model": str(model_directory("nano")), "port": 0, "dtype": dtype, "vision_nice": 0}
        with LocalDeployment(ServeSettings.model_validate(options)):
            pass


if __name__ == "__main__":
    main()
