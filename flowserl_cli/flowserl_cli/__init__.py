"""What a person types: config/ composed with the words of the command line, and both sides started for start.sh."""
