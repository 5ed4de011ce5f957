"""The command line: parsing, commands and their output."""
