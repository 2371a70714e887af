"""Datasets: rendered rooms, labels on disk, and the archives that they come in."""
