"""Drop plans, drop schedules and the selection of sublayers. Imports no torch."""
