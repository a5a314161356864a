"""Executors: run the steps in one process or on a cluster."""
