"""Cut large images into overlapping windows, and merge what is found in them."""

from focaldet._tiles._sources import WindowSources, check_tile

__all__ = ["WindowSources", "check_tile"]
