"""Templates of dataset and model cards, as package data."""
