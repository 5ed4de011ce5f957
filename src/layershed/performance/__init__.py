"""Speed and size: measured, predicted, and reached."""
