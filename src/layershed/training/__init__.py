"""A causal language model and its text, for the command line."""
