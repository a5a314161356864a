"""Write a version in the formats of other tools."""
