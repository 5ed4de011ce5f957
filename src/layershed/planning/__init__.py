"""Which sublayers go, and when. Needs no torch."""
