"""Devices, processes, memory estimates, and the files of a training run."""
