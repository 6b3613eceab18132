"""``python -m focaldet.export``, the old name of ``focaldet export``."""

from focaldet._deprecation import run_moved_command

if __name__ == "__main__":
    run_moved_command("python -m focaldet.export", "export")
