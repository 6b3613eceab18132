"""The annotation formats that focaldet can read, one module per format."""
