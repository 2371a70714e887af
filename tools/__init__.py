"""Programs beside training and evaluation, each run as `python -m tools.NAME`."""
