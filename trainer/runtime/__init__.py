"""Devices, processes, and the files of a training run."""
