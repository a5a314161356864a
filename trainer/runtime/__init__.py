"""Devices and processes, memory, and the files of a training."""
