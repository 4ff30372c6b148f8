"""What a person runs: each file starts with its command."""
