"""Evaluation: real tasks on the model in memory, long contexts, and where in a text it predicts well."""
