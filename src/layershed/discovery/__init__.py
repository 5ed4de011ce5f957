"""Finding the sublayers of a transformer, and proving what was found."""
