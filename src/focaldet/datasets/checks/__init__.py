"""The dataset checker: :func:`check_dataset` finds mistakes in a dataset before training."""
