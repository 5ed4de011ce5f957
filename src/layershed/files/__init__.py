"""Files that appear whole or not at all, and files from strangers."""
