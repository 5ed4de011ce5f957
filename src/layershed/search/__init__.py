"""Search: which set of sublayers to drop, by the damage that the set does. Nothing here changes a weight."""
