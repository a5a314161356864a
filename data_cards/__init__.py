"""Templates of the cards, as package data, and the cards of the datasets we publish."""
