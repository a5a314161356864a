"""From images to a checked, versioned and published vision-language dataset."""
