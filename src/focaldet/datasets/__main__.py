"""``python -m focaldet.datasets``, the old name of ``focaldet check``."""

from focaldet._deprecation import run_moved_command

if __name__ == "__main__":
    run_moved_command("python -m focaldet.datasets", "check")
