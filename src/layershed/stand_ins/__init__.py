"""What runs in place of a dropped module."""
