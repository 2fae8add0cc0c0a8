"""The commands of the CLI: each parses its arguments, calls the package and prints."""
